"""Stages 4 and 6: a Llama of 8B shape in bf16 with dummy weights: A against B, seconds.

Both engines are up on the one device and take turns, A B then B A. First all requests
at once (as ``make ab``), then arrivals at a rate from what the first arm managed. Each
result is saved as it comes; the stage ends by itself at its limit.
"""

import os
from pathlib import Path

from arms import Arm, ArmError, Json, model_folder, start, traffic
from stage import BEFORE, INTERPRET, LOGS, WORK, Result, limit, main

SHAPE = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "head": 128,
    "inner": 14336,
}
SMALL_SHAPE = {
    "layers": 1,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 1,
    "head": 32,
    "inner": 64,
}
RADIX: dict[str, Json | None] = {
    "stock": None,
    "radix": {},
    "grouped": {"attention": "grouped"},
}
MODES: dict[str, Json] = {
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
        },
    },
    "eager": {"enforce_eager": True},
    # vLLM's default on its own torch; on an older one nobody has tried it.
    "compile": {"enforce_eager": False},
}
SHOWN = ("computed_prompt_tokens", "ttft_mean", "ttft_p99", "seconds")
COMPARED = (
    *SHOWN,
    "engine_steps",
    "ttft_p50",
    "requests_per_s",
    "generated_per_s",
    "itl_p50",
    "itl_p99",
    "schedule_ms_per_step",
)
"""What is put beside each other for the two arms."""


def number(name: str, normal: int, small: int) -> int:
    """Return a size: ``RADIX_GPU_<name>``, or the default of this machine."""
    return int(os.environ.get(f"RADIX_GPU_{name}", small if INTERPRET else normal))


def words(name: str, default: str) -> list[str]:
    """Return a list: ``RADIX_GPU_<name>``, or the default."""
    return os.environ.get(f"RADIX_GPU_{name}", default).split()


