"""The first page stays short, and what it shows is what a run prints."""

import json
import re

import pytest

from support.pages import BLOCKS, ROOT
from vllm_radix.cli import main

README = ROOT / "README.md"
WORD = re.compile(r"[\w%.,/]*\w%?")


def test_it_has_at_most_120_lines():
    assert len(README.read_text().splitlines()) <= 120


@pytest.fixture
def transcript():
    """The one command whose output is shown."""
    (block,) = (b for b in BLOCKS if b.page == README and b.language == "console")
    return block


def test_its_transcript_is_what_the_command_prints(
    transcript, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (command,) = transcript.commands()
    assert command[0] == "vllm-radix"
    assert main(command[1:]) == 0
    printed = set(WORD.findall(capsys.readouterr().out))
    shown = WORD.findall(transcript.output())
    assert len(shown) > 40
    assert [word for word in shown if word not in printed] == []


ROW = re.compile(r"\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|")
NAMES = {"tree search": "search", "nothing shared": "control"}
SIZE = "--blocks 2048 --max-num-seqs 32 --max-num-batched-tokens 2048 --no-oracle"


def rows():
    """The rows of the table, by workload."""
    lines = README.read_text().splitlines()
    found = (ROW.fullmatch(line) for line in lines if " → " in line)
    return [row.groups() for row in found if row]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_its_table_is_what_the_command_says(row, tmp_path):
    workload, *shown = row
    name, _, pressure = workload.removesuffix(" times").partition(", ")
    words = ["replay", "--workload", NAMES.get(name, name), *SIZE.split()]
    output = tmp_path / "replay.json"
    words += ["--pressure", pressure or "4", "--output", str(output)]
    assert main(words) == 0
    arms = json.loads(output.read_text())["cells"][0]["arms"].values()
    counts = ("computed_prompt_tokens", "engine_steps")
    found = [[f"{arm['ttft'][key]:.2f}" for arm in arms] for key in ("mean", "p99")]
    found += [[f"{arm[key]:,}" for arm in arms] for key in counts]
    assert [cell.replace("**", "").split(" → ") for cell in shown] == found
