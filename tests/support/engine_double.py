"""A model-free engine: vLLM's real scheduler over a worker that checks reads.

The worker knows what each slot of the KV cache holds: a chain of everything the
slot's KV depends on (namespace and all tokens up to it). Before a step computes
a token it reads every earlier slot of the request, and fails on the first one
that holds something else: stale, foreign, or never written. Nothing else stands
between a wrong block table and a wrong answer.
"""

from collections import deque

from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vllm_radix import RadixScheduler
from vllm_radix.engine.admission_check import check_admission
from vllm_radix_bench.sim import engine
from vllm_radix_bench.sim.engine import (
    VOCABULARY,
    RequestMaker,
    make_kv_cache_config,
    make_vllm_config,
)

__all__ = [
    "EngineDouble",
    "WrongReadError",
    "make_kv_cache_config",
    "make_scheduler",
    "make_vllm_config",
]


class WrongReadError(AssertionError):
    """A request was to read KV that is not its own prefix's."""


def _chain(before, token):
    return hash((before, token))


def _link(before, token, position, salt, private):
    """Return what a slot depends on: on the salt from the first private token on."""
    if position == private:
        before = _chain(before, salt)
    return _chain(before, token)


def _say(chain):
    """Return what a model says next: a function of what it has read."""
    return 3 + chain % (VOCABULARY - 3)


def make_scheduler(cls=RadixScheduler, **options):
    """Return a scheduler, ours by default; see ``sim.engine.make_scheduler``."""
    return engine.make_scheduler(cls, **options)


