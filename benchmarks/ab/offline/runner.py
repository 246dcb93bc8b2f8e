"""The A/B: stock vLLM and radix on the same requests, cache and machine.

Both engines are up at once, each in its own process, and take turns (A B, B A,
...), so that a drift of the machine's speed meets both. Counts come first: they
are the same in every run. Times are given with their spread.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_radix_bench.ab.offline.arm import Settings, as_request
from vllm_radix_bench.ab.offline.process import ARMS, ArmProcess, both_arms
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.report.progress import Progress, seconds_in_words
from vllm_radix_bench.workloads.builders import SERVED
from vllm_radix_bench.workloads.encoders import load_encode
from vllm_radix_bench.workloads.sizing import build
from vllm_radix_bench.workloads.turn import Workload, longest_path

GAP = 1e-3
"""Top-2 log-probability gap under which a greedy choice may go either way."""


@dataclass
class Options:
    """What ``vllm-radix ab`` can be told; see its ``--help``."""

    model: str
    load_format: str
    text_model: str | None
    workloads: list[str] = field(default_factory=lambda: list(SERVED))
    pressures: list[float] = field(default_factory=lambda: [4.0, 0.5])
    blocks: int = 128
    block_size: int = 32
    text_blocks: int = 24
    text_pressure: float = 2.0
    text_max_tokens: int = 6
    text_workloads: list[str] = field(default_factory=lambda: list(SERVED))
    stretch: float = 1.0
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    repeats: int = 3
    seed: int = 0
    radix: dict[str, Any] = field(default_factory=dict)
    gpu_memory_utilization: float = 0.42


def settings_for(
    options: Options, text: bool, workloads: list[Workload]
) -> dict[str, Settings]:
    """Return the settings of both arms, for counts or for texts.

    Raises:
        InputError: a request would not fit the cache.
    """
    blocks = options.text_blocks if text else options.blocks
    longest = longest_path(root for work in workloads for root in work.roots)
    if longest > blocks * options.block_size:
        raise InputError(
            f"a request of {longest} tokens does not fit a cache of {blocks} blocks "
            f"of {options.block_size} tokens: raise --{'text-' * text}blocks or "
            "--block-size"
        )
    common: dict[str, Any] = {
        "model": options.text_model if text else options.model,
        "load_format": "auto" if text else options.load_format,
        # Greedy answers are compared: rounding must not decide them.
        "dtype": "float32" if text else "auto",
        "block_size": options.block_size,
        "num_blocks": blocks,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_model_len": longest + 1,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    return {
        "stock": Settings(**common),
        "radix": Settings(**common, radix=options.radix),
    }


@dataclass(frozen=True)
class Piece:
    """A workload to run once, on one arm.

    Attributes:
        part: key of the result that its run goes to.
        index: of its workload in that part.
        repeat: number of the run, from 0.
        arm: that runs it.
    """

    part: str
    index: int
    repeat: int
    arm: str


def plan(
    workloads: dict[str, list[Workload]], repeats: int, result: dict[str, Any]
) -> list[Piece]:
    """Return the pieces that a result lacks, in the order to run them.

    A pair of which only one arm has run is run again: its times are compared. What
    there is of it is removed from the result.
    """
    pieces = []
    for part, works in workloads.items():
        for cell in result[part]:
            pairs = min(map(len, cell["runs"].values()))
            for runs in cell["runs"].values():
                del runs[pairs:]
        for repeat in range(repeats if part == "counts" else 1):
            for index in range(len(works)):
                if repeat < len(result[part][index]["runs"][ARMS[0]]):
                    continue
                # A B, B A: a drift of the machine's speed meets both.
                for arm in ARMS if (repeat + index) % 2 == 0 else ARMS[::-1]:
                    pieces.append(Piece(part, index, repeat, arm))
    return pieces


def run_piece(
    piece: Piece, work: Workload, arm: ArmProcess, cell: dict[str, Any]
) -> None:
    """Run a piece and put its run, and for texts what differs, into its cell."""
    is_text = piece.part == "texts"
    request = as_request(work.roots, top_logprobs=2 if is_text else 0)
    cell["runs"][piece.arm].append(arm.ask(request))
    if is_text and all(cell["runs"].values()):
        stock, radix = (cell["runs"][name][0] for name in ARMS)
        cell["differences"] = differences(stock, radix)


def differences(stock: dict[str, Any], radix: dict[str, Any]) -> list[dict[str, Any]]:
    """Return where the answers of two runs differ, request by request.

    A request whose parent differs has another prompt and is not compared. Each
    entry holds the first differing token of both arms and the gap between
    stock's two most likely tokens there, as log-probabilities.
    """
    theirs = {record["id"]: record for record in radix["records"]}
    out: list[dict[str, Any]] = []
    lost: set[str] = set()
    for mine in sorted(stock["records"], key=lambda r: r["id"].count(".")):
        if mine["id"].rpartition(".")[0] in lost:
            lost.add(mine["id"])
            continue
        other = theirs[mine["id"]]
        if mine["output"] == other["output"]:
            continue
        lost.add(mine["id"])
        at = next(
            i
            for i, pair in enumerate(zip(mine["output"], other["output"], strict=True))
            if pair[0] != pair[1]
        )
        entry = {
            "id": mine["id"],
            "at": at,
            "stock": mine["output"][at],
            "radix": other["output"][at],
            "gap": None,
            "top": [],
        }
        if "top" in mine:
            (best, first), (next_best, second) = mine["top"][at][:2]
            entry.update(gap=first - second, top=[best, next_best])
        out.append(entry)
    return out


def make_workloads(options: Options, text: bool) -> list[Workload]:
    """Build the workloads of one part, with its model's own tokenizer.

    Raises:
        TokenizerError: the model folder has no tokenizer.
    """
    model = options.text_model if text else options.model
    assert model is not None
    encode = load_encode(Path(model))
    pressures = [options.text_pressure] if text else options.pressures
    return [
        build(
            name,
            encode,
            num_blocks=options.text_blocks if text else options.blocks,
            block_size=options.block_size,
            pressure=pressure,
            seed=options.seed,
            max_tokens=options.text_max_tokens if text else None,
            stretch=2.0 if text else options.stretch,
        )
        for pressure in pressures
        for name in (options.text_workloads if text else options.workloads)
    ]


def versions() -> dict[str, str]:
    """Return the versions and the machine that a result depends on."""
    names = ("vllm", "vllm-radix", "torch", "transformers")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


def total_tokens(work: Workload) -> int:
    """Return the tokens of all prompts and answers: what a run takes is about that."""
    total = 0
    stack = [(root, 0) for root in work.roots]
    while stack:
        turn, before = stack.pop()
        tokens = before + len(turn.tokens) + turn.max_tokens
        total += tokens
        stack.extend((child, tokens) for child in turn.children)
    return total


def new_result(
    options: Options, workloads: dict[str, list[Workload]]
) -> dict[str, Any]:
    """Return a result without runs, ready for JSON."""
    asked = {
        "counts": [p for p in options.pressures for _ in options.workloads],
        "texts": [options.text_pressure] * len(workloads["texts"]),
    }
    cells = {
        part: [
            {
                "workload": work.name,
                "asked": pressure,
                "pressure": work.pressure,
                "runs": {name: [] for name in ARMS},
            }
            for work, pressure in zip(works, asked[part], strict=True)
        ]
        for part, works in workloads.items()
    }
    return {"versions": versions(), "options": asdict(options), **cells}


def all_workloads(options: Options) -> dict[str, list[Workload]]:
    """Return the workloads of both parts.

    Raises:
        InputError: a request does not fit its cache.
        TokenizerError: a model has no tokenizer.
    """
    workloads = {
        "counts": make_workloads(options, text=False),
        "texts": make_workloads(options, text=True) if options.text_model else [],
    }
    for part, works in workloads.items():
        settings_for(options, part == "texts", works)
    return workloads


def run(
    options: Options,
    workloads: dict[str, list[Workload]],
    result: dict[str, Any],
    pieces: Sequence[Piece],
    folder: Path,
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Run pieces and put their runs into a result.

    Args:
        options: what to run.
        workloads: of both parts.
        result: to complete; see ``new_result``.
        pieces: what it lacks; see ``plan``.
        folder: for the engines' logs.
        progress: told of each piece.
        save: called after each piece.

    Raises:
        ArmError: an engine did not come up or died.
    """
    for part, works in workloads.items():
        todo = [piece for piece in pieces if piece.part == part]
        if not todo:
            continue
        progress.begin(f"starting two engines for the {part}")
        sizes = [total_tokens(work) for work in works]
        left = sum(sizes[piece.index] for piece in todo)
        done, spent = 0, 0.0
        after = "; then the texts" if part == "counts" and workloads["texts"] else ""
        settings = settings_for(options, part == "texts", works)
        start = time.perf_counter()
        with both_arms(settings, folder, part) as arms:
            took = seconds_in_words(time.perf_counter() - start)
            progress.finish(f"{part}: two engines started: {took}")
            for piece in todo:
                work = works[piece.index]
                name = f"{part}: {work.name} at {work.pressure:.1f}x, {piece.arm}"
                if part == "counts":
                    name += f", run {piece.repeat + 1} of {options.repeats}"
                progress.begin(name)
                start = time.perf_counter()
                run_piece(piece, work, arms[piece.arm], result[part][piece.index])
                seconds = time.perf_counter() - start
                save()
                spent += seconds
                done += sizes[piece.index]
                left -= sizes[piece.index]
                rest = seconds_in_words(spent / done * left)
                to_go = f"about {rest} to go{after}" if left else ""
                progress.advance()
                progress.finish(f"{name}: {seconds_in_words(seconds)}", to_go)


def total_pieces(options: Options) -> int:
    """Return how many pieces a whole run has."""
    cells = len(options.workloads) * len(options.pressures) * options.repeats
    texts = len(options.text_workloads) if options.text_model else 0
    return len(ARMS) * (cells + texts)
