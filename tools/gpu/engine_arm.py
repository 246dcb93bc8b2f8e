"""One arm of a comparison: a real vLLM engine in a process of its own.

    python engine_arm.py SETTINGS FD

Reads one job a line from standard input and writes one result a line to the file
descriptor; what else the process prints goes to its log. Settings and jobs are JSON:

    {"engine": arguments of vLLM's EngineArgs, "radix": options or null for stock,
     "env": variables, "before": ["module:function", called before vLLM is imported],
     "report": "module:function", whose result is added to each job's}
    {"requests": [{"id", "tokens", "max_tokens", "after", ...}], ...}

Unlike ``vllm_radix_bench.ab.offline.arm`` it takes any engine argument, so
asynchronous scheduling and graphs too, needs no tokenizer, lets requests arrive by the
clock, abort, stop by a token and answer several times, and resets the cache in the
middle. The engine core runs inside this process. Imports nothing of vllm_radix: in a
stock arm the plugin is not even loaded.
"""

import contextlib
import ctypes
import importlib
import json
import os
import sys
import time
from typing import Any

Json = dict[str, Any]

_DIE_WITH_PARENT = 1
_SETTLE = 50
"""Steps after which what was aborted, or runs ahead, must have come to its end."""


def named(name: str) -> Any:
    """Return what ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def prepare_environment(settings: Json) -> None:
    """Set what vLLM reads at import: before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "radix" if settings.get("radix") is not None else ""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.update(settings.get("env", {}))
    for name in settings.get("before", ()):
        named(name)()


def gloo_for_nccl() -> None:
    """Let one process be a group without NCCL; for ``before``."""
    from vllm.platforms import cuda

    cuda.CudaPlatformBase.dist_backend = "gloo"


def always_group() -> None:
    """Let the planner group whatever shares a block; for ``before``.

    Whether it pays is the planner's question on a device, and its answer for a tiny
    model is no: its answers would then be compared without a grouped step.
    """
    from vllm_radix.attention.planner import AttentionPlanner

    def plan(planner: Any, *args: Any) -> Any:
        made = planner.propose(*args)
        return made if made is not None and made.num_nodes else None

    setattr(AttentionPlanner, "plan", plan)  # noqa: B010


class Arm:
    """The engine of one arm.

    Args:
        settings: see the module.
    """

    def __init__(self, settings: Json) -> None:
        begin = time.perf_counter()
        from vllm import EngineArgs, LLMEngine

        arguments = dict(settings["engine"])
        # In both arms: it is part of the compilation cache's key.
        arguments["additional_config"] = {"radix": settings.get("radix") or {}}
        if settings.get("radix") is not None:
            arguments["scheduler_cls"] = "vllm_radix.RadixScheduler"
        arguments.setdefault("disable_log_stats", False)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        core: Any = self.engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self._report = settings.get("report")
        self.counts: dict[str, int] = {}
        self.schedule_s = 0.0
        self._clear()
        schedule = self.scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = schedule(*args, **kwargs)
            self.schedule_s += time.perf_counter() - start
            counts = self.counts
            if output.total_num_scheduled_tokens:
                counts["engine_steps"] += 1
                counts["scheduled_tokens"] += output.total_num_scheduled_tokens
            counts["preemptions"] += len(output.preempted_req_ids or ())
            counts["copies"] += len(output.kv_cache_block_copies or ())
            return output

        self.scheduler.schedule = counted
        self.start_s = time.perf_counter() - begin

    def _clear(self) -> None:
        names = ("engine_steps", "scheduled_tokens", "preemptions", "copies", "resets")
        self.counts = dict.fromkeys(names, 0)
        self.schedule_s = 0.0

    def describe(self) -> Json:
        """Return what is running, to be checked and recorded."""
        config: Any = self.engine.vllm_config
        return {
            "scheduler": type(self.scheduler).__name__,
            "manager": type(self.scheduler.kv_cache_manager).__name__,
            "blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "async": bool(config.scheduler_config.async_scheduling),
            "v2_runner": bool(config.use_v2_model_runner),
            "worker": str(config.parallel_config.worker_cls),
            "cudagraph": str(config.compilation_config.cudagraph_mode),
            "plugin_imported": "vllm_radix" in sys.modules,
            "start_s": self.start_s,
        }

    def held_blocks(self) -> int:
        """Return how many blocks are in use, once all steps have come to their end."""
        pool = self.scheduler.kv_cache_manager.block_pool
        held = 0
        for _ in range(_SETTLE):
            # One block is vLLM's own, the null block.
            held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            if not held and not self.engine.has_unfinished_requests():
                break
            self.engine.step()
        return held

    def run(self, job: Json) -> Json:
        """Run a job from an empty cache; see ``Run``.

        Raises:
            RuntimeError: blocks are held, from the job before.
        """
        if self.held_blocks() or not self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        self._clear()
        with contextlib.ExitStack() as stack:
            for name in job.get("within", ()):
                stack.enter_context(named(name)(self))
            one = Run(self, job)
            one.serve()
        out = one.result()
        out["held_blocks"] = self.held_blocks()
        if job.get("attention"):
            out["attention"] = self.engine.collective_rpc("radix_attention")[0]
        if self._report:
            out["report"] = named(self._report)()
        return out


