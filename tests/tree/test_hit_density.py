"""The policy that learns, and what it learns from."""

import random
from itertools import count, pairwise

import pytest

from tree.requests import Requests
from vllm_radix.tree import POLICIES, EvictionPolicy, RadixTree, encode
from vllm_radix.tree.eviction import HitDensity, Queues, hit_density
from vllm_radix.tree.eviction.hit_density import BUCKETS, EPOCH, bucket_of
from vllm_radix_bench.study.eviction import hit_rate
from vllm_radix_bench.workloads.eviction_loads import draw


class Compared(EvictionPolicy):
    """Least recently used with two classes, compared with least recently used."""

    name = "compared"
    num_classes = 2
    ghosts = 8
    compares = True

    def __init__(self):
        self.found = []

    def label(self, uses, output_tokens, new_tokens):
        return int(uses > 1)

    def note_request(self, asked, found, lru, room):
        assert 0 <= found <= asked
        self.found.append((found, lru))


class OneByOne:
    """Serves one request after the other over a pool of some blocks of one token."""

    def __init__(self, policy, blocks):
        self.tree = RadixTree(1, policy)
        self.blank = list(range(blocks))
        self.hits = self.asked = 0

    def serve(self, tokens, output=(), noted=True):
        tree, key = self.tree, encode(tokens)
        found = list(tree.match(key).blocks)
        use = None
        if noted:
            use = tree.note_use(key, None, found[-1] if found else -1, len(found))
        tree.acquire(found)
        self.hits += len(found)
        self.asked += len(tokens)
        path = [*tokens, *output]
        need = len(path) - len(found)
        if need > len(self.blank):
            self.blank += tree.evict(need - len(self.blank))
        blocks = found + self.blank[:need]
        self.blank = self.blank[need:]
        self.blank += tree.insert(encode(path), blocks, start=len(found))
        new = len(tokens) - (use.seen if use else 0)
        if noted:
            tree.note_end(blocks, use, len(output), new)
        self.blank += tree.release(blocks[::-1])
        return use


def conversations(seed, requests):
    """Conversations that grow and share their beginnings, in turns at random."""
    rng = random.Random(seed)
    open_ones = [[0, 1, 2, 100 + i] for i in range(12)]
    fresh = 1000
    for _ in range(requests):
        one = rng.choice(open_ones)
        yield list(one), [fresh, fresh + 1]
        one += [fresh, fresh + 1, fresh + 2]
        fresh += 3
        if len(one) > 20:
            open_ones[open_ones.index(one)] = [0, 1, 2, fresh]
            fresh += 1


@pytest.mark.parametrize("blocks", [40, 60, 100, 400])
@pytest.mark.parametrize("seed", range(3))
def test_what_least_recently_used_would_find_is_told_exactly(blocks, seed):
    policy = Compared()
    served = OneByOne(policy, blocks)
    for tokens, output in conversations(seed, 400):
        served.serve(tokens, output)
    served.tree.check()
    assert len(policy.found) == 400
    assert all(found == lru for found, lru in policy.found)
    assert blocks == 400 or any(found < 4 for found, _ in policy.found[20:])


def test_blocks_that_were_not_noted_count_as_touched_when_they_are_released():
    policy = Compared()
    served = OneByOne(policy, 60)
    for number, (tokens, output) in enumerate(conversations(1, 200)):
        served.serve([10**6 + 9 * number + at for at in range(9)], noted=False)
        served.serve(tokens, output)
    found, lru = (sum(told) for told in zip(*policy.found, strict=True))
    # As if they were older than what was noted last: a little too much.
    assert found <= lru <= 1.15 * found


def test_without_evidence_the_order_is_least_recently_used():
    ours, lru = OneByOne(HitDensity(), 50), OneByOne(None, 50)
    rng = random.Random(0)
    for number in range(500):
        tokens = [number, *(rng.randrange(99) for _ in range(rng.randrange(1, 20)))]
        for one in (ours, lru):
            one.serve(tokens)
        assert ours.blank == lru.blank
        assert ours.tree.match(encode(tokens)) == lru.tree.match(encode(tokens))


def test_a_scan_does_not_displace_what_is_used_again():
    """Popular documents between requests that come once: a third of LRU's misses."""
    hits = {}
    for policy in (HitDensity(), None):
        rng = random.Random(1)
        served = OneByOne(policy, 200)
        for number in range(4000):
            if rng.random() < 0.3:
                document = rng.randrange(12)
                served.serve([document * 20 + at for at in range(10)], [10**6 + number])
            else:
                served.serve([10**7 + number * 30 + at for at in range(12)])
        hits[policy is None] = served.hits
    assert hits[False] > 1.15 * hits[True]


