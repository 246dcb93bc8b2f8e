"""What a replay comes to, in sentences that can be quoted."""

import math
from collections.abc import Iterator
from typing import Any

from vllm_radix_bench.report.cli_types import LEAST_FACTOR
from vllm_radix_bench.report.columns import NOTEWORTHY, change


def verdict(result: dict[str, Any]) -> list[str]:
    """Return a sentence for each cache, and one if there is more load than capacity."""
    said = [compared(result, cell) for cell in result["cells"]]
    return [*filter(None, said), *fewest(result), *too_much_load(result)]


def num_engines(result: dict[str, Any]) -> int | None:
    """Return how many engines a replay had; None for one without a routing rule."""
    engines: int | None = result["options"].get("engines")
    return engines


def in_each(engines: int | None) -> str:
    """Return of how many engines a cache is, in words; empty where it is the only."""
    return f" in each of {engines} engines" if (engines or 1) > 1 else ""


def fewest(result: dict[str, Any]) -> Iterator[str]:
    """Yield which rule and arm computed least, for each cache of several engines."""
    engines = num_engines(result)
    if engines is None:
        return
    least = result["infinite_cache"]
    for blocks in dict.fromkeys(cell["blocks"] for cell in result["cells"]):
        tokens, routing, name = min(
            (arm["computed_prompt_tokens"], cell["routing"], name)
            for cell in result["cells"]
            if cell["blocks"] == blocks
            for name, arm in cell["arms"].items()
        )
        together = " in all engines" if engines > 1 else ""
        yield (
            f"With {blocks:,} blocks{in_each(engines)} {routing} and {name} computed "
            f"least: {tokens:,} tokens, {tokens / least:.2f} times the fewest possible "
            f"({least:,}: each distinct prefix once{together})."
        )


def cache_size(result: dict[str, Any], blocks: int) -> str:
    """Return the size of a cache in words, in GB where model or cost model know."""
    options = result["options"]
    per_block = options.get("bytes_per_block")
    if options["layout"] is not None:
        size = f", {_gb(blocks * per_block)}" if per_block else ""
        return f"{blocks:,} blocks in the layout {options['layout']}{size}"
    tokens = blocks * options["block_size"]
    if per_block is None:
        per_block = options["cost"]["kv_bytes_per_token"] * options["block_size"]
    size = f", {_gb(blocks * per_block)}" if per_block else ""
    return (
        f"{blocks:,} blocks of {options['block_size']} tokens ({tokens:,} tokens{size})"
    )


def _gb(size: float) -> str:
    """Return bytes in GB: 52.4 GB, 0.003 GB."""
    gb = size / 1e9
    return f"{gb:,.1f} GB" if gb >= 0.05 else f"{gb:.2g} GB"


def compared(result: dict[str, Any], cell: dict[str, Any]) -> str:
    """Return what radix did beside stock; empty where not both were run."""
    arms = cell["arms"]
    name = next((name for name in arms if name.partition(":")[0] == "radix"), None)
    if name is None or "stock" not in arms:
        return ""
    stock, radix = arms["stock"], arms[name]
    before, after = (arm["computed_prompt_tokens"] for arm in (stock, radix))
    hits = f"hit rate {stock['hit_rate']:.1%} → {radix['hit_rate']:.1%}"
    ttfts = f"{stock['ttft']['mean']:.3f} → {radix['ttft']['mean']:.3f} s"
    where = f"{cell['blocks']:,} blocks"
    if "routing" in cell:
        where += f" an engine and {cell['routing']},"
    said = (
        f"With {where} {name} computed {change(before, after)} "
        f"prompt tokens ({before:,} → {after:,}; {hits}); mean TTFT {ttfts} on the "
        "cost model's clock"
    )
    worse = list(_worse(stock, radix))
    return f"{said}; got worse: {', '.join(worse)}." if worse else f"{said}."


def _worse(stock: dict[str, Any], radix: dict[str, Any]) -> Iterator[str]:
    before, after = (arm["ttft"]["p99"] for arm in (stock, radix))
    if after > NOTEWORTHY * before:
        yield f"TTFT p99 {before:.3f} → {after:.3f} s"
    before, after = (arm["preemptions"] for arm in (stock, radix))
    if after > before:
        yield f"preemptions {before:,} → {after:,}"


def too_much_load(result: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence if arms cannot serve requests as fast as they come."""
    found = [
        (name, arm)
        for cell in result["cells"]
        for name, arm in cell["arms"].items()
        if arm["overloaded"]
    ]
    if not found:
        return
    names = ", ".join(dict.fromkeys(name for name, _ in found))
    runs = sum(len(cell["arms"]) for cell in result["cells"])
    last = result["last_arrival"]
    # Each ends when the last answer does.
    factor = min(last / arm["seconds"] for _, arm in found)
    option = "rate" if "rate" in result["input"] else "load"
    lower = _below(factor * result["input"][option])
    served = _seconds(max(arm["seconds"] for _, arm in found))
    advice = f"; try --{option} {lower:g}"
    if option == "rate" and lower < LEAST_FACTOR:
        advice = ""
    which = "with every arm" if len(found) == runs else f"with {names}"
    yield (
        f"The requests come in {_seconds(last)}, and the modelled GPU serves them in "
        f"{served} {which}: waits grow as long as they come, and order matters more "
        f"than the cache{advice}."
    )


def _below(value: float) -> float:
    """Return a number of two digits that is not more."""
    digits = 1 - math.floor(math.log10(value))
    return math.floor(value * 10**digits) / 10**digits


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
