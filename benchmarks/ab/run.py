"""Runs an A/B: starts servers, sends loads in turns, keeps what was measured."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from vllm_radix_bench.ab import answers
from vllm_radix_bench.ab.client import Answer, Sending
from vllm_radix_bench.ab.loads import Forest, Load
from vllm_radix_bench.ab.plan import ANSWERS, Cell, Piece, pieces
from vllm_radix_bench.ab.scrape import Watch, counts, scrape
from vllm_radix_bench.ab.serve_options import ServeOptions
from vllm_radix_bench.ab.servers import ARMS, Server, running
from vllm_radix_bench.ab.web import HttpError
from vllm_radix_bench.report.progress import Progress, seconds_in_words

_SPARE_MEMORY = 1.3
"""Times what a server holds that must be free for a second one."""
_QUIET_SECONDS = 30.0
_WARM = 16
"""Requests, or conversations, that a server gets before it is measured."""


@dataclass
class Options:
    """What a run is told.

    Attributes:
        serve: how servers are started.
        rounds: of times.
        together: whether both servers are up at once; None lets memory decide.
        concurrency: trees of turns under way at once; None for no limit.
        seed: of arrivals and of built-in loads.
        budget_seconds: after which no round is begun; None for no end.
        ready_seconds: for a server to come up.
        stall_seconds: after which a server that counts nothing has hung.
        logs: path that theirs begin with.
        start: when the run began, in seconds of ``time.monotonic``.
    """

    serve: ServeOptions
    rounds: int
    together: bool | None
    concurrency: int | None
    seed: int
    budget_seconds: float | None
    ready_seconds: float
    stall_seconds: float
    logs: Path
    start: float


@dataclass
class Servers:
    """The servers that are up.

    Args:
        options: how they are started.
        begin: told what is being started.

    Attributes:
        together: whether both may be up at once; None while it is not known.
        fixed: blocks of the cache that the first server found room for, so that all
            others have as many; None where the options say how many.
    """

    options: Options
    begin: Callable[[str], None]
    together: bool | None = None
    fixed: int | None = None
    _up: dict[str, tuple[Server, ExitStack]] = field(default_factory=dict)
    _blocks: int | None = None
    _cold: set[str] = field(default_factory=set)

    def get(self, arm: str, blocks: int | None) -> Server:
        """Return an arm's server, started if it is not up.

        Raises:
            ServerError: it did not come up.
        """
        if blocks != self._blocks:
            self.stop_all()
            self._blocks = blocks
        if arm in self._up:
            return self._up[arm][0]
        if not self.together:
            self.stop_all()
        self.begin(f"starting the {arm} server")
        blocks = self.fixed if blocks is None else blocks
        extra = () if blocks is None else ("--num-gpu-blocks-override", str(blocks))
        stack = ExitStack()
        spec = self.options.serve.spec(arm, extra)
        ready = self.options.ready_seconds
        server = stack.enter_context(running(spec, self.options.logs, ready))
        self._up[arm] = server, stack
        self._cold.add(arm)
        return server

    def take_cold(self, arm: str) -> bool:
        """Return whether an arm's server has had no request yet: true once."""
        is_cold = arm in self._cold
        self._cold.discard(arm)
        return is_cold

    def stop_all(self) -> None:
        """End all servers, even if one cannot be ended."""
        with ExitStack() as all_of_them:
            for _, stack in self._up.values():
                all_of_them.callback(stack.close)
            self._up.clear()


