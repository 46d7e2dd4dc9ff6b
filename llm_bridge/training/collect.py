"""The first half of a round: draw responses with the weights as they are, ask the judge, note the constants.

With several processes each does a block of the round's rows, with the random numbers that these rows would have anyway,
and all of them get all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.kernels import Array
from ..mixture import TokenMixture
from ..policy import Samples, Scored, TokenPolicy, Tokens
from .methods import Drawer
from .rows import Rows, joined, shuffled, uniforms
from .setup import Setup, lent_weights

if TYPE_CHECKING:
    from torch import Tensor

    from .judges import Judge


@dataclass(frozen=True)
class Collected:
    """rows, and the seconds that sampling, judging and scoring the constants took."""

    rows: Rows
    seconds: Mapping[str, float]


def round_size(setup: Setup) -> int:
    """Rows in a round."""
    s = setup.settings
    return s.batch if setup.method.rounds == "online" else s.batch * s.round_batches


def round_prompts(setup: Setup, number: int) -> list[Tokens]:
    """The prompts of a round, each `group` times in a row; over rounds, passes over all prompts in random order."""
    group, n = setup.settings.group, round_size(setup)
    chosen = shuffled(setup.settings.seed, "prompts", len(setup.prompts), number * n // group, n // group)
    return [setup.prompts[int(i)] for i in chosen for _ in range(group)]


def collect(setup: Setup, number: int, average: Mapping[str, Tensor] | None = None) -> Collected:
    """Round `number`: rows of the policy as it is. `average` are the weights of the player of that name."""
    from accelerate.utils import gather_object

    settings, method = setup.settings, setup.method
    prompts = round_prompts(setup, number)
    own = setup.block(len(prompts))
    mine = [prompts[i] for i in own]
    seconds = {"sampling": 0.0, "judging": 0.0, "scoring": 0.0}
    parts: list[Any] = []
    clock = perf_counter()
    samples = _draw(setup, mine, own, len(prompts), number, average)
    responses = [drawn.completions for drawn in samples]
    seconds["sampling"], clock = perf_counter() - clock, perf_counter()
    numbers = _judged(setup, mine, responses, own, len(prompts), number) if mine else {}
    seconds["judging"], clock = perf_counter() - clock, perf_counter()
    with lent_weights(setup):
        if mine:
            numbers |= _constants(setup, mine, responses)
            if method.draws_policy:
                numbers["kl"] = _array(samples[0].log_probabilities) - numbers["reference"][:, 0]
            parts = [Rows(mine, responses, numbers).as_json()]
    seconds["scoring"] = perf_counter() - clock
    rows = joined(Rows.of_json(part) for part in gather_object(parts))
    if method.asks == "rewards":
        advantage = rows.numbers["reward"] - _baseline(rows.numbers["reward"], settings)
        rows = Rows(rows.prompts, rows.responses, {**rows.numbers, "advantage": advantage})
    return Collected(rows, seconds)


def _draw(
    setup: Setup,
    prompts: Sequence[Tokens],
    own: range,
    n: int,
    number: int,
    average: Mapping[str, Tensor] | None,
) -> list[Samples]:
    """The samples of each of the method's draws; none without prompts of one's own, which other processes may have."""
    import torch

    horizon, found = setup.settings.horizon, []
    for k, who in enumerate(setup.method.draws):
        u = uniforms(setup.settings.seed, f"draw {k}", number, (n, horizon))[own.start : own.stop]
        given = average if who == "average" else None
        assert who != "average" or given is not None
        with lent_weights(setup, given), setup.accelerator.autocast():
            if len(prompts):
                found.append(player(setup, who).sample(prompts, horizon, uniforms=torch.as_tensor(u)))
    return found


def player(setup: Setup, who: Drawer) -> TokenPolicy:
    """Who draws; "average" is the policy itself, to which its caller lends the averaged weights."""
    if who in ("policy", "average"):
        return setup.policy
    assert isinstance(setup.reference, TokenPolicy)
    if who == "reference":
        return setup.reference
    return TokenMixture(setup.policy, setup.reference, setup.parameters["share"])


def _judged(
    setup: Setup,
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Tokens]],
    own: range,
    n: int,
    number: int,
) -> dict[str, Array]:
    """wins and preference (n,), or reward (n,)."""
    assert setup.judge is not None
    if setup.method.asks == "rewards":
        return {"reward": ask_rewards(setup.judge, prompts, responses[0])}
    p = ask_preferences(setup.judge, prompts, responses[0], responses[1])
    labels = setup.settings.labels or setup.method.labels
    if labels == "draw":
        u = uniforms(setup.settings.seed, "labels", number, (n,))[own.start : own.stop]
        wins = (u < p).astype(np.float64)
    else:
        wins = p if labels == "soft" else (1 + np.sign(p - 0.5)) / 2
    return {"wins": wins, "preference": p}


def ask_rewards(judge: Judge, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Array:
    """(n,) finite; ValueError that names the judge and the row."""
    return _checked(
        judge, judge.rewards(prompts, completions), len(prompts), -np.inf, np.inf, "a finite number"
    )


def ask_preferences(
    judge: Judge, prompts: Sequence[Tokens], first: Sequence[Tokens], second: Sequence[Tokens]
) -> Array:
    """(n,) P(first > second) in [0, 1]."""
    return _checked(judge, judge.preferences(prompts, first, second), len(prompts), 0.0, 1.0, "in [0, 1]")


def _checked(judge: Judge, answers: Any, n: int, low: float, high: float, what: str) -> Array:
    values, name = np.asarray(answers, dtype=np.float64), getattr(judge, "name", type(judge).__name__)
    if values.shape != (n,):
        raise ValueError(f"judge {name} answered {values.shape} to {n} rows: one number a row is expected")
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"judge {name} answered {values[i]} to row {i}; an answer is {what}")
    return values


def _constants(
    setup: Setup, prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]]
) -> dict[str, Array]:
    """Log-probabilities of the scored responses under the reference, and under pi_t where the loss needs them."""
    scored = responses[: setup.method.scored]
    with setup.accelerator.autocast():
        found = {"reference": score(setup.reference, prompts, scored)}
        if setup.method.previous:
            found["previous"] = score(setup.policy, prompts, scored)
    return found


def score(policy: Scored, prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]]) -> Array:
    """log-probabilities (n, R) of R responses to each prompt, without gradients."""
    import torch

    every = [x for _ in responses for x in prompts], [y for column in responses for y in column]
    with torch.no_grad():
        return _array(policy.log_probabilities(*every).reshape(len(responses), -1).T)


def _baseline(rewards: Array, settings: Any) -> Array:
    """The mean of the others: of the prompt's group, or of all rows where groups have one row."""
    size = settings.group if settings.group > 1 else len(rewards)
    if settings.baseline == "none" or size == 1:
        return np.zeros_like(rewards)
    groups = rewards.reshape(-1, size)
    others = (groups.sum(1, keepdims=True) - groups) / (size - 1)
    return np.asarray(others.reshape(-1))


def _array(x: Tensor) -> Array:
    return np.asarray(x.detach().double().cpu().numpy())


def sample_answers(setup: Setup, prompts: Sequence[Tokens]) -> Samples:
    """Answers of the policy to prompts, the same random numbers each time."""
    import torch

    horizon = setup.settings.horizon
    u = uniforms(setup.settings.seed, "samples", 0, (len(prompts), horizon))
    with setup.accelerator.autocast():
        return setup.policy.sample(prompts, horizon, uniforms=torch.as_tensor(u))
