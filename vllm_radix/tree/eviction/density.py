"""The table of hit densities, computed from counts with numpy."""

from __future__ import annotations

from array import array
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vllm_radix.tree.eviction.hit_density import (
    _MIDDLES,
    BUCKETS,
    EPOCH,
    EPOCHS,
    FIRST_BUCKET,
)

_TILT = 1e-4

Floats = NDArray[np.float64]


@cache
def _shares() -> Floats:
    """Return which share of an epoch's blocks is in each bucket, newest epoch first."""
    ends = FIRST_BUCKET * 2.0 ** np.arange(BUCKETS)
    ends[-1] = np.inf
    starts = np.concatenate(([0.0], ends[:-1]))
    first = EPOCH * np.arange(EPOCHS, dtype=float)[:, None]
    inside = np.minimum(ends, first + EPOCH) - np.maximum(starts, first)
    shares: Floats = np.maximum(0.0, inside) / EPOCH
    return shares


@cache
def _geometry() -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return widths and middles of buckets, and which bucket is not before which."""
    widths = FIRST_BUCKET * 2.0 ** np.maximum(0, np.arange(BUCKETS) - 1)
    return widths, np.array(_MIDDLES), np.triu(np.ones((BUCKETS, BUCKETS), bool))


def table(
    hits: array[float],
    ends: array[float],
    waiting: array[int],
    waiting_longer: array[float],
    *,
    newest: int,
    bins: int,
    prior: float,
    decay: float,
) -> tuple[list[list[float]], list[list[float]]]:
    """Return densities in the middles of buckets, and slopes from each to the next.

    O(classes x buckets^2). Ages the counts.

    Args:
        hits: blocks reused, by class and bucket.
        ends: blocks forgotten unused, by class and bucket.
        waiting: blocks of neither kind, by epoch and class.
        waiting_longer: those that were released before, by class.
        newest: the epoch that has just ended.
        bins: of uses: what classes that follow each other have in common.
        prior: blocks for which the mean of a bin counts half; of all blocks, a half.
        decay: factor on the counts, in place.
    """
    counted = np.frombuffer(hits).reshape(-1, BUCKETS)
    ended = np.frombuffer(ends).reshape(-1, BUCKETS)
    classes = len(counted)
    longer = np.frombuffer(waiting_longer)
    ring = np.frombuffer(waiting, dtype=np.int32).reshape(EPOCHS, classes)
    order = (newest - np.arange(EPOCHS)) % EPOCHS
    there = ring[order].T @ _shares()
    there[:, -1] += longer
    total = counted + ended + np.maximum(0.0, there)
    at_risk = np.cumsum(total[:, ::-1], axis=1)[:, ::-1]

    mean = (counted.sum() + 1.0) / (at_risk.sum() + 20.0)
    of_bin = counted.reshape(bins, -1, BUCKETS).sum(axis=1)
    risk_of_bin = at_risk.reshape(bins, -1, BUCKETS).sum(axis=1)
    pooled = (of_bin + prior * mean) / (risk_of_bin + prior)
    pooled = np.repeat(pooled, classes // bins, axis=0)
    chances = (counted + 2 * prior * pooled) / (at_risk + 2 * prior)

    densities = _gittins(np.minimum(chances, 0.999))
    # Of two that are alike, the older one goes: the first two buckets are as wide.
    densities *= 1.0 - _TILT * np.arange(BUCKETS)
    _, middles, _ = _geometry()
    slopes = np.zeros_like(densities)
    slopes[:, :-1] = np.diff(densities, axis=1) / np.diff(middles)
    counted *= decay
    ended *= decay
    longer *= decay
    return densities.tolist(), slopes.tolist()


def _gittins(chances: Floats) -> Floats:
    """Return the best ratio of hits to block-time over all horizons, by bucket.

    Args:
        chances: of a reuse in a bucket, for what has come to it; by class and bucket.
    """
    widths, _, later = _geometry()
    # By class, bucket to start from, and bucket to end with.
    chance = np.where(later, chances[:, None, :], 0.0)
    left = np.cumprod(1.0 - chance, axis=2)
    come = np.ones_like(left)
    come[:, :, 1:] = left[:, :, :-1]
    come *= later
    hits = np.cumsum(come * chance, axis=2)
    time = np.cumsum(come * widths * (1.0 - chance / 2), axis=2)
    ratio = np.where(later, hits / np.where(time > 0, time, 1.0), 0.0)
    best: Floats = ratio.max(axis=2)
    return best
