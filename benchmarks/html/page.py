"""Pages as HTML: ``render_ab`` and ``render_replay``."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from vllm_radix_bench.html import ab, replay
from vllm_radix_bench.html.numbers import SPACE
from vllm_radix_bench.html.parts import Page
from vllm_radix_bench.html.svg import clean


def render_ab(report: dict[str, Any]) -> str:
    """Return report.html of an A/B.

    Args:
        report: as in report.json; see ``benchmarks/ab/report.schema.json``.
    """
    return render(ab.page_of(report))


def render_replay(result: dict[str, Any]) -> str:
    """Return the page of a replay.

    Args:
        result: as ``vllm-radix replay`` writes it.
    """
    return render(replay.page_of(result))


def render(page: Page) -> str:
    """Return a page as HTML that needs no other file."""
    return _template().render(page=page)


def _tied(text: str) -> str:
    """Return a sentence in which no line ends before a percent sign or an arrow."""
    return text.replace(" %", f"{SPACE}%").replace(" →", f"{SPACE}→")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("vllm_radix_bench.html"),
        # Names come from traces: anything may be in them.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters["tied"] = _tied
    return environment.get_template("report.html.j2")
