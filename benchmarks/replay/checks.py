"""What a replay refuses before anything is built or run."""

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix_bench.replay.arms import Arm, best_order, parse_arm
from vllm_radix_bench.replay.runner import Options, scheduler_of
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.routing import parse_routing

MOST_BLOCKS = 1_000_000
"""Of all caches, and of a workload for them. One of 50,000 blocks (few-shot, a pressure
of 5, four caches of 2,500) took 0.24 GB and 20 s a run; memory grows with it."""


def check_sizes(options: Options, pressure: float) -> None:
    """Refuse sizes that vLLM's scheduler refuses, and ones that take too much memory.

    Args:
        options: of the replay.
        pressure: of a workload; 0 for a trace.

    Raises:
        InputError: they do not go together.
    """
    if options.max_num_batched_tokens < options.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens: {options.max_num_batched_tokens} is less than "
            f"--max-num-seqs, {options.max_num_seqs}; allowed: as many, or more"
        )
    if options.engines is None:
        return
    largest, first = max(options.blocks), options.blocks[0]
    caches, load = (options.engines * one for one in (largest, pressure * first))
    if max(caches, load) > MOST_BLOCKS:
        what = f"{options.engines:,} caches of {largest:,} blocks have {caches:,}"
        instead = "fewer --engines, or smaller caches"
        if load > caches:
            what = (
                f"{options.engines:,} caches of {first:,} blocks at a --pressure of "
                f"{pressure:g} make a workload of {load:,.0f}"
            )
            instead += ", or less --pressure"
        raise InputError(
            f"--engines: {what}; allowed: up to {MOST_BLOCKS:,} blocks in all, for "
            f"which a run takes about 5 GB: {instead}"
        )


def check_arms(options: Options) -> None:
    """Refuse an arm that does not serve the layout, or cannot be routed to.

    Each is made once, if it or what is asked of it is not what all replays have.

    Raises:
        InputError: there is one; the message is its own.
    """
    layout = options.parsed_layout()
    if layout is not None:
        try:
            layout.at(options.block_size)
        except ValueError as error:
            raise InputError(f"--layout: {error}") from error
    listening = [
        text for text in options.routings if parse_routing(text).rule.wants_events
    ]
    if listening and layout is not None:
        raise InputError(
            f"--routing: {listening[0]} reads events of one group of full attention; "
            f"with the layout {options.layout} another rule is allowed"
        )
    shares = [name for name in options.arms if parse_arm(name).public_prefix != ""]
    if listening and shares:
        raise InputError(
            f"--routing: {listening[0]} reads events, which know nothing of what salts "
            f"share; with {shares[0]!r} another rule is allowed"
        )
    for name in options.arms:
        where, arm = f"--arms: {name!r}", parse_arm(name)
        if options.engines is not None and not (
            isinstance(arm.cls, type) and issubclass(arm.cls, Scheduler)
        ):
            raise InputError(
                f"{where} with --engines; allowed: a scheduler that derives from "
                "vLLM's, which tells its load"
            )
        if layout is not None:
            where += f" with the layout {options.layout}"
        if layout is not None or options.priorities or arm.is_foreign:
            _make(where, arm, options)
        if listening:
            _make(f"{where} with the routing {listening[0]}", arm, options, True)
    if options.known_in_advance and layout is not None:
        skip = "the best order (--no-oracle skips it)"
        _make(f"{skip} with the layout {options.layout}", best_order(), options)


def _make(where: str, arm: Arm, options: Options, kv_events: bool = False) -> None:
    """Make a scheduler of an arm, of any size: nothing is run.

    Raises:
        InputError: it refuses.
    """
    # A class of the user's may fail in any way.
    kinds = Exception if arm.is_foreign else ValueError
    try:
        scheduler = scheduler_of(
            arm, 16, options, options.max_num_batched_tokens, kv_events
        )
        scheduler.shutdown()
    except kinds as error:
        said = str(error)
        if not isinstance(error, ValueError):
            said = f"it cannot be made ({type(error).__name__}: {error})"
        raise InputError(f"{where}: {said}") from error
