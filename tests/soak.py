"""A million random operations, with every invariant checked after each.

    make soak

Half of them on the tree beside its oracle, half on the whole engine double, each shared
out among the eviction policies: the state machines of the tests, at length. Prints what
was run; fails on the first violation, with the shortest way to it.
"""

import sys
import time

from engine.test_engine_machine import MACHINES as ENGINES
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm

from tree.test_machine import MACHINES

ROUND = settings(
    max_examples=500,
    stateful_step_count=60,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def soak(machine, operations: int) -> None:
    """Run a machine until it has done so many operations."""
    machine.actions = 0
    start = time.monotonic()
    with tqdm(total=operations, unit=" operations", desc=machine.__name__) as bar:
        while machine.actions < operations:
            run_state_machine_as_test(machine, settings=ROUND)
            bar.update(machine.actions - bar.n)
    seconds = time.monotonic() - start
    print(
        f"{machine.__name__}: {machine.actions:,} operations, 0 violations, 0 leaks, "
        f"{seconds:.0f} s"
    )


def main() -> None:
    """Run the soak."""
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    for machine in (*MACHINES.values(), *ENGINES.values()):
        soak(machine, operations // 2 // len(MACHINES))


if __name__ == "__main__":
    main()