def fits_twice(server: Server, share: float | None) -> bool:
    """Whether a second server fits beside one; on a GPU nobody knows: no.

    Args:
        server: the one that is up.
        share: of the memory that the second one takes for itself; None where it takes
            as much as the first.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    memory = psutil.virtual_memory()
    wanted = _SPARE_MEMORY * server.memory() if share is None else share * memory.total
    return bool(memory.available > wanted)


@contextmanager
def serving(options: Options, begin: Callable[[str], None]) -> Iterator[Servers]:
    """Yield servers that start as they are asked for; end them in any case."""
    servers = Servers(options, begin, options.together)
    try:
        yield servers
    finally:
        servers.stop_all()


def new_cell(cell: Cell, load: Load) -> dict[str, Any]:
    """Return the part of a result for a cell, without rounds."""
    return {
        "name": load.name,
        "kind": load.kind,
        "what": load.what,
        "is_control": load.is_control,
        "fewest_tokens": load.fewest_tokens,
        "blocks": cell.blocks,
        "rate": cell.rate,
        "answers": None,
        "rounds": {},
    }


def _run_of(
    found: Sequence[Answer], counted: dict[str, float], watch: Watch, seconds: float
) -> dict[str, Any]:
    """Return what is kept of a run."""
    # The watch sleeps beside the client: what it is late by, the client is.
    lag = watch.late_by()
    good = [one for one in found if not one.error]
    failed = [one for one in found if one.error]
    return {
        "requests": len(found),
        "seconds": seconds,
        "counts": {**counted, "errors": len(failed)},
        "ttft": [one.ttft for one in good],
        "tpot": [one.tpot for one in good if one.tpot is not None],
        "e2e": [one.e2e for one in good],
        "tenants": [(one.tenant, one.ttft) for one in good if one.tenant],
        "hit_rates": watch.hit_rates,
        "failures": sorted({one.error for one in failed})[:5],
        "client_lag": lag,
    }


def _seconds(found: Sequence[Answer], all_of_it: float) -> float:
    """Return how long requests took: from the first sent to the last end.

    Args:
        found: their answers.
        all_of_it: seconds that the load took, which is that where it sends at once.
    """
    spans = [(x.sent, x.sent + x.e2e) for x in found if x.sent is not None and x.e2e]
    if not spans:
        return all_of_it
    return max(end for _, end in spans) - min(start for start, _ in spans)


async def _wait_until_quiet(server: Server) -> None:
    """Wait until a server has no requests: what was aborted takes a step to go."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < deadline:
        with suppress(HttpError):
            if not (await asyncio.to_thread(scrape, server)).is_busy:
                return
        await asyncio.sleep(0.1)


