"""Run a study: ``python -m vllm_radix_bench.study small``, or another by its name."""

import argparse
import importlib
import sys


def main() -> int:
    """Run the study that is named, with its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study", description=__doc__
    )
    parser.add_argument(
        "study",
        choices=("small", "large", "hybrid", "eviction", "hints", "engines", "scale"),
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the study")
    arguments = parser.parse_args()
    study = importlib.import_module(f"vllm_radix_bench.study.{arguments.study}")
    return int(study.main(arguments.options))


if __name__ == "__main__":
    sys.exit(main())
