"""Routing rules: which of several engines gets a request."""

import json
from dataclasses import dataclass

from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.routing.base import Routing
from vllm_radix_bench.routing.events import Events
from vllm_radix_bench.routing.history import History
from vllm_radix_bench.routing.least_queue import LeastQueue
from vllm_radix_bench.routing.prefix_hash import PrefixHash
from vllm_radix_bench.routing.round_robin import RoundRobin

ROUTINGS: dict[str, type[Routing]] = {
    rule.name: rule for rule in (RoundRobin, LeastQueue, PrefixHash, History, Events)
}
"""All rules, by their names; the first one looks at nothing."""
DEFAULT_ROUTINGS = (RoundRobin.name, History.name)
MOST_ENGINES = 1024


@dataclass(frozen=True)
class RoutingChoice:
    """A rule with its options.

    Attributes:
        rule: the class.
        options: all of them.
    """

    rule: type[Routing]
    options: dict[str, float]

    def make(self, num_engines: int) -> Routing:
        """Return the rule, fresh, for so many engines."""
        return self.rule(num_engines, dict(self.options))


def parse_routing(text: str) -> RoutingChoice:
    """Return a rule: a name, or ``name:{JSON options}``.

    Raises:
        InputError: it is none, or an option is wrong.
    """
    name, colon, said = text.partition(":")
    rule = ROUTINGS.get(name)
    if rule is None:
        raise InputError(
            f"--routing: {text!r} is no rule; allowed: {', '.join(ROUTINGS)}, each "
            "with options behind it, as name:{JSON}"
        )
    try:
        given = json.loads(said) if colon else {}
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError(f"--routing: {text!r:.80} has no JSON object after the colon")
    options = {key: one.default for key, one in rule.options.items()}
    for key, value in given.items():
        if key not in options:
            known = ", ".join(options) or "none"
            raise InputError(
                f"--routing: {name} has no option {key!r}; allowed: {known}"
            )
        option = rule.options[key]
        kinds = (int,) if isinstance(option.default, int) else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not option.least <= value <= option.most:
            what = "a number" if float in kinds else "a whole number"
            raise InputError(
                f"--routing: {key!r} of {name} is {value!r}; allowed: {what} from "
                f"{option.least:g} to {option.most:g}"
            )
        options[key] = value
    return RoutingChoice(rule, options)
