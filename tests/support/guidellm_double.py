"""Stands for the program `guidellm`: reads its options, sends, writes its report.

The requests are those of a real report, `tests/bench/ab/guidellm_report.json`; they are
sent to the target, and what came is put into the report. GUIDELLM_FAULT makes it fail,
in one way a name.
"""

import copy
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

REPORT = Path(__file__).parents[1] / "bench" / "ab" / "guidellm_report.json"
FAULT = os.environ.get("GUIDELLM_FAULT", "")


def value_of(words, name):
    return words[words.index(name) + 1] if name in words else None


def ask(spec, number, tokens):
    """Send a request; return what the report says of it."""
    backend = spec["backend"]
    body = {"model": backend["model"], **backend["extras"]["body"]}
    body |= {"prompt": [7] * 40 + [number] * 8, "max_tokens": tokens}
    request = urllib.request.Request(
        backend["target"] + "/v1/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {backend.get('api_key')}"},
    )
    start = time.time()
    with urllib.request.urlopen(request) as reply:
        lines = [line for line in reply if b"token_ids" in line]
    end = time.time()
    ids = [json.loads(x.removeprefix(b"data: "))["choices"][0] for x in lines]
    return {
        "request_args": json.dumps(body),
        "output": "".join(f"{one['token_ids']}" for one in ids),
        "timings": {
            "request_start": start, "first_token_iteration": (start + end) / 2,
            "last_token_iteration": end, "request_end": end,
        },
        "tokens": len(ids), "prompt": len(body["prompt"]),
    }  # fmt: skip


def report_of(spec, count):
    report = json.loads(REPORT.read_text())
    requests = report["benchmarks"][0]["requests"]
    like, bad = requests["successful"][0], requests["errored"][0]
    requests["successful"], requests["errored"] = [], []
    for number in range(count):
        one = copy.deepcopy(like)
        try:
            found = ask(spec, number, 4)
        except urllib.error.HTTPError:
            requests["errored"].append(copy.deepcopy(bad))
            continue
        one |= {name: found[name] for name in ("request_args", "output")}
        one["info"]["timings"] |= found["timings"]
        one["output_metrics"]["total_tokens"] = found["tokens"]
        one["input_metrics"]["total_tokens"] = found["prompt"]
        requests["successful"].append(one)
    if FAULT == "sends nothing":
        requests["successful"] = []
    if FAULT == "report of another version":
        report["metadata"]["version"] = 3
    return report


def main():
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"guidellm version: {os.environ.get('GUIDELLM_DOUBLE', '0.8.1')}")
        return 0
    assert words[0] == "run"
    if FAULT == "refuses its options" or "--nonsense" in words:
        print("Usage: guidellm run [OPTIONS]\n\nError: No such option: --nonsense\n")
        return 2
    spec = json.loads(Path(value_of(words, "--config")).read_text())["spec"]
    assert spec["tokenizer"]["kind"] == "huggingface_auto"
    try:
        urllib.request.urlopen(spec["backend"]["target"] + "/health")
    except urllib.error.URLError:
        print("RuntimeError: Backend validation request failed.")
        return 1
    if log := os.environ.get("GUIDELLM_CALLS"):
        with open(log, "a") as calls:
            calls.write(json.dumps({"words": words, "spec": spec}) + "\n")
    if FAULT == "ends":
        print("Traceback\nRuntimeError: no such data")
        return 1
    if FAULT == "hangs":
        print(f"engine {os.getpid()}", flush=True)
        time.sleep(1000)
    constraint = value_of(words, "--constraint").partition("count=")[2]
    report = report_of(spec, int(constraint))
    if FAULT != "writes nothing":
        Path(spec["outputs"][0]["path"]).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
