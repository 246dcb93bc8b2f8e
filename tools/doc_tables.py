"""The tables of docs/ that say what the code says: written into the pages by cog.

A page holds the call in a comment and the table below it. ``make docs`` writes the
tables anew; a test fails when one is out of date.
"""

import ast
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docstring_parser import parse

from vllm_radix.config import ENV_PREFIX, RadixConfig
from vllm_radix.engine.hints import PREFIX, READERS, HintError, Hints
from vllm_radix.metrics.series import SERIES
from vllm_radix.policy import ORDERS
from vllm_radix.tree import POLICIES

ROOT = Path(__file__).resolve().parents[1]
_EVICTION = ROOT / "benchmarks/results/eviction/2026-11-26-sequential.json"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def options() -> str:
    """Return the table of all options, from ``RadixConfig``."""
    meanings = {p.arg_name: p.description or "" for p in _attributes(RadixConfig)}
    rows = [
        (f"`{name}`", _value(default), _values(name), meanings[name], f"`{_env(name)}`")
        for name, default in RadixConfig().to_dict().items()
    ]
    return table(("option", "default", "values", "meaning", "environment"), rows)


def registered(classes: Mapping[str, type]) -> str:
    """Return the table of a registry: names, and what their docstrings begin with."""
    rows = [(f"`{name}`", _first_line(cls)) for name, cls in classes.items()]
    return table(("name", "what it does"), rows)


def orders() -> str:
    """Return the table of the orders of waiting requests."""
    return registered(ORDERS)


def hints() -> str:
    """Return the table of the hints that a client may give."""
    meanings = {p.arg_name: p.description or "" for p in _attributes(Hints)}
    rows = []
    for field, reader in READERS.items():
        try:
            reader(field, None)
        except HintError as error:
            allowed = str(error).partition(" is not ")[2]
        rows.append((f"`{field}`", allowed, meanings[field.removeprefix(PREFIX)]))
    return table(("field", "values", "meaning"), rows)


def eviction_policies() -> str:
    """Return the table of the eviction policies."""
    return registered(POLICIES)


def metrics() -> str:
    """Return the table of all metrics, from ``SERIES``."""
    rows = []
    for series in SERIES.values():
        name = f"`{series.shown}`"
        if series.label:
            values = ", ".join(f"`{value}`" for value in series.values)
            name += f" by `{series.label}`: {values}"
        only = f" Only: {series.only}." if series.only else ""
        rows.append((name, series.kind, f"{series.about}.{only}", series.use))
    return table(("metric", "kind", "what it says", "what it tells"), rows)


def eviction_results() -> str:
    """Return the table of the committed study of eviction policies."""
    runs = json.loads(_EVICTION.read_text())
    policies = list(runs[0]["hit_rates"])
    head = ("load", "cache, blocks", *policies, "best", "hit-density: share of the gap")
    rows = []
    for run in runs:
        rates, best = run["hit_rates"], run["best"]
        gap = best - rates["lru"]
        share = (rates["hit-density"] - rates["lru"]) / gap if gap > 0.005 else None
        size = f"{run['blocks']:,} of {run['block_size']}"
        figures = [f"{100 * rate:.2f}" for rate in (*rates.values(), best)]
        rows.append((run["load"], size, *figures, f"{share:.0%}" if share else ""))
    return table(head, rows)


def classes(*names: str) -> str:
    """Return the table of some classes: what each is, and the file it is in."""
    homes = {
        node.name: (path, ast.get_docstring(node) or "")
        for path in sorted((ROOT / "vllm_radix").rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in names
    }
    rows = []
    for name in names:
        path, text = homes[name]
        rows.append((f"`{name}`", text.split("\n\n")[0], f"`{path.relative_to(ROOT)}`"))
    return table(("class", "what it is", "file"), rows)


def report_schema() -> str:
    """Return the tables of report.json of an A/B, from its schema."""
    schema = json.loads((ROOT / "benchmarks/ab/report.schema.json").read_text())
    objects = {"The file": schema, **schema["$defs"]}
    parts = []
    for name, one in objects.items():
        title = name if one is schema else f"`{name}`"
        rows = list(_fields(one["properties"]))
        said = table(("field", "type", "meaning"), rows)
        parts.append(f"## {title}\n\n{one['description']}\n\n{said}")
    return "\n\n".join(parts)


def _fields(properties: Mapping[str, Any], within: str = "") -> Iterator[Sequence[str]]:
    for name, one in properties.items():
        yield f"`{within}{name}`", _type(one), one["description"]
        # Those without a name of their own.
        yield from _fields(one.get("properties", {}), f"{within}{name}.")


def _type(one: Mapping[str, Any]) -> str:
    if "$ref" in one:
        return f"`{one['$ref'].rpartition('/')[2]}`"
    if "const" in one:
        return f"`{one['const']}`"
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "oneOf" in one:
        return " or ".join(map(_type, one["oneOf"]))
    kinds = one["type"] if isinstance(one["type"], list) else [one["type"]]
    inside = one.get("items") or one.get("additionalProperties") or {}
    names = [f"{kind} of {_type(inside)}" if kind in ("array", "object") and inside
             else kind for kind in kinds]  # fmt: skip
    return " or ".join(names)


def _attributes(cls: type) -> Any:
    return parse(inspect.getdoc(cls) or "").params


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _values(name: str) -> str:
    """Return the values that an option allows, as its refusal names them."""
    wrong: dict[str, Any] = {name: None}
    try:
        RadixConfig(**wrong)
    except ValueError as error:
        allowed = str(error).partition(" is not ")[2].replace("''", "empty")
        allowed = allowed.partition(": give ")[2] or allowed
        return allowed.removeprefix("one of ").replace("'", "`")
    raise AssertionError(f"{name} takes anything")


def _value(default: object) -> str:
    if isinstance(default, str):
        return f"`{default}`" if default else "empty"
    return f"`{str(default).lower()}`"


def _env(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())
