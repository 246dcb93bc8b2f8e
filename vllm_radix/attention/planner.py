"""Plans attention for a batch: which ranges of keys are read once, for which rows.

    block tables ──> forest of shared runs ──> which runs pay ──> work items
                     (forest.py)               (this file)        (kernels read them)

A node of the forest is split off, and read once for all its rows, where the bytes this
saves exceed those of the partial results it adds; otherwise its run goes to its
children. If the whole does not beat vLLM's kernel on the device's roofline, there is no
plan and the step is vLLM's. Numpy only: no torch, no device.

From step to step a plan stays as it is while the batch, its blocks and its queries
stay: sequences that grow are read up to their length on the device.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vllm_radix.attention.cost import Device, Layer, Work, seconds
from vllm_radix.attention.forest import Forest, Ints, grow_forest

ITEM = 8
"""Fields of a work item; see ``vllm_radix_kernels.grouped_attention``."""

OPEN_END = 2**31 - 1
"""End of an item that goes up to its rows' own positions."""

_MIN_SPLIT = 256
"""Fewest keys that are worth a program, and a partial, of their own."""

PROGRAMS = 4
"""Programs of our kernel for each processor; each walks items a stride apart."""

STOCK_PROGRAMS, STOCK_SEGMENTS = 128, 16
"""Of vLLM's Triton backend: a decoding batch of fewer programs is cut in segments."""

