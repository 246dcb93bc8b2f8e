"""The prefix cache as a data structure: tokens in, block ids out.

Imports the standard library only, so it can be used, tested and replayed
without vLLM.
"""

from vllm_radix.tree.base import Match, Namespace, Partial, PrefixCache, Stats
from vllm_radix.tree.eviction import LRU, POLICIES, EvictionPolicy
from vllm_radix.tree.explain import Miss
from vllm_radix.tree.history import History
from vllm_radix.tree.keys import BYTES_PER_TOKEN, common_units, decode, encode
from vllm_radix.tree.news import News
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.probe import Probe
from vllm_radix.tree.radix_tree import RadixTree

__all__ = [
    "BYTES_PER_TOKEN",
    "HOLE",
    "LRU",
    "POLICIES",
    "EvictionPolicy",
    "History",
    "Match",
    "Miss",
    "Namespace",
    "News",
    "Node",
    "Partial",
    "PrefixCache",
    "Probe",
    "RadixTree",
    "Stats",
    "common_units",
    "decode",
    "encode",
]
