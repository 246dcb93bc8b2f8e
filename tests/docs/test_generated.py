"""What pages say of the code is made from the code, and up to date."""

import re
import subprocess
import sys

import pytest

from support.pages import PAGES, ROOT
from vllm_radix.config import RadixConfig
from vllm_radix.metrics.series import REASONS, SERIES
from vllm_radix.policy import ORDERS
from vllm_radix.tree import POLICIES
from vllm_radix_bench.routing import ROUTINGS
from vllm_radix_bench.traces.formats import FORMATS


def test_generated_tables_are_what_the_code_says():
    pages = [str(page) for page in PAGES]
    command = [sys.executable, "-m", "cogapp", "--check", "-I", "tools", *pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make docs`: {done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("options.md", RadixConfig.names()),
        ("options.md", [f"RADIX_{name.upper()}" for name in RadixConfig.names()]),
        ("options.md", ORDERS),
        ("scheduling.md", ORDERS),
        ("metrics.md", [series.shown for series in SERIES.values()]),
        ("metrics.md", REASONS),
        ("eviction-and-sessions.md", POLICIES),
        ("replay.md", [name for one in FORMATS for name in one.fields]),
        ("more-than-one-engine.md", ROUTINGS),
        ("more-than-one-engine.md", [o for r in ROUTINGS.values() for o in r.options]),
    ],
)
def test_everything_that_is_registered_is_on_its_page(page, names):
    text = (ROOT / "docs" / page).read_text()
    assert names
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_table_of_options_tells_each_default_and_its_values():
    lines = (ROOT / "docs" / "options.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    rows = {name.strip("`"): rest for name, *rest in cells}
    assert list(rows) == RadixConfig.names()
    assert rows["patience"][:2] == ["`1.0`", "a number from 0 to 1e+09"]
    assert rows["eviction"][1] == ", ".join(f"`{name}`" for name in POLICIES)
    assert rows["tenant"][0] == "empty"
    assert [name for name, (*_, meaning, _) in rows.items() if len(meaning) < 20] == []


def source() -> str:
    """Return all source text, to look names up in."""
    folders = ("vllm_radix", "patches", "kernels", "benchmarks", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in paths)


def test_classes_that_pages_name_are_in_the_code():
    text, known = "\n".join(page.read_text() for page in PAGES), source()
    # The names of vLLM's command and of a class of a recipe are found as well.
    named = set(re.findall(r"`([A-Z][a-z0-9]+(?:[A-Z][A-Za-z0-9]+)+)`", text))
    assert len(named) > 15
    gone = [name for name in sorted(named) if not re.search(rf"\b{name}\b", known)]
    assert gone == []


def test_paths_that_pages_name_are_there():
    folders = "vllm_radix|kernels|patches|benchmarks|tests|tools|examples"
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(rf"`((?:{folders})/[\w/.-]+)`", text))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
