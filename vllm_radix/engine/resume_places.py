"""Where a request of a model with several kinds of layers goes on."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm_radix.engine.compat import Request
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.tree.resume import Resume, ResumePoint, State

_MAX_PLACES = 64
"""Places looked at where a request may go on, before it computes more instead."""

_ROOM = 2
"""Blocks left free beyond what a request needs before some are spent on copies."""


class ResumePlaces:
    """Looks up where requests go on: as late as their blocks allow.

    What a draft model (EAGLE, MTP) keeps of a token depends on the ``lookahead`` tokens
    behind it as well, so a request goes on so many tokens before the place up to which
    it is known to be the same. States leave no choice of the place: their points say
    which tokens they depend on.

    Args:
        pool: with the tree.
        groups: vLLM's managers of the cache groups.
        align: requests go on at multiples of so many tokens.
        whole: or at multiples of so many, where no block is to be copied.
        watermark: blocks that vLLM leaves free.
        min_sub_block_tokens: fewest tokens of a hit inside a block that are worth
            copies of blocks; None for hits that end with blocks only.
        num_draft_tokens: for which slots are allocated as well.
        lookahead: see above.
    """

    def __init__(
        self,
        pool: HybridBlockPool,
        groups: Sequence[Any],
        align: int,
        whole: int,
        watermark: int,
        min_sub_block_tokens: int | None,
        num_draft_tokens: int = 0,
        lookahead: int = 0,
    ) -> None:
        self._pool = pool
        self._groups = groups
        self._components = pool.tree.components
        self._has_states = any(isinstance(c, State) for c in self._components)
        self._align, self._whole = align, whole
        self._least = min_sub_block_tokens or 1
        # A state's guesses have blocks of their own, which are counted as such.
        drafts = (
            -(-num_draft_tokens // c.block_size)
            for c in self._components
            if not isinstance(c, State)
        )
        self._room = _ROOM + watermark + sum(drafts)
        self._lookahead = 0 if self._has_states else lookahead

    def latest(self, request: Request, limit: int) -> Resume | None:
        """Return the latest place that fits, and the blocks to go on there; or None.

        O(its tokens, and blocks at each of up to 64 places).

        Args:
            request: that is to go on.
            limit: most tokens that need not be computed.
        """
        plain = self._pool.keys.is_plain(request)
        found: dict[int, list[ResumePoint]] = {}
        for point, same in islice(self._pool.places(request, limit), _MAX_PLACES):
            # Also where more tokens are the same: the request that left it may have
            # gone on with others.
            tokens = max(0, same - self._lookahead)
            whole = tokens // self._whole * self._whole
            place = tokens // self._align * self._align
            inside = place + self._lookahead < point.num_tokens
            few = place - whole < self._least and inside
            if plain and not few and (place == tokens or not self._has_states):
                found.setdefault(place, []).append(point)
            if whole == tokens or not self._has_states:
                found.setdefault(whole, []).append(point)
        for place in sorted(found, reverse=True):
            # Windows of one may be gone where those of another are kept.
            for point in found[place]:
                resume = self._pool.tree.resume(point, place)
                if place and resume is not None and self._fits(request, resume):
                    return resume
        return None

    def _fits(self, request: Request, found: Resume) -> bool:
        """Return whether a request may go on at a place.

        Where blocks are to be copied, both are in use for a step: a request that fits
        without must not wait for that. While others run, one that does not fit without,
        either, has nothing to lose.
        """
        tokens = found.num_tokens
        copies = sum(tokens % c.block_size > 0 for c in self._components)
        if not copies:
            return True
        tree = self._pool.tree
        idle = sum(tree.is_idle(block) for run in found.runs for block in run.blocks)
        needed, without = copies + idle + self._room, 0
        for component, group in zip(self._components, self._groups, strict=True):
            end = alone = component.end_block(request.num_tokens)
            if isinstance(component, State):
                guesses = group.num_speculative_blocks
                alone = min(end, 2) + guesses
                end = min(end, component.end_block(tokens) + 1) + guesses
            more = end - component.end_block(tokens)
            cap = group.max_admission_blocks_per_request
            needed += more if cap is None else min(more, cap)
            without += alone if cap is None else min(alone, cap)
        free = self._pool.get_num_free_blocks()
        others_run = free < self._pool.num_gpu_blocks - 1
        return needed < free or (others_run and without > free)
