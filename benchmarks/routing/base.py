"""What a routing rule is: it chooses the engine of a request."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass
class EngineLoad:
    """What is known of the load of an engine.

    Attributes:
        in_flight: requests sent to it that have no answer yet; a router counts them
            itself, at any time.
        waiting: requests, as the engine told at the end of its last step.
        running: requests, as it told then.
        kv_usage: share of its cache that running requests hold, as it told then.
    """

    in_flight: int = 0
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True)
class RoutingOption:
    """A number that a rule can be told.

    Attributes:
        default: the value, unless told otherwise; a whole number is the default of
            what must be one.
        least: allowed.
        most: allowed.
        about: what it is.
    """

    default: float
    least: float
    most: float
    about: str


class Routing(ABC):
    """A routing rule, with what it remembers.

    The first line of a subclass's docstring says where it sends a request.

    The same calls give the same choices. ``choose`` takes time in the length of the
    prompt and the number of engines, however many requests came before.

    Args:
        num_engines: to choose from.
        options: values of ``options``, all of them.

    Attributes:
        name: in ``--routing``.
        like: which routers do so.
        options: what it can be told, by name.
        wants_events: whether engines tell it of their caches by KV events.
        observe_every: seconds between looks at what engines tell of their loads; 0
            where it does not look.
    """

    name: ClassVar[str]
    like: ClassVar[str]
    options: ClassVar[dict[str, RoutingOption]] = {}
    wants_events: ClassVar[bool] = False
    observe_every: float = 0.0

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        self.num_engines = num_engines
        self._turn = 0

    @abstractmethod
    def choose(
        self, prompt: Sequence[int], salt: str | None, loads: Sequence[EngineLoad]
    ) -> int:
        """Return the number of the engine that a request is sent to.

        Args:
            prompt: its tokens.
            salt: of its cache; requests with different ones share nothing.
            loads: of the engines.
        """

    def observe(self, loads: Sequence[EngineLoad]) -> None:  # noqa: B027
        """Note what engines told of their loads."""

    def note_events(  # noqa: B027
        self, engine: int, events: Sequence[Any]
    ) -> None:
        """Note what an engine tells of its cache, with vLLM's KV events."""

    def least(self, score: Callable[[int], Any]) -> int:
        """Return the engine with the least score: O(engines).

        Of equal ones it is another one each time, so that none is preferred.

        Args:
            score: of an engine, by its number.
        """
        count, first = self.num_engines, self._turn
        self._turn = (first + 1) % count
        return min(((first + i) % count for i in range(count)), key=score)
