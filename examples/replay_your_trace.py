"""A trace of one's own, replayed through vLLM's scheduler without a model.

Run: python examples/replay_your_trace.py [TRACE.jsonl] [BLOCKS]
"""

import json
import sys
from pathlib import Path

from vllm_radix.cli import main as vllm_radix

HERE = Path(__file__).parent


def main() -> None:
    """Replay the trace, and say in a sentence what radix saved."""
    trace = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "trace.jsonl")
    blocks = sys.argv[2] if len(sys.argv) > 2 else "20"
    output = Path("replay.json")
    words = ["replay", trace, "--blocks", blocks, "--no-oracle"]
    status = vllm_radix([*words, "--output", str(output)])
    if status:
        raise SystemExit(status)
    arms = json.loads(output.read_text())["cells"][0]["arms"]
    stock, radix = (arms[name]["computed_prompt_tokens"] for name in ("stock", "radix"))
    print(f"Prompt tokens computed: {stock:,} → {radix:,}.")


if __name__ == "__main__":
    main()
