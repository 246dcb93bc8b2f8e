"""What is installed, and whether it goes together."""

import json
import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.resources import files

from vllm_radix.config import ENV_PREFIX, RadixConfig, from_environment
from vllm_radix_bench.doctor.finding import Finding, note, ok, problem, refusal

_PLUGIN_GROUP, _PLUGIN = "vllm.general_plugins", "radix"
_MATTERS = {
    "VLLM_BATCH_INVARIANT": "grouped attention is not served with it",
}
"""Variables of vLLM's that matter to radix, and why."""


def versions() -> Iterator[Finding]:
    """Yield what is installed, and whether it is supported."""
    yield ok("Python", f"{platform.python_version()}, {platform.platform()}")
    yield ok("vllm-radix", _version("vllm-radix") or "a source tree")
    installed = _version("vllm")
    if installed is None:
        yield problem("vLLM", "is not installed", "pip install vllm")
        return
    why = None
    try:
        from vllm_radix.engine.support import version_problem

        why = version_problem()
        import vllm_radix.engine.scheduler  # noqa: F401
    # Of a vLLM that nobody has tried, anything may be missing.
    except Exception as error:
        yield problem(
            "vLLM",
            f"{installed} lacks what radix is built on ({_first_line(error)})",
            "install the vLLM that this version of vllm-radix asks for",
        )
        return
    yield ok("vLLM", installed) if why is None else refusal("vLLM", why)


def devices() -> Iterator[Finding]:
    """Yield torch, Triton, the device, and what kernels there are for it."""
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    yield ok("torch", torch.__version__)
    triton = _version("triton")
    if triton is None:
        yield note("Triton", "is not installed: it is for grouped attention on a GPU")
    elif HAS_TRITON:
        yield ok("Triton", triton)
    else:
        yield note("Triton", f"{triton}, which has no backend for this device")
    if not current_platform.device_type:
        yield problem(
            "device", "vLLM finds none that it was built for", "see vLLM's installation"
        )
        return
    name = current_platform.get_device_name()
    yield ok("device", f"{current_platform.device_type}: {name}")
    yield _kernels(HAS_TRITON)


def _kernels(has_triton: bool) -> Finding:
    """Return whether grouped attention has kernels here."""
    import torch

    subject = "kernels"
    try:
        import vllm_radix_kernels.ops  # noqa: F401
    except Exception as error:
        return note(
            subject, f"grouped attention cannot be loaded ({_first_line(error)})"
        )
    if not torch.cuda.is_available():
        return ok(subject, "none are needed on this device")
    if not has_triton:
        return note(subject, "grouped attention needs Triton", "pip install triton")
    major, minor = torch.cuda.get_device_capability()
    compiled = json.loads(files("vllm_radix_kernels").joinpath("aot.json").read_text())
    known = f"sm_{major}{minor}"
    if known in compiled:
        return ok(subject, f"compiled and counted for {known}; made at first use")
    return note(subject, f"never compiled for {known}; made at first use")


def plugin() -> Iterator[Finding]:
    """Yield whether vLLM will load the plugin."""
    subject = "plugin"
    found = entry_points(group=_PLUGIN_GROUP, name=_PLUGIN)
    if not found:
        yield problem(
            subject, "vLLM knows of none called radix", "install vllm-radix with pip"
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or _PLUGIN in allowed.split(","):
        yield ok(subject, "vLLM loads it")
        return
    yield problem(
        subject,
        f"VLLM_PLUGINS is {allowed!r}, which leaves radix out",
        f"VLLM_PLUGINS={','.join(filter(None, (allowed, _PLUGIN)))}, or unset it",
    )


def patches() -> Iterator[Finding]:
    """Yield whether each change to vLLM fits, and does what it is for."""
    from vllm_radix.plugin import patches as all_patches
    from vllm_radix.plugin import register
    from vllm_radix_patches.patch import PatchError

    fitting = []
    for patch in all_patches():
        subject = f"patch {patch.name}"
        try:
            patch.check()
        except PatchError as error:
            if patch.required:
                yield refusal(subject, str(error).partition(": ")[2])
            else:
                yield note(subject, f"is left out, which costs time only ({error})")
        else:
            fitting.append((subject, patch))
    register()
    for subject, patch in fitting:
        if not patch.is_applied:
            yield problem(subject, "is not applied, for another does not fit")
        elif patch.probe():
            yield ok(subject, f"is in force on {patch.target.partition(':')[2]}")
        else:
            yield problem(
                subject, "is applied, and has no effect", "report it, with this table"
            )


def environment() -> Iterator[Finding]:
    """Yield the variables that matter, and what is wrong with them."""
    subject = "environment"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            given = from_environment()
            RadixConfig(**given)
        except ValueError as error:
            yield refusal(subject, str(error))
            return
    for one in warned:
        yield note(subject, str(one.message))
    names = [f"{ENV_PREFIX}{name.upper()}={value}" for name, value in given.items()]
    for name, why in _MATTERS.items():
        if os.environ.get(name):
            yield note(subject, f"{name}={os.environ[name]}: {why}")
    yield ok(subject, ", ".join(names) or f"no {ENV_PREFIX} variable is set")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
