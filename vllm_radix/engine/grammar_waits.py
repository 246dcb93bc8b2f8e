"""The waiting requests whose grammar is being compiled."""

from vllm_radix.engine.compat import Request, RequestStatus

_BLOCKED = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


class GrammarWaits:
    """Requests that no step can admit before their grammar is compiled."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Add a request that came, if it waits for its grammar."""
        if request.status is _BLOCKED:
            self._requests[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is known."""
        self._requests.pop(request_id, None)

    def ids(self) -> set[str]:
        """Return the requests that still wait for it: O(those that did)."""
        if not self._requests:
            return set()
        for request_id in [i for i, r in self._requests.items() if _has_grammar(r)]:
            del self._requests[request_id]
        return set(self._requests)


def _has_grammar(request: Request) -> bool:
    """Return whether a request waits for its grammar no more."""
    if request.status is not _BLOCKED:
        return True
    structured = request.structured_output_request
    return structured is not None and structured.grammar is not None
