"""Files of results: written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


class OutputFile:
    """A file for a result.

    Args:
        path: of the file.
        option: that named it, for messages.

    Raises:
        ValueError: it is a folder.
    """

    def __init__(self, path: Path, option: str = "--output") -> None:
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a folder, not a file")
        self.path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")

    def prepare(self) -> None:
        """Make the folder, and check that the file can be written.

        Raises:
            OSError: it cannot.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.touch()
        self._partial.unlink()

    def write(self, text: str) -> None:
        """Replace the file by a text."""
        self._partial.write_text(text)
        self._partial.replace(self.path)

    def write_json(self, result: Any) -> None:
        """Replace the file by JSON."""
        self.write(json.dumps(result, indent=1))
