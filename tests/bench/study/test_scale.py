"""Many engines on paper: the arithmetic, its formulas, and the units behind it."""

import json
import re
from dataclasses import asdict, fields

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix import RadixScheduler
from vllm_radix.exits import ExitCode
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.study import scale, scale_units

UNITS = {field.name: 2.0 for field in fields(scale_units.Units)}
NUMBERS = {**UNITS, **asdict(scale.Scenario()), **asdict(CostModel())}
PARTS = {part.name: part for part in scale.PARTS}


def value(name, **changed):
    return PARTS[name].value({**NUMBERS, **changed})


def test_some_parts_by_hand():
    # 100 requests a second and engine; 18.75 blocks of each are stored and removed.
    assert value("radix's scheduler") == pytest.approx(100 * 2e-6)
    assert value("the GPU itself, as modelled") == pytest.approx(100 * 300 * 16 / 495e3)
    assert value("events to the router") == pytest.approx(100_000 * 18.75 * 4)
    assert value("events applied") == pytest.approx(100_000 * 37.5 * 2e-6)
    assert value("mirror of all caches") == 1000 * 25_000 * 2
    assert value("history of all engines") == 1000 * 250_000 * 2
    assert value("prompts looked up") == pytest.approx(100_000 * 1000 * 2e-6)
    assert value("engines compared by vLLM's balancer") == pytest.approx(1e8 * 2e-6)
    assert value("metrics scraped, stock") == pytest.approx(1000 * 2 / 15)
    found = scale.counts(NUMBERS)
    assert found["KV events a second, blocks"] == pytest.approx(100_000 * 37.5)
    assert found["event messages a second, at most"] == 50_000
    assert found["series that radix adds"] == 2000


GROWTH = {
    "engines": {
        2.0: {
            "mirror of all caches",
            "history of all engines",
            "engines compared by a router",
            "engines compared by vLLM's balancer",
            "metrics scraped, stock",
            "metrics scraped, radix adds",
        },
        1.0: {"events to the router", "events applied", "prompts looked up"},
    },
    "requests": {
        1.0: {
            "mirror of all caches",
            "history of all engines",
            "metrics scraped, stock",
            "metrics scraped, radix adds",
        }
    },
}
"""By what is doubled: what parts are then multiplied by; others by the remaining."""
REST = {"engines": 0.5, "requests": 2.0}


@pytest.mark.parametrize("name", REST)
def test_doubling_a_number_doubles_what_scales_with_it(name):
    known = {part: factor for factor, parts in GROWTH[name].items() for part in parts}
    assert known.keys() <= PARTS.keys()
    for part in scale.PARTS:
        doubled = part.value({**NUMBERS, name: 2 * NUMBERS[name]})
        factor = known.get(part.name, REST[name])
        assert doubled == pytest.approx(factor * part.value(NUMBERS)), part.name


@pytest.mark.parametrize("name", REST)
def test_a_part_is_full_where_it_says(name):
    tested = 0
    for part in scale.PARTS:
        number = scale.breaks_at(part, NUMBERS, name)
        if number is None:
            more = part.share({**NUMBERS, name: 2 * NUMBERS[name]})
            assert more <= part.share(NUMBERS)
            continue
        tested += 1
        assert part.share({**NUMBERS, name: number}) == pytest.approx(1)
    assert tested > 4


def test_every_unit_and_every_number_is_used():
    text = " ".join(part.formula for part in scale.PARTS)
    used = set(re.findall(r"[a-z_]+", text)) | {
        # These are of counts.
        "steps",
        "stock_series_engine",
        "radix_series_engine",
    }
    assert set(UNITS) | {field.name for field in fields(scale.Scenario)} <= used


def test_what_takes_most_is_first_and_named():
    rows = scale.rows_of(NUMBERS)
    shares = [row["share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    first, second = scale.sentences(NUMBERS)
    top = next(row for row in rows if row["where"] != "engine")
    assert top["part"] in first and f"{top['share']:.3g} times" in first
    assert "of a core" in second and "GPU" not in second


def test_the_command_follows_earlier_units(tmp_path, capsys):
    earlier = tmp_path / "units.json"
    earlier.write_text(json.dumps({"units": UNITS, "simulated": []}))
    results = []
    for name, engines in (("a", "1000"), ("b", "2000")):
        output = tmp_path / f"{name}.json"
        words = ["--units", str(earlier), "--engines", engines]
        assert scale.main([*words, "--output", str(output)]) == 0
        results.append(json.loads(output.read_text()))
        table = output.with_suffix(".csv").read_text()
        assert table.startswith("part,in,takes,") and ",formula\n" in table
    shown = capsys.readouterr().out
    assert "requests * engines * queue_us_engine / 1e6" in " ".join(shown.split())
    once, twice = (
        {row["part"]: row["value"] for row in result["parts"]} for result in results
    )
    assert twice["engines compared by a router"] == pytest.approx(
        2 * once["engines compared by a router"]
    )
    assert twice["events applied"] == pytest.approx(once["events applied"])
    assert results[0]["units"] == UNITS


@pytest.mark.parametrize(
    "text", [None, "[]", "{}", '{"units": {"a": "b"}, "simulated": []}', "{"]
)
def test_what_holds_no_units_is_refused(text, tmp_path, capsys):
    path = tmp_path / "u.json"
    if text is not None:
        path.write_text(text)
    output = tmp_path / "out" / "s.json"
    with pytest.raises(SystemExit) as stop:
        scale.main(["--units", str(path), "--output", str(output)])
    assert stop.value.code == ExitCode.INPUT
    assert f"--units: {path} is no result of this study" in capsys.readouterr().err
    assert not output.parent.exists()


@pytest.fixture
def small(monkeypatch):
    """A load that takes a second."""
    monkeypatch.setattr(scale_units, "_GROUPS", 6)
    monkeypatch.setattr(scale_units, "_EACH", 4)
    monkeypatch.setattr(scale_units, "_ANSWER", 16)
    monkeypatch.setattr(scale_units, "_BLOCKS", 200)
    monkeypatch.setattr(scale_units, "_TURNS", 1)


def test_units_of_events_are_those_of_a_run(small):
    _, batches = scale_units.run_engine(RadixScheduler, True)
    events = [event for batch in batches for event in batch.events]
    assert len({type(event) for event in events}) == 2, "stored and removed"
    units = scale_units.event_units(batches)
    # 16 token ids of three or five bytes, a hash, and the frame of the event.
    assert 60 < units["stored_bytes_block"] < 250
    assert 9 < units["removed_bytes_block"] < 100
    assert 0 < units["encode_us_block"] < units["apply_us_block"]
    memory = scale_units.memory_units(batches)
    assert all(50 < taken < 1000 for taken in memory.values())
    silent, none = scale_units.run_engine(Scheduler, False)
    assert silent > 0 and none == []


def test_units_of_metrics_are_whole_series_of_an_engine():
    units = scale_units.metric_units()
    for name in ("stock_series_engine", "radix_series_engine"):
        assert units[name] == int(units[name]) > 20
    assert units["radix_scrape_bytes_engine"] > 40 * units["radix_series_engine"]


def test_units_of_choices_and_hashes_are_costs(small):
    units = scale_units.choice_units()
    assert units["affinity_us_token"] > 0 and units["queue_us_engine"] > 0
    assert scale_units.hash_units()["hash_us_token"] > 0.01
