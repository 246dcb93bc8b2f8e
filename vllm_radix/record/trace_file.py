"""The file of a trace: whole lines, and no more of them than it may hold."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRACE_MARK = "vllm_radix_trace"
"""The first field of the first line, the header; its value is the version."""

TRACE_VERSION = 1

_BEGINNING = f'{{"{TRACE_MARK}": '.encode()


def path_problem(path: str) -> str | None:
    """Return why a trace cannot be written to a path, or None.

    Looks, and writes nothing. A file that is there is moved aside later on, so it must
    be an earlier trace.
    """
    file = Path(path)
    folder = file.parent
    if "\0" in path:
        return f"{path!r} is no path of a file"
    try:
        if file.is_dir():
            return f"{path!r} is a folder: name a file in it"
        if not folder.is_dir():
            return f"{path!r} is in no folder that is there: make {str(folder)!r} first"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{path!r} cannot be written, for its folder is read-only"
        for one in (file, older(file)):
            if one.exists() and not _is_trace(one):
                return f"{str(one)!r} holds something else than a trace: name another"
    except OSError as error:
        return f"{path!r} cannot be written: {error.strerror}"
    return None


def older(file: Path) -> Path:
    """Return where the trace before the one in ``file`` is kept."""
    return file.with_name(f"{file.name}.1")


def _is_trace(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(len(_BEGINNING))
    return start in (b"", _BEGINNING)


class TraceFile:
    """A file that is begun anew when it is full; the one before it is kept.

    Each line is written at once and whole, so that a process which dies leaves no
    part of one.

    Args:
        path: of the file. What is there is moved to ``path.1``, and what was there is
            gone.
        limit: bytes from which on it is full.
        header: fields of the first line, beside the mark and the version.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, limit: int, header: Mapping[str, Any]) -> None:
        self.path = path
        self._limit = limit
        self._header = {TRACE_MARK: TRACE_VERSION, **header}
        self._size = 0
        if path.exists() and path.stat().st_size:
            path.replace(older(path))
        self._begin()

    def _begin(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        # What requests share is nobody else's affair.
        self._descriptor: int | None = os.open(self.path, flags, 0o600)
        self._size = 0
        self.write(self._header)

    @property
    def is_full(self) -> bool:
        """Whether the next line should go into a new file."""
        return self._size >= self._limit

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            OSError: it cannot be written; nothing of it is in the file.
        """
        assert self._descriptor is not None, "closed"
        line = json.dumps(fields).encode() + b"\n"
        done = 0
        try:
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(line)

    def begin_anew(self) -> None:
        """Put what is written in safety under the name of the older one; go on empty.

        Raises:
            OSError: it cannot be done.
        """
        self.close()
        self.path.replace(older(self.path))
        self._begin()

    def close(self) -> None:
        """Put what is written in safety, on the disk; a second call does nothing.

        Raises:
            OSError: it did not get there.
        """
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
