"""Many engines, on paper: what each part of the path costs, and what breaks first.

    python -m vllm_radix_bench.study scale

Measures what a unit of each part costs on this machine, and multiplies it by the counts
of a cluster: a thousand engines and a hundred thousand requests a second, or what the
options say. Each part has its formula, what there is of its resource, and how much of
that it takes. With ``--simulate`` it also runs few-shot loads through so many of vLLM's
schedulers, to show whether a rule finds as much among many engines as among few.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.cli_types import WithDefaults, number
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import all_written
from vllm_radix_bench.report.tables import console, print_table, say, say_where
from vllm_radix_bench.routing import MOST_ENGINES
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.study.results import Run, add_run_options, collect, outputs

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Scenario:
    """A cluster and its traffic.

    Attributes:
        engines: how many.
        requests: of all engines, in a second.
        prompt_tokens: of a request.
        output_tokens: of a request.
        hit_rate: share of prompt tokens that are found in a cache.
        cache_blocks: of an engine, of 16 tokens.
        steps: of an engine in a second.
        remembered_tokens: of an engine, in a router's history.
        scrape_seconds: between scrapes of metrics.
    """

    engines: float = 1000
    requests: float = 100_000
    prompt_tokens: float = 1000
    output_tokens: float = 100
    hit_rate: float = 0.8
    cache_blocks: float = 25_000
    steps: float = 50
    remembered_tokens: float = 4_000_000
    scrape_seconds: float = 15


LIMITS = {"core": 1.0, "link": 1.25e9, "memory": 64e9, "gpu": 1.0}
"""What there is of a resource: a core of one process, 10 Gbit/s, 64 GB, a GPU."""
_SHOWN = {
    "core": ("{:,.3g} cores", 1.0),
    "link": ("{:,.3g} MB/s", 1e-6),
    "memory": ("{:,.3g} GB", 1e-9),
    "gpu": ("{:,.3g} GPUs", 1.0),
}


@dataclass(frozen=True)
class Part:
    """A part of the path.

    Attributes:
        name: of the part.
        where: it is: in each engine, or in one router, balancer or scraper for all.
        resource: a key of ``LIMITS``.
        formula: of what it takes of the resource, in names of ``Scenario``, of the
            units, and of ``CostModel``.
    """

    name: str
    where: str
    resource: str
    formula: str

    def value(self, numbers: Numbers) -> float:
        """Return what the part takes."""
        return float(eval(self.formula, {"__builtins__": {}}, dict(numbers)))

    def share(self, numbers: Numbers) -> float:
        """Return how much of the resource that is; more than 1 does not work."""
        return self.value(numbers) / LIMITS[self.resource]


_BLOCKS_STORED = "((1 - hit_rate) * prompt_tokens + output_tokens) / 16"
"""Of a request; as many are removed, once caches are full."""
PARTS = (
    Part(
        "the GPU itself, as modelled",
        "engine",
        "gpu",
        "requests / engines * ((1 - hit_rate) * prompt_tokens + output_tokens)"
        " * flops_per_token / flops_per_second",
    ),
    Part(
        "stock's scheduler",
        "engine",
        "core",
        "requests / engines * stock_us_request / 1e6",
    ),
    Part(
        "radix's scheduler",
        "engine",
        "core",
        "requests / engines * radix_us_request / 1e6",
    ),
    Part(
        "radix's scheduler, with events",
        "engine",
        "core",
        "requests / engines * radix_events_us_request / 1e6",
    ),
    Part(
        "of it: hashes for events",
        "engine",
        "core",
        "requests / engines * (prompt_tokens + output_tokens) * hash_us_token / 1e6",
    ),
    Part(
        "events encoded, in a thread",
        "engine",
        "core",
        f"requests / engines * 2 * {_BLOCKS_STORED} * encode_us_block / 1e6",
    ),
    Part(
        "events to the router",
        "router",
        "link",
        f"requests * {_BLOCKS_STORED} * (stored_bytes_block + removed_bytes_block)",
    ),
    Part(
        "events applied",
        "router",
        "core",
        f"requests * 2 * {_BLOCKS_STORED} * apply_us_block / 1e6",
    ),
    Part(
        "mirror of all caches",
        "router",
        "memory",
        "engines * cache_blocks * mirror_bytes_block",
    ),
    Part(
        "history of all engines",
        "router",
        "memory",
        "engines * remembered_tokens / 16 * history_bytes_chunk",
    ),
    Part(
        "prompts looked up",
        "router",
        "core",
        "requests * prompt_tokens * affinity_us_token / 1e6",
    ),
    Part(
        "engines compared by a router",
        "router",
        "core",
        "requests * engines * affinity_us_engine / 1e6",
    ),
    Part(
        "engines compared by vLLM's balancer",
        "balancer",
        "core",
        "requests * engines * queue_us_engine / 1e6",
    ),
    Part(
        "metrics scraped, stock",
        "scraper",
        "link",
        "engines * stock_scrape_bytes_engine / scrape_seconds",
    ),
    Part(
        "metrics scraped, radix adds",
        "scraper",
        "link",
        "engines * radix_scrape_bytes_engine / scrape_seconds",
    ),
)


def counts(numbers: Numbers) -> dict[str, float]:
    """Return what there is of events and series, in all engines."""
    blocks = eval(_BLOCKS_STORED, {"__builtins__": {}}, dict(numbers))
    series = numbers["stock_series_engine"], numbers["radix_series_engine"]
    return {
        "KV events a second, blocks": 2 * numbers["requests"] * blocks,
        "event messages a second, at most": numbers["engines"] * numbers["steps"],
        "series, stock": numbers["engines"] * series[0],
        "series that radix adds": numbers["engines"] * series[1],
    }


def breaks_at(part: Part, numbers: Numbers, name: str) -> float | None:
    """Return the number at which a part takes all there is; None if it never does.

    Args:
        part: of the path.
        numbers: of the scenario and the units.
        name: of the number that grows while the others stay: each part is
            proportional to it, falls with it, or does not depend on it.
    """
    share = part.share(numbers)
    more = part.share({**numbers, name: 2 * numbers[name]})
    if more <= share or not share:
        return None
    return numbers[name] / share


def _shown(part: Part, numbers: Numbers) -> str:
    text, factor = _SHOWN[part.resource]
    return text.format(part.value(numbers) * factor)


def rows_of(numbers: Numbers) -> list[dict[str, Any]]:
    """Return a row for each part, what takes most of its resource first."""
    rows = [
        {
            "part": part.name,
            "where": part.where,
            "takes": _shown(part, numbers),
            "value": part.value(numbers),
            "share": part.share(numbers),
            "requests": breaks_at(part, numbers, "requests"),
            "engines": breaks_at(part, numbers, "engines"),
            "formula": part.formula,
        }
        for part in PARTS
    ]
    return sorted(rows, key=lambda row: -row["share"])


COLUMNS = (
    Column("part", lambda row: row["part"], is_name=True),
    Column("in", lambda row: row["where"]),
    Column("takes", lambda row: row["takes"]),
    Column("of what there is", lambda row: row["share"], "{:,.2f}"),
    Column("full at requests/s", lambda row: row["requests"], "{:,.0f}"),
    Column("full at engines", lambda row: row["engines"], "{:,.0f}"),
)
"""Of the parts."""
FORMULAS = (COLUMNS[0], Column("formula", lambda row: row["formula"]))
"""How each part's figure is made."""
UNIT_COLUMNS = (
    Column("unit", lambda row: row[0], is_name=True),
    Column("measured", lambda row: row[1], "{:,.3g}"),
)
"""Of the unit costs, and of counts."""


