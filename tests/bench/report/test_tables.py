"""Tables: whatever the width, every figure is there, whole, and at its arm."""

import io
import re

import pytest
from bench.report.test_columns import AB_ROWS, REPORTS
from rich.console import Console

from vllm_radix_bench.ab.offline import report as ab_report
from vllm_radix_bench.replay import report as replay_report
from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.tables import console, print_table, say

WIDTHS = (20, 40, 60, 80, 140, 160)
EACH = pytest.mark.parametrize(
    ("columns", "tables", "rows"),
    [REPORTS[name] for name in ("ab", "replay")],
    ids=["ab", "replay"],
)


def printed(columns, rows, width):
    out = Console(file=io.StringIO(), width=width, markup=False)
    print_table(out, "title", columns, rows)
    return out.file.getvalue()


def figures(text):
    """Return the numbers of a text that nothing touches."""
    return re.findall(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?%?", text)


@EACH
@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_is_cut(columns, tables, rows, width):
    for of_table in tables:
        text = printed(of_table, rows, width)
        assert "…" not in text and "..." not in text
        # Tables fit; a figure a line is left to the terminal to break.
        if width >= 60:
            assert max(map(len, text.splitlines())) <= width
        for column in of_table:
            words = re.findall(r"[^\s,:]+", text)
            # Where a row is a table, its name is the title.
            if not column.is_text or of_table[0] is not column:
                assert set(re.findall(r"[^\s,:]+", column.title)) <= set(words)
            for row in rows:
                for figure in figures(column.text(row)):
                    assert figure in figures(text), (column.title, width)


@pytest.mark.parametrize("width", (60, 80))
def test_arms_become_columns(width):
    text = printed(ab_report.COUNTS, AB_ROWS, width)
    assert "→" not in text
    heading = "chat, working set 4.00x, requests 2, prompt tokens 20,000, "
    assert heading in " ".join(text.split())
    assert text.count(" stock") == len(AB_ROWS)
    assert re.search(r"tokens computed +15,000 +5,000 *\n", text)
    text = printed(ab_report.TIMES, AB_ROWS, width)
    assert re.search(r"TTFT mean +0.75 s +0.38 s +0.50 \(0.50-0.75\) noise", text)
    rows = REPORTS["replay"][2]
    text = printed(replay_report.COUNTS, rows, width)
    assert re.search(r"cache, blocks +25,000 +25,000 *\n", text)
    assert re.search(r"arm +stock +radix *\n", text)
    assert re.search(r"tokens computed +12,345 +12,345 *\n", text)


@pytest.mark.parametrize("width", (60, 80))
def test_many_arms_with_long_names_are_shown_in_several_tables(width):
    names = ["stock", 'radix:{"policy":"lpm","patience":1.5}', "my.own.Scheduler"] * 3
    columns = [
        Column("arm", lambda row: row[1], is_name=True),
        Column("tokens computed", lambda row: row[0], "{:,}"),
    ]
    rows = [(1_000_000 + number, name) for number, name in enumerate(names)]
    text = printed(columns, rows, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert figures(text.replace("1.5", "")) == [f"{row[0]:,}" for row in rows]


def test_names_are_no_markup(capsys):
    out = console()
    say(out, "radix:[bold] [/no] :smile:")
    print_table(out, "[b]t", [Column("an arm", lambda row: row)], ["[/x]"])
    text = capsys.readouterr().out
    assert "radix:[bold] [/no] :smile:\n" in text
    assert "[b]t" in text and "[/x]" in text


def test_sentences_are_whole_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    sentence = "radix computed fewer prompt tokens, " * 9
    say(console(), sentence.strip())
    assert capsys.readouterr().out == sentence.strip() + "\n"


def test_piped_output_is_as_wide_as_columns_says(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 160
    monkeypatch.setenv("COLUMNS", "60")
    assert console().width == 60
