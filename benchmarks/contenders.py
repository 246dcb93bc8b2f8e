"""Batches over trees of shared prefixes, and who computes their attention.

For ``bench_attention``: one cache and one batch, and contenders that all compute the
same from them. FlashInfer gets the requests sorted as its API needs them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_radix.attention.cost import DEVICES, Layer, Work
from vllm_radix.attention.plan_buffers import PARTIAL_MEMORY, PlanBuffers, max_partials
from vllm_radix.attention.planner import (
    STOCK_SEGMENTS,
    AttentionPlanner,
    Limits,
    Plan,
    stock_is_cut,
)
from vllm_radix_bench import vllm_kernel
from vllm_radix_kernels.grouped_attention import DevicePlan, grouped_attention
from vllm_radix_kernels.tiles import Tile, architecture_of, choose, table_name

PAGE = 16
TOLERANCE = 2e-2
"""Of a head's output: length of the difference over length. A plain bound would not
notice a lost page, for averages over many keys are small."""

SPARE = 8
"""Columns of a block table behind the longest request's blocks."""

OURS, VLLM, FLASH, CASCADE = "grouped", "vLLM Triton", "FlashAttention", "FlashInfer"
DECLINED = "left to vLLM"

Ints = npt.NDArray[np.int32]
Row = dict[str, Any]


class MismatchError(Exception):
    """A contender computes something else."""


class MissingError(Exception):
    """A contender is not there, or does not take a batch; says why."""


