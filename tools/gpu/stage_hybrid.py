"""Stage 7: hybrid toys on the real engine, and the kernel of gated delta nets alone.

Toys of some layers with weights that matter: windows, Mamba2 states, and states of a
gated delta net, beside full attention. Asynchronous, model runner V2. Shown are:

- answers: stock's and radix's are equal, with hits inside blocks, evictions and
  preemptions; ties as in stage 3. A changed early block moves log-probabilities far
  more than the arms differ.
- checkpoints: Mamba2's kernel hands out a state from inside a step. A request goes on
  from one, and its answer is stock's.
- drafts: with n-grams beside states, which are guessed side by side, the same is asked.
- grain: the delta rule's kernel over a prompt, whole and in two parts. Cut at multiples
  of 64 tokens both give the same bits. The toy itself is in bfloat16, where products of
  other sizes round otherwise: its hits are checked and its differences recorded.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from arms import ArmError, Json, compare, start
from hybrid_toys import (
    AFTER_IT,
    CHECKPOINT,
    ToyMix,
    distance,
    effect_of_a_block,
    toy_folder,
)
from stage import BEFORE, INTERPRET, LOGS, WORK, Result, limit, main

TOYS: dict[str, Json] = {
    "windows": {
        "block_size": 32,
        "num_gpu_blocks_override": 96,
        "max_model_len": 768,
    },
    "falcon_h1": {"num_gpu_blocks_override": 20},
    "nemotron_h": {"num_gpu_blocks_override": 30},
    "granite4": {"num_gpu_blocks_override": 30},
    "qwen3_next": {"num_gpu_blocks_override": 60, "dtype": "bfloat16"},
    # Each running request has a block more for each guess, in each group of states.
    "falcon_h1+drafts": {"num_gpu_blocks_override": 90},
    "qwen3_next+drafts": {"num_gpu_blocks_override": 200, "dtype": "bfloat16"},
}
"""Toys, and what is special about their engines."""

NGRAM: Json = {
    "method": "ngram_gpu",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}

DEFAULT = "windows falcon_h1"
PATIENCE = {"windows": 60}
"""Seconds in which an engine says nothing; others tune kernels as they start."""
ARMS: dict[str, Json | None] = {"stock": None, "radix": {}}
DELTA = {"qwen3_next", "qwen3_next+drafts"}
GRAIN = 64
WINDOW_BLOCK = 256
"""What a toy with windows takes for a block: more than its window."""

EXACT = {"TRITON_F32_DEFAULT": "ieee"}
# Of what custom operations compute, the stand-ins have a Llama's only.
NATIVE = {"mode": 0, "custom_ops": ["none"]}
CLOSE = 1e-3
"""Log-probabilities in float32 that are the same."""


def settings(toy: str, radix: Json | None) -> Json:
    """Return an arm's settings."""
    dtype = TOYS[toy].get("dtype", "float32")
    name, _, drafts = toy.partition("+")
    engine = {
        "model": toy_folder(WORK / "toys" / toy, name, dtype=dtype),
        "load_format": "dummy",
        "dtype": dtype,
        "attention_backend": "TRITON_ATTN",
        "enforce_eager": True,
        "compilation_config": NATIVE,
        "skip_tokenizer_init": True,
        "max_num_seqs": 6,
        "max_model_len": 2048,
        "max_num_batched_tokens": 1024,
        "async_scheduling": True,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.1,
        **TOYS[toy],
    }
    if drafts:
        engine["speculative_config"] = NGRAM
    before = [*BEFORE, "hybrid_toys:fill_weights"]
    return {"engine": engine, "radix": radix, "env": EXACT, "before": before}


def mix_for(toy: str, block: int) -> ToyMix:
    """Return what a toy with blocks of so many tokens is asked."""
    if INTERPRET:
        return ToyMix(96, answer=3)
    block = WINDOW_BLOCK if "block_size" in TOYS[toy] else block
    return ToyMix(block, continued=toy not in DELTA)


def is_right(toy: str, found: Json) -> bool:
    """Return whether what was found of a toy is as it should be."""
    stock, radix = found["stock"], found["radix"]
    good = not any(one["held_blocks"] or one["truncated"] for one in (stock, radix))
    fewer = "computed_prompt_tokens"
    good = good and radix[fewer] < stock[fewer]
    good = good and all(about["async"] for about in found["up"].values())
    good = good and all(about["v2_runner"] for about in found["up"].values())
    if toy in DELTA:
        return good and not any(n % GRAIN for n in found["cached"].values())
    good = good and not found["answers"]["wrong"] and radix["copies"] > 0
    good = good and found["distance"] < CLOSE < found["effect of a block"] / 10
    if toy == "windows":
        return bool(good)
    return bool(good and radix["checkpoints"] and found["cached"][AFTER_IT])


