"""Batches over trees of shared prefixes: one cache, and queries for it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_radix.attention.cost import Layer, Work
from vllm_radix.attention.plan_buffers import PARTIAL_MEMORY
from vllm_radix.attention.planner import STOCK_SEGMENTS, stock_is_cut

PAGE = 16

SPARE = 8
"""Columns of a block table behind the longest request's blocks."""

Ints = npt.NDArray[np.int32]


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
