"""The options of vllm-radix: one frozen dataclass, wherever they come from.

``--radix`` on the command line, ``additional_config={"radix": {...}}``,
``vllm_radix.enable`` and the environment (``RADIX_<OPTION>``) all end here. An
option given explicitly wins over the environment, which wins over the default.
"""

import argparse
import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_radix.policy import ORDERS
from vllm_radix.public_prefix import PublicPrefix, read_public_prefix
from vllm_radix.record import path_problem
from vllm_radix.tree import POLICIES

SECTION = "radix"
"""The key of the options in vLLM's ``additional_config``."""

# Not VLLM_RADIX_: vLLM warns of names it does not know, and to register them is to
# put them into every compile-cache key, with or without radix.
ENV_PREFIX = "RADIX_"

# The registries themselves: what is registered later is allowed as well.
_CHOICES: dict[str, Collection[str]] = {
    "policy": ORDERS,
    "eviction": POLICIES,
    "attention": ("stock", "grouped"),
    "on_unsupported": ("error", "stock"),
}
_LEAST = {
    "max_overtakes": 0,
    "fair_quantum": 1,
    "min_sub_block_tokens": 1,
    "record_limit_mb": 1,
}
_RANGES = {
    "max_extra_wait": (0.0, 1e9),
    "patience": (0.0, 1e9),
    "hint_quota": (0.0, 1.0),
}
_SWITCHES = ("hold", "sub_block", "explain", "record_tokens")


