"""Stage 3: a small model with random weights on the real engine: do answers agree?

float32, greedy, prefixes shared, a cache that does not hold them, hits inside blocks.
Each arm is compared with stock in the same mode (asynchronous, or asynchronous with
graphs): stock differs from itself between modes where the model is undecided. A
difference at a token whose two likeliest are within 1e-3 is a tie. The grouped arm
groups whatever shares a block (``engine_arm.always_group``): the planner would leave
so small a model to vLLM.
"""

import os
from typing import Any

from arms import ArmError, compare, model_folder, start, traffic
from stage import BEFORE, INTERPRET, LOGS, WORK, Result, limit, main

VOCABULARY = 512
SIZES = {
    "layers": 2,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 2,
    "head": 64,
    "inner": 512,
}
SMALL_SIZES = {**SIZES, "layers": 1, "hidden": 64, "heads": 2, "kv_heads": 1}
BASE = {
    "stock": None,
    "radix": "stock",
    "grouped": "stock",
    "stock-graphs": None,
    "radix-graphs": "stock-graphs",
    "stock-sync": None,
    "radix-sync": "stock-sync",
}
"""Arms, and what each is compared with; without ``-sync`` they are asynchronous."""

DEFAULT = "stock radix grouped stock-graphs radix-graphs"
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8],
}
TIES = 0.05
EXACT = {"TRITON_F32_DEFAULT": "ieee"}
"""Variables of arms: vLLM's kernel would multiply float32 in TF32, ours does not."""


def settings(name: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Return an arm's settings, from its name."""
    kind, _, mode = name.partition("-")
    radix = {"stock": None, "radix": {}, "grouped": {"attention": "grouped"}}[kind]
    engine = {**engine, "async_scheduling": mode != "sync"}
    if mode == "graphs":
        engine |= {"enforce_eager": False, "compilation_config": GRAPHS}
    before = [*BEFORE, "engine_arm:always_group"] if kind == "grouped" else BEFORE
    return {"engine": engine, "radix": radix, "env": EXACT, "before": before}


def run() -> bool:
    """Run the stage; return whether all arms came up and agree."""
    result = Result("3-smoke")
    sizes = SMALL_SIZES if INTERPRET else SIZES
    model = model_folder(
        WORK / "tiny",
        vocabulary=VOCABULARY,
        seed=1,
        scale=0.2 if INTERPRET else 0.06,
        dtype="float32",
        **sizes,  # type: ignore[arg-type]
    )
    blocks = 32 if INTERPRET else 256
    shape: dict[str, Any] = {"pressure": 3.0, "max_tokens": None, "stretch": 1.0}
    if INTERPRET:
        shape = {"pressure": 1.0, "max_tokens": 8, "stretch": 0.5}
    made = {
        name: traffic(
            name, VOCABULARY, num_blocks=blocks, block_size=16, seed=0, **shape
        )
        for name in (["few-shot"] if INTERPRET else ["few-shot", "agents", "chat"])
    }
    engine = {
        "model": model,
        "dtype": "float32",
        "attention_backend": "TRITON_ATTN",
        "block_size": 16,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "num_gpu_blocks_override": blocks + 1,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64 if INTERPRET else 512,
        "max_model_len": max(longest for _, longest, _ in made.values()) + 1,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.1,
    }
    names = os.environ.get("RADIX_GPU_ARMS_SMOKE", DEFAULT).split()
    up, down = start({name: settings(name, engine) for name in names}, limit(120), LOGS)
    result.put("up", {name: arm.description for name, arm in up.items()})
    result.put("down", down)
    good = not down
    for job, (requests, _, _) in made.items():
        answers: dict[str, Any] = {}
        for name, arm in list(up.items()):
            ask = {
                "requests": requests,
                "answers": True,
                "logprobs": 2,
                "limit_s": 500 if INTERPRET else 30,
                "attention": name.startswith("grouped"),
            }
            try:
                got = arm.ask(ask, 600 if INTERPRET else 60)
            except ArmError as error:
                result.put(f"{job} {name}", {"error": str(error)})
                up.pop(name).stop()
                good = False
                continue
            answers[name] = got.pop("answers")
            good = good and not got["held_blocks"] and not got["truncated"]
            if "attention" in got:
                good = good and got["attention"]["grouped_steps"] > 0
            result.put(f"{job} {name}", got)
        for name, theirs in answers.items():
            base = BASE[name]
            if base in answers:
                found = compare(answers[base], theirs, requests)
                result.put(f"{job} {name} against {base}", found)
                good = good and not found["wrong"]
                good = good and found["ties"] <= TIES * found["compared"]
    for arm in up.values():
        arm.stop()
    result.put("good", good)
    return good


if __name__ == "__main__":
    main(run)
