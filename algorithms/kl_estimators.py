r"""KL estimators in a policy gradient: which gradient each form really has.

J. Schulman's estimators of KL(pi, ref) from responses of pi ("Approximating KL Divergence", 2020), of the log-ratio
l = log pi/ref of a whole response or of one token:

  k1 = l          k2 = l^2 / 2          k3 = exp(-l) - 1 + l                                            `estimate`

E k1 = E k3 = KL(pi, ref); k2 is biased by E[l^3] / 6 to leading order. An unbiased value need not have the right
gradient. With k' the derivative in l, s the score grad log pi and sg[.] a constant, the ways to use an estimator are

  loss                k                         E[k' s]            differentiated as it stands
  reward              sg[k] log pi              E[k s]             subtracted from the reward
  corrected           (pi / sg[pi]) k           E[(k + k') s]      weighted by a ratio that is 1
  own_reward          sum_t sg[k_t] log pi(y_t)                    a token pays for itself alone
  sequence_corrected  (pi(y) / sg[pi(y)]) sum_t k_t                the tokens' estimates, the response's ratio

of whole responses ("response": l is the sum over tokens) or token by token ("token": k of each token's own l, added up;
`reward` charges a token's estimate to all tokens up to it). `FORMS` lists them with the gradient that each has,
a combination of four (`targets`):

  reverse           grad KL(pi, ref), of whole responses: what an exact method descends
  forward           grad KL(ref, pi), of whole responses
  frozen reverse    E_{y ~ sg[pi]} sum_t grad KL(pi(.|y_<t), ref(.|y_<t)): the token's divergence, prefixes held fixed
  frozen forward    E_{y ~ sg[pi]} sum_t grad KL(ref(.|y_<t), pi(.|y_<t))

reverse = frozen reverse + the change of the prefixes' law, which own-token forms miss; they agree for one token. Near
the reference all four are equal to first order in log pi/ref, which is why the differences are easily overlooked.

`joint_form` is the penalty of an open Nash-MD trainer, sum_t l_t log pi(y_t) with the log-ratio differentiated as
well: its gradient is that of frozen KL minus frozen entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .kl_policy_gradient import on_policy
from .optimisation import PrefixTree, Table
from .optimisation.losses import average
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")
LEVELS = ("response", "token")
USES = ("loss", "reward", "corrected", "own_reward", "sequence_corrected")


def _check_member(value: str, names: tuple[str, ...], what: str) -> None:
    if value not in names:
        raise ValueError(f"{what} is {value!r}; it is one of {', '.join(names)}")


def estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """k of log pi/ref, elementwise; 0 where the log-ratio is 0, so that padding adds nothing."""
    _check_member(estimator, ESTIMATORS, "estimator")
    if estimator == "k1":
        return log_ratio
    return log_ratio**2 / 2 if estimator == "k2" else (-log_ratio).expm1() + log_ratio


def kl_loss(
    policy: Tensor,
    reference: Tensor,
    weight: Tensor | None = None,
    *,
    estimator: str,
    level: str = "response",
    use: str = "loss",
) -> Tensor:
    """A surrogate whose gradient is to be that of KL(pi, ref), from responses of pi; see the module for what it is.

    policy, reference  token log-probabilities (..., T), 0 after the end
    weight             (...,) of each response: None where they were drawn, `on_policy` where all are listed
    own_reward and sequence_corrected belong to level = "token".
    """
    _check_member(level, LEVELS, "level")
    _check_member(use, USES, "use")
    tokens, ratio = policy, policy - reference.detach()
    if level == "response":
        if use in USES[3:]:
            raise ValueError(f"use {use!r} adds up the tokens' estimates; it needs level 'token'")
        tokens, ratio = tokens.sum(-1, keepdim=True), ratio.sum(-1, keepdim=True)
    k = estimate(ratio, estimator)
    if use == "reward":
        values = k.detach() * tokens.cumsum(-1)
    elif use == "own_reward":
        values = k.detach() * tokens
    elif use == "corrected":
        values = (tokens - tokens.detach()).exp() * k
    elif use == "sequence_corrected":
        whole = tokens.sum(-1, keepdim=True)
        values = (whole - whole.detach()).exp() * k
    else:
        values = k
    return average(values.sum(-1), weight)


def joint_form(
    policy: Tensor, reference: Tensor, weight: Tensor | None = None, *, detached: bool = False
) -> Tensor:
    """E sum_t l_t log pi(y_t), the log-ratio differentiated too (detached: held constant, `own_reward` with k1)."""
    ratio = policy - reference.detach()
    return average(((ratio.detach() if detached else ratio) * policy).sum(-1), weight)


# ---- on exact tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A way to use an estimator, and its expected gradient: `gradient` maps targets to coefficients (empty = zero;
    None = none of the four)."""

    estimator: str
    level: str
    use: str
    gradient: dict[str, float] | None

    @property
    def name(self) -> str:
        return f"{self.estimator}, {self.level}, {self.use}"


_REVERSE, _FORWARD = {"reverse": 1.0}, {"forward": 1.0}
_FROZEN, _FROZEN_FORWARD = {"frozen reverse": 1.0}, {"frozen forward": 1.0}

