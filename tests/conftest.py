"""Fixtures for all tests."""

import json
import os
from pathlib import Path

import pytest

from vllm_radix_patches.registry import SMALLEST_MODEL

ROOT = Path(__file__).parent.parent

# Before vLLM is imported by any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Threads that wait for each other by spinning take most of a busy machine's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Set in parallel workers, where no terminal is.
os.environ.pop("COLUMNS", None)
# The command `replay` would silence it for all who come after.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


SLOW = ("cuda_path", "serve", "engine", "interpreted")
"""Markers of what takes minutes, the slowest first."""


def pytest_collection_modifyitems(items):
    """Put slow files first: of two workers, neither is left with one at the end."""

    def rank(path):
        marks = {mark.name for item in by_file[path] for mark in item.iter_markers()}
        return min((SLOW.index(name) for name in marks & {*SLOW}), default=len(SLOW))

    by_file = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    items[:] = [item for path in sorted(by_file, key=rank) for item in by_file[path]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A folder with the smallest config that vLLM takes for a model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMALLEST_MODEL))
    return str(folder)


def embedded(name: str) -> str:
    folder = ROOT / ".models" / name
    assert (folder / "config.json").exists(), "run `make setup` first"
    return str(folder)


@pytest.fixture(scope="session")
def tiny() -> str:
    """The tiny Llama with random weights."""
    return embedded("tiny")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct."""
    return embedded("smollm2")


@pytest.fixture(scope="session")
def serve_parser():
    """vLLM's own parser of `vllm serve`, with the flag."""
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_radix.engine.compat import make_serve_parser

    load_general_plugins()
    return make_serve_parser(FlexibleArgumentParser())