@dataclass(frozen=True)
class Shape:
    """A batch: requests over a tree of shared prefixes.

    Attributes:
        requests: of the batch.
        new_tokens: query rows of each.
        prefix: tokens before a request's own, on all levels together.
        levels: of sharing; 0 for none.
        heads: query heads.
        kv_heads: key and value heads.
        tail: a request's own tokens, new ones included.
        head_size: elements of a head.
    """

    requests: int
    new_tokens: int
    prefix: int
    levels: int
    heads: int
    kv_heads: int
    tail: int = 256
    head_size: int = 128

    @property
    def length(self) -> int:
        """Tokens of each request."""
        return self.prefix + self.tail

    @property
    def layer(self) -> Layer:
        """The layer, for the cost model."""
        return Layer(self.heads, self.kv_heads, self.head_size, 2)

    def runs(self) -> list[tuple[int, int]]:
        """Return the nodes and the blocks of each node's run, by level."""
        blocks, out = self.prefix // PAGE, []
        for level in range(self.levels):
            nodes = 1 << (self.requests.bit_length() - 1) * level // self.levels
            extra = blocks % self.levels if level == 0 else 0
            out.append((nodes, blocks // self.levels + extra))
        return out

    def own_blocks(self) -> int:
        """Return the blocks that each request has for itself."""
        return -(-(self.tail if self.levels else self.length) // PAGE)

    def blocks(self) -> int:
        """Return the blocks of the batch."""
        shared = sum(nodes * length for nodes, length in self.runs())
        return shared + self.requests * self.own_blocks()

    def memory(self) -> int:
        """Return the bytes that a run needs on the device, roughly."""
        cache = self.blocks() * PAGE * self.layer.token_bytes
        return cache + 4 * PARTIAL_MEMORY + (1 << 30)

    def stock_work(self, tile_rows: int, splits: bool = False) -> Work:
        """Return what a kernel does that reads each request by itself.

        Args:
            tile_rows: of its tiles.
            splits: whether it cuts requests until all processors have work; vLLM's
                Triton kernel does for small batches.
        """
        per_tile = max(1, tile_rows // self.layer.group)
        ends = [*range(per_tile, self.new_tokens, per_tile), self.new_tokens]
        context = self.length - self.new_tokens
        shared = PAGE * sum(nodes * length for nodes, length in self.runs())
        own = self.tail if self.levels else self.length
        longest, launches = 0 if splits else self.length, 1
        if not splits and stock_is_cut(self.requests, self.new_tokens, self.layer):
            splits, launches = True, 2
            longest = -(-self.length // STOCK_SEGMENTS)
        return Work(
            loaded=self.requests * sum(context + end for end in ends),
            unique=shared + self.requests * own,
            repeated=shared if splits else 0,
            tile=max(tile_rows, self.layer.group),
            partials=0,
            launches=launches,
            longest=longest,
        )

    def __str__(self) -> str:
        new = f" x {self.new_tokens}" if self.new_tokens > 1 else ""
        return (
            f"{self.requests}{new} requests, prefix {self.prefix}, "
            f"levels {self.levels}, heads {self.heads}/{self.kv_heads}"
        )


@dataclass
class Batch:
    """A batch on a device; see ``grouped_attention`` for the tensors.

    Attributes:
        shape: of the batch.
        order: [R] its requests as they stand in the tree.
        host: block tables, lengths and query starts, for planners.
    """

    shape: Shape
    order: npt.NDArray[np.int64]
    host: tuple[Ints, Ints, Ints]
    cache: torch.Tensor
    q: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor

    @property
    def k(self) -> torch.Tensor:
        """Keys [blocks, page, KV heads, D]; vLLM has values beside them."""
        return self.cache[..., : self.shape.head_size]

    @property
    def v(self) -> torch.Tensor:
        """Values, likewise."""
        return self.cache[..., self.shape.head_size :]


def host_batch(
    shape: Shape, seed: int = 0
) -> tuple[npt.NDArray[np.int64], tuple[Ints, Ints, Ints]]:
    """Return a batch's ``order`` and ``host``, without its tensors."""
    rng = np.random.default_rng(seed)
    count, new = shape.requests, shape.new_tokens
    free = rng.permutation(shape.blocks()).astype(np.int32)
    columns, used = [], 0
    for nodes, length in [*shape.runs(), (count, shape.own_blocks())]:
        blocks = free[used : used + nodes * length].reshape(nodes, length)
        used += nodes * length
        columns.append(blocks[np.arange(count) * nodes // count])
    # A batch is in the order its requests came in, not in the tree's.
    order = rng.permutation(count)
    width = sum(c.shape[1] for c in columns)
    # vLLM's kernel reads whole tiles of a table, and vLLM's tables are as wide as the
    # longest request may get.
    tables = np.zeros((count, width + SPARE), dtype=np.int32)
    tables[order, :width] = np.concatenate(columns, 1)
    seq_lens = np.full(count, shape.length, dtype=np.int32)
    starts = (np.arange(count + 1) * new).astype(np.int32)
    return order, (tables, seq_lens, starts)


def make_batch(shape: Shape, device: torch.device, seed: int = 0) -> Batch:
    """Return a batch of random queries, keys and values."""
    order, host = host_batch(shape, seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(
            sizes, generator=generator, device=device, dtype=torch.bfloat16
        )

    return Batch(
        shape,
        order,
        host,
        normal(shape.blocks(), PAGE, shape.kv_heads, 2 * shape.head_size),
        normal(shape.requests * shape.new_tokens, shape.heads, shape.head_size),
        *(torch.from_numpy(x).to(device) for x in host),
    )


@dataclass
class Contender:
    """One way to compute a batch's attention.

    Attributes:
        name: for tables.
        call: computes, and returns [T, H, D].
        work: for the cost model; None where it says nothing.
        back: rows of the result for each of the batch's; None for as they are.
        notes: for the record.
        plan: of ours, on the device.
    """

    name: str
    call: Callable[[], torch.Tensor]
    work: Work | None = None
    back: torch.Tensor | None = None
    notes: Row = field(default_factory=dict)
    plan: DevicePlan | None = None


def _tile(batch: Batch) -> tuple[str, Tile]:
    """Return the architecture's name, and the tile of our kernel on it."""
    shape = batch.shape
    architecture = table_name(architecture_of(batch.q.device))
    group = shape.layer.group
    return architecture, choose(architecture, shape.head_size, group, batch.q.dtype)


def limits_of(batch: Batch) -> Limits:
    """Return what the planner plans for on the batch's device."""
    architecture, tile = _tile(batch)
    return Limits(
        layer=batch.shape.layer,
        device=DEVICES[architecture],
        block_size=PAGE,
        tile_rows=tile.m,
        max_tokens=len(batch.q),
        max_partials=max_partials(batch.shape.layer),
    )


def ours(batch: Batch) -> Contender:
    """Return grouped attention, planned for the batch's device."""
    limits = limits_of(batch)
    plan = AttentionPlanner(limits).plan(*batch.host)
    if plan is None:
        raise MissingError(DECLINED)
    return planned(batch, limits, plan, OURS)


def planned(batch: Batch, limits: Limits, plan: Plan, name: str) -> Contender:
    """Return our kernel with a plan, under a name."""
    shape, device = batch.shape, batch.q.device
    _, tile = _tile(batch)
    buffers = PlanBuffers(limits, tile, device)
    loaded = buffers.load(plan)
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        grouped_attention(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            loaded,
            shape.head_size**-0.5,
        )
        return out

    notes = {
        "tile": asdict(tile),
        "items": len(plan.items),
        "partials": plan.num_partials,
        "nodes": plan.num_nodes,
        "levels": plan.levels,
    }
    return Contender(name, call, plan.work, notes=notes, plan=loaded)


def stock(batch: Batch) -> Contender:
    """Return vLLM's unified Triton kernel, called as its backend calls it."""
    shape, device = batch.shape, batch.q.device
    buffers = vllm_kernel.segment_buffers(
        shape.heads, shape.kv_heads, shape.head_size, shape.requests, device
    )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        vllm_kernel.attend(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            shape.new_tokens,
            shape.length,
            buffers,
        )
        return out

    split = vllm_kernel.splits(shape.requests, shape.new_tokens, shape.kv_heads)
    notes = {"variant": "3D" if split else "2D"}
    return Contender(VLLM, call, shape.stock_work(16), notes=notes)


def need_gpu(device: torch.device) -> None:
    """Refuse a CPU; what is no Triton kernel is not interpreted."""
    if device.type == "cpu":
        raise MissingError("runs on a GPU only")


def flash(batch: Batch) -> Contender:
    """Return FlashAttention as vLLM ships it, scheduled as its backend does."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        raise MissingError(str(error)) from None
    shape = batch.shape
    need_gpu(batch.q.device)
    fa_version = get_flash_attn_version(head_size=shape.head_size)
    if fa_version is None:
        raise MissingError("vLLM has no version of it for this device")
    schedule = None
    if fa_version == 3:
        schedule = get_scheduler_metadata(
            batch_size=shape.requests,
            max_seqlen_q=shape.new_tokens,
            max_seqlen_k=shape.length,
            num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=batch.q.dtype,
            cu_seqlens_q=batch.starts,
            page_size=PAGE,
            causal=True,
        )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.q,
            k=batch.k,
            v=batch.v,
            out=out,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=shape.new_tokens,
            seqused_k=batch.seq_lens,
            max_seqlen_k=shape.length,
            softmax_scale=shape.head_size**-0.5,
            causal=True,
            block_table=batch.tables,
            scheduler_metadata=schedule,
            fa_version=fa_version,
        )
        return out

    # The rows that the planner takes its tiles to have.
    return Contender(
        FLASH,
        call,
        shape.stock_work(64, splits=True),
        notes={"version": int(fa_version)},
    )


def cascade(batch: Batch) -> Contender:
    """Return FlashInfer's multi-level cascade, one level for each and the tails."""
    try:
        from flashinfer.cascade import MultiLevelCascadeAttentionWrapper
    except ImportError:
        raise MissingError("FlashInfer is not installed") from None
    shape, device = batch.shape, batch.q.device
    need_gpu(device)
    if not shape.levels:
        raise MissingError("nothing is shared")
    tables, new, count = batch.host[0][batch.order], shape.new_tokens, shape.requests
    rows = np.repeat(batch.order * new, new) + np.tile(np.arange(new), count)
    levels: list[list[torch.Tensor]] = [[], [], [], []]
    start = 0
    for nodes, length in [*shape.runs(), (count, shape.own_blocks())]:
        members = np.arange(count) * nodes // count
        starts = np.searchsorted(members, np.arange(nodes + 1))
        last = PAGE if start < shape.prefix // PAGE else (shape.tail - 1) % PAGE + 1
        arrays: tuple[npt.NDArray[Any], ...] = (
            starts * new,
            np.arange(nodes + 1) * length,
            tables[starts[:-1], start : start + length].ravel(),
            np.full(nodes, last),
        )
        for into, array in zip(levels, arrays, strict=True):
            into.append(torch.from_numpy(array.astype(np.int32)).to(device))
        start += length
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(shape.levels + 1, workspace, "NHD")
    wrapper.plan(
        *levels,
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        PAGE,
        causal=True,
        q_data_type=batch.q.dtype,
    )
    index = torch.from_numpy(rows).to(device)
    q, caches = batch.q[index], (batch.k, batch.v)
    return Contender(CASCADE, lambda: wrapper.run(q, caches), back=torch.argsort(index))


CONTENDERS = {OURS: ours, VLLM: stock, FLASH: flash, CASCADE: cascade}


def gather(batch: Batch) -> tuple[list[Contender], dict[str, Row]]:
    """Return the contenders of a batch, and why the others are none."""
    present, absent = [], {}
    for name, make in CONTENDERS.items():
        try:
            present.append(make(batch))
        except MissingError as error:
            absent[name] = {"status": str(error)}
        except Exception as error:
            # What is not ours may refuse a device or a shape in any way.
            if name in (OURS, VLLM):
                raise
            absent[name] = {"status": f"failed: {error!r}"}
    return present, absent


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a head's output, over its length."""
    wide, right = result.double(), expected.double()
    relative = (wide - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)
    return float(relative.nan_to_num(float("inf")).max())


def check(batch: Batch, who: Contender, expected: torch.Tensor | None) -> torch.Tensor:
    """Return what a contender computes, in the batch's order.

    Raises:
        MismatchError: it is further from ``expected`` than ``TOLERANCE``.
    """
    result = who.call()
    result = (result if who.back is None else result[who.back]).clone()
    error = 0.0 if expected is None else difference(result, expected)
    who.notes["difference"] = error
    if not (error <= TOLERANCE and bool(result.isfinite().all())):
        raise MismatchError(
            f"{who.name} differs by {error:.3g} (at most {TOLERANCE} of a head's "
            f"output): {batch.shape}"
        )
    return result
