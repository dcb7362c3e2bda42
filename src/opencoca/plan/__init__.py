"""What a recipe will need before anything is paid for: parameters, operations, memory, communication, time."""

from opencoca.plan.forecast import Plan, make_plan
from opencoca.plan.planner import Cluster

__all__ = ["Cluster", "Plan", "make_plan"]
