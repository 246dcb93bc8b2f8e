"""The command ``vllm-radix ab --offline``: both engines inside it, step by step."""

import argparse
from contextlib import closing
from functools import partial
from pathlib import Path

from vllm_radix.config import RadixConfig, flag_value
from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab.offline import models, runner
from vllm_radix_bench.ab.offline.runner import Options
from vllm_radix_bench.report.cli_types import (
    WithDefaults,
    number,
    pressure,
    refuse_same_file,
    whole,
)
from vllm_radix_bench.report.output import OutputFile, all_written
from vllm_radix_bench.report.unfinished import Unfinished
from vllm_radix_bench.workloads.builders import SERVED

_FLAGS = {"pressures": "--pressure", "text_workloads": "--workloads or --quick"}
_FLAGS |= {"stretch": "--quick", "text_model": "--text-model or --no-texts"}
"""Options of the command by those of the runner, where the names differ."""
_QUICK_TEXTS = ("few-shot", "chat", "documents")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what runs the command."""
    parser.description = (
        "Run the same requests through stock vLLM and through radix, in turns, and "
        "compare counts, times and texts."
    )
    parser.formatter_class = WithDefaults
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--model",
        help="for the counts: a folder, or a name on the Hugging Face hub (default: "
        "the tiny one of a clone)",
    )
    add(
        "--load-format",
        default=None,
        help="of --model; dummy: random weights (default: dummy for the tiny one of a "
        "clone, auto otherwise)",
    )
    add("--text-model", help="the same for the texts (default: SmolLM2 of a clone)")
    add("--offline", action="store_true", help="this variant of ab")
    add("--no-texts", action="store_true", help="skip the comparison of texts")
    add(
        "--workloads",
        nargs="+",
        choices=list(SERVED),
        default=list(SERVED),
        metavar="NAME",
        help=f"any of {', '.join(SERVED)}",
    )
    add(
        "--pressure",
        nargs="+",
        type=pressure,
        default=[4.0, 0.5],
        metavar="X",
        help="working set as a multiple of the cache, for the counts",
    )
    for flag, least, what in (
        ("blocks", 16, "blocks of the cache, for the counts"),
        ("text-blocks", 16, "blocks of the cache, for the texts"),
        ("block-size", 1, "tokens in a block"),
        ("text-max-tokens", 1, "length of each text"),
        ("max-num-seqs", 1, "requests running at once"),
        ("max-num-batched-tokens", 8, "tokens in a step"),
        ("repeats", 1, "runs of each arm; times are compared from 3 on"),
        ("seed", 0, "of the workloads"),
    ):
        default = getattr(Options, flag.replace("-", "_"))
        add(f"--{flag}", type=whole(least), default=default, metavar="N", help=what)
    add(
        "--text-pressure",
        type=pressure,
        default=Options.text_pressure,
        metavar="X",
        help="the same as --pressure, for the texts",
    )
    add("--radix", type=flag_value, default={}, metavar="JSON", help="options of radix")
    add(
        "--gpu-memory-utilization",
        type=partial(number, float, 0.05, 0.5),
        default=Options.gpu_memory_utilization,
        metavar="SHARE",
        help="of each of the two engines, which are up at once; not used on a CPU",
    )
    add(
        "--quick",
        action="store_true",
        help="half the cache, half the requests, one run, fewer texts",
    )
    add("--output", type=Path, default=Path("results/ab.json"), help="where to write")
    add(
        "--resume",
        action="store_true",
        help="go on with the finished pieces of a run that was stopped",
    )
    add("--csv", type=Path, metavar="FILE", help="where to write the tables, as CSV")


def _options(arguments: argparse.Namespace) -> Options:
    text_model = None
    if not arguments.no_texts:
        text_model = (
            models.embedded("smollm2")
            if arguments.text_model is None
            else models.find(arguments.text_model, "--text-model")
        )
    quick = arguments.quick
    workloads = list(dict.fromkeys(arguments.workloads))
    return Options(
        model=models.counts_model(arguments.model),
        load_format=arguments.load_format or ("auto" if arguments.model else "dummy"),
        text_model=text_model,
        workloads=workloads,
        text_workloads=[w for w in workloads if quick and w in _QUICK_TEXTS]
        or workloads,
        stretch=2.0 if quick else Options.stretch,
        pressures=list(dict.fromkeys(arguments.pressure)),
        blocks=max(16, arguments.blocks // 2) if quick else arguments.blocks,
        block_size=arguments.block_size,
        text_blocks=arguments.text_blocks,
        text_pressure=min(arguments.text_pressure, 1.2 if quick else 99.0),
        text_max_tokens=arguments.text_max_tokens,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        repeats=1 if quick else arguments.repeats,
        seed=arguments.seed,
        radix=RadixConfig.resolve(arguments.radix).to_dict(),
        gpu_memory_utilization=arguments.gpu_memory_utilization,
    )


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command.

    Returns:
        The exit code. Bad input ends with 2 and writes nothing.

    Raises:
        OutputError: the result cannot be written where it is to be.
        StoppedError: the run ended early; it names what is kept.
    """
    from vllm_radix_bench.ab.offline import report
    from vllm_radix_bench.report.columns import csv_text, records
    from vllm_radix_bench.report.progress import Progress
    from vllm_radix_bench.report.tables import console, say, say_where

    output = OutputFile(arguments.output)
    csv = arguments.csv and OutputFile(arguments.csv, "--csv")
    try:
        refuse_same_file({"--output": arguments.output, "--csv": arguments.csv})
        options = _options(arguments)
        workloads = runner.all_workloads(options)
        result = runner.new_result(options, workloads)
        settings = {"options": result["options"], "versions": result["versions"]}
        unfinished = Unfinished(output, settings, _FLAGS)
        if arguments.resume:
            result = unfinished.load() or result
    except ValueError as error:
        parser.error(str(error))
    for file in filter(None, (output, csv)):
        file.prepare()
    pieces = runner.plan(workloads, options.repeats, result)
    total = runner.total_pieces(options)
    unfinished.begin(arguments.resume, total - len(pieces), total)
    progress = Progress(total, "pieces", total - len(pieces))
    with unfinished.told_when_stopped(), closing(progress):
        runner.run(
            options,
            workloads,
            result,
            pieces,
            output.path.parent,
            progress,
            lambda: unfinished.save(result),
        )
    rows = report.rows_of(result)
    output.write_json({**result, "rows": records(report.COLUMNS, rows)})
    if csv:
        csv.write(csv_text(report.COLUMNS, rows))
    unfinished.remove()
    out = console()
    fine = report.show(result, out)
    say_where(out, "Every request", output, csv)
    say(out, report.headline(rows, result["texts"]))
    if not all_written(output, csv):
        return ExitCode.OUTPUT
    return ExitCode.GOOD if fine else ExitCode.VERDICT
