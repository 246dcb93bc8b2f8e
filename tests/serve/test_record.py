"""A real server records its traffic; replayed, it computes the same tokens."""

import json

import openai
import pytest
from serve.test_serve import bench, converse, metric

from support.servers import NAME, serving
from vllm_radix.cli import main

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def test_a_trace_recorded_under_bench_serve_replays_to_the_token(smollm2, tmp_path):
    path, output = tmp_path / "t.jsonl", tmp_path / "r.json"
    with serving(smollm2, tmp_path / "log", "--radix.record", str(path)) as base:
        # One request at a time: those that run at once depend on seconds.
        load = bench(base, smollm2, tmp_path, "--max-concurrency", "1")
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        converse(client, "the harbour")
        both = client.completions.create(
            model=NAME, prompt="The stone bridge was built", max_tokens=5, n=2
        )
        prompts, hits = (
            metric(base, f"vllm:{name}_total")
            for name in ("prompt_tokens", "prefix_cache_hits")
        )
    assert (load["completed"], len(both.choices)) == (12, 2)
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert sum(line["input_length"] for line in lines) == prompts
    assert sum(line["cached"] for line in lines) == hits > 0
    words = ["replay", str(path), "--arms", "stock", "radix", "--output", str(output)]
    server = header["server"]
    for name in ("blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
        words += [f"--{name.replace('_', '-')}", str(server[name])]
    assert main(words) == 0
    (cell,) = json.loads(output.read_text())["cells"]
    radix = cell["arms"]["radix"]
    assert radix["computed_prompt_tokens"] == prompts - hits
    # Request by request, in order of arrival.
    found = {request_id: row for request_id, _, _, *row in cell["requests"]["radix"]}
    by_arrival = sorted(lines, key=lambda line: line["request"])
    for number, line in enumerate(by_arrival):
        assert found[str(number)][0] == line["cached"]
    assert cell["arms"]["stock"]["computed_prompt_tokens"] > prompts - hits