def sentences(numbers: Numbers) -> list[str]:
    """Return what breaks first in a router, and in an engine."""
    rows = rows_of(numbers)
    shared = next(row for row in rows if row["where"] != "engine")
    own = next(
        row for row in rows if row["where"] == "engine" and "cores" in row["takes"]
    )
    first = (
        f"Of what one process does for all, {shared['part']} is full first: it takes "
        f"{shared['share']:.3g} times what there is."
    )
    second = (
        f"Of what an engine does on its CPU, {own['part']}, takes most: "
        f"{own['share']:.2f} of a core."
    )
    return [first, second]


SIMULATED = "round-robin", "history", "events"


def simulate(engines: int) -> Run:
    """Run a few-shot load through so many schedulers, with some rules."""
    from vllm_radix_bench.study.engines import Cell, run_cell

    return run_cell((Cell("few-shot", engines, 0.8, 0.9, 0), SIMULATED))


def _factor(run: Run, rule: str, arm: str) -> float:
    tokens: int = run["routings"][rule][arm]["computed_prompt_tokens"]
    return tokens / float(run["fewest"])


def _factors(run: Run, rule: str) -> dict[str, float]:
    return {arm: _factor(run, rule, arm) for arm in ("stock", "radix")}


SIMULATED_COLUMNS = (
    Column("engines", lambda run: run["engines"], "{:,}", is_name=True),
    Column("requests", lambda run: _requests(run), "{:,}"),
    *(
        Column(
            f"{rule}: x fewest",
            partial(_factors, rule=rule),
            "{stock:.2f} → {radix:.2f}",
        )
        for rule in SIMULATED
    ),
)
"""Of the simulated runs."""


