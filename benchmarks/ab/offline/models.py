"""The models of the A/B: a folder, or a name that vLLM finds on a hub."""

from pathlib import Path

from vllm_radix_bench.report.cli_types import InputError

_EMBEDDED = Path(".models")


def is_folder(model: str) -> bool:
    """Whether a model is a folder on this machine."""
    return (Path(model) / "config.json").is_file()


def embedded(name: str) -> str | None:
    """Return the folder of a model that a clone has; None if it is not there."""
    folder = str(_EMBEDDED / name)
    return folder if is_folder(folder) else None


def counts_model(given: str | None) -> str:
    """Return the model for the counts.

    Raises:
        InputError: it is not there, or none is given and this is no clone that has one.
    """
    if given is not None:
        return find(given, "--model")
    found = embedded("tiny")
    if found is None:
        clone = Path("tools/setup_env.py").is_file()
        made = "; `make setup` makes a small one for this clone" if clone else ""
        raise InputError(
            "--model: name a model: a folder with config.json and tokenizer, or a name "
            f"on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M{made}"
        )
    return found


def find(model: str, option: str) -> str:
    """Return a model's folder or hub name once it is known to be there.

    Raises:
        InputError: it is not, or it cannot be reached.
    """
    path = Path(model)
    if is_folder(model):
        return model
    if path.exists():
        raise InputError(f"{option}: {model!r} is not a model folder (no config.json)")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"{option}: {model!r}: no such folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it tells of each attempt
    try:
        hf_hub_download(model, "config.json")
    except (OSError, ValueError) as error:
        why = "the Hugging Face hub has no such model with a config.json"
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            why = "it is not in the cache of the Hugging Face hub, which is not reached"
        elif isinstance(error, GatedRepoError):
            why = "on the Hugging Face hub it is gated: log in there first"
        raise InputError(f"{option}: {model!r} is no folder here, and {why}") from error
    return model
