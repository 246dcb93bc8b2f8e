"""The processes of the two arms: started, asked, ended, and what a dead one says."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.ab.offline.arm import Settings
from vllm_radix_bench.report.output import OutputError

ARMS = ("stock", "radix")

_ERROR = re.compile(r"\bERROR\b|^(\w+\.)*\w*(Error|Exception)\b")
"""Lines of vLLM's log that tell of an error, and last lines of tracebacks."""
_USUAL = re.compile(r"^(\([^)]*\) )?(DEBUG|INFO|WARNING)\b")
_PREFIX = re.compile(r"^(\([^)]*\) )*(ERROR \S+ \S+ \[[^\]]*\] )?")
"""What vLLM puts before each line of a traceback."""
_SAID = re.compile(r"^(\w+\.)*\w*(Error|Exception): \S")
_MOST_LINES = 10


class ArmError(CommandError):
    """An arm did not come up, or its process died."""

    code = ExitCode.ENGINE


class ArmProcess:
    """One arm, in a process of its own.

    Args:
        name: ``stock`` or ``radix``.
        settings: of its engine.
        log: file for everything the process prints.

    Raises:
        OutputError: the log cannot be written.
    """

    def __init__(self, name: str, settings: Settings, log: Path) -> None:
        self.name = name
        self._log = log
        try:
            sink = log.open("w")
        except OSError as error:
            raise OutputError(
                f"--output: the log {log} beside it cannot be written "
                f"({error.strerror})"
            ) from error
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "vllm_radix_bench.ab.offline.arm"]
        command += [json.dumps(asdict(settings)), str(writing)]
        with sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                text=True,
                # Ctrl-C is for the command, which then ends its arms.
                start_new_session=True,
            )
        os.close(writing)
        self._replies = os.fdopen(reading)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a workload and return its result."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, or its absence, tells
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """Wait for the next reply.

        Raises:
            ArmError: the process has ended.
        """
        line = self._replies.readline()
        if not line:
            self._stop_waiting()
            how = how_it_ended(self._process.returncode)
            raise ArmError(
                f"the {self.name} arm {how}; its log is {self._log}",
                excerpt(self._log.read_text(errors="replace")),
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    def wait_until_ready(self) -> None:
        """Wait for the engine to be up, and check that it is the right one.

        Raises:
            ArmError: it is not, or it did not come up.
        """
        found = self.reply()
        if self.name == "stock" and found["plugin_imported"]:
            raise ArmError("the stock arm has imported vllm_radix")
        if self.name == "radix" and "Radix" not in found["manager"]:
            raise ArmError(f"the radix arm runs {found['manager']}")

    def stop(self) -> None:
        """End the process; whatever it had to say has been said."""
        self._process.terminate()
        self._stop_waiting()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._replies.close()

    def _stop_waiting(self) -> None:
        """Wait for the end of the process, and kill it if none comes."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=20)
        finally:
            if self._process.poll() is None:  # late, or Ctrl-C came again
                self._process.kill()
                self._process.wait()


def how_it_ended(status: int) -> str:
    """Return in words how a process ended.

    Args:
        status: as of ``subprocess``; that of a signal is negative.
    """
    if status >= 0:
        return f"ended early with exit status {status}"
    number = -status
    if number == signal.SIGKILL:
        return f"was killed by signal {number} (out of memory?)"
    try:
        return f"was killed by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"was killed by signal {number}"


def excerpt(log: str) -> str:
    """Return the lines of a log that tell of errors; if none does, its last ones.

    Of tracebacks, the line that says what was wrong, each once: the first is the cause.
    What vLLM says of its work is left out.
    """
    said: dict[str, None] = {}
    lines = [line for line in log.splitlines() if not _USUAL.search(line)]
    for line in lines:
        text = _PREFIX.sub("", line)
        if _SAID.match(text):
            said[text] = None
        elif _ERROR.search(line) and not text.startswith((" ", "Traceback")):
            said[line] = None
    errors = list(said)
    if errors:
        half = _MOST_LINES // 2
        return "\n".join(dict.fromkeys(errors[:half] + errors[-half:]))
    return "\n".join(lines[-3:])


@contextmanager
def both_arms(
    settings: dict[str, Settings], folder: Path, label: str
) -> Iterator[dict[str, ArmProcess]]:
    """Start both arms, wait until they are ready, end them in any case."""
    # vLLM measures a GPU's free memory as it starts: one at a time there.
    at_once = "cpu" in version("vllm")
    with ExitStack() as stack:
        arms = {}
        for name in ARMS:
            log = folder / f"ab-{label}-{name}.log"
            arms[name] = ArmProcess(name, settings[name], log)
            stack.callback(arms[name].stop)
            if not at_once:
                arms[name].wait_until_ready()
        if at_once:
            for arm in arms.values():
                arm.wait_until_ready()
        yield arms
