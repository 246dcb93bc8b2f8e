"""The packages that only the commands need: the extra ``bench``."""

from importlib.metadata import PackageNotFoundError, requires

EXTRA = "bench"


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return a sentence on how to get a missing package, or None if it is no extra.

    The names stand in the project's own metadata and nowhere else; those of modules
    are the same.
    """
    from packaging.requirements import Requirement

    module = str(error.name).partition(".")[0]
    try:
        lines = requires("vllm-radix") or []
    except PackageNotFoundError:
        return None
    for wanted in map(Requirement, lines):
        marker = wanted.marker
        # One that is required anyway has no marker, and is no extra.
        of_extra = marker is not None and marker.evaluate({"extra": EXTRA})
        if of_extra and wanted.name == module:
            return (
                f"the package {module} is missing: "
                f'pip install "vllm-radix[{EXTRA}]" installs all that commands need'
            )
    return None
