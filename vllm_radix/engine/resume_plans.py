"""Where requests are to leave resume points while they compute their prompts.

A window or a state is kept only where somebody is to go on from it. Those places are
known before a request computes them: where its tokens part from those of requests that
wait, and from those of requests that came before.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.policy import WaitingRequest, WaitingTree
from vllm_radix.tree import BYTES_PER_TOKEN, Namespace
from vllm_radix.tree.resume import ResumePoint

MAX_JUNCTIONS = 4
"""Junctions of one request that get a resume point: the deepest ones."""

_MAX_SEEN = 4096
_MIN_TOKENS_SEEN = 1 << 20


@dataclass
class ResumePlan:
    """Where one request leaves resume points, and how far it is.

    Attributes:
        request: that computes.
        key: its tokens that others may find cached.
        namespace: of the key.
        junctions: where others part from it, in tokens; those to come, in order.
        prefixes: the tokens before each junction.
        open: those of them that nobody can go on from yet.
        tail: the junction that only an identical prompt goes on from; 0 for none.
        end: where all that is known at first ends, if a point is to lie there, too;
            0 if not.
        end_saves: how many tokens fewer are computed from there.
        published: tokens up to which points were added where chunks and intervals end;
            those under way may not be known yet.
        stopped: the end of the last step, if it computed known tokens alone; else 0.
        boundaries: where an identical prompt goes on, if that lies before the end; the
            places where stock would keep a window.
        state_at: a place at the end of a block where its state lies until the blocks
            after it are full; its tokens may not be known yet.
        copied_at: a place inside a block whose state the next step copies.
        copied: the blocks that hold that state, by group.
        unwritten: points that this step writes.
        unfollowed: points that depend on a token that is not known yet.
    """

    request: Request
    key: bytes = b""
    namespace: Namespace = None
    junctions: list[int] = field(default_factory=list)
    prefixes: dict[int, bytes] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    tail: int = 0
    end: int = 0
    end_saves: int = 0
    stopped: int = 0
    published: int | None = None
    boundaries: list[int] = field(default_factory=list)
    state_at: int = 0
    copied_at: int = 0
    copied: dict[int, KVCacheBlock] = field(default_factory=dict)
    unwritten: list[ResumePoint] = field(default_factory=list)
    unfollowed: list[ResumePoint] = field(default_factory=list)

    def is_junction(self, place: int) -> bool:
        """Return whether others part from it there."""
        return place not in (self.tail, self.end)


class SeenPrompts:
    """The prompts of requests that came before: bounded, the oldest go first.

    Args:
        max_tokens: of all of them.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max(max_tokens, _MIN_TOKENS_SEEN)
        self._tree = WaitingTree(BYTES_PER_TOKEN)
        self._entries: deque[WaitingRequest] = deque()
        self._tokens = 0
        self._number = 0

    def add(self, key: bytes, namespace: Namespace) -> None:
        """Note a prompt: O(log n) comparisons of keys, and O(n) in memmove."""
        entry = WaitingRequest(
            "", self._number, key=key, namespace=namespace, tokens=len(key)
        )
        self._number += 1
        self._tree.add(entry)
        self._entries.append(entry)
        self._tokens += len(key) // BYTES_PER_TOKEN
        while self._tokens > self._max_tokens or len(self._entries) > _MAX_SEEN:
            old = self._entries.popleft()
            self._tree.remove(old)
            self._tokens -= len(old.key) // BYTES_PER_TOKEN

    def deepest_branch(self, key: bytes, namespace: Namespace, above: int) -> int:
        """Return how many tokens a prompt shares with one that goes on otherwise.

        0 if those are not more than ``above``. A prompt that goes on from another, as
        the next turn of a conversation, is no branch. O(log n) comparisons of keys.
        """
        return next(self._tree.branches(key, namespace, above, ended=False), 0)

    def clear(self) -> None:
        """Forget all of them."""
        self._tree = WaitingTree(BYTES_PER_TOKEN)
        self._entries.clear()
        self._tokens = 0


