"""What admission and the scheduler ask of a cache manager, whatever tree it is over."""

from abc import abstractmethod

from vllm_radix.engine.compat import KVCacheBlock, KVCacheManager, Request
from vllm_radix.engine.follow_ups import FollowUps
from vllm_radix.engine.miss_log import MissLog
from vllm_radix.engine.resume_plans import ResumePlans
from vllm_radix.engine.tree_pool import TreeBlockPool


class TreeKVCacheManager(KVCacheManager):
    """A ``KVCacheManager`` over a tree: what admission and the scheduler know of one.

    Attributes:
        block_pool: of the cache; its tree says how much of a request is cached.
        plans: where running requests leave resume points; None if one can go on
            after any token that is cached.
        miss_log: says why prefixes were missed, if wanted.
    """

    block_pool: TreeBlockPool
    plans: ResumePlans | None
    miss_log: MissLog | None

    # -- what admission asks ---------------------------------------------------

    @abstractmethod
    def note_arrival(self, num_tokens: int) -> None:
        """Note the length of a request that came, for ``units``."""

    @abstractmethod
    def units(self, blocks: int) -> int:
        """Return for how much blocks have room, in what the tree counts prefixes in."""

    @abstractmethod
    def make_follow_ups(self) -> FollowUps:
        """Return what recognizes requests that go on from an answer."""

    # -- what the scheduler asks -----------------------------------------------

    def next_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step is to end that would compute from start to end."""
        return end

    # -- what both do ----------------------------------------------------------

    def new_step_starts(self) -> None:
        """Note that the blocks of the step before are written by now."""
        super().new_step_starts()
        self.block_pool.new_step_starts()
        if self.miss_log is not None:
            self.miss_log.new_step_starts()

    # -- leaving ---------------------------------------------------------------

    def free(self, request: Request) -> None:
        """Free a request's blocks; what it has computed stays cached."""
        self._leave(request)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """Return a request's blocks, to be freed later."""
        self._leave(request)
        return super().pop_blocks_for_free(request)

    def _leave(self, request: Request) -> None:
        """Publish what an ending or preempted request has computed, and no more."""
        if self.miss_log is not None:
            self.miss_log.leave(request)
