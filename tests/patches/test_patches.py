"""Each patch: its target, its fingerprint, and that it is still needed."""

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vllm_radix.plugin import patches
from vllm_radix_patches.patch import (
    Patch,
    PatchError,
    apply_all,
    source_fingerprint,
)

NAMES = [patch.name for patch in patches()]


@pytest.fixture
def patch(request):
    """A patch by name; vLLM is left as it was found, all others off."""
    # vLLM loads plugins once, at the latest when a probe makes a configuration.
    load_general_plugins()
    applied = [p for p in patches() if p.is_applied]
    for p in applied:
        p.revert()
    (chosen,) = (p for p in patches() if p.name == request.param)
    yield chosen
    chosen.revert()
    for p in applied:
        p.apply()


def by_name(test):
    return pytest.mark.parametrize("patch", NAMES, indirect=True)(test)


def test_there_are_at_most_five():
    assert len(NAMES) <= 5


@by_name
def test_target_and_fingerprint_are_those_of_the_installed_vllm(patch):
    *_, found = patch._resolve()
    assert patch.fingerprint_of(found) == patch.fingerprint


@by_name
def test_it_is_still_needed(patch):
    needed = not patch.probe()
    assert needed, f"vLLM does it by itself now: delete the patch {patch.name!r}"


@by_name
def test_it_works_once_however_often_applied_and_can_be_taken_back(patch):
    *_, before = patch._resolve()
    patch.apply()
    *_, once = patch._resolve()
    patch.apply()
    *_, twice = patch._resolve()
    assert once is twice is not before
    assert patch.probe()
    patch.revert()
    assert patch._resolve()[2] is before
    patch.revert()


def _made(**changes):
    fields = {
        "name": "x",
        "target": "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "why": "test",
        "upstream": "none",
        "remove_when": "never",
        "fingerprint": "0",
        "fingerprint_of": source_fingerprint,
        "wrap": lambda original: original,
        "probe": lambda: False,
    }
    return Patch(**{**fields, **changes})


@pytest.mark.parametrize(
    "target",
    [
        "vllm.engine.arg_utils:EngineArgs.no_such_method",
        "vllm.engine.arg_utils:NoSuchClass.x",
        "vllm.no_such_module:A.b",
    ],
)
def test_a_target_that_is_gone_is_refused(target):
    with pytest.raises(PatchError, match="is gone"):
        _made(target=target).apply()


def test_an_unknown_fingerprint_is_refused_and_nothing_is_changed():
    before = EngineArgs.__dict__["from_cli_args"]
    with pytest.raises(PatchError, match="has changed"):
        _made().apply()
    assert EngineArgs.__dict__["from_cli_args"] is before


@pytest.mark.parametrize("patch", NAMES[:1], indirect=True)
def test_all_patches_or_none(patch):
    """Half of them would take the flag and ignore it."""
    with pytest.raises(PatchError, match="has changed"):
        apply_all([patch, _made()])
    assert not patch.is_applied