# One count for all planners: plans of two of them may go to the same buffers.
_serials = itertools.count(1)

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What the planner plans for.

    Attributes:
        layer: an attention layer; all that share a plan are alike.
        device: what it runs on.
        block_size: tokens of a block of the tables.
        tile_rows: rows of a tile of the kernel, query heads of a KV head included.
        stock_tile_rows: the same of vLLM's kernel, for what it loads.
        stock_splits: whether vLLM's kernel cuts requests until all processors have
            work; its Triton kernel does for small batches only (see ``stock_is_cut``).
        max_tokens: query rows that there is room for.
        max_items: work items that there is room for.
        max_partials: partial results that there is room for.
        split: keys after which a range is cut in two, for parallelism; 0 chooses.
        slack: tokens by which a request's length may be overstated (drafts).
    """

    layer: Layer
    device: Device
    block_size: int
    tile_rows: int
    stock_tile_rows: int = 16
    stock_splits: bool = False
    max_tokens: int = 1 << 20
    max_items: int = 1 << 16
    max_partials: int = 1 << 14
    split: int = 0
    slack: int = 0

    @property
    def tokens_per_tile(self) -> int:
        """Query tokens of a tile."""
        return self.tile_rows // self.layer.group


@dataclass(frozen=True)
class Plan:
    """Work items of a batch; the arrays are not to be changed.

    Attributes:
        items: [N, 8] int32, the longest first.
        rows: [T, 2] int32, token and request, requests in the forest's order.
        first: [T + 1] int32, first partial of each row.
        serial: differs between any two plans of a process.
        num_nodes: shared runs that are read once.
        levels: most of them on one request's path.
        grouped_tokens: tokens of those runs.
        work: what the kernels do.
        stock_work: what vLLM's kernel would do.
        rival: the same with tiles as large as ours. A plan must beat this: larger
            tiles gain by themselves, which is not for grouping to claim.
    """

    items: Ints
    rows: Ints
    first: Ints
    serial: int
    num_nodes: int
    levels: int
    grouped_tokens: int
    work: Work
    stock_work: Work
    rival: Work

    @property
    def num_partials(self) -> int:
        """Partial results of a step."""
        return int(self.first[-1])


@dataclass
class _Batch:
    """The batch that a plan was made for, to check whether the plan still holds."""

    keys: Ints
    inside: npt.NDArray[np.bool_]
    full: Longs
    starts: Longs
    forest: Forest | None
    plan: Plan | None = None
    # The length of each request beyond which the plan must be made again.
    own_limit: Longs | None = None


class AttentionPlanner:
    """Makes plans, and keeps the last one while it holds.

    Args:
        limits: what to plan for.

    Attributes:
        made: plans made from new forests.
        refreshed: plans made again from a known forest, for sequences that grew.
        kept: steps that went on with the plan they had, or with none.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.made = self.refreshed = self.kept = 0
        self._batch: _Batch | None = None

    def plan(
        self, tables: Ints, seq_lens: npt.ArrayLike, query_starts: npt.ArrayLike
    ) -> Plan | None:
        """Return the plan of a step, or None where grouping does not pay.

        Costs O(R x W) comparisons of block ids while the batch stays (memory-bound,
        vectorised), and a forest and its items otherwise.

        Args:
            tables: [R, W] block ids of each request; what is beyond a request's
                tokens is not looked at.
            seq_lens: [R] tokens of each request, with this step's.
            query_starts: [R + 1] first query row of each; requests without rows are
                padding.
        """
        lengths, starts, rows, full = self._measure(seq_lens, query_starts)
        batch = self._batch
        if batch is None or not _still_holds(batch, tables, full, starts):
            batch = self._batch = _remember(tables, full, starts)
            self.made += 1
            batch.plan = self._make(batch, lengths, rows)
        elif batch.own_limit is not None and (lengths > batch.own_limit).any():
            self.refreshed += 1
            batch.plan = self._make(batch, lengths, rows)
        else:
            self.kept += 1
        return batch.plan

    def propose(
        self, tables: Ints, seq_lens: npt.ArrayLike, query_starts: npt.ArrayLike
    ) -> Plan | None:
        """Return the best plan of a batch, also where vLLM's kernel is the better one.

        For benchmarks and tests; arguments as for ``plan``, which it leaves alone.
        None where there is no room for it.
        """
        lengths, starts, rows, full = self._measure(seq_lens, query_starts)
        forest = grow_forest(tables, full)
        if forest is None:
            forest = Forest(np.arange(len(rows)), [], np.zeros(len(rows), dtype=int))
        chosen = _choose(forest, rows[forest.order], self.limits)
        made = _emit(forest, chosen, lengths, rows, starts, self.limits)
        return None if made is None else made[0]

    def _measure(
        self, seq_lens: npt.ArrayLike, query_starts: npt.ArrayLike
    ) -> tuple[Longs, Longs, Longs, Longs]:
        """Return lengths, starts, query rows and full shareable blocks."""
        lengths = np.asarray(seq_lens, dtype=np.int64)
        starts = np.asarray(query_starts, dtype=np.int64)
        rows = starts[1:] - starts[:-1]
        context = np.maximum(lengths - rows - self.limits.slack, 0)
        full = np.where(rows > 0, context // self.limits.block_size, 0)
        return lengths, starts, rows, full

    def _make(self, batch: _Batch, lengths: Longs, rows: Longs) -> Plan | None:
        forest = batch.forest
        batch.own_limit = None
        if forest is None:
            return None
        chosen = _choose(forest, rows[forest.order], self.limits)
        if not chosen.low:
            return None
        made = _emit(forest, chosen, lengths, rows, batch.starts, self.limits)
        if made is None:
            return None
        plan, own_limit = made
        device, layer = self.limits.device, self.limits.layer
        ours = seconds(device, layer, plan.work)
        if ours * device.margin >= seconds(device, layer, plan.rival):
            # Own tails only grow, and with them what there is no gain in.
            return None
        batch.own_limit = own_limit
        return plan


def _remember(tables: Ints, full: Longs, starts: Longs) -> _Batch:
    keys = tables.copy()
    inside = np.arange(tables.shape[1]) < full[:, None]
    return _Batch(keys, inside, full, starts, grow_forest(keys, full))


def _still_holds(batch: _Batch, tables: Ints, full: Longs, starts: Longs) -> bool:
    """Return whether a batch's forest is that of these tables; add blocks that are new.

    Blocks that filled since are added if no other request has them in the same place:
    then they are the request's own, and the forest stays.
    """
    if tables.shape != batch.keys.shape or not np.array_equal(starts, batch.starts):
        return False
    grown = full - batch.full
    most = int(grown.max(initial=0))
    if most > 4 or int(grown.min(initial=0)) < 0:
        return False
    width = int(batch.full.max(initial=0))
    differ = tables[:, :width] != batch.keys[:, :width]
    if np.logical_and(differ, batch.inside[:, :width], out=differ).any():
        return False
    for step in range(most):
        growing = np.flatnonzero(grown > step)
        where = batch.full[growing] + step
        blocks = tables[growing, where]
        beside = (tables[:, where] == blocks) & (full[:, None] > where)
        if (beside.sum(0) > 1).any():
            return False
        batch.keys[growing, where] = blocks
        batch.inside[growing, where] = True
    batch.full = full
    return True


@dataclass
class _Chosen:
    """The shared block ranges chosen to be read once.

    The lists have one entry per range; ``above_request`` maps each request to its
    deepest range.
    """

    low: list[int]
    high: list[int]
    start: list[int]
    end: list[int]
    # Number of the chosen range above each, -1 for none; and of each request.
    above: list[int]
    above_request: Longs
    levels: int


def _choose(forest: Forest, rows: Longs, limits: Limits) -> _Chosen:
    """Return the nodes that are worth reading once, in blocks, parents first.

    Top down: splitting a node off saves its run once per child beyond the first,
    counted in tiles, and costs each of its rows one more partial, two if its result
    would have gone straight to the output.
    """
    per_tile = limits.tokens_per_tile
    bytes_of_block = limits.block_size * limits.layer.token_bytes
    partial = limits.layer.partial_bytes
    row_of = np.concatenate([[0], np.cumsum(rows)])
    tile_of = np.concatenate([[0], np.cumsum(-(-rows // per_tile))])
    nodes = forest.nodes

    def tiles(low: int, high: int) -> int:
        return -(-int(row_of[high] - row_of[low]) // per_tile)

    # Tiles that would read a node's run if its children did.
    below = [int(tile_of[node.high] - tile_of[node.low]) for node in nodes]
    for node in nodes:
        if node.parent >= 0:
            alone = int(tile_of[node.high] - tile_of[node.low])
            below[node.parent] += tiles(node.low, node.high) - alone
    chosen = _Chosen([], [], [], [], [], np.full(len(rows), -1, dtype=np.int64), 0)
    # Of each node: start of what is still to be read, and the chosen range above.
    place: list[tuple[int, int]] = []
    depth: list[int] = []
    for number, node in enumerate(nodes):
        start, above = place[node.parent] if node.parent >= 0 else (0, -1)
        num_rows = int(row_of[node.high] - row_of[node.low])
        saved = (below[number] - tiles(node.low, node.high)) * bytes_of_block
        added = num_rows * partial * (1 if above >= 0 else 2)
        if saved * (node.end - start) > added:
            chosen.low.append(node.low)
            chosen.high.append(node.high)
            chosen.start.append(start)
            chosen.end.append(node.end)
            chosen.above.append(above)
            depth.append(1 + (depth[above] if above >= 0 else 0))
            start, above = node.end, len(chosen.low) - 1
            chosen.above_request[node.low : node.high] = above
        place.append((start, above))
    chosen.levels = max(depth, default=0)
    return chosen


def _emit(
    forest: Forest,
    chosen: _Chosen,
    lengths: Longs,
    rows: Longs,
    starts: Longs,
    limits: Limits,
) -> tuple[Plan, Longs] | None:
    """Return the plan and, per request, the length at which it must be made again.

    None if the plan exceeds the buffers.
    """
    order, size = forest.order, limits.block_size
    per_tile = limits.tokens_per_tile
    num_nodes = len(chosen.low)
    rows, lengths_in_order = rows[order], lengths[order]
    row_of = np.concatenate([[0], np.cumsum(rows)])
    ends = np.array(chosen.end, dtype=np.int64) * size
    # Number -1 stands for no range above: the 0 at the end.
    own_start = np.append(ends, 0)[chosen.above_request]

    # -- all ranges: the chosen nodes', then each request's own
    low = np.concatenate([row_of[chosen.low], row_of[:-1]])
    high = np.concatenate([row_of[chosen.high], row_of[1:]])
    node_start = np.array(chosen.start, dtype=np.int64) * size
    key_start = np.concatenate([node_start, own_start])
    key_end = np.concatenate([ends, lengths_in_order])
    table = np.concatenate([order[chosen.low], order])
    tiles = -(-(high - low) // per_tile)
    split = limits.split or _split(tiles, key_end - key_start, limits)
    splits = np.where(tiles > 0, np.maximum(-(-(key_end - key_start) // split), 1), 0)

    # -- which partial of its rows a range holds: those above come first
    before = np.zeros(num_nodes + len(rows), dtype=np.int64)
    for number, above in enumerate(chosen.above):
        if above >= 0:
            before[number] = before[above] + splits[above]
    node_parts = np.append((before + splits)[:num_nodes], 0)
    before[num_nodes:] = node_parts[chosen.above_request]
    parts = before[num_nodes:] + splits[num_nodes:]
    parts_of_row = np.repeat(np.where(parts > 1, parts, 0), rows)
    first = np.zeros(len(parts_of_row) + 1, dtype=np.int32)
    first[1:] = np.cumsum(parts_of_row)

    counts = tiles * splits
    total = int(counts.sum())
    fits = total <= limits.max_items and int(first[-1]) <= limits.max_partials
    if not fits or len(parts_of_row) > limits.max_tokens:
        return None
    which = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    tile, part = within // splits[which], within % splits[which]
    own, is_last = which >= num_nodes, part == splits[which] - 1
    items = np.zeros((total, ITEM), dtype=np.int32)
    items[:, 0] = table[which]
    items[:, 1] = low[which] + tile * per_tile
    items[:, 2] = np.minimum(per_tile, high[which] - items[:, 1])
    items[:, 3] = key_start[which] + part * split
    items[:, 4] = np.where(is_last, key_end[which], items[:, 3] + split)
    items[:, 5] = before[which] + part
    items[:, 6] = own & is_last

    # -- what is read: own ranges up to the last row of their tile
    request = np.where(own, which - num_nodes, 0)
    row_end = items[:, 1] + items[:, 2] - row_of[request]
    seen = lengths_in_order[request] - rows[request] + row_end
    end = np.where(own, np.minimum(items[:, 4], seen), items[:, 4])
    keys = np.maximum(end - items[:, 3], 0)
    items[own & is_last, 4] = OPEN_END
    items = items[np.argsort(-keys, kind="stable")]

    token = np.arange(len(parts_of_row)) + np.repeat(starts[order] - row_of[:-1], rows)
    row_list = np.stack([token, np.repeat(order, rows)], 1).astype(np.int32)
    unique, repeated = _distinct(forest, lengths_in_order, rows, size)
    work = Work(
        loaded=int(keys.sum()),
        unique=unique,
        repeated=0,
        tile=limits.tile_rows,
        partials=int(first[-1]),
        launches=2,
        longest=_longest(-np.sort(-keys), limits),
    )
    whole = not limits.stock_splits
    launches = 1
    longest = int(lengths.max(initial=0)) if whole else 0
    if whole and stock_is_cut(len(rows), int(rows.max(initial=0)), limits.layer):
        whole, launches, longest = False, 2, -(-longest // STOCK_SEGMENTS)
    stock = Work(
        loaded=_stock_loaded(lengths, starts, limits.stock_tile_rows, limits.layer),
        unique=unique,
        repeated=0 if whole else repeated,
        tile=max(limits.stock_tile_rows, limits.layer.group),
        partials=0,
        launches=launches,
        longest=longest,
    )
    plan = Plan(
        items=items,
        rows=row_list,
        first=first,
        serial=next(_serials),
        num_nodes=num_nodes,
        levels=chosen.levels,
        grouped_tokens=int((ends - node_start).sum()),
        work=work,
        stock_work=stock,
        rival=replace(
            stock,
            loaded=_stock_loaded(
                lengths,
                starts,
                max(limits.tile_rows, limits.stock_tile_rows),
                limits.layer,
            ),
        ),
    )
    # The last split of a request is open: let it grow to twice its size.
    own_limit = np.full(len(rows), np.iinfo(np.int64).max)
    last_start = own_start + (splits[num_nodes:] - 1) * split
    own_limit[order] = np.where(rows > 0, last_start + 2 * split, own_limit)
    return plan, own_limit


def _split(tiles: Longs, keys: Longs, limits: Limits) -> int:
    """Return after how many keys to cut ranges, so that all processors have work.

    A power of two, at least 256: about two programs a processor, if there are keys
    enough for them.
    """
    programs = 2 * limits.device.processors / limits.layer.num_kv_heads
    wanted = int((tiles * keys).sum() / max(programs, 1))
    return 1 << max(wanted - 1, _MIN_SPLIT - 1).bit_length()


def _longest(keys: Longs, limits: Limits) -> int:
    """Return the keys that our busiest program reads, given those of items, sorted.

    Programs take items of all KV heads in turn, so the first has the most.
    """
    heads = limits.layer.num_kv_heads
    programs = PROGRAMS * limits.device.processors
    return int(keys[np.arange(0, len(keys) * heads, programs) // heads].sum())


def stock_is_cut(num_requests: int, most_rows: int, layer: Layer) -> bool:
    """Return whether vLLM's Triton backend cuts a batch's requests in segments."""
    return most_rows == 1 and num_requests <= STOCK_PROGRAMS // layer.num_kv_heads


def _distinct(
    forest: Forest, lengths: Longs, rows: Longs, size: int
) -> tuple[int, int]:
    """Return the different tokens a batch reads, and those that several share."""
    shared = sum(node.end - node.start for node in forest.nodes) * size
    own = np.where(rows > 0, lengths - forest.depth * size, 0)
    return int(own.sum()) + shared, shared


def _stock_loaded(lengths: Longs, starts: Longs, tile_rows: int, layer: Layer) -> int:
    """Return the tokens that vLLM's kernel loads: each tile, up to its last row."""
    per_tile = max(1, tile_rows // layer.group)
    rows = starts[1:] - starts[:-1]
    whole = np.maximum(-(-rows // per_tile) - 1, 0)
    context = lengths - rows
    before = whole * context + per_tile * whole * (whole + 1) // 2
    return int((before + np.where(rows > 0, lengths, 0)).sum())
