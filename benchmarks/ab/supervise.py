"""Keeps a server's processes together: none of them outlives the command.

Started by file, as ``python supervise.py FD COMMAND ...``, and imports nothing of this
package. It ends the server, and whatever the server has left behind, when the other
end of ``FD`` is closed, which happens however the command ends, and when the server's
own process ends, which leaves engine processes if it was killed.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 20.0
_OF_THE_COMMAND = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are for the command, which then closes the pipe."""
SIGNALLED = 128
"""Added to the number of the signal that ended the server, in the exit status."""


def _prctl(option: int, value: int) -> None:
    """Set an option of this process; elsewhere than on Linux, nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _begin_server() -> None:
    """Run in the server's process before it starts."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for number in _OF_THE_COMMAND:
        signal.signal(number, signal.SIG_DFL)


def _wait(server: "subprocess.Popen[bytes]", pipe: int) -> None:
    """Wait until the server has ended or the command has."""
    while server.poll() is None:
        readable, _, _ = select.select([pipe], [], [], 0.2)
        if readable and not os.read(pipe, 1):
            return


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server and all that came of it."""
    if server.poll() is None:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_GRACE_SECONDS)
    deadline = time.monotonic() + _GRACE_SECONDS
    # As the subreaper, this process inherits whatever lost its parent.
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)
        if time.monotonic() > deadline:
            break


def _copy(output: int) -> None:
    """Copy what the server prints to the log; a full disk is no reason to die."""
    while text := os.read(output, 1 << 16):
        while text:
            try:
                text = text[os.write(1, text) :]
            except OSError:
                break


def main() -> int:
    """Run a server until it or the command ends.

    Returns:
        The server's exit status; ``SIGNALLED`` and the signal's number if one ended it.
    """
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    for number in _OF_THE_COMMAND:
        signal.signal(number, signal.SIG_IGN)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_begin_server,
    )
    assert server.stdout is not None
    copying = threading.Thread(target=_copy, args=[server.stdout.fileno()], daemon=True)
    copying.start()
    try:
        _wait(server, pipe)
        status = server.poll()
    finally:
        _end(server)
        copying.join(timeout=1)
    status = server.returncode if status is None else status
    return SIGNALLED - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
