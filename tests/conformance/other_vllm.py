"""Run this project's tests over the Python of another vLLM than the installed one.

What is compiled is missing there, so that no engine starts; schedulers, managers and
pools, the patches and vLLM's configurations are Python, and so are the tests of them.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# For a start as a script, and not as a module of the tests.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from conformance import fetch

NEWEST = "0.33.0"
"""The newest vLLM that is supported; no build of it for CPUs is published."""

MODEL_FREE = (
    "tests/tree",
    "tests/policy",
    "tests/record",
    "tests/engine",
    "tests/patches",
    "tests/metrics",
    "tests/attention",
    "tests/bench",
    "tests/test_cli.py",
    "tests/test_config.py",
    "tests/test_imports.py",
    "tests/test_plugin.py",
    "tests/docs/test_hybrid_page.py",
)
"""What can run without an engine, all of it."""

_ENGINES = "not engine and not serve and not interpreted and not cuda_path"


def command(paths: Sequence[str] = MODEL_FREE) -> list[str]:
    """Return the command that runs tests that start no engine."""
    return [sys.executable, "-m", "pytest", "-q", "-m", _ENGINES, *paths]


def environment(wanted: str, cache: Path = fetch.CACHE) -> dict[str, str]:
    """Return the environment in which a vLLM is the installed one.

    Args:
        wanted: its version.
        cache: where its Python is kept.

    Raises:
        fetch.FetchError: it cannot be had.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**kept, "PYTHONPATH": fetch.python_path(wanted, cache)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and return pytest's exit status; 1 if there is no such vLLM."""
    parser = argparse.ArgumentParser(
        description="Run the tests that start no engine over another vLLM's Python."
    )
    parser.add_argument("vllm", metavar="VERSION", help=f"as in {NEWEST}")
    parser.add_argument(
        "pytest", nargs=argparse.REMAINDER, help="paths, and options of pytest"
    )
    options = parser.parse_args(arguments)
    words = options.pytest
    if not any(Path(word.partition("::")[0]).exists() for word in words):
        words = [*MODEL_FREE, *words]
    try:
        where = environment(options.vllm)
    except fetch.FetchError as error:
        print(f"other_vllm: {error}", file=sys.stderr)
        return 1
    return subprocess.run(command(words), cwd=fetch.ROOT, env=where).returncode


if __name__ == "__main__":
    raise SystemExit(main())
