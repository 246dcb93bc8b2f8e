"""One arm of the A/B: a real engine in a process of its own.

Started by ``runner`` as ``python -m vllm_radix_bench.ab.offline.arm SETTINGS FD``.
Reads one workload a line from standard input and writes one result a line to the file
descriptor; everything else that the process prints goes to its log. The engine
core runs inside this process, so that arrivals are tied to engine steps and the
counts are the same in every run.

Imports nothing of vllm_radix: in the stock arm the plugin is not even loaded.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

PLUGIN = "radix"


@dataclass
class Settings:
    """How to start the engine; the same for both arms but for ``radix``."""

    model: str
    block_size: int | None
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    gpu_memory_utilization: float
    load_format: str = "auto"
    dtype: str = "auto"
    radix: dict[str, Any] | None = None


def prepare_environment(settings: Settings) -> None:
    """Set what vLLM reads at import: before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = PLUGIN if settings.radix is not None else ""
    if os.path.isdir(settings.model):
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


class Arm:
    """The engine of one arm.

    Args:
        settings: how to start it.
    """

    def __init__(self, settings: Settings) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        cpu = current_platform.is_cpu()
        engine_args = EngineArgs(
            model=settings.model,
            load_format=settings.load_format,
            dtype="float32" if cpu else settings.dtype,
            enforce_eager=cpu,
            block_size=settings.block_size,
            # One block is vLLM's own, the null block.
            num_gpu_blocks_override=settings.num_blocks + 1,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            disable_log_stats=False,
            async_scheduling=False,
            # In both arms: it is part of the compilation cache's key.
            additional_config={PLUGIN: settings.radix or {}},
        )
        if not cpu:
            engine_args.gpu_memory_utilization = settings.gpu_memory_utilization
        if settings.radix is not None:
            engine_args.scheduler_cls = "vllm_radix.RadixScheduler"
        self._engine = LLMEngine.from_engine_args(engine_args)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._steps = 0
        self._scheduled = 0
        schedule = self._scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self._steps += 1
                self._scheduled += output.total_num_scheduled_tokens
            return output

        self._scheduler.schedule = counted

    def describe(self) -> dict[str, Any]:
        """Return what is running, to be checked and recorded with each result."""
        return {
            "scheduler": type(self._scheduler).__name__,
            "manager": type(self._scheduler.kv_cache_manager).__name__,
            "plugin_imported": "vllm_radix" in sys.modules,
            "groups": [
                (type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size)
                for group in self._scheduler.kv_cache_config.kv_cache_groups
            ],
        }

    def run(self, roots: list[dict[str, Any]], top_logprobs: int) -> dict[str, Any]:
        """Run a forest of turns from an empty cache.

        Args:
            roots: turns as dicts, see ``vllm_radix_bench.workloads.turn.Turn``.
            top_logprobs: log-probabilities to record per generated token.

        Returns:
            Counts, seconds, and a record for each request.
        """
        from vllm import SamplingParams

        engine = self._engine
        if not engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        self._steps = self._scheduled = 0
        records: list[dict[str, Any]] = []
        pending: dict[str, tuple[dict[str, Any], list[int]]] = {}
        sent_at: dict[str, int] = {}
        first_at: dict[str, int] = {}
        start = time.perf_counter()

        def send(turn: dict[str, Any], before: list[int], path: str) -> None:
            prompt = before + turn["tokens"]
            params = SamplingParams(
                temperature=0,
                max_tokens=turn["max_tokens"],
                ignore_eos=True,
                logprobs=top_logprobs or None,
                extra_args=turn["hints"] or None,
            )
            pending[path] = turn, prompt
            sent_at[path] = self._steps
            engine.add_request(path, {"prompt_token_ids": prompt}, params)

        for index, root in enumerate(roots):
            send(root, [], str(index))
        while pending:
            for output in engine.step():
                first_at.setdefault(output.request_id, self._steps)
                if not output.finished:
                    continue
                turn, prompt = pending.pop(output.request_id)
                record = self._record(output, time.perf_counter() - start)
                record["steps_to_first_token"] = (
                    first_at[output.request_id] - sent_at[output.request_id]
                )
                records.append(record)
                answer = list(output.outputs[0].token_ids)
                for index, child in enumerate(turn["children"]):
                    send(child, prompt + answer, f"{output.request_id}.{index}")
        seconds = time.perf_counter() - start
        generated = sum(len(record["output"]) for record in records)
        return {
            "requests": len(records),
            "prompt_tokens": sum(record["prompt_tokens"] for record in records),
            "cached_tokens": sum(record["cached_tokens"] for record in records),
            # All that was scheduled but the steps that fed a generated token
            # back: recomputation after a preemption counts.
            "computed_prompt_tokens": self._scheduled - generated + len(records),
            "engine_steps": self._steps,
            "preemptions": sum(record["preemptions"] for record in records),
            "seconds": seconds,
            "engine": self.describe(),
            "records": records,
        }

    @staticmethod
    def _record(output: Any, finished: float) -> dict[str, Any]:
        answer = output.outputs[0]
        record = {
            "id": output.request_id,
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "preemptions": output.metrics.num_preemptions,
            "ttft": output.metrics.first_token_latency,
            "finished": finished,
            "output": list(answer.token_ids),
        }
        if answer.logprobs:
            record["top"] = [
                [
                    [token, entry.logprob]
                    for token, entry in sorted(
                        step.items(), key=lambda item: -item[1].logprob
                    )[:2]
                ]
                for step in answer.logprobs
            ]
        return record


def main() -> None:
    """Serve workloads until standard input ends."""
    settings = Settings(**json.loads(sys.argv[1]))
    prepare_environment(settings)
    with os.fdopen(int(sys.argv[2]), "w") as replies:

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        arm = Arm(settings)
        reply(arm.describe())
        for line in sys.stdin:
            request = json.loads(line)
            reply(arm.run(request["roots"], request["top_logprobs"]))


def as_request(roots: list[Any], top_logprobs: int = 0) -> dict[str, Any]:
    """Return the line to send for a forest of ``Turn``."""
    return {"roots": [asdict(root) for root in roots], "top_logprobs": top_logprobs}


if __name__ == "__main__":
    main()
