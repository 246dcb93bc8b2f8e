"""What is remembered of evicted blocks, and counted of touches, beside plain lists."""

import random

import pytest

from vllm_radix.tree.ghosts import Ghost, Ghosts
from vllm_radix.tree.stack_distance import StackDistances


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keys", [20, 100_000])
def test_ghosts_do_as_a_plain_list(seed, keys):
    rng = random.Random(seed)
    ghosts, plain = Ghosts(), []
    for number in range(4000):
        key = rng.randrange(keys)
        ghost = Ghost(
            rng.randrange(1, 9), rng.randrange(54), rng.randrange(256), number
        )
        kind = rng.random()
        if kind < 0.5:
            ghosts.push(key, ghost)
            plain.append((key, ghost))
        elif kind < 0.9:
            found = [entry for entry in plain if entry[0] == key]
            got = ghosts.pop(key)
            assert got == (found[-1][1] if found else None)
            if found:
                plain.reverse()
                plain.remove(found[-1])
                plain.reverse()
        else:
            most = rng.randrange(100, 400)
            gone = list(ghosts.expire(most))
            while sum(ghost.blocks for _, ghost in plain) > most:
                assert gone.pop(0) == plain.pop(0)[1]
            assert not gone
        assert ghosts.blocks == sum(ghost.blocks for _, ghost in plain)
        assert len(ghosts) == len(plain)
    assert len(plain) > 10


def test_ghosts_take_24_bytes_a_run_and_48_when_just_doubled():
    ghosts = Ghosts()
    for key in range(100_000):
        ghosts.push(key, Ghost(1, 0, 0, 0))
        if key > 1000:
            assert ghosts.num_bytes <= 48 * len(ghosts)
    assert ghosts.num_bytes <= 35 * len(ghosts)


def test_runs_that_come_back_leave_no_room_behind():
    ghosts = Ghosts()
    ghosts.push(1 << 31, Ghost(1, 0, 0, 0))  # never comes back, and is never too much
    for key in range(50_000):
        ghosts.push(key, Ghost(1, 0, 0, key))
        assert ghosts.pop(key) is not None
    assert ghosts.num_bytes < 4000
    assert ghosts.pop(1 << 31) is not None


def touched_after(plain, asked, clock):
    return sum(plain[at] for at in range(asked + 1, clock + 1))


@pytest.mark.parametrize("capacity", [10, 3000, 10**6])
def test_touches_are_counted_as_in_a_plain_list(capacity):
    rng = random.Random(capacity)
    distances, plain = StackDistances(), {}
    distances.capacity = capacity
    for clock in range(20_000):
        plain[clock] = rng.randrange(1, 5)
        distances.add(clock, plain[clock])
        if rng.random() < 0.3:
            again = rng.randrange(max(0, clock - 3000), clock + 1)
            distances.add(again, -plain[again])
            distances.add(clock, plain[again])
            plain[clock], plain[again] = (
                plain[clock] + plain[again] * (again != clock),
                plain[again] * (again == clock),
            )
        if rng.random() < 0.02:
            asked = rng.randrange(clock + 1)
            # What is beyond the capacity may be forgotten, but not to less than that.
            for room in (capacity, rng.randrange(capacity) + 1):
                distances.capacity = room
                left = room - touched_after(plain, asked, clock)
                told = distances.room_at(asked)
                if told is None:
                    assert left >= plain[asked]
                else:
                    assert max(told, 0) == max(left, 0)
                horizon = distances.horizon()
                assert horizon < 0 or touched_after(plain, horizon, clock) >= room
                assert touched_after(plain, horizon + 1, clock) < room
            distances.capacity = capacity
    assert capacity > 10**5 or len(distances) <= 8192
