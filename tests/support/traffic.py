"""Random traffic on the engine double: everything that can happen to a block."""

import random

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from support.engine_double import EngineDouble, make_scheduler
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
    pool = engine.scheduler.kv_cache_manager.block_pool
    known = [prompt((seed, i), rng.randrange(40, 130)) for i in range(4)]
    alive = {}
    for number in range(requests):
        name = str(number)
        stem = rng.choice(known)
        if rng.random() < 0.7:
            stem = stem[: rng.randrange(1, len(stem))]
        tokens = (stem + prompt((seed, name), rng.randrange(1, 30)))[:150]
        alive[name] = tokens
        engine.add(
            name,
            tokens,
            rng.randrange(1, 40),
            cache_salt=rng.choice([None, None, None, "salt"]),
            prompt_logprobs=1 if rng.random() < 0.15 else None,
            priority=rng.randrange(3) if priority else 0,
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
        if faults and not lag and rng.random() < 0.04:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        if rng.random() < 0.1:
            engine.run()
            for other in [n for n in alive if n in engine.outputs]:
                known.append(alive.pop(other) + engine.outputs[other])
    engine.run()
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks are lost"
    return engine
