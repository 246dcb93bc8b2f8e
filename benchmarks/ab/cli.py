"""A/B of stock vLLM against radix on real servers, started with the same options.

vllm-radix ab MODEL [vllm serve options] [--load NAME] [-- options of the load]
"""

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_radix.exits import ExitCode, StoppedError
from vllm_radix_bench.ab.console import show
from vllm_radix_bench.ab.gates import Gate, check_names, check_rounds
from vllm_radix_bench.ab.loads import LOADS
from vllm_radix_bench.ab.servers import ARMS, Cache
from vllm_radix_bench.report.cli_types import (
    LEAST_FACTOR,
    InputError,
    WithDefaults,
    number,
    pressure,
    refuse_same_file,
    whole,
)
from vllm_radix_bench.report.output import OutputFile, all_written, alone
from vllm_radix_bench.report.progress import Progress
from vllm_radix_bench.report.quiet import quiet_vllm
from vllm_radix_bench.report.tables import console, say, say_where
from vllm_radix_bench.report.unfinished import Unfinished
from vllm_radix_bench.workloads.builders import SERVED
from vllm_radix_bench.workloads.encoders import TokenizerError
from vllm_radix_bench.workloads.turn import Turn

if TYPE_CHECKING:
    from vllm_radix_bench.ab.run import Options

_DEFAULT = ("few-shot", "chat")
"""Workloads of a run that names none: one with long shared prefixes, one of
conversations. More of them, and five rounds do not fit into ten minutes."""

PASSES_OPTIONS = True
"""Words that the parser does not know go to ``run`` as ``arguments.others``, and those
after ``--`` as ``arguments.after``."""

_positive = partial(number, float, LEAST_FACTOR, 1e6)
_minutes = partial(number, float, 0.1, 1e5)
_FLAGS = {"serve_options": "the options of vllm serve", "model": "the model"}
_FLAGS |= {"radix_options": "--radix"}
_FLAGS |= {f"{name}_options": "the words after --" for name in LOADS}
_FLAGS |= {"trace": "--trace"}
"""Options of the command by those of a result, where the names differ."""


def variant(words: Sequence[str]) -> ModuleType | None:
    """Return the module that serves these words, if it is not this one."""
    if "--offline" not in words:
        return None
    from vllm_radix_bench.ab.offline import cli

    return cli


