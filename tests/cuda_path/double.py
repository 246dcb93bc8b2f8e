"""A job's traffic through the engine double, whose worker checks every read."""

from typing import Any

from cuda_path.jobs import BLOCK, ENGINE

from support.engine_double import EngineDouble, make_scheduler


def serve(job: dict[str, Any], num_blocks: int, lag: int) -> EngineDouble:
    """Run a job without a model, and return the double.

    Answers are other ones than a model's and of full length; what they share, and
    when what is sent, aborted and reset, is the job's.

    Args:
        job: of ``jobs``.
        num_blocks: of the cache, the null block aside.
        lag: steps that are scheduled ahead of their results.
    """
    scheduler = make_scheduler(
        block_size=BLOCK,
        num_blocks=num_blocks + 1,
        max_model_len=ENGINE["max_model_len"],
        max_num_seqs=ENGINE["max_num_seqs"],
        max_num_batched_tokens=ENGINE["max_num_batched_tokens"],
        asynchronous=bool(lag),
    )
    double = EngineDouble(scheduler, lag=lag)
    after: dict[str | None, list[dict[str, Any]]] = {}
    for request in job["requests"]:
        after.setdefault(request.get("after"), []).append(request)
    running: dict[str, Any] = {}
    doomed: dict[str, int] = {}

    def send(request: dict[str, Any], before: list[int]) -> None:
        name, tokens = request["id"], before + request["tokens"]
        running[name] = double.add(name, tokens, request["max_tokens"]), tokens
        if "abort_after" in request:
            doomed[name] = request["abort_after"]

    for request in after.get(None, []):
        send(request, [])
    resets = sorted(job.get("reset_at", ()))
    while running:
        for name in [name for name, left in doomed.items() if left <= 0]:
            double.abort(name)
            del doomed[name]
        doomed.update({name: left - 1 for name, left in doomed.items()})
        if resets and double.steps >= resets[0]:
            del resets[0]
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        double.step()
        for name in [name for name, (one, _) in running.items() if one.is_finished()]:
            _, tokens = running.pop(name)
            doomed.pop(name, None)
            for request in after.get(name, []):
                send(request, tokens + double.outputs[name])
    double.run()
    return double
