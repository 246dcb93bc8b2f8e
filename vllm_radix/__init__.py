"""Radix-tree KV cache and prefix-aware scheduling for vLLM.

Importing this package imports neither vLLM nor torch; names load on first use.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_radix.engine.scheduler import RadixScheduler
    from vllm_radix.plugin import enable
    from vllm_radix.tree import RadixTree

try:
    __version__ = version("vllm-radix")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

__all__ = ["RadixScheduler", "RadixTree", "__version__", "enable"]

_HOMES = {
    "RadixScheduler": "vllm_radix.engine.scheduler",
    "RadixTree": "vllm_radix.tree",
    "enable": "vllm_radix.plugin",
}


def vllm_version() -> str:
    """Return the version of the installed vLLM."""
    return version("vllm")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
