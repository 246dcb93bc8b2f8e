"""Run vLLM's own tests of its core against our classes, and say what differs.

``--vllm VERSION`` takes another vLLM than the installed one: its tests, and its Python.

Each arm is a pytest of its own over the same tests: ``stock`` is vLLM as it is,
the others have our classes in place of vLLM's. A test may well fail in both, for
want of a package or a model: what counts is a test that ends differently. Each
such test is a bug of ours, or stands in ``reviewed.toml`` with the reason why not.

Exit status: 0 when the differences are the reviewed ones, no more and no fewer;
1 when they are not, or an arm did not run; 2 for bad arguments.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib
from rich.console import Console
from rich.table import Table

# For a start as a script, and not as a module of the tests.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from conformance import fetch, hub
from conformance.plugin import ARM, ARMS, CACHING, REPORT, STOCK

REVIEWED = Path(__file__).with_name("reviewed.toml")
OURS = tuple(arm for arm in ARMS if arm != STOCK)
EVERYTHING = ("tests/v1/core",)
SUBSET = (
    "tests/v1/core/prefix_cache/test_partial_prefix_cache_hits.py",
    "tests/v1/core/prefix_cache/test_partial_prefix_cache_primitives.py",
    "tests/v1/core/test_async_scheduler.py",
    "tests/v1/core/test_deferred_block_free.py",
    "tests/v1/core/test_kv_cache_utils.py::test_allocate_with_lookahead",
    "tests/v1/core/test_prefix_caching.py",
    "tests/v1/core/test_prefix_replay.py",
    "tests/v1/core/test_priority_preemption_bug.py",
    "tests/v1/core/test_scheduler.py",
    "tests/v1/core/test_single_type_kv_cache_manager.py",
    "tests/v1/core/test_swa_inflight_window_free.py",
    "tests/v1/core/test_worker_slot_overflow.py",
)
"""What CI runs: where all but a few of the tests are that run on our classes."""

ENGINES = (
    "tests/v1/core/test_reset_prefix_cache_e2e.py",
    "tests/v1/core/test_scheduler_e2e.py",
)
"""They start an engine, which another vLLM than the installed one cannot here."""

MISSING = "missing"
"""The outcome of a test that an arm has not got."""

_SECONDS_PER_TEST = 300
_SETTINGS = """[pytest]
addopts = -p no:cacheprovider --import-mode=prepend --continue-on-collection-errors
filterwarnings = ignore
"""


class ArmError(RuntimeError):
    """An arm did not run to its end; the message has its last words."""


class SelectionError(ValueError):
    """The paths or the keyword select no test, or do not exist."""


@dataclass(frozen=True)
class Outcome:
    """How a test ended in one arm.

    Attributes:
        outcome: ``passed``, ``failed``, ``error`` (outside of the test itself),
            ``skipped``, ``xfailed``, or ``missing``.
        message: first line of the error, or the reason for skipping.
        seconds: what it took.
        ours: which of our classes it built.
    """

    outcome: str
    message: str = ""
    seconds: float = 0.0
    ours: tuple[str, ...] = ()


Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Arm:
    """What came out of an arm.

    Attributes:
        name: of the arm.
        outcomes: by test id.
        seconds: wall time.
    """

    name: str
    outcomes: Outcomes
    seconds: float


@dataclass(frozen=True)
class Difference:
    """A test that ends differently with our classes.

    Attributes:
        test: its id.
        stock: how it ends with vLLM's.
        ours: how it ends with ours.
    """

    test: str
    stock: Outcome
    ours: Outcome


@dataclass(frozen=True)
class Verdict:
    """The differences of an arm, held against the reviewed list.

    Attributes:
        reviewed: differences on the list.
        new: differences that are not.
        stale: tests on the list that do not differ.
    """

    reviewed: list[Difference]
    new: list[Difference]
    stale: list[str]

    @property
    def passed(self) -> bool:
        """Whether the differences are the reviewed ones."""
        return not self.new and not self.stale


# -- comparing -----------------------------------------------------------------


def compare(stock: Outcomes, ours: Outcomes) -> list[Difference]:
    """Return the tests that end differently, in the order they ran in.

    A test that only one of them has differs too. Messages are not compared: they
    hold addresses and hashes.
    """
    missing = Outcome(MISSING)
    pairs = [
        Difference(test, stock.get(test, missing), ours.get(test, missing))
        for test in dict.fromkeys([*stock, *ours])
    ]
    return [pair for pair in pairs if pair.stock.outcome != pair.ours.outcome]


def review(
    differences: Sequence[Difference],
    reasons: Mapping[str, str],
    selected: Collection[str] | None = None,
) -> Verdict:
    """Hold differences against the reviewed list.

    Args:
        differences: of one arm.
        reasons: the list, by test id.
        selected: the tests that could differ, if that was not everything:
            entries for other tests are then no sign of a stale list.
    """
    found = {difference.test for difference in differences}
    return Verdict(
        reviewed=[one for one in differences if one.test in reasons],
        new=[one for one in differences if one.test not in reasons],
        stale=[
            test
            for test in reasons
            if test not in found and (selected is None or test in selected)
        ],
    )


def load_reviewed(
    path: Path = REVIEWED, vllm: str | None = None
) -> dict[str, dict[str, str]]:
    """Return the reviewed list: reasons by test id, by arm.

    An entry with a ``vllm``, as in "0.33", is for the releases of that one alone.

    Args:
        path: of the list.
        vllm: version whose tests run; None for the installed one.

    Raises:
        ValueError: the list is malformed; the message says where.
    """
    minor = (vllm or fetch.pinned_version()).rpartition(".")[0]
    found: dict[str, dict[str, str]] = {arm: {} for arm in OURS}
    for arm, entries in tomllib.loads(path.read_text()).items():
        if arm not in found:
            raise ValueError(f"{path.name}: {arm!r} is not one of {', '.join(OURS)}")
        for entry in entries:
            test = entry.get("test")
            fields = set(entry) - {"vllm"}
            if fields != {"test", "reason"} or not all(entry.values()):
                raise ValueError(
                    f"{path.name}: {arm}: an entry is a test and a reason, and a "
                    f"vllm where it is not for all, not {entry!r}"
                )
            if entry.get("vllm", minor) != minor:
                continue
            if test in found[arm]:
                raise ValueError(f"{path.name}: {arm}: {test} is there twice")
            found[arm][test] = entry["reason"]
    return found


# -- running -------------------------------------------------------------------


def run_arm(
    name: str,
    paths: Sequence[str] = EVERYTHING,
    keyword: str | None = None,
    as_is: bool = False,
    vllm: str | None = None,
    cache: Path = fetch.CACHE,
) -> Arm:
    """Run the tests in one arm, in a process of its own.

    Args:
        name: of the arm.
        paths: files, folders or test ids, as vLLM's repository has them.
        keyword: as of pytest's ``-k``.
        as_is: leave schedulers without prefix caching as they are.
        vllm: version of vLLM; None for the installed one.
        cache: where the tests are kept, and pytest's output goes, as
            ``NAME-VERSION.log``.

    Raises:
        fetch.FetchError: vLLM's tests cannot be had.
        SelectionError: no such test.
        ArmError: pytest did not run to its end.
    """
    vllm = vllm or fetch.pinned_version()
    folder = fetch.fetch(cache, vllm)
    home = hub.write_hub(cache / "hf")
    log = cache / f"{name}-{vllm}.log"
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}-") as scratch:
        settings, report = Path(scratch) / "pytest.ini", Path(scratch) / "report"
        settings.write_text(_SETTINGS)
        command = [sys.executable, "-m", "pytest", "-p", "conformance.plugin"]
        command += ["--noconftest", "-c", str(settings), "--rootdir", str(folder)]
        command += ["-q", "--tb=short", f"--timeout={_SECONDS_PER_TEST}"]
        command += ["-k", keyword] if keyword else []
        if vllm != fetch.pinned_version():
            command += [f"--ignore={folder / file}" for file in ENGINES]
        environment = _environment(home, report, fetch.python_path(vllm, cache))
        environment |= {ARM: name, CACHING: "" if as_is else "1"}
        with log.open("w") as output:
            status = subprocess.run(
                [*command, *paths],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if status not in (0, 1) or not report.exists():
            words = "\n".join(log.read_text().splitlines()[-15:])
            # pytest's own words for a bad command line, and for nothing to run.
            error = SelectionError if status in (4, 5) else ArmError
            raise error(f"arm {name}: pytest ended with {status}:\n{words}")
        return Arm(name, _read(report), time.monotonic() - start)


def _environment(home: Path, report: Path, python_path: str) -> dict[str, str]:
    # Neither pytest's nor our own settings of this environment are to count.
    kept = {
        variable: value
        for variable, value in os.environ.items()
        if not variable.startswith(("PYTEST_", "RADIX_"))
    }
    here = str(Path(__file__).resolve().parents[1])
    return {
        **kept,
        REPORT: str(report),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [python_path, here])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
    }


def _read(report: Path) -> dict[str, Outcome]:
    outcomes = {}
    for line in report.read_text().splitlines():
        fields = json.loads(line)
        test, fields["ours"] = fields.pop("test"), tuple(fields["ours"])
        outcomes[test] = Outcome(**fields)
    return outcomes


# -- the command ---------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms, print what differs and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Run vLLM's own tests of its core against our classes."
    )
    parser.add_argument("--vllm", help="version, if not the installed one")
    parser.add_argument("--arms", nargs="+", choices=OURS, default=OURS)
    parser.add_argument("--subset", action="store_true", help="what CI runs")
    parser.add_argument("--keyword", help="tests that match this, as pytest's -k")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="leave schedulers that tests build without prefix caching as they are",
    )
    parser.add_argument("paths", nargs="*", help="files, folders or test ids")
    options = parser.parse_args(arguments)
    if options.subset and options.paths:
        parser.error("--subset and paths exclude each other")
    paths = SUBSET if options.subset else tuple(options.paths) or EVERYTHING
    everything = paths == EVERYTHING and not options.keyword and not options.as_is
    console = Console(soft_wrap=True)
    try:
        reviewed = load_reviewed(vllm=options.vllm)
        arms = []
        for name in (STOCK, *options.arms):
            console.print(f"arm {name} ...", style="dim")
            arms.append(
                run_arm(name, paths, options.keyword, options.as_is, options.vllm)
            )
    except SelectionError as error:
        parser.error(str(error))
    except (fetch.FetchError, ArmError, ValueError) as error:
        console.print(f"conformance: {error}", markup=False)
        return 1
    console.print(counts(arms))
    stock, *ours = arms
    passed = True
    for arm in ours:
        verdict = judge(stock, arm, reviewed[arm.name], everything)
        passed &= verdict.passed
        console.print(describe(arm.name, verdict), markup=False, highlight=False)
    return 0 if passed else 1


def judge(
    stock: Arm, arm: Arm, reasons: Mapping[str, str], everything: bool
) -> Verdict:
    """Compare an arm with the stock one.

    Args:
        stock: the arm to compare with.
        arm: one with our classes.
        reasons: the reviewed list of the arm.
        everything: whether all tests ran, and as the list supposes.
    """
    on_ours = {test for test, one in arm.outcomes.items() if one.ours}
    differences = compare(stock.outcomes, arm.outcomes)
    return review(differences, reasons, None if everything else on_ours)


def counts(arms: Sequence[Arm]) -> Table:
    """Return a table of how many tests ended how, by arm."""
    totals = [Counter(one.outcome for one in arm.outcomes.values()) for arm in arms]
    kinds = sorted({kind for total in totals for kind in total})
    table = Table("arm", *kinds, "all", "on ours", "wall s", title="vLLM's own tests")
    for arm, total in zip(arms, totals, strict=True):
        on_ours = sum(bool(one.ours) for one in arm.outcomes.values())
        numbers = [*(total[kind] for kind in kinds), total.total(), on_ours]
        table.add_row(arm.name, *map(str, numbers), f"{arm.seconds:.0f}")
    return table


def describe(name: str, verdict: Verdict) -> str:
    """Return the differences of an arm as text, those to look at last."""
    reviewed, new, stale = verdict.reviewed, verdict.new, verdict.stale
    lines = [f"{name}: {len(reviewed)} reviewed, {len(new)} new, {len(stale)} stale"]
    for label, differences in (("reviewed", reviewed), ("NEW", new)):
        for one in differences:
            message = one.ours.message or one.stock.message
            lines += [
                f"  {label}: {one.test}",
                f"      {STOCK} {one.stock.outcome}, {name} {one.ours.outcome}",
                f"      {textwrap.shorten(message, 200)}",
            ]
    lines += [f"  STALE: {test} is on the list and does not differ" for test in stale]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
