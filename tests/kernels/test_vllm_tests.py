"""vLLM's own tests of its attention kernels, over ours, interpreted.

The tests are those of the installed version's source, with their own references and
tolerances: ``test_triton_unified_attention.py`` and ``test_prefix_prefill.py``. An
adapter takes the place of the operator that each calls. Their batches share
nothing, so each case says where groups are to come from:

    twice   every request is in the batch twice, so each is grouped with its double;
            both results have to be equal
    forest  block tables drawn from two or three blocks: requests share by chance
    alone   each request reads its own keys, cut into splits that are merged

vLLM has no Triton on a CPU. It is handed the real one before its modules are imported,
and torch some stand-ins for its accelerator, so the tests run in a process of their
own: this file, as a script.

Left out of ``test_triton_unified_attention.py``, for what the kernel does not do:

- ``test_triton_unified_attn`` with float8 queries, ``test_fp8_softmax_*``
- ``test_triton_unified_attn_fp16_input_fp8_output``: output in float8
- ``*_clamped_mm_*``: attention in both directions within ranges, chunked lookback
- ``test_softcap_*``: of a function of vLLM's kernel
- 32768 blocks: gigabytes; ``seq_threshold_3D``: chooses among vLLM's kernels

Left out of ``test_prefix_prefill.py``:

- float8 caches: values are below 1e-3 and so is what may be off, so anything passes;
  ``test_triton_unified_attn_bf16_query_fp8_kv`` is here instead
- ``*_alibi_unsupported``, ``test_rocm_*``: of vLLM's entry points
- 64 KV heads, 1024 tokens, and blocks of 1040 and 1056: too slow, or too large, for an
  interpreter; fewer heads and shorter requests instead, and a block of 544
- ``chunked_prefill_paged_decode``: called as ``context_attention_fwd`` is

In that file queries and keys are so small that all scores are equal, and what may be
off is a tenth of a value: a key too many is seen only among few. So its requests and
windows are shorter here than there; its ALiBi tests allow 1e-6. Soft caps are of 2,
not 50, below which scores of random keys stay anyway.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_radix.attention.cost import DEVICES, Layer
from vllm_radix.attention.plan_buffers import PlanBuffers
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_kernels.grouped_attention import OPEN_END, grouped_attention
from vllm_radix_kernels.interpreter import interpreted
from vllm_radix_kernels.tiles import Tile

pytestmark = pytest.mark.interpreted

UNIFIED = "test_triton_unified_attention"
PREFIX = "test_prefix_prefill"
ATTENTION = "test_triton_unified_attn"
CONTEXTED = "test_contexted_kv_attention"

EXTEND = [(1, 1328), (5, 18), (129, 463)]
DECODE = [(1, 523), (1, 37), (1, 2011)]
MANY = [(1 + i % 3, 90 + 7 * i) for i in range(12)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of one of vLLM's tests.

    Attributes:
        file: the module it is in.
        test: its name.
        how: where groups come from, see above.
        arguments: what it is called with.
        lengths: most tokens of a query, and of what precedes it; where the test
            draws them.
        broken: leave out that queries see each other, for it to fail.
    """

    file: str
    test: str
    how: str
    arguments: dict[str, Any]
    lengths: tuple[int, int] = (12, 64)
    broken: bool = False


def unified(how, seq_lens, num_heads, head_size=128, test=ATTENTION, **more):
    """Return a case of the first file, with what its tests take and few set."""
    more = {"block_size": 16, "num_blocks": 2048, "seq_threshold_3D": 0, **more}
    broken = more.pop("broken", False)
    if test != f"{ATTENTION}_bf16_query_fp8_kv":
        more = {"sliding_window": None, "soft_cap": None, **more}
    if test == ATTENTION:
        more = {"dtype": torch.bfloat16, "q_dtype": None, **more}
    shape = {"seq_lens": seq_lens, "num_heads": num_heads, "head_size": head_size}
    return Case(UNIFIED, test, how, {**shape, **more}, broken=broken)