def _requests(run: Run) -> int:
    return int(run["routings"][SIMULATED[0]]["stock"]["requests"])


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    about = {
        line.split(":")[0].strip(): line.split(":")[1].strip()
        for line in (Scenario.__doc__ or "").splitlines()
        if ":" in line and "Attributes" not in line
    }
    for field in fields(Scenario):
        most = 1.0 if field.name == "hit_rate" else 1e12
        least = 0.0 if field.name == "hit_rate" else 1e-3
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=partial(number, float, least, most),
            default=field.default,
            metavar="N",
            help=about[field.name],
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.scale",
        description=__doc__,
        formatter_class=WithDefaults,
    )
    _add_scenario(parser)
    parser.add_argument(
        "--simulate",
        nargs="+",
        type=partial(number, int, 1, MOST_ENGINES),
        default=[],
        metavar="N",
        help="so many engines, without a model",
    )
    parser.add_argument(
        "--units",
        type=Path,
        metavar="FILE",
        help="an earlier result, whose unit costs and simulated runs are taken",
    )
    add_run_options(parser, "scale", "the table goes", os.cpu_count())
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    earlier = _earlier(arguments.units, parser)
    output, csv = outputs(parser, arguments.output, ".csv")
    runs = collect(simulate, arguments.simulate, arguments.jobs, output)
    if earlier is None:
        from vllm_radix_bench.study.scale_units import measure

        known = asdict(measure())
    else:
        known, before = earlier
        runs = runs or before
    scenario = Scenario(
        **{f.name: getattr(arguments, f.name) for f in fields(Scenario)}
    )
    numbers = {**known, **asdict(scenario), **asdict(CostModel())}
    rows = rows_of(numbers)
    result = {
        "scenario": asdict(scenario),
        "units": known,
        "cost": asdict(CostModel()),
        "limits": LIMITS,
        "parts": rows,
        "counts": counts(numbers),
        "simulated": runs,
    }
    output.write_json(result)
    csv.write(csv_text((*COLUMNS, FORMULAS[1]), rows))
    out = console(200)
    print_table(out, "What a unit costs here", UNIT_COLUMNS, list(known.items()))
    print_table(out, "Counts", UNIT_COLUMNS, list(result["counts"].items()))
    print_table(out, "What each part takes", COLUMNS, rows)
    print_table(out, "Formulas", FORMULAS, rows)
    if runs:
        title = "Tokens computed over the fewest possible, stock → radix"
        print_table(out, title, SIMULATED_COLUMNS, runs)
    for sentence in sentences(numbers):
        say(out, sentence)
    say_where(out, "Everything", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


def _earlier(
    path: Path | None, parser: argparse.ArgumentParser
) -> tuple[dict[str, float], list[Run]] | None:
    """Return unit costs and simulated runs of an earlier result; None to make them."""
    if path is None:
        return None
    try:
        result = json.loads(path.read_text())
        units = {str(key): float(one) for key, one in result["units"].items()}
        return units, list(result["simulated"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        parser.error(f"--units: {path} is no result of this study")


if __name__ == "__main__":
    sys.exit(main())
