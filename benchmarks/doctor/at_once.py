"""Waiting for many servers no longer than for the slowest of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_MOST = 64
"""Threads: each waits for a server, and does nothing else."""
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def at_once(
    function: Callable[[_Item], _Found], items: Sequence[_Item]
) -> list[_Found]:
    """Return what a function returns of each item, in order, called at once."""
    if not items:
        return []
    with ThreadPoolExecutor(min(len(items), _MOST)) as pool:
        return [*pool.map(function, items)]