def prefix(how, heads, per_kv, head_size, lengths=(12, 64), test=CONTEXTED, **more):
    """Return a case of the second file."""
    broken = more.pop("broken", False)
    if test == CONTEXTED:
        more = {"sliding_window": 0, **more}
    if not test.endswith("_f32"):
        more = {"block_size": 16, **more}
    fixed = {
        "num_heads": heads,
        "num_queries_per_kv": per_kv,
        "head_size": head_size,
        "dtype": torch.float16,
        "kv_cache_dtype": "auto",
        "device": "cpu",
    }
    return Case(PREFIX, test, how, {**fixed, **more}, lengths, broken)


FP8 = {"test": f"{ATTENTION}_bf16_query_fp8_kv"}
# Head size 96, which only this test has; how vLLM's kernel loads makes no difference.
TD = {"test": f"{ATTENTION}_use_td"}
CACHED = {"test": f"{CONTEXTED}_cached_kv"}
ALIBI = {"test": f"{CONTEXTED}_alibi"}

CASES = {
    # -- unified attention: bf16, soft cap, windows, float8 keys and values
    "extend": unified("twice", EXTEND, (8, 2)),
    "extend, 5 to 1, window, cap": unified(
        "twice", EXTEND, (5, 1), sliding_window=128, soft_cap=2.0
    ),
    "decode": unified("twice", DECODE, (8, 2)),
    "decode, alone": unified("alone", DECODE, (5, 1)),
    "decode, cap": unified("twice", DECODE, (4, 4), soft_cap=2.0),
    "decode, window": unified("alone", DECODE, (8, 2), sliding_window=64),
    "decode, window of a double": unified("twice", DECODE, (8, 2), sliding_window=256),
    "heads of 256": unified("twice", DECODE, (5, 1), 256),
    "heads of 96, window": unified(
        "forest", MANY, (8, 2), 96, num_blocks=3, sliding_window=128, **TD
    ),
    "blocks of 64": unified("twice", DECODE, (8, 2), block_size=64),
    "fp16": unified("twice", DECODE, (8, 2), dtype=torch.float16),
    "forest": unified("forest", MANY, (8, 2), num_blocks=2),
    "forest, window, cap": unified(
        "forest", MANY, (4, 4), num_blocks=2, sliding_window=64, soft_cap=2.0
    ),
    "forest, blocks of 32": unified(
        "forest", MANY, (5, 1), num_blocks=3, block_size=32
    ),
    "one token each": unified("alone", [(1, 1)] * 40, (8, 2)),
    "fp8 keys, extend": unified("alone", EXTEND, (8, 2), **FP8),
    "fp8 keys, decode": unified("twice", DECODE, (5, 1), **FP8),
    "fp8 keys, forest": unified("forest", MANY, (8, 2), 256, num_blocks=2, **FP8),
    "no context": Case(
        UNIFIED, f"{TD['test']}_tile_clamp", "alone", {"num_heads": (5, 1)}
    ),
    "broken decode": unified("alone", DECODE, (8, 2), broken=True),
    "broken forest": unified("forest", MANY, (8, 2), num_blocks=2, broken=True),
    # -- context attention: fp16 and fp32, windows, ALiBi, pages of 16, 32 and 544
    "context": prefix("twice", 4, 1, 128),
    "context, heads of 24": prefix("alone", 4, 1, 24, sliding_window=3),
    "context, 64 to 1, 128": prefix("alone", 64, 64, 128, (4, 60)),
    "context, 8 to 2": prefix("twice", 8, 4, 128, sliding_window=3),
    "context, fp32": prefix(
        "twice",
        4,
        2,
        24,
        dtype=torch.float32,
        test=f"{CONTEXTED}_f32",
        sliding_window=3,
    ),
    "context, blocks of 544": prefix("alone", 4, 4, 128, (6, 1024), block_size=544),
    "ALiBi": prefix("twice", 4, 1, 128, **ALIBI),
    "ALiBi, 12 heads": prefix("twice", 12, 4, 24, **ALIBI),
    "ALiBi, fp32": prefix(
        "alone", 4, 2, 24, dtype=torch.float32, test=f"{CONTEXTED}_alibi_f32"
    ),
    "ALiBi, blocks of 544": prefix(
        "twice", 4, 4, 24, (6, 1024), block_size=544, **ALIBI
    ),
    "all cached": prefix("twice", 4, 1, 128, **CACHED),
    "exact table": Case(
        PREFIX, f"{CACHED['test']}_block_table_boundary", "alone", {"device": "cpu"}
    ),
    "broken context": prefix("twice", 4, 1, 128, broken=True),
    "broken ALiBi": prefix("alone", 8, 8, 24, **ALIBI, broken=True),
    "broken cache": prefix("twice", 4, 1, 128, **CACHED, broken=True),
}


