"""``vllm-radix top --tree``: the cached tree by subtree."""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_radix_bench.report.cli_types import InputError, whole
from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.tables import console, print_table, say
from vllm_radix_bench.top.kv_events import Feed, check_endpoint
from vllm_radix_bench.top.kv_tree import KVTree, Subtree, largest
from vllm_radix_bench.top.scrape import NoAnswerError, Page, scrape
from vllm_radix_bench.top.view import heading

_PORT = 5557
"""At which vLLM publishes unless it is told another."""
_TEXT = 48
"""Characters of a row's text."""
Decode = Callable[[Sequence[int]], str]
_OPTIONS = ("events", "replay", "rows", "show_text", "tokenizer")
"""Options that only the tree has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tree."""
    add = parser.add_argument_group("the cached tree").add_argument
    add("--tree", action="store_true", help="show it, from the server's KV events")
    add(
        "--events",
        metavar="ENDPOINT",
        help="at which the server publishes them: endpoint in its --kv-events-config "
        f"(default: tcp://HOST:{_PORT}, HOST being that of the URL)",
    )
    add(
        "--replay",
        metavar="ENDPOINT",
        help="at which it sends earlier ones again: replay_endpoint there; without it "
        "only what is cached from now on is known",
    )
    add("--rows", type=whole(1), metavar="N", help="subtrees to show (default: 20)")
    add(
        "--show-text",
        action="store_true",
        help="show how each begins: prompts of users; takes --tokenizer",
    )
    add("--tokenizer", metavar="FOLDER", help="of the model, for --show-text")


def check(arguments: argparse.Namespace) -> None:
    """Check that the options of the tree go together.

    Raises:
        InputError: they do not.
    """
    if not arguments.tree:
        for name in _OPTIONS:
            if getattr(arguments, name):
                raise InputError(f"--{name.replace('_', '-')} is of --tree")
    if bool(arguments.show_text) != bool(arguments.tokenizer):
        raise InputError("--show-text and --tokenizer: give both or none of them")


