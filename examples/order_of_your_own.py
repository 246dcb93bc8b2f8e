"""An order of waiting requests of one's own, compared with the default.

Run: python examples/order_of_your_own.py
"""

import json
from pathlib import Path

from vllm_radix.cli import main as vllm_radix
from vllm_radix.policy import ORDERS, Order, QueueView


class LargestShare(Order):
    """The largest cached share of a prompt first."""

    name = "largest-share"

    def scores(self, view: QueueView):
        """Return the cached share, negative: the lowest score goes first."""
        return (-view.cached * view.block_size / view.tokens,)


ORDERS[LargestShare.name] = LargestShare


def main() -> None:
    """Replay a chat workload with stock, the default and the new order."""
    output = Path("orders.json")
    arms = ["stock", "radix", f'radix:{{"policy": "{LargestShare.name}"}}']
    words = ["replay", "--workload", "chat", "--pressure", "4", "--blocks", "500"]
    words += ["--max-num-seqs", "16", "--no-oracle", "--output", str(output)]
    status = vllm_radix([*words, "--arms", *arms])
    if status:
        raise SystemExit(status)
    for name, arm in json.loads(output.read_text())["cells"][0]["arms"].items():
        computed, ttft = arm["computed_prompt_tokens"], arm["ttft"]
        print(f"{name}: {computed:,} tokens; first token after {ttft['mean']:.2f} s,")
        print(f"  99th percentile {ttft['p99']:.2f} s")


if __name__ == "__main__":
    main()
