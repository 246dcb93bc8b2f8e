"""Runs ``vllm bench serve`` many times in one process; started by ``loads.bench``.

Reads one list of its options a line and writes one result a line to a file descriptor;
what vLLM prints goes to the log. Requests are made anew from the seed each time, so
that they are the same for both arms.
"""

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

_KEPT = (
    "start_times",
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "errors",
    "generated_texts",
)


def run(words: list[str]) -> dict[str, Any]:
    """Return what a run of ``vllm bench serve`` found."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result = asyncio.run(main_async(parser.parse_args(words)))
    return {name: result.get(name) for name in _KEPT}


def _end_with(parent: int) -> None:
    """End this process when the command has ended, however it did."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Serve runs until standard input ends, or the command does."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        for line in sys.stdin:
            try:
                reply: dict[str, Any] = run(json.loads(line))
            except SystemExit:
                reply = {"failure": "its options are wrong"}
            except Exception as error:
                reply = {"failure": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
