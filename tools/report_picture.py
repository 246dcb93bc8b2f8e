"""Take a picture of a report.html: ``make report-picture PAGE=… PICTURE=…``."""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from setup_env import HOW_TO_INSTALL_CHROMIUM

WIDTH, HEIGHT = 1200, 1240
MOST_BYTES = 200_000
_COLOURS = 128
"""More than a page has, but for the edges of letters."""


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


def take(page: Path, height: int = HEIGHT) -> bytes:
    """Return the upper part of a page as PNG."""
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": WIDTH, "height": height})
        tab.goto(page.resolve().as_uri())
        picture = Image.open(io.BytesIO(tab.screenshot()))
    out = io.BytesIO()
    colours = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    colours.save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--height", type=int, default=HEIGHT, help="in pixels")
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
