"""Tree, pool, manager and scheduler together, driven by hypothesis.

Every action leaves pool and tree consistent, every step reads right, and in the
end every request is answered, every block is free, and nothing is left of a hint. Every
eviction policy is drawn, hints of all kinds, and prefixes that salts share.
"""

from types import SimpleNamespace

from engine.test_wishes import check_wishes
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from support.engine_double import EngineDouble, make_scheduler
from vllm_radix.engine.admission_check import check_admission
from vllm_radix.policy import ORDERS
from vllm_radix.tree import POLICIES, encode

SYMBOLS = st.lists(st.integers(3, 5), min_size=1, max_size=10)
COUNT = st.integers(1, 24)
SALT = st.sampled_from([None, "a", "b"])
HINTS = st.fixed_dictionaries(
    {},
    optional={
        "radix_end_session": st.booleans(),
        "radix_expect_in": st.sampled_from([1, 20]),
        "radix_keep_for": st.sampled_from([1, 60]),
        "radix_priority": st.integers(-10, 10),
        "radix_replaces": st.integers(1, 30).map(str),
    },
)
_BLOCKED = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


class Engine(RuleBasedStateMachine):
    """All that a server's clients, operators and connectors may do.

    Attributes:
        actions: how many were run, by all machines of this process.
        policies: the eviction policies that are drawn.
    """

    actions = 0
    policies = tuple(POLICIES)

    @initialize(
        data=st.data(),
        size=st.sampled_from([1, 2, 16, 32]),
        lag=st.integers(0, 1),
        policy=st.sampled_from(["fcfs", "fcfs", "priority"]),
        overtakes=st.sampled_from([0, 3, 99]),
        room=st.integers(6, 20),
        budget=st.sampled_from([32, 256]),
        threshold=st.sampled_from([0, 0, 8]),
        radix=st.fixed_dictionaries(
            {
                "policy": st.sampled_from(["prefix", "prefix", *ORDERS]),
                "patience": st.sampled_from([0.0, 0.9, 9.0]),
                "hold": st.booleans(),
                "tenant": st.sampled_from(["", "", "cache_salt"]),
                "fair_quantum": st.sampled_from([1, 64]),
                "hint_quota": st.sampled_from([0.0, 0.25, 1.0]),
            }
        ),
        shared=st.lists(SYMBOLS, max_size=2),
    )
    def start(
        self, data, size, lag, policy, overtakes, room, budget, threshold, radix, shared
    ):
        self.size = size
        self.stretch = max(2, size // 2)
        self.now = 0.0
        eviction = data.draw(st.sampled_from(self.policies))
        self.longest = 1 << 30
        public = [self.text(symbols) for symbols in shared]
        made = make_scheduler(
            asynchronous=bool(lag),
            block_size=size,
            num_blocks=max(8, room * 16 // size),
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            max_model_len=max(64, 3 * size),
            scheduling_policy=policy,
            scheduler_reserve_full_isl=False,
            long_prefill_token_threshold=threshold,
            radix={
                "max_overtakes": overtakes,
                "min_sub_block_tokens": 1,
                "eviction": eviction,
                "public_prefix": {"prompts": public} if public else "",
                **radix,
            },
        )
        made.clock = lambda: self.now
        self.engine = EngineDouble(made, lag, public=public)
        self.scheduler = made
        self.manager = made.kv_cache_manager
        self.pool = self.manager.block_pool
        self.notes = self.pool.hint_notes
        self.longest = min(
            made.max_model_len - 30, (self.pool.num_gpu_blocks - 2) * size - 26
        )
        self.number = 0
        self.alive, self.answered = {}, []
        self.sessions = []
        self.grammars = []
        self.pinned, self.taken = [], []

    # -- clients ---------------------------------------------------------------

    def text(self, symbols):
        tokens = [symbol for symbol in symbols for _ in range(self.stretch)]
        return tokens[: max(1, self.longest)]

    def send(self, tokens, count, **fields):
        self.number += 1
        name = str(self.number)
        tokens = tokens[: max(1, self.longest)]
        self.alive[name] = tokens
        self.engine.add(name, tokens, count, **fields)
        return name

    @rule(symbols=SYMBOLS, count=COUNT)
    def ask(self, symbols, count):
        self.send(self.text(symbols), count)

    @rule(symbols=SYMBOLS, count=COUNT, salt=st.sampled_from("ab"))
    def ask_with_salt(self, symbols, count, salt):
        self.send(self.text(symbols), count, cache_salt=salt)

    @rule(symbols=SYMBOLS, count=COUNT, salt=SALT, hints=HINTS)
    def ask_with_hints(self, symbols, count, salt, hints):
        self.send(self.text(symbols), count, cache_salt=salt, extra_args=hints)

    @rule(seconds=st.sampled_from([0.5, 3, 100]))
    def wait(self, seconds):
        """Wishes expire, and requests wait for too long."""
        self.now += seconds

    @rule(symbols=SYMBOLS, count=COUNT)
    def ask_an_adapter(self, symbols, count):
        lora = LoRARequest("adapter", 1, "/adapter")
        self.send(self.text(symbols), count, lora_request=lora)

    @rule(symbols=SYMBOLS, count=COUNT)
    def ask_for_prompt_logprobs(self, symbols, count):
        """Looks nothing up, and so computes duplicates."""
        self.send(self.text(symbols), count, prompt_logprobs=1)

    @rule(symbols=SYMBOLS, count=COUNT)
    def ask_with_a_grammar(self, symbols, count):
        """It waits until the grammar is compiled."""
        name = self.send(self.text(symbols), count)
        request = self.scheduler.requests[name]
        request.status = _BLOCKED
        request.structured_output_request = SimpleNamespace(grammar=None)
        self.grammars.append(request)

    @precondition(lambda self: self.grammars)
    @rule()
    def compile_grammars(self):
        for request in self.grammars:
            if request.status == _BLOCKED:
                request.status = RequestStatus.WAITING
            request.structured_output_request = None
        self.grammars.clear()

    @rule(symbols=SYMBOLS, count=COUNT, urgency=st.integers(0, 2))
    def ask_urgently(self, symbols, count, urgency):
        self.send(self.text(symbols), count, priority=urgency)

    @rule(symbols=SYMBOLS, count=COUNT, n=st.integers(2, 4))
    def ask_for_several_answers(self, symbols, count, n):
        """Parallel sampling reaches the scheduler as n requests of one prompt."""
        for _ in range(n):
            self.send(self.text(symbols), count)

    @precondition(lambda self: self.answered)
    @rule(data=st.data(), symbols=SYMBOLS, count=COUNT, salt=SALT, hints=HINTS)
    def go_on(self, data, symbols, count, salt, hints):
        """The next turn of a conversation."""
        said = data.draw(st.sampled_from(self.answered))
        tokens = said + self.text(symbols[:3])
        self.send(tokens, count, cache_salt=salt, extra_args=hints)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), cut=st.integers(1, 200), count=COUNT)
    def branch(self, data, cut, count):
        """Another way on from inside a prompt, at any token."""
        stem = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        self.send([*stem[: 1 + cut % len(stem)], 7, 8, 9], count)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), count=COUNT)
    def repeat(self, data, count):
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.send(self.alive[name], count)

    @rule(symbols=SYMBOLS, count=COUNT)
    def open_session(self, symbols, count):
        """Streaming input: what is said next comes in later, under one id."""
        if len(self.sessions) < 2:
            self.number += 1
            name = f"session {self.number}"
            self.sessions.append(name)
            tokens = self.text(symbols)[: self.longest // 4 + 1]
            self.engine.add(name, tokens, count, resumable=True)

    @precondition(lambda self: self.sessions)
    @rule(symbols=SYMBOLS, count=st.integers(1, 4), close=st.booleans())
    def feed_session(self, symbols, count, close):
        name = self.sessions[-1]
        known = self.scheduler.requests.get(name)
        if known is None or close or known.num_tokens > self.longest // 2:
            self.sessions.pop()
            if known is not None:
                self.engine.add(name, [3], 1, resumable=False)
        else:
            tokens = self.text(symbols)[: self.longest // 8 + 1]
            self.engine.add(name, tokens, count, resumable=True)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort_any(self, data):
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.engine.abort(name)
        del self.alive[name]

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def abort_running(self):
        name = self.scheduler.running[-1].request_id
        self.engine.abort(name)
        self.alive.pop(name, None)

    @precondition(lambda self: len(self.scheduler.waiting))
    @rule()
    def abort_waiting(self):
        name = self.scheduler.waiting.peek_request().request_id
        self.engine.abort(name)
        self.alive.pop(name, None)

    # -- the engine ------------------------------------------------------------

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @rule()
    def finish_all(self):
        self.unpause()
        self.compile_grammars()
        self.give_back()
        for name in self.sessions:
            self.engine.abort(name)
        self.sessions.clear()
        self.engine.run()
        for name, tokens in self.alive.items():
            self.answered.append(tokens + self.engine.outputs[name])
        self.alive.clear()
        del self.answered[:-6]

    @rule()
    def pause(self):
        self.scheduler.set_pause_state(PauseState.PAUSED_NEW)

    @rule()
    def unpause(self):
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    # -- operators -------------------------------------------------------------

    @rule()
    def reset_if_idle(self):
        idle = self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert self.scheduler.reset_prefix_cache() == idle
        assert not idle or not self.pool.tree.stats().cached_blocks
        assert not idle or self.nothing_is_remembered()

    def nothing_is_remembered(self):
        """Whether no wish, no end, no ghost and no class is left."""
        tree = self.pool.tree
        return not (self.notes.num_noted or tree.num_kept or tree.num_remembered)

    # A session that waits for input keeps its blocks, and vLLM then refuses.
    @precondition(
        lambda self: not (self.engine.lag or self.pinned or self.taken or self.sessions)
    )
    @rule()
    def reset_with_running(self):
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert not self.pool.tree.stats().cached_blocks
        assert self.nothing_is_remembered()

    @rule()
    def read_statistics(self):
        stats = self.scheduler.make_stats()
        seen = stats.prefix_cache_stats
        assert 0 <= seen.hits <= seen.queries
        used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        expected = used / (self.pool.num_gpu_blocks - 1)
        assert abs(stats.kv_cache_usage - expected) < 1e-9

    @rule(symbols=SYMBOLS)
    def look(self, symbols):
        """Changes nothing, whatever is asked."""
        before = self.pool.tree.dump(), self.pool.tree.stats()
        key = encode(self.text(symbols))
        self.pool.tree.match(key, partial=True)
        self.pool.tree.probe(key)
        self.pool.tree.explain(key, "a")
        assert (self.pool.tree.dump(), self.pool.tree.stats()) == before

    # -- connectors and others who hold blocks ---------------------------------

    @rule(blocks=st.sets(st.integers(1, 40), min_size=1, max_size=4))
    def lose_blocks(self, blocks):
        """As after a failed load of KV."""
        known = {block for block in blocks if block < self.pool.num_gpu_blocks}
        self.manager.evict_blocks(known)
        assert not any(block in self.pool.tree for block in known)

    @rule(symbols=SYMBOLS)
    def pin(self, symbols):
        """Hold what is cached of a prompt, as a connector does that sends it."""
        found = self.pool.tree.match(encode(self.text(symbols))).blocks
        if found and len(self.pinned) < 2:
            blocks = [self.pool.blocks[block] for block in found]
            self.pool.touch(blocks)
            self.pinned.append(blocks)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self):
        self.pool.free_blocks(reversed(self.pinned.pop()))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin_until_reuse(self):
        self.pool.unpin_blocks(self.pinned.pop()[::-1], lambda block: None)

    @rule(count=st.integers(1, 3))
    def take_blocks(self, count):
        if count <= self.pool.get_num_free_blocks() and len(self.taken) < 2:
            self.taken.append(self.pool.get_new_blocks(count))

    @precondition(lambda self: self.taken)
    @rule()
    def free_blocks(self):
        self.pool.free_blocks(self.taken.pop())

    def give_back(self):
        while self.pinned:
            self.unpin()
        while self.taken:
            self.free_blocks()

    # -- what holds ------------------------------------------------------------

    @invariant()
    def sound(self):
        if hasattr(self, "pool"):
            type(self).actions += 1
            self.pool.check()
            check_wishes(self.notes.wishes, self.pool.tree)
            for block in self.notes._to_go:
                assert self.pool.blocks[block].ref_cnt, "a session that ended is held"
            if self.scheduler.admission is not None:
                check_admission(self.scheduler.admission)

    def teardown(self):
        if hasattr(self, "pool"):
            self.finish_all()
            assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
            assert not self.pool.tree.stats().duplicate_blocks
            assert (
                self.scheduler.admission is None
                or not self.scheduler.admission.num_known
            )
            assert not self.pool.open_tails
            self.notes.expire(float("inf"))
            assert not self.notes.num_noted and not self.pool.tree.num_kept


def machine(policy):
    """Return the machine of an eviction policy alone."""
    fields = {"policies": (policy,), "actions": 0}
    return type(f"Engine[{policy}]", (Engine,), fields)


MACHINES = {name: machine(name) for name in POLICIES}

TestEngine = Engine.TestCase
TestEngine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_there_are_at_least_twenty_kinds_of_action():
    assert len(Engine().rules) >= 20
