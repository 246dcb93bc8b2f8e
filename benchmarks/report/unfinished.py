"""Runs that take long: each finished piece is kept, and a later run goes on."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_radix.exits import StoppedError
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.report.output import OutputError, OutputFile

Settings = dict[str, Any]


class Unfinished:
    """The file beside a result that holds its pieces while it is not complete.

    Args:
        output: of the complete result.
        settings: what a run must have in common with the one it goes on with:
            ``versions``, and options in other sections, by name.
        flags: options by the names in settings, where they are not alike.

    Raises:
        OutputError: there can be no such file.
    """

    def __init__(
        self,
        output: OutputFile,
        settings: Mapping[str, Mapping[str, Any]],
        flags: Mapping[str, str],
    ) -> None:
        path = output.path
        self._path = path.with_name(f"{path.name}.unfinished")
        try:
            self._file = OutputFile(self._path)
        except OutputError as error:
            raise OutputError(
                f"--output: {path} cannot have {self._path.name} beside it, where "
                f"finished runs are kept ({error.__cause__ or 'it is no file'})"
            ) from error
        self._settings = json.loads(json.dumps(settings))
        self._flags = flags
        self._kept = 0
        self._total = 0

    def load(self) -> Settings | None:
        """Return the result so far; None if there is none.

        Raises:
            InputError: it is of a run with other settings.
        """
        path = self._path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, result = found["settings"], found["result"]
            differences = list(self._differences(before))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"--resume: {path} holds no unfinished run: remove it, or start "
                "without --resume"
            ) from error
        if differences:
            raise InputError(
                f"--resume: {path} is of another run: {'; '.join(differences)}"
            )
        return dict(result)

    def _differences(self, before: Settings) -> Iterator[str]:
        for section, now in self._settings.items():
            for name, value in now.items():
                dashed = "--" + name.replace("_", "-")
                flag = self._flags.get(name, name if section == "versions" else dashed)
                yield from _difference(flag, before[section].get(name), value)

    def begin(self, resume: bool, kept: int, total: int) -> None:
        """Say how a run begins.

        Args:
            resume: whether it goes on where another ended.
            kept: pieces that need not be run again.
            total: pieces in all.
        """
        self._kept, self._total = kept, total
        path = self._path
        if resume and kept:
            print(f"--resume: {kept} of {total} pieces are in {path}", file=sys.stderr)
        elif resume:
            print(f"--resume: nothing is in {path}; starting", file=sys.stderr)
        elif path.exists():
            print(
                f"{path} is of a run that did not end; this one starts anew and "
                "replaces it (--resume goes on)",
                file=sys.stderr,
            )

    def save(self, result: Settings) -> None:
        """Keep the result so far, which has a piece more than before."""
        self._kept += 1
        self._file.write(json.dumps({"settings": self._settings, "result": result}))

    def remove(self) -> None:
        """Remove the file: the result is complete."""
        for path in (self._path, self._file.path):
            path.unlink(missing_ok=True)

    @contextmanager
    def told_when_stopped(self) -> Iterator[None]:
        """Add to whatever ends the run what is kept, and where.

        Raises:
            StoppedError: from the error that ended it.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            raise StoppedError(self._what_is_kept()) from error

    def _what_is_kept(self) -> str:
        if not self._kept or self._file.unsaved is not None:
            return "no finished piece is kept"
        path = self._file.path
        copy = ", once copied back" if self._file.failed else ""
        return (
            f"{self._kept} of {self._total} pieces are kept in {path}: the same "
            f"command with --resume goes on there{copy}"
        )


def _difference(name: str, was: Any, now: Any) -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _difference(f"{name} {key}", was.get(key), now.get(key))
    elif was != now:
        yield f"{name} was {json.dumps(was)}, is {json.dumps(now)}"
