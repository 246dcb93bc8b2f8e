"""Scheduling decisions: which waiting request goes next, which waits for another.

Functions and small classes of integers and seconds, without vLLM: the tree of
waiting requests (``waiting_tree``, ``arrivals``), orders and what they look at
(``orders``, ``ranking``, ``queue_view``, ``prefix_groups``), the plan and the bounds
on it (``planner``, ``tail_guard``, ``service_rate``, ``fcfs_turns``), and fairness
between tenants (``fairness``).
"""

from vllm_radix.policy.arrivals import ArrivalTable
from vllm_radix.policy.fairness import DeficitCounters
from vllm_radix.policy.fcfs_turns import FcfsTurns
from vllm_radix.policy.orders import ORDERS, FirstCome, Order
from vllm_radix.policy.planner import (
    AdmissionPlanner,
    OvertakingBounds,
    PlannedAdmission,
    QueueState,
    StepCapacity,
)
from vllm_radix.policy.queue_view import QueueView, view_of_queue
from vllm_radix.policy.ranking import LongestPrefixHeap, ScoredRanking
from vllm_radix.policy.service_rate import STEP, ServiceRate
from vllm_radix.policy.tail_guard import TailGuard
from vllm_radix.policy.waiting_tree import WaitingRequest, WaitingTree

__all__ = [
    "ORDERS",
    "STEP",
    "AdmissionPlanner",
    "ArrivalTable",
    "DeficitCounters",
    "FcfsTurns",
    "FirstCome",
    "LongestPrefixHeap",
    "Order",
    "OvertakingBounds",
    "PlannedAdmission",
    "QueueState",
    "QueueView",
    "ScoredRanking",
    "ServiceRate",
    "StepCapacity",
    "TailGuard",
    "WaitingRequest",
    "WaitingTree",
    "view_of_queue",
]
