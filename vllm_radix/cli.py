"""The command ``vllm-radix``.

Each subcommand's options and work are with its product, in ``vllm_radix_bench``; only
the one that is called is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import vllm_radix
from vllm_radix.exits import EPILOG, say_why

COMMANDS = {
    "doctor": (
        "whether a server will start with radix, and what to do if not",
        "vllm_radix_bench.doctor.cli",
    ),
    "ab": (
        "A/B of stock vLLM against radix, on real servers or in this process",
        "vllm_radix_bench.ab.cli",
    ),
    "replay": (
        "what radix would do to a trace, without a model",
        "vllm_radix_bench.replay.cli",
    ),
    "top": (
        "what a running server does, from its metrics",
        "vllm_radix_bench.top.cli",
    ),
}
"""Help of each subcommand, and the module that has ``add_arguments``.

A module may have ``variant``, which takes the words and returns another module to use,
and ``PASSES_OPTIONS``: then words that its parser does not know become
``arguments.others``, and those after ``--`` ``arguments.after``.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end the program."""
        self.exit(2, f"{self.prog}: {message}\n")


def _module(name: str, words: Sequence[str]) -> Any:
    """Return the module that serves a subcommand's words."""
    module: Any = importlib.import_module(name)
    variant = getattr(module, "variant", None)
    return (variant and variant(words)) or module


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before and after the first ``--``."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code, one of ``ExitCode``. Bad input ends the program.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
        prog="vllm-radix",
        description="Radix-tree KV cache and prefix-aware scheduling for vLLM.",
    )
    parser.add_argument("--version", action="version", version=vllm_radix.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    called = parser
    after: list[str] | None = None
    try:
        for name, (what, module) in COMMANDS.items():
            command = commands.add_parser(name, help=what, epilog=EPILOG)
            # No option stands before the subcommand but those that end the program.
            if words[:1] == [name]:
                called = command
                command.add_argument(
                    "--debug",
                    action="store_true",
                    help="show the traceback of an unexpected error",
                )
                found = _module(module, words)
                found.add_arguments(command)
                if getattr(found, "PASSES_OPTIONS", False):
                    words, after = _split(words)
        arguments, unknown = parser.parse_known_args(words)
        if after is not None:
            arguments.others, arguments.after = unknown, after
        elif unknown:
            called.error(f"unrecognized arguments: {' '.join(unknown)}")
        return int(arguments.run(arguments, called))
    except (Exception, KeyboardInterrupt) as error:
        return say_why(called.prog, error, debug="--debug" in words)


if __name__ == "__main__":
    sys.exit(main())
