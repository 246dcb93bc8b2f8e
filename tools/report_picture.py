"""Take a picture of a report.html: ``make report-picture PAGE=… PICTURE=…``."""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, FloatRect, sync_playwright
from setup_env import HOW_TO_INSTALL_CHROMIUM

WIDTH, MOST_HEIGHT = 1200, 1400
MOST_BYTES = 200_000
_COLOURS = 256


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield Chromium, without a window."""
    path = shutil.which("chromium")
    if path is None:
        raise FileNotFoundError(HOW_TO_INSTALL_CHROMIUM)
    # Its sandbox refuses to run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield made
        finally:
            made.close()


_ABOVE_TABLES = """() => {
  const table = document.querySelector('.summary') || document.querySelector('footer');
  return Math.floor(table.getBoundingClientRect().top);
}"""


def take(page: Path, height: int | None = None) -> bytes:
    """Return the upper part of a page as PNG.

    Args:
        page: a report.html.
        height: in pixels; None for all above the tables.
    """
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": WIDTH, "height": MOST_HEIGHT})
        tab.goto(page.resolve().as_uri())
        if height is None:
            height = min(tab.evaluate(_ABOVE_TABLES), MOST_HEIGHT)
        part = FloatRect(x=0, y=0, width=WIDTH, height=height)
        picture = Image.open(io.BytesIO(tab.screenshot(clip=part, full_page=True)))
    out = io.BytesIO()
    _with_few_colours(picture.convert("RGB")).save(out, "PNG", optimize=True)
    return out.getvalue()


def _with_few_colours(picture: Image.Image) -> Image.Image:
    """Return a picture in its commonest colours; those of letters' edges are others."""
    counted: list[Any] = picture.getcolors(picture.width * picture.height) or []
    common = [colour for _, colour in sorted(counted, reverse=True)[:_COLOURS]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in common for part in colour])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--height", type=int, help="in pixels")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        sys.exit(f"report_picture: {arguments.page} is no file")
    try:
        taken = take(arguments.page, arguments.height)
    except FileNotFoundError as error:
        sys.exit(f"report_picture: {error}")
    if len(taken) > MOST_BYTES:
        sys.exit(
            f"report_picture: {len(taken):,} bytes are more than {MOST_BYTES:,}; give "
            "a smaller --height"
        )
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_bytes(taken)
    print(f"{arguments.picture}: {len(taken):,} bytes")


if __name__ == "__main__":
    main()
