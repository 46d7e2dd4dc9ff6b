"""The worlds under their Gymnasium names: `gymnasium.make("preflab/RiverSwim-v0", n=6, horizon=20)`.

Importing `preflab.envs` registers them, and so does `gymnasium.make("preflab.envs:preflab/RiverSwim-v0")`: Gymnasium
1.x loads no plug-ins of its own accord. Keywords of `make` go to the world's factory, except `render_mode` and
`observe_step`, which are the environment's.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class World(NamedTuple):
    """A registered world: the factory of its model, "module:function" within preflab.envs, and its defaults."""

    factory: str
    kwargs: dict[str, Any]


WORLDS: dict[str, World] = {
    "preflab/RiverSwim-v0": World("exploration:river_swim", {"n": 6, "horizon": 20}),
    "preflab/DeepSea-v0": World("exploration:deep_sea", {"size": 10, "seed": 0}),
    "preflab/CombinationLock-v0": World(
        "exploration:combination_lock", {"horizon": 8, "n_actions": 4, "seed": 0}
    ),
    "preflab/RandomLinearMDP-v0": World(
        "linear_mdp:random_linear_mdp", {"n_states": 20, "n_actions": 4, "d": 5, "horizon": 6, "seed": 0}
    ),
    "preflab/HypercubeMDP-v0": World("linear_mdp:hypercube_mdp", {"k": 4}),
    "preflab/TokenMDP-v0": World("token_mdp:random_token_mdp", {}),
    "preflab/LanguageWorld-v0": World("language_world:load_language_world", {}),
    "preflab/SoundQuality-v0": World("sound_quality:sound_quality_world", {}),
    "preflab/ToyText-v0": World("exploration:toy_text", {"env_id": "FrozenLake-v1", "horizon": 50}),
}


def register_all() -> None:
    """Register every world of `WORLDS` with Gymnasium; those already registered are left as they are."""
    from gymnasium.envs.registration import register, registry

    for name, world in WORLDS.items():
        if name not in registry:
            register(
                name, "preflab.envs.gym_env:make_world", kwargs={"factory": world.factory, **world.kwargs}
            )
