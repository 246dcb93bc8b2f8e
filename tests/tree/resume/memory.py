"""Physical memory, and requests that compute in it: what a tree must be right about.

A block of a positional group holds, for each offset, the chain of all that this token
depends on; a block of a state the chain after so many tokens, overwritten in place.
"""

from vllm_radix.tree import HOLE
from vllm_radix.tree.resume import Chunk, Dense, State, Window

STATE = "state"


def chain(namespace, tokens, end):
    """Return what KV or a state after ``end`` tokens depends on."""
    return namespace, tuple(tokens[:end])


def first_read(component, num_tokens):
    """Return the first position that the token after ``num_tokens`` reads."""
    match component:
        case Dense():
            return 0
        case Window(width=width):
            return max(0, num_tokens - width + 1)
        case Chunk(chunk=size):
            return num_tokens // size * size
    raise TypeError(component)


class Request:
    """A request that computes its tokens.

    Attributes:
        done: tokens computed, or found.
        tables: block ids of each group; ``HOLE`` for what was let go.
        planned: tokens that a step is to end with, and the points that it writes.
    """

    def __init__(self, tokens, namespace, groups):
        self.tokens, self.namespace = list(tokens), namespace
        self.tables = [[] for _ in range(groups)]
        self.done = 0
        self.planned = None

    def block_at(self, group, index):
        table = self.tables[group]
        return table[index] if index < len(table) else HOLE


class Memory:
    """What each block holds: its group and, by place, chains."""

    def __init__(self, components):
        self.components = components
        self.blocks = {}

    def copy(self, source, target):
        group, held = self.blocks[source]
        self.blocks[target] = group, dict(held)

    def write(self, request, end):
        """Compute a request's tokens up to ``end``, after reading what it needs."""
        for group, component in enumerate(self.components):
            table, size = request.tables[group], component.block_size
            start = request.done
            self.expect(request, group, start, lambda i, t=table: t[i])
            if isinstance(component, State):
                places = [((end - 1) // size, STATE, end)]
            else:
                places = [(p // size, p % size, p + 1) for p in range(start, end)]
            for index, place, after in places:
                held = self.blocks.get(table[index])
                if held is None or held[0] != group:
                    held = self.blocks[table[index]] = group, {}
                held[1][place] = chain(request.namespace, request.tokens, after)

    def expect(self, request, group, num_tokens, block_of):
        """Verify that blocks hold what a request needs to go on after some tokens."""
        component = self.components[group]
        size, space, tokens = component.block_size, request.namespace, request.tokens
        if not num_tokens:
            return
        if isinstance(component, State):
            needed = [((num_tokens - 1) // size, STATE, num_tokens)]
        else:
            first = first_read(component, num_tokens)
            needed = [(p // size, p % size, p + 1) for p in range(first, num_tokens)]
        for index, place, after in needed:
            block = block_of(index)
            holder, held = self.blocks.get(block, (None, {}))
            assert holder == group, f"block {block} holds group {holder}'s, not {group}"
            assert held.get(place) == chain(space, tokens, after), (
                f"block {block} holds something else at {place} of block {index}"
            )

    def expect_found(self, request, found):
        """Verify an answer of ``find`` or ``resume`` for a request's tokens."""
        assert [run.group for run in found.runs] == [*range(len(self.components))]
        for run, component in zip(found.runs, self.components, strict=True):
            assert run.first == component.first_block(found.num_tokens)
            end = component.end_block(found.num_tokens)
            assert run.first + len(run.blocks) == end
            self.expect(
                request,
                run.group,
                found.num_tokens,
                lambda index, run=run: run.blocks[index - run.first],
            )
