"""Make build/ray: .venv with Ray Serve on top, for ``make deployments``.

Ray is not in .venv: it brings twenty packages more, and only one test and one example
need it. What is in .venv is seen from here, and stays as it is.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAY = "ray[serve]==2.60.0"


def main() -> None:
    """Create the environment, or leave it as it is if it is there."""
    folder = ROOT / "build" / "ray"
    stamp = folder / "made"
    if stamp.exists() and stamp.read_text() == RAY:
        return
    venv.create(folder, clear=True, with_pip=True)
    packages = next(folder.glob("lib/*/site-packages"))
    below = next((ROOT / ".venv").glob("lib/*/site-packages"))
    # As a .pth file of .venv's own would not be read, its editable packages are named.
    (packages / "below.pth").write_text(
        f"{below}\nimport site; site.addsitedir({str(below)!r})\n"
    )
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", RAY]
    done = subprocess.run([str(word) for word in command])
    if done.returncode:
        sys.exit(f"ray_env: `pip install {RAY}` failed; see above")
    stamp.write_text(RAY)


if __name__ == "__main__":
    main()
