"""The account of uses: what a policy with classes is told of runs of blocks."""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from vllm_radix.tree.block_table import BlockTable
from vllm_radix.tree.eviction import EvictionPolicy, Queues
from vllm_radix.tree.exposure import Exposure
from vllm_radix.tree.ghosts import Ghost, Ghosts
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.runs import (
    BYTE,
    END,
    LABEL_AT,
    RELEASED,
    TOUCHED_AT,
    USE,
    USES,
    USES_AT,
    Returned,
    add_uses,
    digest_at,
    runs_of,
    runs_to,
    runs_upwards,
    seed_of,
    split_run,
)
from vllm_radix.tree.shape import Shape
from vllm_radix.tree.stack_distance import StackDistances

KIND_RELEASED = RELEASED >> LABEL_AT
KIND_CLOCK_AT = TOUCHED_AT - LABEL_AT
"""A run without its end and uses is a kind: runs of one kind are told of at once."""

_USES_AND_END = USES | END


class Use(NamedTuple):
    """What an admitted request was told, to be handed back when it ends.

    Attributes:
        seen: blocks of its prompt that are cached, or remembered.
        pending: those that it will compute.
        clock: when it was admitted.
        returned: evicted runs that it brings back.
    """

    seen: int
    pending: int
    clock: int
    returned: tuple[Returned, ...]


class _Pending:
    """The end of a run that is being evicted.

    Attributes:
        node: the edge.
        run: the run.
        depth: blocks between the root and the evicted ones.
        blocks: how many are evicted.
        first: the tokens of the first of them.
    """

    __slots__ = ("blocks", "depth", "first", "node", "run")

    def __init__(self, node: Node, run: int, depth: int) -> None:
        self.node = node
        self.run = run & ~END
        self.depth = depth
        self.blocks = 0
        self.first: bytes | bytearray = b""