class Run:
    """One job on an engine.

    Args:
        arm: the engine.
        job: ``requests``, and optionally ``rate`` (arrivals per second, Poisson),
            ``seed`` of it, ``limit_s``, ``logprobs``, ``reset_at`` (engine steps at
            which the cache is reset, running requests preempted) and ``answers``
            (whether to return them); ``within`` names context managers that are
            entered for the job, with the arm. A request that is ``fresh`` only waits
            for the one it comes ``after``, and has nothing of it in its prompt.
    """

    def __init__(self, arm: Arm, job: Json) -> None:
        import random

        self.arm, self.job, self.engine = arm, job, arm.engine
        self.records: list[Json] = []
        self.truncated = False
        self.gaps: list[float] = []
        self._after: dict[str | None, list[Json]] = {}
        for request in job["requests"]:
            self._after.setdefault(request.get("after"), []).append(request)
        rng, at = random.Random(job.get("seed", 0)), 0.0
        self._due: list[tuple[float, Json]] = []
        for request in self._after.get(None, []):
            if job.get("rate"):
                at += rng.expovariate(job["rate"])
            self._due.append((at, request))
        self._pending: dict[str, tuple[Json, list[int]]] = {}
        self._doomed: dict[str, int] = {}
        self._sent: dict[str, tuple[float, int]] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}
        self._resets = sorted(job.get("reset_at", ()))
        self._begin = time.perf_counter()
        self.seconds = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def serve(self) -> None:
        """Send all requests when they are due, and take in their answers."""
        while self._due or self._pending:
            now = self._now()
            if now > self.job.get("limit_s", 1e9):
                self.truncated = True
                self.engine.abort_request(list(self._pending))
                break
            while self._due and self._due[0][0] <= now:
                at, request = self._due.pop(0)
                self._send(request, [], at if self.job.get("rate") else now)
            if not self._pending:
                time.sleep(min(0.005, max(0.0, self._due[0][0] - now)))
                continue
            self._abort_what_is_due()
            if self._resets and self.arm.counts["engine_steps"] >= self._resets[0]:
                del self._resets[0]
                self.arm.counts["resets"] += self.engine.reset_prefix_cache(
                    reset_running_requests=True
                )
            for output in self.engine.step():
                self._take_in(output)
        self.seconds = self._now()

    def _params(self, request: Json) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        several = request.get("n", 1)
        kind = RequestOutputKind.CUMULATIVE
        if several > 1:
            # Otherwise each output is one of several answers.
            kind = RequestOutputKind.FINAL_ONLY
        structured = request.get("structured")
        return SamplingParams(
            temperature=request.get("temperature", 0.0),
            seed=request.get("seed"),
            n=several,
            max_tokens=request["max_tokens"],
            ignore_eos=request.get("ignore_eos", True),
            stop_token_ids=request.get("stop_token_ids"),
            structured_outputs=(
                StructuredOutputsParams(**structured) if structured else None
            ),
            logprobs=self.job.get("logprobs"),
            output_kind=kind,
            detokenize=False,
        )

    def _send(self, request: Json, before: list[int], at: float) -> None:
        name, prompt = request["id"], before + request["tokens"]
        self._pending[name] = request, prompt
        self._sent[name] = at, self.arm.counts["engine_steps"]
        if "abort_after" in request:
            self._doomed[name] = request["abort_after"]
        self.engine.add_request(
            name, {"prompt_token_ids": prompt}, self._params(request)
        )

    def _abort_what_is_due(self) -> None:
        for name, left in list(self._doomed.items()):
            self._doomed[name] = left - 1
            if left <= 0:
                del self._doomed[name]
                self.engine.abort_request([name])
                self._pending.pop(name, None)

    def _take_in(self, output: Any) -> None:
        now, name = self._now(), output.request_id
        if name not in self._pending:
            return
        if output.outputs and output.outputs[0].token_ids:
            if name not in self._first:
                self._first[name] = now, self.arm.counts["engine_steps"]
            else:
                self.gaps.append(now - self._last[name])
            self._last[name] = now
        if not output.finished:
            return
        self._doomed.pop(name, None)
        _, prompt = self._pending.pop(name)
        first, sent = self._first[name], self._sent[name]
        self.records.append(
            {
                "id": name,
                "prompt": len(prompt),
                "cached": output.num_cached_tokens or 0,
                "ttft": first[0] - sent[0],
                "steps": first[1] - sent[1],
                "outputs": [self._answer(one) for one in output.outputs],
            }
        )
        said = prompt + list(output.outputs[0].token_ids)
        for request in self._after.get(name, []):
            self._send(request, [] if request.get("fresh") else said, now)

    @staticmethod
    def _answer(one: Any) -> Json:
        return {
            "tokens": list(one.token_ids),
            "finish": one.finish_reason,
            "top": [
                sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
                for step in one.logprobs or ()
            ],
        }

    def result(self) -> Json:
        """Return counts and seconds, and the answers if asked for."""
        records, counts = self.records, self.arm.counts
        generated = sum(len(o["tokens"]) for r in records for o in r["outputs"])
        ttft = sorted(r["ttft"] for r in records) or [0.0]
        steps = sorted(r["steps"] for r in records) or [0]
        gaps = sorted(self.gaps) or [0.0]
        out = {
            "requests": len(records),
            "truncated": self.truncated,
            "prompt_tokens": sum(r["prompt"] for r in records),
            "cached_tokens": sum(r["cached"] for r in records),
            # Steps that fed a generated token back are not counted; what was
            # computed again after a preemption is.
            "computed_prompt_tokens": (
                counts["scheduled_tokens"]
                - generated
                + sum(len(r["outputs"]) for r in records)
            ),
            "generated": generated,
            **counts,
            "seconds": self.seconds,
            "requests_per_s": len(records) / self.seconds,
            "generated_per_s": generated / self.seconds,
            "ttft_mean": sum(ttft) / len(ttft),
            "ttft_p50": quantile(ttft, 0.5),
            "ttft_p99": quantile(ttft, 0.99),
            "ttft_max": ttft[-1],
            "steps_mean": sum(steps) / len(steps),
            "steps_p99": quantile(steps, 0.99),
            "itl_p50": quantile(gaps, 0.5),
            "itl_p99": quantile(gaps, 0.99),
            "schedule_ms_per_step": (
                1e3 * self.arm.schedule_s / max(1, counts["engine_steps"])
            ),
        }
        if self.job.get("answers"):
            out["answers"] = {
                r["id"]: {key: r[key] for key in ("cached", "outputs")} for r in records
            }
        return out


def quantile(values: list[Any], share: float) -> Any:
    """Return the value below which a share of sorted values lies."""
    return values[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Serve jobs until standard input ends."""
    # Nobody is left on the device when the stage is stopped.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, 9)
    settings = json.loads(sys.argv[1])
    prepare_environment(settings)
    with os.fdopen(int(sys.argv[2]), "w") as replies:

        def reply(message: Json) -> None:
            replies.write(json.dumps(message, default=str) + "\n")
            replies.flush()

        arm = Arm(settings)
        reply(arm.describe())
        for line in sys.stdin:
            reply(arm.run(json.loads(line)))


if __name__ == "__main__":
    main()
