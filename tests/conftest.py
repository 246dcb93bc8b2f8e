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
# The command `replay` would silence it for all who come after.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


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
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    return make_arg_parser(FlexibleArgumentParser())
