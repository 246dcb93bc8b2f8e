"""vllm-router as a program, before servers that run already."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.ab.servers import HOST, free_port
from vllm_radix_bench.ab.web import HttpError, get

_READY_SECONDS = 60.0
_END_SECONDS = 30.0


class RouterError(CommandError):
    """The router did not come up."""

    code = ExitCode.ENGINE


@dataclass(frozen=True)
class RunningRouter:
    """Where a router is.

    Attributes:
        base: its address.
        metrics: where it tells what it counts.
    """

    base: str
    metrics: str


@contextmanager
def running_router(
    words: Sequence[str], log: Path | None = None
) -> Iterator[RunningRouter]:
    """Run vllm-router; yield where it is once it is ready, and end it.

    Args:
        words: its options, but for where it listens.
        log: of what it prints; None for one that is not kept.

    Raises:
        RouterError: it did not come up.
    """
    program = Path(sys.executable).with_name("vllm-router")
    if not program.exists():
        raise RouterError("there is no vllm-router here: pip install vllm-router")
    port, metrics = free_port(), free_port()
    command = [str(program), "--host", HOST, "--port", str(port)]
    command += ["--prometheus-port", str(metrics)]
    command += ["--worker-startup-check-interval", "1", *words]
    with log.open("w+b") if log else tempfile.TemporaryFile() as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while not _is_up(f"http://{HOST}:{port}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    sink.seek(0)
                    said = sink.read().decode(errors="replace")
                    raise RouterError("vllm-router did not come up", said[-2000:])
                time.sleep(0.2)
            yield RunningRouter(
                f"http://{HOST}:{port}", f"http://{HOST}:{metrics}/metrics"
            )
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(url: str) -> bool:
    try:
        get(f"{url}/health", timeout=5)
    except HttpError:
        return False
    return True
