"""The order of an A/B's pieces: what runs when, on which server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_radix_bench.ab.servers import ARMS

ANSWERS = 0
"""The round whose answers are compared. It also warms the servers; it is not timed."""


@dataclass(frozen=True)
class Cell:
    """One load, as it is sent.

    Attributes:
        load: number of it.
        blocks: of the cache; None for what the server makes of its options.
        rate: of arrivals, a second; None for those of the load itself.
    """

    load: int
    blocks: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Piece:
    """A cell to run once, on one arm.

    Attributes:
        cell: number of it.
        round: number of the run; ``ANSWERS`` is the first.
        arm: that runs it.
    """

    cell: int
    round: int
    arm: str


def cells(
    loads: int, blocks: Sequence[int | None], rates: Sequence[float | None]
) -> list[Cell]:
    """Return all cells, those of one cache together: servers start anew for another."""
    return [
        Cell(load, size, rate)
        for size in blocks
        for rate in rates
        for load in range(loads)
    ]


def pieces(
    all_cells: Sequence[Cell], rounds: int, together: bool, done: set[tuple[int, int]]
) -> Iterator[Piece]:
    """Yield what is to be run, in order.

    Arms take turns, A B, B A, so that a drift of the machine's speed meets both; with
    one server at a time, each runs the end of a round and the beginning of the next.

    Args:
        all_cells: to run.
        rounds: of times, beside the one whose answers are compared.
        together: whether both servers are up at once.
        done: numbers of cells and rounds that need not be run.
    """
    sizes = list(dict.fromkeys(cell.blocks for cell in all_cells))
    for size in sizes:
        numbers = [n for n, cell in enumerate(all_cells) if cell.blocks == size]
        for number in range(rounds + 1):
            todo = [n for n in numbers if (n, number) not in done]
            arms = ARMS if number % 2 == 0 else ARMS[::-1]
            if together:
                for at, cell in enumerate(todo):
                    for arm in arms if at % 2 == 0 else arms[::-1]:
                        yield Piece(cell, number, arm)
            else:
                for arm in arms:
                    for cell in todo:
                        yield Piece(cell, number, arm)


def finished(result: dict[str, Any]) -> set[tuple[int, int]]:
    """Return the cells and rounds that both arms have run.

    What only one arm has run is removed from the result: its times have no pair.
    """
    done = set()
    for number, cell in enumerate(result["cells"]):
        for name, runs in list(cell["rounds"].items()):
            if all(arm in runs for arm in ARMS):
                done.add((number, int(name)))
            else:
                del cell["rounds"][name]
    return done