def _decoder(folder: str | None) -> Decode | None:
    """Return what makes text of tokens, if a tokenizer is named.

    Raises:
        InputError: there is none in that folder.
    """
    if folder is None:
        return None
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise InputError(f"--tokenizer: {folder} is no folder with a tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda tokens: str(tokenizer.decode(list(tokens)))


def warnings(tree: KVTree) -> list[str]:
    """Return why what is shown is not all that is cached."""
    found = []
    if not tree.has_events:
        found.append(
            "No event came yet: blocks that were cached before are not known "
            "(--replay asks for them)."
        )
    if tree.lost_batches:
        found.append(
            f"The tree is incomplete: {tree.lost_batches:,} batches of events were "
            "sent before, or lost."
        )
    return found


def record(tree: KVTree, page: Page, rows: int, decode: Decode | None) -> Any:
    """Return the tree as an object of JSON."""
    return {
        "blocks": tree.num_blocks,
        "capacity": page.capacity,
        "lost_batches": tree.lost_batches,
        "has_events": tree.has_events,
        "subtrees": [
            {
                "rank": one.place[0],
                "group": one.place[1],
                "medium": one.place[2],
                "level": one.level,
                "blocks": one.blocks,
                "tokens": one.tokens,
                "share": one.blocks / tree.num_blocks,
                "depth": one.depth,
                "children": len(one.children),
                "is_cut": one.is_cut,
                **({} if decode is None else {"text": decode(one.begin)}),
            }
            for one in largest(tree.subtrees(), rows)
        ],
    }


def _numbered(found: Sequence[Subtree]) -> list[tuple[str, Subtree]]:
    """Return subtrees with their numbers: 1.2 is the second in the first."""
    out, counted = [], [0]
    for one in found:
        counted = counted[: one.level + 1] + [0] * (one.level + 1 - len(counted))
        counted[one.level] += 1
        out.append((".".join(map(str, counted)), one))
    return out


def _name(decode: Decode | None, row: tuple[str, Subtree]) -> str:
    """Return what a row is called: where it is, and how it begins if asked for."""
    number, one = row
    name = "  " * one.level + number
    if one.is_cut:
        name += " ..."
    if decode is not None:
        text = " ".join(decode(one.begin).split())[:_TEXT]
        name += f" {''.join(c if c.isprintable() else '?' for c in text)}"
    return name


def show(
    out: Console, tree: KVTree, page: Page, rows: int, decode: Decode | None
) -> None:
    """Print the largest subtrees."""
    say(out, heading(page))
    capacity = f" of {page.capacity:,}" if page.capacity else ""
    say(out, f"{tree.num_blocks:,}{capacity} blocks are known to be cached.")
    for text in warnings(tree):
        say(out, text)
    columns = [
        Column("subtree", partial(_name, decode), is_name=True),
        Column("blocks", lambda row: row[1].blocks, "{:,}"),
        Column("tokens", lambda row: row[1].tokens, "{:,}"),
        Column("share", lambda row: row[1].blocks / tree.num_blocks, "{:.1%}"),
        Column("depth, blocks", lambda row: row[1].depth, "{:,}"),
        Column("children", lambda row: len(row[1].children), "{:,}"),
    ]
    if len(tree.places) > 1:
        where = Column(
            "rank, group, medium", lambda row: "{}, {}, {}".format(*row[1].place)
        )
        columns.insert(1, where)
    found = _numbered(largest(tree.subtrees(), rows))
    if found:
        print_table(out, "", columns, found)


def run(arguments: argparse.Namespace, url: str, plain: Any) -> None:
    """Show the tree, once or until interrupted.

    The server's end ends it; on a terminal it waits for a server that does not answer.

    Args:
        arguments: of the command.
        url: of the server's metrics.
        plain: returns a console for what is shown in place.

    Raises:
        InputError: a tokenizer is not there.
        AddressError: an endpoint is none, or tells something else.
        NoAnswerError: nothing listens at one.
    """
    decode = _decoder(arguments.tokenizer)
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    events = check_endpoint("--events", arguments.events or f"tcp://{host}:{_PORT}")
    replay = arguments.replay and check_endpoint("--replay", arguments.replay)
    rows, out = arguments.rows or 20, console()
    with ExitStack() as stack:
        feed = stack.enter_context(closing(Feed(events, replay)))
        live = None
        if sys.stdout.isatty() and not (arguments.once or arguments.json):
            live = Live(console=out, screen=True, auto_refresh=False)
            stack.enter_context(live)
        looks = _looks(feed, url, arguments.interval, waits=live is not None)
        for page, tree, silent in looks:
            if arguments.json:
                print(json.dumps(record(tree, page, rows, decode)), flush=True)
            elif live is None:
                show(out, tree, page, rows, decode)
            else:
                paper = io.StringIO()
                show(plain(paper, out.width), tree, page, rows, decode)
                shown = f"{paper.getvalue()}{silent}\n{events}; Ctrl-C ends"
                live.update(Text(shown), refresh=True)
            if arguments.once:
                return


def _looks(
    feed: Feed, url: str, interval: float, waits: bool
) -> Iterator[tuple[Page, KVTree, str]]:
    """Yield the server's metrics, the tree, and why the metrics are old, if so.

    Args:
        feed: of events.
        url: of the metrics.
        interval: seconds between two looks.
        waits: whether to go on with old metrics where the server does not answer.
    """
    page, tree = scrape(url, time.monotonic()), KVTree()
    for number, batch in feed.earlier():
        tree.apply(number, batch)
    while True:
        for number, batch in feed.read(interval):
            tree.apply(number, batch)
        silent = ""
        try:
            page = scrape(url, time.monotonic())
        except NoAnswerError as error:
            if not waits:
                raise
            silent = f"\nAs of {time.monotonic() - page.at:.0f} s ago: {error}"
        yield page, tree, silent
