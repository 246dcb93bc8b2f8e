"""Pack what a GPU machine without vLLM needs: ``make gpu-bundle``.

Writes ``.gpu/`` at the repository's root, which git ignores: the overlay of vLLM's
Python files (``overlay.py``), and the packages of ``pins.txt`` for the device's Python,
each as one archive. Needs the project's environment and a package index.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import tomllib
from overlay import HERE, make_overlay

ROOT = HERE.parents[1]
BUNDLE = ROOT / ".gpu"
PINS = HERE / "pins.txt"
DEVICE_PYTHON = "3.12"
# What the wheels may ask of the device's C library.
PLATFORMS = ("1", "2014", "_2_17", "_2_24", "_2_26", "_2_27", "_2_28", "_2_31", "_2_34")


def install_pins(target: Path, python: str) -> None:
    """Install the pinned packages, for another Python than this one.

    Raises:
        subprocess.CalledProcessError: pip could not; its output says why.
    """
    platforms = [f"--platform=manylinux{name}_x86_64" for name in PLATFORMS]
    base = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [
            *base,
            "--disable-pip-version-check",
            "--no-deps",
            "--no-compile",
            "--only-binary=:all:",
            f"--python-version={python}",
            "--implementation=cp",
            *platforms,
            f"--target={target}",
            f"--requirement={PINS}",
        ],
        check=True,
    )


def announce_plugin(target: Path) -> None:
    """Write what vLLM finds the plugin by; the code itself comes with the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, number = project["name"], project["version"]
    info = target / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
    lines += [f"Requires-Dist: {wanted}" for wanted in project["dependencies"]]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    group, plugins = "vllm.general_plugins", project["entry-points"]
    lines = [f"[{group}]", *(f"{k} = {v}" for k, v in plugins[group].items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def pack(folder: Path, archive: Path, preset: int) -> None:
    """Write a folder's contents to an archive."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    options: dict[str, Any] = {"preset": preset}
    with tarfile.open(archive, "w:xz", **options) as out:
        for path in sorted(folder.iterdir()):
            out.add(path, arcname=path.name, filter=kept)


def build(bundle: Path, python: str = DEVICE_PYTHON, preset: int = 6) -> list[Path]:
    """Write the bundle; return its archives.

    Args:
        bundle: folder to write, emptied first.
        python: the device's.
        preset: of the compression; 0 is quick.
    """
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir(parents=True)
    archives = []
    with tempfile.TemporaryDirectory() as work:
        packages, overlay = Path(work, "packages"), Path(work, "vllm")
        install_pins(packages, python)
        announce_plugin(packages)
        make_overlay(overlay)
        for folder in (packages, overlay):
            archives.append(bundle / f"{folder.name}.tar.xz")
            pack(folder, archives[-1], preset)
    return archives


def main() -> None:
    """Build the bundle and print what it weighs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=BUNDLE)
    parser.add_argument("--python", default=DEVICE_PYTHON, help="the device's")
    arguments = parser.parse_args()
    for archive in build(arguments.output, arguments.python):
        print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
