"""Reports to make pages of: ordinary ones, and those with odd figures or names."""

import math
import random
from typing import Any

HOSTILE = [
    "</script><b>bold</b>",
    '"><img src=http://127.0.0.1:9/x onerror=alert(1)>',
    "a very long name " * 12 + "end",
    "{{ 7 * 7 }} &amp; \x00\x1b[31m \u202eturned",
    "速い 🚀 ünïcode",
]
SHAPES = {
    "few-shot": (0.24, 0.34, 0.45),
    "chat": (0.80, 0.90, 1.12),
    "agents": (0.55, 0.52, 0.93),
    "documents": (0.46, 0.56, 1.02),
    "control": (1.0, 1.01, 0.99),
}
"""By workload: ratios of tokens, of the mean and of p99."""


def times_of(
    rng: random.Random, mean: float, slow: float, rounds: int, is_control: bool
) -> dict[str, Any]:
    def one(unit: str, stock: float, ratio: float, better: str = "lower") -> dict:
        spread = 0.02 if is_control else 0.06
        around = [ratio * (1 + rng.uniform(-spread, spread)) for _ in range(rounds)]
        found = sorted([*around[: rounds // 2], ratio, *around[rounds // 2 + 1 :]])
        found[0], found[-1] = min(found[0], ratio * 0.97), max(found[-1], ratio * 1.03)
        has_interval = rounds >= 5
        return {
            "unit": unit, "stock": stock, "radix": stock * ratio, "ratio": ratio,
            "low": found[0] if has_interval else None,
            "high": found[-1] if has_interval else None,
            "rounds": found, "better": better,
        }  # fmt: skip

    out = {}
    for kind, scale in (("ttft", 1.0), ("tpot", 0.05), ("e2e", 2.5)):
        for part, size in (("mean", 1.2), ("p50", 1.0), ("p90", 2.1), ("p99", 3.4),
                           ("max", 3.9)):  # fmt: skip
            ratio = slow if part in ("p99", "max") else mean
            ratio = 1 + (ratio - 1) * (1.0 if kind == "ttft" else 0.2)
            out[f"{kind}_{part}"] = one("s", size * scale, ratio)
    out["throughput"] = one("requests/s", 4.0, 1 / (1 + (mean - 1) * 0.4), "higher")
    out["output_throughput"] = one(
        "tokens/s", 128.0, 1 / (1 + (mean - 1) * 0.4), "higher"
    )
    return out


def workload(name: str, rounds: int = 5, requests: int = 120, **more: Any) -> dict:
    rng = random.Random(name)
    tokens, mean, slow = SHAPES.get(name, (0.7, rng.uniform(0.4, 1.2), 0.9))
    stock = sorted(rng.lognormvariate(0, 0.6) for _ in range(requests))
    radix = sorted(v * mean * rng.uniform(0.7, 1.3) for v in stock)
    prompt = requests * 700

    def counts(computed: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt, "cached_tokens": prompt - computed,
            "computed_tokens": computed, "generated_tokens": requests * 16,
            "hit_rate": 1 - computed / prompt, "preemptions": 0, "errors": 0,
        }  # fmt: skip

    def rates(end: float) -> list[list[float]]:
        return [[t * 2.0, end * (1 - math.exp(-t / 6))] for t in range(40)]

    before = round(prompt * (1.0 if name == "control" else 0.82))
    after = round(before * tokens)
    return {
        "name": name,
        "is_control": name == "control",
        "what": "Requests that share nothing, so that no cache helps."
        if name == "control"
        else "40 examples, then a question; four sets of examples, in turns.",
        "load": "built-in",
        "cell": {"blocks": None, "rate": None},
        "requests": requests,
        "fewest_tokens": round(after * 0.9),
        "counts": {"stock": counts(before), "radix": counts(after)},
        "times": times_of(rng, mean, slow, rounds, name == "control"),
        "ttft_seconds": {"stock": stock, "radix": radix},
        "hit_rate_over_time": {
            "stock": rates(1 - before / prompt), "radix": rates(1 - after / prompt),
        },
        "answers": {"compared": requests, "different": 0, "beyond_doubt": 0},
        "tenants": [],
        **more,
    }  # fmt: skip


def report(workloads: list[dict], rounds: int = 5, **more: Any) -> dict[str, Any]:
    return {
        "schema": "vllm-radix/ab-report/1",
        "versions": {
            "vllm_radix": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0",
            "python": "3.11.2",
        },
        "machine": {
            "processor": "EPYC 7B13", "cores": 2, "memory_gb": 24.0, "device": "CPU",
        },
        "started": "2026-11-26T19:30:00Z",
        "seconds": 512.3,
        "sentence": "On few-shot radix computed 76 % fewer prompt tokens (68,880 → "
        "16,531); the first token came 2.9 times sooner (95 % interval 2.6 to 3.3). "
        "Got worse: p99 of chat, by 12 %.",
        "warnings": [],
        "setup": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "serve_options": ["--max-num-seqs", "16"],
            "radix_options": {"patience": 2.0, "policy": "least-work-group"},
            "bench_options": None, "together": True, "rounds": rounds, "seed": 0,
            "cache": {"blocks": 160, "block_size": 32, "tokens": 5120},
        },
        "workloads": workloads,
        "times_are_noise": False,
        "verdicts": [
            {"ok": True, "text": "few-shot computes no more than stock"},
            {"ok": True, "text": "no answer differs beyond doubt"},
        ],
        "pieces": [
            {"workload": one["name"], "round": 0, "arm": arm, "seconds": 20.0}
            for one in workloads
            for arm in ("stock", "radix")
        ],
        **more,
    }  # fmt: skip


def ordinary() -> dict[str, Any]:
    return report([workload(name) for name in SHAPES])


def without_intervals() -> dict[str, Any]:
    warning = "2 rounds are too few for intervals; give --rounds 5."
    made = [workload(name, rounds=2) for name in SHAPES]
    return report(made, rounds=2, warnings=[warning])


def matrix() -> dict[str, Any]:
    made = []
    for row, blocks in enumerate((250, 500, 1000, 2000)):
        for column, rate in enumerate((0.5, 1.0, 2.0, 4.0)):
            name = f"few-shot {blocks} {rate}"
            one = workload(name, requests=40)
            one |= {"name": "few-shot", "cell": {"blocks": blocks, "rate": rate}}
            better = 1.1 - 0.2 * column + 0.05 * row * column
            one["times"] = times_of(random.Random(name), better, better + 0.1, 5, False)
            computed = one["counts"]["radix"]
            computed["computed_tokens"] = round(40 * 700 * 0.82 * better)
            made.append(one)
    return report(made)


def hostile() -> dict[str, Any]:
    """A trace with tenants, whose names are not to be trusted."""
    latency = {"stock": 1.5, "radix": 0.75}
    tenants = [
        {"name": name, "requests": 40, "ttft_mean": latency, "ttft_p99": latency}
        for name in [*HOSTILE, ""]
    ]
    made = [workload(name, load="trace", tenants=tenants) for name in HOSTILE]
    made[0]["what"] = HOSTILE[1]
    return report(made, sentence=HOSTILE[0], warnings=HOSTILE)


def noise() -> dict[str, Any]:
    out = ordinary()
    out["times_are_noise"] = True
    return out


def errors() -> dict[str, Any]:
    """A report of a run in which much failed."""
    broken, empty, odd, single = (
        workload(n) for n in ("chat", "agents", "search", "one")
    )
    broken["counts"]["radix"] |= {"errors": 37, "preemptions": 12}
    broken["answers"] = {"compared": 83, "different": 4, "beyond_doubt": 1}
    empty["ttft_seconds"] = {"stock": [], "radix": []}
    empty["hit_rate_over_time"] = {"stock": [], "radix": []}
    empty["answers"] = None
    for one in empty["times"].values():
        one |= {"stock": None, "ratio": None, "low": None, "high": None}
    empty["counts"]["stock"]["computed_tokens"] = 0
    odd["times"]["ttft_mean"] |= {"ratio": 0.001, "low": 0.0005, "high": 0.002}
    odd["times"]["ttft_p99"] |= {"ratio": 1000.0, "low": 500.0, "high": math.nan}
    odd["times"]["throughput"] |= {"ratio": math.nan, "low": None, "high": None}
    odd["ttft_seconds"] = {"stock": [0.0, 0.0, math.nan, 1e-6], "radix": [500.0, 9e3]}
    odd["counts"]["radix"]["computed_tokens"] = 0
    single["ttft_seconds"] = {"stock": [0.5], "radix": [0.5]}
    single["hit_rate_over_time"] = {"stock": [[0.0, 0.0]], "radix": [[0.0, 1.0]]}
    verdicts = [
        {"ok": False, "text": "37 requests of chat ended with an error on radix"},
        {"ok": False, "text": "1 answer of chat differs beyond doubt"},
    ]
    return report([broken, empty, odd, single], verdicts=verdicts)


def many() -> dict[str, Any]:
    return report([workload(f"workload number {i}", requests=20) for i in range(30)])


ALL = {
    "ordinary": ordinary, "without-intervals": without_intervals, "matrix": matrix,
    "hostile": hostile, "noise": noise, "errors": errors, "many": many,
}  # fmt: skip
