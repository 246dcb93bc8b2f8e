"""The waiting queue: in order of arrival, and read in the order of a plan.

vLLM reads its queue from the front, once a step. Here the requests stay where they
are and a plan says which are read first::

    head        where vLLM put them to go first: preempted ones, those that hold blocks
    plan        the admissions planned for this step
    arrivals    all others, the oldest first; some may be withheld in this step

A request that vLLM reads and puts back, for it cannot go yet, keeps its place.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_radix.engine.compat import Request, RequestQueue, RequestStatus

_MOVABLE = (
    RequestStatus.WAITING,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
)


def _keeps_its_turn(request: Request) -> bool:
    """Return whether a request waits in order of arrival, not in the head."""
    preempted = request.status == RequestStatus.PREEMPTED
    return not (request.num_computed_tokens or preempted)


class PrefixQueue(RequestQueue):
    """A first-come queue that is read in the order of a plan.

    Args:
        on_arrival: called with each request that comes in and may be reordered.
    """

    def __init__(self, on_arrival: Callable[[Request], None]) -> None:
        self._on_arrival = on_arrival
        self._head: deque[Request] = deque()
        self._arrivals: OrderedDict[str, Request] = OrderedDict()
        self._plan: deque[str] = deque()
        self._withheld: frozenset[str] | set[str] = frozenset()
        # Read by vLLM in this step: admitted, or to be put back.
        self._read: dict[str, Request] = {}
        self._scan: Iterator[Request] | None = None
        self._here: Request | None = None

    def set_plan(
        self,
        plan: Sequence[str] = (),
        withheld: frozenset[str] | set[str] = frozenset(),
    ) -> None:
        """Set the order of the next step: O(requests read in the step before).

        Args:
            plan: ids of requests to be read first.
            withheld: ids of requests not to be read.
        """
        self._forget_read()
        self._plan = deque(plan)
        self._withheld = withheld
        self._scan = None

    def end_step(self) -> None:
        """Return to the order of arrival."""
        self.set_plan()

    def _forget_read(self) -> None:
        for request_id in self._read:
            self._arrivals.pop(request_id, None)
        self._read.clear()
        self._scan = None

    def movable(self) -> OrderedDict[str, Request]:
        """Return the requests behind the head, the oldest first; not a copy."""
        self._forget_read()
        return self._arrivals

    # -- what vLLM calls -------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Add a request at the end, O(1)."""
        if not _keeps_its_turn(request):
            # It comes after those that wait in the head, before all others.
            self._head.append(request)
            return
        if self._read.pop(request.request_id, None) is not None:
            del self._arrivals[request.request_id]
        self._arrivals[request.request_id] = request
        self._scan = None
        if request.status in _MOVABLE:
            self._on_arrival(request)

    def pop_request(self) -> Request:
        """Remove and return the request that is read next."""
        if self._head:
            return self._head.popleft()
        request = self._next()
        if request is None:
            raise IndexError("pop from an empty queue")
        self._read[request.request_id] = request
        return request

    def peek_request(self) -> Request:
        """Return the request that is read next."""
        request = self._head[0] if self._head else self._next()
        if request is None:
            raise IndexError("peek from an empty queue")
        return request

    def _next(self) -> Request | None:
        """Return the next of plan and arrivals: O(1), amortised over a step."""
        read = self._read
        while self._plan:
            request = self._arrivals.get(self._plan[0])
            if request is not None and request.request_id not in read:
                return request
            self._plan.popleft()
        while True:
            if self._scan is None:
                self._scan = iter(self._arrivals.values())
                self._here = next(self._scan, None)
            here = self._here
            if here is None:
                return None
            if here.request_id not in read and here.request_id not in self._withheld:
                return here
            self._here = next(self._scan, None)

    def prepend_request(self, request: Request) -> None:
        """Put a request first; one that was read goes back to its place. O(1)."""
        if self._read.pop(request.request_id, None) is None:
            if not _keeps_its_turn(request):
                self._head.appendleft(request)
                return
            self._arrivals[request.request_id] = request
            self._arrivals.move_to_end(request.request_id, last=False)
            if request.status in _MOVABLE:
                self._on_arrival(request)
        elif not _keeps_its_turn(request):
            # It was admitted, and preempted in the same step.
            del self._arrivals[request.request_id]
            self._head.appendleft(request)
        self._scan = None

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests first, the last one before all others."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Remove a request: O(1), and O(those in the head).

        Raises:
            ValueError: it is not in the queue.
        """
        request_id = request.request_id
        if request_id in self._arrivals and request_id not in self._read:
            del self._arrivals[request_id]
            self._scan = None
        else:
            self._head.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove those of some requests that are in the queue."""
        gone = set(requests)
        for request in gone:
            if request.request_id in self._arrivals:
                self._read.pop(request.request_id, None)
                del self._arrivals[request.request_id]
        if self._head:
            self._head = deque(r for r in self._head if r not in gone)
        self._scan = None

    def __bool__(self) -> bool:
        """Return whether there is a request to read."""
        return bool(self._head) or self._next() is not None

    def __len__(self) -> int:
        """Return how many requests wait, withheld ones included."""
        return len(self._head) + len(self._arrivals) - len(self._read)

    def __getitem__(self, index: int) -> Request:
        """Return a request by its place in ``iter``: O(index)."""
        if index < 0:
            index += len(self)
        for place, request in enumerate(self):
            if place == index:
                return request
        raise IndexError("queue index out of range")

    def __iter__(self) -> Iterator[Request]:
        """Yield the head, and the others in order of arrival."""
        yield from self._head
        for request in self._arrivals.values():
            if request.request_id not in self._read:
                yield request
