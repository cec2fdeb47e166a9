"""The planner: which shard holds which weights on which tier, and what a pass will cost. Imports no
torch."""

from partition.advice import Change, RunnerUp, explain_runners_up, what_would_change
from partition.bandwidths import Bandwidths, CodecRate, DiskRate, GemmRate, RuntimeRates
from partition.cluster import ClusterSpec, DeviceSpec, NodeLink, NodeSpec
from partition.errors import BudgetError, PlanError, UnsupportedArchitectureError
from partition.links import Link
from partition.plan import Forecast, PartitionPlan, ShardPlan, StagePlan, UnitPlacement
from partition.profile import ModelProfile
from partition.search import plan, runners_up
from partition.workload import Constraints, Objective, Workload

__all__ = [
    "Bandwidths",
    "BudgetError",
    "Change",
    "ClusterSpec",
    "CodecRate",
    "Constraints",
    "DeviceSpec",
    "DiskRate",
    "Forecast",
    "GemmRate",
    "Link",
    "ModelProfile",
    "NodeLink",
    "NodeSpec",
    "Objective",
    "PartitionPlan",
    "PlanError",
    "RunnerUp",
    "RuntimeRates",
    "ShardPlan",
    "StagePlan",
    "UnitPlacement",
    "UnsupportedArchitectureError",
    "Workload",
    "explain_runners_up",
    "plan",
    "runners_up",
    "what_would_change",
]
