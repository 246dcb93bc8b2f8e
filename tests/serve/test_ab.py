"""The A/B on real servers: counts, answers and loads of all kinds."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

COMMAND = str(Path(sys.executable).parent / "vllm-radix")


def test_ab_on_real_servers(tiny, tmp_path):
    trace = tmp_path / "trace.jsonl"
    shared = list(range(100, 400))
    lines = [
        {
            "token_ids": [*shared, 500 + i],
            "output_length": 4,
            "tenant": "ab"[i % 2],
        }
        for i in range(8)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output, page = tmp_path / "ab.json", tmp_path / "ab.html"
    words = ["ab", tiny, "--load-format", "dummy", "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "4"]
    words += ["--block-size", "32", "--num-gpu-blocks-override", "65", "--together"]
    words += ["--max-num-batched-tokens", "512", "--radix.patience", "1"]
    words += ["--workloads", "few-shot", "--rounds", "1", "--trace", str(trace)]
    words += ["--output", str(output), "--html", str(page)]
    words += ["--pressure", "4", "--fail-on", "few-shot:computed_tokens>0.95"]
    words += ["--", "--dataset-name", "prefix_repetition", "--num-prompts", "8"]
    words += ["--prefix-repetition-prefix-len", "160", "--prefix-repetition-suffix-len"]
    words += ["16", "--prefix-repetition-num-prefixes", "2"]
    words += ["--prefix-repetition-output-len", "4"]
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(output.read_text())
    found = {one["name"]: one for one in report["workloads"]}
    names = ["trace.jsonl", "bench: prefix_repetition", "few-shot", "control"]
    assert list(found) == names
    for one in found.values():
        stock, radix = (one["counts"][arm] for arm in ("stock", "radix"))
        assert stock["errors"] == radix["errors"] == 0
        assert stock["prompt_tokens"] == radix["prompt_tokens"] > 0
        assert one["answers"]["compared"] == one["requests"]
        assert one["answers"]["beyond_doubt"] == 0
        if one["load"] != "bench":
            assert radix["computed_tokens"] >= one["fewest_tokens"]
    control = found["control"]["counts"]
    assert control["radix"]["computed_tokens"] == control["stock"]["computed_tokens"]
    assert found["control"]["answers"]["different"] == 0
    tenants = {one["name"]: one["requests"] for one in found["trace.jsonl"]["tenants"]}
    assert tenants == {"a": 4, "b": 4}
    assert found["few-shot"]["hit_rate_over_time"]["radix"]
    assert "<svg" in page.read_text()
    last = done.stdout.rstrip().splitlines()[-1]
    assert last == report["sentence"]
    left = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in left if str(tmp_path) in line]
