"""The command ``vllm-radix``.

Each subcommand's options and work are with its product, in ``vllm_radix_bench``; only
the one that is called is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import vllm_radix
from vllm_radix.extras import missing_extra

COMMANDS = {
    "ab": (
        "A/B of stock vLLM against radix on this machine",
        "vllm_radix_bench.ab.cli",
    ),
    "replay": (
        "what radix would do to a trace, without a model",
        "vllm_radix_bench.replay.cli",
    ),
}
"""Help of each subcommand, and the module that has ``add_arguments``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0; 1 when an A/B does not show what it should; 2 for bad input, and where a
        package of the extra ``bench`` is missing; 3 when an engine did not come up or
        died; 130 when interrupted.
    """
    try:
        return _main(argv)
    except ModuleNotFoundError as error:
        hint = missing_extra(error)
        if hint is None:
            raise
        print(f"vllm-radix: error: {hint}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="vllm-radix",
        description="Radix-tree KV cache and prefix-aware scheduling for vLLM.",
    )
    parser.add_argument("--version", action="version", version=vllm_radix.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (what, module) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        # No option stands before the subcommand but those that end the program.
        if words[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments, parser))


if __name__ == "__main__":
    sys.exit(main())
