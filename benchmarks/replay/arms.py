"""What `vllm-radix replay` compares: schedulers, by the names of ``--arms``."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix import RadixScheduler
from vllm_radix.config import RadixConfig, parse_flag
from vllm_radix.public_prefix import has_texts
from vllm_radix_bench.report.cli_types import InputError

KNOWN_ARMS = ("stock", "radix", "apc-off")


@dataclass
class Arm:
    """A scheduler to run.

    Attributes:
        name: as it was given.
        cls: class of the scheduler.
        radix: options of radix.
        caching: whether prefix caching is on.
        is_foreign: whether the class is the user's.
    """

    name: str
    cls: Callable[..., Any]
    radix: dict[str, Any] = field(default_factory=dict)
    caching: bool = True
    is_foreign: bool = False

    @property
    def public_prefix(self) -> Any:
        """What salts share in its cache: the option of radix, empty for nothing."""
        return self.radix.get("public_prefix", "")


def radix_arm(name: str, options: Mapping[str, Any]) -> Arm:
    """Return an arm of radix.

    Raises:
        ValueError: an option is wrong, or names texts, for which there is no tokenizer.
    """
    # What the environment says of recording is meant for servers.
    config = RadixConfig.resolve({"record": "", **options})
    if has_texts(config.public):
        raise ValueError(
            "radix option 'public_prefix': a replay reads no texts: write token ids, "
            'or {"first_tokens": N}'
        )
    return Arm(name, RadixScheduler, config.to_dict())


def best_order(public_prefix: Any = "") -> Arm:
    """Return the arm that runs all requests in the best order, known in advance.

    Args:
        public_prefix: what salts share in it.
    """
    radix = {"policy": "fcfs", "public_prefix": public_prefix}
    return Arm("", RadixScheduler, radix)


def parse_arm(text: str) -> Arm:
    """Return an arm: a known one, ``radix:{JSON}``, or ``module.Class``.

    Raises:
        InputError: it is none of these.
    """
    if text == "stock":
        return Arm(text, Scheduler)
    if text == "apc-off":
        return Arm(text, Scheduler, caching=False)
    name, _, options = text.partition(":")
    if name == "radix":
        try:
            return radix_arm(text, parse_flag(options))
        except ValueError as error:
            raise InputError(f"--arms: {text!r}: {error}") from error
    module, _, attribute = text.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    # Of the user's own module, whatever it is; some end the program.
    except (Exception, SystemExit):
        found = None
    if (
        not isinstance(found, type)
        or not issubclass(found, SchedulerInterface)
        or inspect.isabstract(found)
    ):
        raise InputError(
            f"--arms: {text!r} is none of {', '.join(KNOWN_ARMS)}, "
            "radix:{JSON options}, or the qualified name of a scheduler class "
            "that is not abstract"
        )
    return Arm(text, found, is_foreign=True)
