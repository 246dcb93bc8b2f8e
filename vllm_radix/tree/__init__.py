"""The prefix cache as a data structure: tokens in, block ids out.

Imports the standard library and numpy only, so it can be used, tested and replayed
without vLLM.
"""

from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.debug.miss import Miss
from vllm_radix.tree.eviction import LRU, POLICIES, EvictionPolicy
from vllm_radix.tree.eviction_history import EvictionHistory
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import (
    Match,
    Namespace,
    PartialMatch,
    PrefixCache,
    Stats,
)
from vllm_radix.tree.probe import Probe
from vllm_radix.tree.radix_tree import RadixTree
from vllm_radix.tree.reuse import Use
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN, common_units, decode, encode

__all__ = [
    "BYTES_PER_TOKEN",
    "HOLE",
    "LRU",
    "POLICIES",
    "ChangeLog",
    "EvictionHistory",
    "EvictionPolicy",
    "Match",
    "Miss",
    "Namespace",
    "Node",
    "PartialMatch",
    "PrefixCache",
    "Probe",
    "RadixTree",
    "Stats",
    "Use",
    "common_units",
    "decode",
    "encode",
]