@pytest.mark.parametrize("seed", range(3))
def test_every_released_block_is_waiting_reused_or_forgotten(seed):
    policy = HitDensity()
    requests = Requests(RadixTree(2, policy), 60, seed)
    for _ in range(1500):
        requests.step()
    tree = requests.tree
    waiting = sum(policy.waiting) + sum(policy.waiting_longer)
    released = sum(tree._evictor.queues.blocks)
    assert waiting == released + tree.num_remembered
    assert min(policy.waiting) >= 0
    assert tree._evictor.queues.now > 2 * EPOCH, "no table was made"


def best_ratio(chances, widths, at):
    """The Gittins index as its definition says."""
    best, hits, time, there = 0.0, 0.0, 0.0, 1.0
    for bucket in range(at, BUCKETS):
        hits += there * chances[bucket]
        time += there * widths[bucket] * (1 - chances[bucket] / 2)
        there *= 1 - chances[bucket]
        best = max(best, hits / time)
    return best


def test_densities_are_gittins_indices():
    policy = HitDensity()
    rng = random.Random(2)
    widths = [4, *(4 << bucket for bucket in range(BUCKETS - 1))]
    hits = [[rng.randrange(10**6) for _ in range(BUCKETS)] for _ in range(54)]
    ends = [[rng.randrange(10**6) for _ in range(BUCKETS)] for _ in range(54)]
    for label in range(54):
        for bucket in range(BUCKETS):
            policy.hits[label * BUCKETS + bucket] = hits[label][bucket]
            policy.ends[label * BUCKETS + bucket] = ends[label][bucket]
    policy.note_release(EPOCH)
    for label in (0, 17, 53):
        total = [h + e for h, e in zip(hits[label], ends[label], strict=True)]
        # So much evidence that what it is shrunk to does not count.
        chances = [hits[label][b] / sum(total[b:]) for b in range(BUCKETS)]
        chances[-1] = min(chances[-1], 0.999)
        for bucket in range(BUCKETS):
            middle = 2 if bucket == 0 else 6 << (bucket - 1)
            assert bucket_of(middle) == bucket
            expected = best_ratio(chances, widths, bucket)
            assert policy.density(label, middle) == pytest.approx(expected, rel=0.01)
    # Counts fade, and no class is worth less for it.
    assert policy.hits[5] == pytest.approx(hits[0][5] * 15 / 16)


def test_densities_without_evidence_fall_with_age_and_are_those_of_all():
    policy = HitDensity()
    ages = [*range(300), *range(300, 300_000, 997)]
    curve = [policy.density(0, age) for age in ages]
    assert all(older < younger for younger, older in pairwise(curve))
    assert curve == [policy.density(53, age) for age in ages]


def test_the_guard_takes_over_and_hands_back():
    policy = HitDensity()
    queues = Queues(policy.num_classes)
    queues.now, queues.ranks[3], queues.ranks[40] = 100, 7, 5
    queues.released[3], queues.released[40] = 90, 1
    queues.open, queues.changed = {3, 40}, {3, 40}
    assert policy.pick(queues) == 40
    # Class 40 is reused all the time, class 3 never.
    for _ in range(2 * EPOCH):
        policy.note_labelled(40, 99)
        policy.note_reused(40, 99, 99, False)
        policy.note_labelled(3, 99)
        policy.note_unused(3, 10, 99)
    policy.note_release(EPOCH)
    # As far as it is trusted without having found anything, and as far as it found.
    assert policy.guarded
    policy.note_request(1000, 410, 405, 2000)
    assert policy.credit == pytest.approx(5 + hit_density._ALLOWANCE * 1000)
    assert not policy.guarded
    assert policy.pick(queues) == 3
    policy.note_exposed(3, 7)
    assert policy.guarded
    assert policy.pick(queues) == 40
    # What least recently used would have evicted by now is at stake no more.
    policy.note_outcome(3, 7, False)
    policy.note_request(0, 0, 0, 2000)
    assert policy.pick(queues) == 3
    policy.note_request(1000, 400, 410, 2000)
    assert policy.guarded
    # No more than a cache can be lost at once, so more credit is of no use.
    policy.note_request(9000, 9000, 0, 2000)
    assert policy.credit == 2000


