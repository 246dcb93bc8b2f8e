"""Opens a trace: a file of JSON lines, packed with gzip or not."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vllm_radix_bench.traces.line import Line, TraceError

_ALLOWED = "one JSON object a line"


def lines_of(path: Path) -> Iterator[Line]:
    """Yield the lines of a file that are not blank.

    Raises:
        TraceError: it cannot be read, or a line is no object.
    """
    first = True
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(_unpacked(file), 1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw.strip():
                    continue
                where = f"{path}, line {number}"
                if first:
                    _check_kind(where, raw)
                first = False
                yield Line.parse(where, raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(
            f"{path}: cannot be read ({reason}); allowed: a file of JSON lines"
        ) from error


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    # A name tells less than the two bytes that every gzip file begins with.
    packed = file.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
    return gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[return-value]


def _check_kind(where: str, raw: bytes) -> None:
    """Refuse what is no JSON lines, from how it begins, in words that help.

    Raises:
        TraceError: it is CSV, or one JSON array.
    """
    start = raw.strip()
    if start.startswith(b"["):
        raise TraceError(
            f"{where}: begins a JSON array, as ShareGPT's files do; allowed: "
            f'{_ALLOWED}, such as {{"messages": [...], "output_length": 64}} for each '
            "turn of a conversation"
        )
    if b"," not in start or b"{" in start:
        return
    columns = {name.strip(b' "').lower() for name in start.split(b",")}
    if columns & {b"prompt", b"text", b"messages", b"content"}:
        raise TraceError(f"{where}: is CSV; allowed: {_ALLOWED}")
    raise TraceError(
        f"{where}: is CSV with lengths only: no prompts, so nothing tells which "
        f"requests share a prefix; allowed: {_ALLOWED}, with prompts or hash_ids"
    )
