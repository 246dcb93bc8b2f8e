"""Follows the hints of requests where a tree keeps resume points."""

from collections.abc import Sequence
from typing import Any

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.engine.hint_notes import HintNotes
from vllm_radix.tree.resume import ResumeTree


class PointHintNotes(HintNotes):
    """Follows hints of models with several cache groups.

    What a session has used alone are resume points at the end of its path, with all
    that only they need; what is kept is a point, with all that a request needs there.
    Its arguments are ``HintNotes``'.
    """

    def __init__(self, tree: ResumeTree, *args: Any) -> None:
        super().__init__(tree, *args)
        self._tree = tree

    def admit(
        self,
        request: Request,
        tables: Sequence[Sequence[KVCacheBlock]],
        num_hits: int,
    ) -> None:
        """Note a request that is admitted: O(its tokens), compared.

        Args:
            request: it holds what was found.
            tables: its blocks, of each group.
            num_hits: tokens that were found.
        """
        if request.num_preemptions:
            return
        tree, length = self._tree, request.num_tokens
        key, namespace = self._keys.key(request, length), self._keys.namespace(request)
        tree.note_parting(key, namespace, length)
        if num_hits and self._are_shared(tables, num_hits):
            tree.note_shared(key, namespace, num_hits)
        if len(self.wishes):
            self.wishes.note_use(tree.points_on(key, namespace, num_hits))
        hints = self.hints_of(request)
        if hints is not None and hints.replaces:
            # The branch of an earlier response goes, as far as only it has used it.
            for point_id in self.ended(request, hints.replaces):
                tree.let_go(point_id)

    def _are_shared(
        self, tables: Sequence[Sequence[KVCacheBlock]], num_tokens: int
    ) -> bool:
        """Return whether another request holds blocks of the first tokens as well."""
        for component, blocks in zip(self._tree.components, tables, strict=True):
            first = component.first_block(num_tokens)
            end = component.end_block(num_tokens)
            # The last one may be a copy by now; of those before all are held, or none.
            if any(b.ref_cnt > 1 and not b.is_null for b in blocks[first:end][-2:]):
                return True
        return False

    def leave(self, request: Request) -> None:
        """Follow the hints of a request that has ended: O(its tokens), compared.

        Args:
            request: its points are added; preempted ones are left alone.
        """
        if not request.is_finished() or request.resumable:
            return
        tree = self._tree
        length = min(request.num_computed_tokens, request.num_tokens)
        key, namespace = self._keys.key(request, length), self._keys.namespace(request)
        point = tree.last_point(key, namespace, length)
        if point is None:
            return
        public = min(self._keys.num_public(request), length)
        if public:
            # One client's hint does not let go of what all share.
            tree.note_shared(key, namespace, public)
        self.remember(request, point.id)
        hints = self.hints_of(request)
        if hints is None:
            return
        level = self.level_to_go(hints)
        if level is None:
            self.wish(request, hints, lambda: tree.blocks_of(point.id), point.id)
        else:
            tree.let_go(point.id, level)
