"""README and docs/, read as Markdown: their code blocks, and what stands above each."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: its file.
        line: where it stands.
        language: as its fence says; empty where it says nothing.
        title: as its fence says.
        text: what is in it.
        reason: why it is not run, if the comment above it says so.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        """Where it is, for messages and the names of tests."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the commands of a shell block, each as words."""
        text = self.text.replace("\\\n", " ")
        lines = text.splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def output(self) -> str:
        """Return what a transcript shows beside its commands."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return "\n".join(line for line in lines if not line.startswith("$ "))


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page, in order."""
    above = ""
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block":
            above = token.content
        elif token.type in ("fence", "code_block"):
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            reason = NOT_RUN.search(above)
            yield Block(
                page,
                token.map[0] + 1,
                language,
                title[1] if title else "",
                token.content,
                " ".join(reason[1].split()) if reason else None,
            )
            above = ""
        elif token.type == "inline":
            above = ""


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console", "bash")]
