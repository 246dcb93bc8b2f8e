"""The rules of the house: layout, imports, packaging, and an inert install."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import vllm_radix

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_radix"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]["bench"]


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["vllm_radix", "vllm_radix.tree", "vllm_radix.cli", "vllm_radix.attention.planner"],
)
def test_light_modules_load_nothing_heavy(module):
    heavy = ["vllm", "torch", "triton", *EXTRAS]
    heavy = python(
        f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    )
    assert heavy == "[]"


def test_help_loads_nothing_heavy_and_no_benchmark():
    loaded = python(
        "import sys\n"
        "from contextlib import redirect_stdout, suppress\n"
        "from io import StringIO\n"
        "from vllm_radix.cli import main\n"
        "with suppress(SystemExit), redirect_stdout(StringIO()) as shown:\n"
        "    main(['--help'])\n"
        "assert 'replay' in shown.getvalue()\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        f"heavy = ['vllm', 'torch', 'triton', 'numpy', 'vllm_radix_bench', *{EXTRAS}]\n"
        "print(sorted(names & set(heavy)))"
    )
    assert loaded == "[]"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("vllm_radix/tree", {"numpy", "vllm_radix.tree"}),
        ("vllm_radix/policy", {"numpy", "vllm_radix.tree", "vllm_radix.policy"}),
        # numpy is what Triton's interpreter computes with.
        ("kernels", {"numpy", "torch", "triton", "vllm_radix_kernels"}),
    ],
)
def test_arrows_point_down(folder, allowed):
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for name in imports_of(path):
            inside = any(name == a or name.startswith(a + ".") for a in allowed)
            standard = name.split(".")[0] in sys.stdlib_module_names
            assert inside or standard, f"{path.name} imports {name}"


def test_only_engine_plugin_and_attention_backends_import_vllm():
    workers = {"worker", "cpu_worker", "gpu_worker"}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in ("engine", "plugin.py"):
            continue
        names = {name.split(".")[0] for name in imports_of(path)}
        if place.parts[0] == "attention":
            assert "triton" not in names, place
            inside = place.parts[1] == "backends" or path.stem in workers
            assert inside or "vllm" not in names, place
            # The planner decides on the host; the device is its neighbours' affair.
            assert inside or path.stem == "plan_buffers" or "torch" not in names, place
            continue
        assert not names & {"vllm", "torch", "triton"}, place


def test_the_plugin_imports_only_what_it_requires():
    allowed = {"numpy", "packaging", "prometheus_client", "vllm", "torch", "triton"} | {
        f"vllm_radix{part}" for part in ("", "_kernels", "_patches")
    }
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "patches").rglob("*.py")):
        names = {name.split(".")[0] for name in imports_of(path)}
        assert names - sys.stdlib_module_names <= allowed, path


def test_registering_imports_nothing_that_is_extra():
    """vLLM imports some of it for itself; we do not."""
    imported = python(
        "import builtins\n"
        "original, ours = builtins.__import__, set()\n"
        "def spy(name, globals=None, *rest, **more):\n"
        "    if (globals or {}).get('__name__', '').startswith('vllm_radix'):\n"
        "        ours.add(name.partition('.')[0])\n"
        "    return original(name, globals, *rest, **more)\n"
        "builtins.__import__ = spy\n"
        "from vllm_radix.plugin import register\n"
        "register()\n"
        "print(sorted(ours))"
    ).splitlines()[-1]
    names = ast.literal_eval(imported)
    assert {"vllm", "vllm_radix", "packaging"} <= set(names)
    assert not set(names) & set(EXTRAS)
    assert "vllm_radix_bench" not in names


def test_vllm_names_have_one_home():
    for path in (PACKAGE / "engine").rglob("*.py"):
        if path.name != "compat.py":
            names = {name.split(".")[0] for name in imports_of(path)}
            assert "vllm" not in names, path.name


def test_the_product_imports_no_benchmark():
    for path in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in imports_of(path)}
        assert "vllm_radix_bench" not in names, path.name


def test_the_stock_arm_imports_nothing_of_ours():
    names = {
        name.split(".")[0] for name in imports_of(ROOT / "benchmarks/ab/offline/arm.py")
    }
    assert "vllm_radix" not in names


@pytest.mark.parametrize("folder", ["kernels", "patches", "benchmarks"])
def test_flat_folders_have_no_init(folder):
    assert not (ROOT / folder / "__init__.py").exists(), "see pyproject.toml for why"


def test_packages_are_listed_and_complete():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = setup["packages"]
    assert len(set(listed)) == len(listed)
    found = set()
    for name, folder in setup["package-dir"].items():
        top = ROOT / folder
        assert top.is_dir(), name
        inside = {top} | {path.parent for path in top.rglob("*.py")}
        for path in inside - {top}:
            assert (path / "__init__.py").exists(), f"{path} is not a package"
        found |= {".".join((name, *path.relative_to(top).parts)) for path in inside}
    assert set(listed) == found


def test_flat_folders_import_by_their_names_from_the_repository_root():
    out = python(
        f"import os; os.chdir({str(ROOT)!r}); import vllm_radix_patches.patch, "
        "vllm_radix_bench.workloads.turn as w; print(w.__name__)"
    )
    assert out == "vllm_radix_bench.workloads.turn"


def test_public_names_are_what_all_says():
    assert sorted(vllm_radix.__all__) == dir(vllm_radix)
    for name in vllm_radix.__all__:
        assert getattr(vllm_radix, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        vllm_radix.nonsense  # noqa: B018


def test_the_readme_has_no_gaps():
    assert "@@" not in (ROOT / "README.md").read_text()


def test_files_stay_short():
    for folder in ("vllm_radix", "kernels", "patches", "benchmarks", "tests", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text().count("\n")
            assert lines <= 620, f"{path}: {lines} lines ask to become a package"


_REPORT = """
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
load_general_plugins()
import json, sys, hashlib
from vllm.v1.core import block_pool, kv_cache_manager, kv_cache_coordinator
from vllm.v1.core.sched import scheduler
config = EngineArgs(model=%r, load_format="dummy").create_engine_config()
args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
    ['--model', %r])
made = AsyncEngineArgs.from_cli_args(args)
print(json.dumps([
    config.compute_hash(),
    config.scheduler_config.get_scheduler_cls().__name__,
    str(made.scheduler_cls), str(made.additional_config),
    scheduler.KVCacheManager.__module__,
    kv_cache_coordinator.BlockPool.__module__,
    [hashlib.sha256(str(sorted(vars(c))).encode()).hexdigest() for c in (
        scheduler.Scheduler, kv_cache_manager.KVCacheManager, block_pool.BlockPool)],
    "vllm_radix.engine.scheduler" in sys.modules,
]))
"""


def test_installing_without_the_flag_changes_nothing(model_folder):
    code = _REPORT % (model_folder, model_folder)
    reports = [
        python(code, VLLM_PLUGINS=plugins).splitlines()[-1] for plugins in ("", "radix")
    ]
    assert reports[0] == reports[1]
    assert reports[0].endswith("false]"), "our scheduler was imported"


def test_no_file_of_code_has_500_lines():
    found = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    names = found.stdout.split()
    if not names:
        pytest.skip("not a checkout")
    sizes = {name: len((ROOT / name).read_text().splitlines()) for name in names}
    assert len(sizes) > 200
    assert [name for name, size in sizes.items() if size >= 500] == []
