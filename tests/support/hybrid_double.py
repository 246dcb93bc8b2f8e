"""A model-free engine over several KV cache groups, which checks reads.

As in vLLM, all groups share one space of block ids: a block holds what was written
to it last, a group's keys and values or a group's state, and nothing of what another
group had there. The worker is ``EngineDouble``'s; what it reads depends on the group:

- full attention: all positions before a token;
- a sliding window of W: the last W positions, its own among them;
- chunked local attention: the positions of its own chunk of C;
- a draft model's layers (EAGLE; any of the first two, named in ``drafters``): the same,
  where each slot but a block's last depends on the token after it as well. It writes
  after the step's tokens are said, and its guesses behind them;
- a state (``align``): what the block of the request's last computed token holds. It is
  the state after all tokens before the step; the step overwrites it, and with the
  step's last token in another column of the table, it is copied there first. A step
  with guesses writes the state after each of its tokens, to columns side by side; the
  next one goes on from that of the last right guess, and where a block has become full,
  the state at its end is copied to its own column.
"""

from contextlib import contextmanager
from dataclasses import replace

from vllm.config import SpeculativeConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from support.engine_double import EngineDouble, WrongReadError, make_scheduler
from vllm_radix.engine import support
from vllm_radix_bench.sim.layouts import Layout

STATE = "state"
"""Where a block holds a state; keys and values are held at their offsets."""


LAYOUTS = [
    "swa:48/16",
    "full/16+swa:64/16x2",
    "full/16+swa:40/32",
    "full/16+chunked:64/16",
    "full/32+mamba/32x3",
    "full/16+mamba/64x2",
    "full/16+swa:40/16+mamba/32",
]
EVERYTHING = "full/16+swa:40/16+chunked:64/16+mamba/32"


def parse_layout(text):
    """Return the specs of a ``Layout`` whose parts all name the tokens of a block."""
    return Layout.parse(text).specs(0)


def ngram_drafts(drafts, lag):
    """Return vLLM's settings of so many guesses, which need no model."""
    return {
        "method": "ngram_gpu" if lag else "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": 2,
    }


def take_ngrams_for_eagle(monkeypatch):
    """Have vLLM and radix take the settings of n-gram drafts for EAGLE's."""
    monkeypatch.setattr(SpeculativeConfig, "use_eagle", lambda _: True)
    monkeypatch.setattr(support, "_DRAFTS", ("ngram", "ngram_gpu"))


@contextmanager
def not_copying(engine):
    """Have a double copy nothing meanwhile: a fault."""
    copy, engine._copy = engine._copy, lambda pairs: None
    yield
    engine._copy = copy


def make_hybrid_scheduler(cls, layout, num_blocks, asynchronous=False, **options):
    """Return a scheduler over several groups, without an engine.

    Args:
        cls: its class, vLLM's or ours.
        layout: specs of vLLM, one per group, or their text for ``parse_layout``.
        num_blocks: blocks of the pool, with the null block.
        asynchronous: whether steps are scheduled ahead of their results.
        options: ``radix``, and others of ``make_vllm_config``.
    """
    specs = parse_layout(layout) if isinstance(layout, str) else layout
    drafts = (options.get("speculative_config") or {}).get("num_speculative_tokens", 0)
    specs = [
        replace(spec, num_speculative_blocks=drafts)
        if isinstance(spec, MambaSpec)
        else spec
        for spec in specs
    ]
    options = {"asynchronous": asynchronous, "layout": specs, **options}
    return make_scheduler(cls, num_blocks=num_blocks, **options)


