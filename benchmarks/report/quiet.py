"""Keeps vLLM's own log out of a command's output."""

import logging
import os

_LEVEL = "VLLM_LOGGING_LEVEL"
_set_here = False


def quiet_vllm() -> None:
    """Let vLLM log errors only, unless the environment says otherwise."""
    global _set_here
    _set_here = _set_here or _LEVEL not in os.environ
    level = os.environ.setdefault(_LEVEL, "ERROR")
    # It logs before it reads the variable.
    logging.getLogger("vllm").setLevel(level)


def users_environment() -> dict[str, str]:
    """Return the environment as the user set it: for servers, whose logs are kept."""
    environment = dict(os.environ)
    if _set_here:
        environment.pop(_LEVEL, None)
    return environment
