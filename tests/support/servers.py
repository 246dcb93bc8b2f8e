"""A real `vllm serve` in a subprocess, for tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

VLLM = str(Path(sys.executable).parent / "vllm")
NAME = "served"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alive_in(group: int) -> list[str]:
    """Return the command lines of a process group's running members."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            dead = process.status() == psutil.STATUS_ZOMBIE
            if not dead and os.getpgid(process.pid) == group:
                found.append(" ".join(process.cmdline()))
    return found


@contextmanager
def serving(model: str, log: Path, *flags: str, seconds: float = 300):
    """Run `vllm serve`; yield its base URL; stop it and all it started.

    Args:
        model: folder of the model.
        log: file for what it prints.
        flags: more of its options.
        seconds: that it may take to come up.
    """
    port = free_port()
    command = [VLLM, "serve", model, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "4"]
    command += ["--block-size", "32", "--num-gpu-blocks-override", "129"]
    command += ["--enable-prompt-tokens-details", *flags]
    radix = any(flag.startswith("--radix") for flag in flags)
    env = {**os.environ, "VLLM_PLUGINS": "radix" if radix else ""}
    base = f"http://127.0.0.1:{port}"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield base
        process.terminate()
        process.wait(timeout=60)
        deadline = time.monotonic() + 60
        while left := alive_in(process.pid):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
