"""``--fail-on``: what a run is held to, such as ``ttft_p99>1.1``."""

import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_radix_bench.ab.figures import COUNTS, RATIO_ROUNDS, TIMES, ratio
from vllm_radix_bench.report.cli_types import InputError

_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(
    r"\s*(?:(?P<load>.+):)?\s*(?P<figure>\w+)\s*(?P<how>>=|<=|>|<)\s*(?P<bound>\S+)\s*"
)


@dataclass(frozen=True)
class Gate:
    """A bound on a ratio of radix to stock.

    Attributes:
        text: as it was written.
        load: that it is for; None for each but the control.
        figure: name of the figure.
        how: comparison that fails.
        bound: number to compare with.
    """

    text: str
    load: str | None
    figure: str
    how: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Return the gate that a text describes.

        Raises:
            InputError: it describes none.
        """
        found = _FORM.fullmatch(text)
        known = ", ".join([*TIMES, *COUNTS])
        form = "[WORKLOAD:]FIGURE and >, >=, < or <=, and a number, as in ttft_p99>1.1"
        if found is None:
            raise InputError(f"--fail-on: {text!r} is not {form}")
        name = found["figure"]
        if name not in TIMES and name not in COUNTS:
            raise InputError(f"--fail-on: {name!r} is no figure; allowed: {known}")
        try:
            bound = float(found["bound"])
        except ValueError:
            bound = float("nan")
        if not 0 <= bound < float("inf"):
            raise InputError(
                f"--fail-on: {found['bound']!r} is no bound of a ratio of radix to "
                "stock; allowed: a number from 0"
            )
        return cls(text.strip(), found["load"], name, found["how"], bound)

    def check(
        self,
        workloads: Sequence[dict[str, Any]],
        missing: Sequence[dict[str, Any]] = (),
    ) -> Iterator[tuple[bool, str]]:
        """Yield for each workload it is for whether it holds, and a sentence.

        Args:
            workloads: of a report.
            missing: what was to be measured, and was not.
        """
        for one in (*workloads, *missing):
            if one["name"] != self.load and (self.load or one["is_control"]):
                continue
            value = None if "counts" not in one else ratio_of(one, self.figure)
            name = label(one)
            if value is None:
                yield False, f"{name}: --fail-on {self.text}: it was not measured"
                continue
            fails = _COMPARISONS[self.how](value, self.bound)
            said = f"{self.figure} is {value:.3f} of stock's"
            yield not fails, f"{name}: {said} (--fail-on {self.text})"


def label(workload: dict[str, Any]) -> str:
    """Return the name of a report's workload, with what a matrix varies."""
    cell = workload["cell"]
    parts = [workload["name"]]
    if cell["blocks"] is not None:
        parts.append(f"{cell['blocks']:,} blocks")
    if cell["rate"] is not None:
        parts.append(f"{cell['rate']:g}/s")
    return ", ".join(parts)


def ratio_of(workload: dict[str, Any], figure: str) -> float | None:
    """Return the ratio of a figure in a report's workload; None where there is none.

    From none to some is infinitely more.
    """
    if figure in TIMES:
        compared = workload["times"].get(figure)
        return None if compared is None else compared["ratio"]
    counts = workload["counts"]
    found = ratio(counts["stock"][figure], counts["radix"][figure])
    return math.inf if found is None else found


def check_rounds(gates: Sequence[Gate], rounds: int) -> None:
    """Check that there are rounds enough for gates on times.

    Raises:
        InputError: there are not.
    """
    for gate in gates:
        if gate.figure in TIMES and rounds < RATIO_ROUNDS:
            raise InputError(
                f"--fail-on {gate.text}: a ratio of times takes {RATIO_ROUNDS} rounds "
                f"or more, and --rounds is {rounds}"
            )


def check_names(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """Check that gates name workloads that are run.

    Raises:
        InputError: one does not.
    """
    for gate in gates:
        if gate.load is not None and gate.load not in names:
            raise InputError(
                f"--fail-on: no workload is called {gate.load!r}; allowed: "
                + ", ".join(names)
            )
