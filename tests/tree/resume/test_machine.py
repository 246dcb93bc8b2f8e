"""The tree of resume points over physical memory, driven by hypothesis.

The machine plays the pool, the worker and the requests: it owns the ids, writes what
blocks hold, and lets go as vLLM does. Whatever the tree answers must be backed by
blocks that hold exactly what the tokens before that place would have written.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tree.resume.memory import Memory, Request
from vllm_radix.tree import HOLE, ChangeLog, encode
from vllm_radix.tree.resume import Chunk, Dense, ResumeTree, State, Window

POOL = 60
LAYOUTS = [
    (Dense(4),),
    (Window(2, width=4),),
    (Dense(4), State(4)),
    (Dense(2), State(6, grain=2)),
    (Dense(4), Window(4, width=6)),
    (Dense(2), Window(4, width=5), Chunk(2, chunk=6)),
    (Dense(2), Dense(4), Window(3, width=4)),
    (Dense(4), Chunk(3, chunk=9), State(3)),
    (Dense(4), Window(2, width=5), Chunk(2, chunk=6), State(4, grain=2)),
]
STEM = st.integers(0, 7), st.integers(0, 24)
OWN = st.lists(st.integers(0, 1), max_size=8)
FEW = st.integers(1, 9)


class Physical(RuleBasedStateMachine):
    @initialize(layout=st.sampled_from(LAYOUTS))
    def start(self, layout):
        self.layout = layout
        self.tree = ResumeTree(layout)
        self.tree.changes = ChangeLog()
        self.memory = Memory(layout)
        self.blank = list(range(POOL))
        self.uses = [0] * POOL
        self.requests = []
        self.points = []  # point, namespace, tokens
        self.texts = {((0, 1) * 12, None): None, ((0,) * 20, None): None}
        self.probes = {}
        self.pins = []
        self.has_states = any(isinstance(c, State) for c in layout)

    def note(self, request):
        """Look a request's tokens up from now on; texts are few, the last ones."""
        self.texts[tuple(request.tokens), request.namespace] = None
        while len(self.texts) > 8:
            del self.texts[next(iter(self.texts))]

    # -- the pool --------------------------------------------------------------

    def take(self, count):
        """Blank ids, after what must be evicted for them; None if there are none."""
        short = count - len(self.blank)
        if short > 0:
            self.blank += self.tree.evict(short)
        if count > len(self.blank):
            return None
        taken, self.blank = self.blank[:count], self.blank[count:]
        for block in taken:
            self.uses[block] = 1
        return taken

    def let_go(self, blocks):
        free = []
        for block in blocks:
            self.uses[block] -= 1
            if not self.uses[block]:
                free.append(block)
        self.tree.release(free)
        self.blank += [block for block in free if block not in self.tree]

    def add(self, request, place, block_at, **options):
        others = (other.planned for other in self.requests if other is not request)
        if any(planned and planned[1] for planned in others):
            # Dense blocks that are being written would lie below a point that is not.
            return None
        added = self.tree.add(
            encode(request.tokens[:place]),
            request.namespace,
            place,
            block_at,
            **options,
        )
        if added is None:
            return None
        point, new = added
        assert all(self.uses[block] for block in new)
        tokens = tuple(request.tokens[:place])
        self.points.append((point, request.namespace, tokens))
        return point

    def draw(self, data, idle=True):
        requests = [r for r in self.requests if not (idle and r.planned)]
        return data.draw(st.sampled_from(requests)) if requests else None

    # -- requests --------------------------------------------------------------

    def text(self, stem, own):
        """Tokens that go on from some text that came before."""
        which, cut = stem
        texts = list(self.texts)
        before, namespace = texts[which % len(texts)]
        tokens = (*before[:cut], *own)[:32] or (0,)
        return tokens, namespace

    @rule(stem=st.tuples(*STEM), own=OWN, read=st.booleans(), salted=st.booleans())
    def admit(self, stem, own, read, salted):
        self.admit_one(stem, own, read, salted)

    def admit_one(self, stem, own, read, salted):
        tokens, namespace = self.text(stem, own)
        if salted:
            namespace = "salt"
        request = Request(tokens, namespace, len(self.layout))
        self.note(request)
        found = None
        key = encode(tokens)
        self.tree.note_parting(key, namespace, len(tokens))
        if read:
            found = self.tree.find(key, namespace, len(tokens) - 1)
        if found is not None:
            self.memory.expect_found(request, found)
            hit = {block for run in found.runs for block in run.blocks}
            self.tree.acquire([b for b in hit if not self.uses[b]])
            for run in found.runs:
                request.tables[run.group] = [HOLE] * run.first + list(run.blocks)
                for block in run.blocks:
                    self.uses[block] += 1
            request.done = found.num_tokens
            partly = [
                group
                for group, component in enumerate(self.layout)
                if found.num_tokens % component.block_size
            ]
            copies = self.take(len(partly))
            if copies is None:
                self.let_go([b for run in found.runs for b in run.blocks])
                return None
            for group, copy in zip(partly, copies, strict=True):
                source = request.tables[group][-1]
                self.memory.copy(source, copy)
                request.tables[group][-1] = copy
                self.let_go([source])
            self.tree.note_hit(found.point)
        self.requests.append(request)
        return request

    @rule(
        stem=st.tuples(*STEM),
        own=OWN,
        read=st.booleans(),
        steps=st.lists(st.tuples(FEW, st.booleans()), min_size=1, max_size=5),
        finish=st.booleans(),
        shared=st.booleans(),
    )
    def serve(self, stem, own, read, steps, finish, shared):
        """Compute all of a request, or the more part, with points on the way."""
        request = self.admit_one(stem, own, read, False)
        for count, point in steps:
            if request is None or request.done == len(request.tokens):
                break
            end = min(request.done + 2 * count, len(request.tokens))
            if not self.allocate(request, end):
                break
            self.compute(request, end)
            if point:
                self.leave_point_of(request, shared)
        if request is not None and finish:
            self.finish_one(request, point=True)

    def allocate(self, request, end):
        """Give a request the blocks of a step; return whether there were any."""
        missing = []
        for group, component in enumerate(self.layout):
            table = request.tables[group]
            if isinstance(component, State):
                last = component.first_block(end)
                table += [HOLE] * (last + 1 - len(table))
                if table[last] == HOLE:
                    missing.append((group, last))
                continue
            for index in range(len(table), component.end_block(end)):
                table.append(HOLE)
                missing.append((group, index))
        blocks = self.take(len(missing))
        for number, (group, index) in enumerate(missing):
            if blocks is None:
                request.tables[group].pop()
            else:
                request.tables[group][index] = blocks[number]
        return blocks is not None

    def compute(self, request, end):
        self.memory.write(request, end)
        request.done = end
        for table, component in zip(request.tables, self.layout, strict=True):
            first = min(len(table), component.first_block(end))
            self.let_go([block for block in table[:first] if block != HOLE])
            table[:first] = [HOLE] * first

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=FEW, points=st.integers(0, 2), shared=st.booleans())
    def schedule(self, data, count, points, shared):
        """A step, and points at what it will have written."""
        request = self.draw(data)
        if request is None or request.done == len(request.tokens):
            return
        end = min(request.done + count, len(request.tokens))
        if not self.allocate(request, end):
            return
        added = []
        for _ in range(points):
            place = data.draw(st.integers(request.done + 1, end))
            if self.has_states:
                # The next step would overwrite a state inside a block.
                sizes = [c.block_size for c in self.layout if isinstance(c, State)]
                if place != end or any(end % size for size in sizes):
                    continue
            point = self.add(
                request, place, request.block_at, shared=shared, ready=False
            )
            added += [point] if point is not None else []
        request.planned = end, added

    @precondition(lambda self: any(r.planned for r in self.requests))
    @rule(data=st.data())
    def execute(self, data):
        planned = [r for r in self.requests if r.planned]
        request = data.draw(st.sampled_from(planned))
        end, points = request.planned
        request.planned = None
        self.compute(request, end)
        for point in points:
            self.tree.make_ready(point)

    @precondition(lambda self: any(r.planned for r in self.requests))
    @rule(data=st.data())
    def retract(self, data):
        """The step is dropped: nothing of it will be written."""
        planned = [r for r in self.requests if r.planned]
        request = data.draw(st.sampled_from(planned))
        for point in request.planned[1]:
            self.blank += self.tree.remove(point)
        self.leave(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 1), times=FEW)
    def generate(self, data, token, times):
        request = self.draw(data)
        if request is None or request.done != len(request.tokens):
            return
        for _ in range(times):
            request.tokens.append(token)
            if not self.allocate(request, len(request.tokens)):
                request.tokens.pop()
                return
            self.compute(request, len(request.tokens))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), shared=st.booleans())
    def leave_point(self, data, shared):
        """A point where a request is, of which states are copied."""
        request = self.draw(data)
        if request is not None and request.done:
            self.leave_point_of(request, shared)

    def leave_point_of(self, request, shared):
        place = request.done
        partly = [
            group
            for group, component in enumerate(self.layout)
            if isinstance(component, State) and place % component.block_size
        ]
        sources = [
            request.block_at(group, (place - 1) // self.layout[group].block_size)
            for group in partly
        ]
        copies = None if HOLE in sources else self.take(len(partly))
        if copies is None:
            return
        for source, copy in zip(sources, copies, strict=True):
            self.memory.copy(source, copy)
        copied = dict(zip(partly, copies, strict=True))

        def block_at(group, index):
            return copied.get(group, request.block_at(group, index))

        self.add(request, place, block_at, shared=shared)
        self.let_go(copies)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), back=st.integers(0, 6))
    def point_behind(self, data, back):
        """A point at what was computed before, if enough of it is still there."""
        request = self.draw(data)
        if request is None or self.has_states or request.done <= back:
            return
        self.add(request, request.done - back, request.block_at)

    def leave(self, request):
        self.requests.remove(request)
        held = [b for table in request.tables for b in reversed(table) if b != HOLE]
        self.let_go(held)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), point=st.booleans())
    def finish(self, data, point):
        request = self.draw(data)
        if request is not None:
            self.finish_one(request, point)

    def finish_one(self, request, point):
        self.note(request)
        if point and request.done:
            self.add(request, request.done, request.block_at)
        self.leave(request)

    # -- the cache -------------------------------------------------------------

    @rule(
        count=st.integers(0, 4),
        block=st.none() | st.integers(0, POOL - 1),
        pin=st.none() | st.integers(0, 30),
        unpin=st.none() | st.integers(0, 30),
        hint=st.none() | st.sampled_from(["keep", "unkeep", "let_go"]),
        which=st.integers(0, 30),
        level=st.integers(0, 15),
    )
    def disturb(self, count, block, pin, unpin, hint, which, level):
        had = self.tree.num_idle
        freed = self.tree.evict(count)
        assert len(freed) >= min(count, had)
        self.blank += freed
        if block is not None:
            self.blank += self.tree.discard(block)
            assert block not in self.tree
        alive = [point for point, *_ in self.points if point.alive]
        if pin is not None and alive:
            self.pins.append(alive[pin % len(alive)])
            self.tree.pin(self.pins[-1].id)
        if hint is not None and alive:
            told = () if hint == "unkeep" else (level,)
            getattr(self.tree, hint)(alive[which % len(alive)].id, *told)
        if unpin is not None and self.pins:
            self.tree.unpin(self.pins.pop(unpin % len(self.pins)).id)

    @precondition(lambda self: not self.requests)
    @rule()
    def reset(self):
        self.tree.reset()
        self.blank = list(range(POOL))
        self.pins.clear()
        assert not self.tree.num_idle

    # -- what must hold --------------------------------------------------------

    def deepest(self, tokens, namespace, limit):
        """Return how far the deepest point that is a prefix of some tokens goes."""
        return max(
            (
                len(prefix)
                for point, space, prefix in self.points
                if point.alive
                and point.ready
                and space == namespace
                and len(prefix) <= limit
                and prefix == tokens[: len(prefix)]
            ),
            default=0,
        )

    @invariant()
    def what_is_found_is_right(self):
        if not hasattr(self, "tree"):
            return
        for tokens, namespace in self.texts:
            reader = Request(tokens, namespace, len(self.layout))
            key = encode(list(tokens))
            for limit in {len(tokens), len(tokens) - 1, len(tokens) // 2}:
                found = self.tree.find(key, namespace, limit)
                length = found.num_tokens if found else 0
                assert self.deepest(tokens, namespace, limit) <= length <= limit
                probe = self.tree.probe(key, namespace, limit)
                assert probe.num_blocks == length
                if found:
                    assert probe.last_block == found.point
                    self.memory.expect_found(reader, found)
                    blocks = {b for run in found.runs for b in run.blocks}
                    assert not blocks & set(self.blank), "found, and free"

    @invariant()
    def no_change_goes_unreported(self):
        if not hasattr(self, "tree"):
            return
        changes = self.tree.changes
        probes = {}
        for tokens, namespace in self.texts:
            probe = self.tree.probe(encode(list(tokens)), namespace)
            probes[tokens, namespace] = probe
            before = self.probes.get((tokens, namespace), probe)
            if probe.num_blocks == before.num_blocks or not self.tree.tells_all:
                continue
            anchor, depth = before.anchor
            end = ChangeLog.root(namespace) if anchor is None else anchor
            rest = encode(list(tokens[depth:]))
            assert (
                changes.rescan_all
                or end in changes.removed_blocks
                or any(
                    end == told and (rest.startswith(key) or key.startswith(rest))
                    for told, key in changes.added_edges
                )
            )
        changes.clear()
        self.probes = probes

    @invariant()
    def sound(self):
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        # Conservation: every id is blank, idle, or used by a request.
        assert len(set(self.blank)) == len(self.blank)
        used = {block for block in range(POOL) if self.uses[block]}
        assert not used & set(self.blank)
        idle = {block for block in range(POOL) if self.tree.is_idle(block)}
        assert idle == {b for b in range(POOL) if b in self.tree} - used
        assert len(used) + len(self.blank) + len(idle) == POOL
        assert self.tree.num_idle == len(idle)

    @invariant()
    def pinned_blocks_are_counted(self):
        if not hasattr(self, "tree"):
            return
        needed = set()
        pinned = {point.id for point in self.pins if point.alive}
        assert self.tree.pinned_blocks() == pinned
        for point in self.pins:
            if point.alive:
                found = self.tree.resume(point, point.num_tokens)
                needed |= {b for run in found.runs for b in run.blocks}
        idle = sum(self.tree.is_idle(block) for block in needed)
        assert idle == self.tree.num_pinned_idle


TestPhysical = Physical.TestCase
TestPhysical.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