class ReuseAccount:
    """Follows runs of blocks through use, release and eviction, and tells the policy.

    Costs are per run of a request's path, not per block. A request's path is walked
    when it is admitted and when it ends.

    Args:
        policy: is told.
        table: where blocks are.
        shape: the nodes.
        queues: its clock and its counts of released blocks are kept here.

    Attributes:
        ghosts: evicted runs.
        distances: last touches, if the policy compares itself.
        exposure: what least recently used would still hold, if so.
        most_cached: blocks that were cached at once, at most.
    """

    def __init__(
        self, policy: EvictionPolicy, table: BlockTable, shape: Shape, queues: Queues
    ) -> None:
        self.policy = policy
        self.ghosts = Ghosts()
        self.distances = StackDistances() if policy.compares else None
        self.exposure = Exposure(policy) if policy.compares else None
        self.most_cached = 0
        self._table = table
        self._shape = shape
        self._queues = queues
        # What was evicted last, not yet among the ghosts, for more of it may follow.
        self._pending: _Pending | None = None

    # -- a request is admitted -------------------------------------------------

    def admit(self, key: bytes, namespace: Namespace, last: int, found: int) -> Use:
        """Note that a request uses a cached prefix, and will compute the rest.

        O(runs of its path, and of what it brings back).

        Args:
            key: of its prompt.
            namespace: of its blocks.
            last: the last cached block of its prefix, if there is one.
            found: blocks of that prefix.
        """
        asked = max(found, len(key) // self._shape.block_bytes)
        node = self._table.node_of(last) if found else None
        if node is None:
            node, found = self._shape.roots.get(namespace), 0
        now, cached = self._queues.now, self._table.num_cached
        if cached > self.most_cached:
            self.most_cached = cached
        distances = self.distances
        if distances is not None and self.exposure is not None:
            distances.capacity = max(cached, 1)
            self.exposure.pass_time(distances.horizon())
        self._bury()
        returned: list[Returned] = []
        if found < asked and len(self.ghosts):
            digest = seed_of(namespace)
            if node is not None and found:
                size, roots = self._shape.block_bytes, self._shape.namespace_of
                digest = digest_at(node, found, size, roots)
            returned = self._bring_back(key, digest, found, asked)
        lru = 0
        if distances is not None:
            lru = self._found_by_lru(distances, node, found, returned)
        kinds = self._use_runs(node, found)
        for kind, blocks in kinds.items():
            if kind & KIND_RELEASED:
                self._queues.blocks[kind & BYTE] -= blocks
                age = now + 1 - (kind >> KIND_CLOCK_AT)
                self.policy.note_reused(kind & BYTE, age, blocks, False)
        if distances is not None:
            self.policy.note_request(asked, found, lru, distances.capacity)
            for run in returned:
                distances.add(run.clock, run.begin - run.end)
            self._take_back(distances, kinds)
            distances.add(now, asked)
        seen = returned[-1].end if returned else found
        return Use(seen, asked - found, now, tuple(returned))

    def _bring_back(
        self, key: bytes, digest: int, depth: int, asked: int
    ) -> list[Returned]:
        """Take the evicted runs that continue a prefix: O(those)."""
        size, now = self._shape.block_bytes, self._queues.now
        returned = []
        while depth < asked:
            at = depth * size
            ghost = self.ghosts.pop(crc32(key[at : at + size], digest))
            if ghost is None:
                break
            blocks, age = min(ghost.blocks, asked - depth), now - ghost.clock
            self.policy.note_reused(ghost.label, age, blocks, True)
            if self.exposure is not None:
                self.exposure.lose(ghost.clock, ghost.label, blocks)
            if blocks < ghost.blocks:
                self.policy.note_unused(ghost.label, age, ghost.blocks - blocks)
            returned.append(Returned(depth, depth + blocks, ghost.uses, ghost.clock))
            depth += blocks
            digest = crc32(key[at : depth * size], digest)
        return returned

    def _use_runs(self, node: Node | None, depth: int) -> dict[int, int]:
        """Note a use of the runs of a path, from a depth of an edge upwards.

        Returns:
            The blocks of each kind, as they were before.
        """
        stamp = (self._queues.now + 1) << TOUCHED_AT
        kinds: dict[int, int] = {}
        # Runs of one kind that follow each other are counted at once.
        last, bottom = -1, depth
        while node is not None and depth:
            runs, start = node.runs, node.start
            # As runs_to, which is a call.
            if runs is not None and runs[-1] & END == depth:
                index = len(runs)
            else:
                runs, index = runs_to(node, depth)
            while index:
                index -= 1
                run = runs[index]
                kind = run >> LABEL_AT
                if kind != last:
                    if depth < bottom:
                        kinds[last] = kinds.get(last, 0) + bottom - depth
                    last, bottom = kind, depth
                run &= _USES_AND_END
                runs[index] = stamp | run + (USE if run < USES else 0)
                depth = runs[index - 1] & END if index else start
            node = node.parent
        if depth < bottom:
            kinds[last] = kinds.get(last, 0) + bottom - depth
        return kinds

    @staticmethod
    def _take_back(distances: StackDistances, kinds: dict[int, int]) -> None:
        """Take back the last touches of runs, by kind."""
        for kind, blocks in kinds.items():
            if touched := kind >> KIND_CLOCK_AT:
                distances.add(touched - 1, -blocks)

    def _found_by_lru(
        self,
        distances: StackDistances,
        node: Node | None,
        depth: int,
        returned: Sequence[Returned],
    ) -> int:
        """Return how many blocks of a path least recently used would find.

        O(runs from its end to the first one found), and once more where not all that
        was touched at one time is found.

        Args:
            distances: last touches.
            node: the edge where the cached part of the path ends.
            depth: at which it ends.
            returned: what follows it.
        """
        # Of those touched at one time, the deeper ones are older.
        time, shallower = -1, 0
        for touched, begin, end in runs_upwards(node, depth, returned):
            if not touched:
                return end  # they are held, as with any policy
            room = distances.room_at(touched - 1)
            if room is None:
                return end
            if room > 0:
                if time != touched:
                    path = runs_upwards(node, depth, returned)
                    time = touched
                    shallower = sum(
                        min(last, end) - first
                        for other, first, last in path
                        if other == time and first < end
                    )
                shallower -= end - begin
                room -= shallower
            if room > 0:
                return min(end, begin + room)
        return 0

    # -- a request ends --------------------------------------------------------

    def end(
        self,
        blocks: Sequence[int],
        use: Use | None,
        output_tokens: int,
        new_tokens: int,
    ) -> None:
        """Give classes to the runs of an ending request: O(runs of its path).

        Args:
            blocks: its blocks, still held.
            use: what ``admit`` said; None if it was not noted.
            output_tokens: that it has generated.
            new_tokens: of its prompt that nobody had asked for.
        """
        queues, policy, distances = self._queues, self.policy, self.distances
        queues.now += 1
        policy.note_release(queues.now)
        # A clock that is ahead is from before the cache was emptied.
        if distances is not None and use is not None and use.clock <= queues.now:
            distances.add(use.clock, -use.pending)
        node, depth = self._end_of(blocks)
        stamp = (queues.now + 1) << TOUCHED_AT | RELEASED
        returned = use.returned if use is not None else ()
        # Of runs that are alike but for the end, what they become, and their blocks;
        # those that follow each other are counted at once.
        alike: dict[int, list[int]] = {}
        entry: list[int] = [0, 0]
        last, bottom = -1, depth
        while node is not None and node.parent is not None:
            start = node.start
            if node.holes:
                entry[1] += bottom - depth
                last, bottom, depth, node = -1, start, start, node.parent
                continue
            if returned:
                add_uses(node, depth, returned)
            runs, below = node.runs, -1
            # As runs_to, which is a call.
            if runs is not None and runs[-1] & END == depth:
                index = len(runs)
            else:
                runs, index = runs_to(node, depth)
            while index:
                index -= 1
                rest = runs[index] >> USES_AT
                if rest != last:
                    entry[1] += bottom - depth
                    last, bottom = rest, depth
                    found = alike.get(rest)
                    if found is None:
                        uses = rest & BYTE
                        label = policy.label(uses, output_tokens, new_tokens)
                        run = stamp | label << LABEL_AT | uses << USES_AT
                        found = alike[rest] = [run, 0]
                    entry = found
                run = entry[0]
                if run != below:
                    below = run
                    runs[index] = run | depth
                else:
                    del runs[index]
                depth = runs[index - 1] & END if index else start
            node = node.parent
        entry[1] += bottom - depth
        self._release(alike)

    def _release(self, alike: dict[int, list[int]]) -> None:
        """Note, by what runs were, what they become and how many blocks they are."""
        queues, policy, distances = self._queues, self.policy, self.distances
        left: dict[int, int] = {}
        entered: dict[int, int] = {}
        for rest, (run, blocks) in alike.items():
            kind, label = rest >> LABEL_AT - USES_AT, run >> LABEL_AT & BYTE
            left[kind] = left.get(kind, 0) + blocks
            entered[label] = entered.get(label, 0) + blocks
        for kind, blocks in left.items():
            if kind & KIND_RELEASED:
                self._withdraw(kind, blocks)
        if distances is not None:
            self._take_back(distances, left)
            distances.add(queues.now, sum(entered.values()))
        for label, blocks in entered.items():
            queues.blocks[label] += blocks
            policy.note_labelled(label, blocks)

    def _end_of(self, blocks: Sequence[int]) -> tuple[Node | None, int]:
        """Return the edge and the depth at which a request's cached blocks end."""
        table = self._table
        for depth in range(len(blocks), 0, -1):
            block = blocks[depth - 1]
            there = table.duplicate_of.get(block, block)
            node = table.node_of(there)
            at_depth = node is not None and table.depths[there] == depth - 1
            if node is not None and at_depth and not node.partial:
                return node, depth
        return None, 0

    def _withdraw(self, kind: int, blocks: int) -> None:
        """Take released blocks of a kind out of their class, unjudged."""
        label = kind & BYTE
        self._queues.blocks[label] -= blocks
        age = self._queues.now + 1 - (kind >> KIND_CLOCK_AT)
        self.policy.note_relabelled(label, age, blocks)

    # -- an edge ---------------------------------------------------------------

    def class_of_end(self, node: Node) -> int:
        """Return the class of the last run of a leaf, which is released if it was not.

        O(1). Requests whose end was not noted release their blocks like that, as used
        once more and with no tokens.
        """
        runs = runs_of(node)
        run = runs[-1]
        if run & RELEASED:
            return run >> LABEL_AT & BYTE
        uses = run >> USES_AT & BYTE
        label = self.policy.label(uses, 0, 0)
        now, end = self._queues.now, run & END
        run = (now + 1) << TOUCHED_AT | label << LABEL_AT | uses << USES_AT | end
        if not node.partial and not node.holes:
            blocks = end - (runs[-2] & END if len(runs) > 1 else node.start)
            self._queues.blocks[label] += blocks
            self.policy.note_labelled(label, blocks)
            if self.distances is not None:
                if touched := runs[-1] >> TOUCHED_AT:
                    self.distances.add(touched - 1, -blocks)
                self.distances.add(now, blocks)
            run |= RELEASED
        runs[-1] = run
        return label

    def evicted(self, node: Node, run: int, blocks: int, chosen: bool) -> None:
        """Note that the end of a leaf's last run was evicted: O(1), amortised.

        Args:
            node: the leaf; its tokens are still there.
            run: the run as it was.
            blocks: how many.
            chosen: whether the policy had the choice.
        """
        if not run & RELEASED:
            return
        queues, policy, table = self._queues, self.policy, self._table
        label = run >> LABEL_AT & BYTE
        queues.blocks[label] -= blocks
        policy.note_evicted(label, blocks)
        if chosen and self.exposure is not None:
            self.exposure.add((run >> TOUCHED_AT) - 1, label, blocks)
        if table.num_cached + blocks > self.most_cached:
            self.most_cached = table.num_cached + blocks
        if not policy.ghosts:
            clock = (run >> TOUCHED_AT) - 1
            policy.note_unused(label, queues.now - clock, blocks)
            return
        size, left = self._shape.block_bytes, len(node.blocks)
        depth, pending = node.start + left, self._pending
        if (
            pending is None
            or pending.node is not node
            or pending.depth != depth + blocks
            or pending.run != run & ~END
        ):
            if pending is not None:
                self._bury()
            pending = self._pending = _Pending(node, run, depth)
        pending.depth = depth
        pending.blocks += blocks
        pending.first = node.key[left * size : (left + 1) * size]
        if not left:
            self._bury()  # while it is known what is above

    def _bury(self) -> None:
        """Put what was evicted last among the ghosts, and forget those too many."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        queues, policy, run, node = self._queues, self.policy, pending.run, pending.node
        label, clock = run >> LABEL_AT & BYTE, (run >> TOUCHED_AT) - 1
        blocks = pending.blocks
        if not node.alive:
            # Something else has removed or joined its edge in the meantime.
            policy.note_unused(label, queues.now - clock, blocks)
            return
        size, roots = self._shape.block_bytes, self._shape.namespace_of
        digest = digest_at(node, pending.depth, size, roots)
        uses = run >> USES_AT & BYTE
        self.ghosts.push(
            crc32(pending.first, digest), Ghost(blocks, label, uses, clock)
        )
        most = policy.ghosts * self.most_cached
        if self.ghosts.blocks > most:
            for old in self.ghosts.expire(most):
                policy.note_unused(old.label, queues.now - old.clock, old.blocks)

    @property
    def num_remembered(self) -> int:
        """Evicted blocks that will be known again."""
        last = self._pending.blocks if self._pending is not None else 0
        return self.ghosts.blocks + last

    def drop(self, node: Node, depth: int) -> None:
        """Take a block that leaves a hole out of its class: O(runs of the edge)."""
        runs = runs_of(node)
        at = split_run(runs, depth) if depth > node.start else 0
        split_run(runs, depth + 1)
        if runs[at] & RELEASED:
            self._withdraw(runs[at] >> LABEL_AT, 1)
            runs[at] ^= RELEASED

    def check(self) -> None:
        """Verify that the released blocks of each class are as many as counted.

        Raises:
            AssertionError: they are not.
        """
        counts = [0] * self.policy.num_classes
        for node in self._shape.nodes():
            begin = node.start
            for run in runs_of(node):
                end = run & END
                assert end > begin, "an empty run"
                if run & RELEASED:
                    counts[run >> LABEL_AT & BYTE] += end - begin
                    at = slice(begin - node.start, end - node.start)
                    assert HOLE not in node.blocks[at], "a released run has a hole"
                begin = end
        assert counts == self._queues.blocks, "released blocks are miscounted"
        most = self.policy.ghosts * self.most_cached
        assert self.ghosts.blocks <= most, "too many evicted blocks are remembered"