class Comparison:
    """Two arms in turns.

    Args:
        result: where it is kept.
        names: of the arms, the first is what the other is compared with.
    """

    def __init__(self, result: Result, names: list[str]) -> None:
        self.result, self.names = result, names
        self.limit = limit(300)
        self.up: dict[str, Arm] = {}
        self.made: dict[str, list[Json]] = {}
        self.rates: dict[str, float] = {}

    def prepare(self) -> Json:
        """Write the model, make the workloads; return the engine's arguments."""
        vocabulary = 512 if INTERPRET else 128256
        shape = SMALL_SHAPE if INTERPRET else SHAPE
        model = model_folder(
            Path(WORK / "8b"),
            vocabulary=vocabulary,
            **shape,  # type: ignore[arg-type]
        )
        blocks, size = number("BLOCKS", 2048, 32), number("BLOCK_SIZE", 16, 16)
        pressure = os.environ.get("RADIX_GPU_PRESSURE", "1.5" if INTERPRET else "4")
        longest, pressures = 0, {}
        for name in words("WORKLOADS", "few-shot agents chat documents control"):
            requests, most, real = traffic(
                name,
                vocabulary,
                num_blocks=blocks,
                block_size=size,
                pressure=float(pressure),
                seed=0,
                max_tokens=3 if INTERPRET else None,
                stretch=0.5 if INTERPRET else 1.0,
            )
            self.made[name] = requests
            longest, pressures[name] = max(longest, most), round(real, 2)
        token = 4 * shape["layers"] * shape["kv_heads"] * shape["head"]
        engine = {
            "model": model,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "attention_backend": "TRITON_ATTN",
            "block_size": size,
            "skip_tokenizer_init": True,
            "num_gpu_blocks_override": blocks + 1,
            "max_num_seqs": number("SEQS", 32, 8),
            "max_num_batched_tokens": number("BUDGET", 2048, 64),
            "max_model_len": longest + 1,
            "gpu_memory_utilization": 0.4,
            "kv_cache_memory_bytes": (blocks + 1) * size * token + (1 << 20),
            "async_scheduling": number("ASYNC", 1, 1) == 1,
        }
        counts = {name: len(requests) for name, requests in self.made.items()}
        setting = {**engine, "requests": counts, "pressures": pressures}
        self.result.put("setting", setting)
        return engine

    def start(self, engine: Json) -> bool:
        """Start both arms in the first mode that both take; return whether there is."""
        modes = words("MODES", "eager" if INTERPRET else "graphs eager")
        for mode in modes:
            settings = {
                name: {
                    "engine": {**engine, **MODES[mode]},
                    "radix": RADIX[name],
                    "before": BEFORE,
                }
                for name in self.names
            }
            self.up, down = start(settings, 120, LOGS)
            self.result.put(f"down, {mode}", down)
            if not down:
                self.result.put("mode", mode)
                about = {name: arm.description for name, arm in self.up.items()}
                self.result.put("up", about)
                return True
            self.stop()
        return False

    def warm_up(self) -> None:
        """Let kernels compile that compile at first use: in nobody's figures."""
        first = next(iter(self.made.values()))[0]
        for name, arm in self.up.items():
            requests = [
                {"id": str(i), "tokens": first["tokens"], "max_tokens": 4}
                for i in range(3)
            ]
            seconds = arm.ask({"requests": requests, "limit_s": 250}, 300)["seconds"]
            self.result.put(f"warm-up, {name}", seconds)

    def once(self, work: str, label: str, order: list[str], rate: float | None) -> bool:
        """Run one workload on both arms; return whether there was time."""
        for name in order:
            if self.result.seconds > self.limit:
                return False
            job = {
                "requests": self.made[work],
                "rate": rate,
                "limit_s": 900 if INTERPRET else 75,
                "attention": name == "grouped",
            }
            key = f"{work} {label} {name}"
            try:
                got = self.up[name].ask(job, 900 if INTERPRET else 150)
            except ArmError as error:
                self.result.put(key, {"error": str(error)})
                return False
            self.result.put(key, got, show=False)
            cells = ", ".join(f"{field} {got[field]:.4g}" for field in SHOWN)
            cut = " CUT SHORT" if got["truncated"] else ""
            self.result.say(f"{key}: {cells}{cut}")
            if name == self.names[0] and label == "burst 1":
                self.rates[work] = got["requests_per_s"]
        return True

    def compare(self) -> bool:
        """Run all workloads; return whether the limit cut none off."""
        works, turned = list(self.made), self.names[::-1]
        plan = [(work, "burst 1", self.names) for work in works]
        plan += [(work, "burst 2", turned) for work in works[:3]]
        plan += [(work, "arrivals at 1.2x", self.names) for work in works[:3]]
        plan += [(work, "burst 2", turned) for work in works[3:]]
        for work, label, order in plan:
            rate = 1.2 * self.rates[work] if label.startswith("arrivals") else None
            if not self.once(work, label, order, rate):
                self.result.put("cut short at", f"{work} {label}")
                return False
        return True

    def table(self) -> None:
        """Print and keep what both arms did, beside each other."""
        one, two = self.names
        rows: dict[str, Json] = {}
        for key, value in list(self.result.data.items()):
            label = key.removesuffix(f" {one}")
            other = self.result.data.get(f"{label} {two}", {})
            if label != key and all(
                isinstance(run, dict) and "ttft_mean" in run for run in (value, other)
            ):
                rows[label] = {
                    name: [
                        value[name],
                        other[name],
                        round(other[name] / value[name], 3) if value[name] else None,
                    ]
                    for name in COMPARED
                }
        self.result.put("table", rows, show=False)
        print(f"{'':34} " + " ".join(f"{name:>22}" for name in SHOWN))
        for label, row in rows.items():
            cells = (row[name] for name in SHOWN)
            text = " ".join(f"{a:9.4g} > {b:<9.4g}" for a, b, _ in cells)
            print(f"{label:34} {text}")

    def stop(self) -> None:
        """End the arms."""
        for arm in self.up.values():
            arm.stop()


def run(made: type[Comparison] = Comparison, name: str = "4-ab") -> bool:
    """Run the stage; return whether both arms ran all there was time for.

    Args:
        made: what is compared.
        name: of the result, if the environment gives none.
    """
    result = Result(os.environ.get("RADIX_GPU_NAME", name))
    comparison = made(result, words("ARMS", "stock radix"))
    engine = comparison.prepare()
    if not comparison.start(engine):
        return False
    try:
        comparison.warm_up()
        comparison.compare()
        comparison.table()
    finally:
        comparison.stop()
    return bool(result.data["table"])


if __name__ == "__main__":
    main(run)
