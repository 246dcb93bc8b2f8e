"""Tile sizes by architecture: chosen ahead of time, never at request time.

Each was compiled for its target, as the largest tile found that spills no register
(``make aot``, ``kernels/aot.json``). None has been timed on a device yet.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up.

    Attributes:
        m: query rows x query heads per KV head of a tile; a power of two.
        n: keys per step; a power of two.
        warps: warps per program.
        stages: software pipeline stages.
    """

    m: int
    n: int
    warps: int
    stages: int


MAX_HEAD_SIZE = 256

_SMALL, _LARGE = 128, MAX_HEAD_SIZE
"""Head sizes up to which a column of the table holds, padded to a power of two."""

_TABLE: dict[str, dict[int, Tile]] = {
    "sm_80": {_SMALL: Tile(64, 32, 4, 2), _LARGE: Tile(64, 32, 8, 2)},
    "sm_89": {_SMALL: Tile(64, 32, 4, 2), _LARGE: Tile(64, 32, 8, 2)},
    "sm_90": {_SMALL: Tile(64, 64, 4, 2), _LARGE: Tile(64, 32, 8, 3)},
    "sm_100": {_SMALL: Tile(64, 64, 8, 2), _LARGE: Tile(64, 32, 8, 1)},
    "sm_120": {_SMALL: Tile(64, 32, 8, 2), _LARGE: Tile(64, 32, 8, 2)},
    "gfx942": {_SMALL: Tile(64, 64, 4, 1), _LARGE: Tile(64, 32, 8, 1)},
    "gfx950": {_SMALL: Tile(64, 64, 4, 1), _LARGE: Tile(64, 32, 8, 1)},
    # Each step costs Python here, whatever its width.
    "interpreter": {_SMALL: Tile(64, 256, 1, 1), _LARGE: Tile(64, 256, 1, 1)},
}

ARCHITECTURES = tuple(name for name in _TABLE if name != "interpreter")


def choose(architecture: str, head_size: int, group: int, dtype: torch.dtype) -> Tile:
    """Return the tile for a layer.

    Args:
        architecture: of ``ARCHITECTURES``, or ``interpreter``. Others of the same
            vendor take the nearest older one.
        head_size: elements of a head, at most 256.
        group: query heads per KV head.
        dtype: of the queries. float32 takes half the keys per step.

    Raises:
        ValueError: a head is larger than 256, or the architecture unknown.
    """
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"head size {head_size} is not one of 1 to {MAX_HEAD_SIZE}")
    row = _TABLE[table_name(architecture)]
    tile = row[_SMALL if head_size <= _SMALL else _LARGE]
    m, n = tile.m, tile.n
    if dtype == torch.float32 and architecture != "interpreter":
        n = max(16, n // 2)
    while m < group:
        m *= 2
    return Tile(m, n, tile.warps, tile.stages)


def table_name(architecture: str) -> str:
    """Return the row of the table that stands for an architecture.

    Raises:
        ValueError: it is unknown, and newer than none of its vendor.
    """
    if architecture in _TABLE:
        return architecture
    vendor = architecture.rstrip("0123456789abcdef")
    number = architecture.removeprefix(vendor)
    known = [name for name in ARCHITECTURES if name.startswith(vendor)]
    if vendor == "gfx" and not (len(number) == 3 and number.startswith("9")):
        # Not of the CDNA line: other waves, other matrix instructions.
        known = []
    older = [n for n in known if int(n.removeprefix(vendor), 16) <= int(number, 16)]
    if not vendor or not older:
        raise ValueError(
            f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}, "
            "nor newer than one of them"
        )
    return max(older, key=lambda name: int(name.removeprefix(vendor), 16))


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Return the name of a device's architecture; ``interpreter`` for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "")
    if torch.version.hip:
        return str(name).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
