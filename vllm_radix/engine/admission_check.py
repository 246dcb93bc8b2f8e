"""Verifies an ``AdmissionController``, for tests."""

from vllm_radix.engine.admission import AdmissionController


def check_admission(admission: AdmissionController) -> None:
    """Verify that all that is kept of the requests agrees, O(everything).

    Raises:
        AssertionError: it does not.
    """
    a = admission
    a._waiting_tree.check()
    waiting = a._waiting
    followed = [entry for entry in waiting.values() if entry.id not in a._new]
    a._lookups.check(followed)
    filed = {entry.id for entry in a._waiting_tree.entries()}
    computing = set(a._computing)
    assert filed == computing | {e.id for e in followed}, "filed wrongly"
    assert not computing & waiting.keys(), "computes and waits"
    arrivals = [entry.arrival for entry in waiting.values()]
    assert arrivals == sorted(arrivals), "not in order of arrival"
    queued = [i for i in a.queue.movable() if i in waiting]
    assert list(waiting) == queued, "the queue differs"
    uncached = sum(
        entry.blocks if entry.id in a._new else entry.own_uncached
        for entry in waiting.values()
    )
    assert uncached == a._uncached_blocks, "uncached blocks are miscounted"
    assert a._num_sharing == sum(e.shared_before > 0 for e in followed)
    assert len(waiting) == a._table.num_older(a._arrivals)
