"""Run stages on the device machine, from a checkout with its bundle beside it.

    python3 tools/gpu/run.py STAGE...

Stages are named in README.md. Each has its own limit, saves as it goes to ``$OUT``, and
cannot stop the next. Status: 0 when all stages said that all was well.
"""

import argparse
import contextlib
import gzip
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = Path(os.environ.get("RADIX_GPU_WORK", "/tmp/radix-gpu"))
OUT = Path(os.environ.get("OUT", WORK / "out"))
PACKAGES = {
    "vllm_radix": "vllm_radix",
    "kernels": "vllm_radix_kernels",
    "patches": "vllm_radix_patches",
    "benchmarks": "vllm_radix_bench",
}
"""Folders of the checkout, and the names they are imported by."""

# Script, seconds after which it is stopped, variables of its own.
STAGES: dict[str, tuple[str, int, dict[str, str]]] = {
    "0": ("stage_environment.py", 60, {}),
    "1": ("stage_correct.py", 90, {"RADIX_GPU_LIMIT": "60"}),
    "2": ("stage_timing.py", 170, {"RADIX_GPU_LIMIT": "130"}),
    "3": ("stage_smoke.py", 200, {}),
    "4": ("stage_ab.py", 330, {"RADIX_GPU_LIMIT": "230"}),
    "5": ("stage_host.py", 240, {}),
    "6": (
        "stage_ab.py",
        200,
        {
            "RADIX_GPU_NAME": "6-grouped",
            "RADIX_GPU_ARMS": "radix grouped",
            "RADIX_GPU_MODES": "eager",
            "RADIX_GPU_WORKLOADS": "few-shot agents",
            "RADIX_GPU_LIMIT": "75",
        },
    ),
    "7": ("stage_hybrid.py", 440, {"RADIX_GPU_LIMIT": "300"}),
    "8": ("stage_hybrid_time.py", 240, {"RADIX_GPU_LIMIT": "150"}),
}
BEHIND = {"5"}
"""Stages that need no device: they run beside the others."""


def unpack(bundle: Path) -> list[Path]:
    """Unpack the bundle, once; return the folders to import from."""

    def one(archive: Path) -> Path:
        target = WORK / archive.name.partition(".")[0]
        if not target.exists():
            part = target.with_suffix(".part")
            with tarfile.open(archive) as packed:
                packed.extractall(part, filter="data")
            part.rename(target)
        return target

    with ThreadPoolExecutor() as pool:
        # vLLM before the packages, should they ever bring their own.
        return sorted(pool.map(one, bundle.glob("*.tar.xz")), reverse=True)


def link_packages() -> Path:
    """Return a folder in which the checkout's packages have their names."""
    links = WORK / "links"
    links.mkdir(parents=True, exist_ok=True)
    for folder, name in PACKAGES.items():
        link = links / name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / folder)
    return links


def environment(bundle: Path) -> dict[str, str]:
    """Return the environment of stages."""
    paths = [link_packages(), *unpack(bundle), HERE, ROOT / "tests"]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    defaults = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "VLLM_CACHE_ROOT": str(WORK / "vllm-cache"),
        "RADIX_GPU_WORK": str(WORK),
        "OUT": str(OUT),
    }
    return {
        **os.environ,
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, inherited)]),
    }


class Stage:
    """A running stage, whose output goes to a log.

    Args:
        name: of ``STAGES``.
        base: the environment.
        shown: whether its output is printed too.
    """

    def __init__(self, name: str, base: dict[str, str], shown: bool) -> None:
        script, self._limit, own = STAGES[name]
        self.name, self._shown = name, shown
        self._log = OUT / f"{name}.log"
        # What the caller sets wins over the stage's own.
        variables = {**base, **{k: os.environ.get(k, v) for k, v in own.items()}}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=variables,
            text=True,
            errors="replace",
        )
        self._pool = ThreadPoolExecutor(1)
        self._reader = self._pool.submit(self._read)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("w") as log:
            for line in self._process.stdout:
                log.write(line)
                if self._shown:
                    print(line.rstrip()[:420], flush=True)

    def wait(self) -> int:
        """Return the stage's status once it has ended; it is stopped at its limit."""
        try:
            status = self._process.wait(self._limit)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process.kill()
            status = 124
        self._process.wait()
        # Children of a stage that was stopped may hold its output open.
        with contextlib.suppress(TimeoutError):
            self._reader.result(10)
        self._pool.shutdown(wait=False)
        return status


def collect_logs() -> None:
    """Put the ends of the arms' logs beside the results, and pack the stages'."""
    parts = []
    for log in sorted((WORK / "logs").glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-30:]
        parts.append("\n".join([f"==> {log.name}", *lines, ""]))
    if parts:
        (OUT / "arms.txt").write_text("\n".join(parts))
    for log in OUT.glob("*.log"):
        with gzip.open(f"{log}.gz", "wb") as packed:
            packed.write(log.read_bytes())
        log.unlink()


def main() -> int:
    """Run the stages; return the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=sorted(STAGES), metavar="STAGE")
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"== {time.monotonic() - begin:.0f} s  {text}", flush=True)

    OUT.mkdir(parents=True, exist_ok=True)
    base = environment(arguments.bundle)
    say("unpacked")
    behind, statuses = [], {}
    for name in arguments.stages:
        say(f"stage {name}: {STAGES[name][0]}")
        stage = Stage(name, base, shown=name not in BEHIND)
        if name in BEHIND:
            behind.append(stage)
        else:
            statuses[name] = stage.wait()
            say(f"stage {name}: status {statuses[name]}")
    for stage in behind:
        statuses[stage.name] = stage.wait()
        say(f"stage {stage.name}: status {statuses[stage.name]}")
    collect_logs()
    for path in sorted(OUT.iterdir()):
        print(f"{path.stat().st_size:10,} {path.name}")
    say(" ".join(f"{name}:{status}" for name, status in statuses.items()))
    return max(statuses.values())


if __name__ == "__main__":
    sys.exit(main())
