"""A queue of requests before a cache, small enough to be counted by hand."""

from dataclasses import replace

from vllm_radix.policy import (
    ORDERS,
    AdmissionPlanner,
    ArrivalTable,
    FcfsTurns,
    LongestPrefixHeap,
    OvertakingBounds,
    QueueState,
    ServiceRate,
    StepCapacity,
    WaitingRequest,
    WaitingTree,
    view_of_queue,
)
from vllm_radix.tree import BYTES_PER_TOKEN, encode

SIZE = 2
BLOCK_BYTES = SIZE * BYTES_PER_TOKEN
FREE = StepCapacity(slots=100, tokens=10_000, blocks=10_000)
LOOSE = OvertakingBounds(10**9, 1e9, 1e9)


def common(one, two):
    """How many letters two texts begin with alike."""
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count


def most_common(text, others):
    """How many letters of a text one of the others begins with."""
    return max((common(text, other) for other in others), default=0)


def nodes(text, end=None):
    """The blocks of a text, each as the text up to its end."""
    return {text[:at] for at in range(1, len(text[:end]) + 1)}


class SmallQueue:
    """Waiting requests; a letter is a block, and some tokens follow them.

    Attributes:
        texts: by arrival.
        entries: those that wait, by arrival.
        warm: the texts that are cached.
        held: the texts that running requests hold.
    """

    def __init__(
        self, texts=(), warm=(), *, ages=None, held=(), adapters=None, tails=None
    ):
        self.tree = WaitingTree(BLOCK_BYTES)
        self.table = ArrivalTable()
        self.heap = LongestPrefixHeap()
        self.turns = FcfsTurns()
        self.rate = ServiceRate()
        self.rate.wait_limit = 1e12
        self.texts, self.entries = [], {}
        self.warm, self.held = list(warm), list(held)
        self._taken = set()
        for arrival, text in enumerate(texts):
            work = -ages[arrival] if ages else 0
            adapter = adapters[arrival] if adapters else 0
            tail = tails[arrival] if tails else 1
            self.add(text, work=work, tail=tail, adapter=adapter)
        self.look_up()

    def add(self, text, now=0.0, work=0, tail=1, **fields):
        arrival = len(self.texts)
        key = encode([ord(letter) for letter in text for _ in range(SIZE)])
        entry = WaitingRequest(str(arrival), arrival, now, work, key, **fields)
        entry.tokens = len(text) * SIZE + tail
        entry.blocks = -(-entry.tokens // SIZE)
        self.texts.append(text)
        self.entries[arrival] = entry
        self.tree.add(entry)
        self.table.add(arrival, work, entry.blocks)
        return entry

    def remove(self, arrival):
        entry = self.entries.pop(arrival)
        entry.waits = False
        self.tree.remove(entry)
        self.table.remove(arrival)
        return entry

    def look_up(self):
        """Note how much of each request is cached."""
        for arrival, entry in self.entries.items():
            cached = most_common(self.texts[arrival], self.warm)
            if cached != entry.cached:
                entry.cached = cached
                self.heap.push(entry)

    def idle(self):
        """The cached blocks that no running request holds."""
        cached = set().union(*map(nodes, self.warm))
        return cached.difference(*map(nodes, self.held))

    def needed(self):
        """The idle blocks that waiting requests have cached."""
        prefixes = (nodes(self.texts[a], e.cached) for a, e in self.entries.items())
        return self.idle().intersection(set().union(*prefixes))

    def _idle_cached(self, entry, take):
        path = nodes(self.texts[entry.arrival], entry.cached) & self.idle()
        path -= self._taken
        if take:
            self._taken |= path
        return len(path)

    def _last_sharer_before(self, entry):
        prefix = self.texts[entry.arrival][: entry.cached]
        return max(
            (
                arrival
                for arrival, other in self.entries.items()
                if arrival < entry.arrival
                and self.texts[arrival][: other.cached] == prefix
            ),
            default=-1,
        )

    def state(self):
        self._taken = set()
        warm = [entry for entry in self.entries.values() if entry.cached]
        return QueueState(
            self.entries.values(),
            self.tree,
            self.table,
            self.heap,
            self.turns,
            self.rate,
            SIZE,
            len(warm),
            sum(entry.uncached for entry in warm),
            self._last_sharer_before,
            self._idle_cached,
        )

    def view(self):
        """The queue as arrays, and the texts in their order."""
        texts = [self.texts[entry.arrival] for entry in self.tree.entries()]
        return view_of_queue(self.tree, self.rate.work, SIZE), texts

    def plan(self, planner, capacity=FREE, now=0.0, unavailable=(), stands_back=None):
        """Return the plan of a planner, as the engine asks for it."""
        if planner.order.protects_needed:
            capacity = replace(capacity, needed=len(self.needed()))
        blocked = [self.entries[arrival] for arrival in unavailable]
        return planner.plan(self.state(), capacity, now, blocked, stands_back)


def planner(policy, bounds=LOOSE, pool=1000, overtaking=0):
    order = ORDERS[policy]() if isinstance(policy, str) else policy
    made = AdmissionPlanner(order, bounds, pool)
    made.overtaking = overtaking
    return made


def plan(
    policy, queue, capacity=FREE, bounds=LOOSE, *, pool=1000, overtaking=0, **more
):
    """Return the arrivals that one plan names, and the reasons."""
    picks = queue.plan(planner(policy, bounds, pool, overtaking), capacity, **more)
    return [pick.entry.arrival for pick in picks], [pick.reason for pick in picks]
