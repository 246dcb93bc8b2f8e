"""A worker for vLLM's OffloadingConnector that copies with torch, on any device.

vLLM's own needs CUDA. Scheduler side, hashes, look-ups and the order of transfers
are vLLM's; only the copying is here.
"""

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class PlainOffloadingSpec(CPUOffloadingSpec):
    """As vLLM's, with a worker that needs no GPU."""

    def get_worker(self, kv_caches):
        if not self._worker:
            assert self.blocks_per_chunk == 1
            self._worker = PlainWorker(kv_caches, self.num_chunks)
        return self._worker


class PlainWorker(OffloadingWorker):
    """Copies blocks at once, and reports them as finished in the next step."""

    def __init__(self, kv_caches, num_chunks):
        self._caches = [cache.tensor for cache in kv_caches.tensors]
        self._copies = [
            torch.empty((num_chunks, *cache.shape[1:]), dtype=cache.dtype)
            for cache in self._caches
        ]
        self._finished = []

    def submit_store(self, job_id, src_spec, dst_spec):
        self._copy(job_id, self._caches, src_spec, self._copies, dst_spec)
        return True

    def submit_load(self, job_id, src_spec, dst_spec):
        self._copy(job_id, self._copies, src_spec, self._caches, dst_spec)
        return True

    def _copy(self, job_id, sources, source_spec, targets, target_spec):
        source = torch.from_numpy(source_spec.block_ids).long()
        target = torch.from_numpy(target_spec.block_ids).long()
        for before, after in zip(sources, targets, strict=True):
            after[target] = before[source]
        self._finished.append(TransferResult(job_id, True, 1, 1e-6))

    def get_finished(self):
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids):
        pass
