"""Routing rules: the contract for each, what each does by hand, and the registry."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from bench.routing.contract import RoutingContract, Sender, prompt
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_radix_bench.routing import ROUTINGS, parse_routing
from vllm_radix_bench.routing.affinity import Holders, chain
from vllm_radix_bench.routing.base import EngineLoad


class TestRoundRobin(RoutingContract):
    text = "round-robin"

    def test_one_after_the_other(self):
        sender = self.sender(3)
        assert [sender.send(prompt(0)) for _ in range(5)] == [0, 1, 2, 0, 1]


class TestLeastQueue(RoutingContract):
    text = "least-queue"

    def test_the_choices_are_those_of_vllm(self):
        """Its own method, called with the same loads."""
        rng = random.Random(0)
        rule = parse_routing(self.text).make(4)
        engines = list("abcd")
        theirs = SimpleNamespace(
            reqs_in_flight={},
            core_engines=engines,
            lb_engines=[[0, 0, 0.0] for _ in engines],
            eng_start_index=0,
            client_count=1,
            engine_inflight=Counter(),
        )
        loads = [EngineLoad() for _ in engines]
        chosen = []
        for number in range(2000):
            if rng.random() < 0.1:
                for load, told in zip(loads, theirs.lb_engines, strict=True):
                    load.waiting = told[0] = rng.choice((0, 0, 1, 5, 20))
                    load.running = told[1] = rng.randrange(9)
                    load.kv_usage = told[2] = rng.random()
                rule.observe(loads)
            request = SimpleNamespace(
                request_id=str(number), data_parallel_rank=None, pooling_params=None
            )
            chosen.append(rule.choose([1], None, loads))
            mine = engines[chosen[-1]]
            assert mine == DPLBAsyncMPClient.get_core_engine_for_request(
                theirs, request
            )
            loads[chosen[-1]].in_flight += 1
            for at, engine in enumerate(engines):
                if loads[at].in_flight and rng.random() < 0.3:
                    loads[at].in_flight -= 1
                    theirs.engine_inflight[engine] -= 1
        assert len(set(chosen)) == 4

    def test_what_engines_tell_is_seen_at_a_look_only(self):
        rule = parse_routing('least-queue:{"interval_ms": 250}').make(2)
        assert rule.observe_every == 0.25
        loads = [EngineLoad(running=9), EngineLoad(running=1)]
        assert rule.choose([1], None, loads) == 0, "no look yet"
        rule.observe(loads)
        assert [rule.choose([1], None, loads) for _ in range(3)] == [1, 1, 1]


class TestPrefixHash(RoutingContract):
    text = "prefix-hash"

    def test_equal_beginnings_meet_and_salts_part(self):
        sender = Sender('prefix-hash:{"tokens": 100}', 16)
        begin = prompt(1, 100)
        chosen = {sender.send(begin + prompt(i, 50)) for i in range(20)}
        assert len(chosen) == 1
        assert len({sender.send(begin, salt=str(i)) for i in range(40)}) > 4
        assert len({sender.send([*begin[:99], i]) for i in range(40)}) > 4

    def test_one_engine_more_moves_few(self):
        prompts = [prompt(i) for i in range(300)]
        four, five = (Sender(self.text, n) for n in (4, 5))
        moved = [(four.send(one), five.send(one)) for one in prompts]
        assert all(new in (old, 4) for old, new in moved)
        assert 30 < sum(new == 4 for _, new in moved) < 90


AFFINE = ("history", "events")


class TestHistory(RoutingContract):
    text = "history"

    def test_a_prompt_follows_those_it_shares_with(self):
        sender = self.sender(2)
        a, b = prompt(1, 64), prompt(2, 64)
        sent = [a + prompt(3, 16), a + prompt(4, 16), b + prompt(5, 16)]
        assert [sender.send(one) for one in sent] == [0, 0, 1]
        assert sender.send(b + prompt(6, 16)) == 1
        assert sender.send(a, salt="other") == 0, "new: the smaller tree"
        assert sender.rule.holders.held == [10, 6]

    @pytest.mark.parametrize(("own", "chosen"), [(89, 0), (90, 1)])
    def test_what_is_found_must_be_more_than_a_share(self, own, chosen):
        # 48 tokens are found; of 160 they are 0.3.
        sender = Sender('history:{"match": 0.3}', 2)
        assert sender.send(prompt(1, 48)) == 0
        longer = prompt(1, 48) + prompt(2, 22 + own)
        assert len(longer) == 70 + own
        assert sender.send(longer) == chosen

    def test_what_was_sent_long_ago_is_forgotten_from_its_end(self):
        sender = Sender('history:{"memory": 160}', 1)
        holders = sender.rule.holders
        for seed in (1, 2, 3):
            sender.send(prompt(seed, 64))
            assert holders.held == [min(4 * seed, 10)]
        assert len(holders) == 10
        found = [
            holders.longest(list(chain(prompt(seed, 64), None, 16)))[0]
            for seed in (1, 2, 3)
        ]
        assert found == [2, 4, 4]


class TestEvents(RoutingContract):
    text = "events"

    def stored(self, tokens, names, parent=None, salt=None):
        return SimpleNamespace(
            token_ids=tokens,
            block_hashes=names,
            parent_block_hash=parent,
            block_size=16,
            extra_keys=[(salt,) if salt else None],
        )

    def removed(self, *names):
        return SimpleNamespace(block_hashes=list(names))

    def test_the_mirror_knows_what_was_stored_and_removed(self):
        sender = self.sender(2)
        rule, tokens = sender.rule, prompt(1, 64)
        rule.note_events(1, [self.stored(tokens[:32], ["a", "b"])])
        assert [sender.send(tokens) for _ in range(3)] == [1, 1, 1]
        assert sender.send(tokens, salt="other") == 0, "the emptier cache"
        rule.note_events(0, [self.stored(tokens[:32], ["x", "y"])])
        rule.note_events(0, [self.stored(tokens[32:48], ["z"], parent="y")])
        assert sender.send(tokens) == 0, "it holds 48, the other 32"
        rule.note_events(0, [self.removed("z"), self.removed("y"), self.removed("x")])
        assert sender.send(tokens) == 1
        assert rule.holders.held == [0, 2]
        rule.note_events(1, [SimpleNamespace()])
        assert rule.holders.held == [0, 0] and len(rule.holders) == 0

    def test_a_block_that_two_copies_hold_is_there_until_both_are_gone(self):
        sender = self.sender(2)
        event = self.stored(prompt(1, 16), ["a"], salt="s")
        sender.rule.note_events(1, [event, event, self.removed("a")])
        assert sender.send(prompt(1, 32), salt="s") == 1
        sender.rule.note_events(1, [self.removed("a")])
        assert sender.rule.holders.held == [0, 0]


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize(
    ("counts", "is_balanced"),
    [((64, 0), True), ((65, 0), False), ((195, 130), True), ((196, 130), False)],
)
def test_loads_that_differ_too_much_are_evened_out(name, counts, is_balanced):
    sender = Sender(name, 2)
    holders = sender.rule.holders
    tokens = prompt(1, 16)
    if name == "events":
        sender.rule.note_events(
            0, [TestEvents().stored(tokens, ["a"]), TestEvents().removed()]
        )
    else:
        assert sender.send(tokens) == 0
    assert holders.held == [1, 0]
    for load, count in zip(sender.loads, counts, strict=True):
        load.in_flight = count
    assert sender.send(tokens) == (0 if is_balanced else 1)


def test_the_longest_part_and_all_who_hold_it_are_found():
    holders = Holders(3)
    for engine, held in ((0, "a"), (1, "abc"), (2, "abc")):
        for one in held:
            holders.add(engine, one)
    assert holders.longest("abcd") == (3, 0b110)
    assert holders.longest("x") == (0, 0b111)
    holders.remove(1, "b")
    assert holders.longest("abcd") == (3, 0b100)
    holders.remove(2, "b")
    assert holders.longest("abcd") == (1, 0b111)


def test_every_rule_has_a_contract_and_says_what_it_does():
    tested = {one.text for one in RoutingContract.__subclasses__()}
    assert tested == set(ROUTINGS)
    for name, rule in ROUTINGS.items():
        assert rule.name == name and rule.like
        assert rule.__doc__.splitlines()[0].endswith(".")
        for option in rule.options.values():
            assert option.least <= option.default <= option.most and option.about


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lru", "'lru' is no rule; allowed: round-robin, least-queue,"),
        ("history:{", "'history:{' has no JSON object after the colon"),
        ("history:[1]", "has no JSON object after the colon"),
        ('history:{"x": 1}', "history has no option 'x'; allowed: match, spread"),
        ('round-robin:{"x": 1}', "round-robin has no option 'x'; allowed: none"),
        ('prefix-hash:{"tokens": 0}', "'tokens' of prefix-hash is 0; allowed: a who"),
        ('prefix-hash:{"tokens": 8.5}', "is 8.5; allowed: a whole number from 1 to 1e"),
        ('prefix-hash:{"tokens": true}', "is True; allowed: a whole number from 1 to"),
        ('prefix-hash:{"tokens": "8"}', "is '8'; allowed"),
        ('history:{"match": NaN}', "is nan; allowed: a number from 0 to 1"),
    ],
)
def test_a_wrong_rule_is_named(text, message):
    with pytest.raises(ValueError, match="--routing: ") as error:
        parse_routing(text)
    assert message in str(error.value)
