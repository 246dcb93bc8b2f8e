"""What the attention benchmark says: a table, what was missing, and a plot."""

import itertools
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_radix_bench.attention.implementations import DECLINED, IMPLEMENTATIONS, Row


def _figure(row: Row, name: str) -> str:
    """Return a cell: microseconds and range, or agreement and bytes."""
    one = row["contenders"][name]
    if one["status"] == "agrees":
        equal = one["bytes_predicted"] == one["bytes_counted"]
        counted = f"{one['bytes_counted']:,} B"
        aside = "" if equal else f" ({one['bytes_predicted']:,} predicted)"
        return f"{counted}{aside}, off by {one['difference']:.4f}"
    if one["status"] != "measured":
        return DECLINED if one["status"] == DECLINED else "-"
    cold = one["cold_s"]
    text = f"{cold['median'] * 1e6:,.0f} ({cold['min'] * 1e6:,.0f}-"
    text += f"{cold['max'] * 1e6:,.0f})"
    if "bytes" in one:
        text += f" {one['bytes_per_s'] / 1e12:.2f} TB/s {one['of_model']:.0%}"
    return text


def table(result: dict[str, Any]) -> Table:
    """Return the result for a reader."""
    timed = result["mode"] == "timed"
    title = (
        f"{result['device']['name']}: us cold, median (range); bytes loaded; of the "
        f"time by the model of {result['device']['model']['of']}"
        if timed
        else "interpreted: bytes of keys and values loaded; largest difference"
    )
    out = Table(title=title)
    for name in ("requests", "prefix", "levels", "heads", *IMPLEMENTATIONS):
        out.add_column(name, justify="right")
    if timed:
        out.add_column("over vLLM: predicted / cold / warm", justify="right")
    for row in result["rows"]:
        new = f" x {row['new_tokens']}" if row["new_tokens"] > 1 else ""
        cells = [f"{row['requests']}{new}", str(row["prefix"]), str(row["levels"])]
        cells.append(f"{row['heads']}/{row['kv_heads']}")
        if "skipped" in row:
            out.add_row(*cells, row["skipped"])
            continue
        cells += [_figure(row, name) for name in IMPLEMENTATIONS]
        if timed:
            gain = row["speedup"]
            figures = (f"{gain[n]:.2f}" for n in ("predicted", "cold", "warm"))
            cells.append(DECLINED if gain["declined"] else " / ".join(figures))
        out.add_row(*cells)
    return out


def absences(result: dict[str, Any]) -> list[str]:
    """Return a line for each reason why an implementation did not run, with counts."""
    counts: dict[tuple[str, str], int] = {}
    rows = [row for row in result["rows"] if "contenders" in row]
    for row in rows:
        for name, one in row["contenders"].items():
            if one["status"] not in ("measured", "agrees"):
                key = (name, one["status"])
                counts[key] = counts.get(key, 0) + 1
    return [
        f"{name}: {why} ({count} of {len(rows)} batches)"
        for (name, why), count in counts.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over vLLM's kernel by prefix, one panel per levels.

    Hollow marks are batches that the planner leaves to vLLM; dotted, the prediction.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "speedup" in row]
    levels = sorted({row["levels"] for row in rows})
    prefixes = sorted({row["prefix"] for row in rows})
    batches = list(dict.fromkeys((r["requests"], r["new_tokens"]) for r in rows))
    heads = list(dict.fromkeys((row["heads"], row["kv_heads"]) for row in rows))
    figure, panels = pyplot.subplots(
        1, len(levels), figsize=(4 * len(levels) + 1, 4), sharey=True, squeeze=False
    )
    for panel, level in zip(panels[0], levels, strict=True):
        for (b, batch), (h, head) in itertools.product(
            enumerate(batches), enumerate(heads)
        ):
            line = sorted(
                (row["prefix"], row["speedup"]["cold"], row["speedup"]["predicted"])
                for row in rows
                if row["levels"] == level
                and (row["requests"], row["new_tokens"]) == batch
                and (row["heads"], row["kv_heads"]) == head
            )
            if not line:
                continue
            x, cold, predicted = zip(*line, strict=True)
            new = f" x {batch[1]}" if batch[1] > 1 else ""
            label = f"{batch[0]}{new}, {head[0]}/{head[1]}"
            style = {"color": f"C{b % 10}", "marker": "os^Dv"[h % 5]}
            panel.plot(x, cold, label=label, **style)
            panel.plot(x, predicted, ":", color=style["color"], linewidth=0.8)
        declined = [
            r for r in rows if r["levels"] == level and r["speedup"]["declined"]
        ]
        for row in declined:
            panel.plot(row["prefix"], 1, "o", color="white", mec="grey", zorder=3)
        panel.axhline(1, color="grey", linewidth=0.8)
        title = "nothing shared" if level == 0 else f"levels of sharing: {level}"
        panel.set(title=title, xlabel="prefix, tokens")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(prefixes, [f"{prefix:,}" for prefix in prefixes])
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("speed-up over vLLM's Triton kernel, cold")
    panels[0][-1].legend(title="requests, heads", fontsize=7)
    figure.suptitle(result["device"]["name"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
