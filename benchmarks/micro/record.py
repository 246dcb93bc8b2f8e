"""What recording costs a request: in the scheduler, and in the thread beside it.

Run: python -m vllm_radix_bench.micro.record
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_radix import RadixScheduler
from vllm_radix.record import EndedRequest
from vllm_radix_bench.sim.engine import RequestMaker, make_scheduler

_REQUESTS, _ANSWER, _TURNS = 200, 100, 5
_SHARED = 0.75
"""Of a prompt, by all requests."""


def main() -> None:
    """Measure prompts of three lengths, the fastest of five turns each."""
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "trace.jsonl")
        scheduler = make_scheduler(
            RadixScheduler, block_size=16, radix={"record": record}
        )
        for length in (500, 4000, 32_000):
            turns = [_measure(scheduler, length, turn) for turn in range(_TURNS)]
            here, thread = (min(each) for each in zip(*turns, strict=True))
            print(
                f"{length:,} tokens and an answer of {_ANSWER}: {here:.1f} µs in the "
                f"scheduler, {thread:.1f} µs in the thread"
            )
        scheduler.shutdown()


def _measure(scheduler: Any, length: int, turn: int) -> tuple[float, float]:
    """Return microseconds of CPU for each request, in the scheduler and the thread."""
    recorder, made = scheduler.recorder, list(_requests(scheduler, length, turn))
    writer, put = recorder.writer, recorder.writer.put
    handed: list[EndedRequest] = []
    writer.put = handed.append

    def record(request: Any) -> None:
        recorder.note_arrival(request)
        recorder.record(request)

    here = _seconds(record, made)
    writer.put = put
    thread = _seconds(writer._write, handed)
    return here / _REQUESTS * 1e6, thread / _REQUESTS * 1e6


def _requests(scheduler: Any, length: int, turn: int) -> Iterable[Any]:
    """Yield requests that have ended, with the keys that the cache has made by then."""
    rng, maker = random.Random(f"{length} {turn}"), RequestMaker(scheduler)
    keys = scheduler.kv_cache_manager.block_pool.keys

    def tokens(count: int) -> list[int]:
        return [rng.randrange(50) for _ in range(count)]

    shared = tokens(int(_SHARED * length))
    for number in range(_REQUESTS):
        prompt = shared + tokens(length - len(shared))
        request = maker.make(f"{length} {turn} {number}", prompt, _ANSWER)
        request.append_output_token_ids(tokens(_ANSWER))
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        keys.key(request, request.num_tokens // keys.block_size * keys.block_size)
        yield request


def _seconds(call: Callable[[Any], None], items: Iterable[Any]) -> float:
    start = time.thread_time()
    for item in items:
        call(item)
    return time.thread_time() - start


if __name__ == "__main__":
    main()