# -- what the operators are replaced by ----------------------------------------


class Adapter:
    """vLLM's operators, by our kernel.

    Args:
        case: what is run.

    Attributes:
        calls: calls so far.
        nodes: ranges that were read once for several requests.
        partials: partial results that were merged.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self.calls = self.nodes = self.partials = 0

    def unified_attention(
        self,
        *,
        q,
        k,
        v,
        out,
        cu_seqlens_q,
        max_seqlen_q,
        seqused_k,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        block_table,
        softcap,
        q_descale,
        k_descale,
        v_descale,
        kv_quant_mode=0,
        use_td=False,
        # Of vLLM's 3D kernel. What is not named here we do not do.
        seq_threshold_3D=None,
        num_par_softmax_segments=None,
        softmax_segm_output=None,
        softmax_segm_max=None,
        softmax_segm_expsum=None,
    ):
        assert causal and q_descale is None and window_size[1] <= 0
        assert kv_quant_mode in (0, 1), "none, or one scale for all"
        self._attend(
            q,
            k,
            v,
            out,
            block_table,
            seqused_k,
            cu_seqlens_q,
            softmax_scale,
            window=window_size[0] + 1,
            softcap=float(softcap),
            k_scale=_one(k_descale),
            v_scale=_one(v_descale),
        )

    def context_attention_fwd(
        self,
        q,
        k,
        v,
        o,
        kv_cache_dtype,
        k_cache,
        v_cache,
        b_loc,
        b_start_loc,
        b_seq_len,
        max_seq_len,
        max_input_len,
        k_scale,
        v_scale,
        alibi_slopes=None,
        sliding_window=None,
    ):
        assert kv_cache_dtype == "auto"
        if self.calls:
            # The first call was to warm up; the second one is timed.
            return
        # K is [blocks, KV heads, D / 8, page, 8], V [blocks, KV heads, D, page].
        keys = k_cache.permute(0, 3, 1, 2, 4).flatten(3)
        values = v_cache.clone().permute(0, 3, 1, 2)
        page = keys.shape[1]
        starts = b_start_loc.tolist()
        for request, length in enumerate(b_seq_len.tolist() if k is not None else ()):
            # The step's own tokens are beside the cache there, and in it here.
            start, end = starts[request], starts[request + 1]
            position = torch.arange(length - (end - start), length)
            block = b_loc[request, position // page].long()
            keys[block, position % page] = k[start:end]
            values[block, position % page] = v[start:end]
        self._attend(
            q,
            keys,
            values,
            o,
            b_loc,
            b_seq_len,
            b_start_loc,
            q.shape[-1] ** -0.5,
            window=sliding_window or 0,
            slopes=alibi_slopes,
        )

    def _attend(self, q, k, v, out, tables, seq_lens, starts, scale, **features):
        case, num_tokens = self._case, len(q)
        if case.how == "twice":
            # The doubles come after all: nobody's is its neighbour.
            q = torch.cat([q, q])
            tables, seq_lens = tables.repeat(2, 1), seq_lens.repeat(2)
            starts = torch.cat([starts, starts[1:] + num_tokens])
        # An element's bytes are overstated: whatever is shared pays.
        layer = Layer(q.shape[1], k.shape[2], q.shape[2], kv_bytes=1 << 12)
        limits = Limits(
            layer=layer,
            device=DEVICES["interpreter"],
            block_size=k.shape[1],
            tile_rows=256 if layer.group > 16 else 128,
            split=192 if case.how == "alone" else 0,
        )
        batch = (tables.numpy(), seq_lens.numpy(), starts.numpy())
        plan = AttentionPlanner(limits).propose(*batch)
        assert plan is not None, "the plan does not fit"
        if case.broken:
            plan = blinded(plan, seq_lens.numpy(), starts.numpy())
        self.calls += 1
        self.nodes += plan.num_nodes
        self.partials += plan.num_partials
        room = dataclasses.replace(
            limits,
            max_tokens=len(q),
            max_items=len(plan.items),
            max_partials=max(1, plan.num_partials),
        )
        tile = Tile(limits.tile_rows, 64, 1, 1)
        device = PlanBuffers(room, tile, torch.device("cpu")).load(plan)
        device.part.fill_(float("nan"))
        device.lse.fill_(float("nan"))
        result = torch.full_like(q, float("nan"))
        with interpreted():
            grouped_attention(
                q, k, v, result, tables, seq_lens, starts, device, scale, **features
            )
        if case.how == "twice":
            step = 2 * torch.finfo(q.dtype).eps
            torch.testing.assert_close(
                result[:num_tokens], result[num_tokens:], rtol=step, atol=step / 8
            )
        out.copy_(result[:num_tokens])


def _one(scales):
    """Return the one value that all scales have: vLLM's tests give one per head."""
    if scales is None:
        return None
    assert len(scales.unique()) == 1
    return scales.flatten()[:1]


