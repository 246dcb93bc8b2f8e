"""``python -m vllm_radix_bench.attention``: see ``cli``."""

import sys

from vllm_radix_bench.attention.cli import main

if __name__ == "__main__":
    sys.exit(main())