FORMS = (
    Form("k1", "response", "loss", {}),
    Form("k2", "response", "loss", _REVERSE),
    Form("k3", "response", "loss", _FORWARD),
    Form("k1", "response", "reward", _REVERSE),
    Form("k2", "response", "reward", None),
    Form("k3", "response", "reward", {"reverse": 1.0, "forward": -1.0}),
    Form("k1", "response", "corrected", _REVERSE),
    Form("k2", "response", "corrected", None),
    Form("k3", "response", "corrected", _REVERSE),
    Form("k1", "token", "loss", {}),
    Form("k2", "token", "loss", _FROZEN),
    Form("k3", "token", "loss", _FROZEN_FORWARD),
    Form("k1", "token", "reward", _REVERSE),
    Form("k2", "token", "reward", None),
    Form("k3", "token", "reward", {"reverse": 1.0, "frozen forward": -1.0}),
    Form("k1", "token", "own_reward", _FROZEN),
    Form("k2", "token", "own_reward", None),
    Form("k3", "token", "own_reward", {"frozen reverse": 1.0, "frozen forward": -1.0}),
    Form("k1", "token", "corrected", _FROZEN),
    Form("k2", "token", "corrected", None),
    Form("k3", "token", "corrected", _FROZEN),
    Form("k1", "token", "sequence_corrected", _REVERSE),
    Form("k2", "token", "sequence_corrected", None),
    Form("k3", "token", "sequence_corrected", _REVERSE),
)


def _conditionals(table: Table, theta: Tensor) -> list[Tensor]:
    """log pi(token | prefix) by layers; a table of responses is a tree of one token."""
    if isinstance(table, PrefixTree):
        return table.conditionals(theta)
    return [table.log_probabilities(theta).reshape(table.prompts, -1)]


def _along(table: Table, layers: list[Tensor]) -> Tensor:
    return table.along(layers) if isinstance(table, PrefixTree) else layers[0].reshape(-1, 1)


def _slope(value: Tensor, theta: Tensor) -> Array:
    import torch

    (gradient,) = torch.autograd.grad(value, theta, retain_graph=True)
    return gradient.numpy()


def _start(table: Table, theta: ArrayLike, log_reference: ArrayLike) -> tuple[Tensor, Tensor]:
    import torch

    x = torch.tensor(np.asarray(theta, dtype=np.float64), requires_grad=True)
    if x.shape != (table.size,):
        raise ValueError(f"theta has shape {tuple(x.shape)}; the table has {table.size} parameters")
    return x, table.start(np.asarray(log_reference, dtype=np.float64))


def gradient_table(table: Table, theta: ArrayLike, log_reference: ArrayLike) -> dict[str, Array]:
    """The expected gradient of every form, by enumeration: name -> (table.size,), the mean over prompts.

    theta          parameters of the policy, (table.size,)
    log_reference  of all responses, (prompts * responses,)
    """
    x, anchor = _start(table, theta, log_reference)
    policy = _along(table, _conditionals(table, x))
    reference = _along(table, _conditionals(table, anchor))
    weight = on_policy(policy.sum(1), table.prompts)
    found = {
        form.name: kl_loss(
            policy, reference, weight, estimator=form.estimator, level=form.level, use=form.use
        )
        for form in FORMS
    }
    found["joint form"] = joint_form(policy, reference, weight)
    return {name: _slope(value, x) for name, value in found.items()}


def targets(table: Table, theta: ArrayLike, log_reference: ArrayLike) -> dict[str, Array]:
    """The four gradients that forms are compared with, and that of frozen entropy; from exact divergences."""
    x, anchor = _start(table, theta, log_reference)
    layers, of_ref = _conditionals(table, x), _conditionals(table, anchor)
    log_pi, log_ref = table.log_probabilities(x), table.log_probabilities(anchor)
    weight = on_policy(log_pi, table.prompts)

    def frozen(values: list[Tensor]) -> Array:
        """grad of E_{y ~ sg[pi]} sum_t of a function of the prefix, (S_h,) a layer."""
        spread = [v[:, None].expand(-1, p.shape[1]) for v, p in zip(values, layers, strict=True)]
        return _slope((weight[:, None] * _along(table, spread)).sum(), x)

    both = list(zip(layers, of_ref, strict=True))
    return {
        "reverse": _slope((log_pi.exp() * (log_pi - log_ref)).sum() / table.prompts, x),
        "forward": _slope((log_ref.exp() * (log_ref - log_pi)).sum() / table.prompts, x),
        "frozen reverse": frozen([(p.exp() * (p - q)).sum(1) for p, q in both]),
        "frozen forward": frozen([(q.exp() * (q - p)).sum(1) for p, q in both]),
        "frozen entropy": frozen([-(p.exp() * p).sum(1) for p in layers]),
    }


def expected_values(table: Table, theta: ArrayLike, log_reference: ArrayLike) -> dict[str, float]:
    """E k of whole responses and summed over tokens, by enumeration: "k3, token" -> its expectation."""
    x, anchor = _start(table, theta, log_reference)
    policy, reference = (_along(table, _conditionals(table, t)).detach() for t in (x, anchor))
    weight = on_policy(policy.sum(1), table.prompts)
    return {
        f"{k}, {level}": kl_loss(policy, reference, weight, estimator=k, level=level).item()
        for k in ESTIMATORS
        for level in LEVELS
    }


def compare(
    gradients: dict[str, Array], wanted: dict[str, Array]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Form -> target -> (cosine, scale): the angle between them, and the multiple of the target that is nearest.

    A gradient below 1e-12 of the largest counts as zero: cosine nan, scale 0.
    """
    size = max(float(np.linalg.norm(g)) for g in gradients.values())

    def pair(g: Array, t: Array) -> tuple[float, float]:
        a, b = float(np.linalg.norm(g)), float(np.linalg.norm(t))
        if a <= 1e-12 * size or b == 0:
            return math.nan, 0.0
        return float(g @ t) / (a * b), float(g @ t) / b**2

    return {name: {other: pair(g, t) for other, t in wanted.items()} for name, g in gradients.items()}


LOSS = LossSpec(
    name="kl_estimators",
    title="KL estimators k1, k2, k3 as losses and as rewards",
    paper="Schulman, Approximating KL Divergence (2020)",
    loss=kl_loss,
)
