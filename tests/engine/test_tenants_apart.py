"""What one tenant sees of another's prompts where both share a public prefix: nothing.

Two engines do the same in lockstep. In one, tenant B guesses what tenant A has asked;
in the other A has asked something else of the same length. All that B sees of its own
requests has to be the same in both. Three faults, put in on purpose, are seen.
"""

import random

import pytest

from support.engine_double import EngineDouble, make_scheduler
from support.hybrid_double import HybridDouble, make_hybrid_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler
from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.public_prefixes import Declared
from vllm_radix.engine.request_keys import RequestKeys

OTHER = 1000
"""Added to each token of A in the other world: whatever is alike there stays alike."""

HINTS = (
    *({}, {}, {"radix_end_session": True}, {"radix_keep_for": 30}),
    *({"radix_expect_in": 5}, {"radix_priority": 3}, {"radix_priority": "low"}),
)


class World:
    """An engine, and what its clients see of it.

    Attributes:
        seen: by request, how many tokens had come after each step since it was sent.
    """

    def __init__(self, made, double, public, lag):
        self.engine = double(made, lag, check=False, public=public)
        self.sent = {}
        self.seen = {}

    def send(self, name, tokens, salt, max_tokens, hints):
        extra = {"extra_args": hints} if hints else {}
        self.engine.add(name, tokens, max_tokens, cache_salt=salt, **extra)
        self.seen[name] = []

    def step(self):
        self.engine.step()
        for name, seen in self.seen.items():
            if name in self.engine.scheduler.requests:
                seen.append(len(self.engine.outputs.get(name, ())))

    def finish(self):
        while self.engine.scheduler.has_requests() or self.engine.in_flight:
            self.step()

    def observed(self, name):
        """Return all that a client sees of its request: hits, times, and answer."""
        cached, said = self.engine.cached[name], self.engine.outputs[name]
        order = [n for n in self.engine.admitted if n.startswith("b")]
        return cached, self.seen[name], said, order[-8:]


def make_world(rng_seed, layout, public):
    """Return a world; two of one seed are alike."""
    rng = random.Random(rng_seed)
    lag = rng.choice([0, 0, 1])
    size = rng.choice([4, 8, 16])
    radix = {
        "public_prefix": {"prompts": public},
        "min_sub_block_tokens": rng.choice([1, 2, 8]),
        "hold": rng.random() < 0.8,
        "eviction": rng.choice(["lru", "hit-density", "slru"]),
        "tenant": rng.choice(["", "cache_salt"]),
        "hint_quota": 0.5,
    }
    options = {
        "max_num_seqs": rng.choice([2, 4, 8]),
        "max_num_batched_tokens": rng.choice([16, 32, 128]),
        "asynchronous": bool(lag),
        "scheduler_reserve_full_isl": False,
        "radix": radix,
    }
    tight = rng.random() < 0.4
    if layout is not None:
        options["max_num_batched_tokens"] += 48
        blocks = rng.randrange(40, 60) if tight else 400
        made = make_hybrid_scheduler(RadixScheduler, layout, blocks, **options)
        return World(made, HybridDouble, public, lag)
    blocks = rng.randrange(250, 400) // size + 6 if tight else 4000 // size
    made = make_scheduler(block_size=size, num_blocks=blocks, **options)
    return World(made, EngineDouble, public, lag)


def probe(worlds, rng, number, public):
    """Let A ask, and B guess; return B's request."""
    system = rng.choice(public)
    secret = prompt((number, "secret"), rng.randrange(1, 50))
    asked = [secret]
    if rng.random() < 0.4:
        asked.append(secret[: rng.randrange(1, len(secret) + 1)] + prompt(number, 9))
    guessed = secret[: rng.randrange(len(secret) + 1)] + prompt((number, "b"), 5)
    while_running = rng.random() < 0.5
    hints, mine, salts = rng.choice(HINTS), rng.choice(HINTS), rng.choice(["ab", "a "])
    lengths, wait = [rng.randrange(1, 20) for _ in range(4)], rng.randrange(4)
    for world, shift in zip(worlds, (0, OTHER), strict=True):
        for at, private in enumerate(asked):
            tokens = system + [token + shift for token in private]
            world.send(f"a{number}.{at}", tokens, "a", lengths[at], hints)
        for _ in range(wait):
            world.step()
        if not while_running:
            world.finish()
        world.send(f"b{number}", system + guessed, salts[1].strip(), lengths[2], mine)
        world.finish()
        world.engine.scheduler.kv_cache_manager.block_pool.check()
    return f"b{number}"


