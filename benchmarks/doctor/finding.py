"""What the doctor says of one thing."""

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """Whether something is as it should be."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        status: a server does not start with radix where one is a problem.
        found: what was found.
        fix: what to do; empty if nothing.
    """

    subject: str
    status: Status
    found: str
    fix: str = ""


def ok(subject: str, found: str) -> Finding:
    """Return a finding of what is as it should be."""
    return Finding(subject, Status.OK, found)


def note(subject: str, found: str, fix: str = "") -> Finding:
    """Return a finding of what is good to know."""
    return Finding(subject, Status.NOTE, found, fix)


def problem(subject: str, found: str, fix: str = "") -> Finding:
    """Return a finding of what keeps radix from starting."""
    return Finding(subject, Status.PROBLEM, found, fix)


def refusal(subject: str, sentence: str) -> Finding:
    """Return a problem from a sentence: what is wrong, a colon, and the fix."""
    found, colon, fix = sentence.partition(": ")
    return problem(subject, found, fix) if colon else problem(subject, sentence)


def starts(findings: list[Finding]) -> bool:
    """Return whether a server starts with radix."""
    return all(one.status is not Status.PROBLEM for one in findings)
