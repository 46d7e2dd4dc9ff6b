r"""Level 5: does a sampled run go where its objective leads? Held to an exact run, and judged against its own noise.

A `Task` tells a trainer what to do with the world's policy: an objective with its parameters, so many steps of so many
rows with a learning rate, and either comparisons (fresh draws, each used once) or a judge. The same steps made with the
expected gradient, enumerated, are the *exact run*. To first order the mean of sampled runs is the exact run, whatever
the batch, and both lead towards the optimum, which is known. Batches are large, since what the second order adds is
their variance: it falls against the spread of the runs as one over the root of all rows.

The trainer runs the task from several seeds. d_s = log pi_s - log pi_exact, (prompts, C), is what run s ends with less
what the exact run ends with. Let v_k be the same for an exact run with fault k (labels exchanged, token means, another
reference, ...): then a_sk = <v_k, d_s> / <v_k, v_k> has mean 0 for an honest trainer, and 1 for one with fault k. Each
is tested by a t-interval over seeds, all of them together by Holm's method. The noise that the runs are judged against
is their own spread, and what is left of the way to the optimum is the exact run's as well.

A trainer that fails is compared with every faulty exact run in the same way; a fault is named if it is not rejected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import expit, log_softmax

from ...envs.kernels import Array
from ..policy import Tokens, logits_of
from .laws import Finding, holm
from .models import ModelWorld, mix
from .report import Check, Match
from .whole import make_trainer, scored, trained, variants

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["comparisons", "rewards", "preferences"]
SEEDS = 10
STEPS = 16
BATCH = 240
STRIDE = 0.12  # nats, root mean square: how far the first exact step moves log-probabilities
NAMED = 1e-3


# ---- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Token ids; completions with their end token where they have one."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """What a trainer is asked to do: plain steps of the optimiser on the mean gradient of `batch` rows.

    No clipping, no weight decay, no warm-up; `schedule` "linear" falls from the learning rate in equal parts, to reach
    0 after the last step.

    objective, parameters   of `OBJECTIVES`
    comparisons  offline objectives: rows, to be used once each where steps * batch are that many, else in passes
    prompts      the others: those of a step are passes over them, so that each comes up equally often
    reward       (prompts, completions) -> (n,) numbers;  preference  (prompts, first, second) -> (n,) P(first > second)
    horizon      the most tokens of a completion that is drawn
    round_steps  "inpo": steps made with the responses of one round, which the policy draws as it is at its beginning
    """

    objective: str
    parameters: Mapping[str, float]
    steps: int
    batch: int
    learning_rate: float
    optimiser: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["constant", "linear"] = "constant"
    comparisons: tuple[Comparison, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    reward: Callable[[Sequence[Tokens], Sequence[Tokens]], Array] | None = None
    preference: Callable[[Sequence[Tokens], Sequence[Tokens], Sequence[Tokens]], Array] | None = None
    horizon: int = 0
    round_steps: int = 1


@dataclass(frozen=True, eq=False)
class Problem:
    """What responses are worth: r (prompts, C), and a game (prompts, C, C) of who is preferred to whom."""

    world: ModelWorld
    objective: Objective
    parameters: Mapping[str, float]

    @cached_property
    def reward(self) -> Array:
        shape = len(self.world.prompts), len(self.world.completions)
        return np.random.default_rng([self.world.seed, 51]).normal(size=shape)

    @cached_property
    def game(self) -> Array:
        """Bradley-Terry where there is a reward behind it, else with a part that no reward gives."""
        margins = self.reward[:, :, None] - self.reward[:, None, :]
        if self.objective.general:
            cycle = np.random.default_rng([self.world.seed, 52]).normal(size=margins.shape)
            margins = 0.5 * margins + 2 * (cycle - cycle.transpose(0, 2, 1))
        return np.asarray(expit(margins))

    @cached_property
    def reference(self) -> Array:
        return self.world.law("reference")

    @cached_property
    def number(self) -> dict[tuple[int, ...], int]:
        return {y: c for c, y in enumerate(self.world.completions)}

    @cached_property
    def place(self) -> dict[tuple[int, ...], int]:
        return {x: i for i, x in enumerate(self.world.prompts)}

    def pairs(self, law: Array, equal: bool = True) -> Array:
        """(prompts, C, C): the probability of the comparison (prompt; chosen y, rejected y') of two draws.

        Pairs of equal responses have no gradient. A policy that draws twice draws them (`equal`); data hold none.
        """
        both = np.exp(law)[:, :, None] * np.exp(law)[:, None, :]
        if not equal:
            both[:, np.arange(law.shape[1]), np.arange(law.shape[1])] = 0
            both /= both.sum((1, 2), keepdims=True)
        return np.asarray(2 * both * self.game / len(law))

    def comparisons(self, n: int, seed: int) -> tuple[Comparison, ...]:
        """n draws from the reference, prompts in turn."""
        rng, world = np.random.default_rng([self.world.seed, 53, seed]), self.world
        P, C = self.reference.shape
        total = self.pairs(self.reference, equal=False).reshape(P, -1).cumsum(1)
        total /= total[:, -1:]
        found = []
        for k, u in enumerate(rng.random(n)):
            chosen, rejected = divmod(int(np.searchsorted(total[k % P], u, side="right")), C)
            found.append(
                Comparison(world.prompts[k % P], world.completions[chosen], world.completions[rejected])
            )
        return tuple(found)

    def ask_reward(self, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Array:
        return self.reward[self._at(prompts, completions)]

    def ask_preference(
        self, prompts: Sequence[Tokens], first: Sequence[Tokens], second: Sequence[Tokens]
    ) -> Array:
        x, a = self._at(prompts, first)
        return self.game[x, a, self._at(prompts, second)[1]]

    def _at(self, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> tuple[Any, Any]:
        try:
            return (
                np.array([self.place[tuple(int(t) for t in x)] for x in prompts]),
                np.array([self.number[tuple(int(t) for t in y)] for y in completions]),
            )
        except KeyError as error:
            raise ValueError(
                f"the judge was asked about the tokens {list(error.args[0])}, which are no prompt or completion of the "
                "task: completions keep their end token, and nothing after it"
            ) from None

    def optimum(self) -> Array:
        """log pi*, (prompts, C): ref exp(advantage / temperature) / Z, with itself as the opponent in a game."""
        beta = self.parameters[self.objective.temperature]
        if self.objective.solution == "gibbs":
            return np.asarray(log_softmax(self.reference + self.reward / beta, axis=1))
        if self.objective.solution == "gibbs_wins":  # against the reference
            wins = np.einsum("xij,xj->xi", self.game, np.exp(self.reference))
            return np.asarray(log_softmax(self.reference + wins / beta, axis=1))
        now = self.reference.copy()
        for _ in range(20000):
            share = self.parameters.get("share", 0.0)
            opponent = self.world.law_of(_mixed_laws(self.world, now, share)) if share else now
            wins = np.einsum("xij,xj->xi", self.game, np.exp(opponent))
            after = log_softmax(0.9 * now + 0.1 * (self.reference + wins / beta), axis=1)
            if np.abs(after - now).max() < 1e-12:
                break
            now = after
        return np.asarray(now)


def _mixed_laws(world: ModelWorld, law: Array, share: float) -> Array:
    """The token mixture of a law over completions with the reference, as laws of the next token."""
    own = token_laws(world, law)
    return np.asarray(log_softmax((1 - share) * own + share * world.laws("reference"), axis=-1))


def token_laws(world: ModelWorld, law: Array) -> Array:
    """Laws of the next token (prompts, prefixes, V) of a law over completions (prompts, C)."""
    found = np.full((len(law), len(world.prefixes), world.vocabulary), -np.inf)
    for i, w in enumerate(world.prefixes):
        for token in (*world.spoken, world.end):
            text = (*w, token)
            inside = [c for c, y in enumerate(world.completions) if y[: len(text)] == text]
            if inside:
                found[:, i, token] = np.logaddexp.reduce(law[:, inside], axis=1)
    return np.asarray(log_softmax(found, axis=-1))


# ---- expected losses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Expected:
    """What an expected loss is made of. Scores are sums of token log-probabilities, or what a fault makes of them.

    score      (P, C), with gradients; reference, previous (P, C) likewise: constants. previous: as the round began
    law        (P, C) log pi as it is: a constant; drawer (P, C) as it was when the round's responses were drawn
    tokens, reference_tokens   (P, C, H)
    opponent   (share of the reference) -> (P, C), the law of the mixture
    """

    problem: Problem
    score: Tensor
    reference: Tensor
    previous: Tensor
    law: Tensor
    drawer: Tensor
    tokens: Tensor
    reference_tokens: Tensor
    opponent: Callable[[float], Tensor]

    def data(self) -> Tensor:
        """Of the comparisons of a task, (P, C, C)."""
        import torch

        return torch.as_tensor(self.problem.pairs(self.problem.reference, equal=False))

    def drawn(self, law: Tensor) -> Tensor:
        """Of comparisons that a policy draws."""
        import torch

        return torch.as_tensor(self.problem.pairs(law.numpy()))

    @property
    def reward(self) -> Tensor:
        import torch

        return torch.as_tensor(self.problem.reward)

    def wins(self, opponent: Tensor) -> Tensor:
        import torch

        return torch.einsum("xij,xj->xi", torch.as_tensor(self.problem.game), opponent.exp())

    def surrogate(self, advantage: Tensor) -> Tensor:
        """-E[advantage log pi(y)], y drawn from the policy as it is."""
        return -(self.law.exp() * advantage.detach() * self.score).sum() / len(self.law)


def _margins(score: Tensor, anchor: Tensor) -> Tensor:
    d = score - anchor
    return d[:, :, None] - d[:, None, :]


def _dpo(e: Expected, *, beta: float) -> Tensor:
    from torch.nn.functional import logsigmoid

    weight = e.data()
    return -(weight * logsigmoid(beta * _margins(e.score, e.reference))).sum()


def _online_dpo(e: Expected, *, beta: float) -> Tensor:
    from torch.nn.functional import logsigmoid

    weight = e.drawn(e.law)
    return -(weight * logsigmoid(beta * _margins(e.score, e.reference))).sum()


def _ipo(e: Expected, *, tau: float) -> Tensor:
    weight = e.data()
    return (weight * (_margins(e.score, e.reference) - 1 / (2 * tau)) ** 2).sum()


def _inpo(e: Expected, *, tau: float, eta: float) -> Tensor:
    anchor = eta * tau * e.reference + (1 - eta * tau) * e.previous
    weight = e.drawn(e.drawer)
    return (weight * (_margins(e.score, anchor) - eta / 2) ** 2).sum()


def _policy_gradient(e: Expected, *, beta: float) -> Tensor:
    return e.surrogate(e.reward - beta * (e.score - e.reference))


def _nash_md(e: Expected, *, tau: float, share: float) -> Tensor:
    return e.surrogate(e.wins(e.opponent(share)) - tau * (e.score - e.reference))


@dataclass(frozen=True)
class Objective:
    """An objective that `train` may name.

    kind       what a task of it gives to the trainer
    loss       (Expected, **parameters) -> a scalar whose gradient is the expected gradient
    temperature  the name of the parameter that weighs the KL to the reference
    solution   of the optimum, see `Problem.optimum`;  general: preferences have no reward behind them
    """

    name: str
    kind: Kind
    loss: Callable[..., Tensor]
    parameters: Mapping[str, float]
    temperature: str
    solution: Literal["gibbs", "gibbs_wins", "nash"]
    general: bool = False


def _objective(name: str, kind: Kind, loss: Any, temperature: str, solution: Any, **rest: float) -> Objective:
    return Objective(
        name, kind, loss, MappingProxyType(rest), temperature, solution, solution in ("nash", "gibbs_wins")
    )


OBJECTIVES: Mapping[str, Objective] = {
    objective.name: objective
    for objective in (
        _objective("dpo", "comparisons", _dpo, "beta", "gibbs", beta=0.5),
        _objective("ipo", "comparisons", _ipo, "tau", "gibbs_wins", tau=0.5),
        _objective("online_dpo", "preferences", _online_dpo, "beta", "gibbs", beta=0.5),
        _objective("inpo", "preferences", _inpo, "tau", "nash", tau=0.25, eta=1.0),
        _objective("kl_policy_gradient", "rewards", _policy_gradient, "beta", "gibbs", beta=0.5),
        _objective("nash_md", "preferences", _nash_md, "tau", "nash", tau=0.1, share=0.25),
    )
}


# ---- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What a faulty trainer does instead, as an exact run can do it.

    view       of the token log-probabilities: "sum", "mean", "no_end", "no_first", "no_last"
    reference  a role of the world; "follows", the policy as it is; "start", as it was; "none", log ref = 0
    changes    of the parameters;  loss  another one
    """

    name: str
    cause: str
    view: str = "sum"
    reference: str = "reference"
    changes: Mapping[str, float] = field(default_factory=dict)
    loss: Callable[..., Tensor] | None = None


def _exchanged(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss where the losers are taken for the winners."""

    def other(e: Expected, **parameters: float) -> Tensor:
        class Exchanged(Expected):
            def data(self) -> Tensor:
                return super().data().transpose(1, 2)

            def drawn(self, law: Tensor) -> Tensor:
                return super().drawn(law).transpose(1, 2)

            def wins(self, opponent: Tensor) -> Tensor:
                return 1 - super().wins(opponent)

            @property
            def reward(self) -> Tensor:
                return -super().reward

        return loss(Exchanged(**{name: getattr(e, name) for name in e.__dataclass_fields__}), **parameters)

    return other


def _frozen(advantage: Callable[..., Tensor], temperature: str) -> Callable[..., Tensor]:
    """The KL of each token alone: what a token does to the prefixes after it is left out."""

    def other(e: Expected, **parameters: float) -> Tensor:
        ratio = parameters[temperature] * (e.tokens - e.reference_tokens).detach()
        return e.surrogate(advantage(e, **parameters)) + (
            e.law.exp() * (ratio * e.tokens).sum(-1)
        ).sum() / len(e.law)

    return other


def _kl_by_k3(advantage: Callable[..., Tensor], temperature: str) -> Callable[..., Tensor]:
    """exp(log ref/pi) - 1 - log ref/pi of each token, as a loss beside the policy gradient."""

    def other(e: Expected, **parameters: float) -> Tensor:
        k3 = 1 - (e.reference_tokens - e.tokens).detach().exp()
        return e.surrogate(advantage(e, **parameters)) + parameters[temperature] * (
            e.law.exp() * (k3 * e.tokens).sum(-1)
        ).sum() / len(e.law)

    return other


def _kl_in_both(advantage: Callable[..., Tensor], temperature: str) -> Callable[..., Tensor]:
    """-E[(advantage - beta log pi/ref) log pi] differentiated through both factors."""

    def other(e: Expected, **parameters: float) -> Tensor:
        ratio = 2 * e.score - e.reference
        return e.surrogate(advantage(e, **parameters) - parameters[temperature] * ratio)

    return other


def _scaled_reward(e: Expected, *, beta: float) -> Tensor:
    p = e.law.exp()
    mean = (p * e.reward).sum(1, keepdim=True)
    deviation = (p * (e.reward - mean) ** 2).sum(1, keepdim=True).sqrt()
    return e.surrogate((e.reward - mean) / deviation - beta * (e.score - e.reference))


def _anchored(which: str) -> Callable[..., Tensor]:
    def other(e: Expected, *, tau: float, eta: float) -> Tensor:
        share = {"reference": 1.0, "previous": 0.0, "swapped": 1 - eta * tau}[which]
        anchor = share * e.reference + (1 - share) * e.previous
        return (e.drawn(e.drawer) * (_margins(e.score, anchor) - eta / 2) ** 2).sum()

    return other


def _rewarded(e: Expected, **_: float) -> Tensor:
    return e.reward


def _winning(e: Expected, *, share: float, **_: float) -> Tensor:
    return e.wins(e.opponent(share))


VIEWS = {
    "token_mean": ("mean", "log-probabilities are averaged over tokens, where they should be summed"),
    "no_end": ("no_end", "EOS not scored: the end token is not in the completion's mask"),
    "no_first": ("no_first", "the first token of the completion is not scored"),
    "no_last": ("no_last", "the last token of every completion is not scored"),
}
ANCHORS = {
    "reference_is_policy": (
        "follows",
        "reference equals policy: it follows the policy while it is trained (adapter still on, or shared weights)",
    ),
    "reference_is_start": ("start", "the reference is the policy as it was when training began"),
    "reference_is_base": ("base", "the reference is the base model without its adapter"),
    "no_reference": ("none", "the reference is left out: its log-probabilities are zero"),
}
SCALES = (0.1, 0.2, 0.5, 2.0, 5.0, 10.0)


def faults(objective: Objective, parameters: Mapping[str, float]) -> list[Fault]:
    """Those that a run of this objective can show, the plainest first."""
    name, beta = objective.temperature, parameters[objective.temperature]
    sign = (
        "the reward's sign is turned" if objective.kind == "rewards" else "winners and losers are exchanged"
    )
    found = [Fault("labels_exchanged", sign, loss=_exchanged(objective.loss))]
    found += [Fault(n, cause, view=view) for n, (view, cause) in VIEWS.items()]
    follows = objective.kind == "comparisons" or objective.name in ("online_dpo", "inpo")
    for n, (where, cause) in ANCHORS.items():
        if where != "follows" or follows:  # else it is the same as having no KL
            found.append(Fault(n, cause, reference=where))
    judged = {"kl_policy_gradient": _rewarded, "nash_md": _winning}.get(objective.name)
    if judged is not None:

        def bare(e: Expected, **p: float) -> Tensor:
            return e.surrogate(judged(e, **p))

        none = "there is no KL gradient: its weight is 0, the reference follows the policy, or k1 is taken for a loss"
        joint = "the KL term is not detached: the log-ratio in the advantage is differentiated, too"
        frozen = "KL has the state-frozen gradient: each token pays for its own log-ratio alone"
        k3 = "the KL is the estimator k3 of each token as a loss: its gradient is the forward KL's"
        found += [
            Fault("kl_none", none, loss=bare),
            Fault("kl_frozen", frozen, loss=_frozen(judged, name)),
            Fault("kl_k3", k3, loss=_kl_by_k3(judged, name)),
            Fault("kl_joint", joint, loss=_kl_in_both(judged, name)),
        ]
    if objective.name == "kl_policy_gradient":
        cause = "rewards are divided by their standard deviation, and the KL is not"
        found.append(Fault("reward_std", cause, loss=_scaled_reward))
    if objective.name == "nash_md":
        share = parameters["share"]
        found += [
            Fault("mixture_swapped", "mixture weights swapped", changes={"share": 1 - share}),
            Fault(
                "opponent_is_policy",
                "the opponent is the policy itself, not the mixture",
                changes={"share": 0},
            ),
            Fault(
                "opponent_is_reference",
                "the opponent is the reference, not the mixture",
                changes={"share": 1},
            ),
        ]
    if objective.name == "inpo":
        found += [
            Fault(
                "previous_missing",
                "the round's policy is missing from the anchor",
                loss=_anchored("reference"),
            ),
            Fault(
                "reference_missing", "the reference is missing from the anchor", loss=_anchored("previous")
            ),
            Fault("mixture_swapped", "mixture weights swapped", loss=_anchored("swapped")),
        ]
    if objective.name in ("dpo", "ipo"):
        other = OBJECTIVES["ipo" if objective.name == "dpo" else "dpo"]

        def instead(e: Expected, **_: float) -> Tensor:
            return other.loss(e, **{other.temperature: beta})

        found.append(Fault(f"{other.name}_instead", f"the loss is {other.name.upper()}'s", loss=instead))
    for scale in SCALES:
        if objective.name == "inpo" and beta * scale * parameters["eta"] > 1:
            continue  # the anchor's weights would leave [0, 1]
        cause = f"{name} is {beta * scale:g}, where {beta:g} is asked for"
        found.append(Fault(f"{name}_other", cause, changes={name: beta * scale}))
    return found


# ---- exact runs ------------------------------------------------------------------------------------------------------


def exact_laws(world: ModelWorld, model: Any) -> Tensor:
    """log of the next token's law after every prefix, (prompts, prefixes, V), with gradients; no padding, no cache."""
    import torch

    long = list(itertools.product(world.spoken, repeat=world.horizon - 1))
    row = [next(i for i, w in enumerate(long) if w[: len(p)] == p) for p in world.prefixes]
    found = []
    for x in world.prompts:
        ids = torch.tensor([[*x, *w] for w in long])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
        logits = logits_of(out)[:, len(x) - 1 :]
        found.append(logits[row, [len(p) for p in world.prefixes]])
    return torch.stack(found).log_softmax(-1)


def _tokens(world: ModelWorld, laws: Tensor) -> Tensor:
    """(prompts, C, H) log-probabilities of the tokens, 0 where there is none."""
    import torch

    at, token, live = world._steps
    return laws[:, at, token].masked_fill(~torch.as_tensor(live), 0.0)


def _viewed(world: ModelWorld, tokens: Tensor, view: str) -> Tensor:
    import torch

    if view == "sum":
        return tokens.sum(-1)
    live = torch.as_tensor(world._steps[2])
    length = live.sum(-1)
    if view == "mean":
        return tokens.sum(-1) / length
    place = torch.arange(tokens.shape[-1])
    out = place == 0 if view == "no_first" else place == (length - 1)[:, None]
    if view == "no_end":
        out = out & torch.tensor([y[-1] == world.end for y in world.completions])[:, None]
    return tokens.masked_fill(out, 0.0).sum(-1)


def rate_at(task: Task, step: int) -> float:
    return task.learning_rate * (1 - step / task.steps if task.schedule == "linear" else 1)


def exact_run(problem: Problem, task: Task, fault: Fault | None = None, steps: int | None = None) -> Array:
    """log pi after 0, 1, ..., steps steps with the expected gradient, (steps + 1, prompts, C)."""
    import torch

    world, fault = problem.world, fault or Fault("none", "")
    loss = fault.loss or problem.objective.loss
    parameters = {**problem.parameters, **fault.changes}
    model = world.model("policy").double().eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser: Any = torch.optim.SGD(weights, lr=1.0)
    if task.optimiser == "adamw":
        optimiser = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.0)
    anchor = {"follows": "reference", "start": "policy", "none": "reference"}.get(
        fault.reference, fault.reference
    )
    fixed = _tokens(world, torch.as_tensor(world.laws(anchor)))
    if fault.reference == "none":
        fixed = torch.zeros_like(fixed)
    found, drawer, before = [], None, None
    for step in range((task.steps if steps is None else steps) + 1):
        laws = exact_laws(world, model)
        tokens = _tokens(world, laws)
        law = tokens.detach().sum(-1)
        found.append(law.numpy())
        if step == (task.steps if steps is None else steps):
            break
        if step % task.round_steps == 0 or drawer is None or before is None:
            drawer, before = law, tokens.detach()
        own, reference = laws.detach(), fixed if fault.reference != "follows" else tokens.detach()

        def opponent(share: float, own: Tensor = own) -> Tensor:
            both = mix(own.numpy(), world.laws("reference"), share)
            return torch.as_tensor(world.law_of(both))

        expected = Expected(
            problem,
            _viewed(world, tokens, fault.view),
            _viewed(world, reference, fault.view),
            _viewed(world, before, fault.view),
            law,
            drawer,
            tokens,
            reference,
            opponent,
        )
        optimiser.zero_grad()
        loss(expected, **parameters).backward()
        for group in optimiser.param_groups:
            group["lr"] = rate_at(task, step)
        optimiser.step()
    return np.stack(found)


# ---- the task of a trainer -------------------------------------------------------------------------------------------


def asked_objective(trainer: Any) -> tuple[Objective, dict[str, float]]:
    """What the adapter says that `train` descends, and the parameters."""
    name = str(getattr(trainer, "against", "dpo"))
    if name not in OBJECTIVES:
        raise ValueError(f"the trainer is against {name!r}; objectives of runs are {', '.join(OBJECTIVES)}")
    objective, given = OBJECTIVES[name], dict(getattr(trainer, "parameters", {}))
    unknown = [n for n in given if n not in objective.parameters]
    if unknown:
        takes = ", ".join(objective.parameters)
        raise ValueError(f"{name} has no parameter {unknown[0]!r}; it takes {takes}")
    return objective, {**objective.parameters, **{n: float(v) for n, v in given.items()}}


def problem_of(world: ModelWorld, trainer: Any) -> Problem:
    objective, parameters = asked_objective(trainer)
    return Problem(world, objective, MappingProxyType(parameters))


def make_task(
    problem: Problem,
    seed: int,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    rows: int | None = None,
    optimiser: Literal["sgd", "adamw"] = "sgd",
    schedule: Literal["constant", "linear"] = "constant",
    stride: float = STRIDE,
    round_steps: int = 1,
) -> Task:
    """A task with fresh draws; `stride` nats is what the first exact step moves log-probabilities by."""
    objective, world = problem.objective, problem.world
    offline = objective.kind == "comparisons"
    task = Task(
        objective.name,
        problem.parameters,
        steps,
        batch,
        _rate(problem, optimiser) * stride,
        optimiser,
        schedule,
        comparisons=problem.comparisons(rows or steps * batch, seed) if offline else (),
        prompts=() if offline else world.prompts,
        reward=problem.ask_reward if objective.kind == "rewards" else None,
        preference=problem.ask_preference if objective.kind == "preferences" else None,
        horizon=world.horizon,
        round_steps=round_steps if objective.name == "inpo" else 1,
    )
    return task


def _rate(problem: Problem, optimiser: Literal["sgd", "adamw"]) -> float:
    """The learning rate by which the first exact step moves log-probabilities by one nat, root mean square."""
    small = 1e-6
    task = Task(problem.objective.name, problem.parameters, 1, 1, small, optimiser)
    before, after = exact_run(problem, task)
    moved = float(np.sqrt(np.mean((after - before) ** 2)))
    if not 0 < moved < math.inf:
        raise ValueError(
            f"{problem.objective.name} does not move the policy of this world: {moved} nats a step"
        )
    return small / moved


def policy_law(trainer: Any, world: ModelWorld, role: str = "policy") -> Array:
    """The trainer's log pi(y|x) of all completions, (prompts, C)."""
    options = variants(trainer, "log_probabilities")[0]
    P, C = len(world.prompts), len(world.completions)
    prompts = [list(x) for x in world.prompts for _ in range(C)]
    completions = [list(y) for _ in range(P) for y in world.completions]
    return scored(trainer, prompts, completions, role, **options).reshape(P, C)


# ---- the level -------------------------------------------------------------------------------------------------------


def divergence(p: Array, q: Array) -> float:
    """KL(p, q) of log-laws (prompts, C), the mean over prompts."""
    return float((np.exp(p) * (p - q)).sum(1).mean())


@dataclass(frozen=True, eq=False)
class Deviations:
    """Coordinates (seeds, K) of the runs' deviations from an exact run; t-tests of their means."""

    names: tuple[str, ...]
    coordinates: Array

    @property
    def p_values(self) -> Array:
        from scipy.stats import t as student

        S = len(self.coordinates)
        mean, spread = self.coordinates.mean(0), self.coordinates.std(0, ddof=1) / math.sqrt(S)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(spread > 0, np.abs(mean) / spread, np.where(np.abs(mean) > 1e-9, np.inf, 0.0))
        return np.asarray(2 * student.sf(t, S - 1))

    def half_width(self, alpha: float) -> Array:
        """Of the interval at 1 - alpha, all coordinates together: what is not seen."""
        from scipy.stats import t as student

        S, K = self.coordinates.shape
        spread = self.coordinates.std(0, ddof=1) / math.sqrt(S)
        return np.asarray(student.isf(alpha / (2 * K), S - 1) * spread)


COARSE = 6  # steps of the runs that only give directions


def directions(problem: Problem, task: Task) -> dict[str, Array]:
    """Where the exact run leads, "pace", and where exact runs with faults lead besides, by a few long steps each."""
    coarse = replace(
        task,
        steps=COARSE,
        learning_rate=task.learning_rate * task.steps / COARSE,
        round_steps=max(1, round(task.round_steps * COARSE / task.steps)),
    )
    right = exact_run(problem, coarse)
    found = {"pace": right[-1] - right[0]}
    size = np.linalg.norm(found["pace"])
    for k, fault in enumerate(faults(problem.objective, problem.parameters)):
        v = exact_run(problem, coarse, fault)[-1] - right[-1]
        if np.isfinite(v).all() and np.linalg.norm(v) > 1e-3 * size:
            found[f"{k} {fault.name}"] = v
    return found


def deviations(laws: Array, centre: Array, along: Mapping[str, Array]) -> Deviations:
    """laws (seeds, prompts, C)."""
    away = (laws - centre).reshape(len(laws), -1)
    v = np.array([x.reshape(-1) for x in along.values()])
    return Deviations(tuple(along), away @ v.T / (v**2).sum(1))


def sampled_runs(
    make: Callable[[ModelWorld], Any], problem: Problem, seeds: int, seed: int, **task: Any
) -> tuple[Task, Array]:
    """log pi after training, (seeds, prompts, C), and the last of the tasks."""
    found = []
    for s in range(seeds):
        trainer = make_trainer(make, problem.world)
        this = make_task(problem, 1000 * seed + s, **task)
        trained(trainer, this, 1000 * seed + s, **variants(trainer, "train")[0])
        found.append(policy_law(trainer, problem.world))
    return this, np.stack(found)


def run_level(
    make: Callable[[ModelWorld], Any],
    problem: Problem,
    *,
    seeds: int = SEEDS,
    seed: int = 0,
    alpha: float = 0.001,
    steps: int = STEPS,
) -> list[Finding]:
    """seeds: so many runs."""
    task, laws = sampled_runs(make, problem, seeds, seed, steps=steps, round_steps=max(1, steps // 8))
    start = problem.world.law("policy")
    title = f"run: {problem.objective.name}"
    plain = _plainly_wrong(laws, start, problem.objective.kind != "comparisons")
    if plain is not None:
        name, cause, text = plain
        return [Finding(Check(title, 5, "fail", text), name, cause)]
    exact, best = exact_run(problem, task), problem.optimum()
    along = directions(problem, task)
    found = deviations(laws, exact[-1], along)
    far = holm(found.p_values.tolist(), alpha)
    K = len(along)
    numbers = {
        "kl_start": divergence(best, start),
        "kl_exact": divergence(best, exact[-1]),
        "kl_runs": float(np.mean([divergence(best, x) for x in laws])),
        "kl_mean": divergence(best, np.asarray(log_softmax(laws.mean(0), axis=1))),
        "pace": 1 + float(found.coordinates[:, 0].mean()),
        "pace_seen": float(found.half_width(alpha)[0]),
        "p": float(min(1.0, K * found.p_values.min())),
    }
    words = (
        f"KL(optimum, policy) from {numbers['kl_start']:.3g} to {numbers['kl_runs']:.3g} in {seeds} runs of "
        f"{task.steps} steps (exact run {numbers['kl_exact']:.3g}); they get {numbers['pace']:.3f} of the exact run's "
        f"way, known to {numbers['pace_seen']:.2g}; p = {numbers['p']:.2g}"
    )
    if not any(far):
        return [Finding(Check(title, 5, "pass", words, numbers))]
    check = Check(title, 5, "fail", f"another way than the exact run's: {words}", numbers)
    return [Finding(check, *explain_run(problem, task, laws, along))]


def _plainly_wrong(laws: Array, start: Array, draws: bool) -> tuple[str, str, str] | None:
    if not np.isfinite(laws).all():
        bad = int(np.flatnonzero(~np.isfinite(laws).all((1, 2)))[0])
        text = f"after run {bad} log-probabilities are not finite"
        return "not_finite", "training diverges: weights or log-probabilities are not finite", text
    if np.abs(laws - start).max() < 1e-9:
        cause = "nothing is trained: the optimiser holds other weights than those that are scored, or makes no step"
        return "nothing_trained", cause, "after training the policy is what it was"
    if draws and len(laws) > 1 and np.abs(laws - laws[0]).max() < 1e-12:
        cause = "the seed is ignored: runs with different seeds end with the same policy"
        return "seed_ignored", cause, "all runs end with the same policy"
    return None


def nearest_on(run: Array, law: Array) -> tuple[float, Array]:
    """After how many steps (n - 1 of them, between them in a straight line) a run (n, ...) is nearest to `law`."""
    found = []
    for k, (a, b) in enumerate(pairwise(run)):
        way = (b - a).ravel()
        share = float(np.clip((law - a).ravel() @ way / max(way @ way, 1e-300), 0, 1))
        point = a + share * (b - a)
        found.append((float(np.linalg.norm(law - point)), k + share, point))
    _, steps, point = min(found, key=lambda row: row[0])
    return steps, point


def explain_run(
    problem: Problem, task: Task, laws: Array, along: Mapping[str, Array], most: int = 8
) -> tuple[str | None, str, tuple[Match, ...]]:
    """The fault whose exact run is not rejected and is nearest; of the likeliest `most` the whole runs are made."""
    exact = exact_run(problem, task, steps=4 * task.steps)
    mean = laws.mean(0)
    known = faults(problem.objective, problem.parameters)
    rough = {
        name: float(np.linalg.norm(mean - exact[task.steps] - v))
        for name, v in along.items()
        if name != "pace"
    }
    likely = [known[int(name.split()[0])] for name in sorted(rough, key=rough.__getitem__)[:most]]
    # The right way, but further along it, or less far.
    steps, end = nearest_on(exact, mean)
    pace = f"the run gets {steps / task.steps:.2g} times as far as it should: the learning rate, its schedule, the "
    pace += "number of steps, or accumulated gradients that are added where they should be averaged"
    ends = [("pace", pace, end)]
    ends += [(f.name, f.cause, exact_run(problem, task, f)[-1]) for f in likely]
    noise = float(np.sqrt(((laws - mean) ** 2).sum() / (len(laws) * (len(laws) - 1))))
    ranked = []
    for name, cause, end in ends:
        if np.isfinite(end).all():
            gap = float(np.linalg.norm(mean - end))
            p = float(deviations(laws, end, along).p_values.min()) * len(along)
            ranked.append((p < NAMED or gap > 5 * noise, gap, name, cause))
    ranked.sort(key=lambda row: row[:2])
    whole = float(np.linalg.norm(mean - exact[0]))
    near: dict[str, float] = {}
    for _, gap, name, _ in sorted(ranked, key=lambda row: row[1]):
        near.setdefault(name, gap / whole)
    nearest = tuple(Match(name, far, 1.0) for name, far in list(near.items())[:4])
    if ranked and not ranked[0][0]:
        return ranked[0][2], ranked[0][3], nearest
    return None, "none of the catalogue's: another objective, or two faults at once", nearest


def fault_names(objective: str) -> Iterator[str]:
    """What a run of the objective can be found to do."""
    known = OBJECTIVES[objective]
    yield from ("pace", *dict.fromkeys(f.name for f in faults(known, known.parameters)))
