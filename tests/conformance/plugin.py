"""The pytest plugin that lets vLLM's own tests run against our classes.

Loaded with ``-p`` into the pytest of one arm. Environment variables tell it what
to do; without them it does nothing.

Each test module takes the classes it tests from the vLLM modules that define
them. So the names are bound to ours there and nowhere else, before any test
module is imported and after all modules of vLLM that derive from them or build
them: within vLLM, and within our own modules, the names stay vLLM's.

Layouts that radix refuses are left to vLLM's classes, and so are pools that a test
builds by itself for several groups: a pool is not told what it is for.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARM = "RADIX_CONFORMANCE_ARM"
REPORT = "RADIX_CONFORMANCE_REPORT"
CACHING = "RADIX_CONFORMANCE_CACHING"

STOCK = "stock"
ARMS = {STOCK: None, "mirrored": True, "hashfree": False}
"""By arm: whether our pool mirrors vLLM's map of hashes; None is without ours."""

_SPLIT = "_mamba_block_aligned_split"

# What of ours the running test has built, and its phases' reports so far.
_built: set[str] = set()
_phases: list[pytest.TestReport] = []


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Bind vLLM's names, before pytest imports anything of the tests."""
    if ARM in os.environ:
        _bind(ARMS[os.environ[ARM]], bool(os.environ.get(CACHING)))


def _bind(mirror: bool | None, caching: bool) -> None:
    """Bind the names of vLLM's classes to what stands in for them.

    Args:
        mirror: whether our pool mirrors vLLM's map; None is without ours.
        caching: turn prefix caching on where that makes a scheduler one that we
            serve. vLLM's helpers leave it off, and a test of a scheduler that we
            do not serve compares vLLM with itself.
    """
    # Imported for their sake: they derive from the classes, or build them, under
    # vLLM's names.
    import vllm.v1.core.kv_cache_coordinator
    import vllm.v1.core.sched.diffusion_scheduler
    import vllm.v1.hisparse.block_pool
    import vllm.v1.simple_kv_offload.manager  # noqa: F401
    from vllm.v1.core import block_pool, kv_cache_manager
    from vllm.v1.core.sched import async_scheduler, scheduler

    from vllm_radix.config import RadixConfig
    from vllm_radix.engine.block_pool import RadixBlockPool
    from vllm_radix.engine.hybrid_manager import HybridKVCacheManager
    from vllm_radix.engine.hybrid_pool import HybridBlockPool
    from vllm_radix.engine.manager import RadixKVCacheManager
    from vllm_radix.engine.scheduler import AsyncRadixScheduler, RadixScheduler
    from vllm_radix.engine.support import (
        config_problem,
        feature_problem,
        is_one_full_group,
        layout_problem,
    )

    signature = inspect.signature(kv_cache_manager.KVCacheManager).bind

    class LoneKVCacheManager(RadixKVCacheManager):
        """A manager without a scheduler, which would tell it of each step.

        A request that leaves in the step that it came in has computed nothing,
        and ours takes back what it has published. Tests of the manager alone
        free requests whose prefix they then look for.
        """

        def free(self, request: Any) -> None:
            self.new_step_starts()
            super().free(request)

    class LoneHybridKVCacheManager(HybridKVCacheManager):
        """The same for several groups.

        Tests of the manager alone give a request slots without a look-up, do not tell
        it how much of it is computed, and look for its blocks in the step that writes
        them.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._adopt(mirror=False, min_sub_block_tokens=None, explain=False)
            self._reached: dict[str, int] = {}

        def get_computed_blocks(self, request: Any, *args: Any) -> Any:
            self.new_step_starts()
            return super().get_computed_blocks(request, *args)

        def allocate_slots(
            self,
            request: Any,
            num_new_tokens: int,
            num_new_computed_tokens: int = 0,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self._plan_of(request) is None:
                plan = self._plan(request, request.num_tokens - 1, 0)
                self._looked_up = request.request_id, None, plan
            blocks = super().allocate_slots(
                request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
            )
            if blocks is not None:
                done = request.num_computed_tokens + num_new_computed_tokens
                self._reached[request.request_id] = done + num_new_tokens
            return blocks

        def free(self, request: Any) -> None:
            told = request.num_computed_tokens
            reached = self._reached.pop(request.request_id, 0)
            request.num_computed_tokens = max(told, reached)
            self.new_step_starts()
            super().free(request)
            request.num_computed_tokens = told

    def choose_pool(*args: Any, **kwargs: Any) -> type | None:
        return RadixBlockPool

    def choose_manager(*args: Any, **kwargs: Any) -> type | None:
        asked = signature(*args, **kwargs)
        asked.apply_defaults()
        asked_for = asked.arguments
        layout = asked_for["kv_cache_config"]
        if not asked_for["enable_caching"] or layout_problem(layout):
            return None
        if is_one_full_group(layout):
            return LoneKVCacheManager
        # As ``feature_problem`` refuses; for EAGLE a group may be marked, too, and
        # its hashes may cover more tokens.
        eagle = any(group.is_eagle_group for group in layout.kv_cache_groups)
        refused = eagle or asked_for["use_eagle"]
        refused |= asked_for.get("num_hash_lookahead_tokens", 0) > 0
        refused |= max(asked_for["dcp_world_size"], asked_for["pcp_world_size"]) > 1
        return None if refused else LoneHybridKVCacheManager

    # Where hits end with blocks EAGLE is refused beside windows, as above.
    blocks_only = RadixConfig(sub_block=False)

    def chooser(ours: type) -> Callable[..., type | None]:
        def choose(
            vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
        ) -> type | None:
            cache_config = vllm_config.cache_config
            asked_for = cache_config.enable_prefix_caching
            cache_config.enable_prefix_caching = asked_for or caching
            refused = (
                config_problem(vllm_config)
                or layout_problem(kv_cache_config)
                or feature_problem(vllm_config, kv_cache_config, blocks_only)
            )
            if refused:
                cache_config.enable_prefix_caching = asked_for
            return None if refused else ours

        return choose

    if mirror is not None:
        RadixBlockPool.mirror_by_default = mirror
        HybridBlockPool.mirror_by_default = mirror
    if mirror:
        # With hashes and hits at block boundaries there is nothing to tell apart.
        os.environ["RADIX_SUB_BLOCK"] = "false"
    for module, name, ours, choose in (
        (block_pool, "BlockPool", RadixBlockPool, choose_pool),
        (kv_cache_manager, "KVCacheManager", LoneKVCacheManager, choose_manager),
        (scheduler, "Scheduler", RadixScheduler, chooser(RadixScheduler)),
        (
            async_scheduler,
            "AsyncScheduler",
            AsyncRadixScheduler,
            chooser(AsyncRadixScheduler),
        ),
    ):
        stock = getattr(module, name)
        base = stock if mirror is None else ours
        setattr(module, name, _substitute(stock, base, choose, mirror is not None))
    _give_back_pools()


def _give_back_pools() -> None:
    """Make a pool vLLM's again once it serves another layout than one full group.

    Tests build pools by themselves, and a pool is not told what it is for; the
    manager of a group of layers, built upon it next, is.
    """
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        SingleTypeKVCacheManager,
    )

    from vllm_radix.engine.block_pool import RadixBlockPool
    from vllm_radix.engine.compat import BlockPool

    initialize = SingleTypeKVCacheManager.__init__

    @functools.wraps(initialize)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        pool = self.block_pool
        if type(pool) is RadixBlockPool and type(self) is not FullAttentionManager:
            pool.__class__ = BlockPool
            _built.discard(RadixBlockPool.__name__)

    SingleTypeKVCacheManager.__init__ = init


def _substitute(
    stock: type, base: type, choose: Callable[..., type | None], replace: bool
) -> type:
    """Return what stands in for a class of vLLM.

    Args:
        stock: vLLM's class.
        base: where methods come from that tests call unbound, or on a bare
            instance from ``object.__new__``.
        choose: returns our class for what is asked for; None where we refuse it.
        replace: whether ours is to serve at all.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Asked in any case: it turns caching on, for stock as well.
        ours = choose(*args, **kwargs)
        if not replace or ours is None:
            return stock(*args, **kwargs)
        _built.add(ours.__name__)
        # No instance of cls, so Python does not initialize it a second time.
        return ours(*args, **kwargs)

    names = {"__new__": new, "__module__": __name__}
    if base is not stock and hasattr(stock, _SPLIT):
        # Called on things that are no scheduler, to which ours cannot be bound.
        names[_SPLIT] = getattr(stock, _SPLIT)
    return type(stock.__name__, (base,), names)


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """``caplog`` for vLLM's logger, which does not propagate.

    The one fixture that the tests take from vLLM's conftest, which itself asks
    for packages that have nothing to do with them.
    """
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


