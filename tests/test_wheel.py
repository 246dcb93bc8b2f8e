"""The wheel, installed beside the engine: what a user gets, without the checkout."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import vllm

ROOT = Path(__file__).parent.parent
REPLAY = ["replay", "--workload", "few-shot", "--no-oracle", "--block-size", "32"]
REPLAY += ["--blocks", "64", "--pressure", "1", "--stretch", "0.25", "--arms", "radix"]

_FLAG = """
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
load_general_plugins()
import vllm_radix, vllm_radix_bench.traces as bench, vllm_radix_kernels.ops as kernels
import vllm_radix_patches.patch as patches
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
chosen = parser.parse_args(["--radix.max_overtakes", "3"]).scheduler_cls
print(chosen, chosen.options["max_overtakes"], vllm_radix.__version__)
for module in (vllm_radix, bench, kernels, patches):
    print(module.__file__)
"""

_WITHOUT_RICH = """
import sys
class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotThere())
from vllm_radix.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, of copies: a build leaves files, and takes up those of the last."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vllm_radix", "kernels", "patches", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment with the engine and the wheel, not the checkout."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/*/site-packages")
    # A line of a .pth file is one more folder to import from, whose own .pth files,
    # such as that of the editable checkout, are not read.
    (site / "engine.pth").write_text(str(Path(vllm.__file__).parent.parent))
    made = folder / "bin" / "python"
    pip("--python", made, "install", "--no-deps", "--no-index", wheel)
    return made


def pip(*arguments):
    quiet = ("--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", *quiet, *arguments)


def run(*command, status=0, cwd=None):
    """Run a command where nothing of the checkout can be found."""
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == status, done.stderr + done.stdout
    return done


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.partition("/")[0] for name in names}
    info = next(top for top in tops if top.endswith(".dist-info"))
    ours = {f"vllm_radix{part}" for part in ("", "_bench", "_kernels", "_patches")}
    assert tops == {info, *ours}
    assert {"vllm_radix/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    sources = {
        path.relative_to(ROOT / "vllm_radix")
        for path in (ROOT / "vllm_radix").rglob("*.py")
    }
    assert {f"vllm_radix/{path}" for path in sources} <= set(names)
    data = ("ab/report.schema.json", "html/templates/report.html.j2",
            "html/templates/style.css")  # fmt: skip
    assert {f"vllm_radix_bench/{path}" for path in data} <= set(names)


def test_the_flag_is_registered(wheel, python, tmp_path):
    flag, *places = run(python, "-c", _FLAG, cwd=tmp_path).stdout.splitlines()[-5:]
    name, overtakes, version = flag.split()
    assert (name, overtakes) == ("vllm_radix.RadixScheduler", "3")
    assert wheel.name.startswith(f"vllm_radix-{version}-")
    for place in places:
        assert Path(place).is_relative_to(python.parent.parent), place


def test_the_command_runs(python, tmp_path):
    command = python.parent / "vllm-radix"
    assert "replay" in run(command, "--help", cwd=tmp_path).stdout
    output = tmp_path / "out" / "replay.json"
    run(command, *REPLAY, "--output", output, cwd=tmp_path)
    assert output.exists()


def test_a_missing_package_is_named_with_the_extra(python, tmp_path):
    output = tmp_path / "out" / "replay.json"
    words = (*REPLAY, "--output", output)
    done = run(python, "-c", _WITHOUT_RICH, *words, status=2, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "vllm-radix replay: the package rich is missing: "
        'pip install "vllm-radix[bench]" installs all that commands need'
    )
    assert "Traceback" not in done.stderr
    assert not output.parent.exists()
