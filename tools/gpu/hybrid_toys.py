"""Hybrid toys for a device: their folders and weights, and what they are asked.

The toys are those of ``tests/support/toy_configs.py`` that the stand-ins can compute:
without experts, and a Llama for those with windows.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import Json

from support.prompts import RequestMix
from support.toy_configs import COMMON, HYBRID_TOYS

WINDOWS = (
    "LlamaConfig",
    "LlamaForCausalLM",
    {
        "num_hidden_layers": 6,
        "head_dim": 32,
        "sliding_window": 128,
        "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    },
)
TOYS: dict[str, Any] = {**HYBRID_TOYS, "windows": WINDOWS}
WITHOUT_EXPERTS: dict[str, Json] = {
    "granite4": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "qwen3_next": {"mlp_only_layers": [0, 1, 2, 3]},
}
ORIGINAL, CHANGED, CHECKPOINT, AFTER_IT = "original", "changed", "checkpoint", "after"
"""Names of requests that the stage looks at."""


def toy_folder(folder: Path, name: str, **changes: Any) -> str:
    """Write a toy's configuration; return the folder's name.

    Args:
        folder: to write.
        name: of ``TOYS``.
        changes: of its configuration.
    """
    import transformers

    kind, architecture, sizes = TOYS[name]
    fields = {**COMMON, **sizes, **WITHOUT_EXPERTS.get(name, {}), **changes}
    config = getattr(transformers, kind)(**fields)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def fill_weights() -> None:
    """Let dummy weights be such that every layer has a say; for ``before``."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from support.toy_models import fill

    def load(loader: Any, model: Any, config: Any) -> None:
        fill(model)

    setattr(DummyModelLoader, "load_weights", load)  # noqa: B010


@contextlib.contextmanager
def counted_checkpoints(arm: Any) -> Iterator[None]:
    """Count the states that a kernel is to hand out from inside a step; ``within``."""
    groups = arm.scheduler.kv_cache_manager.coordinator.single_type_managers
    schedule = arm.scheduler.schedule
    seen: set[tuple[str, int]] = set()
    arm.counts["checkpoints"] = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for group in groups:
            asked = getattr(group, "_checkpoints", {})
            seen.update((name, place) for name, (place, _) in asked.items())
        arm.counts["checkpoints"] = len(seen)
        return output

    arm.scheduler.schedule = counted
    try:
        yield
    finally:
        arm.scheduler.schedule = schedule


class ToyMix(RequestMix):
    """Requests that share prefixes which end inside blocks, at once and in turns.

    Args:
        block: tokens in a block of states; of windows some hundred.
        continued: whether turns of a conversation have the answers in their prompts.
        answer: tokens of most answers.
    """

    def __init__(self, block: int, continued: bool = True, answer: int = 12) -> None:
        super().__init__(3, vocabulary=(10, 900))
        self._answer = answer
        stem = self.words(block + block // 6 + 1)
        first = stem + self.words(40)
        self.ask(ORIGINAL, first)
        for number in range(3):
            self.ask(f"sibling {number}", stem + self.words(40))
        # As the first, but for one early part.
        self.ask(CHANGED, first[:32] + self.words(32) + first[64:])
        # It grows over the end of a block.
        self.ask("grows", self.words(block - 10), max_tokens=max(24, answer))
        # When there is room again; all of the prompt in one step.
        long = self.words(2 * block + 100)
        self.ask(CHECKPOINT, long, after="grows", fresh=True)
        part = long[: 2 * block + 20]
        self.ask(AFTER_IT, part + self.words(30), after=CHECKPOINT, fresh=True)
        said = self.words(block - 50)
        self.ask("turn 0", said, after=AFTER_IT, fresh=True)
        for number in (1, 2):
            words = self.words(30)
            said = words if continued else said + words
            before = f"turn {number - 1}"
            self.ask(f"turn {number}", said, after=before, fresh=not continued)

    def ask(self, name: str, tokens: list[int], **fields: Any) -> None:
        """Add a request by a name."""
        fields = {"max_tokens": self._answer, "after": None, **fields}
        self.requests.append({"id": name, "tokens": tokens, **fields})


def distance(one: Json, other: Json) -> float:
    """Return how far apart log-probabilities of two arms' answers are at most.

    Args:
        one: answers by name.
        other: of another arm; each is compared as far as the tokens are the same.
    """
    worst = 0.0
    for name in one.keys() & other.keys():
        pairs = zip(one[name]["outputs"], other[name]["outputs"], strict=True)
        for a, b in pairs:
            for i, (p, q) in enumerate(zip(a["top"], b["top"], strict=False)):
                if a["tokens"][i] != b["tokens"][i]:
                    break
                worst = max(worst, abs(p[0] - q[0]))
    return worst


def effect_of_a_block(answers: Json) -> float:
    """Return how far a changed early block moves log-probabilities at most."""
    changed, original = (
        [step[0] for step in answers[name]["outputs"][0]["top"]]
        for name in (CHANGED, ORIGINAL)
    )
    return max(abs(a - b) for a, b in zip(changed, original, strict=True))
