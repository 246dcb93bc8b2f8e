"""Replay requests through vLLM's scheduler without a model, on a virtual clock.

Give it a trace, or name a built-in workload, and the size of your cache; it tells
what stock vLLM and radix would compute, and how long requests would wait.
"""

import argparse
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.cli_types import (
    LEAST_FACTOR,
    InputError,
    WithDefaults,
    number,
    pressure,
    refuse_same_file,
    whole,
)
from vllm_radix_bench.report.output import OutputFile, Rows, all_written
from vllm_radix_bench.report.quiet import quiet_vllm
from vllm_radix_bench.report.unfinished import Unfinished
from vllm_radix_bench.routing import DEFAULT_ROUTINGS, MOST_ENGINES, ROUTINGS
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.layouts import FORMS, Layout
from vllm_radix_bench.traces.format import DEFAULT_OUTPUT_LENGTH
from vllm_radix_bench.traces.formats import FORMATS
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.builders import BUILDERS
from vllm_radix_bench.workloads.encoders import (
    ChatTemplate,
    Encode,
    load_encode,
    words,
)
from vllm_radix_bench.workloads.sizing import REFERENCE_CACHE, build
from vllm_radix_bench.workloads.turn import Turn

if TYPE_CHECKING:
    from vllm_radix_bench.replay.runner import Options

