"""vLLM's own tests of its core and its attention, at the version installed.

The wheel has no tests, the source distribution has. pip is asked for it by name,
as for any package, and only the tests are kept: beside them the source package
``vllm/`` would be imported in place of the installed one.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".conformance"

PARTS = (
    "tests/__init__.py",
    "tests/v1/__init__.py",
    "tests/v1/core",
    "tests/v1/kv_connector",
    "tests/kernels/__init__.py",
    "tests/kernels/attention",
)
"""What is kept of the source: tests of core and attention, and what they import."""

_STAMP = ".complete"


class FetchError(RuntimeError):
    """vLLM's tests cannot be had; the message says why."""


def pinned_version() -> str:
    """Return the version of the installed vLLM, as it is called on the index."""
    return version("vllm").partition("+")[0]


def fetch(cache: Path = CACHE) -> Path:
    """Return the folder that holds ``tests/``; get it first, if need be.

    Args:
        cache: where it is kept; git is told to ignore it.

    Raises:
        FetchError: the source could not be had, or is not what is expected.
    """
    wanted = pinned_version()
    folder = cache / f"vllm-{wanted}"
    if _is_complete(folder):
        return folder
    cache.mkdir(exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        source = _download(wanted, Path(scratch))
        kept = Path(scratch) / "kept"
        _copy_parts(source, kept)
        (kept / _STAMP).write_text("\n".join(PARTS))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(kept, folder)
        except OSError:
            # Somebody else was faster.
            if not _is_complete(folder):
                raise
    return folder


def _is_complete(folder: Path) -> bool:
    stamp = folder / _STAMP
    return stamp.exists() and stamp.read_text() == "\n".join(PARTS)


def _download(wanted: str, scratch: Path) -> Path:
    """Return the unpacked source of vLLM.

    pip unpacks a source distribution to ask it for its metadata. To answer,
    vLLM needs its build tools; without them pip gives up, and leaves what it has
    unpacked in its temporary folder, as told. With them it stores the archive.
    """
    temporary, archives = scratch / "tmp", scratch / "archives"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-clean", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(archives)]
    done = subprocess.run(
        [*command, f"vllm=={wanted}"],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for archive in archives.glob("*.tar.gz"):
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
    for tests in sorted(temporary.rglob("tests/v1/core")):
        return tests.parents[2]
    raise FetchError(
        f"pip did not get the source of vllm=={wanted} (status {done.returncode}):\n"
        + "\n".join(done.stdout.splitlines()[-15:])
    )


def _copy_parts(source: Path, target: Path) -> None:
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        elif (source / part).is_file():
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / part, target / part)
        else:
            raise FetchError(f"the source of vLLM {pinned_version()} has no {part}")
