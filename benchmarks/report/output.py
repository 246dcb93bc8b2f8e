"""Files of results: written whole or not at all, and never lost."""

import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_radix.exits import CommandError, ExitCode

_LEAST_FREE = 1 << 16
"""Bytes that must fit where a result is to go, before anything is run."""


class OutputError(CommandError):
    """A result cannot go where it is to; the message names the option."""

    code = ExitCode.OUTPUT


class OutputFile:
    """A file for a result.

    When it cannot be written any more, what was to go there goes to a new file in the
    folder for temporary files; if that fails too, it is kept for the caller to print.

    Args:
        path: of the file.
        option: that named it, for messages.

    Attributes:
        path: where the result is.
        failed: whether that is not where it was to be.
        unsaved: the text that no file would take; None if a file has it.

    Raises:
        OutputError: it is not a file.
    """

    def __init__(self, path: Path, option: str = "--output") -> None:
        try:
            if path.is_dir():
                raise OutputError(f"{option}: {path} is a folder, not a file")
            if path.exists() and not path.is_file():
                raise OutputError(f"{option}: {path} is not a regular file")
        except OSError as error:
            raise _unwritable(option, path, error) from error
        self.path = path
        self.failed = False
        self.unsaved: str | None = None
        self._option = option

    def prepare(self) -> None:
        """Make the folder, and check that the file can be written.

        Raises:
            OutputError: it cannot.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, " " * _LEAST_FREE, replace=False)
        except OSError as error:
            raise _unwritable(self._option, self.path, error) from error

    def write(self, text: str) -> None:
        """Replace the file by a text."""
        try:
            _write(self.path, text)
            self.unsaved = None
        except OSError as error:
            self._write_elsewhere(text, error.strerror or str(error))

    def write_json(self, result: Any) -> None:
        """Replace the file by JSON; each row of a ``Rows`` is a line."""
        self.write(to_json(result))

    def _write_elsewhere(self, text: str, why: str) -> None:
        known, self.failed = self.unsaved is not None, True
        sentence = f"{self._option}: {self.path} cannot be written ({why}); "
        made = None
        try:
            number, name = tempfile.mkstemp(self.path.suffix, f"{self.path.stem}-")
            os.close(number)
            made = Path(name)
            _write(made, text)
        except OSError:
            self.unsaved = text
            if made is not None:
                made.unlink(missing_ok=True)
            if not known:
                print(f"{sentence}nor can a temporary file", file=sys.stderr)
            return
        self.path, self.unsaved = made, None
        print(f"{sentence}going on in {made}", file=sys.stderr)


@contextmanager
def alone(path: Path, option: str = "--output") -> Iterator[None]:
    """Keep other runs from writing where this one does.

    Args:
        path: of the result. All files of its stem have one lock, in the folder for
            temporary files; it is free again however the run ends.
        option: that named it, for messages.

    Raises:
        OutputError: another run writes there, or the lock cannot be made.
    """
    where = os.path.realpath(path.with_suffix(""))
    digest = hashlib.sha256(where.encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"vllm-radix-{os.getuid()}-{digest}.lock"
    try:
        file = lock.open("w")
    except OSError as error:
        raise _unwritable(option, path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{option}: another run is writing {path}; allowed: another file, or "
                "the same once that run has ended"
            ) from error
        yield


def all_written(*files: OutputFile | None) -> bool:
    """Return whether all files, but those that are None, are where they were to be."""
    return not any(file is not None and file.failed for file in files)


def _unwritable(option: str, path: Path, error: OSError) -> OutputError:
    is_file = isinstance(error, (FileExistsError, NotADirectoryError))
    why = "its folder is a file" if is_file else error.strerror
    return OutputError(f"{option}: {path} cannot be written ({why})")


def _write(path: Path, text: str, replace: bool = True) -> None:
    """Write a file beside a file and put it in its place; or only try to."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # A full disk may say so no sooner.
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Rows(list[Any]):
    """Rows of a large table; JSON has each on a line of its own."""


def to_json(result: Any) -> str:
    """Return JSON, indented but for the rows of ``Rows``."""
    found: list[str] = []
    sign = uuid.uuid4().hex

    def mark(value: Any) -> Any:
        if isinstance(value, Rows):
            lines = ",\n  ".join(map(json.dumps, value))
            found.append(f"[\n  {lines}\n ]" if value else "[]")
            return f"{sign} {len(found) - 1}"
        if isinstance(value, dict):
            return {key: mark(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(one) for one in value]
        return value

    text = json.dumps(mark(result), indent=1)
    return re.sub(f'"{sign} (\\d+)"', lambda match: found[int(match[1])], text)
