"""What every routing rule is held to; a test class names the rule."""

import random
import sys
from collections import Counter

import pytest

from vllm_radix_bench.routing import parse_routing
from vllm_radix_bench.routing.base import EngineLoad


def prompt(seed: int, length: int = 320) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)


class Sender:
    """Sends prompts by a rule, and keeps what engines would tell."""

    def __init__(self, text: str, engines: int) -> None:
        self.rule = parse_routing(text).make(engines)
        self.loads = [EngineLoad() for _ in range(engines)]

    def send(self, tokens, salt=None, answered=True) -> int:
        chosen = self.rule.choose(tokens, salt, self.loads)
        assert chosen in range(len(self.loads))
        load = self.loads[chosen]
        load.in_flight += not answered
        load.running = load.in_flight
        if self.rule.observe_every:
            self.rule.observe(self.loads)
        return chosen


class RoutingContract:
    """A rule: in range, the same each time, even on what shares nothing, cheap."""

    text: str

    def sender(self, engines=4) -> Sender:
        return Sender(self.text, engines)

    @pytest.mark.parametrize("engines", [1, 2, 7])
    def test_an_engine_in_range_whatever_the_prompt(self, engines):
        sender = self.sender(engines)
        for length in (1, 15, 16, 17, 300):
            for salt in (None, "a"):
                for _ in range(3):
                    sender.send(prompt(length, length), salt, answered=False)

    @pytest.mark.parametrize("answered", [True, False])
    def test_the_same_calls_give_the_same_choices(self, answered):
        runs = []
        for _ in range(2):
            sender = self.sender()
            runs.append(
                [sender.send(prompt(i % 13), None, answered) for i in range(80)]
            )
        assert runs[0] == runs[1]

    @pytest.mark.parametrize("answered", [True, False])
    @pytest.mark.parametrize("engines", [2, 5])
    def test_requests_that_share_nothing_go_everywhere_alike(self, answered, engines):
        sender = self.sender(engines)
        sent = Counter(sender.send(prompt(i), None, answered) for i in range(400))
        assert len(sent) == engines
        assert max(sent.values()) < 1.35 * 400 / engines

    def lines(self, length: int, before: int) -> int:
        """Count the lines that run to route a prompt, after so many others."""
        sender = self.sender()
        for i in range(before):
            sender.send(prompt(i), None)
        tokens, count = prompt(-1, length), 0
        sender.rule.choose(tokens, None, sender.loads)

        def trace(frame, event, arg):
            nonlocal count
            count += event == "line"
            return trace

        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            sender.rule.choose(tokens, None, sender.loads)
        finally:
            sys.settrace(outer)
        return count

    def test_the_cost_is_that_of_the_prompt(self):
        short, long = self.lines(800, 0), self.lines(3200, 0)
        assert long <= 4.2 * short
        assert self.lines(800, 300) <= 1.1 * short + 10, "earlier requests cost nothing"