def _rate(text: str) -> float:
    """Return requests a second; infinity sends all at once."""
    return math.inf if text == "inf" else float(_positive(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what runs the command."""
    parser.description = __doc__
    parser.usage = (
        "vllm-radix ab MODEL [options] [vllm serve options] [-- options of the load]"
    )
    parser.formatter_class = WithDefaults
    parser.allow_abbrev = False
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--offline",
        action="store_true",
        help="compare engines inside this command instead, step by step; has options "
        "of its own (--offline --help)",
    )
    add(
        "--workloads",
        nargs="+",
        choices=list(SERVED),
        metavar="NAME",
        help=f"built-in ones: {', '.join(SERVED)}; control is always sent (default: "
        f"{' and '.join(_DEFAULT)}, or none where a trace or options after -- say what "
        "is sent)",
    )
    add(
        "--load",
        choices=list(LOADS),
        help="what sends requests by the options after --: bench is `vllm bench "
        "serve`, guidellm is `guidellm run`, which is installed in an environment of "
        "its own (default: bench)",
    )
    add("--trace", type=Path, metavar="FILE", help="any that replay reads")
    add("--limit", type=whole(1), metavar="N", help="of a trace: only the first N")
    add("--speed", type=_positive, default=1.0, metavar="X", help="of a trace")
    add(
        "--closed-loop",
        action="store_true",
        help="of a trace with sessions: a turn waits for the answer before it",
    )
    add(
        "--pressure",
        type=pressure,
        default=2.0,
        metavar="X",
        help="of a built-in workload: working set as a multiple of the cache",
    )
    add(
        "--rate",
        type=_rate,
        metavar="X",
        help="requests a second, with random gaps (default: all at once, or the "
        "trace's own times)",
    )
    add(
        "--concurrency",
        type=whole(1),
        metavar="N",
        help="conversations under way at once (default: no limit)",
    )
    add("--rounds", type=whole(1), default=5, metavar="N", help="of times, in turns")
    add(
        "--budget",
        type=_minutes,
        default=10.0,
        metavar="MINUTES",
        help="begin no further round after this long",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="of all choices")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--together",
        action="store_true",
        default=None,
        help="both servers up at once (default: where memory allows, on a CPU)",
    )
    either.add_argument(
        "--in-turns",
        action="store_false",
        dest="together",
        help="one server at a time",
    )
    add(
        "--matrix-blocks",
        nargs="+",
        type=whole(16),
        metavar="N",
        help="run everything with caches of these sizes, in blocks",
    )
    add(
        "--matrix-rate",
        nargs="+",
        type=_rate,
        metavar="X",
        help="run everything at these rates; inf sends all at once",
    )
    add(
        "--fail-on",
        nargs="+",
        default=[],
        metavar="BOUND",
        help="end with status 1 where a ratio of radix to stock breaks a bound, as in "
        "ttft_p99>1.1 or chat:hit_rate<1",
    )
    add(
        "--ready-timeout",
        type=partial(number, float, 1, 1e5),
        default=1200.0,
        metavar="SECONDS",
        help="for a server to come up",
    )
    add(
        "--stall-timeout",
        type=partial(number, float, 1, 1e5),
        default=300.0,
        metavar="SECONDS",
        help="after which a server that has requests and counts nothing hangs",
    )
    add("--output", type=Path, default=Path("results/ab.json"), help="where to write")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: beside --output)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the finished pieces of a run that was stopped",
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        InputError: some do not.
    """
    if arguments.trace is None:
        for name in ("limit", "closed_loop"):
            if getattr(arguments, name):
                raise InputError(f"--{name.replace('_', '-')} is of a --trace")
        if arguments.speed != 1.0:
            raise InputError("--speed is of a --trace")
    if arguments.load and not arguments.after:
        raise InputError(f"--load {arguments.load}: give its options after --")
    arguments.load = arguments.load or "bench"
    if arguments.rate is not None and arguments.matrix_rate:
        raise InputError("--rate and --matrix-rate: give one of them")
    refuse_same_file(
        {
            "--trace": arguments.trace,
            "--output": arguments.output,
            "--html": arguments.html or arguments.output.with_suffix(".html"),
        }
    )


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return the built-in workloads to run; the control is always among them."""
    names = arguments.workloads
    if names is None:
        other = arguments.trace is not None or arguments.after
        names = [] if other else list(_DEFAULT)
    return list(dict.fromkeys([*names, "control"]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _setup(arguments: argparse.Namespace, serve: Any) -> dict[str, Any]:
    """Return what a run must have in common with one that it goes on with."""
    from vllm_radix_bench.ab.serve_options import shown

    return {
        "model": serve.model,
        "serve_options": shown(serve.words),
        "serve_digest": _digest(" ".join(serve.words).encode()),
        "radix_options": serve.radix,
        **{
            f"{name}_options": (name == arguments.load and arguments.after) or None
            for name in LOADS
        },
        "workloads": _names(arguments),
        "trace": None if arguments.trace is None else str(arguments.trace),
        "trace_digest": arguments.trace and _digest(arguments.trace.read_bytes()),
        "limit": arguments.limit,
        "speed": arguments.speed,
        "closed_loop": arguments.closed_loop,
        "pressure": arguments.pressure,
        "rate": None if arguments.rate is None else str(arguments.rate),
        "concurrency": arguments.concurrency,
        "matrix_blocks": arguments.matrix_blocks,
        "matrix_rate": arguments.matrix_rate and list(map(str, arguments.matrix_rate)),
        "seed": arguments.seed,
    }


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command.

    Returns:
        The exit code. Bad input ends with 2 and writes nothing.

    Raises:
        OutputError: the result cannot be written where it is to be.
        ServerError: a server did not come up, died or hangs.
        StoppedError: the run ended early; it names what is kept.
    """
    quiet_vllm()
    from vllm_radix_bench.ab import report
    from vllm_radix_bench.ab.client import allow_many_connections
    from vllm_radix_bench.ab.loads_of import read_trace
    from vllm_radix_bench.ab.run import Options
    from vllm_radix_bench.ab.serve_options import read_serve
    from vllm_radix_bench.html.page import render_ab

    output = OutputFile(arguments.output)
    html = OutputFile(arguments.html or arguments.output.with_suffix(".html"), "--html")
    try:
        _check(arguments)
        gates = [Gate.parse(text) for text in arguments.fail_on]
        check_rounds(gates, arguments.rounds)
        serve = read_serve(arguments.others)
        versions = report.versions()
        if arguments.after:
            load = LOADS[arguments.load]
            versions |= load.check(arguments.after, arguments, serve.tokenizer)
        trace = read_trace(arguments, serve.tokenizer)
        settings = {"setup": _setup(arguments, serve), "versions": versions}
        unfinished = Unfinished(output, settings, _FLAGS)
        known = unfinished.load() if arguments.resume else None
    except ValueError as error:
        parser.error(str(error))
    options = Options(
        serve=serve,
        rounds=arguments.rounds,
        together=arguments.together,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        budget_seconds=arguments.budget * 60,
        ready_seconds=arguments.ready_timeout,
        stall_seconds=arguments.stall_timeout,
        logs=output.path.with_suffix(""),
        start=time.monotonic(),
    )
    allow_many_connections()  # before a server starts: both have the same
    with alone(output.path):
        for file in (output, html):
            file.prepare()
        try:
            result = _measure(
                arguments, options, settings, trace, unfinished, known, gates
            )
        except StoppedError as error:
            # What does not fit the servers is known once they are up.
            if isinstance(error.__cause__, (InputError, TokenizerError)):
                parser.error(str(error.__cause__))
            raise
        made = report.make(result, gates)
        output.write_json(made)
        html.write(render_ab(made))
        unfinished.remove()
    out = console()
    show(made, out)
    say_where(out, "Every figure", output, None)
    say_where(out, "The page", html, None)
    say(out, made["sentence"])
    if not all_written(output, html):
        return ExitCode.OUTPUT
    held = all(one["ok"] for one in made["verdicts"])
    return ExitCode.GOOD if held else ExitCode.VERDICT


def _measure(
    arguments: argparse.Namespace,
    options: "Options",
    settings: dict[str, Any],
    trace: list[Turn] | None,
    unfinished: Unfinished,
    known: dict[str, Any] | None,
    gates: Sequence[Gate],
) -> dict[str, Any]:
    """Return a complete result.

    Raises:
        InputError: a request does not fit, or a gate names no workload.
        StoppedError: the run ended early; it names what is kept.
    """
    from vllm_radix_bench.ab import report, run
    from vllm_radix_bench.ab.loads_of import make_loads
    from vllm_radix_bench.ab.plan import cells, finished

    sizes = arguments.matrix_blocks or [None]
    asked = arguments.matrix_rate or [arguments.rate]
    # Without a rate roots are sent at their arrivals, which are 0 then.
    rates = [None if rate == math.inf else rate for rate in asked]
    progress = Progress(0, "pieces")
    with (
        unfinished.told_when_stopped(),
        closing(progress),
        run.serving(options, progress.begin) as servers,
    ):
        if known:
            servers.fixed = known["setup"]["fixed_blocks"]
        first = servers.get(ARMS[0], sizes[0])
        cache = first.cache
        if sizes[0] is not None:
            # Groups share blocks, engines have some each: no product of two sizes.
            per_block = cache.tokens / cache.blocks
            cache = Cache(max(sizes), cache.block_size, round(max(sizes) * per_block))
        elif "--num-gpu-blocks-override" not in " ".join(options.serve.words):
            servers.fixed = cache.blocks // first.engines
        if known and known["setup"]["cache"] != vars(cache):
            raise InputError(
                f"--resume: the KV cache has {cache.tokens:,} tokens now and had "
                f"{known['setup']['cache']['tokens']:,}: start without --resume, or "
                "name --num-gpu-blocks-override"
            )
        if servers.together is None:
            servers.together = run.fits_twice(first, options.serve.memory_share)
        names = settings["setup"]["workloads"]
        serve = options.serve
        loads = make_loads(
            arguments,
            names,
            trace,
            serve,
            cache,
            first.max_model_len,
        )
        check_names(gates, [load.name for load in loads])
        planned = cells(len(loads), sizes, rates)
        result = known or {
            **settings,
            "machine": report.machine(),
            "started": report.now(),
            "seconds": 0.0,
            "cells": [run.new_cell(cell, loads[cell.load]) for cell in planned],
        }
        result["setup"] |= {
            "cache": vars(cache),
            "fixed_blocks": servers.fixed,
            "together": servers.together,
            "rounds": options.rounds,
        }
        todo = run.order(result, options, servers.together, finished(result))
        total = len(planned) * (options.rounds + 1) * len(ARMS)
        unfinished.begin(arguments.resume, total - len(todo), total)
        progress.grow(total, total - len(todo))
        each = [loads[cell.load] for cell in planned]
        try:
            run.run(
                options,
                each,
                result,
                todo,
                servers,
                progress,
                lambda: unfinished.save(result),
            )
        finally:
            for load in loads:
                load.close()
    return result