class HybridDouble(EngineDouble):
    """Runs a scheduler of several groups against the checking worker.

    Args:
        scheduler: vLLM's or ours.
        lag: steps scheduled ahead of their results.
        check: verify pool and tree after every step.
        drafts: as ``EngineDouble``'s.

    Attributes:
        blocks: what each block holds: its group, and by offset (or ``STATE``) the
            chain that this depends on.
        tables: block ids by group, of each request; the worker only appends, and
            knows nothing of the blocks that the scheduler has let go since.
        moved: states moved to another column so far.
        drafters: groups of a draft model; set it before the first step.
    """

    grain = 1

    def __init__(self, scheduler, lag=0, check=True, drafts=0, public=()):
        super().__init__(scheduler, lag, check, drafts, public)
        groups = scheduler.kv_cache_config.kv_cache_groups
        self.specs = [group.kv_cache_spec for group in groups]
        known = FullAttentionSpec | SlidingWindowSpec | ChunkedLocalAttentionSpec
        for spec in self.specs:
            assert isinstance(spec, known | MambaSpec), spec
        self.states = [
            group
            for group, spec in enumerate(self.specs)
            if isinstance(spec, MambaSpec)
        ]
        self.drafters = []
        self.blocks = {}
        self.moved = 0
        self._columns = {}  # of a request: where its running states are
        self._ahead = {}  # and how many columns behind that, for the right guesses

    def add(self, request_id, prompt, max_tokens=4, stop=(), **fields):
        """Add a request; it ends early after one of the tokens of ``stop``."""
        request = super().add(request_id, prompt, max_tokens, **fields)
        request.sampling_params.stop_token_ids = list(stop)
        return request

    # -- the worker ------------------------------------------------------------

    def _set_table(self, request_id, blocks):
        self.tables[request_id] = [list(group) for group in blocks]

    def _extend_table(self, request_id, blocks):
        for table, group in zip(self.tables[request_id], blocks, strict=True):
            table += group

    def _prepare_blocks(self, output):
        # All of a block, whose group ever asked for it.
        for block in output.new_block_ids_to_zero or ():
            self.blocks.pop(block, None)
        copies = output.kv_cache_block_copies or ()
        self._copy([(copy.src_block_id, copy.dst_block_id) for copy in copies])
        self.copied += len(copies)

    def _copy(self, pairs):
        """Copy blocks as a whole, all at once: every source is read first."""
        targets = {target for _, target in pairs}
        assert len(targets) == len(pairs), "two copies into one block"
        assert 0 not in targets, "the null block is never written"
        read = [(target, self.blocks.get(source)) for source, target in pairs]
        for target, held in read:
            if held is None:
                self.blocks.pop(target, None)
            else:
                self.blocks[target] = held[0], dict(held[1])

    def _prepare_states(self, output, starts):
        cached = output.scheduled_cached_reqs
        left = {*output.finished_req_ids, *(output.preempted_req_ids or ())}
        for request_id in left | {*cached.resumed_req_ids}:
            self._columns.pop(request_id, None)
            self._ahead.pop(request_id, None)
        if not self.states:
            return
        size = self._state_size
        pairs = []
        for request_id, count in output.num_scheduled_tokens.items():
            start = starts[request_id]
            before = self._columns.get(request_id, (start - 1) // size)
            now = (start + count - 1) // size
            self._columns[request_id] = now
            if before in (-1, now):
                continue
            before += self._ahead.pop(request_id, 0)
            if before == now:
                continue
            tables = self.tables[request_id]
            pairs += [
                (tables[group][before], tables[group][now]) for group in self.states
            ]
        # One kernel does them all, in no order.
        assert not {s for s, _ in pairs} & {t for _, t in pairs}, "copies race"
        self._copy(pairs)
        self.moved += len(pairs)

    @property
    def _state_size(self):
        # The groups' states are of equal blocks, as the worker asserts.
        (size,) = {self.specs[group].block_size for group in self.states}
        return size

    def _settle_states(self, request_id, start, count, said):
        if not self.states:
            return
        now = self._columns[request_id]
        first = start + count - len(self._guessed.get(request_id, ()))
        right = max(said, 1) - 1
        self._ahead[request_id] = right
        size = self._state_size
        full = (first + right) // size * size
        if full < first:
            return
        source, target = now + full - first, full // size - 1
        if now == target:
            self._ahead[request_id] = 0
        if source != target:
            tables = self.tables[request_id]
            self._copy(
                [(t[source], t[target]) for t in map(tables.__getitem__, self.states)]
            )

    def _hold(self, block, group, place, chain):
        """Write to a block; what another group had there is lost."""
        assert block != 0, "the null block is never written"
        held = self.blocks.get(block)
        if held is None or held[0] != group:
            held = self.blocks[block] = group, {}
        held[1][place] = chain

    def _expect(self, request_id, group, block, place, chain, what):
        held = self.blocks.get(block, (None, {}))
        if held[0] == group and held[1].get(place) == chain:
            return
        other = held[0] not in (None, group)
        holds = f"group {held[0]}'s" if other else "something else"
        raise WrongReadError(
            f"{request_id} reads {what} of group {group} in block {block}, "
            f"which holds {holds}"
        )

    def _write(self, request_id, start, count):
        end = start + count
        chain = self._chain_to(request_id, end)
        for group, spec in enumerate(self.specs):
            table, size = self.tables[request_id][group], spec.block_size
            if group in self.states:
                now = self._columns[request_id]
                if start:
                    # A step that starts at 0 does not read what is there.
                    block = table[now + self._ahead.get(request_id, 0)]
                    what = f"the state after {start}"
                    self._expect(request_id, group, block, STATE, chain[start], what)
                guesses = len(self._guessed.get(request_id, ()))
                for ahead in range(guesses + 1):
                    block = table[now + ahead]
                    self._hold(block, group, STATE, chain[end - guesses + ahead])
                continue
            if group in self.drafters:
                continue
            for position in range(start, end):
                block = table[position // size]
                self._hold(block, group, position % size, chain[position + 1])

    def _write_drafters(self, request_id, start, end):
        if not self.drafters:
            return
        # What was not accepted is written again.
        end = min(end, len(self.tokens[request_id]) - 1)
        chain = self._chain_to(request_id, end + 1)
        for group in self.drafters:
            table, size = self.tables[request_id][group], self.specs[group].block_size
            for position in range(start, end):
                block = table[position // size]
                held = self._drafter_slot(chain, position, size)
                self._hold(block, group, position % size, held)
            for position in range(end, min(end + self.drafts, len(table) * size)):
                self._hold(table[position // size], group, position % size, "a guess")

    @staticmethod
    def _drafter_slot(chain, position, size):
        """Return what a slot depends on; the last of a block counts without the token
        behind it: blocks are shared by their own tokens, here as in vLLM."""
        return chain[position + 1 + ((position + 1) % size > 0)]

    def _read(self, request_id, start):
        chain = self._chain_to(request_id, start + 1)
        for group, spec in enumerate(self.specs):
            if group in self.states:
                continue
            table, size = self.tables[request_id][group], spec.block_size
            # The step's first token reads furthest back.
            for position in range(self._first_read(spec, start), start):
                holds = chain[position + 1]
                if group in self.drafters:
                    holds = self._drafter_slot(chain, position, size)
                self._expect(
                    request_id,
                    group,
                    table[position // size],
                    position % size,
                    holds,
                    f"position {position}",
                )

    @staticmethod
    def _first_read(spec, position):
        """Return the first position that the token at one reads."""
        if isinstance(spec, SlidingWindowSpec):
            return max(0, position - spec.sliding_window + 1)
        if isinstance(spec, ChunkedLocalAttentionSpec):
            chunk = spec.attention_chunk_size
            return position // chunk * chunk
        return 0
