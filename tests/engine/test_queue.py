"""The waiting queue, against lists of what is where."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.engine.compat import RequestStatus
from vllm_radix.engine.queue import PrefixQueue

UNHURRIED = settings(deadline=None, max_examples=100)
GRAMMAR = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
PREEMPTED = RequestStatus.PREEMPTED


@dataclass(eq=False)
class Stub:
    """What the queue looks at of a request."""

    request_id: str
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0

    @property
    def movable(self):
        waits = self.status in (RequestStatus.WAITING, GRAMMAR)
        return waits and not self.num_computed_tokens

    def __repr__(self):
        return self.request_id


def filled(names="abcd"):
    """A queue, its requests by name, and the names of arrivals as noted."""
    noted = []
    queue = PrefixQueue(lambda request: noted.append(request.request_id))
    requests = {name: Stub(name) for name in names}
    for request in requests.values():
        queue.add_request(request)
    return queue, requests, noted


def read(queue, count=99):
    """Read as vLLM does; return the names."""
    names = ""
    while queue and len(names) < count:
        peeked = queue.peek_request()
        assert queue.pop_request() is peeked
        names += peeked.request_id
    return names


def names_in(queue):
    return "".join(request.request_id for request in queue)


def test_pop_request_no_plan_is_in_order_of_arrival():
    queue, _, noted = filled()
    assert noted == list("abcd")
    assert read(queue) == "abcd"
    assert len(queue) == 0 and not queue


def test_pop_request_plan_is_read_first():
    queue, _, _ = filled()
    queue.set_plan(["c", "gone", "b"])
    assert names_in(queue) == "abcd"
    assert read(queue) == "cbad"


def test_set_plan_withheld_are_not_read_but_counted():
    queue, _, _ = filled()
    queue.set_plan(["c"], {"a", "d"})
    assert len(queue) == 4
    assert read(queue) == "cb"
    assert len(queue) == 2 and not queue
    assert names_in(queue) == "ad"
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()
    queue.end_step()
    assert read(queue) == "ad"


def test_end_step_forgets_what_was_read():
    queue, _, _ = filled()
    queue.set_plan(["d", "b"])
    assert read(queue, 1) == "d"
    queue.end_step()
    assert list(queue.movable()) == list("abc")
    assert read(queue) == "abc"


@pytest.mark.parametrize("status", [RequestStatus.WAITING, GRAMMAR])
def test_prepend_request_that_was_read_keeps_its_place(status):
    queue, requests, noted = filled()
    queue.set_plan(["c"])
    assert read(queue, 2) == "ca"
    requests["c"].status = status
    queue.prepend_requests([requests["a"], requests["c"]])
    assert names_in(queue) == "abcd"
    queue.end_step()
    assert read(queue) == "abcd"
    assert noted == list("abcd"), "it came before"


def test_prepend_request_not_read_goes_first_and_is_noted():
    queue, _, noted = filled("ab")
    queue.prepend_requests([Stub("x"), Stub("y")])
    assert noted == list("abxy")
    assert list(queue.movable()) == list("yxab")
    assert read(queue) == "yxab"


@pytest.mark.parametrize("in_the_same_step", [True, False])
def test_prepend_request_preempted_goes_to_the_head(in_the_same_step):
    queue, requests, noted = filled()
    read(queue, 2)
    if not in_the_same_step:
        queue.end_step()
    for name in "ab":
        requests[name].status = RequestStatus.PREEMPTED
        queue.prepend_request(requests[name])
    queue.end_step()
    assert list(queue.movable()) == list("cd")
    queue.set_plan(["d"])
    assert len(queue) == 4
    assert read(queue) == "badc"
    assert noted == list("abcd")


def test_prepend_request_with_blocks_goes_to_the_head():
    queue, requests, _ = filled()
    queue.pop_request()
    requests["a"].num_computed_tokens = 16
    queue.prepend_request(requests["a"])
    queue.set_plan(["d"])
    assert read(queue) == "adbc"


def test_add_request_not_movable_comes_after_the_head():
    queue, _, noted = filled("ab")
    for name in "xy":
        queue.add_request(Stub(name, PREEMPTED))
    queue.set_plan(["b"], {"x"})
    assert read(queue) == "xyba", "only arrivals are withheld"
    assert noted == list("ab")


def test_add_request_that_waits_for_its_stream_keeps_its_turn_unnoted():
    queue, _, noted = filled("a")
    queue.add_request(Stub("s", RequestStatus.WAITING_FOR_STREAMING_REQ))
    queue.add_request(Stub("b"))
    assert noted == list("ab")
    assert [queue[i].request_id for i in range(3)] == list("asb")
    assert queue[-1].request_id == "b"
    with pytest.raises(IndexError):
        queue[3]
    skipped = [queue.pop_request() for _ in range(2)]
    queue.prepend_requests(skipped[::-1])
    assert read(queue) == "asb"


def test_add_request_again_after_it_was_read_comes_last():
    queue, requests, noted = filled()
    queue.pop_request()
    queue.add_request(requests["a"])
    assert len(queue) == 4
    assert names_in(queue) == "bcda"
    assert noted == list("abcda")
    assert read(queue) == "bcda"


def test_remove_request_in_the_head_and_among_arrivals_is_gone():
    queue, requests, _ = filled()
    preempted = Stub("p", RequestStatus.PREEMPTED)
    queue.prepend_request(preempted)
    queue.set_plan(["c", "b"])
    assert queue.peek_request() is preempted
    queue.remove_request(preempted)
    queue.remove_request(requests["c"])
    assert len(queue) == 3
    assert read(queue) == "bad"


@pytest.mark.parametrize("was_read", [True, False])
def test_remove_request_not_in_the_queue_raises(was_read):
    queue, _, _ = filled()
    gone = queue.pop_request() if was_read else Stub("x")
    with pytest.raises(ValueError):
        queue.remove_request(gone)
    assert len(queue) == 4 - was_read


def test_remove_requests_while_reading_goes_on_with_the_next():
    queue, requests, _ = filled()
    queue.set_plan(["c"])
    assert read(queue, 2) == "ca"
    queue.remove_requests([requests["b"], requests["a"], Stub("x")])
    assert len(queue) == 1
    assert read(queue) == "d"


def test_movable_while_reading_does_not_bring_back_what_was_read():
    queue, _, _ = filled()
    queue.pop_request()
    assert list(queue.movable()) == list("bcd")
    assert read(queue) == "bcd"


KINDS = [
    *("add", "add other", "prepend new", "come again", "put back", "preempt"),
    *("pop", "pop", "pop", "plan", "end", "remove", "remove some"),
]
OPERATION = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 99),
)


class Model:
    """Head and arrivals as lists, next to the queue."""

    def __init__(self):
        self.queue = PrefixQueue(lambda request: self.noted.append(request))
        self.noted, self.expected = [], []
        self.head, self.arrivals = [], []
        self.read, self.running = [], []
        self.plan, self.withheld = [], set()
        self.count = 0

    def new(self, status=RequestStatus.WAITING):
        self.count += 1
        return Stub(str(self.count), status)

    def waiting(self):
        return [r for r in self.arrivals if r not in self.read]

    def next(self):
        """The request that is read next."""
        if self.head:
            return self.head[0]
        waiting = {request.request_id: request for request in self.waiting()}
        while self.plan and self.plan[0] not in waiting:
            del self.plan[0]
        if self.plan:
            return waiting[self.plan[0]]
        return next((r for i, r in waiting.items() if i not in self.withheld), None)

    def end(self):
        self.arrivals = self.waiting()
        self.running += self.read
        self.read, self.plan, self.withheld = [], [], set()

    def set_plan(self, number):
        self.end()
        ids = [request.request_id for request in self.arrivals]
        turned = [*ids[number % (len(ids) + 1) :], "unknown", *ids]
        self.plan = list(dict.fromkeys(turned))[: number % 5]
        self.withheld = {i for i in ids[:: 1 + number % 4] if i not in self.plan}
        self.queue.set_plan(list(self.plan), set(self.withheld))

    def pop(self):
        request = self.next()
        if request is None:
            with pytest.raises(IndexError):
                self.queue.pop_request()
            return
        assert self.queue.pop_request() is request
        if request in self.head:
            self.head.remove(request)
            self.running.append(request)
        else:
            self.read.append(request)

    def apply(self, name, number):
        queue, pick = self.queue, None
        if name in ("add", "prepend new"):
            request = self.new([RequestStatus.WAITING, GRAMMAR][number % 2])
            self.expected.append(request)
            if name == "add":
                queue.add_request(request)
                self.arrivals.append(request)
            else:
                queue.prepend_request(request)
                self.arrivals.insert(0, request)
        elif name == "add other":
            request = self.new(PREEMPTED if number % 2 else RequestStatus.WAITING)
            request.num_computed_tokens = 0 if number % 2 else 5
            queue.add_request(request)
            self.head.append(request)
        elif name == "plan":
            self.set_plan(number)
        elif name == "end":
            self.end()
            queue.end_step()
        elif name == "pop":
            self.pop()
        elif name == "put back" and self.read:
            pick = self.read.pop(number % len(self.read))
            queue.prepend_request(pick)
        elif name == "come again" and self.read:
            pick = self.read.pop(number % len(self.read))
            self.arrivals.remove(pick)
            self.arrivals.append(pick)
            self.expected.append(pick)
            queue.add_request(pick)
        elif name == "preempt" and self.read + self.running:
            admitted = self.read + self.running
            chosen = admitted[number % len(admitted) :][:2]
            for request in chosen:
                request.status = RequestStatus.PREEMPTED
                for place in (self.read, self.running, self.arrivals):
                    if request in place:
                        place.remove(request)
                self.head.insert(0, request)
            queue.prepend_requests(chosen)
        elif name == "remove" and self.head + self.waiting():
            there = self.head + self.waiting()
            pick = there[number % len(there)]
            (self.head if pick in self.head else self.arrivals).remove(pick)
            queue.remove_request(pick)
        elif name == "remove some":
            gone = (self.head + self.waiting())[:: 2 + number % 3]
            self.head = [r for r in self.head if r not in gone]
            self.arrivals = [r for r in self.arrivals if r not in gone]
            queue.remove_requests([*gone, self.new()])

    def verify(self):
        assert len(self.queue) == len(self.head) + len(self.waiting())
        assert list(self.queue) == self.head + self.waiting()
        assert self.noted == self.expected
        first = self.next()
        assert bool(self.queue) == (first is not None)
        if first is None:
            with pytest.raises(IndexError):
                self.queue.peek_request()
        else:
            assert self.queue.peek_request() is first


@UNHURRIED
@given(st.lists(OPERATION, max_size=50))
def test_prefix_queue_any_operations_equal_lists(operations):
    model = Model()
    for name, number in operations:
        model.apply(name, number)
        model.verify()
    model.end()
    model.queue.end_step()
    assert list(model.queue.movable().values()) == model.arrivals
    while model.next() is not None:
        model.pop()
    model.verify()
