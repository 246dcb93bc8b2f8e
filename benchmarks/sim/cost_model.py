"""A cost model: how long an engine step takes on a GPU.

A roofline of one step. Its seconds are a model's, not a measurement; every
parameter can be set. The defaults are an H100 (SXM, dense bf16) with an 8B Llama:
https://www.nvidia.com/en-us/data-center/h100/ and the model's own config.json.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Seconds of an engine step, from what is in it.

    Attributes:
        flops_per_token: of all matrix products but attention's; 2 a parameter.
        flops_per_pair: of attention, for a query token and a key token: 4 times
            layers times query heads times head size.
        weight_bytes: read once a step.
        kv_bytes_per_token: of a token in the KV cache; read once a step for each
            token of each request's context.
        flops_per_second: reached, not the data sheet's: half of 989e12.
        bytes_per_second: reached: 80 % of 3.35e12.
        seconds_per_step: overhead of a step, whatever is in it.
    """

    flops_per_token: float = 16e9
    flops_per_pair: float = 4 * 32 * 32 * 128
    weight_bytes: float = 16e9
    kv_bytes_per_token: float = 2 * 2 * 32 * 8 * 128
    flops_per_second: float = 495e12
    bytes_per_second: float = 2.7e12
    seconds_per_step: float = 2e-3

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 1.0 if name.endswith("per_second") else 0.0
            if not isinstance(value, (int, float)) or not least <= value < 1e30:
                raise ValueError(
                    f"cost model {name!r}: {value!r} is not a number of at least "
                    f"{least:g}"
                )
        if not self.seconds([(1, 1)]) > 0:
            raise ValueError("cost model: a step takes no time; set one of its costs")

    def seconds(self, requests: Iterable[tuple[int, int]]) -> float:
        """Return how long a step takes: O(requests).

        Args:
            requests: of each request in the step, the tokens computed and the
                tokens of its context after the step.
        """
        tokens = pairs = context = 0.0
        for count, end in requests:
            tokens += count
            pairs += count * (end - (count - 1) / 2)
            context += end
        flops = tokens * self.flops_per_token + pairs * self.flops_per_pair
        read = self.weight_bytes + context * self.kv_bytes_per_token
        busy = max(flops / self.flops_per_second, read / self.bytes_per_second)
        return self.seconds_per_step + busy
