"""Where grouped attention can be served, found before weights load."""

from vllm_radix.config import not_grouped
from vllm_radix.engine.compat import VllmConfig, envs, logger

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""vLLM's backends that grouped ones derive from."""

WORKERS = {
    f"vllm.v1.worker.{vllms}": f"vllm_radix.attention.{ours}"
    for vllms, ours in (
        ("cpu_worker.CPUWorker", "cpu_worker.GroupedCPUWorker"),
        ("gpu_worker.Worker", "gpu_worker.GroupedGPUWorker"),
    )
}
"""The grouped worker in place of each of vLLM's."""


def grouped_worker(vllm_config: VllmConfig, strict: bool) -> str | None:
    """Return the name of the worker class whose attention is grouped.

    Args:
        vllm_config: with the worker that vLLM would use.
        strict: raise where it cannot be; else say so in the log and return None.

    Raises:
        ValueError: grouped attention does not serve this configuration; the message
            is one sentence that names the fix.
    """
    worker = str(vllm_config.parallel_config.worker_cls)
    if worker in WORKERS.values():
        return worker
    problem = grouped_problem(vllm_config)
    if problem is None:
        return WORKERS[worker]
    if strict:
        raise ValueError(problem)
    logger.warning("Attention is stock vLLM's, as asked: %s", problem)
    return None


def grouped_problem(vllm_config: VllmConfig) -> str | None:
    """Return why grouped attention does not serve a configuration, or None.

    What only the model's layers tell is found when they are made.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    backend = vllm_config.attention_config.backend
    graphs = vllm_config.compilation_config.cudagraph_mode
    reason = fix = ""
    if str(parallel.worker_cls) not in WORKERS:
        reason = f"the worker class {parallel.worker_cls}"
        fix = "drop --worker-cls"
    elif parallel.decode_context_parallel_size > 1:
        reason = "decode context parallelism"
        fix = "drop --decode-context-parallel-size"
    elif parallel.prefill_context_parallel_size > 1:
        reason = "prefill context parallelism"
        fix = "drop --prefill-context-parallel-size"
    elif model is not None and model.use_mla:
        reason, fix = "MLA (multi-head latent attention)", "choose another model"
    elif backend is not None and backend.name not in BACKENDS:
        reason = f"the attention backend {backend.name}"
        fix = f"use --attention-backend {' or '.join(BACKENDS[:2])}"
    elif envs.VLLM_BATCH_INVARIANT:
        reason, fix = "batch invariance", "unset VLLM_BATCH_INVARIANT"
    elif vllm_config.cache_config.kv_sharing_fast_prefill:
        reason, fix = "fast prefill", "drop --kv-sharing-fast-prefill"
    elif (
        graphs
        and graphs.has_full_cudagraphs()
        and not graphs.has_piecewise_cudagraphs()
    ):
        reason = f"CUDA graphs of mode {graphs.name} (attention is not captured)"
        fix = """use --compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
    if not reason:
        return None
    return not_grouped(reason, fix)
