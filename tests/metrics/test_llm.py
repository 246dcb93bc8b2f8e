"""Metrics where requests go through ``LLM``: in this process's registry."""

import json
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import json, sys
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
import vllm_radix
if __name__ == "__main__":
    llm = LLM(**vllm_radix.enable(dict(
        model=sys.argv[1], load_format="dummy", dtype="float32", enforce_eager=True,
        max_model_len=512, block_size=32, num_gpu_blocks_override=40,
        disable_log_stats=False)))
    text = list(range(100, 300))
    prompts = [text, text, text[:150] + [7] * 40, [9] * 50]
    cached = []
    for tokens in prompts:
        (output,) = llm.generate(
            {"prompt_token_ids": tokens},
            SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        cached.append(output.num_cached_tokens)
    stock = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    ours = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("vllm_radix:"):
                ours[sample.name] = ours.get(sample.name, 0) + sample.value
    print("RESULT" + json.dumps([cached, sum(map(len, prompts)), stock, ours]))
"""


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_an_llm_counts_as_its_answers_say(tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tiny],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": "radix"},
    )
    (line,) = (one for one in done.stdout.splitlines() if one.startswith("RESULT"))
    cached, tokens, stock, ours = json.loads(line.removeprefix("RESULT"))
    # Seven tokens more of the second are not worth a copy.
    assert cached == [0, 192, 150, 0]
    hits = ours["vllm_radix:hit_tokens_total"]
    assert stock["vllm:prefix_cache_hits"] == hits == sum(cached)
    assert ours["vllm_radix:queried_tokens_total"] == tokens
    assert stock["vllm:prefix_cache_queries"] == tokens
    assert ours["vllm_radix:admissions_total"] == ours["vllm_radix:overtakes_count"]
    assert ours["vllm_radix:admissions_total"] == 4
    assert ours["vllm_radix:pool_blocks"] == 39 and ours["vllm_radix:info"] == 1
    assert 0 < ours["vllm_radix:cached_blocks"] <= 39
