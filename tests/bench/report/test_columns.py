"""The contract of columns: each stands in terminal, JSON and CSV, the same value."""

import csv
import io
import json

import pytest

from vllm_radix_bench.ab.offline import report as ab_report
from vllm_radix_bench.replay import report as replay_report
from vllm_radix_bench.report.columns import (
    Column,
    PairColumn,
    change,
    csv_text,
    records,
)
from vllm_radix_bench.report.tables import console, table
from vllm_radix_bench.study import large, small


def ab_run(computed, ttft):
    records = [{"ttft": ttft * i, "steps_to_first_token": 3 * i} for i in (1, 2)]
    return {
        "requests": 2,
        "prompt_tokens": 20_000,
        "cached_tokens": 20_000 - computed,
        "computed_prompt_tokens": computed,
        "engine_steps": 7,
        "preemptions": 1,
        "seconds": 2.0,
        "records": records,
    }


AB_ROWS = ab_report.rows_of(
    {
        "counts": [
            {
                "workload": name,
                "asked": 4.0,
                "pressure": 4.0,
                "runs": {
                    "stock": [ab_run(15_000, ttft) for ttft in (0.25, 0.5, 0.5)],
                    "radix": [ab_run(5_000, ttft) for ttft in (0.125, 0.25, 0.375)],
                },
            }
            for name in ("chat", "control")
        ]
    }
)

TTFT = {"mean": 0.25, "p50": 0.125, "p90": 0.5, "p99": 1.5, "max": 2.0}
REPLAY_ROWS = [
    replay_report.Row(
        blocks=25_000,
        name=name,
        arm={
            "hit_rate": 0.75,
            "hit_rate_best_eviction": 0.83,
            "computed_prompt_tokens": 12_345,
            "engine_steps": 1_234,
            "preemptions": 0,
            "overtaken_most": 3,
            "ttft": TTFT,
            "requests_per_second": 7.5,
            "jain": 0.9,
        },
        infinite_cache=10_000,
        known=known,
        scheduler_cpu=1e-4,
    )
    for name, known in (("stock", 11_000), ("radix", None))
]

STUDY_ROWS = [
    [
        {
            "load": "chat",
            "seed": seed,
            "known": 7_000,
            "arms": {
                arm: {
                    "ttft": {"mean": 0.25 + number, "p99": 0.5 + number * seed},
                    "tenants": {},
                    "computed_prompt_tokens": 9_000 + number,
                    "scheduler_cpu": 0.5,
                }
                for number, arm in enumerate([*small.arms(), *large.ARMS])
            },
        }
        for seed in (3, 4)
    ]
]
LARGE = large.columns(["prefix", "lpm"])

# All columns, those of each table, and rows of a made-up result.
REPORTS = {
    "ab": (ab_report.COLUMNS, (ab_report.COUNTS, ab_report.TIMES), AB_ROWS),
    "replay": (
        replay_report.COLUMNS,
        (replay_report.COUNTS, replay_report.TIMES),
        REPLAY_ROWS,
    ),
    "study, small": (small.COLUMNS, (small.COLUMNS,), STUDY_ROWS),
    "study, large": (LARGE, (LARGE,), STUDY_ROWS),
}

EACH = pytest.mark.parametrize(
    ("columns", "tables", "rows"), REPORTS.values(), ids=REPORTS
)


@EACH
def test_tables_hold_every_column_and_no_other(columns, tables, rows):
    titles = [column.title for column in columns]
    assert len(set(titles)) == len(titles)
    assert {column for columns in tables for column in columns} == set(columns)


def in_terminal(column, value):
    """What a reader is to see of a value."""
    if isinstance(column, PairColumn):
        both = " → ".join(column.format.format(value[arm]) for arm in column.arms)
        return f"{both}\n{column.note(value)}".strip()
    if isinstance(value, dict):
        return column.format.format(**value)
    return column.format.format(value)


@EACH
def test_every_column_is_in_terminal_json_and_csv_with_one_value(columns, tables, rows):
    shown = console(1000)
    with shown.capture() as capture:
        for of_table in tables:
            shown.print(table("title", of_table, rows))
    terminal = capture.get()
    in_json = json.loads(json.dumps(records(columns, rows)))
    in_csv = list(csv.DictReader(io.StringIO(csv_text(columns, rows))))
    assert len(in_json) == len(in_csv) == len(rows)
    for column in columns:
        assert column.title in terminal
        for row, of_json, of_csv in zip(rows, in_json, in_csv, strict=True):
            value = of_json[column.title]
            parts = value if isinstance(value, dict) else {"": value}
            if value is not None:
                text = in_terminal(column, value)
                assert text == column.text(row)
                assert all(line in terminal for line in text.splitlines())
            for part, one in parts.items():
                cell = of_csv[f"{column.title}, {part}" if part else column.title]
                assert cell == ("" if one is None else str(one))


def test_a_value_that_is_not_there_leaves_a_gap_everywhere():
    column = Column("gain", lambda row: row, "{:.2f}")
    assert [column.text(row) for row in (None, 1.5)] == ["", "1.50"]
    assert records([column], [None, 1.5]) == [{"gain": None}, {"gain": 1.5}]
    assert csv_text([column], [None, 1.5]).splitlines() == ["gain", '""', "1.5"]


def test_text_stands_on_the_left_and_figures_on_the_right():
    columns = [Column("name", str), Column("count", int, "{:,}")]
    made = table("title", columns, [1000])
    assert [column.justify for column in made.columns] == ["left", "right"]
    assert [list(column.cells) for column in made.columns] == [["1000"], ["1,000"]]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (100, 65, "35 % fewer"),
        (100, 100, "as many"),
        (1_000_000, 999_999, "less than 0.01 % fewer"),
        (100_000, 1, "99.99 % fewer"),
        (100, 0, "100 % fewer"),
        (100, 200, "100 % more"),
        (1000, 1005, "0.50 % more"),
    ],
)
def test_a_change_is_not_rounded_to_none_or_all(before, after, said):
    assert change(before, after) == said
