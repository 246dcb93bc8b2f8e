"""The project's own modules import each other in one direction: no circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent

FACADE = "vllm_radix"
"""Loads what it exports on first use: the imports at its top are for types only."""


def modules() -> dict[str, Path]:
    """Return the path of every module of the packages in pyproject.toml."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for package, folder in setup["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def module_level(tree: ast.AST):
    """Yield imports that run, or that types need, when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from module_level(node)


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return which of the known modules a module imports."""
    found = set()
    for node in module_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            found.add(inside if inside in known else node.module)
    return found & set(known) - {name}


def graph() -> dict[str, set[str]]:
    """Return what each module imports of the others."""
    known = modules()
    edges = {name: imports(name, path, known) for name, path in known.items()}
    return {**edges, FACADE: set()}


def circle_of(edges: dict[str, set[str]]) -> list[str]:
    """Return modules each of which is imported by the next; none if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert set(circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    edges = graph()
    edges["vllm_radix.tree"].add("vllm_radix.engine.scheduler")
    assert "vllm_radix.engine.scheduler" in circle_of(edges)


def test_no_module_imports_itself_through_others():
    edges = graph()
    assert len(edges) > 100
    assert edges["vllm_radix_bench.replay.cli"] > {"vllm_radix_bench.traces.load"}
    circle = circle_of(edges)
    assert not circle, " imports ".join(circle[::-1])
