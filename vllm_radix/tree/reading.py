"""What a radix tree can be asked without being changed: matches, probes, paths."""

from bisect import bisect_left
from collections.abc import Mapping

from vllm_radix.tree.base import _ALL, Match, Namespace, Partial
from vllm_radix.tree.keys import BYTES_PER_TOKEN, common_units
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.probe import Probe
from vllm_radix.tree.structure import HELD, Structure

_NEIGHBOURS = 64
"""Blocks looked at on each side, while they may not be copied from yet."""


class Reading(Structure):
    """The look-ups of ``RadixTree``; a part of it, not for others."""

    def match(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        *,
        partial: bool = False,
        written: Mapping[int, int] = _ALL,
    ) -> Match:
        """Return the longest cached prefix: O(L in memcmp + d log fan-out).

        A partial match costs one more search, and a look at the blocks of
        ``written`` beside it, 64 on each side at most.
        """
        tokens = len(key) // BYTES_PER_TOKEN
        if limit is not None and limit < tokens:
            tokens = limit
        wanted = tokens // self.block_size
        node = self._roots.get(namespace)
        if node is None:
            return Match(())
        found: list[int] = []
        depth = 0
        while depth < wanted:
            self.visited += 1
            child = self._child(node, key, depth)
            if child is None or child.blocks[0] == HOLE:
                break
            node = child
            length = self._shared(node, 0, key, depth, wanted)
            run = node.blocks if length == len(node.blocks) else node.blocks[:length]
            if node.holes and HOLE in run:
                run = run[: run.index(HOLE)]
            found += run
            depth += len(run)
            if len(run) < len(node.blocks):
                break
        if partial and depth * self.block_size < tokens:
            rest = key[depth * self.block_bytes : tokens * BYTES_PER_TOKEN]
            rest = rest[: self.block_bytes]
            return Match(tuple(found), self._inside(node, depth, rest, written))
        return Match(tuple(found))

    def _inside(
        self, node: Node, depth: int, rest: bytes, written: Mapping[int, int]
    ) -> Partial | None:
        """Return the block at ``depth`` that shares most of ``rest``, if any."""
        size = self.block_bytes
        at = depth - node.start
        if at < len(node.blocks):
            if node.blocks[at] == HOLE:
                return None
            here = node.key[at * size : (at + 1) * size]
            return self._as_partial(rest, here, node.blocks[at], written)
        best: Partial | None = None
        index = bisect_left(node.first, rest)
        right = range(index, min(len(node.first), index + _NEIGHBOURS))
        left = range(index - 1, max(-1, index - 1 - _NEIGHBOURS), -1)
        for side in (right, left):
            for i in side:
                self.visited += 1
                block = node.children[i].blocks[0]
                found = self._as_partial(rest, node.first[i], block, _ALL)
                # Those farther away share no more.
                if found is None or (best and found.num_tokens <= best.num_tokens):
                    break
                usable = min(found.num_tokens, written.get(block, found.num_tokens))
                if block != HOLE and usable > (best.num_tokens if best else 0):
                    best = found._replace(num_tokens=usable)
                if block != HOLE and block not in written:
                    break
        return best

    @staticmethod
    def _as_partial(
        rest: bytes,
        tokens: bytes | bytearray,
        block: int,
        written: Mapping[int, int],
    ) -> Partial | None:
        if rest[:BYTES_PER_TOKEN] != tokens[:BYTES_PER_TOKEN]:
            return None  # as for most neighbours
        shared = common_units(rest, 0, tokens, 0, BYTES_PER_TOKEN)
        shared = min(shared, written.get(block, shared))
        valid = len(tokens) // BYTES_PER_TOKEN
        return Partial(block, shared, valid) if shared else None

    def probe(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        last: Probe | None = None,
    ) -> Probe | None:
        """Return the length of the cached prefix, cheaply again and again.

        Args:
            key: as for ``match``.
            namespace: as for ``match``.
            limit: as for ``match``.
            last: the previous answer for the same arguments. While the path it
                found still stands, only what is below it is looked at: O(1)
                when nothing changed.

        Returns:
            The probe, or None when the namespace is empty.
        """
        wanted = len(key) // self.block_bytes
        if limit is not None:
            wanted = min(wanted, limit // self.block_size)
        root = self._roots.get(namespace)
        if root is None:
            return None
        node, depth = root, 0
        if last is not None and last._epoch == self._epoch and last._node.alive:
            node = last._node
            # A split may have moved the end of the match to a node above.
            while node.parent is not None and node.start >= last.num_blocks:
                self.visited += 1
                node = node.parent
            depth = last.num_blocks
            if depth > node.start + len(node.blocks):
                node, depth = root, 0  # trimmed since
        while True:
            inside = depth - node.start
            if inside < len(node.blocks):
                # Go on along this edge, as far as it is cached.
                self.visited += 1
                length = inside + self._shared(node, inside, key, depth, wanted)
                run = node.blocks[inside:length] if node.holes else ()
                if HOLE in run:
                    return Probe(node, depth + run.index(HOLE), self._epoch)
                depth = node.start + length
                if length < len(node.blocks):
                    break
            if depth >= wanted:
                break
            below = self._child(node, key, depth)
            if below is None or below.blocks[0] == HOLE:
                break
            node = below
        return Probe(node, depth, self._epoch)

    @property
    def num_pinned_idle(self) -> int:
        """How many idle blocks are pinned, or lie before a pinned one."""
        return self._num_pinned_idle

    def idle_on_path(
        self, block: int, taken: dict[Node, int], take: bool = False
    ) -> int:
        """Return the idle blocks among a cached block and those before it.

        A request that uses a prefix holds all of it, so the idle ones are the last
        ones: O(nodes that hold them, log of their blocks).

        Args:
            block: where the path ends.
            taken: what is to count as held: the depth up to which, for each edge.
            take: add the path to ``taken``.
        """
        node = self._node_of(block)
        if node is None:
            return 0
        ranks, idle, end = self._rank, 0, self._depth[block] + 1
        while node.parent is not None:
            run, start = node.blocks, node.start
            known = taken.get(node, 0)
            low, high = max(known - start, 0), end - start
            if low >= high:
                break
            if take:
                taken[node] = end
            while low < high:
                middle = (low + high) // 2
                if run[middle] == HOLE or ranks[run[middle]] != HELD:
                    high = middle
                else:
                    low = middle + 1
            idle += end - start - low
            if low:
                break
            end, node = start, node.parent
        return idle