class ResumePlans:
    """The plans of the requests that run.

    Args:
        grain: junctions lie at multiples of so many tokens.
        min_gap: fewest tokens that a junction must save, for a point to be worth it.
        max_tokens: of the prompts that are remembered.
        dense: whether what is cached of a request is memory that it shares; a state
            is not.
        lookahead: tokens behind a point that it depends on; see ``ResumePoint``.

    Attributes:
        grain: as given.
        min_gap: as given.
        dense: as given.
        waiting: the requests that wait, if somebody orders them.
    """

    def __init__(
        self,
        grain: int,
        min_gap: int,
        max_tokens: int,
        dense: bool = True,
        lookahead: int = 0,
    ) -> None:
        self._lookahead = lookahead
        self.grain = grain
        self.min_gap = min_gap
        self.dense = dense
        self._seen = SeenPrompts(max_tokens)
        self._plans: dict[str, ResumePlan] = {}
        self.waiting: WaitingTree | None = None

    def junctions(
        self, plan: ResumePlan, limit: int, cached: int, public: int = 0
    ) -> list[int]:
        """Return where a request is to leave resume points for others, in order.

        O(log n) comparisons of keys for each place where waiting ones part from it.

        Args:
            plan: of the request; its key and namespace count.
            limit: most tokens that another can have cached of it.
            cached: tokens that it finds cached itself.
            public: tokens that all salts share. A point there does not depend on what
                its client and others have in common after them.
        """
        key, namespace = plan.key, plan.namespace
        places = [self._seen.deepest_branch(key, namespace, cached)]
        if self.waiting is not None:
            places += self.waiting.branches(key, namespace, cached, present=True)
        kept: list[int] = []
        for place in sorted(places, reverse=True):
            place = self.place(min(place, limit))
            if place - cached < self.min_gap:
                break
            if not kept or kept[-1] - place >= self.min_gap:
                kept.append(place)
        kept = kept[MAX_JUNCTIONS - 1 :: -1]
        public = self.place(min(public, limit))
        if public - cached >= self.min_gap:
            kept = [n for n in kept if abs(n - public) >= self.min_gap]
            kept = sorted([*kept[1 - MAX_JUNCTIONS :], public])
        return kept

    def with_ends(
        self, plan: ResumePlan, junctions: list[int], tail: int, end: int, above: int
    ) -> list[int]:
        """Return junctions and, noted in the plan, where its prompt ends for others.

        Args:
            plan: of the request.
            junctions: of the request.
            tail: where the same prompt goes on, inside a block; 0 for nowhere.
            end: where what is known of it ends, and its next turn goes on; 0 where
                something else sees to that.
            above: tokens after which others can go on anyway.
        """
        kept = list(junctions)
        tail -= tail % self.grain
        if tail > above and tail not in kept:
            plan.tail = tail
            kept.append(tail)
        saves = end - max([above, *kept])
        if end % self.grain == 0 and saves >= self.min_gap:
            plan.end, plan.end_saves = end, saves
            kept.append(end)
        return sorted(kept)

    def place(self, shared: int) -> int:
        """Return where a junction lies of requests that share so many tokens."""
        return max(0, shared - self._lookahead) // self.grain * self.grain

    def get(self, request_id: str) -> ResumePlan | None:
        """Return the plan of a request that runs; None for others."""
        return self._plans.get(request_id)

    def start(self, plan: ResumePlan) -> None:
        """Note that a request runs by a plan, and remember its prompt."""
        self._plans[plan.request.request_id] = plan
        plan.prefixes = {n: plan.key[: n * BYTES_PER_TOKEN] for n in plan.open}
        self._seen.add(plan.key, plan.namespace)

    def pop(self, request_id: str) -> ResumePlan | None:
        """Return the plan of a request that leaves, and forget it."""
        return self._plans.pop(request_id, None)

    def open(self) -> Iterator[ResumePlan]:
        """Yield the plans with junctions that others may wait for: O(running)."""
        for plan in self._plans.values():
            if plan.open:
                yield plan

    def open_junctions(self) -> Iterator[tuple[int, bytes, Namespace]]:
        """Yield the places that others may wait for: O(running).

        Yields:
            How many tokens come before, which they are, and of which namespace.
        """
        for plan in self.open():
            for place in plan.open:
                yield place, plan.prefixes[place], plan.namespace

    def forget_prompts(self) -> None:
        """Forget the prompts that came before: the cache was reset."""
        self._seen.clear()
