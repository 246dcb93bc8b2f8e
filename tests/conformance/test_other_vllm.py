"""What needs no engine passes over the Python of the newest vLLM that is supported."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import tomllib
from conformance import fetch, other_vllm
from packaging.requirements import Requirement

_BUG = "tests/engine/test_mutants.py::test_a_planted_bug_is_caught"
_HYBRID_BUG = "tests/engine/test_hybrid_mutants.py::test_a_planted_bug_is_caught"
SLICE = (
    "tests/engine/test_compat.py",
    "tests/engine/test_vllm_names.py",
    "tests/engine/test_versions.py",
    "tests/engine/test_scheduler.py",
    "tests/patches",
    f"{_BUG}[a_block_is_copied_in_the_step_that_writes_it]",
    f"{_BUG}[salts_are_ignored]",
    f"{_HYBRID_BUG}[a_request_goes_on_one_token_late]",
    f"{_HYBRID_BUG}[blocks_that_nobody_uses_stay_held]",
)
"""What CI runs of ``MODEL_FREE``: two minutes of it."""


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_a_slice_of_the_tests_passes():
    done = subprocess.run(
        other_vllm.command(SLICE),
        cwd=fetch.ROOT,
        env=other_vllm.environment(other_vllm.NEWEST),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    # Tests of what is new skip with the installed one.
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def test_it_is_in_the_range_and_the_next_one_is_not():
    project = tomllib.loads((fetch.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    (vllm,) = (one for one in wanted if one.name == "vllm")
    assert vllm.specifier.contains(other_vllm.NEWEST)
    major, minor, _ = other_vllm.NEWEST.split(".")
    assert not vllm.specifier.contains(f"{major}.{int(minor) + 1}.0")


# -- its Python ----------------------------------------------------------------


@pytest.fixture
def source(monkeypatch):
    """The source of a vLLM, as if it had been fetched."""

    def download(wanted, scratch):
        package = scratch / "source" / "vllm"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("HERE = True\n")
        return package.parent

    monkeypatch.setattr(fetch, "_download", download)


def test_another_version_is_imported_in_place_of_the_installed_one(source, tmp_path):
    path = fetch.python_path("9.8.7", tmp_path / "cache")
    code = (
        "import vllm; from importlib.metadata import version; "
        "print(vllm.HERE, version('vllm'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"True 9.8.7+{version('vllm').partition('+')[2]}\n"


def test_nothing_is_put_before_the_installed_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "before")
    assert fetch.python_path(fetch.pinned_version(), tmp_path / "cache") == "before"
    assert not (tmp_path / "cache").exists()


def test_a_version_that_does_not_exist_ends_with_1(monkeypatch, capsys):
    def download(wanted, scratch):
        raise fetch.FetchError(f"pip did not get the source of vllm=={wanted}")

    monkeypatch.setattr(fetch, "_download", download)
    assert other_vllm.main(["0.0.nonsense"]) == 1
    assert "vllm==0.0.nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ([], [*other_vllm.MODEL_FREE]),
        (["-n", "2"], [*other_vllm.MODEL_FREE, "-n", "2"]),
        (["tests/tree::test_x", "-x"], ["tests/tree::test_x", "-x"]),
    ],
)
def test_all_of_them_run_unless_some_are_named(monkeypatch, words, runs):
    commands = []

    class Done:
        returncode = 5

    def run(command, cwd, env):
        commands.append(command)
        return Done

    monkeypatch.setattr(other_vllm.subprocess, "run", run)
    monkeypatch.chdir(fetch.ROOT)
    assert other_vllm.main([fetch.pinned_version(), *words]) == 5
    assert commands[0][-len(runs) :] == runs


def test_what_is_named_exists():
    for path in (*other_vllm.MODEL_FREE, *SLICE):
        assert (fetch.ROOT / path.partition("::")[0]).exists(), path
