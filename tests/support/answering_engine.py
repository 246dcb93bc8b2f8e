"""Engines of a comparison of answers, one after the other, each in a fork.

Reads jobs from the standard input, a line of JSON each, and prints the status of each
as it ends. A job names the model, the engine's arguments and the requests, and where
to write its log and its result: answers with the top two log-probabilities of each
token, and what the engine counted. It sends requests in closed loops: a request names
the one after whose answer it comes (its turn of a conversation, or nothing; a fresh one
only waits for it, and has nothing of it in its prompt), and may be aborted some steps
after it was sent. It may ask for structured output (``structured``) or for few tokens
alone (``allowed``), have a cache salt (``salt``), sample by chance (``seed``), and set
the most tokens of one prompt in a step (``chunk``). Then it answers them again, one by
one and each with an empty cache, once for each bound of a step's tokens that the job
names under "cold".

Importing vLLM takes longer than most engines run, so it is imported once.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def check_host_tables() -> list[int]:
    """Compare the host's block tables with the runner's own, each step.

    Returns:
        A list of one number: rows compared so far.
    """
    from vllm_radix.attention.backends.base import GroupedBuilder

    checked = [0]
    make_plan = GroupedBuilder._plan

    def checked_plan(builder, common, step):
        names = step.request_ids(common)
        if names is not None:
            size = builder.planner.limits.block_size
            for row, ours in enumerate(step.tables.gather(names)):
                used = -(-int(common.seq_lens[row]) // size)
                theirs = common.block_table_tensor[row, :used].tolist()
                assert ours[:used].tolist() == theirs, names[row]
                checked[0] += 1
        return make_plan(builder, common, step)

    GroupedBuilder._plan = checked_plan
    return checked


def answer(output):
    """Return what a finished output says, as a result holds it."""
    return {
        "cached": output.num_cached_tokens,
        "outputs": [
            {
                "tokens": list(one.token_ids),
                "text": one.text,
                "top": [
                    sorted((e.logprob for e in step.values()), reverse=True)[:2]
                    for step in one.logprobs or ()
                ],
            }
            for one in output.outputs
        ],
    }


def answer_cold(engine, prompts, params, bound):
    """Answer each prompt alone with an empty cache; return the answers.

    Args:
        engine: with nothing to do.
        prompts: by the names of the requests.
        params: to sample with, of each.
        bound: most tokens in a step, at most as many as the engine was made for.
    """
    engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = bound
    answers = {}
    for name, tokens in prompts.items():
        assert engine.reset_prefix_cache(), "blocks in use"
        engine.add_request(name, {"prompt_token_ids": tokens}, params[name])
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers[name] = answer(output)
    return answers


def run(job):
    """Run a job in this process; return its result."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from support import cpu_states
    from support.toy_models import HYBRID_TOYS, prepare_engine

    if Path(job["model"]).name in HYBRID_TOYS:
        prepare_engine()
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            **{
                "model": job["model"],
                "dtype": "float32",
                "enforce_eager": True,
                "async_scheduling": False,
                "disable_log_stats": False,
                **job["engine"],
            }
        )
    )
    scheduler = engine.engine_core.engine_core.scheduler
    if scheduler.num_spec_tokens and scheduler.need_mamba_block_aligned_split:
        cpu_states.fill_guesses(engine)
    checked = check_host_tables() if job.get("grouped") else None
    counts = {"copies": 0, "scheduled": 0, "aborted": 0, "hashes": 0}
    schedule = scheduler.schedule

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts["copies"] += len(output.kv_cache_block_copies or ())
        counts["scheduled"] += output.total_num_scheduled_tokens
        return output

    scheduler.schedule = counted
    after, doomed, prompts, sampling, answers = {}, {}, {}, {}, {}
    for request in job["requests"]:
        after.setdefault(request.get("after"), []).append(request)

    def send(request, before):
        name, several = request["id"], request.get("n", 1)
        before = [] if request.get("fresh") else before
        prompts[name] = before + request["tokens"]
        structured, seed = request.get("structured"), request.get("seed")
        if "chunk" in request:
            scheduler.scheduler_config.long_prefill_token_threshold = request["chunk"]
        params = SamplingParams(
            # Several greedy answers are refused: take the likeliest by chance.
            temperature=1.0 if several > 1 or seed is not None else 0.0,
            top_k=1 if seed is None else 0,
            seed=seed,
            n=several,
            max_tokens=request["max_tokens"],
            ignore_eos=structured is None,
            allowed_token_ids=request.get("allowed"),
            structured_outputs=structured and StructuredOutputsParams(**structured),
            logprobs=2,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        sampling[name] = params
        text = {"prompt_token_ids": prompts[name]}
        if "salt" in request:
            text["cache_salt"] = request["salt"]
        engine.add_request(name, text, params)
        if "abort_after" in request:
            doomed[name] = request["abort_after"]

    for request in after.get(None, []):
        send(request, [])
    while engine.has_unfinished_requests():
        for name in [n for n, left in doomed.items() if left <= 0]:
            engine.abort_request([name])
            counts["aborted"] += 1
            del doomed[name]
        doomed = {name: left - 1 for name, left in doomed.items()}
        for output in engine.step():
            if not output.finished or output.request_id in answers:
                continue
            doomed.pop(output.request_id, None)
            answers[output.request_id] = answer(output)
            said = prompts[output.request_id] + list(output.outputs[0].token_ids)
            for request in after.get(output.request_id, []):
                send(request, said)
    counts["hashes"] = len(
        scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    )
    for metric in engine.get_metrics():
        if metric.name in job.get("metrics", ()):
            counts[metric.name] = metric.value
    if checked is not None:
        counts |= engine.collective_rpc("radix_attention")[0]
        counts["checked_rows"] = checked[0]
    counts["scheduler"] = type(scheduler).__name__
    pool = scheduler.kv_cache_manager.block_pool
    counts["groups"] = [
        (type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size)
        for group in scheduler.kv_cache_config.kv_cache_groups
    ]
    counts["lost_blocks"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    served = dict(counts)
    cold = [
        answer_cold(engine, prompts, sampling, bound) for bound in job.get("cold", ())
    ]
    return {"answers": answers, "counts": served, "cold": cold}


def fork(job):
    """Run a job in a fork; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        Path(job["result"]).write_text(json.dumps(run(job)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Import what every engine needs, and run jobs until there are no more."""
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for line in sys.stdin:
        print(fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
