"""vLLM's own tests of its core and its attention, and the Python of another vLLM.

The wheel has no tests, the source distribution has. pip is asked for it by name,
as for any package, and only the tests are kept: beside them the source package
``vllm/`` would be imported in place of the installed one. Of another version than the
installed one that package is kept as well, in a folder of its own: put on PYTHONPATH,
it is the installed one, without what is compiled.
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

PYTHON = ("vllm",)
"""What is kept of the source of another version than the installed one."""

_STAMP = ".complete"


class FetchError(RuntimeError):
    """vLLM's source cannot be had; the message says why."""


def pinned_version() -> str:
    """Return the version of the installed vLLM, as it is called on the index."""
    return version("vllm").partition("+")[0]


def fetch(cache: Path = CACHE, wanted: str | None = None) -> Path:
    """Return the folder that holds ``tests/``; get it first, if need be.

    Args:
        cache: where it is kept; git is told to ignore it.
        wanted: the version; None for the installed one.

    Raises:
        FetchError: the source could not be had, or is not what is expected.
    """
    wanted = wanted or pinned_version()
    return _fetch(cache, wanted, f"vllm-{wanted}", PARTS)


def fetch_python(wanted: str, cache: Path = CACHE) -> Path:
    """Return a folder with the Python of a version, for PYTHONPATH.

    Beside ``vllm/`` it has metadata, so that this version counts as installed.

    Args:
        wanted: the version.
        cache: where it is kept.

    Raises:
        FetchError: as for ``fetch``.
    """
    return _fetch(cache, wanted, f"vllm-{wanted}-python", PYTHON)


def python_path(wanted: str, cache: Path = CACHE) -> str:
    """Return PYTHONPATH with which a version is the installed one.

    Args:
        wanted: the version; for the installed one nothing is added.
        cache: where its Python is kept.

    Raises:
        FetchError: as for ``fetch``.
    """
    path = os.environ.get("PYTHONPATH", "")
    if wanted == pinned_version():
        return path
    return os.pathsep.join(filter(None, [str(fetch_python(wanted, cache)), path]))


def _fetch(cache: Path, wanted: str, name: str, parts: tuple[str, ...]) -> Path:
    folder = cache / name
    if _is_complete(folder, parts):
        return folder
    cache.mkdir(exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        source = _download(wanted, Path(scratch))
        kept = Path(scratch) / "kept"
        _copy_parts(source, kept, wanted, parts)
        if parts == PYTHON:
            _write_metadata(kept, wanted)
        (kept / _STAMP).write_text("\n".join(parts))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(kept, folder)
        except OSError:
            # Somebody else was faster.
            if not _is_complete(folder, parts):
                raise
    return folder


def _is_complete(folder: Path, parts: tuple[str, ...]) -> bool:
    stamp = folder / _STAMP
    return stamp.exists() and stamp.read_text() == "\n".join(parts)


def _write_metadata(folder: Path, wanted: str) -> None:
    """Write what names the version; vLLM tells the CPU's build by its suffix."""
    build = "".join(version("vllm").partition("+")[1:])
    metadata = folder / f"vllm-{wanted}{build}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {wanted}{build}\n"
    )


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


def _copy_parts(
    source: Path, target: Path, wanted: str, parts: tuple[str, ...]
) -> None:
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        elif (source / part).is_file():
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / part, target / part)
        else:
            raise FetchError(f"the source of vLLM {wanted} has no {part}")
