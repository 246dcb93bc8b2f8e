"""The command ``vllm-radix top``."""

import argparse
import io
import json
import sys
import time
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.cli_types import InputError, number
from vllm_radix_bench.report.tables import console
from vllm_radix_bench.top import tree
from vllm_radix_bench.top.scrape import NoAnswerError, Page, address, scrape
from vllm_radix_bench.top.view import record, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "url",
        metavar="URL",
        help="of a server, such as http://localhost:8000; a stock one has fewer rows",
    )
    parser.add_argument("--once", action="store_true", help="print once, and end")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print numbers, an object on a line; what was counted lately is for a "
        "second",
    )
    parser.add_argument(
        "--interval",
        type=partial(number, float, 0.1, 3600),
        default=2.0,
        metavar="SECONDS",
        help="between two looks (default: 2)",
    )
    tree.add_arguments(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Show a server's figures until interrupted.

    Returns:
        The exit code.
    """
    try:
        tree.check(arguments)
    except ValueError as error:
        parser.error(str(error))
    url = address(arguments.url)
    page = scrape(url, time.monotonic())
    if arguments.once and not arguments.tree:
        _print(url, page, None, arguments.json)
        return ExitCode.GOOD
    try:
        if arguments.tree:
            tree.run(arguments, url, _plain)
        elif arguments.json or not sys.stdout.isatty():
            _follow(url, page, arguments.interval, arguments.json)
        else:
            _live(url, page, arguments.interval)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        pass  # the way to end it
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # who reads no further still wants the exit code
    return ExitCode.GOOD


def _print(url: str, page: Page, before: Page | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record(url, page, before)), flush=True)
    else:
        show(console(), page, before)


def _follow(url: str, page: Page, interval: float, as_json: bool) -> None:
    """Print the figures again and again; the server's end ends it."""
    before = None
    while True:
        _print(url, page, before, as_json)
        time.sleep(interval)
        before, page = page, scrape(url, time.monotonic())


def _plain(paper: io.StringIO, width: int) -> Console:
    """Return a console that breaks lines as a terminal's, and has no colours."""
    return Console(
        file=paper,
        width=width,
        force_terminal=True,
        color_system=None,
        markup=False,
        highlight=False,
    )


def _live(url: str, page: Page, interval: float) -> None:
    """Show the figures in place; wait for a server that does not answer."""
    out = console()
    before: Page | None = None
    with Live(console=out, screen=True, auto_refresh=False) as live:
        silent = ""
        while True:
            # Not on the same console: it would show what is there already, too.
            paper = io.StringIO()
            show(_plain(paper, out.width), page, before)
            shown = f"{paper.getvalue()}{silent}\n{url}; Ctrl-C ends"
            live.update(Text(shown), refresh=True)
            time.sleep(interval)
            try:
                now = scrape(url, time.monotonic())
            except NoAnswerError as error:
                silent = f"\nAs of {time.monotonic() - page.at:.0f} s ago: {error}"
            else:
                before, page, silent = page, now, ""
