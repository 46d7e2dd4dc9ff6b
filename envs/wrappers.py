"""HideReward: an environment from which a learner cannot read the reward."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from .mdp import FiniteMDP

HIDDEN = ("reward", "theta", "returns")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RewardFreeMDP(FiniteMDP):
    """The kernel, the initial law, the actions and the features of a model; its reward and theta are not there.

    Reading them raises AttributeError. Solvers work on it with `reward=` an estimate, and `plain(reward=estimate)` is
    the learner's own model.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward", "theta"):
            object.__delattr__(self, name)

    def __getattribute__(self, name: str) -> Any:
        if name in HIDDEN and name not in object.__getattribute__(self, "__dict__"):
            raise AttributeError(
                f"{name} is hidden from the learner: estimate the reward from preferences and pass it on as reward=..."
            )
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"RewardFreeMDP({self.name}, sizes={self.sizes}, n_actions={self.n_actions})"

    @classmethod
    def of(cls, model: FiniteMDP, **changes: Any) -> RewardFreeMDP:
        """The model without its reward."""
        kept = {
            k: getattr(model, k) for k in ("kernel", "initial", "action_mask", "features", "name")
        } | changes
        nothing = [np.broadcast_to(0.0, (n, model.n_actions)) for n in kept["kernel"].sizes[:-1]]
        return cls(**kept, reward=nothing)

    def replace(self, **changes: Any) -> Self:
        raise TypeError("a model without its reward is not to be edited; see plain(reward=estimate)")

    def plain(self, **changes: Any) -> FiniteMDP:
        """A FiniteMDP where `changes` give a reward, else a model without one, as this is."""
        if "reward" not in changes:
            return self.of(self, **changes)
        kept = {k: getattr(self, k) for k in ("kernel", "initial", "action_mask", "features", "name")}
        return FiniteMDP(**(kept | changes))


class HideReward(gymnasium.Env):
    """The same world with reward 0.0 throughout, for learners that may learn from comparisons only.

    It takes an environment, as a wrapper does, but is a base environment of its own: `unwrapped` is itself, there is
    no `env` to reach through, and `get_wrapper_attr` ends here. Of `info` only the keys in `keep` pass (statistics of
    inner wrappers would carry returns). `model`, where the world has one, is a `RewardFreeMDP`. Whoever runs the
    experiment keeps the inner environment, and its rewards, to himself. Python holds no secrets from code that goes
    digging in closures or makes the world anew from its name: this guards against mistakes, not against malice.
    """

    def __init__(self, env: gymnasium.Env, keep: tuple[str, ...] = ("step", "action_mask")) -> None:
        keep = tuple(keep)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata, self.render_mode = env.metadata, env.render_mode
        model = getattr(env.unwrapped, "model", None)
        self.model = None if model is None else RewardFreeMDP.of(model)
        spec = env.spec
        if spec is not None and not any(isinstance(x, FiniteMDP) for x in spec.kwargs.values()):
            own = WrapperSpec("HideReward", f"{__name__}:HideReward", {"keep": keep})
            wrappers = (*spec.additional_wrappers, own)
            self.spec: EnvSpec | None = dataclasses.replace(spec, additional_wrappers=wrappers)

        def visible(info: dict[str, Any]) -> dict[str, Any]:
            return {key: info[key] for key in keep if key in info}

        def reset(seed: int | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
            observation, info = env.reset(seed=seed, options=options)
            return observation, visible(info)

        def step(action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, _, terminated, truncated, info = env.step(action)
            return observation, 0.0, terminated, truncated, visible(info)

        # Closures hold the inner environment, so that no attribute of this object leads to its rewards.
        self._reset, self._step = reset, step
        self._render, self._close = (
            lambda: env.render(),
            lambda: env.close(),
        )  # a bound method would show __self__
        self._generator, self._seed = lambda: env.unwrapped.np_random, lambda: env.unwrapped.np_random_seed

    @property
    def _np_random(self) -> np.random.Generator:  # type: ignore[override]
        return self._generator()

    @property
    def np_random_seed(self) -> int:
        return self._seed()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return self._reset(seed, options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._step(action)

    def render(self) -> Any:
        return self._render()

    def close(self) -> None:
        self._close()