def serve(toy: str, result: Result) -> bool:
    """Serve a toy's requests with both arms; return whether all is right."""
    wanted = {name: settings(toy, radix) for name, radix in ARMS.items()}
    patience = PATIENCE.get(toy, 240)
    up, down = start(wanted, 300 if INTERPRET else patience, LOGS / toy)
    found: Json = {"up": {n: a.description for n, a in up.items()}, "down": down}
    answers: Json = {}
    requests: list[Json] = []
    try:
        for name, arm in up.items() if not down else ():
            requests = mix_for(toy, arm.description["block_size"]).requests
            job = {
                "requests": requests,
                "answers": True,
                "logprobs": 2,
                "limit_s": 900 if INTERPRET else 2 * patience,
                "within": ["hybrid_toys:counted_checkpoints"],
            }
            found[name] = arm.ask(job, 900 if INTERPRET else 3 * patience)
            answers[name] = found[name].pop("answers")
    except ArmError as error:
        found["error"] = str(error)
    for arm in up.values():
        arm.stop()
    if answers.keys() == ARMS.keys():
        stock, radix = answers.values()
        found["answers"] = compare(stock, radix, requests)
        found["distance"] = distance(stock, radix)
        found["effect of a block"] = effect_of_a_block(radix)
        found["cached"] = {name: radix[name]["cached"] for name in radix}
        found["checkpoint is of"] = CHECKPOINT
        found["good"] = is_right(toy, found)
    result.put(toy, found)
    return found.get("good") is True


def kernel_of_the_delta_rule() -> Callable[..., Any]:
    """Return vLLM's."""
    from vllm.third_party.flash_linear_attention.ops.chunk import (
        chunk_gated_delta_rule,
    )

    return partial(chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True)


def delta_rule(
    rule: Callable[..., Any],
    device: str,
    tokens: int = 512,
    heads: int = 8,
    size: int = 128,
) -> dict[str, Json]:
    """Compare the delta rule's kernel over a prompt, whole and cut in two.

    Args:
        rule: the kernel.
        device: to compute on.
        tokens: of the prompt.
        heads: of keys; values have twice as many.
        size: of a head.

    Returns:
        By the type in which the state is kept, and by the cut: how far outputs and
        the last state differ at most; 0 for the same bits.
    """
    import torch

    torch.manual_seed(0)
    made = {
        name: torch.randn(1, tokens, count, size).to(device, torch.bfloat16)
        for name, count in (("q", heads), ("k", heads), ("v", 2 * heads))
    }
    rates = torch.rand(1, tokens, 2 * heads)
    made["g"] = (-0.05 * rates).to(device)
    made["beta"] = torch.rand(1, tokens, 2 * heads).to(device, torch.bfloat16)

    def run(first: int, end: int, state: Any) -> tuple[Any, Any]:
        part = {name: value[:, first:end] for name, value in made.items()}
        out, last = rule(
            **{name: value.contiguous() for name, value in part.items()},
            initial_state=state,
            output_final_state=True,
        )
        return out, last

    nothing = torch.zeros(1, 2 * heads, size, size, device=device)
    found: dict[str, Json] = {}
    with torch.no_grad():
        out, last = run(0, tokens, nothing)
        cuts = [*range(GRAIN, tokens, GRAIN), GRAIN // 2, GRAIN + 1, tokens - 5]
        for dtype in (torch.float32, torch.bfloat16):
            differ = found[str(dtype).removeprefix("torch.")] = {}
            for cut in cuts:
                head, kept = run(0, cut, nothing)
                tail, end = run(cut, tokens, kept.to(dtype).float())
                both = torch.cat([head, tail], dim=1)
                gaps = (both - out).abs().max(), (end - last).abs().max()
                differ[str(cut)] = max(float(gap) for gap in gaps)
    return found


def grain_is_right(found: dict[str, Json]) -> bool:
    """Return whether cuts at multiples of the grain gave the same bits."""
    gaps = found["float32"]
    return all(not gap for cut, gap in gaps.items() if int(cut) % GRAIN == 0)


def run() -> bool:
    """Run the stage; return whether all is right."""
    result = Result("7-hybrid")
    end = limit(240)
    good = True
    names = os.environ.get("RADIX_GPU_TOYS", "windows" if INTERPRET else DEFAULT)
    for toy in names.split():
        if result.seconds > end:
            result.put("cut short at", toy)
            good = False
            break
        good = serve(toy, result) and good
    if not INTERPRET:
        found = result.attempt(
            "delta rule", lambda: delta_rule(kernel_of_the_delta_rule(), "cuda")
        )
        good = found is not None and grain_is_right(found) and good
    result.put("good", good)
    return good


if __name__ == "__main__":
    main(run)
