"""The worker for CPUs: over vLLM's CPU backend, for tests."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_radix.attention.worker import GroupedWorker


class GroupedCPUWorker(GroupedWorker, CPUWorker):
    """vLLM's CPU worker, whose attention is grouped."""

    overrides = {"CPU_ATTN": "vllm_radix.attention.backends.cpu.GroupedCPUBackend"}
