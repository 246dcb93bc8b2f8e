"""Answers of real engines, each in a process of its own, compared with stock's.

Greedy answers may differ where the model is undecided: where its two likeliest tokens
are within ``GAP``.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GAP = 1e-3
HERE = Path(__file__).parent
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
ENGINE = {"block_size": 32, "max_num_seqs": 6, "max_model_len": 512}


class AnsweringProcess:
    """A process that has vLLM imported, and forks for each engine.

    Args:
        plugins: the plugins of vLLM that it loads.
    """

    def __init__(self, plugins):
        paths = filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_PLUGINS": plugins,
        }
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "answering_engine.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )

    def start(self, job):
        """Start an engine; ``wait`` for it before the next one is started."""
        files = {
            name: str(Path(self._folder.name) / name) for name in ("log", "result")
        }
        self._process.stdin.write(json.dumps({**job, **files}) + "\n")
        self._process.stdin.flush()
        return files

    def wait(self):
        """Wait for the engine that was started; return its exit status."""
        return self._process.stdout.readline().strip()


def _result(status, files):
    assert status == "0", Path(files["log"]).read_text()[-4000:]
    return json.loads(Path(files["result"]).read_text())


@functools.cache
def process(plugins):
    """Return this session's process for these plugins; it ends with the session."""
    return AnsweringProcess(plugins)


def answers(model, requests, engines, metrics=(), cold=()):
    """Return what the engines answered and counted; they run at the same time.

    Args:
        model: its folder.
        requests: what is sent; see ``answering_engine``.
        engines: arguments of each engine, at most one of them a stock one, and at most
            one of radix.
        metrics: names of vLLM's counters to return.
        cold: bounds of a step's tokens; see ``answering_engine``.
    """
    started = []
    for engine in engines:
        options = engine.get("additional_config", {}).get("radix", {})
        job = {"model": model, "requests": requests, "engine": engine}
        job |= {"metrics": metrics, "cold": cold}
        job |= {"grouped": options.get("attention") == "grouped"}
        one = process("radix" if "scheduler_cls" in engine else "")
        started.append((one, one.start(job)))
    # For all of them, before one fails: the next job's status comes after.
    ended = [(one.wait(), files) for one, files in started]
    return [_result(status, files) for status, files in ended]


def both(model, requests, engine, metrics=(), cold=(), **radix):
    """Return the results of stock and of radix."""
    ours = {"scheduler_cls": "vllm_radix.RadixScheduler"}
    ours["additional_config"] = {"radix": radix}
    return answers(model, requests, [engine, {**engine, **ours}], metrics, cold)


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
