"""Traces of a server's own traffic: how they are made and kept.

What a line holds, and how it is read again, is in the trace format ``recorded``.
"""

from vllm_radix.record.trace_file import TRACE_MARK, TRACE_VERSION, path_problem
from vllm_radix.record.trace_writer import EndedRequest, TraceWriter

__all__ = [
    "TRACE_MARK",
    "TRACE_VERSION",
    "EndedRequest",
    "TraceWriter",
    "path_problem",
]
