"""The worker for GPUs: over FlashAttention or vLLM's Triton backend."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_radix.attention.worker import GroupedWorker


class GroupedGPUWorker(GroupedWorker, Worker):
    """vLLM's GPU worker, whose attention is grouped."""

    overrides = {
        "FLASH_ATTN": "vllm_radix.attention.backends.flash.GroupedFlashBackend",
        "TRITON_ATTN": "vllm_radix.attention.backends.triton.GroupedTritonBackend",
    }
