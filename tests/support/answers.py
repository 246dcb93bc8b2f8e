"""Answers of real engines, each in a process of its own, compared with stock's.

Greedy answers may differ where the model is undecided: where its two likeliest tokens
are within ``GAP``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

GAP = 1e-3
HERE = Path(__file__).parent
ENGINE = {"block_size": 32, "max_num_seqs": 6, "max_model_len": 512}


def answer(model, requests, engine, metrics=()):
    """Return what the engine of one arm printed."""
    job = {"model": model, "requests": requests, "engine": engine, "metrics": metrics}
    options = engine.get("additional_config", {}).get("radix", {})
    job["grouped"] = options.get("attention") == "grouped"
    paths = filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    variables = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, str(HERE / "answering_engine.py"), json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def both(model, requests, engine, metrics=(), **radix):
    """Return the results of stock and of radix."""
    ours = {"scheduler_cls": "vllm_radix.RadixScheduler"}
    ours["additional_config"] = {"radix": radix}
    return (
        answer(model, requests, engine, metrics),
        answer(model, requests, {**engine, **ours}, metrics),
    )


def compare(theirs, ours, requests):
    """Fail on an answer that differs where the model was decided.

    Returns:
        How many answers were compared, and how many differ for a tie.
    """
    compared = ties = 0
    # Not answered, or to another prompt: what was said before differs by a tie.
    other = {r["id"] for r in requests if "abort_after" in r}
    for request in sorted(requests, key=lambda r: int(r["id"])):
        name = request["id"]
        if name in other or request["after"] in other:
            other.add(name)
            continue
        pair = theirs["answers"][name]["outputs"], ours["answers"][name]["outputs"]
        for stock, radix in zip(*pair, strict=True):
            compared += 1
            if stock["tokens"] == radix["tokens"]:
                continue
            pairs = zip(stock["tokens"], radix["tokens"], strict=True)
            first = [a == b for a, b in pairs].index(False)
            best, second = stock["top"][first]
            assert best - second <= GAP, (name, first, best - second)
            ties += 1
            other.add(name)
    return compared, ties
