"""The report of an A/B: figures, a sentence, verdicts; see ``report.schema.json``."""

import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil

from vllm_radix_bench.ab.figures import (
    LEAST_ROUNDS,
    RATIO_ROUNDS,
    TIMES,
    Run,
    compare,
    is_noisy,
    total_counts,
)
from vllm_radix_bench.ab.gates import Gate, label
from vllm_radix_bench.ab.plan import ANSWERS
from vllm_radix_bench.ab.scrape import thinned
from vllm_radix_bench.ab.servers import ARMS
from vllm_radix_bench.report.columns import NOTEWORTHY, change
from vllm_radix_bench.report.output import Rows

SCHEMA = "vllm-radix/ab-report/1"
_MOST_POINTS = 120
_MOST_SAMPLES = 500
_MOST_TENANTS = 30
_MOST_EXAMPLES = 20
_LAG_SHARE = 0.05
"""Of the mean time to the first token that may be the client's own."""
_SLACK = 1.01
"""Factor on stock's tokens from which radix computed more, not as many."""


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = {"vllm_radix": "vllm-radix", "vllm": "vllm", "torch": "torch"}
    found = {key: version(name) for key, name in names.items()}
    return {**found, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return the machine that a result depends on."""
    from vllm.platforms import current_platform

    device = "CPU"
    if not current_platform.is_cpu():
        device = str(current_platform.get_device_name())
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": device,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def now() -> str:
    """Return the time, as in ISO 8601, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _timed(cell: dict[str, Any]) -> list[dict[str, Run]]:
    """Return the rounds of a cell that both arms have run, without the first one."""
    names = sorted((n for n in cell["rounds"] if int(n) != ANSWERS), key=int)
    rounds = [cell["rounds"][name] for name in names]
    return [one for one in rounds if all(arm in one for arm in ARMS)]


def _pooled(rounds: Sequence[dict[str, Run]], arm: str, field: str) -> list[float]:
    """Return times of all rounds, sorted; of many, as many quantiles."""
    values = sorted(value for one in rounds for value in one[arm][field])
    if len(values) > _MOST_SAMPLES:
        shares = np.linspace(0, 1, _MOST_SAMPLES)
        values = np.quantile(values, shares).tolist()
    return [round(value, 6) for value in values]


def _tenants(rounds: Sequence[dict[str, Run]]) -> list[dict[str, Any]]:
    """Return the first-token times of each tenant, the busiest first."""
    times: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        for arm in ARMS:
            for tenant, ttft in one[arm]["tenants"]:
                by_arm = times.setdefault(tenant, {name: [] for name in ARMS})
                by_arm[arm].append(ttft)
    out: list[dict[str, Any]] = []
    for tenant, by_arm in times.items():
        if all(by_arm.values()):
            out.append(
                {
                    "name": tenant,
                    "requests": len(by_arm["stock"]) // len(rounds),
                    "ttft_mean": {a: float(np.mean(by_arm[a])) for a in ARMS},
                    "ttft_p99": {a: float(np.quantile(by_arm[a], 0.99)) for a in ARMS},
                }
            )
    out.sort(key=lambda one: -one["requests"])
    return out[:_MOST_TENANTS] if len(out) > 1 else []


def _workload(cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a report says of a cell; None while it has no round."""
    rounds = _timed(cell)
    if not rounds:
        return None
    compared = {name: compare(figure, rounds) for name, figure in TIMES.items()}
    first = rounds[0]
    answers = cell["answers"]
    failed = {
        arm: sum(
            run[arm]["counts"]["errors"]
            for run in cell["rounds"].values()
            if arm in run
        )
        for arm in ARMS
    }
    return {
        "name": cell["name"],
        "is_control": cell["is_control"],
        "what": cell["what"],
        "load": cell["kind"],
        "cell": {"blocks": cell["blocks"], "rate": cell["rate"]},
        "requests": first["stock"]["requests"],
        "fewest_tokens": cell["fewest_tokens"],
        "counts": {arm: total_counts(rounds, arm, failed[arm]) for arm in ARMS},
        "times": {name: one for name, one in compared.items() if one is not None},
        "ttft_seconds": {arm: _pooled(rounds, arm, "ttft") for arm in ARMS},
        "hit_rate_over_time": {
            arm: [
                [round(at, 2), round(rate, 4)]
                for at, rate in thinned(first[arm]["hit_rates"], _MOST_POINTS)
            ]
            for arm in ARMS
        },
        "answers": answers
        and {key: answers[key] for key in ("compared", "different", "beyond_doubt")},
        "tenants": _tenants(rounds),
    }


def verdicts(
    workloads: Sequence[dict[str, Any]],
    gates: Sequence[Gate],
    missing: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return what a run was held to, and whether it held.

    Args:
        workloads: of the report.
        gates: of ``--fail-on``.
        missing: what was to be measured, and was not.
    """
    found = [*_of_counts(workloads), *_of_answers(workloads)]
    for gate in gates:
        found += gate.check(workloads, missing)
    return [{"ok": ok, "text": text} for ok, text in found]


def _of_counts(workloads: Sequence[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    for one in workloads:
        stock, radix = (one["counts"][arm] for arm in ARMS)
        fine = radix["computed_tokens"] <= _SLACK * stock["computed_tokens"]
        yield (
            fine,
            f"{label(one)}: no more prompt tokens computed than stock, within 1 %",
        )
        if stock["errors"] or radix["errors"]:
            said = f"requests that failed: {stock['errors']:,} with stock, "
            said += f"{radix['errors']:,} with radix"
            yield False, f"{label(one)}: {said}"


def _of_answers(workloads: Sequence[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    for one in workloads:
        answers = one["answers"]
        if not answers or not answers["compared"]:
            continue
        equal = answers["compared"] - answers["different"]
        text = (
            f"{label(one)}: {equal:,} of {answers['compared']:,} answers equal stock's"
        )
        doubtful = answers["different"] - answers["beyond_doubt"]
        if doubtful:
            known = one["load"] not in ("bench", "guidellm")
            text += f"; in {doubtful:,} " if known else "; of the others "
            text += (
                "the model was undecided, or rounds more coarsely"
                if known
                else ("it is not known whether the model was undecided")
            )
        yield not answers["beyond_doubt"], text


def warnings(
    workloads: Sequence[dict[str, Any]],
    lags: Sequence[float],
    missing: Sequence[dict[str, Any]],
    rounds: int,
    asked: int,
) -> Iterator[str]:
    """Yield what a reader must know before believing the times.

    Args:
        workloads: of the report.
        lags: by how many seconds the client was late, at most, for each of them.
        missing: what was to be measured, and was not.
        rounds: that were run of each.
        asked: that were to be run.
    """
    if missing:
        names = ", ".join(map(label, missing))
        yield f"The budget left no time for {names} (--budget has the minutes)."
    if rounds < asked:
        yield (
            f"The budget allowed {rounds} of {asked} rounds (--budget has the minutes)."
        )
    if rounds < LEAST_ROUNDS:
        yield (
            f"Times have no interval: that takes {LEAST_ROUNDS} rounds, and there were "
            f"{rounds}."
        )
    for one, lag in zip(workloads, lags, strict=True):
        noisy = [name for name, times in one["times"].items() if is_noisy(times)]
        if one["is_control"] and noisy:
            yield (
                "Both arms compute the same for the control, yet its interval excludes "
                f"1 for {', '.join(noisy)}: such times are noise here."
            )
        stock, radix = (one["counts"][arm]["preemptions"] for arm in ARMS)
        if radix > stock:
            yield (
                f"{label(one)}: more requests were preempted ({stock:,} → {radix:,}); "
                "what is computed anew for them is not among the tokens computed."
            )
        mean = one["times"].get("ttft_mean")
        if mean and lag > _LAG_SHARE * min(mean[arm] for arm in ARMS):
            yield (
                f"{label(one)}: the client itself was late by {lag:.3f} s on average, "
                "which is part of both arms' times: send fewer at once (--concurrency, "
                "--rate), or from a larger machine."
            )
    if not any(one["is_control"] for one in workloads):
        yield "No control was run: how noisy the times are is not known."


def _range(workloads: Sequence[dict[str, Any]], figure: str) -> str:
    """Return the ratio of a figure: of one workload with its interval, or a range."""
    known = [
        (one["times"][figure]["ratio"], one)
        for one in workloads
        if figure in one["times"] and one["times"][figure]["ratio"]
    ]
    if not known:
        return ""
    known.sort(key=lambda pair: pair[0])
    if len(known) == 1:
        times = known[0][1]["times"][figure]
        bounds = ""
        if times["low"] is not None:
            bounds = f" (95 % interval {times['low']:.2f} to {times['high']:.2f})"
        return f"{times['ratio']:.2f} of stock's{bounds}"
    (least, best), (most, worst) = known[0], known[-1]
    return f"{least:.2f} ({label(best)}) to {most:.2f} ({label(worst)}) of stock's"


def _caches(report: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    """Return with what caches a report's workloads ran, in words."""
    sizes = {one["cell"]["blocks"] for one in shown} - {None}
    if len(sizes) > 1:
        return f"With KV caches of {min(sizes):,} to {max(sizes):,} blocks"
    return f"With a KV cache of {report['setup']['cache']['tokens']:,} tokens"


def sentence(report: dict[str, Any]) -> str:
    """Return the result in one sentence, to be quoted; what got worse is in it."""
    shown = [one for one in report["workloads"] if not one["is_control"]]
    shown = shown or report["workloads"]
    if not shown:
        return "Nothing was measured."
    tokens = {
        arm: sum(one["counts"][arm]["computed_tokens"] for one in shown) for arm in ARMS
    }
    stock, radix = (tokens[arm] for arm in ARMS)
    text = f"{_caches(report, shown)} radix computed "
    if stock == radix:
        text += f"as many prompt tokens as stock ({stock:,})"
    else:
        text += f"{change(stock, radix)} prompt tokens ({stock:,} → {radix:,})"
    mean, tail = (_range(shown, f"ttft_{name}") for name in ("mean", "p99"))
    if report["setup"]["rounds"] < RATIO_ROUNDS:
        mean = tail = ""
    if mean:
        text += f"; the mean time to the first token was {mean}"
        if report["times_are_noise"]:
            text += ", but times are noise here"
    if tail:
        text += f", its p99 {tail}"
    worse = [
        label(one)
        for one in report["workloads"]
        if one["counts"]["radix"]["computed_tokens"]
        > NOTEWORTHY * one["counts"]["stock"]["computed_tokens"]
    ]
    if worse:
        text += f"; radix computed more for {', '.join(worse)}"
    preempted = {
        arm: sum(one["counts"][arm]["preemptions"] for one in shown) for arm in ARMS
    }
    if preempted["radix"] > preempted["stock"]:
        text += f"; preemptions {preempted['stock']:,} → {preempted['radix']:,}"
    return f"{text}."


def make(result: dict[str, Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """Return the report of a result.

    Args:
        result: of ``run``: settings, and cells with their rounds.
        gates: of ``--fail-on``.
    """
    workloads = [one for cell in result["cells"] if (one := _workload(cell))]
    lags = [
        max(one[arm]["client_lag"] for one in timed for arm in ARMS)
        for timed in map(_timed, result["cells"])
        if timed
    ]
    missing = [
        {
            "name": cell["name"],
            "is_control": cell["is_control"],
            "cell": {"blocks": cell["blocks"], "rate": cell["rate"]},
        }
        for cell in result["cells"]
        if not _timed(cell)
    ]
    rounds = min((n for cell in result["cells"] if (n := len(_timed(cell)))), default=0)
    controls = [one for one in workloads if one["is_control"]]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": result["versions"],
        "machine": result["machine"],
        "started": result["started"],
        "seconds": round(result["seconds"], 1),
        "sentence": "",
        "warnings": list(
            warnings(workloads, lags, missing, rounds, result["setup"]["rounds"])
        ),
        "setup": {**result["setup"], "rounds": rounds},
        "workloads": workloads,
        "times_are_noise": any(
            is_noisy(one["times"].get("ttft_mean")) for one in controls
        ),
        "verdicts": verdicts(workloads, gates, missing),
        "pieces": Rows(_pieces(result)),
    }
    report["sentence"] = sentence(report)
    return report


def _differences(cell: dict[str, Any], number: int, arm: str) -> dict[str, Any]:
    """Return where answers differ, for the piece that says so."""
    if number != ANSWERS or arm != ARMS[1] or not cell["answers"]:
        return {}
    return {"differences": cell["answers"]["differences"][:_MOST_EXAMPLES]}


def _pieces(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the figures of each run."""
    for cell in result["cells"]:
        for name in sorted(cell["rounds"], key=int):
            for arm, run in cell["rounds"][name].items():
                yield {
                    "workload": cell["name"],
                    "blocks": cell["blocks"],
                    "rate": cell["rate"],
                    "round": int(name),
                    "arm": arm,
                    "seconds": round(run["seconds"], 3),
                    "client_lag": round(run["client_lag"], 6),
                    "failures": run["failures"],
                    **_differences(cell, int(name), arm),
                    **run["counts"],
                    **{
                        figure.name: value if value is None else round(value, 6)
                        for figure in TIMES.values()
                        for value in [figure.of(run)]
                    },
                }
