"""Many questions about a few sets of examples, answered offline with radix.

Run: python examples/few_shot_offline.py MODEL [--stock]
"""

import argparse
import random

from vllm import LLM, SamplingParams

import vllm_radix

TASKS = {
    "opposites": ["hot: cold", "early: late", "full: empty", "near: far"],
    "colours": ["grass: green", "snow: white", "coal: black", "blood: red"],
    "plurals": ["mouse: mice", "child: children", "leaf: leaves", "ox: oxen"],
    "animals": ["wool: sheep", "milk: cow", "honey: bee", "egg: hen"],
}
WORDS = ["tall", "sky", "goose", "feather", "wet", "lemon", "tooth", "silk"]


def prompts() -> list[str]:
    """Return the questions, in no order of tasks: as they come from many users."""
    made = [
        f"Go on with the list of {task}.\n" + "\n".join(examples * 18) + f"\n{word}:"
        for task, examples in TASKS.items()
        for word in WORDS
    ]
    random.Random(0).shuffle(made)
    return made


def main() -> None:
    """Answer all questions and say how much of the prompts was cached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--stock", action="store_true", help="without radix")
    arguments = parser.parse_args()
    engine = {
        "model": arguments.model,
        "max_model_len": 512,
        "max_num_seqs": 4,
        # A cache that cannot hold all tasks at once, in blocks of 32 tokens.
        "block_size": 32,
        "num_gpu_blocks_override": 24,
        "enforce_eager": True,
    }
    llm = LLM(**(engine if arguments.stock else vllm_radix.enable(engine)))
    sampling = SamplingParams(temperature=0, max_tokens=4)
    outputs = llm.generate(prompts(), sampling, use_tqdm=False)
    total = sum(len(output.prompt_token_ids or ()) for output in outputs)
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    print(f"{len(outputs)} answers; {cached} of {total} prompt tokens were cached")


if __name__ == "__main__":
    main()
