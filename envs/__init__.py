"""Worlds that are known exactly, their Gymnasium environments, and who answers preference queries.

The names below load their modules on first use, so that `import preflab.envs` costs no more than Gymnasium itself.
Importing this package registers the worlds as `preflab/...-v0`.
"""

if __name__ != "preflab.envs":
    raise ImportError("import preflab.envs: a bare import would make a second copy of every class")

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_all

if TYPE_CHECKING:  # pragma: no cover
    from .annotators import Annotator as Annotator
    from .annotators import BradleyTerry as BradleyTerry
    from .annotators import KernelAnnotator as KernelAnnotator
    from .annotators import RegretPreference as RegretPreference
    from .annotators import Thurstone as Thurstone
    from .batched import BatchedSimulator as BatchedSimulator
    from .budget import BudgetExhausted as BudgetExhausted
    from .exploration import combination_lock as combination_lock
    from .exploration import deep_sea as deep_sea
    from .exploration import river_swim as river_swim
    from .features import FeatureMap as FeatureMap
    from .gym_env import FiniteMDPEnv as FiniteMDPEnv
    from .judges import judged_annotator as judged_annotator
    from .judges import judged_game as judged_game
    from .kernels import CSRKernel as CSRKernel
    from .kernels import DenseKernel as DenseKernel
    from .kernels import Kernel as Kernel
    from .kernels import TreeKernel as TreeKernel
    from .language_world import load_language_world as load_language_world
    from .lexicographic import LexicographicComparator as LexicographicComparator
    from .linear_mdp import AssumptionWarning as AssumptionWarning
    from .linear_mdp import LinearMDP as LinearMDP
    from .linear_mdp import hypercube_mdp as hypercube_mdp
    from .linear_mdp import random_linear_mdp as random_linear_mdp
    from .linear_mdp import tabular_linear_mdp as tabular_linear_mdp
    from .links import LINKS as LINKS
    from .links import LOGISTIC as LOGISTIC
    from .links import PROBIT as PROBIT
    from .links import Link as Link
    from .mdp import FiniteMDP as FiniteMDP
    from .populations import LabelNoise as LabelNoise
    from .populations import Mixture as Mixture
    from .preference_games import Game as Game
    from .preference_games import PreferenceGame as PreferenceGame
    from .preference_games import bradley_terry_game as bradley_terry_game
    from .preference_games import cyclic_game as cyclic_game
    from .preference_games import random_game as random_game
    from .preference_games import sound_quality_game as sound_quality_game
    from .preference_games import three_type_game as three_type_game
    from .ranking import PlackettLuce as PlackettLuce
    from .recorded import RecordedAnnotator as RecordedAnnotator
    from .replay import Replay as Replay
    from .sound_quality import sound_quality_annotator as sound_quality_annotator
    from .sound_quality import sound_quality_world as sound_quality_world
    from .structured_games import LowRankGame as LowRankGame
    from .structured_games import block_game as block_game
    from .structured_games import duplicated_game as duplicated_game
    from .structured_games import random_kernel_game as random_kernel_game
    from .structured_games import random_low_rank_game as random_low_rank_game
    from .token_mdp import TokenMDP as TokenMDP
    from .token_mdp import random_token_mdp as random_token_mdp
    from .tournaments import condorcet_winner as condorcet_winner
    from .tournaments import cycles as cycles
    from .tournaments import smith_set as smith_set
    from .trajectories import Trajectories as Trajectories
    from .wrappers import HideReward as HideReward

_EXPORTS = {
    "annotators": ("Annotator", "BradleyTerry", "KernelAnnotator", "RegretPreference", "Thurstone"),
    "batched": ("BatchedSimulator",),
    "budget": ("BudgetExhausted",),
    "exploration": ("combination_lock", "deep_sea", "river_swim"),
    "features": ("FeatureMap",),
    "gym_env": ("FiniteMDPEnv",),
    "judges": ("judged_annotator", "judged_game"),
    "kernels": ("CSRKernel", "DenseKernel", "Kernel", "TreeKernel"),
    "language_world": ("load_language_world",),
    "lexicographic": ("LexicographicComparator",),
    "linear_mdp": (
        "AssumptionWarning",
        "LinearMDP",
        "hypercube_mdp",
        "random_linear_mdp",
        "tabular_linear_mdp",
    ),
    "links": ("LINKS", "LOGISTIC", "PROBIT", "Link"),
    "mdp": ("FiniteMDP",),
    "populations": ("LabelNoise", "Mixture"),
    "preference_games": (
        "Game",
        "PreferenceGame",
        "bradley_terry_game",
        "cyclic_game",
        "random_game",
        "sound_quality_game",
        "three_type_game",
    ),
    "ranking": ("PlackettLuce",),
    "recorded": ("RecordedAnnotator",),
    "replay": ("Replay",),
    "sound_quality": ("sound_quality_annotator", "sound_quality_world"),
    "structured_games": (
        "LowRankGame",
        "block_game",
        "duplicated_game",
        "random_kernel_game",
        "random_low_rank_game",
    ),
    "token_mdp": ("TokenMDP", "random_token_mdp"),
    "tournaments": ("condorcet_winner", "cycles", "smith_set"),
    "trajectories": ("Trajectories",),
    "wrappers": ("HideReward",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted([*_MODULE_OF, "register_all"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


register_all()