_OF_A_WORKLOAD = {"pressure": 5.0, "load": 0.0, "stretch": 1.0, "seed": 0}
_OF_A_TRACE = {
    "rate": 1.0,
    "limit": None,
    "closed_loop": False,
    "default_output_length": DEFAULT_OUTPUT_LENGTH,
}
_BLOCKS, _MOST_BLOCKS, _BLOCK_SIZE = 25_000, 1_000_000, 16
_FLAGS = {"trace": "the trace", "requests": "the fingerprint of the requests"}
_FLAGS |= {"routings": "--routing"}
_FLAGS |= {"priorities": "--priority", "known_in_advance": "--no-oracle"}
_FLAGS |= {"bytes_per_block": "what a block of --model takes"}
_FLAGS |= {"arm_options": "the options of --arms, RADIX_ variables among them"}
"""Options of the command by those of a result, where the names differ."""
_positive = partial(number, float, LEAST_FACTOR, 1e6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what runs the command."""
    parser.description = __doc__
    parser.formatter_class = WithDefaults
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        type=Path,
        help="JSON lines, gzip or not; a format is known by its fields: "
        + ", ".join(one.describe() for one in FORMATS),
    )
    add("--workload", choices=list(BUILDERS), help="a built-in one instead of a trace")
    add(
        "--pressure",
        type=pressure,
        default=5.0,
        metavar="X",
        help="of a workload: working set as a multiple of the first cache",
    )
    add(
        "--load",
        type=partial(number, float, 0, 100),
        default=0.0,
        metavar="X",
        help="of a workload: Poisson arrivals at this multiple of what stock serves; "
        "0 sends all at once",
    )
    add(
        "--stretch",
        type=_positive,
        default=1.0,
        metavar="X",
        help="of a workload: factor on the lengths of its prompts",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="of a workload")
    add("--rate", type=_positive, default=1.0, metavar="X", help="of a trace: speed-up")
    add("--limit", type=whole(1), metavar="N", help="of a trace: only the first N")
    add(
        "--closed-loop",
        action="store_true",
        help="of a trace with sessions: a turn waits for the answer before it",
    )
    add(
        "--default-output-length",
        type=whole(1),
        default=DEFAULT_OUTPUT_LENGTH,
        metavar="N",
        help="of a trace: tokens generated where a line names no number",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="model folder whose tokenizer reads prompts, and whose chat template "
        "reads messages (default: words and marks, and no messages)",
    )
    add(
        "--engines",
        type=partial(number, int, 1, MOST_ENGINES),
        metavar="N",
        help="so many engines, each with a cache of its own, behind a routing rule; "
        "--pressure and --load are then those of all together",
    )
    add(
        "--routing",
        nargs="+",
        metavar="RULE",
        help=f"of --engines, one or more of {', '.join(ROUTINGS)}, each with options "
        f"behind it as name:{{JSON}} (default: {' '.join(DEFAULT_ROUTINGS)})",
    )
    add(
        "--arms",
        nargs="+",
        default=["stock", "radix"],
        metavar="ARM",
        help="stock, radix, radix:{JSON options}, apc-off, or a scheduler class",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--blocks",
        nargs="+",
        type=whole(2),
        metavar="N",
        help="blocks of the cache; several are run one after the other (default: "
        f"{_BLOCKS}, which of 16 tokens are 52 GB of an 8B model's KV cache)",
    )
    size.add_argument(
        "--kv-gb",
        nargs="+",
        type=_positive,
        metavar="GB",
        help="size of the cache in GB instead, of 10^9 bytes, for the model of --model",
    )
    add(
        "--model",
        metavar="MODEL",
        help="folder, or name on the Hugging Face hub, whose config.json says what a "
        "token takes in the cache, and the layout of a hybrid model; for --kv-gb",
    )
    add(
        "--layout",
        metavar="TEXT",
        help="groups of a hybrid model's cache, such as full+swa:1024 or "
        f"full/528+mamba/528x3: {FORMS}; or model:FOLDER, what vLLM makes of a "
        "model's config.json (default: one group of full attention). Blocks count "
        "for all groups, --pressure counts those that keep all tokens, and seconds "
        "stay those of a full-attention model",
    )
    for flag, default, what in (
        ("block-size", _BLOCK_SIZE, "tokens in a block, if the layout names no number"),
        ("max-num-seqs", 128, "requests running at once"),
        ("max-num-batched-tokens", 8192, "tokens in a step"),
    ):
        add(f"--{flag}", type=whole(1), default=default, metavar="N", help=what)
    add(
        "--long-prefill-token-threshold",
        type=whole(0),
        default=0,
        metavar="N",
        help="most prompt tokens of one request in a step; 0 for no limit",
    )
    add(
        "--priority",
        action="store_true",
        help="serve by the trace's priorities (--scheduling-policy priority)",
    )
    add(
        "--cost",
        nargs="+",
        type=_cost,
        default=[],
        metavar="NAME=VALUE",
        help="of the virtual clock, an H100 with an 8B model by default: "
        + ", ".join(f"{n}={v:g}" for n, v in vars(CostModel()).items()),
    )
    add(
        "--no-oracle",
        action="store_true",
        help="skip the run of all requests in the best order, known in advance",
    )
    add(
        "--output",
        type=Path,
        default=Path("results/replay.json"),
        help="where to write",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the finished runs of a replay that was stopped",
    )
    add("--csv", type=Path, metavar="FILE", help="where to write the tables, as CSV")
    add("--html", type=Path, metavar="FILE", help="where to write a page with charts")


def _cost(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    known = vars(CostModel())
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=VALUE with a name of {', '.join(known)}"
        )
    try:
        CostModel(**{name: float(value)})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, float(value)


def _encoder(folder: Path | None) -> Encode:
    return words if folder is None else load_encode(folder)


def _requests(arguments: argparse.Namespace, options: "Options") -> list[Turn]:
    """Return what is to be sent.

    Raises:
        ValueError: the trace or an option is wrong; the message names it.
    """
    from vllm_radix_bench.replay import runner

    if (arguments.trace is None) == (arguments.workload is None):
        raise ValueError("give a trace, or --workload, and not both")
    theirs = _OF_A_WORKLOAD if arguments.trace is not None else _OF_A_TRACE
    for name, default in theirs.items():
        if getattr(arguments, name) != default:
            kind = "workload" if arguments.trace is not None else "trace"
            raise ValueError(f"--{name.replace('_', '-')} is of a {kind}")
    encode = _encoder(arguments.tokenizer)
    if arguments.trace is not None:
        return load(
            arguments.trace,
            encode,
            encode_chat=arguments.tokenizer and ChatTemplate(arguments.tokenizer),
            output_length=arguments.default_output_length,
            closed_loop=arguments.closed_loop,
            limit=arguments.limit,
            rate=arguments.rate,
        )
    num_blocks, block_size = options.dense_cache()
    num_blocks *= options.engines or 1
    made = build(
        arguments.workload,
        encode,
        num_blocks=num_blocks,
        block_size=block_size,
        pressure=arguments.pressure,
        seed=arguments.seed,
        # Lengths do not grow with the cache, as those of the A/B do.
        stretch=arguments.stretch * REFERENCE_CACHE / (num_blocks * block_size),
    )
    runner.shuffle(made.roots, arguments.seed)
    if arguments.load:
        runner.send_at_load(made.roots, arguments.load, arguments.seed, options)
    return made.roots


def _layout(text: str | None) -> str | None:
    """Return the layout that an option names, written out.

    Raises:
        InputError: it names none.
    """
    if text is None:
        return None
    kind, _, folder = text.partition(":")
    try:
        if kind == "model":
            from vllm_radix_bench.sim.model_layouts import layout_of_model

            return str(layout_of_model(Path(folder)))
        return str(Layout.parse(text))
    except ValueError as error:
        raise InputError(f"--layout: {error}") from error


def _cache(
    arguments: argparse.Namespace,
) -> tuple[list[int], str | None, float | None]:
    """Return the blocks of the caches, their layout, and a block's bytes if known.

    Raises:
        InputError: options do not go together, or the model is not understood.
    """
    layout = _layout(arguments.layout)
    if arguments.kv_gb is None:
        if arguments.model is not None:
            raise InputError("--model: it is for --kv-gb, which is not given")
        return list(dict.fromkeys(arguments.blocks or [_BLOCKS])), layout, None
    if arguments.model is None:
        raise InputError("--kv-gb: name the model with --model FOLDER_OR_NAME, too")
    if layout is not None:
        raise InputError("--layout: with --kv-gb the layout is that of --model")
    from vllm_radix_bench.sim.model_layouts import cache_of_model

    try:
        model = cache_of_model(arguments.model)
    except ValueError as error:
        raise InputError(f"--model: {error}") from error
    per_block = float(model.bytes_per_block)
    if model.layout is None:
        per_block *= arguments.block_size / model.block_size
    elif arguments.block_size != _BLOCK_SIZE:
        raise InputError("--block-size: with --kv-gb and a hybrid model it is vLLM's")
    made = [_blocks_in(gb, per_block) for gb in arguments.kv_gb]
    layout = None if model.layout is None else str(model.layout)
    return list(dict.fromkeys(made)), layout, per_block


def _blocks_in(gb: float, per_block: float) -> int:
    """Return the blocks for requests in a cache: all but vLLM's own, the null block.

    Raises:
        InputError: there is no space for them.
    """
    blocks = int(gb * 1e9 // per_block) - 1
    if not 2 <= blocks <= _MOST_BLOCKS:
        # Rounded to the inside of what is allowed.
        least, most = 3.1 * per_block / 1e9, 0.99 * _MOST_BLOCKS * per_block / 1e9
        shown = f"{most:,.0f}" if most >= 100 else f"{most:.2g}"
        raise InputError(
            f"--kv-gb: {gb:g} GB hold {max(blocks, 0):,} blocks of the model; allowed: "
            f"{least:.2g} to {shown}"
        )
    return blocks


def _routings(arguments: argparse.Namespace) -> list[str]:
    """Return the routing rules that are asked for; none for one engine.

    Raises:
        InputError: options do not go together.
    """
    if arguments.engines is None:
        if arguments.routing is not None:
            raise InputError("--routing: it is for --engines N, which is not given")
        return []
    if arguments.html is not None:
        raise InputError(
            "--html: a replay of several engines has no page; allowed: --output and "
            "--csv"
        )
    if arguments.no_oracle:
        raise InputError(
            "--no-oracle: a replay of several engines has no best order to skip; "
            "allowed: without --engines"
        )
    return list(dict.fromkeys(arguments.routing or DEFAULT_ROUTINGS))


def _input(arguments: argparse.Namespace, roots: list[Turn]) -> dict[str, Any]:
    """Return where requests come from; for a run that goes on with another."""
    from vllm_radix_bench.replay import runner

    of_a_trace = arguments.trace is not None
    names = ["trace", *_OF_A_TRACE] if of_a_trace else ["workload", *_OF_A_WORKLOAD]
    names += ["tokenizer", "kv_gb", "model"]
    found = {name: getattr(arguments, name) for name in names}
    texts = {name: str(one) for name, one in found.items() if isinstance(one, Path)}
    return {**found, **texts, "requests": runner.fingerprint(roots)}


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command.

    Returns:
        The exit code. Bad input ends with 2 and writes nothing.

    Raises:
        OutputError: the result cannot be written where it is to be.
        StoppedError: the run ended early; it names what is kept.
    """
    quiet_vllm()
    if arguments.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from vllm_radix_bench.html.page import render_replay
    from vllm_radix_bench.replay import checks, report, runner
    from vllm_radix_bench.replay.oracles import every_turn
    from vllm_radix_bench.replay.verdict import verdict
    from vllm_radix_bench.report.columns import csv_text, records
    from vllm_radix_bench.report.progress import Progress
    from vllm_radix_bench.report.tables import console, say, say_where

    output = OutputFile(arguments.output)
    csv = arguments.csv and OutputFile(arguments.csv, "--csv")
    html = arguments.html and OutputFile(arguments.html, "--html")
    try:
        blocks, layout, bytes_per_block = _cache(arguments)
        options = runner.Options(
            blocks=blocks,
            arms=list(dict.fromkeys(arguments.arms)),
            block_size=arguments.block_size,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            long_prefill_token_threshold=arguments.long_prefill_token_threshold,
            priorities=arguments.priority,
            cost=CostModel(**dict(arguments.cost)),
            known_in_advance=not arguments.no_oracle and arguments.engines is None,
            layout=layout,
            bytes_per_block=bytes_per_block,
            engines=arguments.engines,
            routings=_routings(arguments),
        )
        refuse_same_file(
            {
                "the trace": arguments.trace,
                "--output": arguments.output,
                "--csv": arguments.csv,
                "--html": arguments.html,
            }
        )
        of_a_trace = arguments.trace is not None
        checks.check_sizes(options, 0 if of_a_trace else arguments.pressure)
        checks.check_arms(options)
        roots = _requests(arguments, options)
        runner.check(roots, options)
        result = runner.new_result(roots, options)
        result["source"] = str(arguments.trace or arguments.workload)
        result["input"] = _input(arguments, roots)
        parts = {name: result[name] for name in ("input", "options", "versions")}
        unfinished = Unfinished(output, parts, _FLAGS)
        if arguments.resume:
            result = unfinished.load() or result
    except (OSError, ValueError) as error:
        said = str(error)
        if arguments.kv_gb is not None and said.startswith("--blocks: "):
            said = said.replace("--blocks", "--kv-gb", 1)
        parser.error(said)
    for file in filter(None, (output, csv, html)):
        file.prepare()
    pieces = runner.plan(options, result)
    total = runner.total_pieces(options)
    unfinished.begin(arguments.resume, total - len(pieces), total)
    of_a_run = sum(1 for _ in every_turn(roots))
    done = (total - len(pieces)) * of_a_run
    progress = Progress(total * of_a_run, "requests", done)
    with unfinished.told_when_stopped(), closing(progress):
        runner.run(
            roots, options, result, pieces, progress, lambda: unfinished.save(result)
        )
    rows, columns = report.rows_of(result), report.columns_of(result)
    for cell in result["cells"]:
        cell["requests"] = {name: Rows(one) for name, one in cell["requests"].items()}
    output.write_json({**result, "rows": records(columns, rows)})
    if csv:
        csv.write(csv_text(columns, rows))
    if html:
        html.write(render_replay(result))
    unfinished.remove()
    out = console()
    report.show(result, rows, out)
    say_where(out, "Every request", output, csv)
    if html:
        say_where(out, "The page", html, None)
    for sentence in verdict(result):
        say(out, sentence)
    return ExitCode.GOOD if all_written(output, csv, html) else ExitCode.OUTPUT
