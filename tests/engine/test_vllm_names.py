"""Every name that is imported from vLLM is there, functions' own imports included."""

import ast
from pathlib import Path

import pytest
import vllm

from support.pages import ROOT

VLLM = Path(vllm.__file__).parent
FOLDERS = ("vllm_radix", "kernels", "patches", "benchmarks")


def imports_of(path):
    """Yield modules and names, but those that have a fallback."""
    tree = ast.parse(path.read_text())
    optional = {
        node
        for one in ast.walk(tree)
        if isinstance(one, ast.Try)
        and any("ImportError" in ast.unparse(h.type) for h in one.handlers if h.type)
        for node in ast.walk(one)
    }
    for node in ast.walk(tree):
        if node in optional:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def names_in(module):
    """Return the names that a module binds, wherever in it, and its submodules."""
    path = VLLM.joinpath(*module.split(".")[1:])
    source = path.with_suffix(".py")
    found = set()
    if path.is_dir():
        source = path / "__init__.py"
        found = {one.name.partition(".")[0] for one in path.iterdir()}
    if not source.exists():
        return None
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_imported_from_vllm_is_there(folder):
    missing, known, count = [], {}, 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module, name in imports_of(path):
            if module.partition(".")[0] != "vllm":
                continue
            names = known.setdefault(module, names_in(module))
            count += 1
            if names is None or (name is not None and name not in names):
                missing.append(f"{path.relative_to(ROOT)}: {module} {name or ''}")
    assert not missing, "\n".join(missing)
    assert count or folder == "kernels"