class EngineDouble:
    """Runs a scheduler against the checking worker.

    Args:
        scheduler: vLLM's or ours.
        lag: steps scheduled ahead of their results, as in asynchronous
            scheduling.
        check: verify pool and tree after every step.
        drafts: how many tokens are drafted after each that is said; some are wrong.
        public: sequences of tokens that all salts share: what a slot holds depends on
            the salt only after whole blocks of one.

    Attributes:
        accepted: drafts that were right, and computed.
        computed: tokens computed so far.
        copied: blocks copied so far.
        hashed: block hashes computed so far.
        outputs: answers of finished requests, by id.
        admitted: ids in order of first admission.
        resumed: ids in order of admission after a preemption.
    """

    grain = 0
    """Tokens that are public together; 0: those of a block."""

    def __init__(self, scheduler, lag=0, check=True, drafts=0, public=()):
        self.scheduler = scheduler
        self.lag = lag
        self.drafts = drafts
        self.accepted = 0
        self._check = check and isinstance(scheduler, RadixScheduler)
        self.block_size = scheduler.block_size
        self.slots = {}  # (block, offset) -> what its KV depends on
        self.tables, self.tokens, self.chains = {}, {}, {}
        self.public = public
        self._private = {}  # of a request: its salt, and where it counts
        self._drafted = {}  # of a request: what the worker guessed last
        self._guessed = {}  # of a request: the guesses that this step computes
        self.in_flight = deque()
        self.computed = self.steps = self.copied = 0
        self.outputs, self.cached = {}, {}
        self.admitted, self.resumed = [], []
        self._maker = RequestMaker(scheduler)

    @property
    def hashed(self):
        return self._maker.hashed

    def add(self, request_id, prompt, max_tokens=4, grammar=None, **fields):
        """Add a request; ``fields`` as of vLLM's ``Request``.

        Args:
            grammar: stands for a structured output; the request waits until its
                ``grammar`` is not None.
        """
        request = self._maker.make(request_id, prompt, max_tokens, **fields)
        if grammar is not None:
            request.structured_output_request = grammar
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id):
        """Abort a request, whatever its state."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Schedule a step, and take in the result of the one ``lag`` ago."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.steps += 1
        self.in_flight.append((output, self._execute(output)))
        if len(self.in_flight) > self.lag or not output.total_num_scheduled_tokens:
            while len(self.in_flight) > self.lag * bool(
                output.total_num_scheduled_tokens
            ):
                self._take_in(*self.in_flight.popleft())
        if self._check:
            self.scheduler.kv_cache_manager.block_pool.check()
            if self.scheduler.admission is not None:
                check_admission(self.scheduler.admission)

    def run(self, limit=10_000):
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def _take_in(self, output, result):
        for engine_outputs in self.scheduler.update_from_output(
            output, result
        ).values():
            for one in engine_outputs.outputs:
                self.outputs.setdefault(one.request_id, []).extend(one.new_token_ids)
        if self.drafts and not self.lag:
            drafts = [self._draft(request_id) for request_id in result.req_ids]
            self.scheduler.update_draft_token_ids(
                DraftTokenIds(list(result.req_ids), drafts)
            )

    def _draft(self, request_id):
        """Return what may be said next; the token after each fifth is wrong."""
        chain = self._chain_to(request_id, len(self.tokens[request_id]))[-1]
        drafts = []
        for _ in range(self.drafts):
            drafts.append(_say(chain) if chain % 5 else 3)
            chain = _chain(chain, drafts[-1])
        return drafts

    # -- the worker ------------------------------------------------------------

    def _root(self, request):
        lora = request.lora_request
        adapter = lora and (lora.lora_name, lora.lora_path, lora.lora_int_id)
        return "root", adapter

    def _num_public(self, request):
        """Return how many tokens of a request all salts share."""
        prompt = request.prompt_token_ids
        if request.resumable:
            return 0
        found = [len(p) for p in self.public if prompt[: len(p)] == list(p)]
        most = min(max(found, default=0), len(prompt) - 1)
        grain = self.grain or self.block_size
        return most // grain * grain

    def _execute(self, output):
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
            self.tokens.pop(request_id, None)
            self.chains.pop(request_id, None)
            self._private.pop(request_id, None)
            self._drafted.pop(request_id, None)
        starts = {}
        for new in output.scheduled_new_reqs:
            request_id = new.req_id
            self.admitted.append(request_id)
            self.cached[request_id] = new.num_computed_tokens
            self._set_table(request_id, new.block_ids)
            self.tokens[request_id] = list(new.prompt_token_ids)
            request = self.scheduler.requests[request_id]
            self.chains[request_id] = [self._root(request)]
            self._private[request_id] = request.cache_salt, self._num_public(request)
            starts[request_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.resumed.append(request_id)
                self._set_table(request_id, blocks)
                # Its known tokens go along; those in flight were dropped.
                known = self.scheduler.requests[request_id].num_tokens
                del self.tokens[request_id][known:]
                del self.chains[request_id][known + 1 :]
            elif blocks is not None:
                self._extend_table(request_id, blocks)
            starts[request_id] = cached.num_computed_tokens[i]
        drafts = output.scheduled_spec_decode_tokens
        if self.lag and self.drafts:
            # The scheduler takes guesses that it has not seen for right, and counts
            # them as computed; the worker has them, and knows better.
            # A request's first step may come with room for guesses, and has none yet.
            drafts = {
                i: self._drafted.get(i, [3] * self.drafts)[: len(some)]
                for i, some in drafts.items()
            }
            starts = {i: min(n, len(self.tokens[i]) - 1) for i, n in starts.items()}
        self._guessed = drafts
        self._prepare_blocks(output)
        self._prepare_states(output, starts)
        for request_id, count in output.num_scheduled_tokens.items():
            self.tokens[request_id] += drafts.get(request_id, ())
            self._write(request_id, starts[request_id], count)
        sampled = []
        for request_id, count in output.num_scheduled_tokens.items():
            self._read(request_id, starts[request_id])
            self.computed += count
            done = starts[request_id] + count
            said = []
            if done >= len(self.tokens[request_id]):
                said = self._verify(request_id, drafts.get(request_id, ()))
            sampled.append(said)
            self._settle_states(request_id, starts[request_id], count, len(said))
            self._write_drafters(request_id, starts[request_id], done)
            if self.lag and self.drafts:
                self._drafted[request_id] = self._draft(request_id)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )

    def _verify(self, request_id, drafts):
        """Return what is said after the right ones of the drafts, those first."""
        tokens, chain = self.tokens[request_id], self.chains[request_id]
        known = len(tokens) - len(drafts)
        right = 0
        while right < len(drafts) and drafts[right] == _say(chain[known + right]):
            right += 1
        del tokens[known + right :], chain[known + right + 1 :]
        tokens.append(_say(chain[-1]))
        self.accepted += right
        return tokens[known:]

    def _set_table(self, request_id, blocks):
        self.tables[request_id] = list(blocks[0])

    def _extend_table(self, request_id, blocks):
        self.tables[request_id] += blocks[0]

    def _prepare_blocks(self, output):
        """Zero and copy blocks, before anything of this step is written."""
        for block in output.new_block_ids_to_zero or ():
            for offset in range(self.block_size):
                self.slots.pop((block, offset), None)
        copies = output.kv_cache_block_copies or ()
        targets = [copy.dst_block_id for copy in copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        read = {
            (copy.dst_block_id, offset): self.slots.get((copy.src_block_id, offset))
            for copy in copies
            for offset in range(self.block_size)
        }
        self.slots.update(read)
        self.copied += len(copies)

    def _prepare_states(self, output, starts):
        """Move running states; full attention has none."""

    def _settle_states(self, request_id, start, count, said):
        """Put states where the next step looks for them, after tokens are said."""

    def _write_drafters(self, request_id, start, end):
        """Write what a draft model keeps, after the step's tokens are said."""

    def _chain_to(self, request_id, length):
        chain, tokens = self.chains[request_id], self.tokens[request_id]
        salt, private = self._private[request_id]
        while len(chain) <= length:
            at = len(chain) - 1
            chain.append(_link(chain[-1], tokens[at], at, salt, private))
        return chain

    def _slot(self, request_id, position):
        block = self.tables[request_id][position // self.block_size]
        assert block != 0, "the null block is never written"
        return block, position % self.block_size

    def _write(self, request_id, start, count):
        chain = self._chain_to(request_id, start + count)
        for position in range(start, start + count):
            self.slots[self._slot(request_id, position)] = chain[position + 1]

    def _read(self, request_id, start):
        chain = self._chain_to(request_id, start)
        for position in range(start):
            slot = self._slot(request_id, position)
            if self.slots.get(slot) != chain[position + 1]:
                raise WrongReadError(
                    f"{request_id} reads position {position} in block {slot[0]}, "
                    "which holds something else"
                )
