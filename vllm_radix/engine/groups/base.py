"""What radix knows of a type of KV cache group.

A group type turns vLLM's manager of a group into a component of the tree. The registry
is ``GROUP_TYPES`` in ``engine/groups/__init__.py``.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vllm_radix.engine.compat import SingleTypeKVCacheManager
from vllm_radix.tree.resume import Component


class GroupType(ABC):
    """A type of cache group.

    Attributes:
        manager: vLLM's manager of such groups; none that derives from it.
    """

    manager: ClassVar[type[SingleTypeKVCacheManager]]

    @classmethod
    @abstractmethod
    def component(cls, manager: Any) -> Component:
        """Return what its layers need to go on.

        Args:
            manager: vLLM's, of one group.
        """

    @classmethod
    def problem(cls, spec: Any) -> str | None:
        """Return why groups of a spec cannot be served, or None.

        Args:
            spec: vLLM's, of one group.
        """
        return None
