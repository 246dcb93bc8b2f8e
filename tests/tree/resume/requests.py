"""Requests with blocks of their own, for small trees."""

from itertools import count

from vllm_radix.tree import encode
from vllm_radix.tree.resume import ResumeTree


class Small:
    """A tree, and points of requests that share no blocks unless told.

    Attributes:
        tree: of resume points.
    """

    def __init__(self, *components):
        self.tree = ResumeTree(components)
        self._ids = count(1)

    def table(self, tokens):
        """Return new blocks for some tokens, by group."""
        return [
            [next(self._ids) for _ in range(component.end_block(len(tokens)))]
            for component in self.tree.components
        ]

    def add(self, tokens, table=None, place=None, idle=True, namespace=None, **options):
        """Add a point after some tokens; return it, None if there is none."""
        table = self.table(tokens) if table is None else table
        place = len(tokens) if place is None else place
        added = self.tree.add(
            encode(tokens), namespace, place, lambda g, i: table[g][i], **options
        )
        if added is None:
            return None
        if idle:
            self.tree.release(added[1])
        self.tree.check()
        return added[0]

    def find(self, tokens, limit=None, namespace=None):
        """Return where a request goes on: tokens, and the blocks by group."""
        limit = len(tokens) if limit is None else limit
        found = self.tree.find(encode(tokens), namespace, limit)
        if found is None:
            return 0, None
        return found.num_tokens, [list(run.blocks) for run in found.runs]
