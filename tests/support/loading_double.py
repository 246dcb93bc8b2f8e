"""A model-free engine beside a store of KV: what a KV connector does, in a few lines.

The scheduler's side is a connector that vLLM loads by name. The worker's side writes
what was loaded into the slots when the load ends, and not before: whoever reads a block
that is still being loaded reads something else, and is seen.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from support.engine_double import EngineDouble, _link, make_scheduler


@dataclass
class Load:
    """A part of a request's prefix that is written from outside."""

    request_id: str
    blocks: list[int]
    start: int
    end: int
    steps: int = 0


@dataclass
class Loads(KVConnectorMetadata):
    begun: list[Load] = field(default_factory=list)


class StoreConnector(KVConnectorBase_V1):
    """Holds the KV of some texts, whole blocks of them."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._texts, self._in_steps = extra["texts"], extra["asynchronous"]
        self._size = vllm_config.cache_config.block_size
        self._matched, self._begun = {}, []

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        mine, most = request.all_token_ids, 0
        for text in self._texts:
            same = 0
            while same < min(len(text), len(mine)) and text[same] == mine[same]:
                same += 1
            most = max(most, same)
        # A token is computed always, for its logits.
        most = min(most, len(mine) - 1) // self._size * self._size
        self._matched[request.request_id] = most
        count = max(0, most - num_computed_tokens)
        return count, self._in_steps and count > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            end = self._matched[request.request_id]
            (table,) = blocks.get_block_ids()
            start = end - num_external_tokens
            self._begun.append(Load(request.request_id, table, start, end))

    def build_connector_meta(self, scheduler_output):
        begun, self._begun = self._begun, []
        return Loads(begun)

    # The worker's side is in ``LoadingDouble``.
    def start_load_kv(self, forward_context, **kwargs):
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name):
        raise NotImplementedError

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        raise NotImplementedError

    def wait_for_save(self):
        raise NotImplementedError


class LoadingDouble(EngineDouble):
    """The engine double, with a worker that loads.

    Args:
        cls: the scheduler's class.
        texts: token lists whose KV is held outside.
        steps: that a load takes; 0 loads before the step computes.
        failing: ids of requests whose first load fails.
        options: of ``make_scheduler``.

    Attributes:
        loaded: tokens loaded so far.
        loads: ids of requests whose load began, in order.
        computed_beside: most tokens computed in a step while something was loaded.
        preempted_beside: preemptions while something was loaded.
    """

    def __init__(self, cls, texts, steps=0, failing=(), **options):
        extra = {"texts": texts, "asynchronous": steps > 0}
        transfer = {
            "kv_connector": "StoreConnector",
            "kv_connector_module_path": "support.loading_double",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        super().__init__(make_scheduler(cls, kv_transfer_config=transfer, **options))
        self._load_steps, self._failing = steps, {*failing}
        self._loading = []
        self.loaded, self.loads = 0, []
        self.computed_beside = self.preempted_beside = 0
        self._requests, self._preemptions = {}, 0

    def add(self, request_id, prompt, *args, **fields):
        request = super().add(request_id, prompt, *args, **fields)
        self._requests[request_id] = request
        return request

    def _execute(self, output):
        begun = output.kv_connector_metadata.begun
        self.loads += [load.request_id for load in begun]
        preemptions = sum(one.num_preemptions for one in self._requests.values())
        if self._loading or begun:
            self.computed_beside = max(
                self.computed_beside, output.total_num_scheduled_tokens
            )
            self.preempted_beside += preemptions - self._preemptions
        self._preemptions = preemptions
        if not self._load_steps:
            for load in begun:
                self._write_load(load)
            return super()._execute(output)
        result = super()._execute(output)
        self._loading += begun
        done, failed = set(), set()
        for load in self._loading:
            load.steps += 1
            if load.steps <= self._load_steps:
                continue
            done.add(load.request_id)
            if load.request_id in self._failing:
                self._failing.discard(load.request_id)
                failed.add(load.request_id)
            else:
                self._write_load(load)
        self._loading = [one for one in self._loading if one.request_id not in done]
        result.kv_connector_output = KVConnectorOutput(
            finished_recving=done, failed_recving=failed
        )
        return result

    def _write_load(self, load):
        request = self._requests[load.request_id]
        chain, private = self._root(request), self._num_public(request)
        for position, token in enumerate(request.all_token_ids[: load.end]):
            chain = _link(chain, token, position, request.cache_salt, private)
            if position >= load.start:
                block = load.blocks[position // self.block_size]
                self.slots[block, position % self.block_size] = chain
        self.loaded += load.end - load.start
