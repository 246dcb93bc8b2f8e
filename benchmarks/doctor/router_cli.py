"""Say whether a router finds what the servers behind it have cached.

Looks at a router of vLLM's and its servers while they run. Where sources of events are
named, each server computes one short request, to see whether its events arrive.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial

from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab.web import bearer
from vllm_radix_bench.doctor.finding import Status, starts
from vllm_radix_bench.doctor.router import examine
from vllm_radix_bench.doctor.router_events import Asked
from vllm_radix_bench.doctor.servers import base_of
from vllm_radix_bench.doctor.table import count_problems, print_json, print_table
from vllm_radix_bench.report.cli_types import InputError, number, whole
from vllm_radix_bench.top.kv_events import check_endpoint
from vllm_radix_bench.top.scrape import AddressError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what runs the command."""
    parser.description = __doc__
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--router", required=True, metavar="URL", help="of the router")
    add(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="behind it; may be repeated (default: those that the router tells)",
    )
    add(
        "--kv-event-source",
        action="append",
        default=[],
        metavar="URL=ENDPOINT[,ENDPOINT...]",
        help="as the router got it: a server, and where each of its ranks publishes",
    )
    add(
        "--kv-event-block-size",
        type=whole(1),
        default=16,
        metavar="TOKENS",
        help="as the router got it (default: 16, as the router's)",
    )
    add(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        metavar="KEY",
        help="of router and servers (default: $VLLM_API_KEY)",
    )
    add(
        "--wait",
        type=partial(number, float, 0.1, 600),
        default=10.0,
        metavar="SECONDS",
        help="that an event may take (default: 10)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command.

    Returns:
        The exit code: that of a verdict where prefixes are not found.
    """
    try:
        asked = Asked(
            router=_base("--router", arguments.router),
            servers=tuple(_base("--server", url) for url in arguments.server),
            sources=_sources(arguments.kv_event_source),
            block_size=arguments.kv_event_block_size,
            headers=bearer(arguments.api_key or None),
            seconds=arguments.wait,
        )
    except InputError as error:
        parser.error(str(error))
    findings = [*examine(asked)]
    good = starts(findings)
    if arguments.json:
        print_json(findings, routes=good)
    elif not good:
        why = f"{count_problems(findings)}, see above"
        print_table(findings, f"The router does not route by prefixes: {why}.")
    elif any(one.status is Status.NOTE for one in findings):
        print_table(findings, "No problem was found; a note above may be one.")
    else:
        print_table(findings, "Nothing keeps the router from routing by prefixes.")
    return ExitCode.GOOD if good else ExitCode.VERDICT


def _base(option: str, text: str) -> str:
    """Return the address of a server, without a path.

    Raises:
        InputError: it is none.
    """
    try:
        return base_of(text)
    except AddressError as error:
        raise InputError(f"{option}: {str(error).removeprefix('URL: ')}") from error


def _sources(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the endpoints of each server.

    Raises:
        InputError: they are not written as the router takes them.
    """
    option = "--kv-event-source"
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        url, equals, endpoints = text.partition("=")
        if not equals:
            raise InputError(
                f"{option}: {text!r} is not URL=ENDPOINT[,ENDPOINT...], such as "
                "http://localhost:8000=tcp://localhost:5557"
            )
        url = _base(option, url)
        if url in found:
            raise InputError(f"{option}: {url} is named twice")
        try:
            found[url] = tuple(check_endpoint(option, e) for e in endpoints.split(","))
        except AddressError as error:
            raise InputError(str(error)) from error
    return found
