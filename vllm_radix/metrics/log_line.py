"""The line that a server logs beside vLLM's own, every ten seconds of traffic."""

from collections.abc import Iterable, Mapping

from vllm_radix.metrics.series import BOUNDS


def log_line(
    counted: Mapping[tuple[str, str], int], gauges: Iterable[Mapping[str, float]]
) -> str:
    """Return what happened since the last line, and how it stands.

    Args:
        counted: what counters grew by, by their name and the value of their label.
        gauges: of each engine, by their name.
    """

    def count(name: str, value: str = "") -> int:
        return counted.get((name, value), 0)

    engines = list(gauges)

    def gauge(name: str) -> int:
        return int(sum(engine.get(name, 0) for engine in engines))

    inside = count("hit_tokens", "inside")
    saved = count("hit_tokens", "block_end") + inside
    queried = count("queried_tokens")
    parts = ["Radix: no request looked up"]
    if queried:
        parts = [f"Radix: prefix cache hit rate: {saved / queried:.1%}"]
        parts.append(f"tokens saved: {saved:,} ({inside:,} inside blocks)")
    parts.append(
        f"cached: {gauge('cached_blocks'):,} of {gauge('pool_blocks'):,} blocks "
        f"({gauge('idle_blocks'):,} idle, {gauge('pinned_blocks'):,} pinned)"
    )
    parts.append(f"held: {gauge('held_requests')} reqs")
    ahead = count("admissions", "prefix") + count("admissions", "group")
    parts.append(f"admitted ahead of their turn: {ahead} reqs")
    fired = [
        f"{bound} {count('admissions', bound)}"
        for bound in BOUNDS
        if count("admissions", bound)
    ]
    parts.append(f"bounds reached: {', '.join(fired) or 'none'}")
    return ", ".join(parts)