def blinded(plan, seq_lens, starts):
    """Return the plan with a bug: queries do not see the step's own tokens."""
    items = plan.items.copy()
    context = seq_lens - np.diff(starts)
    last = items[:, 4] == OPEN_END
    items[last, 4] = context[items[last, 0]]
    return dataclasses.replace(plan, items=items)


# -- the process that runs them ------------------------------------------------


class _ShortLengths:
    """``random`` as vLLM's module sees it: ten queries, ten contexts, cut short."""

    def __init__(self, query: int, context: int) -> None:
        self._most = iter([query] * 10 + [context] * 10)

    def randint(self, low: int, high: int) -> int:
        return random.randint(1, next(self._most))


def import_module(folder: str, file: str) -> Any:
    """Return a module of vLLM's tests, on a CPU with Triton."""
    import triton
    import triton.language as tl
    import vllm.triton_utils as utils

    # What vLLM has instead, without a GPU, cannot be interpreted.
    utils.HAS_TRITON, utils.triton, utils.tl = True, triton, tl
    torch.accelerator.set_device_index = lambda device: None
    torch.accelerator.synchronize = lambda: None
    sys.path.insert(0, folder)
    return importlib.import_module(f"tests.kernels.attention.{file}")


def run(module: Any, case: Case) -> dict[str, Any]:
    """Run a case; return how it ended, as JSON has it."""
    adapter = Adapter(case)
    arguments = dict(case.arguments)
    if case.file == UNIFIED:
        module.unified_attention = adapter.unified_attention
    else:
        module.random = _ShortLengths(*case.lengths)
        module.context_attention_fwd = adapter.context_attention_fwd
        if "cached_kv" not in case.test:
            arguments["op"] = adapter.context_attention_fwd
    start, error, words = time.monotonic(), "", ""
    try:
        getattr(module, case.test)(**arguments)
    except (Exception, pytest.skip.Exception) as problem:
        error, words = type(problem).__name__, traceback.format_exc()
    return {
        "error": error,
        "words": words,
        "calls": adapter.calls,
        "nodes": adapter.nodes,
        "partials": adapter.partials,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(folder: str, file: str, report: str) -> None:
    """Run all cases of one file."""
    module = import_module(folder, file)
    ended = {}
    for name, case in CASES.items():
        if case.file == file:
            with contextlib.redirect_stdout(sys.stderr):
                ended[name] = run(module, case)
    Path(report).write_text(json.dumps(ended))


# -- the tests -----------------------------------------------------------------


@functools.cache
def outcomes(file):
    from conformance import fetch

    folder = fetch.fetch()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        done = subprocess.run(
            [sys.executable, __file__, str(folder), file, str(report)],
            cwd=scratch,
            env={**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(report.read_text())


@pytest.mark.engine
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.broken])
def test_vllms_test_passes(name):
    case = CASES[name]
    ended = outcomes(case.file)[name]
    assert not ended["error"], ended["words"]
    assert ended["calls"], "vLLM's kernel was tested"
    assert bool(ended["nodes"]) == (case.how != "alone"), "grouped, or not"


@pytest.mark.engine
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.broken])
def test_vllms_test_fails_if_queries_do_not_see_themselves(name):
    ended = outcomes(CASES[name].file)[name]
    assert ended["error"] == "AssertionError", ended["words"]
    assert "Mismatched elements" in ended["words"]


if __name__ == "__main__":
    main(*sys.argv[1:])
