"""The command ``vllm-radix ab``."""

import argparse
import sys
from functools import partial
from pathlib import Path

from vllm_radix.config import RadixConfig, flag_value
from vllm_radix_bench.ab import runner
from vllm_radix_bench.ab.runner import Options
from vllm_radix_bench.report.cli_types import (
    InputError,
    WithDefaults,
    number,
    pressure,
    whole,
)
from vllm_radix_bench.report.output import OutputFile
from vllm_radix_bench.workloads.builders import SERVED
from vllm_radix_bench.workloads.encoders import TokenizerError

_MODELS = Path(".models")
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
    add("--model", help="model folder for the counts (default: the embedded tiny one)")
    add(
        "--load-format",
        default=None,
        help="of --model; dummy: random weights (default: dummy for the embedded "
        "one, auto otherwise)",
    )
    add("--text-model", help="model folder for the texts (default: the embedded one)")
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
        ("repeats", 1, "runs of each arm"),
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
    add("--csv", type=Path, metavar="FILE", help="where to write the tables, as CSV")


def _model_folder(given: str | None, name: str, flag: str) -> str | None:
    """Return a model's folder; None if it is the embedded one and missing."""
    if given is None:
        folder = _MODELS / name
        return str(folder) if (folder / "config.json").exists() else None
    if not (Path(given) / "config.json").exists():
        raise ValueError(f"{flag}: {given!r} is not a model folder (no config.json)")
    return given


def _options(arguments: argparse.Namespace) -> Options:
    model = _model_folder(arguments.model, "tiny", "--model")
    if model is None:
        raise ValueError(
            "--model: no embedded model under .models: run `make setup`, "
            "or name a model folder"
        )
    text_model = _model_folder(arguments.text_model, "smollm2", "--text-model")
    quick = arguments.quick
    workloads = list(dict.fromkeys(arguments.workloads))
    return Options(
        model=model,
        load_format=arguments.load_format or ("auto" if arguments.model else "dummy"),
        text_model=None if arguments.no_texts else text_model,
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
        0; 1 when a count or a text is not as it should be; 3 when an engine did not
        come up or died; 130 when interrupted. Bad input ends with 2 and writes nothing.
    """
    from tqdm import tqdm

    from vllm_radix_bench.ab import report
    from vllm_radix_bench.report.columns import csv_text, records
    from vllm_radix_bench.report.tables import console

    try:
        options = _options(arguments)
        output = OutputFile(arguments.output)
        csv = arguments.csv and OutputFile(arguments.csv, "--csv")
        output.prepare()
        if csv:
            csv.prepare()
    except (OSError, ValueError) as error:
        parser.error(str(error))

    def save(result: dict[str, object]) -> None:
        rows = records(report.COLUMNS, result["counts"])
        output.write_json({**result, "rows": rows})
        if csv:
            csv.write(csv_text(report.COLUMNS, result["counts"]))

    with tqdm(total=runner.total_pieces(options), unit="piece", leave=False) as bar:

        def progress(line: str) -> None:
            bar.set_description(line)
            bar.update()

        try:
            result = runner.run(options, output.path.parent, progress, save)
        except (InputError, TokenizerError) as error:
            bar.close()
            parser.error(str(error))
        except runner.ArmError as error:
            bar.close()
            print(f"vllm-radix ab: {error}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            bar.close()
            print("vllm-radix ab: interrupted", file=sys.stderr)
            return 130
    out = console(160)
    fine = report.show(result, out)
    out.print(f"Every request is in {output.path}.", highlight=False)
    return 0 if fine else 1
