"""What a kind of layers needs, to go on after some tokens: a run of its blocks.

Block ``i`` of a component holds the tokens from ``i * block_size`` on. To go on after
``n`` tokens a component needs its blocks from ``first_block(n)`` to the one that holds
the last of them, and nothing before::

    tokens        0                             n
    Dense         [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ][ 5 ]|
    Window                      [ 3 ][ 4 ][ 5 ]|      the last ``width - 1`` tokens
    Chunk                            [ 4 ][ 5 ]|      from where its chunk begins
    State                                 [ 5 ]|      one block: the state after n
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Component(ABC):
    """The layers of one cache group.

    Attributes:
        block_size: tokens in a block.
        grain: it can go on after multiples of so many tokens only.
        positional: whether a block holds tokens side by side, so that the first
            ones stay what they are while others are added. A state is overwritten.
    """

    block_size: int
    grain: int = 1
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "behind" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")

    @abstractmethod
    def first_block(self, num_tokens: int) -> int:
        """Return the first block that is needed after ``num_tokens``."""

    def first_kept(self, num_tokens: int) -> int:
        """Return the first block that a point after ``num_tokens`` keeps, if it can."""
        return self.first_block(num_tokens)

    @property
    def reach(self) -> int:
        """How many tokens before a place are needed there; 0 for all, or a state."""
        return 0

    def end_block(self, num_tokens: int) -> int:
        """Return the block after the last one that is needed."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True)
class Dense(Component):
    """Full attention: reads all tokens."""

    def first_block(self, num_tokens: int) -> int:
        """Return 0: all blocks are needed."""
        return 0


@dataclass(frozen=True)
class Window(Component):
    """Sliding-window attention: a token reads itself and ``width - 1`` before it.

    Attributes:
        width: of the window.
        behind: points keep what is needed so many tokens before them, too.
    """

    width: int = 1
    behind: int = 0

    def first_block(self, num_tokens: int) -> int:
        """Return the block of the first token that the next one reads."""
        return max(0, num_tokens - self.width + 1) // self.block_size

    def first_kept(self, num_tokens: int) -> int:
        """Return the first block that is needed ``behind`` tokens before, too."""
        return self.first_block(num_tokens - self.behind)

    @property
    def reach(self) -> int:
        """The window, to the beginning of a block."""
        return self.width + self.behind + self.block_size


@dataclass(frozen=True)
class Chunk(Component):
    """Chunked local attention: a token reads back to where its chunk begins."""

    chunk: int = 1

    def first_block(self, num_tokens: int) -> int:
        """Return the block in which the next token's chunk begins."""
        return num_tokens // self.chunk * self.chunk // self.block_size

    @property
    def reach(self) -> int:
        """The chunk, to the beginning of a block."""
        return self.chunk + self.block_size


@dataclass(frozen=True)
class State(Component):
    """Mamba and gated delta nets: one state, overwritten as tokens come."""

    positional: ClassVar[bool] = False

    def first_block(self, num_tokens: int) -> int:
        """Return the block that holds the state after ``num_tokens``."""
        return self.end_block(num_tokens) - 1