async def send(
    load: Load, server: Server, sending: Sending, stall_seconds: float
) -> tuple[list[Answer], dict[str, Any]]:
    """Send a load from an empty cache; return its answers, and what is kept of them.

    Raises:
        ServerError: the server died or hangs, or could not be asked.
    """
    try:
        server.reset_cache()
        watch = Watch(server, stall_seconds)
        start = time.perf_counter()
        sent = asyncio.ensure_future(load.send(server, sending))
        watching = asyncio.ensure_future(watch.run())
        try:
            await asyncio.wait({sent, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()  # raises
            found = sent.result()
        finally:
            for task in (sent, watching):
                task.cancel()
            await asyncio.gather(sent, watching, return_exceptions=True)
        seconds = _seconds(found, time.perf_counter() - start)
        server.check_alive()
        await _wait_until_quiet(server)
        after = await asyncio.to_thread(scrape, server)
    except HttpError as error:
        server.check_alive()
        raise server.error(f"does not answer ({error})") from error
    if found and all(one.error for one in found):
        raise server.error(f"failed every request ({found[0].error})")
    watch.note(after, time.monotonic())
    return found, _run_of(found, counts(watch.before, after), watch, seconds)


def _check_cache(result: dict[str, Any], cell: dict[str, Any], server: Server) -> None:
    """Check that a server's cache is the one that requests were made for.

    Raises:
        ServerError: both arms would not have the same.
    """
    if cell["blocks"] is not None:
        return
    wanted, found = result["setup"]["cache"], vars(server.cache)
    if found["tokens"] != wanted["tokens"]:
        raise server.error(
            f"has a KV cache of {found['tokens']:,} tokens, and the other arm's had "
            f"{wanted['tokens']:,}: name --num-gpu-blocks-override, so that both are "
            "alike"
        )


def _sending(options: Options, cell: dict[str, Any], piece: Piece) -> Sending:
    return Sending(
        rate=cell["rate"],
        concurrency=options.concurrency,
        seed=options.seed,
        top_logprobs=2 if piece.round == ANSWERS else 0,
        tenant_field=options.serve.tenant_field,
        with_priority=options.serve.orders_by_priority,
    )


def _keep(
    cell: dict[str, Any], piece: Piece, found: list[Answer], run: dict[str, Any]
) -> None:
    """Put a run into its cell; compare answers once both arms have them."""
    pair = cell["rounds"].setdefault(str(piece.round), {})
    if piece.round == ANSWERS:
        run["answers"] = answers.as_records(found)
    pair[piece.arm] = run
    if piece.round == ANSWERS and all(arm in pair for arm in ARMS):
        both = [pair[arm].pop("answers") for arm in ARMS]
        cell["answers"] = answers.compare(*both, cell["gap"])


def order(
    result: dict[str, Any], options: Options, together: bool, done: set[tuple[int, int]]
) -> list[Piece]:
    """Return the pieces that a result lacks, in the order to run them."""
    cells = [Cell(0, cell["blocks"], cell["rate"]) for cell in result["cells"]]
    return list(pieces(cells, options.rounds, together, done))


def run(
    options: Options,
    loads: Sequence[Load],
    result: dict[str, Any],
    todo: Sequence[Piece],
    servers: Servers,
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Run pieces and put what they measured into a result.

    Args:
        options: what to run.
        loads: of each cell.
        result: to complete.
        todo: what it lacks; see ``order``.
        servers: to send to.
        progress: told of each piece.
        save: called after each piece.

    Raises:
        ServerError: a server did not come up, died or hangs.
    """
    before = result["seconds"]
    clock = _Budget(options, {cell["blocks"] for cell in result["cells"]})
    spent = 0.0
    ran = 0
    for at, piece in enumerate(todo):
        cell = result["cells"][piece.cell]
        if not clock.allows(piece, cell["blocks"]):
            progress.advance()
            continue
        name = f"{cell['name']}, {piece.arm}"
        name += ", answers" if piece.round == ANSWERS else f", round {piece.round}"
        server = servers.get(piece.arm, cell["blocks"])
        _check_cache(result, cell, server)
        sending = _sending(options, cell, piece)
        if servers.take_cold(piece.arm):
            progress.begin(f"warming the {piece.arm} server")
            warm = next((one for one in loads if isinstance(one, Forest)), None)
            if warm is not None:
                once = replace(sending, rate=None, top_logprobs=0)
                asyncio.run(send(warm.some(_WARM), server, once, options.stall_seconds))
        cell["gap"] = answers.gap_of(server.dtype)
        if options.serve.rounds_coarsely:
            cell["gap"] = None
        progress.begin(name)
        began = time.monotonic()
        found, kept = asyncio.run(
            send(loads[piece.cell], server, sending, options.stall_seconds)
        )
        _keep(cell, piece, found, kept)
        seconds = time.monotonic() - began
        spent, ran = spent + seconds, ran + 1
        clock.note(piece, seconds)
        result["seconds"] = before + time.monotonic() - options.start
        save()
        progress.advance()
        left = len(todo) - at - 1
        to_go = f"about {seconds_in_words(spent / ran * left)} to go" if left else ""
        progress.finish(f"{name}: {seconds_in_words(seconds)}", to_go)


class _Budget:
    """Says which rounds may still begin; each size of the cache has an equal part.

    Args:
        options: with the budget.
        sizes: of the cache, one after the other.
    """

    def __init__(self, options: Options, sizes: set[int | None]) -> None:
        self._options = options
        self._part = (options.budget_seconds or 0.0) / max(1, len(sizes))
        self._size: tuple[int | None] | None = None
        self._begun = options.start
        self._round = ANSWERS
        self._over = False
        self._spent: dict[int, float] = {}

    def allows(self, piece: Piece, size: int | None) -> bool:
        """Return whether a piece may be run; O(1)."""
        if self._size != (size,):
            if self._size is not None:
                self._begun = time.monotonic()
            self._size, self._over = (size,), False
            self._spent, self._round = {}, piece.round
        if piece.round > self._round:
            self._round = piece.round
            # The answers and the first round are always run.
            if self._part and piece.round > ANSWERS + 1:
                a_round = max(self._spent.values(), default=0.0)
                elapsed = time.monotonic() - self._begun
                self._over = self._over or elapsed + a_round > self._part
        return not self._over

    def note(self, piece: Piece, seconds: float) -> None:
        """Note what a piece took."""
        self._spent[piece.round] = self._spent.get(piece.round, 0.0) + seconds
