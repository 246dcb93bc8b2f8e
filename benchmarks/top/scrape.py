"""The page that a server shows at ``/metrics``, read once."""

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.ab.web import HttpError, get

_SECONDS = 10.0
"""That a server may take to answer, in all."""


class AddressError(CommandError):
    """What stands at the address is no server of vLLM's."""

    code = ExitCode.INPUT


class NoAnswerError(CommandError):
    """Nothing answers at the address."""

    code = ExitCode.ENGINE


class Page:
    """The samples of a page.

    Args:
        text: of the page, in Prometheus' format.
        at: when it was read, in seconds.

    Raises:
        ValueError: it is not in that format.
    """

    def __init__(self, text: str, at: float = 0.0) -> None:
        self.at = at
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found = self._samples.setdefault(sample.name, [])
                found.append((dict(sample.labels), sample.value))

    @property
    def is_vllms(self) -> bool:
        """Whether a server of vLLM shows it."""
        return any(name.startswith("vllm:") for name in self._samples)

    def sum(self, name: str, **labels: str) -> float | None:
        """Return the sum of a sample over other labels; None where there is none."""
        found = [value for _, value in self._matching(name, labels)]
        return sum(found) if found else None

    def most(self, name: str, **labels: str) -> float | None:
        """Return the largest of a sample's values; None where there is none."""
        return max((value for _, value in self._matching(name, labels)), default=None)

    def values_of(self, label: str, name: str) -> list[str]:
        """Return the values of a label of a sample, in order."""
        found = self._samples.get(name, [])
        return sorted({labels[label] for labels, _ in found if label in labels})

    def labels_of(self, name: str) -> dict[str, str] | None:
        """Return the labels of a sample's first series."""
        found = self._samples.get(name)
        return found[0][0] if found else None

    @property
    def capacity(self) -> int | None:
        """Blocks of all engines' KV caches; None where the server does not tell."""
        infos = self._samples.get("vllm:cache_config_info", [])
        found = [labels.get("num_gpu_blocks", "") for labels, _ in infos]
        known = [int(text) for text in found if text.isdecimal()]
        return sum(known) if known and len(known) == len(found) else None

    def _matching(
        self, name: str, labels: dict[str, str]
    ) -> Iterable[tuple[dict[str, str], float]]:
        for has, value in self._samples.get(name, ()):
            if labels.items() <= has.items():
                yield has, value


def address(text: str) -> str:
    """Return the address of ``/metrics`` of a server, however it was written.

    Raises:
        AddressError: it is none.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        good = good and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or any(letter.isspace() for letter in text):
        raise AddressError(
            f"URL: {text!r} is not the address of a server, such as "
            "http://localhost:8000"
        )
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}/metrics"


def scrape(url: str, at: float, headers: Mapping[str, str] | None = None) -> Page:
    """Return the page at an address.

    Args:
        url: from ``address``.
        at: the time, in seconds.
        headers: that the request carries.

    Raises:
        AddressError: something else answers there.
        NoAnswerError: nothing does.
    """
    try:
        text = get(url, headers, _SECONDS).decode("utf-8", errors="replace")
    except HttpError as error:
        if error.status is None:
            raise NoAnswerError(f"{url} does not answer: {error}") from error
        raise AddressError(
            f"URL: {url} answers with {error}: give the address of a server of vLLM, "
            "such as http://localhost:8000"
        ) from error
    try:
        page = Page(text, at)
    except ValueError as error:
        raise AddressError(f"URL: {url} answers, but shows no metrics") from error
    if not page.is_vllms:
        raise AddressError(
            f"URL: {url} shows no metrics of vLLM's: another server, or one started "
            "with --disable-log-stats"
        )
    return page
