"""Active querying on language models: PR-LSVI's posterior and query rule on the features of a frozen trunk.

    pool = load_pool()  # SmolLM2's own texts; or sample_pool(policy, prompts, judge.rewards)
    annotator = PoolAnnotator(pool, seed=1, budget=256)
    settings = replace(prior_settings(pool), batch=16, buy=4)  # of 16 pairs a round the 4 of most disagreement
    learner = ActiveLearner(pool, annotator, settings, seed=0).advance(64)
    pool.win_rate(learner.answer)

`features` reads the trunk, `pool` holds candidates, `beliefs` what is known of the reward (`quadrature`: exactly, with
two features), `learner` is the loop, and `experiment` compares ways to choose what is labelled. torch is imported when
a model is read, not with the package.
"""

from .beliefs import Ensemble, RewardPosterior, Voted, fit_heads, reward_settings
from .features import PrincipalAxes, principal_axes, trunk_features, within
from .learner import ActiveLearner, ActiveSettings, PoolAnnotator, Round, prior_settings
from .pool import Pool, linear_fit, load_pool, sample_pool, text_pool, with_linear_reward
from .quadrature import GridPosterior

__all__ = [
    "ActiveLearner",
    "ActiveSettings",
    "Ensemble",
    "GridPosterior",
    "Pool",
    "PoolAnnotator",
    "PrincipalAxes",
    "RewardPosterior",
    "Round",
    "Voted",
    "fit_heads",
    "linear_fit",
    "load_pool",
    "principal_axes",
    "prior_settings",
    "reward_settings",
    "sample_pool",
    "text_pool",
    "trunk_features",
    "with_linear_reward",
    "within",
]
