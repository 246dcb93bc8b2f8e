"""Tokens as bytes, so that one memcmp compares a whole prefix.

A key is a token sequence written as big-endian int32: the order of two byte
strings is then the order of the token sequences, and a block of ``block_size``
tokens is a slice of ``4 * block_size`` bytes.
"""

import sys
from array import array
from collections.abc import Iterable

BYTES_PER_TOKEN = 4

_SWAP = sys.byteorder == "little"


def encode(tokens: Iterable[int]) -> bytes:
    """Return the key of ``tokens``, in O(n).

    Args:
        tokens: token ids; each fits in a signed 32-bit integer.

    Raises:
        OverflowError: a token id does not fit.

    >>> encode([1, 258]).hex()
    '0000000100000102'
    """
    packed = array("i", tokens)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


def decode(key: bytes | bytearray) -> list[int]:
    """Return the token ids of ``key``, in O(n).

    >>> decode(encode([7, -1]))
    [7, -1]
    """
    packed = array("i", key)
    if _SWAP:
        packed.byteswap()
    return packed.tolist()


def common_units(
    a: bytes | bytearray,
    a_start: int,
    b: bytes | bytearray,
    b_start: int,
    size: int,
) -> int:
    """Return how many whole units two byte strings share, from given offsets.

    Halves the range and compares slices, so the bytes compared are at most
    twice the shorter string: O(n) in memcmp, O(log n) in Python steps.

    Args:
        a: first string.
        a_start: offset of its first byte to compare.
        b: second string.
        b_start: offset of its first byte to compare.
        size: bytes of a unit (a block, or a token).

    >>> common_units(encode([1, 2, 3]), 0, encode([9, 1, 2, 4]), 4, 4)
    2
    """
    low, high = 0, min(len(a) - a_start, len(b) - b_start) // size
    while low < high:
        middle = (low + high + 1) // 2
        left, right = low * size, middle * size
        if a[a_start + left : a_start + right] == b[b_start + left : b_start + right]:
            low = middle
        else:
            high = middle - 1
    return low
