"""Run a study: ``python -m vllm_radix_bench.study small``, ``large`` or ``hybrid``."""

import argparse
import importlib
import sys


def main() -> int:
    """Run the study that is named, with its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study", description=__doc__
    )
    parser.add_argument("study", choices=("small", "large", "hybrid"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the study")
    arguments = parser.parse_args()
    study = importlib.import_module(f"vllm_radix_bench.study.{arguments.study}")
    return int(study.main(arguments.options))


if __name__ == "__main__":
    sys.exit(main())