def differing(seed, probes, layout=None):
    """Return how many of B's probes tell the two worlds apart, and how many hit."""
    rng = random.Random(seed)
    system = prompt((seed, "system"), 90)
    public = [system[: rng.randrange(20, 90)] for _ in range(2)]
    public.append(prompt((seed, "other"), rng.randrange(20, 60)))
    worlds = [make_world(seed, layout, public) for _ in range(2)]
    found = hits = 0
    for number in range(probes):
        name = probe(worlds, rng, number, public)
        one, two = (world.observed(name) for world in worlds)
        found += one != two
        hits += one[0] > 0
    return found, hits


def test_none_of_1000_probes_sees_what_another_tenant_has_asked():
    counts = [differing(seed, 50) for seed in range(20)]
    assert sum(found for found, _ in counts) == 0
    assert sum(hits for _, hits in counts) > 700, "B mostly finds what is public"


@pytest.mark.parametrize("layout", ["full/16+swa:40/16", "full/32+mamba/32x3"])
def test_nor_where_layers_are_of_several_kinds(layout):
    counts = [differing(seed, 40, layout) for seed in range(4)]
    assert sum(found for found, _ in counts) == 0
    assert sum(hits for _, hits in counts) > 80


# -- the same with a fault -------------------------------------------------------------


def leak_keys(monkeypatch):
    """Private tokens have no marker."""
    monkeypatch.setattr(
        RequestKeys, "_salted", lambda self, request, tokens, at: tokens
    )


def leak_a_token(monkeypatch):
    """What follows a declared prompt is public as well, up to the end of a block."""
    length = Declared.length

    def longer(self, tokens):
        public = length(self, tokens)
        return public and public + 16

    monkeypatch.setattr(Declared, "length", longer)


def leak_open_tails(monkeypatch):
    """The last blocks of running requests are compared by their bare tokens."""
    match = RadixBlockPool.match_open_tails

    def bare(self, *args):
        salted = RequestKeys._salted
        RequestKeys._salted = lambda keys, request, tokens, at: tokens
        try:
            return match(self, *args)
        finally:
            RequestKeys._salted = salted

    monkeypatch.setattr(RadixBlockPool, "match_open_tails", bare)


@pytest.mark.parametrize("fault", [leak_keys, leak_a_token, leak_open_tails])
def test_the_probes_see_a_leak(fault, monkeypatch):
    fault(monkeypatch)
    monkeypatch.setattr(EngineDouble, "_read", lambda *args: None)
    assert sum(differing(seed, 50)[0] for seed in range(8)) > 0


# -- a tenant that was never there -----------------------------------------------------


def idle_world(layout, public):
    radix = {"public_prefix": {"prompts": [public]}, "min_sub_block_tokens": 1}
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "radix": radix}
    if layout is None:
        made = make_scheduler(block_size=8, num_blocks=2000, **options)
        return World(made, EngineDouble, [public], 0)
    made = make_hybrid_scheduler(RadixScheduler, layout, 4000, **options)
    return World(made, HybridDouble, [public], 0)


@pytest.mark.parametrize("layout", [None, "full/16+swa:40/16", "full/32+mamba/32x3"])
def test_an_idle_engine_does_not_tell_whether_another_tenant_was_there(layout):
    """Once the public prefix is cached, by whomever."""
    rng = random.Random(1)
    public = prompt("system", 83)
    with_a, without = worlds = [idle_world(layout, public) for _ in range(2)]
    for world in worlds:
        world.send("c", public + prompt("c", 20), "c", 3, {})
        world.finish()
    found = 0
    for number in range(150):
        secret = prompt((number, "secret"), rng.randrange(1, 50))
        for at in range(rng.randrange(1, 3)):
            tokens = public + secret + prompt((number, at), 3)
            with_a.send(f"a{number}.{at}", tokens, "a", rng.randrange(1, 30), {})
        with_a.finish()
        guessed = secret[: rng.randrange(len(secret) + 1)] + prompt((number, "b"), 5)
        for world in worlds:
            world.send(f"b{number}", public + guessed, "b", 3, {})
            world.finish()
        one, two = (world.observed(f"b{number}") for world in worlds)
        found += one != two
    assert found == 0
    assert len(set(without.engine.cached.values())) > 1
