"""Whether both arms answer the same, and if not, whether the model was undecided."""

from collections.abc import Sequence
from typing import Any

from vllm_radix_bench.ab.client import Answer

GAPS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
"""Log-probabilities that rounding may move, by the model's type: two steps of the
type's precision at logits of 16 to 32, but for float32, whose sums differ by more."""
_WIDEST = 0.25


def gap_of(dtype: str) -> float:
    """Return the gap between the two likeliest tokens that rounding may close."""
    return GAPS.get(dtype.removeprefix("torch."), _WIDEST)


def as_records(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return what is compared of answers: what came, and what else might have."""
    return [
        {"id": one.id, "output": one.output, "top": one.top, "error": one.error}
        for one in answers
    ]


def compare(
    stock: Sequence[dict[str, Any]],
    radix: Sequence[dict[str, Any]],
    gap: float | None,
) -> dict[str, Any]:
    """Return how many answers were compared, how many differ, and where.

    A turn is compared only if those before it are equal: otherwise its prompt is
    another. One that differs is beyond doubt unless the two likeliest tokens of stock
    were no further apart than ``gap``, and radix chose one of them; where there are no
    log-probabilities nobody knows.

    Args:
        stock: records of ``as_records``.
        radix: the same, of the same requests.
        gap: that rounding may close; see ``gap_of``; None where nobody knows.
    """
    theirs = {one["id"]: one for one in radix}
    lost: set[str] = set()
    compared, differences = 0, []
    for mine in sorted(stock, key=lambda one: one["id"].count(".")):
        other = theirs.get(mine["id"])
        if mine["id"].rpartition(".")[0] in lost:
            lost.add(mine["id"])
            continue
        if other is None or mine["error"] or other["error"]:
            lost.add(mine["id"])
            continue
        compared += 1
        if mine["output"] == other["output"]:
            continue
        lost.add(mine["id"])
        differences.append(_difference(mine, other, gap))
    return {
        "compared": compared,
        "different": len(differences),
        "beyond_doubt": sum(one["beyond_doubt"] is True for one in differences),
        "differences": differences,
    }


def _difference(
    mine: dict[str, Any], other: dict[str, Any], gap: float | None
) -> dict[str, Any]:
    pairs = zip(mine["output"], other["output"], strict=False)
    shorter = min(len(mine["output"]), len(other["output"]))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    entry: dict[str, Any] = {"id": mine["id"], "at": at, "gap": None}
    entry["beyond_doubt"] = None
    if gap is None:
        return entry
    if at < len(mine["top"]) and at < len(other["output"]):
        two = mine["top"][at][:2]
        entry["gap"] = two[0][1] - two[1][1] if len(two) == 2 else None
        undecided = entry["gap"] is not None and entry["gap"] <= gap
        known = other["output"][at] in [token for token, _ in two]
        entry["beyond_doubt"] = not (undecided and known)
    elif mine["top"]:
        entry["beyond_doubt"] = True  # one of the two stopped early
    return entry