def test_a_class_is_trusted_more_the_more_of_it_came_to_nothing():
    policy = HitDensity()
    for _ in range(3):
        policy.note_request(100, 50, 50, 1000)
    policy.note_exposed(3, 400)
    policy.note_outcome(3, 100, True)
    policy.note_outcome(3, 200, False)
    policy.note_exposed(4, 10)
    policy.note_request(100, 50, 50, 1000)
    doubt = 16 * policy.asked / policy._requests + 0.75 * 1000
    risk = (100 + doubt) / (300 + doubt)
    assert policy.at_stake == pytest.approx(100 * risk + 10)
    policy.note_exposed(3, 10**6)
    policy.note_outcome(3, 10**6, False)
    policy.note_request(100, 50, 50, 1000)
    least = hit_density._LEAST_RISK
    assert policy.at_stake == pytest.approx(100 * least + 10)


@pytest.mark.parametrize("name", ["flip", "fool", "loop", "chats"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_without_trust_no_more_than_the_allowance_is_lost(name, share, monkeypatch):
    monkeypatch.setattr(hit_density, "_LEAST_RISK", 1.0)
    requests = draw(name, 7, 1500)
    used = {block for one in requests for block in (*one.prompt, *one.answer)}
    asked = sum(len(one.prompt) for one in requests)
    found = {}
    for policy in ("hit-density", "lru"):
        rate, _ = hit_rate(requests, 16, int(share * len(used)), policy)
        found[policy] = rate * asked
    longest = max(len(one.prompt) + len(one.answer) for one in requests)
    allowed = hit_density._ALLOWANCE * asked + longest
    assert found["hit-density"] >= found["lru"] - allowed


def test_a_loop_that_pauses_is_not_lost():
    """What fits, and is paused for longer than any reuse so far, is not given away."""
    hits = {}
    for policy in (HitDensity(), None):
        served = OneByOne(policy, 3000)
        fresh = count(10**6)
        for phase in range(3):
            for _ in range(3):
                if phase % 2 == 0:
                    for prompt in range(100):
                        served.serve([prompt * 20 + at for at in range(20)])
                else:
                    for tokens, output in conversations(phase, 120):
                        served.serve([*range(90000, 90010), *tokens], output)
                        served.serve([next(fresh) for _ in range(1)])
        hits[policy is None] = served.hits, served.asked
    (ours, asked), (lru, _) = hits[False], hits[True]
    assert ours >= lru - 0.002 * asked


class Judged(HitDensity):
    """Keeps what each request lost, and what least recently used would have found."""

    name = "judged"

    def __init__(self):
        super().__init__()
        self.lost_now = 0
        self.rows = []

    def note_outcome(self, label, blocks, lost):
        super().note_outcome(label, blocks, lost)
        assert self.exposed.get(label, 0) >= 0
        self.lost_now += blocks * lost

    def note_request(self, asked, found, lru, room):
        super().note_request(asked, found, lru, room)
        self.rows.append((self.lost_now, max(0, lru - found)))
        self.lost_now = 0


@pytest.mark.parametrize("name", ["retrieval", "chats"])
@pytest.mark.parametrize("seed", range(2))
def test_what_least_recently_used_finds_besides_was_exposed(name, seed, monkeypatch):
    made = []

    def judged():
        made.append(Judged())
        return made[-1]

    monkeypatch.setitem(POLICIES, "judged", judged)
    requests = draw(name, seed, 1500)
    used = {block for one in requests for block in (*one.prompt, *one.answer)}
    _, tree = hit_rate(requests, 16, len(used) // 10, "judged")
    (policy,) = made
    exposure = tree._evictor.account.exposure
    exposed = {label: exposure.blocks(label) for label in range(policy.num_classes)}
    assert policy.exposed == {label: n for label, n in exposed.items() if n}
    assert all(lost >= missed for lost, missed in policy.rows)
    lost, missed = (sum(row) for row in zip(*policy.rows, strict=True))
    # Of what was touched at one time it may still hold a part, which counts whole:
    # much with the long prompts of chats.
    assert 0 < missed <= lost
    assert name == "chats" or lost == missed


def test_uses_are_remembered_beyond_eviction():
    served = OneByOne(HitDensity(), 12)
    document = list(range(8))
    for round_ in range(3):
        use = served.serve(document)
        assert use.seen == (8 if round_ else 0)
        runs = served.tree._table.nodes[served.tree.match(encode(document)).blocks[7]]
        assert [run >> 24 & 255 for run in runs.runs] == [round_ + 1]
        served.serve([100 * (round_ + 1) + at for at in range(12)])
        assert served.tree.match(encode(document)).num_blocks == 0
    # A part of it that is asked for again.
    assert served.serve(document[:5]).seen == 5
    assert served.serve([*document[:4], 77]).seen == 4