@dataclass(frozen=True)
class RadixConfig:
    """Options of the radix block manager and the prefix-aware scheduler.

    Attributes:
        policy: the order of waiting requests. ``prefix``: the oldest first, unless it
            would push out of the cache what others need; then the longest cached
            prefix, within the bounds below. ``fcfs``: vLLM's own order. The other
            orders are there to compare with.
        patience: how long the order may let a request wait, as a multiple of what
            a newcomer would wait, first come, first served. A larger value computes
            fewer tokens and lowers the mean wait, and raises the longest; 0 is first
            come, first served. Used by ``prefix`` only.
        max_overtakes: a hard bound: at most this many later requests are admitted
            before a waiting one. 0 is first come, first served.
        max_extra_wait: a hard bound: the seconds that a request may wait beyond its
            turn, first come, first served.
        hold: let a request wait while another one computes, in chunks, what both
            share.
        tenant: what tells tenants apart, to be fair between them: ``cache_salt``, or
            the name of a field of ``vllm_xargs``. Empty: no fairness between tenants.
        fair_quantum: tokens that a tenant may compute before the others' turn.
        public_prefix: what prompts of all cache salts share, though everything after
            it stays apart: the path of a JSON file of prompts, or the same list as
            ``{"prompts": [...]}``; or, which lets clients see whether others have
            asked the same, ``{"first_tokens": N}`` or
            ``{"marker": "<|im_end|>", "within": N}``. Empty: salts share nothing.
        sub_block: let a hit end inside a block, which is then copied; ``false`` looks
            at block boundaries only, as stock vLLM does.
        min_sub_block_tokens: fewest tokens inside a block that are worth a copy of it.
        eviction: which unused blocks are evicted first.
        hint_quota: what hints of clients may keep longer than others, all tenants
            together: a share of the cache. 0: nothing; other hints are followed still.
        attention: ``stock``: vLLM's kernels. ``grouped``: a prefix that requests of a
            batch share is read once for all of them, where a cost model says that it
            pays; full CUDA graphs are off then.
        explain: log for each request how much of its prompt was cached, why not more,
            and why it was placed where it was in the queue.
        record: a file to write a trace of the traffic to, which ``vllm-radix replay``
            reads. Empty: no trace.
        record_tokens: write token ids into the trace; else it tells only which
            requests share how much.
        record_limit_mb: megabytes from which on a new trace is begun; the one before
            it is kept as ``FILE.1``, older ones are deleted.
        on_unsupported: what to do with a model or setting that radix cannot serve.
            ``error``: refuse to start. ``stock``: serve it with stock vLLM and say so
            in the log.

    Raises:
        ValueError: an option or a value is unknown; the message names the
            option and what is allowed.
    """

    policy: str = "prefix"
    patience: float = 1.0
    max_overtakes: int = 1000
    max_extra_wait: float = 60.0
    hold: bool = True
    tenant: str = ""
    fair_quantum: int = 8192
    public_prefix: Any = ""
    sub_block: bool = True
    min_sub_block_tokens: int = 8
    eviction: str = "lru"
    hint_quota: float = 0.25
    attention: str = "stock"
    explain: bool = False
    record: str = ""
    record_tokens: bool = False
    record_limit_mb: int = 256
    on_unsupported: str = "error"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in tuple(allowed):
                raise ValueError(
                    f"radix option {name!r}: {value!r} is not one of "
                    f"{', '.join(map(repr, allowed))}"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"radix option {name!r}: {value!r} is not a whole number "
                    f"of at least {least}"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise ValueError(
                    f"radix option {name!r}: {value!r} is not a number from {low:g} "
                    f"to {high:g}"
                )
        if not isinstance(self.tenant, str):
            raise ValueError(
                f"radix option 'tenant': {self.tenant!r} is not a name: give "
                "'cache_salt', the name of a field of vllm_xargs, or ''"
            )
        try:
            # Kept, so that what was checked is what is used.
            object.__setattr__(self, "_public", read_public_prefix(self.public_prefix))
        except ValueError as error:
            raise ValueError(f"radix option 'public_prefix': {error}") from error
        if not isinstance(self.record, str):
            raise ValueError(
                f"radix option 'record': {self.record!r} is not a path: give the path "
                "of a file, or ''"
            )
        problem = path_problem(self.record) if self.record else None
        if problem is not None:
            raise ValueError(f"radix option 'record': {problem}")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(
                    f"radix option {name!r}: {value!r} is not one of true, false"
                )

    @property
    def public(self) -> PublicPrefix | None:
        """What ``public_prefix`` says, as it was read; None if nothing is shared."""
        found: PublicPrefix | None = self.__dict__["_public"]
        return found

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def resolve(
        cls,
        options: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> "RadixConfig":
        """Combine explicit options, the environment and the defaults.

        Args:
            options: explicit options.
            environ: environment variables, ``os.environ`` by default.

        Raises:
            ValueError: as for the class.
        """
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise ValueError(
                f"radix options are a mapping of option to value, not {options!r}; "
                f"options: {', '.join(cls.names())}"
            )
        for name in options:
            if name not in cls.names():
                raise ValueError(
                    f"unknown radix option {name!r}; options: {', '.join(cls.names())}"
                )
        return cls(**{**from_environment(environ), **options})

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "RadixConfig":
        """Read the section ``radix`` of vLLM's ``additional_config``."""
        return cls.resolve(section_of(additional_config))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a plain dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={_cut(str(value))}" for name, value in self.to_dict().items()
        )


def _cut(text: str) -> str:
    """Return a text of at most 100 characters, for the log."""
    return text if len(text) <= 100 else text[:99] + "…"


def section_of(additional_config: object) -> Any:
    """Return the section ``radix`` of vLLM's ``additional_config``, or None.

    Raises:
        ValueError: ``additional_config`` is no mapping.
    """
    if not additional_config:
        return None
    if not isinstance(additional_config, Mapping):
        raise ValueError(
            "radix reads its options from additional_config, which is a "
            f"{type(additional_config).__name__} here: pass a dict"
        )
    return additional_config.get(SECTION)


def from_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the options that are set in the environment.

    Args:
        environ: environment variables, ``os.environ`` by default.

    Raises:
        ValueError: a name is almost that of an option. Others that begin like one are
            warned of.
    """
    environ = os.environ if environ is None else environ
    found = {}
    names = RadixConfig.names()
    known = [ENV_PREFIX + name.upper() for name in names]
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            meant = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            unknown = f"unknown environment variable {name}"
            if meant:
                raise ValueError(f"{unknown}: did you mean {meant[0]}?")
            warnings.warn(
                f"{unknown}; those of radix: {', '.join(known)}", stacklevel=2
            )
    for name in names:
        text = environ.get(ENV_PREFIX + name.upper())
        if text is not None:
            found[name] = _parse(text)
    return found


def parse_flag(text: str) -> dict[str, Any]:
    """Return the options in the value of ``--radix``, a JSON object.

    Raises:
        ValueError: not a JSON object, or as for ``RadixConfig``.
    """
    try:
        options = json.loads(text) if text.strip() else {}
    except (json.JSONDecodeError, RecursionError):
        options = text
    if not isinstance(options, dict):
        raise ValueError(
            f"--radix takes nothing or a JSON object such as "
            f'\'{{"policy": "prefix"}}\', not {text!r:.80}; the model goes before it'
        )
    # On a command line words are joined by dashes as well.
    options = {name.replace("-", "_"): value for name, value in options.items()}
    RadixConfig.resolve(options)
    return options


def flag_value(text: str) -> dict[str, Any]:
    """Return ``parse_flag(text)``, as the ``type`` of an argparse option.

    Raises:
        argparse.ArgumentTypeError: where ``parse_flag`` raises ``ValueError``.
    """
    try:
        return parse_flag(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def not_grouped(what: str, fix: str = "") -> str:
    """Return the sentence that refuses grouped attention, and names the fix.

    Args:
        what: what it does not serve.
        fix: what else the user may do, if anything.
    """
    return (
        f"radix option 'attention': grouped attention does not serve {what}: "
        f'{fix + ", " if fix else ""}start with attention="stock", or with '
        'on_unsupported="stock".'
    )


def _parse(text: str) -> Any:
    """Return a value from the environment: JSON where it is, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
