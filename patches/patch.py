"""What a patch to vLLM is, and how it is applied.

A patch says what is changed and why, which upstream issue would make it unnecessary
and when it can go. A target that is gone, or whose fingerprint is unknown, is
refused.
"""

import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_logger = logging.getLogger("vllm.radix")

_MARK = "__vllm_radix_patch__"


class PatchError(RuntimeError):
    """A patch does not fit the installed vLLM."""


def source_fingerprint(target: Any) -> str:
    """Return a hash of a function's source."""
    return _digest(inspect.getsource(_function(target)))


def signature_fingerprint(target: Any) -> str:
    """Return a hash of a function's parameters, by name and kind.

    For wrappers that pass everything through: they depend on nothing else, and
    the body of a function that lists options changes with every release.
    """
    parameters = inspect.signature(_function(target)).parameters.values()
    return _digest(", ".join(f"{p.kind.name} {p.name}" for p in parameters))


def _function(target: Any) -> Any:
    return getattr(target, "__func__", target)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Patch:
    """A change to one attribute of vLLM.

    Attributes:
        name: what it is called in messages.
        target: ``module:Class.attribute``.
        why: what no subclass can do here.
        upstream: the issue or pull request that would make it unnecessary.
        remove_when: the condition under which it can be deleted.
        fingerprint: of the target this was written for.
        fingerprint_of: how that is taken.
        wrap: makes the replacement from the original, as found in the class's
            ``__dict__`` (a ``staticmethod`` or ``classmethod`` object as such).
        probe: returns whether vLLM does what the patch is for: False without the
            patch, True with it.
        required: whether no patch may be applied if this one does not fit. Another one
            is left out instead, with a line in the log.
        without: what the line says of doing without it.
    """

    name: str
    target: str
    why: str
    upstream: str
    remove_when: str
    fingerprint: str
    fingerprint_of: Callable[[Any], str]
    wrap: Callable[[Any], Any]
    probe: Callable[[], bool]
    required: bool = True
    without: str = "which costs time only"

    def _resolve(self) -> tuple[type, str, Any]:
        module, _, path = self.target.partition(":")
        owner_name, _, attribute = path.partition(".")
        try:
            owner = getattr(importlib.import_module(module), owner_name)
            found = owner.__dict__[attribute]
        except (ImportError, AttributeError, KeyError) as error:
            raise PatchError(
                f"patch {self.name!r}: {self.target} is gone ({error!r}); this "
                "version of vLLM needs another version of vllm-radix"
            ) from error
        return owner, attribute, found

    @property
    def is_applied(self) -> bool:
        """Whether the patch is in force."""
        return getattr(_function(self._resolve()[2]), _MARK, None) == self.name

    def check(self) -> None:
        """Verify that the patch fits, or is in force already.

        Raises:
            PatchError: the target is gone or is not the one this was made for.
        """
        original = self._resolve()[2]
        if self.is_applied:
            return
        found = self.fingerprint_of(original)
        if found != self.fingerprint:
            raise PatchError(
                f"patch {self.name!r}: {self.target} has changed (fingerprint {found}, "
                f"known is {self.fingerprint}); this version of vLLM needs another "
                "version of vllm-radix"
            )

    def apply(self) -> None:
        """Put the patch in force; a second call changes nothing.

        Raises:
            PatchError: as for ``check``.
        """
        self.check()
        if self.is_applied:
            return
        owner, attribute, original = self._resolve()
        replacement = self.wrap(original)
        function = _function(replacement)
        setattr(function, _MARK, self.name)
        function.__wrapped__ = original
        setattr(owner, attribute, replacement)

    def revert(self) -> None:
        """Put the original back; for tests."""
        owner, attribute, found = self._resolve()
        if self.is_applied:
            setattr(owner, attribute, _function(found).__wrapped__)


def apply_all(patches: Iterable[Patch]) -> None:
    """Put all patches in force, or none of them.

    A patch that is not ``required`` is left out if it does not fit.

    Raises:
        PatchError: a required one does not fit.
    """
    fitting = []
    for patch in patches:
        try:
            patch.check()
        except PatchError as error:
            if patch.required:
                raise
            _logger.warning("Left out, %s: %s", patch.without, error)
        else:
            fitting.append(patch)
    for patch in fitting:
        patch.apply()
