"""Any FiniteMDP as a `gymnasium.Env`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from .mdp import FiniteMDP


class LegalActions(spaces.Discrete):
    """Discrete(A) whose `sample()` draws among the actions that are available in the environment's present state."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.legal = np.ones(n, dtype=np.int8)

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        if mask is None and probability is None:
            mask = self.legal
        return super().sample(mask, probability)


class FiniteMDPEnv(gymnasium.Env):
    """One episode = one pass through the layers h = 0, ..., H-1; then `terminated`, for the end is the model's own.

    Observation: the state's index within its layer, Discrete(max_h S_h). An optimal policy of a finite-horizon model
    depends on h as well; `info["step"]` carries it, and with observe_step=True the observation is (h, state),
    MultiDiscrete([H + 1, max_h S_h]). The default (None) observes the step where layers differ in size, since there an
    index without its layer names no state.
    Action: Discrete(A). Where the model limits them, `info["action_mask"]` (int8) tells the available ones,
    `action_space.sample()` draws only those, and another one raises ValueError.
    Reward: r_h(s, a), the expectation. Seeding: reset(seed=...). Exact model: `env.unwrapped.model`.
    render_mode "ansi": the model's own words where it has them, else step and state. A model may offer `decode(h, s)`,
    the text of a state, and with it `action_text(h, s, a)`, what an action appends to that text; the latter shows the
    whole response also where the end state has forgotten it.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self, model: FiniteMDP, render_mode: str | None = None, observe_step: bool | None = None
    ) -> None:
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode is {render_mode!r}; expected None or 'ansi'")
        self.model = model
        self.render_mode = render_mode
        self.observe_step = not model.uniform if observe_step is None else observe_step
        largest = max(model.sizes)
        self.observation_space: spaces.Space[Any] = (
            spaces.MultiDiscrete([model.horizon + 1, largest])
            if self.observe_step
            else spaces.Discrete(largest)
        )
        masked = model.action_mask is not None
        self.action_space: spaces.Discrete = (
            LegalActions(model.n_actions) if masked else spaces.Discrete(model.n_actions)
        )
        start = np.cumsum(model.initial)
        self._start = start / start[-1]  # ends exactly at 1, above every uniform
        self._h, self._s, self._text = model.horizon, 0, ""

    def _observe(self) -> tuple[Any, dict[str, Any]]:
        info: dict[str, Any] = {"step": self._h}
        if isinstance(self.action_space, LegalActions):
            assert self.model.action_mask is not None
            if self._h < self.model.horizon:
                self.action_space.legal = self.model.action_mask[self._h][self._s].astype(np.int8)
            info["action_mask"] = self.action_space.legal.copy()
        return np.array([self._h, self._s]) if self.observe_step else self._s, info

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A first state from the initial law, or options={"state": s} for a chosen one (such as a prompt)."""
        super().reset(seed=seed)
        u = self.np_random.random()  # drawn also for a chosen state: the stream does not shift
        state = (options or {}).get("state", int(np.searchsorted(self._start, u, side="right")))
        if not 0 <= state < self.model.sizes[0]:
            raise ValueError(f"options['state'] is {state}; expected 0..{self.model.sizes[0] - 1}")
        self._h, self._s = 0, int(state)
        if self.render_mode is not None:
            self._text = self._describe()
        return self._observe()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        h, s, model = self._h, self._s, self.model
        if h == model.horizon:
            raise gymnasium.error.ResetNeeded("the episode has ended (or none was begun): call reset()")
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} at step {h} is not an integer in 0..{model.n_actions - 1}")
        a = int(action)
        if model.action_mask is not None and not model.action_mask[h][s, a]:
            legal = np.flatnonzero(model.action_mask[h][s]).tolist()
            raise ValueError(
                f"action {a} is not available at step {h} in state {s}; choose one of {legal}, "
                "for instance by env.action_space.sample(info['action_mask'])"
            )
        reward = float(model.reward[h][s, a])
        u = np.array([self.np_random.random()])
        self._s = int(model.kernel.sample(h, np.array([s]), np.array([a]), u)[0])
        self._h = h + 1
        if self.render_mode is not None:
            appended = getattr(model, "action_text", None)
            self._text = self._text + appended(h, s, a) if appended else self._describe()
        observation, info = self._observe()
        return observation, reward, self._h == model.horizon, False, info

    def _describe(self) -> str:
        decode = getattr(self.model, "decode", None)
        return decode(self._h, self._s) if decode else f"step {self._h}/{self.model.horizon}: state {self._s}"

    def render(self) -> str | None:  # type: ignore[override]
        return None if self.render_mode is None else self._text


def make_world(
    factory: str, render_mode: str | None = None, observe_step: bool | None = None, **kwargs: Any
) -> FiniteMDPEnv:
    """The entry point of the registered worlds: `factory` = "module:function" within preflab.envs."""
    module, function = factory.split(":")
    model = getattr(import_module(f".{module}", __package__), function)(**kwargs)
    return FiniteMDPEnv(model, render_mode, observe_step)
