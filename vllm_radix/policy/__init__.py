"""Scheduling decisions: who waits, who goes next, who waits for whom.

Functions and small classes of integers and seconds, without vLLM: the tree of
waiting requests (``backlog``), their groups (``groups``), orders (``orders``), the
bounds on them (``plan``, ``pace``) and fairness between tenants (``fairness``).
"""

from vllm_radix.policy.backlog import Backlog, View, Waiting, view_of
from vllm_radix.policy.fairness import Deficits
from vllm_radix.policy.groups import unique_uncached
from vllm_radix.policy.orders import ORDERS, FirstCome, Order
from vllm_radix.policy.pace import STEP, Pace, Turns
from vllm_radix.policy.plan import Bounds, Pick, Planner, Room

__all__ = [
    "ORDERS",
    "STEP",
    "Backlog",
    "Bounds",
    "Deficits",
    "FirstCome",
    "Order",
    "Pace",
    "Pick",
    "Planner",
    "Room",
    "Turns",
    "View",
    "Waiting",
    "unique_uncached",
    "view_of",
]
