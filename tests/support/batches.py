"""Batches over forests of shared prefixes, with a paged cache that holds traps.

Every slot that no request may read is NaN: unused blocks, and what lies behind the
last token in a request's last block. Block tables go on with stale ids after a
request's own, of blocks that others use. Partly filled last blocks may be shared
(aliased) by requests, and the same content may stand in several blocks.
"""

import dataclasses

import numpy as np
import torch

from vllm_radix.attention.cost import DEVICES, Layer
from vllm_radix.attention.plan_buffers import PlanBuffers
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_kernels.grouped_attention import (
    grouped_attention,
    grouped_attention_reference,
)
from vllm_radix_kernels.interpreter import interpreted
from vllm_radix_kernels.tiles import Tile


@dataclasses.dataclass
class Batch:
    """Block tables, lengths and query starts, as a worker has them."""

    tables: np.ndarray
    seq_lens: np.ndarray
    starts: np.ndarray
    page: int
    num_blocks: int

    @property
    def rows(self):
        return np.diff(self.starts)


def make_batch(
    seed,
    page=16,
    depth=3,
    trees=2,
    branching=3,
    run=(1, 5),
    tail=(1, 40),
    rows=(1, 1, 1, 2, 5),
    alias=0.3,
    duplicate=0.2,
    padding=0,
    alone=2,
):
    """Return a batch over a random forest; lengths in tokens, runs in blocks."""
    rng = np.random.default_rng(seed)
    free = iter(rng.permutation(np.arange(1, 4096)).tolist())
    requests = []  # (blocks, tokens, query rows)

    def finish(blocks, partial=None):
        count = int(rng.choice(rows))
        new = int(rng.integers(*tail, endpoint=True))
        tokens = len(blocks) * page + new
        if partial is not None:
            # Goes on in a block that another goes on in, with the same tokens.
            requests.append(([*blocks, partial], len(blocks) * page + page // 2, 1))
            return
        count = min(count, tokens)
        own = [next(free) for _ in range(-(-new // page))]
        requests.append(([*blocks, *own], tokens, count))

    def grow(blocks, level):
        blocks = blocks + [next(free) for _ in range(rng.integers(*run))]
        twin = next(free) if rng.random() < duplicate else None
        aliased = next(free) if rng.random() < alias else None
        for _ in range(rng.integers(2, branching, endpoint=True)):
            mine = list(blocks)
            if twin is not None and rng.random() < 0.5:
                # The same content, computed twice: another block.
                mine[-1] = twin
            if level + 1 < depth and rng.random() < 0.6:
                grow(mine, level + 1)
            else:
                finish(mine)
        if aliased is not None:
            finish(blocks, aliased)
            finish(blocks, aliased)

    for _ in range(trees):
        grow([], 0)
    for _ in range(alone):
        finish([])
    order = rng.permutation(len(requests))
    requests = [requests[i] for i in order] + [([], 0, 0)] * padding
    used = sorted({block for blocks, _, _ in requests for block in blocks})
    width = max(len(blocks) for blocks, _, _ in requests) + 3
    tables = rng.choice(used, size=(len(requests), width)).astype(np.int32)
    for row, (blocks, _, _) in enumerate(requests):
        tables[row, : len(blocks)] = blocks
    return Batch(
        tables,
        np.array([tokens for _, tokens, _ in requests], dtype=np.int32),
        np.concatenate([[0], np.cumsum([n for _, _, n in requests])]).astype(np.int32),
        page,
        max(used) + 8,
    )


def shared(members=5, blocks=4, page=16, rows=1, own=9, levels=1, seed=0):
    """Return a small batch in which grouping always pays."""
    rng = np.random.default_rng(seed)
    free = iter(rng.permutation(np.arange(1, 900)).tolist())
    stem = [next(free) for _ in range(blocks)]
    groups = [[next(free) for _ in range(blocks)] for _ in range(2)]
    tables, lengths = [], []
    for member in range(members):
        held = stem + (groups[member % 2] if levels > 1 else [])
        new = own + member + rows
        tables.append(held + [next(free) for _ in range(-(-new // page))])
        lengths.append(len(held) * page + new)
    width = max(map(len, tables)) + 2
    filled = np.array([t + [stem[0]] * (width - len(t)) for t in tables])
    return Batch(
        filled.astype(np.int32),
        np.array(lengths, dtype=np.int32),
        (np.arange(members + 1) * rows).astype(np.int32),
        page,
        901,
    )


def decode(tables, lengths, page=16, rows=1):
    count = len(lengths)
    starts = np.arange(count + 1) * rows
    return Batch(
        np.asarray(tables, dtype=np.int32),
        np.asarray(lengths, dtype=np.int32),
        starts.astype(np.int32),
        page,
        1000,
    )


class DecodeTraffic:
    """Requests that decode, come and go, on one pool of blocks."""

    def __init__(self, seed, page=4):
        self.rng = np.random.default_rng(seed)
        self.page = page
        self.free = list(range(1, 4000))
        self.stems = [[self.free.pop() for _ in range(5)] for _ in range(3)]
        self.requests = []
        for _ in range(12):
            self.join()

    def join(self):
        stem = self.stems[self.rng.integers(3)][: self.rng.integers(3, 6)]
        tokens = len(stem) * self.page + int(self.rng.integers(1, 9))
        self.requests.append([list(stem), tokens])

    def step(self):
        if self.rng.random() < 0.03:
            self.join()
        if self.rng.random() < 0.03 and len(self.requests) > 2:
            del self.requests[self.rng.integers(len(self.requests))]
        if self.rng.random() < 0.02:
            self.rng.shuffle(self.requests)
        if self.rng.random() < 0.02:
            # Another request in the same row, with the same lengths.
            one = self.requests[self.rng.integers(len(self.requests))]
            one[0] = [self.free.pop() for _ in one[0]]
        if self.rng.random() < 0.03:
            # One goes on in the block that another filled (a turn that was cached).
            a, b = self.rng.integers(len(self.requests), size=2)
            self.requests[a] = [list(self.requests[b][0]), self.requests[b][1]]
        for request in self.requests:
            request[1] += 1
            while len(request[0]) * self.page < request[1]:
                request[0].append(self.free.pop())

    def batch(self):
        tables = self.rng.integers(1, 4000, size=(len(self.requests), 64))
        for row, (blocks, _) in enumerate(self.requests):
            tables[row, : len(blocks)] = blocks
        return decode(tables, [tokens for _, tokens in self.requests], self.page)


def make_limits(batch, layer, tile_rows=16, split=0, **fields):
    return Limits(
        layer=layer,
        device=DEVICES["interpreter"],
        block_size=batch.page,
        tile_rows=tile_rows,
        split=split,
        **{"max_tokens": 8192, "max_items": 4096, "max_partials": 4096, **fields},
    )


def make_cache(batch, layer, dtype=torch.float32, kv_dtype=None, layout="NHD", seed=0):
    """Return keys and values [blocks, page, KV heads, D], NaN where nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch.num_blocks, batch.page, layer.num_kv_heads, layer.head_size)
    kv_dtype = kv_dtype or dtype
    caches = []
    for which in range(2):
        cache = torch.randn(shape, generator=generator).to(kv_dtype)
        filled = torch.zeros(shape[:2], dtype=torch.bool)
        for row, length in enumerate(batch.seq_lens.tolist()):
            for number, block in enumerate(
                batch.tables[row, : -(-length // batch.page)]
            ):
                filled[block, : max(0, length - number * batch.page)] = True
        cache.view(torch.uint8 if kv_dtype.itemsize == 1 else kv_dtype)[~filled] = (
            0x7F if kv_dtype.itemsize == 1 else float("nan")
        )
        if layout == "HND":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "K transposed" and which == 0:
            cache = cache.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        caches.append(cache)
    return caches


def compute(batch, layer, plan, limits, q, k, v, tile_n=32, poison=True, **features):
    """Run the kernels over a plan, interpreted; unused memory is NaN."""
    tile = Tile(limits.tile_rows, tile_n, 1, 1)
    buffers = PlanBuffers(limits, tile, torch.device("cpu"))
    device = buffers.load(plan)
    device.programs = 3
    if poison:
        device.part.fill_(float("nan"))
        device.lse.fill_(float("nan"))
    out = torch.full_like(q, float("nan"))
    with interpreted():
        grouped_attention(
            q,
            k,
            v,
            out,
            torch.from_numpy(batch.tables),
            torch.from_numpy(batch.seq_lens),
            torch.from_numpy(batch.starts),
            device,
            layer.head_size**-0.5,
            **features,
        )
    return out


def reference(batch, layer, q, k, v, **features):
    return grouped_attention_reference(
        q,
        k,
        v,
        torch.from_numpy(batch.tables),
        torch.from_numpy(batch.seq_lens),
        torch.from_numpy(batch.starts),
        layer.head_size**-0.5,
        **features,
    )


def plan_of(batch, limits):
    return AttentionPlanner(limits).plan(batch.tables, batch.seq_lens, batch.starts)


def agree(out, expected, tolerance):
    """Fail where a value is off by more than that, relative to the largest value."""
    assert not out.isnan().any(), "read what nobody wrote, or wrote nothing"
    scale = max(1.0, float(expected.abs().max()))
    assert float((out.double() - expected).abs().max()) <= tolerance * scale


__all__ = [
    "Batch",
    "DecodeTraffic",
    "Layer",
    "agree",
    "compute",
    "decode",
    "make_batch",
    "make_cache",
    "make_limits",
    "plan_of",
    "reference",
    "shared",
]
