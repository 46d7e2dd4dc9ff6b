r"""The objectives that a trainer can be held to: exact gradient and optimum, from the package's own methods.

A target is enumerated over the responses of the tree with their exact probabilities; it sees no batch, no token
and no mask, so that it is a second route to what a trainer computes. Its optimum is a closed form where the paper has
one; the others are the minimum of the exact loss, certified by its gradient (`optimisation.fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import log_softmax

from ...algorithms.dpo import dpo_loss
from ...algorithms.inpo import inpo_loss
from ...algorithms.ipo import ipo_loss
from ...algorithms.kl_policy_gradient import objective
from ...algorithms.optimisation import fit, gather
from ...algorithms.optimisation.losses import check_positive, check_share
from ...algorithms.sppo import sppo_loss
from ...algorithms.xpo import check_bonus
from ...envs.kernels import Array
from .world import TOTAL, ExactWorld

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["pairs", "exploring", "samples", "previous"]


@dataclass(frozen=True, eq=False)
class Setting:
    """A target in a world with its parameters.

    exact    log-probabilities of all responses (prompts * L,), differentiable -> what is minimised (for samples, a
             function with the exact gradient at that point)
    optimum  (prompts * L,) log pi*, None where none is found (optimism too strong to have one)
    general  pairs: whether the preferences have no reward behind them
    reward, P   what samples are judged by, (prompts, L) and (prompts, L, L)
    """

    exact: Callable[[Tensor], Tensor]
    optimum: Array | None
    general: bool
    reward: Array
    P: Array


@dataclass(frozen=True)
class Target:
    """An objective by name.

    kind      what a trainer of it is fed: "pairs"; "exploring", pairs of XPO; "samples" of the policy, in groups;
              responses of "previous" = pi_t
    defaults  its parameters, by the names of the paper, with the values that `conform` takes when none is given
    """

    name: str
    title: str
    kind: Kind
    defaults: Mapping[str, float]
    build: Callable[..., Setting]

    def checked(self, given: Mapping[str, Any]) -> dict[str, float]:
        unknown = sorted(set(given) - set(self.defaults))
        if unknown:
            takes = ", ".join(self.defaults) or "no parameters"
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}; it takes {takes}")
        return {name: float(given.get(name, value)) for name, value in self.defaults.items()}


# ---- pieces ------------------------------------------------------------------------------------------------------


def _log(counts: Array) -> Array:
    return np.log(np.asarray(counts) / TOTAL).reshape(-1)


def _gibbs(world: ExactWorld, logits: Array) -> Array:
    return np.asarray(log_softmax(logits.reshape(world.table.prompts, -1), axis=1).reshape(-1))


def _win_rates(world: ExactWorld) -> Array:
    """P(y > pi_t), (prompts * L,), of the general game."""
    return np.einsum("xij,xj->xi", world.general, world.previous / TOTAL).reshape(-1)


def _no_samples(world: ExactWorld) -> tuple[Array, Array]:
    return np.zeros((world.table.prompts, world.responses)), world.general


def _found(world: ExactWorld, loss: Callable[[Tensor], Tensor]) -> Array | None:
    try:
        found = fit(loss, world.table, _log(world.reference), tolerance=1e-11)
    except ArithmeticError:
        return None
    return world.table.log_probabilities(found.theta).numpy()


def _pairs(
    world: ExactWorld,
    loss: Callable[..., Tensor],
    *,
    general: bool,
    optimum: Array | None,
    previous: bool = False,
) -> Setting:
    """loss(policy, reference, [previous,] preferred, weight, log_probabilities of all)."""
    import torch

    population = world.population(general)
    p, w = population.tensors()
    anchors = [torch.as_tensor(_log(world.reference))]
    if previous:
        anchors.append(torch.as_tensor(_log(world.previous)))
    given = [gather(x, population) for x in anchors]

    def exact(lp: Tensor) -> Tensor:
        return loss(gather(lp, population), *given, p, w, lp)

    best = _found(world, exact) if optimum is None else optimum
    return Setting(exact, best, general, *_no_samples(world))


# ---- objectives of comparisons -------------------------------------------------------------------------------------


def _dpo(world: ExactWorld, *, beta: float, label_smoothing: float) -> Setting:
    closed = None
    if label_smoothing == 0:
        rewards = np.log(world.strengths).reshape(-1)
        closed = _gibbs(world, _log(world.reference) + rewards / check_positive(beta, "beta"))
    return _pairs(
        world,
        lambda pi, ref, p, w, _: dpo_loss(pi, ref, p, w, beta=beta, label_smoothing=label_smoothing),
        general=False,
        optimum=closed,
    )


def _ipo(world: ExactWorld, *, tau: float) -> Setting:
    best = _gibbs(world, _log(world.reference) + _win_rates(world) / check_positive(tau, "tau"))
    return _pairs(
        world, lambda pi, ref, p, w, _: ipo_loss(pi, ref, p, w, tau=tau), general=True, optimum=best
    )


def _inpo(world: ExactWorld, *, tau: float, eta: float) -> Setting:
    share = check_share(eta * tau, "eta tau")
    anchor = share * _log(world.reference) + (1 - share) * _log(world.previous)
    return _pairs(
        world,
        lambda pi, ref, prev, p, w, _: inpo_loss(pi, ref, prev, p, w, tau=tau, eta=eta),
        general=True,
        optimum=_gibbs(world, anchor + eta * _win_rates(world)),
        previous=True,
    )


def _rpo(world: ExactWorld, *, beta: float, eta: float) -> Setting:
    def loss(pi: Tensor, ref: Tensor, p: Tensor, w: Tensor, _: Tensor) -> Tensor:
        imitation = (w * (p * pi[:, 0] + (1 - p) * pi[:, 1])).sum()
        return dpo_loss(pi, ref, p, w, beta=beta) - eta * beta * imitation

    return _pairs(world, loss, general=False, optimum=None)


def _vpo(world: ExactWorld, *, beta: float, alpha: float, sign: float) -> Setting:
    import torch

    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}; it is 1 (online, optimism) or -1 (offline, pessimism)")
    law = torch.as_tensor(world.reference / world.reference.sum()).reshape(-1)

    def loss(pi: Tensor, ref: Tensor, p: Tensor, w: Tensor, lp: Tensor) -> Tensor:
        return dpo_loss(pi, ref, p, w, beta=beta) + sign * alpha * beta * (law * lp).sum()

    return _pairs(world, loss, general=False, optimum=None)


def _xpo(world: ExactWorld, *, beta: float, alpha: float) -> Setting:
    """By win rates: the mean of alpha log pi(y~) and of -P log s(h) - (1 - P) log s(-h) over all y and y~, L x L."""
    import torch
    from torch.nn.functional import softplus

    beta, alpha = check_positive(beta, "beta"), check_bonus(alpha)
    prompts, L = world.table.prompts, world.responses
    P = torch.as_tensor(world.preferences(False))
    y, drawn = (torch.as_tensor(counts / TOTAL) for counts in (world.previous, world.reference))
    log_ref = torch.as_tensor(_log(world.reference)).reshape(prompts, L)

    def exact(lp: Tensor) -> Tensor:
        rows = lp.reshape(prompts, L)
        reward = beta * (rows - log_ref)
        margin = reward[:, :, None] - reward[:, None, :]
        comparison = torch.einsum("xi,xj,xij->", y, drawn, softplus(-margin) + (1 - P) * margin)
        return (comparison + alpha * (drawn * rows).sum()) / prompts

    return Setting(exact, _found(world, exact), False, *_no_samples(world))


# ---- objectives of single responses --------------------------------------------------------------------------------


def _sppo(world: ExactWorld, *, eta: float) -> Setting:
    import torch

    previous, wins = torch.as_tensor(_log(world.previous)), torch.as_tensor(_win_rates(world))
    law = previous.exp() / world.table.prompts

    def exact(lp: Tensor) -> Tensor:
        return sppo_loss(lp, previous, wins, law, eta=eta)

    return Setting(exact, _found(world, exact), True, *_no_samples(world))


def _kl_policy_gradient(world: ExactWorld, *, beta: float) -> Setting:
    import torch

    r = world.reward_of(check_positive(beta, "beta"))
    reward, reference = torch.as_tensor(r).reshape(-1), torch.as_tensor(_log(world.reference))

    def exact(lp: Tensor) -> Tensor:
        return -objective(lp, reference, reward, beta=beta, prompts=world.table.prompts)

    return Setting(exact, _log(world.optimum), False, r, world.general)


def _nash_md_pg(world: ExactWorld, *, tau: float, share: float) -> Setting:
    import torch

    share = check_share(share, "share")
    game = world.game_of(check_positive(tau, "tau"), share)
    P, prompts = torch.as_tensor(game), world.table.prompts
    reference = torch.as_tensor(_log(world.reference)).reshape(prompts, -1)

    def exact(lp: Tensor) -> Tensor:
        rows = lp.reshape(prompts, -1)
        mixture = ((1 - share) * rows.detach() + share * reference).softmax(1)
        wins = torch.einsum("xij,xj->xi", P, mixture)
        return -(rows.exp() * (wins - tau * (rows - reference))).sum() / prompts

    zero = np.zeros((prompts, world.responses))
    return Setting(exact, _log(world.optimum), True, zero, game)


def _kl(world: ExactWorld) -> Setting:
    import torch

    reference = torch.as_tensor(_log(world.reference))

    def exact(lp: Tensor) -> Tensor:
        return (lp.exp() * (lp - reference)).sum() / world.table.prompts

    zero = np.zeros((world.table.prompts, world.responses))
    return Setting(exact, _log(world.reference), False, zero, world.general)


def _target(name: str, title: str, kind: Kind, build: Callable[..., Setting], **defaults: float) -> Target:
    return Target(name, title, kind, MappingProxyType(defaults), build)


TARGETS = {
    target.name: target
    for target in (
        _target("dpo", "DPO, with label smoothing cDPO", "pairs", _dpo, beta=0.1, label_smoothing=0.0),
        _target("ipo", "IPO", "pairs", _ipo, tau=0.1),
        _target("inpo", "INPO", "pairs", _inpo, tau=0.1, eta=2.0),
        _target("rpo", "RPO: DPO with imitation of the chosen", "pairs", _rpo, beta=0.1, eta=0.5),
        _target("vpo", "VPO, offline (-1) or online (1)", "pairs", _vpo, beta=0.1, alpha=0.5, sign=-1.0),
        _target(
            "xpo", "XPO: DPO with optimism on the reference's draws", "exploring", _xpo, beta=0.1, alpha=0.001
        ),
        _target("sppo", "SPPO", "previous", _sppo, eta=1.0),
        _target("kl_policy_gradient", "reward with a KL penalty", "samples", _kl_policy_gradient, beta=0.1),
        _target("nash_md_pg", "Nash-MD-PG", "samples", _nash_md_pg, tau=0.1, share=0.25),
        _target("kl", "KL(pi, ref) alone", "samples", _kl),
    )
}
