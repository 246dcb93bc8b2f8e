"""Proof of a tree of resume points, and its text."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from vllm_radix.tree.resume.components import Component, Dense
from vllm_radix.tree.resume.paths import Paths
from vllm_radix.tree.resume.point import Edge, ResumePoint
from vllm_radix.tree.resume.uses import BlockUses
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN, decode


def check_tree(
    components: Sequence[Component],
    paths: Paths,
    points: Mapping[int, ResumePoint],
    uses: BlockUses,
) -> None:
    """Verify that edges, points and counts agree: O(everything).

    Raises:
        AssertionError: they do not.
    """
    counts: Counter[int] = Counter()
    seen: dict[int, ResumePoint] = {}
    for namespace, root in paths.roots.items():
        assert root.children, f"namespace {namespace!r} is empty"
        assert not root.key and not root.points and not any(root.dense)
    dense = [c for c in components if isinstance(c, Dense)]
    windows = [c for c in components if c.positional and not isinstance(c, Dense)]
    num_windows = 0
    for _, edge in paths.edges():
        parent = edge.parent
        assert edge.key and parent is not None, "an edge without tokens"
        assert parent.end == edge.start, "an edge does not begin where its parent ends"
        assert parent.children[edge.key[:BYTES_PER_TOKEN]] is edge
        assert len(edge.children) != 1, "an edge with one child was not joined"
        last = edge.points[-1].num_tokens if edge.points else edge.start
        assert edge.children or last == edge.end, "an edge leads to no point"
        for component, ids in zip(dense, edge.dense, strict=True):
            size = component.block_size
            assert len(ids) == edge.end // size - edge.start // size, "a gap"
            counts.update(ids)
            assert all(paths.edge_of.get(block) is edge for block in ids)
        for which, blocks in enumerate(edge.windows):
            size = windows[which].block_size
            for index, block in blocks.items():
                assert edge.start < (index + 1) * size <= edge.end, "off its edge"
                assert paths.window_of[block] == (edge, which, index)
                assert block in uses, "a window's block that nothing keeps"
                num_windows += 1
        shared = edge.shared_to
        assert not shared or edge.start < shared <= edge.end, "shared off its edge"
        idle = sum(block in uses.idle for ids in edge.dense for block in ids)
        assert idle == edge.num_idle, "idle blocks of an edge are miscounted"
        places = [point.num_tokens for point in edge.points]
        assert places == sorted(set(places)), "points are out of order"
        for point in edge.points:
            assert edge.start < point.num_tokens <= edge.end, "a point off its edge"
            assert point.alive and point.edge is edge
            seen[point.id] = point
            counts.update(point.blocks)
            _check_point(components, point)
    assert seen == points, "points are filed wrongly"
    assert len(paths.edge_of) == sum(
        len(ids) for _, edge in paths.edges() for ids in edge.dense
    ), "a block lies on two edges"
    assert num_windows == len(paths.window_of), "a window's block off all edges"
    assert dict(counts) == {block: uses.count(block) for block in counts}
    assert len(uses) == len(counts), "a block is kept for nothing"
    assert uses.idle <= counts.keys(), "a block is idle and not cached"


def check_turns(
    points: Mapping[int, ResumePoint], kept: Set[int], let_go: Set[int]
) -> None:
    """Verify that what hints ask of points is known of each: O(points).

    Raises:
        AssertionError: it is not.
    """
    assert kept == {i for i, point in points.items() if point.turn > 0}
    assert let_go == {i for i, point in points.items() if point.turn < 0}


def _check_point(components: Sequence[Component], point: ResumePoint) -> None:
    """Verify that a point keeps what is needed there or a little before; no more."""
    kept = {run.group: run for run in point.runs}
    for group, component in enumerate(components):
        first = component.first_block(point.num_tokens)
        if isinstance(component, Dense):
            first = point.num_tokens // component.block_size
        count = component.end_block(point.num_tokens) - first
        run = kept.get(group)
        assert (run is None) == (count == 0), f"group {group}: {run}"
        if run is not None:
            # What is needed before, too, may have been gone.
            more = component.first_kept(point.num_tokens)
            early = 0 if isinstance(component, Dense) else first - more
            assert first - run.first in (0, early), f"{run}"
            assert run.first + len(run.blocks) == first + count, f"{run}"


def dump(paths: Paths, tokens: int) -> str:
    """Return the tree as text; see ``ResumeTree.dump``."""
    lines: list[str] = []

    def add(edge: Edge, indent: str) -> None:
        key = " ".join(map(str, decode(edge.key[: tokens * BYTES_PER_TOKEN])))
        more = " ..." if len(edge.key) > tokens * BYTES_PER_TOKEN else ""
        dense = " ".join(str(ids) for ids in edge.dense if ids)
        lines.append(f"{indent}[{key}{more}] to {edge.end}, dense {dense or 'none'}")
        for point in edge.points:
            runs = ", ".join(
                f"{r.group}@{r.first}:{list(r.blocks)}" for r in point.runs
            )
            marks = "shared " * point.shared + "writing " * (not point.ready)
            marks += f"turn {point.turn} " * bool(point.turn)
            lines.append(f"{indent}  * {point.num_tokens} {marks}{runs}")
        for child in edge.children.values():
            add(child, indent + "  ")

    for namespace, root in paths.roots.items():
        lines.append(f"namespace {namespace!r}")
        for child in root.children.values():
            add(child, "  ")
    return "\n".join(lines)
