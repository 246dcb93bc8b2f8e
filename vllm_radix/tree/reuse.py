"""The account of uses: what a policy with classes is told of runs of blocks."""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from vllm_radix.tree.block_table import BlockTable
from vllm_radix.tree.eviction import EvictionPolicy, Queues
from vllm_radix.tree.exposure import Exposure
from vllm_radix.tree.ghosts import Ghost, Ghosts
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.runs import (
    BYTE,
    END,
    LABEL_AT,
    RELEASED,
    TOUCHED_AT,
    USE,
    USES,
    USES_AT,
    digest_at,
    runs_of,
    seed_of,
    split_run,
)
from vllm_radix.tree.shape import Shape
from vllm_radix.tree.stack_distance import StackDistances

KIND_RELEASED = RELEASED >> LABEL_AT
KIND_CLOCK_AT = TOUCHED_AT - LABEL_AT
"""A run without its end and uses is a kind: runs of one kind are told of at once."""

_KEPT = BYTE << LABEL_AT | USES | END


def _summed(runs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the blocks of each kind."""
    out: dict[int, int] = {}
    for kind, blocks in runs:
        out[kind] = out.get(kind, 0) + blocks
    return out


class Use(NamedTuple):
    """What an admitted request was told, to be handed back when it ends.

    Attributes:
        seen: blocks of its prompt that are cached, or remembered.
        pending: those that it will compute.
        clock: when it was admitted.
        returned: for evicted runs that it brings back the depths at which each begins
            and ends, and how often it had been used.
    """

    seen: int
    pending: int
    clock: int
    returned: tuple[tuple[int, int, int], ...]


class _Pending:
    """The end of a run that is being evicted.

    Attributes:
        node: the edge.
        run: the run.
        depth: blocks between the root and the evicted ones.
        blocks: how many are evicted.
        first: the tokens of the first of them.
    """

    __slots__ = ("blocks", "depth", "first", "node", "run")

    def __init__(self, node: Node, run: int, depth: int) -> None:
        self.node = node
        self.run = run & ~END
        self.depth = depth
        self.blocks = 0
        self.first: bytes | bytearray = b""


class ReuseAccount:
    """Follows runs of blocks through use, release and eviction, and tells the policy.

    Costs are per run of a request's path, not per block. A request's path is walked
    when it is admitted and when it ends.

    Args:
        policy: is told.
        table: where blocks are.
        shape: the nodes.
        queues: its clock and its counts of released blocks are kept here.

    Attributes:
        ghosts: evicted runs.
        distances: last touches, if the policy compares itself.
        exposure: what least recently used would still hold, if so.
        most_cached: blocks that were cached at once, at most.
    """

    def __init__(
        self, policy: EvictionPolicy, table: BlockTable, shape: Shape, queues: Queues
    ) -> None:
        self.policy = policy
        self.ghosts = Ghosts()
        self.distances = StackDistances() if policy.compares else None
        self.exposure = Exposure(policy) if policy.compares else None
        self.most_cached = 0
        self._table = table
        self._shape = shape
        self._queues = queues
        # What was evicted last, not yet among the ghosts, for more of it may follow.
        self._pending: _Pending | None = None

    # -- a request is admitted -------------------------------------------------

    def admit(self, key: bytes, namespace: Namespace, last: int, found: int) -> Use:
        """Note that a request uses a cached prefix, and will compute the rest.

        O(runs of its path, and of what it brings back).

        Args:
            key: of its prompt.
            namespace: of its blocks.
            last: the last cached block of its prefix, if there is one.
            found: blocks of that prefix.
        """
        asked = max(found, len(key) // self._shape.block_bytes)
        node = self._table.node_of(last) if found else None
        if node is None:
            node, found = self._shape.roots.get(namespace), 0
        now = self._queues.now
        self.most_cached = max(self.most_cached, self._table.num_cached)
        touched: list[tuple[int, int]] = []  # (kind, blocks), deepest first
        returned: list[tuple[int, int, int]] = []
        seen = found
        if self.distances is not None and self.exposure is not None:
            self.distances.capacity = max(self._table.num_cached, 1)
            self.exposure.pass_time(self.distances.horizon(self.distances.capacity))
        self._bury()
        if found < asked and len(self.ghosts):
            digest = seed_of(namespace)
            if node is not None and found:
                size, roots = self._shape.block_bytes, self._shape.namespace_of
                digest = digest_at(node, found, size, roots)
            seen = self._bring_back(key, digest, (found, asked), touched, returned)
        if node is not None and found:
            self._use_runs(node, found, touched)
        kinds = _summed(touched)
        for kind, blocks in kinds.items():
            if kind & KIND_RELEASED:
                self._queues.blocks[kind & BYTE] -= blocks
                age = now + 1 - (kind >> KIND_CLOCK_AT)
                self.policy.note_reused(kind & BYTE, age, blocks, False)
        if self.distances is not None:
            self._compare(touched, asked, found)
            self._take_back(kinds)
            self.distances.add(now, asked)
        return Use(seen, asked - found, now, tuple(returned))

    def _bring_back(
        self,
        key: bytes,
        digest: int,
        span: tuple[int, int],
        touched: list[tuple[int, int]],
        returned: list[tuple[int, int, int]],
    ) -> int:
        """Take the evicted runs that continue a prefix; return where they end."""
        size, now = self._shape.block_bytes, self._queues.now
        depth, asked = span
        while depth < asked:
            at = depth * size
            ghost = self.ghosts.pop(crc32(key[at : at + size], digest))
            if ghost is None:
                break
            blocks, age = min(ghost.blocks, asked - depth), now - ghost.clock
            self.policy.note_reused(ghost.label, age, blocks, True)
            if self.exposure is not None:
                self.exposure.lose(ghost.clock, ghost.label, blocks)
            if blocks < ghost.blocks:
                self.policy.note_unused(ghost.label, age, ghost.blocks - blocks)
            depth += blocks
            digest = crc32(key[at : depth * size], digest)
            touched.insert(0, ((ghost.clock + 1) << KIND_CLOCK_AT, blocks))
            returned.append((depth - blocks, depth, ghost.uses))
        return depth

    def _use_runs(self, node: Node, depth: int, touched: list[tuple[int, int]]) -> None:
        """Note a use of the runs of a path, from a depth of an edge upwards."""
        stamp = (self._queues.now + 1) << TOUCHED_AT
        above: Node | None = node
        while above is not None and depth:
            node, above = above, above.parent
            runs, start = runs_of(node), node.start
            index = len(runs) if runs[-1] & END <= depth else split_run(runs, depth)
            while index:
                index -= 1
                run = runs[index]
                begin = runs[index - 1] & END if index else start
                touched.append((run >> LABEL_AT, (run & END) - begin))
                once_more = run & _KEPT | stamp
                runs[index] = once_more + (USE if run & USES < USES else 0)
            depth = start

    def _take_back(self, kinds: dict[int, int]) -> None:
        """Take back the last touches of runs, by kind."""
        distances = self.distances
        assert distances is not None
        for kind, blocks in kinds.items():
            if kind >> KIND_CLOCK_AT:
                distances.add((kind >> KIND_CLOCK_AT) - 1, -blocks)

    def _compare(
        self, touched: Sequence[tuple[int, int]], asked: int, found: int
    ) -> None:
        """Tell the policy what least recently used would have found."""
        distances = self.distances
        assert distances is not None
        room = distances.capacity
        above = sum(blocks for _, blocks in touched)
        for at, (kind, blocks) in enumerate(touched):
            above -= blocks
            clock = (kind >> KIND_CLOCK_AT) - 1
            if clock < 0:
                kept = blocks  # they are held, as with any policy
            else:
                # Of those touched at the same time, the deeper ones are older.
                same = sum(
                    more
                    for other, more in touched[at + 1 :]
                    if other >> KIND_CLOCK_AT == clock + 1
                )
                kept = min(blocks, room - distances.after(clock) - same)
            if kept > 0:
                self.policy.note_request(asked, found, above + kept, room)
                return
        self.policy.note_request(asked, found, 0, room)

    # -- a request ends --------------------------------------------------------

    def end(
        self,
        blocks: Sequence[int],
        use: Use | None,
        output_tokens: int,
        new_tokens: int,
    ) -> None:
        """Give classes to the runs of an ending request: O(runs of its path).

        Args:
            blocks: its blocks, still held.
            use: what ``admit`` said; None if it was not noted.
            output_tokens: that it has generated.
            new_tokens: of its prompt that nobody had asked for.
        """
        queues, policy = self._queues, self.policy
        queues.now += 1
        policy.note_release(queues.now)
        # A clock that is ahead is from before the cache was emptied.
        if self.distances is not None and use is not None and use.clock <= queues.now:
            self.distances.add(use.clock, -use.pending)
        node, depth = self._end_of(blocks)
        left: list[tuple[int, int]] = []
        entered: dict[int, int] = {}
        labels: dict[int, int] = {}
        stamp = (queues.now + 1) << TOUCHED_AT | RELEASED
        while node is not None and node.parent is not None:
            if node.holes:
                depth, node = node.start, node.parent
                continue
            if use is not None and use.returned:
                self._add_uses(node, depth, use)
            runs, begin = runs_of(node), node.start
            index = len(runs) if runs[-1] & END <= depth else split_run(runs, depth)
            made: list[int] = []
            for run in runs[:index]:
                end, uses = run & END, run & USES
                left.append((run >> LABEL_AT, end - begin))
                label = labels.get(uses, -1)
                if label < 0:
                    label = policy.label(uses >> USES_AT, output_tokens, new_tokens)
                    labels[uses] = label
                entered[label] = entered.get(label, 0) + end - begin
                begin = end
                run = stamp | label << LABEL_AT | uses | end
                if made and (made[-1] ^ run) <= END:
                    made[-1] = run
                else:
                    made.append(run)
            runs[:index] = made
            depth, node = node.start, node.parent
        kinds = _summed(left)
        for kind, count in kinds.items():
            if kind & KIND_RELEASED:
                self._withdraw(kind, count)
        if self.distances is not None:
            self._take_back(kinds)
            self.distances.add(queues.now, sum(entered.values()))
        for label, count in entered.items():
            queues.blocks[label] += count
            policy.note_labelled(label, count)

    def _end_of(self, blocks: Sequence[int]) -> tuple[Node | None, int]:
        """Return the edge and the depth at which a request's cached blocks end."""
        table = self._table
        for depth in range(len(blocks), 0, -1):
            block = blocks[depth - 1]
            there = table.duplicate_of.get(block, block)
            node = table.node_of(there)
            at_depth = node is not None and table.depths[there] == depth - 1
            if node is not None and at_depth and not node.partial:
                return node, depth
        return None, 0

    @staticmethod
    def _add_uses(node: Node, depth: int, use: Use) -> None:
        """Add the uses of evicted runs to what was computed in their place."""
        runs, bottom = runs_of(node), min(depth, node.start + len(node.blocks))
        for begin, end, uses in use.returned:
            low, high = max(begin, node.start), min(end, bottom)
            if low >= high:
                continue
            first = split_run(runs, low) if low > node.start else 0
            for index in range(first, split_run(runs, high)):
                run = runs[index]
                more = min(BYTE, (run >> USES_AT & BYTE) + uses)
                runs[index] = run & ~(BYTE << USES_AT) | more << USES_AT

    def _withdraw(self, kind: int, blocks: int) -> None:
        """Take released blocks of a kind out of their class, unjudged."""
        label = kind & BYTE
        self._queues.blocks[label] -= blocks
        age = self._queues.now + 1 - (kind >> KIND_CLOCK_AT)
        self.policy.note_relabelled(label, age, blocks)

    # -- an edge ---------------------------------------------------------------

    def class_of_end(self, node: Node) -> int:
        """Return the class of the last run of a leaf, which is released if it was not.

        O(1). Requests whose end was not noted release their blocks like that, as used
        once more and with no tokens.
        """
        runs = runs_of(node)
        run = runs[-1]
        if run & RELEASED:
            return run >> LABEL_AT & BYTE
        uses = run >> USES_AT & BYTE
        label = self.policy.label(uses, 0, 0)
        now, end = self._queues.now, run & END
        run = (now + 1) << TOUCHED_AT | label << LABEL_AT | uses << USES_AT | end
        if not node.partial and not node.holes:
            blocks = end - (runs[-2] & END if len(runs) > 1 else node.start)
            self._queues.blocks[label] += blocks
            self.policy.note_labelled(label, blocks)
            if self.distances is not None:
                if touched := runs[-1] >> TOUCHED_AT:
                    self.distances.add(touched - 1, -blocks)
                self.distances.add(now, blocks)
            run |= RELEASED
        runs[-1] = run
        return label

    def evicted(self, node: Node, run: int, blocks: int, chosen: bool) -> None:
        """Note that the end of a leaf's last run was evicted: O(1), amortised.

        Args:
            node: the leaf; its tokens are still there.
            run: the run as it was.
            blocks: how many.
            chosen: whether the policy had the choice.
        """
        if not run & RELEASED:
            return
        queues, policy, table = self._queues, self.policy, self._table
        label = run >> LABEL_AT & BYTE
        queues.blocks[label] -= blocks
        policy.note_evicted(label, blocks)
        if chosen and self.exposure is not None:
            self.exposure.add((run >> TOUCHED_AT) - 1, label, blocks)
        if table.num_cached + blocks > self.most_cached:
            self.most_cached = table.num_cached + blocks
        if not policy.ghosts:
            clock = (run >> TOUCHED_AT) - 1
            policy.note_unused(label, queues.now - clock, blocks)
            return
        size, left = self._shape.block_bytes, len(node.blocks)
        depth, pending = node.start + left, self._pending
        if (
            pending is None
            or pending.node is not node
            or pending.depth != depth + blocks
            or pending.run != run & ~END
        ):
            if pending is not None:
                self._bury()
            pending = self._pending = _Pending(node, run, depth)
        pending.depth = depth
        pending.blocks += blocks
        pending.first = node.key[left * size : (left + 1) * size]
        if not left:
            self._bury()  # while it is known what is above

    def _bury(self) -> None:
        """Put what was evicted last among the ghosts, and forget those too many."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        queues, policy, run, node = self._queues, self.policy, pending.run, pending.node
        label, clock = run >> LABEL_AT & BYTE, (run >> TOUCHED_AT) - 1
        blocks = pending.blocks
        if not node.alive:
            # Something else has removed or joined its edge in the meantime.
            policy.note_unused(label, queues.now - clock, blocks)
            return
        size, roots = self._shape.block_bytes, self._shape.namespace_of
        digest = digest_at(node, pending.depth, size, roots)
        uses = run >> USES_AT & BYTE
        self.ghosts.push(
            crc32(pending.first, digest), Ghost(blocks, label, uses, clock)
        )
        most = policy.ghosts * self.most_cached
        if self.ghosts.blocks > most:
            for old in self.ghosts.expire(most):
                policy.note_unused(old.label, queues.now - old.clock, old.blocks)

    @property
    def num_remembered(self) -> int:
        """Evicted blocks that will be known again."""
        last = self._pending.blocks if self._pending is not None else 0
        return self.ghosts.blocks + last

    def drop(self, node: Node, depth: int) -> None:
        """Take a block that leaves a hole out of its class: O(runs of the edge)."""
        runs = runs_of(node)
        at = split_run(runs, depth) if depth > node.start else 0
        split_run(runs, depth + 1)
        if runs[at] & RELEASED:
            self._withdraw(runs[at] >> LABEL_AT, 1)
            runs[at] ^= RELEASED

    def check(self) -> None:
        """Verify that the released blocks of each class are as many as counted.

        Raises:
            AssertionError: they are not.
        """
        counts = [0] * self.policy.num_classes
        for node in self._shape.nodes():
            begin = node.start
            for run in runs_of(node):
                end = run & END
                assert end > begin, "an empty run"
                if run & RELEASED:
                    counts[run >> LABEL_AT & BYTE] += end - begin
                    at = slice(begin - node.start, end - node.start)
                    assert HOLE not in node.blocks[at], "a released run has a hole"
                begin = end
        assert counts == self._queues.blocks, "released blocks are miscounted"
        most = self.policy.ghosts * self.most_cached
        assert self.ghosts.blocks <= most, "too many evicted blocks are remembered"
