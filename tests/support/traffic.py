"""Random traffic on the engine double: everything that can happen to a block."""

import random

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import MambaSpec

from support.engine_double import EngineDouble, make_scheduler
from support.hybrid_double import (
    HybridDouble,
    make_hybrid_scheduler,
    ngram_drafts,
    parse_layout,
)
from support.prompts import prompt
from vllm_radix import RadixScheduler

PRESSED = {"num_blocks": 21, "max_num_seqs": 4, "max_num_batched_tokens": 256}
ROOMY = {"num_blocks": 201, "max_num_seqs": 4, "max_num_batched_tokens": 256}


def serve(prompts, cls=RadixScheduler, max_tokens=4, **options):
    engine = EngineDouble(
        make_scheduler(cls, **options), lag=int(options.get("asynchronous", False))
    )
    for request_id, tokens in prompts.items():
        engine.add(request_id, tokens, max_tokens)
    engine.run()
    return engine


def traffic(
    seed, cls=RadixScheduler, check=True, requests=50, faults=True, made=None, **options
):
    """Serve random conversations, branches and duplicates under pressure.

    Args:
        seed: of everything random; also picks block size, lag and scheduling.
        cls: the scheduler, ours or vLLM's.
        check: verify pool and tree after every step.
        requests: how many.
        faults: drop cached blocks, as a failed KV load does, and reset the cache.
        made: called with the engine before it runs.
        options: as for ``make_scheduler``.

    Returns:
        The engine, with nothing left to do.
    """
    rng = random.Random(seed)
    size = rng.choice([4, 8, 16, 32])
    lag = rng.choice([0, 1]) * (cls is RadixScheduler or cls is AsyncScheduler)
    priority = rng.random() < 0.3
    engine = EngineDouble(
        make_scheduler(
            cls,
            asynchronous=bool(lag),
            **{
                "block_size": size,
                "num_blocks": rng.randrange(250, 700) // size + 3,
                "max_num_seqs": rng.randrange(2, 6),
                "max_num_batched_tokens": rng.choice([64, 128, 512]),
                "scheduling_policy": "priority" if priority else "fcfs",
                "scheduler_reserve_full_isl": rng.random() < 0.5,
                **options,
            },
        ),
        lag,
        check,
    )
    if made is not None:
        made(engine)
    drive(engine, rng, seed, requests, faults, priority)
    return engine


def drive(engine, rng, seed, requests, faults, priority, longest=150, **fields):
    """Send random requests to an engine and serve them all.

    Args:
        engine: an engine double.
        rng: the source of what happens when.
        seed: of the prompts.
        requests: how many.
        faults: drop cached blocks, as a failed KV load does, and reset the cache.
        priority: give requests priorities.
        longest: the longest prompt.
        fields: of every request, as for the engine's ``add``.
    """
    pool = engine.scheduler.kv_cache_manager.block_pool
    known = [prompt((seed, i), rng.randrange(40, 130)) for i in range(4)]
    alive = {}
    for number in range(requests):
        name = str(number)
        stem = rng.choice(known)
        if rng.random() < 0.7:
            stem = stem[: rng.randrange(1, len(stem))]
        tokens = (stem + prompt((seed, name), rng.randrange(1, 30)))[:longest]
        alive[name] = tokens
        engine.add(
            name,
            tokens,
            rng.randrange(1, 40),
            cache_salt=rng.choice([None, None, None, "salt"]),
            prompt_logprobs=1 if rng.random() < 0.15 else None,
            priority=rng.randrange(3) if priority else 0,
            **fields,
        )
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.1:
            victim = rng.choice(list(alive))
            engine.abort(victim)
            del alive[victim]
        if faults and rng.random() < 0.1:
            doomed = {rng.randrange(1, pool.num_gpu_blocks) for _ in range(3)}
            engine.scheduler.kv_cache_manager.evict_blocks(doomed)
        if faults and not engine.lag and rng.random() < 0.04:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        if rng.random() < 0.1:
            engine.run()
            for other in [n for n in alive if n in engine.outputs]:
                known.append(alive.pop(other) + engine.outputs[other])
    engine.run()
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks are lost"


def hybrid_traffic(
    layout,
    seed,
    cls=RadixScheduler,
    lag=0,
    check=True,
    priority=False,
    drafts=0,
    drafters=(),
    room=0,
    **options,
):
    """Serve random requests over several KV cache groups, in a pool that is small.

    Args:
        layout: as for ``make_hybrid_scheduler``.
        seed: of everything random.
        cls: the scheduler, ours or vLLM's.
        lag: steps scheduled ahead of their results.
        check: verify pool and tree after every step.
        priority: schedule by priorities, which requests have at random.
        drafts: tokens that are drafted after each; some are wrong.
        drafters: groups of a draft model.
        room: blocks more than the longest request needs.
        options: as for ``make_hybrid_scheduler``.

    Returns:
        The engine, with nothing left to do.
    """
    rng = random.Random(seed)
    # What the longest request needs: 190 tokens, or the states of three places and
    # one a guess.
    least = sum(
        3 + drafts if isinstance(spec, MambaSpec) else -(-190 // spec.block_size)
        for spec in parse_layout(layout)
    )
    if "swa" in layout or "mamba" in layout:
        options.setdefault("prefix_cache_retention_interval", rng.choice([0, 64, None]))
    if priority:
        options["scheduling_policy"] = "priority"
    if drafts:
        options["speculative_config"] = ngram_drafts(drafts, lag)
    scheduler = make_hybrid_scheduler(
        cls,
        layout,
        num_blocks=1 + least + room + rng.randrange(6),
        asynchronous=bool(lag),
        max_num_seqs=rng.randrange(2, 6),
        max_num_batched_tokens=rng.choice([64, 128, 512]),
        scheduler_reserve_full_isl=False,
        **options,
    )
    engine = HybridDouble(scheduler, lag, check, drafts)
    engine.drafters = list(drafters)
    # Some stop at a token that was not known when the next step was scheduled.
    drive(engine, rng, seed, 30, faults=True, priority=priority, stop=(5, 6))
    return engine
