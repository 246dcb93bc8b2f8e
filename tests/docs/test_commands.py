"""Every command of README and docs/ is run, or says why not and what does."""

import re
import shlex
import subprocess

import pytest

from support.pages import BLOCKS, PAGES, ROOT, SHELL
from vllm_radix.cli import main

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
RUN = [block for block in SHELL if block.reason is None]
NOT_RUN = [block for block in BLOCKS if block.reason is not None]


def place(block):
    return block.place


def test_there_are_commands():
    assert len(RUN) >= 5 and len(NOT_RUN) >= 10


def test_no_block_that_reads_like_a_command_escapes():
    """A block without a language may hold text; a command in it would not be run."""
    others = [b for b in BLOCKS if b not in SHELL and b.page.name != "gpu.md"]
    starts = ("$ ", "vllm ", "vllm-radix ", "make ", "pip ", "python ", ".venv/bin/")
    for block in others:
        for line in block.text.splitlines():
            assert not line.startswith(starts), f"{block.place}: {line}"


@pytest.mark.parametrize("block", RUN, ids=place)
def test_a_command_runs(block, tmp_path, monkeypatch, capsys):
    for command in block.commands():
        if command[0] == "vllm-radix":
            monkeypatch.chdir(tmp_path)
            assert main(command[1:]) == 0, command
        else:
            assert command[0] == "git", f"{command}: run it here, or say why not"
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("block", NOT_RUN, ids=place)
def test_what_is_not_run_names_tests_that_exist(block):
    for path in re.findall(r"(?:tests|examples)/[\w/.]+\w", block.reason):
        assert (ROOT / path).exists(), f"{block.place}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_that_are_named_exist(page):
    named = re.findall(
        r"(?:`|^ *)make ((?:[a-z-]+ ?)+)", page.read_text(), re.MULTILINE
    )
    for words in named:
        assert set(words.split()) <= TARGETS, words


SERVE = re.compile(r"`(vllm serve MODEL[^`]*)`")


def test_options_of_servers_are_known_to_vllm(serve_parser, monkeypatch):
    """Those in blocks, and those in the text and its tables."""
    monkeypatch.chdir(ROOT)  # options may name files of examples/
    commands = [c for block in SHELL for c in block.commands()]
    commands += [
        shlex.split(found) for p in PAGES for found in SERVE.findall(p.read_text())
    ]
    serving = [c[2:] for c in commands if c[:2] == ["vllm", "serve"]]
    serving = [words for words in serving if "--help=radix" not in words]
    assert len(serving) > 5
    for words in serving:
        assert serve_parser.parse_args(words).model_tag == "MODEL", words
