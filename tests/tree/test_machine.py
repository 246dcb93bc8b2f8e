"""The tree and its oracle, driven side by side by hypothesis.

The machine plays the pool and the requests: it owns the ids, holds each block
as often as requests use it, and lets go as a request does. There is a machine for each
eviction policy. The oracle knows the order of least recently used; of others it knows
which blocks may go.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tree.flat_cache import FlatCache
from vllm_radix.tree import POLICIES, ChangeLog, RadixTree, encode

POOL = 24
SYMBOLS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
TEXT = st.tuples(SYMBOLS, st.integers(0, 15))
SPACE = st.sampled_from([None, "salt"])


class Both(RuleBasedStateMachine):
    """Runs each action on both caches and compares what they answer.

    Attributes:
        actions: how many were run, by all machines of this policy.
        policy: the name of the eviction policy.
    """

    actions = 0
    policy = "lru"

    @initialize(block_size=st.sampled_from([1, 2, 3, 4, 16, 32]))
    def start(self, block_size):
        self.size = block_size
        self.tree = RadixTree(block_size, POLICIES[self.policy]())
        self.flat = FlatCache(block_size)
        self.blank = list(range(POOL))
        self.uses = [0] * POOL
        # [tokens, namespace, blocks, published, partial tokens, use]
        self.requests = []
        self.probes = {}
        self.tree.changes = ChangeLog()
        self.ends = {}  # place -> where its look-up ended
        self.paths = []  # (namespace, tokens) that ended requests have used
        self.parted = []  # (namespace, tokens) up to where two paths were alike

    def tokens(self, text):
        """A few symbols, long enough to fill blocks; cut off at any token."""
        symbols, cut = text
        stretch = max(1, self.size // 2)
        tokens = [symbol for symbol in symbols for _ in range(stretch)]
        return tokens[: max(1, len(tokens) - cut % stretch)]

    def both(self, action):
        mine, theirs = action(self.tree), action(self.flat)
        assert mine == theirs
        return mine

    def use(self, block):
        self.uses[block] += 1

    def evict_both(self, count):
        """The oracle evicts what the tree does, if those are blocks that may go."""
        if self.policy == "lru":
            evicted = self.both(lambda cache: cache.evict(count))
        else:
            evicted = self.tree.evict(count)
            self.flat.evict_these(evicted)
            if len(evicted) < count:
                assert not self.flat.evictable_ranks(), "more blocks may go"
        self.forget_parted()
        return evicted

    def take_blank(self, count):
        """Blank ids first, then what the cache evicts; fewer if it cannot."""
        short = count - len(self.blank)
        if short > 0:
            self.blank += self.evict_both(short)
        taken, self.blank = self.blank[:count], self.blank[count:]
        return taken

    @rule(tokens=TEXT, namespace=SPACE, read=st.booleans(), keep=st.integers(0, 9))
    def admit(self, tokens, namespace, read, keep):
        """A request: match, hold, compute the rest, and publish part of it."""
        tokens = self.tokens(tokens)
        key = encode(tokens)
        needed = -(-len(tokens) // self.size)
        hit = ()
        if read:
            hit = self.both(lambda cache: cache.match(key, namespace).blocks)
        last = hit[-1] if hit else -1
        use = self.tree.note_use(key, namespace, last, len(hit))
        assert (use is None) == (not self.tree.learns)
        if hit:
            self.tree.note_parting(last, shared=self.uses[last] > 0)
        self.both(lambda cache: cache.acquire(hit))
        new = self.take_blank(needed - len(hit))
        for block in (*hit, *new):
            self.use(block)
        blocks = [*hit, *new]
        self.requests.append([tokens, namespace, blocks, len(hit), 0, use])
        self.publish(len(self.requests) - 1, keep)

    def publish(self, index, keep):
        tokens, namespace, blocks, done, *_ = self.requests[index]
        upto = min(len(blocks), done + keep, len(tokens) // self.size)
        if upto > done:
            self.requests[index][3:5] = upto, 0
            key = encode(tokens)
            freed = self.both(
                lambda cache: sorted(cache.insert(key, blocks[:upto], namespace, done))
            )
            self.blank += freed
            self.note_parted(namespace, key[: upto * self.tree.block_bytes])

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), keep=st.integers(1, 4))
    def go_on(self, data, keep):
        self.publish(data.draw(st.integers(0, len(self.requests) - 1)), keep)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def publish_partial(self, data):
        """The block after the published ones, as far as it is filled."""
        request = data.draw(st.sampled_from(self.requests))
        tokens, namespace, blocks, done, before, _ = request
        most = min(self.size - 1, len(tokens) - done * self.size)
        if done == len(blocks) or most < max(1, before):
            return
        count = data.draw(st.integers(max(1, before), most))
        key = encode(tokens[: done * self.size + count])

        def insert(cache):
            cached, freed = cache.insert_partial(key, blocks[: done + 1], namespace)
            return cached, sorted(freed)

        _, freed = self.both(insert)
        self.blank += freed
        request[4] = count

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        noted=st.booleans(),
        output=st.integers(0, 300),
        level=st.none() | st.integers(0, 2),
    )
    def finish(self, data, noted, output, level):
        index = data.draw(st.integers(0, len(self.requests) - 1))
        request = self.requests.pop(index)
        tokens, _, blocks, _, _, use = request
        if noted:
            new = len(tokens) - (use.seen * self.size if use else 0)
            self.tree.note_end(blocks, use, output, max(0, new))
        idle = []
        for block in reversed(blocks):
            self.uses[block] -= 1
            if not self.uses[block]:
                idle.append(block)
        freed = self.both(lambda cache: cache.release(idle))
        self.blank += freed
        self.blank += [b for b in idle if b not in self.flat and b not in freed]
        if level is not None:
            self.let_go(request, level)
        self.paths.append((request[1], encode(tokens[: request[3] * self.size])))

    def let_go(self, request, level):
        """Its session is over: what only its own path has used goes first."""
        tokens, namespace, _, done, *_ = request
        path = encode(tokens[: done * self.size])
        cached = self.flat.match(path, namespace).blocks
        if not done or len(cached) < done:
            return
        gone = self.tree.let_go(cached[-1], done - 1, level)
        self.flat.let_these_go(gone, level)
        for block in gone:
            assert not self.uses[block]
            whole = self.flat.match(path, namespace).blocks
            if block not in whole:
                continue  # the partial block at its end
            end = (whole.index(block) + 1) * self.tree.block_bytes
            for space, alike in self.parted:
                if space == namespace and len(alike) >= end:
                    assert not path.startswith(alike), f"{block} is of two paths"

    def note_parted(self, namespace, key):
        """Note where a path parts from those that are cached beyond: used by two."""
        size = self.tree.block_bytes
        running = [(n, encode(t[: d * self.size])) for t, n, _, d, *_ in self.requests]
        for space, other in (*self.paths, *running):
            if space != namespace:
                continue
            pairs = range(0, min(len(key), len(other)), size)
            alike = next(
                (i for i in pairs if key[i : i + size] != other[i : i + size]), 0
            )
            if alike and self.cached_bytes(space, other) > alike:
                self.parted.append((space, key[:alike]))

    def cached_bytes(self, namespace, key):
        return self.flat.match(key, namespace).num_blocks * self.tree.block_bytes

    def forget_parted(self):
        """Forget what is not cached any more, as the tree does."""
        self.parted = [
            (n, key) for n, key in self.parted if self.cached_bytes(n, key) == len(key)
        ]

    @rule(tokens=TEXT, namespace=SPACE, level=st.integers(-1, 15))
    def keep(self, tokens, namespace, level):
        """A client asks for what it has cached, or does no longer."""
        key = encode(self.tokens(tokens))
        for block in self.flat.match(key, namespace).blocks[-1:]:
            if level < 0:
                self.both(lambda cache, block=block: cache.unkeep(block))
            else:
                self.both(lambda cache, block=block: cache.keep(block, level))

    @rule(block=st.integers(0, POOL + 2), level=st.integers(0, 1))
    def keep_any(self, block, level):
        self.both(lambda cache: cache.keep(block, level))

    @rule(count=st.integers(1, 5))
    def evict(self, count):
        self.blank += self.evict_both(count)

    @rule(blocks=st.lists(st.integers(0, POOL + 2), max_size=6))
    def pin(self, blocks):
        for block in blocks:
            self.both(lambda cache, block=block: cache.pin(block))

    @rule(tokens=TEXT, namespace=SPACE, times=st.integers(-1, 2))
    def pin_prefix(self, tokens, namespace, times):
        """What a waiting request has cached, as far as it goes."""
        key = encode(self.tokens(tokens))
        for block in self.flat.match(key, namespace).blocks[-1:]:
            for _ in range(times):
                self.both(lambda cache, block=block: cache.pin(block))
            if times < 0:
                self.both(lambda cache, block=block: cache.unpin(block))

    @rule(blocks=st.lists(st.integers(0, POOL + 2), max_size=6))
    def unpin(self, blocks):
        for block in blocks:
            self.both(lambda cache, block=block: cache.unpin(block))

    @rule(block=st.integers(0, POOL - 1))
    def note_hit(self, block):
        # Only of partial blocks it is remembered until the next release.
        if self.tree.partial_tokens(block):
            self.both(lambda cache: cache.note_hit(block))

    @rule(block=st.integers(0, POOL - 1))
    def discard(self, block):
        if self.both(lambda cache: cache.discard(block)) and not self.uses[block]:
            self.blank.append(block)
        self.forget_parted()

    @rule(
        tokens=TEXT,
        namespace=SPACE,
        limit=st.none() | st.integers(0, 99),
        written=st.dictionaries(
            st.integers(0, POOL - 1), st.integers(0, 31), max_size=6
        ),
    )
    def match_inside(self, tokens, namespace, limit, written):
        key = encode(self.tokens(tokens))
        self.both(
            lambda cache: cache.match(
                key, namespace, limit, partial=True, written=written
            )
        )

    @rule(tokens=TEXT, namespace=SPACE, limit=st.none() | st.integers(0, 99))
    def match(self, tokens, namespace, limit):
        tokens = self.tokens(tokens)
        key = encode(tokens)
        found = self.both(lambda cache: cache.match(key, namespace, limit).blocks)
        place = tuple(tokens), namespace, limit
        last = self.probes.get(place)
        probe = self.tree.probe(key, namespace, limit, last)
        assert (probe.num_blocks if probe else 0) == len(found)
        if probe:
            self.probes[place] = probe

    @rule()
    def probe_again(self):
        """Every probe ever taken still answers right when it resumes."""
        for (tokens, namespace, limit), last in list(self.probes.items()):
            key = encode(tokens)
            probe = self.tree.probe(key, namespace, limit, last)
            found = self.flat.match(key, namespace, limit).num_blocks
            assert (probe.num_blocks if probe else 0) == found
            if probe:
                self.probes[tokens, namespace, limit] = probe

    @precondition(lambda self: not self.requests)
    @rule()
    def reset(self):
        self.both(lambda cache: cache.reset())
        self.paths, self.parted = [], []
        self.blank = list(range(POOL))

    def end_of(self, tokens, namespace, limit):
        """Where a look-up ends: blocks, the last one, and the tokens of the next."""
        key = encode(tokens)
        found = self.flat.match(key, namespace, limit).blocks
        wanted = len(tokens) if limit is None else min(limit, len(tokens))
        at = len(found) * self.size
        following = encode(tokens[at : at + self.size]) if at < wanted else b""
        last = found[-1] if found else ChangeLog.root(namespace)
        return len(found), last, following

    @invariant()
    def no_change_goes_unreported(self):
        if not hasattr(self, "tree"):
            return
        changes = self.tree.changes
        for place, before in self.ends.items():
            if self.end_of(*place) == before:
                continue
            _, last, following = before
            edge = last, following
            assert (
                changes.rescan_all
                or last in changes.removed_blocks
                or edge in changes.added_edges
            )
        changes.clear()
        self.ends = {place: self.end_of(*place) for place in self.probes}

    @invariant()
    def sound(self):
        if not hasattr(self, "tree"):
            return
        type(self).actions += 1
        self.tree.check()
        self.flat.check()
        mine, theirs = self.tree.stats(), self.flat.stats()
        assert mine._replace(nodes=0) == theirs
        assert self.tree.num_pinned_idle == self.flat.num_pinned_idle
        assert self.tree.num_kept == self.flat.num_kept
        # Conservation: every id is blank, idle, or used by a request.
        assert len(set(self.blank)) == len(self.blank)
        used = {block for block in range(POOL) if self.uses[block]}
        assert not used & set(self.blank)
        assert len(used) + len(self.blank) + mine.idle_blocks == POOL
        for block in range(POOL):
            if self.tree.is_idle(block):
                assert not self.uses[block]


def machine(policy):
    """Return the machine of an eviction policy."""
    return type(f"Both[{policy}]", (Both,), {"policy": policy, "actions": 0})


MACHINES = {name: machine(name) for name in POLICIES}


@pytest.mark.parametrize("policy", MACHINES)
def test_the_tree_does_as_its_oracle(policy):
    examples = 200 if policy == "lru" else 100
    run_state_machine_as_test(
        MACHINES[policy],
        settings=settings(max_examples=examples, stateful_step_count=40, deadline=None),
    )