# -- outcomes ------------------------------------------------------------------


def pytest_runtest_logstart() -> None:
    """Begin with a new test."""
    _built.clear()
    _phases.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the report of a phase: set-up, call or tear-down."""
    _phases.append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Write down how a test ended."""
    outcome, message = "passed", ""
    for report in _phases:
        if report.failed:
            outcome = "failed" if report.when == "call" else "error"
            message = _reason(report)
        elif report.skipped:
            outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            message = _reason(report)
    seconds = sum(report.duration for report in _phases)
    _write(nodeid, outcome, message, seconds, sorted(_built))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write down a module that cannot be collected, in place of its tests."""
    if report.failed:
        _write(report.nodeid, "error", _reason(report), 0.0, [])


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the line that says what happened."""
    text = report.longrepr
    if isinstance(text, tuple):
        return str(text[2])
    crash = getattr(text, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    lines = [line for line in str(text).splitlines() if line.startswith("E ")]
    return lines[-1][1:].strip() if lines else str(text)


def _write(
    test: str, outcome: str, message: str, seconds: float, ours: list[str]
) -> None:
    path = os.environ.get(REPORT)
    if path is None:
        return
    line = {
        "test": test,
        "outcome": outcome,
        "message": next(iter(message.splitlines()), ""),
        "seconds": round(seconds, 3),
        "ours": ours,
    }
    # Test by test, so that a crash leaves what was known before it.
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
