"""Exact solvers on known models: every answer carries its certificate."""

from .dynamic import (
    Evaluation,
    Solution,
    bellman_residual,
    evaluate,
    expected_reward,
    occupancy,
    state_occupancy,
    value_iteration,
)
from .policies import check_policy, greedy, probabilities, restrict, uniform_policy

__all__ = [
    "Evaluation",
    "Solution",
    "bellman_residual",
    "check_policy",
    "evaluate",
    "expected_reward",
    "greedy",
    "occupancy",
    "probabilities",
    "restrict",
    "state_occupancy",
    "uniform_policy",
    "value_iteration",
]
