"""The A/B: stock vLLM and radix on the same requests, cache and machine.

Both engines are up at once, each in its own process, and take turns (A B, B A,
...), so that a drift of the machine's speed meets both. Counts come first: they
are the same in every run. Times are given with their spread.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_radix_bench.ab.arm import Settings, as_request
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.workloads.builders import SERVED
from vllm_radix_bench.workloads.encoders import load_encode
from vllm_radix_bench.workloads.sizing import build
from vllm_radix_bench.workloads.turn import Workload, longest_path

ARMS = ("stock", "radix")
GAP = 1e-3
"""Top-2 log-probability gap under which a greedy choice may go either way."""

Progress = Callable[[str], None]


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
    repeats: int = 2
    seed: int = 0
    radix: dict[str, Any] = field(default_factory=dict)
    gpu_memory_utilization: float = 0.42


class ArmError(RuntimeError):
    """An arm's process died; the message holds the end of its log."""


class ArmProcess:
    """One arm, in a process of its own.

    Args:
        name: ``stock`` or ``radix``.
        settings: of its engine.
        log: file for everything the process prints.
    """

    def __init__(self, name: str, settings: Settings, log: Path) -> None:
        self.name = name
        self._log = log
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "vllm_radix_bench.ab.arm"]
        command += [json.dumps(asdict(settings)), str(writing)]
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self._replies = os.fdopen(reading)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a workload and return its result."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, or its absence, tells
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """Wait for the next reply.

        Raises:
            ArmError: the process has ended.
        """
        line = self._replies.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise ArmError(f"the {self.name} arm ended early; its log ends:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def wait_until_ready(self) -> None:
        """Wait for the engine to be up, and check that it is the right one.

        Raises:
            ArmError: it is not, or it did not come up.
        """
        found = self.reply()
        if self.name == "stock" and found["plugin_imported"]:
            raise ArmError("the stock arm has imported vllm_radix")
        if self.name == "radix" and "Radix" not in found["manager"]:
            raise ArmError(f"the radix arm runs {found['manager']}")

    def stop(self) -> None:
        """End the process; whatever it had to say has been said."""
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._replies.close()


@contextmanager
def both_arms(
    settings: dict[str, Settings], folder: Path, label: str
) -> Iterator[dict[str, ArmProcess]]:
    """Start both arms, wait until they are ready, end them in any case."""
    # vLLM measures a GPU's free memory as it starts: one at a time there.
    at_once = "cpu" in version("vllm")
    with ExitStack() as stack:
        arms = {}
        for name in ARMS:
            log = folder / f"ab-{label}-{name}.log"
            arms[name] = ArmProcess(name, settings[name], log)
            stack.callback(arms[name].stop)
            if not at_once:
                arms[name].wait_until_ready()
        if at_once:
            for arm in arms.values():
                arm.wait_until_ready()
        yield arms


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


def run_counts(
    options: Options, workloads: list[Workload], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Run all workloads on both arms, ``repeats`` times in turns."""
    progress("starting two engines")
    settings = settings_for(options, False, workloads)
    with both_arms(settings, folder, "counts") as arms:
        runs: list[dict[str, list[Any]]] = [
            {name: [] for name in ARMS} for _ in workloads
        ]
        for repeat in range(options.repeats):
            for index, work in enumerate(workloads):
                for name in ARMS if (repeat + index) % 2 == 0 else ARMS[::-1]:
                    progress(
                        f"{work.name} at {work.pressure:.1f}x, {name}, "
                        f"run {repeat + 1} of {options.repeats}"
                    )
                    result = arms[name].ask(as_request(work.roots))
                    runs[index][name].append(result)
    return [
        {"workload": work.name, "pressure": work.pressure, "runs": done}
        for work, done in zip(workloads, runs, strict=True)
    ]


def run_texts(
    options: Options, workloads: list[Workload], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Run short workloads on the text model and compare the greedy answers."""
    cells = []
    progress("starting two engines with the text model")
    settings = settings_for(options, True, workloads)
    with both_arms(settings, folder, "texts") as arms:
        for work in workloads:
            results = {}
            for name in ARMS:
                progress(f"texts of {work.name}, {name}")
                results[name] = arms[name].ask(as_request(work.roots, top_logprobs=2))
            cells.append(
                {
                    "workload": work.name,
                    "pressure": work.pressure,
                    "differences": differences(results["stock"], results["radix"]),
                    "runs": {name: [result] for name, result in results.items()},
                }
            )
    return cells


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


def run(
    options: Options,
    folder: Path,
    progress: Progress,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the whole A/B.

    Args:
        options: what to run.
        folder: for the engines' logs.
        progress: called with a line before each piece of work.
        save: called with the result so far, after each part.

    Returns:
        The result, ready for JSON.

    Raises:
        InputError: before anything is started.
        TokenizerError: likewise.
        ArmError: an engine did not come up or died.
    """
    counts = make_workloads(options, text=False)
    texts = make_workloads(options, text=True) if options.text_model else []
    for part, workloads in ((False, counts), (True, texts)):
        settings_for(options, part, workloads)
    result: dict[str, Any] = {
        "versions": versions(),
        "options": asdict(options),
        "counts": run_counts(options, counts, folder, progress),
        "texts": [],
    }
    save(result)
    if texts:
        result["texts"] = run_texts(options, texts, folder, progress)
        save(result)
    return result


def total_pieces(options: Options) -> int:
    """Return how often ``progress`` will be called."""
    cells = len(options.workloads) * len(options.pressures)
    texts = 1 + 2 * len(options.text_workloads) if options.text_model else 0
    return 1 + 2 * cells * options.repeats + texts
