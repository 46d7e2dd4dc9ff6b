r"""RLHF by exact KL-regularised policy gradient: the objective, its score-function gradient, its natural step.

The objective of InstructGPT-style RLHF (Ziegler et al., arXiv 1909.08593; Ouyang et al., NeurIPS 2022) for rewards r,
reference ref and beta > 0, the mean over prompts of

  J(pi) = E_{y ~ pi}[r(y) - beta log pi(y)/ref(y)] = beta log Z - beta KL(pi, pi*)                       `objective`
  pi*   = ref exp(r / beta) / Z                                                          `kl_bayes.posterior`
  a(y)  = r(y) - beta log pi(y)/ref(y),    grad J = E_pi[sg[a - b] grad log pi]          `policy_gradient_loss`
        = E_pi[sum_t sg[r - beta sum_{s >= t} log pi/ref(y_s)] grad log pi(y_t)]         `reward_to_go_loss`

sg[.] is held constant: the penalty belongs to the reward, and its own derivative has expectation 0. b is any constant
of the prompt. The second form leaves out the penalties of tokens already written, which a token cannot change.

Natural gradient (Kakade, NIPS 2001; Cen et al., Operations Research 2022), with the step eta, eta beta <= 1:

  table of responses   pi^+ ∝ pi^{1 - eta beta} ref^{eta beta} exp(eta r)                                `natural_step`
  tree of tokens       pi_h^+ ∝ pi_h^{1 - eta beta} ref_h^{eta beta} exp(eta Q_h)                  `token_natural_step`

where Q_h(prefix, token) is what r - beta log pi/ref of the later tokens adds up to on average. On the table
log pi/pi* shrinks by exactly 1 - eta beta a step, so that eta = 1/beta ends at once; on the tree it ends after H steps,
the last token being right first.

Guarantees. Where pi > 0, grad J = 0 only at pi*, on a table and on a tree alike; `solve` runs to that point. By
Hoeffding's lemma the advantages of any policy are a certificate: J(pi*) - J(pi) <= (max a - min a)^2 / (8 beta)
(`gap_bound`). On a table of one prompt a = g / pi up to a constant, g = grad J, so that
J(pi*) - J(pi) <= |g|^2 / (4 beta min pi^2): gradient ascent converges linearly while min pi stays away from 0.

Log-probabilities are those of all responses (prompts * responses,), as the tables of `optimisation` give them; rewards
are finite; beta > 0 in units of reward. Estimates that are not exact gradients are the subject of `kl_estimators`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .optimisation import Minimum, PrefixTree, Table, fit
from .optimisation.losses import average, check_positive
from .planning.sequences import leaf_blocks
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


# ---- the objective and its gradient ----------------------------------------------------------------------------------


def objective(policy: Tensor, reference: Tensor, rewards: Tensor, *, beta: float, prompts: int = 1) -> Tensor:
    """J from the log-probabilities of all responses; differentiable in `policy`, the mean over prompts."""
    advantage = rewards - check_positive(beta, "beta") * (policy - reference.detach())
    return (policy.exp() * advantage).sum() / prompts


def on_policy(policy: Tensor, prompts: int = 1) -> Tensor:
    """The weight of every response when responses are drawn from the policy and all of them are listed: a constant."""
    return policy.detach().exp() / prompts


def policy_gradient_loss(
    policy: Tensor,
    reference: Tensor,
    reward: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
    baseline: float = 0.0,
) -> Tensor:
    """-E[sg[r - beta log pi/ref - baseline] log pi], whose gradient is -grad J; its value means nothing.

    Responses (...,) drawn from the policy itself, sums of token log-probabilities; weight None where they were sampled,
    `on_policy` where they are all listed.
    """
    ratio = policy.detach() - reference.detach()
    advantage = reward - check_positive(beta, "beta") * ratio - baseline
    return -average(advantage * policy, weight)


def reward_to_go_loss(
    policy: Tensor, reference: Tensor, reward: Tensor, weight: Tensor | None = None, *, beta: float
) -> Tensor:
    """The same expected gradient from token log-probabilities (..., T), 0 after the end; reward (...,) of responses."""
    ratio = policy.detach() - reference.detach()
    to_go = ratio.flip(-1).cumsum(-1).flip(-1)
    advantage = reward[..., None] - check_positive(beta, "beta") * to_go
    return -average((advantage * policy).sum(-1), weight)


def gap_bound(
    log_policy: ArrayLike, log_reference: ArrayLike, rewards: ArrayLike, beta: float, prompts: int = 1
) -> float:
    """At least J(pi*) - J(pi): the mean over prompts of (max a - min a)^2 / (8 beta), a = r - beta log pi/ref."""
    log_pi, log_ref, r = (np.asarray(x, dtype=np.float64) for x in (log_policy, log_reference, rewards))
    advantage = (r - check_positive(beta, "beta") * (log_pi - log_ref)).reshape(prompts, -1)
    return float((np.ptp(advantage, axis=1) ** 2).mean() / (8 * beta))


# ---- to the optimum --------------------------------------------------------------------------------------------------


def _checked(table: Table, rewards: ArrayLike, log_reference: ArrayLike) -> tuple[Array, Array]:
    n = table.prompts * table.responses
    r, ref = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (rewards, log_reference))
    for name, x in (("rewards", r), ("log_reference", ref)):
        if x.shape != (n,):
            raise ValueError(f"{name} has {x.size} entries; the table has {n} responses")
        if not np.isfinite(x).all():
            i = int(np.flatnonzero(~np.isfinite(x))[0])
            raise ValueError(f"{name}[{i}] is {x[i]}; it must be finite")
    return r, ref


def solve(
    table: Table,
    rewards: ArrayLike,
    log_reference: ArrayLike,
    beta: float,
    *,
    start: Array | None = None,
    tolerance: float = 1e-10,
) -> Minimum:
    """The stationary point of J from `start` (log-probabilities; None = the reference), by exact gradients.

    The answer's value is -J and its gradient the certificate, max |dJ/dtheta| in the table's own parameters.
    """
    import torch

    r, ref = _checked(table, rewards, log_reference)
    first, anchor = torch.as_tensor(r), torch.as_tensor(ref)

    def loss(log_pi: Tensor) -> Tensor:
        return -objective(log_pi, anchor, first, beta=beta, prompts=table.prompts)

    return fit(loss, table, ref if start is None else start, tolerance=tolerance)


def ascend(
    table: Table,
    theta: Tensor,
    rewards: ArrayLike,
    log_reference: ArrayLike,
    beta: float,
    *,
    eta: float,
    steps: int,
) -> Tensor:
    """`steps` of plain gradient ascent, theta + eta grad J, by the gradient of `policy_gradient_loss`."""
    import torch

    r, ref = _checked(table, rewards, log_reference)
    reward, anchor = torch.as_tensor(r), torch.as_tensor(ref)
    check_positive(eta, "eta")
    theta = theta.detach().clone()
    for _ in range(steps):
        theta.requires_grad_(True)
        log_pi = table.log_probabilities(theta)
        loss = policy_gradient_loss(log_pi, anchor, reward, on_policy(log_pi, table.prompts), beta=beta)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() - eta * gradient
    return theta


# ---- natural steps ---------------------------------------------------------------------------------------------------


def _check_step(eta: float, beta: float) -> None:
    if not check_positive(eta, "eta") * check_positive(beta, "beta") <= 1 + 1e-12:
        raise ValueError(f"eta beta = {eta * beta:.4g}; it must be at most 1: take eta <= {1 / beta:.4g}")


def natural_step(
    log_policy: ArrayLike,
    log_reference: ArrayLike,
    rewards: ArrayLike,
    beta: float,
    eta: float,
    prompts: int = 1,
) -> Array:
    """log pi^+ of the table of responses, (prompts * responses,): mirror ascent in KL geometry."""
    _check_step(eta, beta)
    log_pi, log_ref, r = (np.asarray(x, dtype=np.float64) for x in (log_policy, log_reference, rewards))
    logits = ((1 - eta * beta) * log_pi + eta * beta * log_ref + eta * r).reshape(prompts, -1)
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).reshape(-1)


def token_natural_step(
    table: PrefixTree,
    theta: Tensor,
    log_reference: ArrayLike,
    rewards: ArrayLike,
    beta: float,
    eta: float,
) -> Tensor:
    """theta + eta (Q - V): a step of regularised policy iteration on the tree, at eta = 1/beta a full one.

    Q_h(prefix, token) = -beta log pi_h/ref_h + V_{h+1} with V = E_{pi_h} Q, and the reward where the response ends.
    """
    import torch

    _check_step(eta, beta)
    r, ref = _checked(table, rewards, log_reference)
    blocks, rows = leaf_blocks(table.tree), torch.as_tensor(r).reshape(table.prompts, -1)
    log_pi = table.conditionals(theta.detach())
    log_ref = table.conditionals(table.start(ref))
    below, advantages = rows[:, blocks[-1]].reshape(-1), []
    for h in reversed(range(table.tree.horizon)):
        later = torch.cat([below.reshape(-1, table.tree.branching), rows[:, blocks[h]].reshape(-1, 1)], dim=1)
        Q = later - beta * (log_pi[h] - log_ref[h])
        below = (log_pi[h].exp() * Q).sum(1)
        advantages.append((Q - below[:, None]).reshape(-1))
    return theta.detach() + eta * torch.cat(advantages[::-1])


LOSS = LossSpec(
    name="kl_policy_gradient",
    title="KL-regularised policy gradient",
    paper="Ziegler et al. (arXiv 1909.08593); Cen et al., Operations Research 2022 (arXiv 2007.06558)",
    loss=policy_gradient_loss,
)
