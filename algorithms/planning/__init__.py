"""Exact solvers on known models: every answer carries its certificate."""

from .divergence import regularised_value, state_kl, trajectory_kl
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
from .returns import ReturnLaw, best_of_n, best_of_n_kl, pass_at_k, return_law, win_rate
from .sequences import (
    SequenceGibbs,
    leaf_blocks,
    leaf_returns,
    leaf_tokens,
    leaf_trajectories,
    sequence_gibbs,
    sequence_law,
)
from .soft import SoftSolution, soft_maximum, soft_value_iteration

__all__ = [
    "Evaluation",
    "ReturnLaw",
    "SequenceGibbs",
    "SoftSolution",
    "Solution",
    "bellman_residual",
    "best_of_n",
    "best_of_n_kl",
    "check_policy",
    "evaluate",
    "expected_reward",
    "greedy",
    "leaf_blocks",
    "leaf_returns",
    "leaf_tokens",
    "leaf_trajectories",
    "occupancy",
    "pass_at_k",
    "probabilities",
    "regularised_value",
    "restrict",
    "return_law",
    "sequence_gibbs",
    "sequence_law",
    "soft_maximum",
    "soft_value_iteration",
    "state_kl",
    "state_occupancy",
    "trajectory_kl",
    "uniform_policy",
    "value_iteration",
    "win_rate",
]
