"""The findings as a table, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from vllm_radix_bench.doctor.finding import Finding, Status


def print_json(findings: Sequence[Finding], **verdict: bool) -> None:
    """Print the verdict and the findings for programs."""
    found = [asdict(one) for one in findings]
    print(json.dumps({**verdict, "findings": found}, indent=2))


def print_table(findings: Sequence[Finding], verdict: str) -> None:
    """Print the findings, and a sentence below them."""
    from rich.table import Table

    from vllm_radix_bench.report.tables import console, say

    out = console()
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold", ratio=1)
    for one in findings:
        found = one.found + (f"\nto do: {one.fix}" if one.fix else "")
        table.add_row(one.status.value, one.subject, found)
    out.print(table)
    say(out, verdict)


def count_problems(findings: Sequence[Finding]) -> str:
    """Return how many problems there are, in words."""
    problems = sum(one.status is Status.PROBLEM for one in findings)
    return "a problem" if problems == 1 else f"{problems} problems"
