r"""Every method is one thing: rounds of (collect rows, then update steps on what was collected).

    offline     one round, whose rows are given records: dpo, ipo, rpo, vpo_offline
    online      a round is one batch, drawn from the policy as it is and judged, and ONE step: nash_md, nash_ema,
                kl_policy_gradient, online_dpo, online_ipo, online_xpo
    iterative   a round is many batches, drawn from pi_t and judged, and the steps of `epochs` passes over them: inpo,
                sppo, xpo, vpo, iterative_dpo

A `Method` says who draws each response of a row, which of them are scored, what the judge is asked, and hands the
columns of a batch to a loss of `algorithms`, the same function that is verified on tables. Log-probabilities are sums
over a completion's tokens, its end token included, and `weight` is each row's share of the whole batch, so that the
losses of micro-batches, and of processes, add up to the batch's.

    draws     "data", or of the sampled: "policy" pi_t; "reference"; "mixture" pi^{1-share} ref^share / z, token by
              token; "average", the policy of the exponential moving average of the weights
    wins      P(first > second), or a label drawn from it: the judge's answer on the first two responses
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...algorithms.apo import apo_loss
from ...algorithms.dpo import dpo_loss
from ...algorithms.inpo import inpo_loss
from ...algorithms.ipo import ipo_loss
from ...algorithms.kl_policy_gradient import policy_gradient_loss
from ...algorithms.nash_md_pg import nash_md_pg_loss
from ...algorithms.optimisation.losses import check_share
from ...algorithms.rpo import rpo_loss
from ...algorithms.sppo import sppo_loss
from ...algorithms.vpo import vpo_loss
from ...algorithms.xpo import xpo_loss
from .settings import Labels

if TYPE_CHECKING:
    from torch import Tensor

Drawer = Literal["data", "policy", "reference", "mixture", "average"]
Rounds = Literal["offline", "online", "iterative"]


@dataclass(frozen=True, eq=False)
class Columns:
    """What a loss is given: m rows of R scored responses.

    policy     (m, R) log pi(y|x), with gradients
    reference  (m, R) log ref(y|x); previous (m, R) log pi_t(y|x), where the method needs it: constants
    wins       (m,) that the first response beats the second, in [0, 1]
    reward     (m,) of the first response, less its baseline
    weight     (m,) >= 0, of each row; 1 in all over the whole batch
    """

    policy: Tensor
    reference: Tensor
    previous: Tensor
    wins: Tensor
    reward: Tensor
    weight: Tensor


Loss = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Method:
    """A method by name.

    loss        (columns, **parameters) -> scalar
    rounds      see the module
    draws       who draws each response of a row; the first two are compared where the judge has preferences
    scored      so many of the responses have their log-probabilities in the loss
    asks        the judge for "preferences" (of the first two responses) or "rewards" (of the first)
    previous    the loss needs log pi_t
    keep        the rows of earlier rounds stay in the data
    labels      where the settings do not say
    parameters  of the loss, with their defaults
    sampler     parameters of who draws: "share" of the mixture, "decay" of the average
    """

    name: str
    title: str
    paper: str
    loss: Loss
    rounds: Rounds
    draws: tuple[Drawer, ...]
    scored: int
    parameters: Mapping[str, float]
    asks: Literal["preferences", "rewards"] = "preferences"
    previous: bool = False
    keep: bool = False
    labels: Labels = "draw"
    sampler: Mapping[str, float] = field(default_factory=dict)

    def checked(self, given: Mapping[str, float]) -> dict[str, float]:
        """Defaults and what is given in their place; ValueError where a name or a value is wrong."""
        known = {**self.parameters, **self.sampler}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{self.name} has no parameter {name!r}; it has {', '.join(known)}{hint}")
        values = {name: float(given.get(name, default)) for name, default in known.items()}
        if "share" in self.sampler:
            check_share(values["share"], "share")
        if "decay" in self.sampler and not 0 <= values["decay"] < 1:
            raise ValueError(f"decay is {values['decay']}; it must lie in [0, 1)")
        self.value(_nothing(self.scored), values)  # the loss knows what its parameters may be
        return values

    def value(self, columns: Columns, parameters: Mapping[str, float]) -> Tensor:
        return self.loss(columns, **{name: parameters[name] for name in self.parameters})

    @property
    def samples(self) -> bool:
        return self.rounds != "offline"

    @property
    def draws_policy(self) -> bool:
        """The first response is the policy's own, so that KL(pi_t, ref) can be estimated from it."""
        return self.draws[0] == "policy"


def _nothing(scored: int) -> Columns:
    import torch

    two, one = torch.zeros(1, scored, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return Columns(two, two, two, one, one, one)


# ---- columns to losses ---------------------------------------------------------------------------------------------


def _dpo(c: Columns, **parameters: float) -> Tensor:
    return dpo_loss(c.policy, c.reference, c.wins, c.weight, **parameters)  # type: ignore[arg-type]


def _ipo(c: Columns, *, tau: float) -> Tensor:
    return ipo_loss(c.policy, c.reference, c.wins, c.weight, tau=tau)


def _rpo(c: Columns, *, beta: float, eta: float) -> Tensor:
    return rpo_loss(c.policy, c.reference, c.wins, c.weight, beta=beta, eta=eta)


def _vpo_offline(c: Columns, *, beta: float, alpha: float) -> Tensor:
    """Pessimism; the calibration law is that of the chosen responses: the first with probability `wins`."""
    import torch

    chosen = c.weight[:, None] * torch.stack([c.wins, 1 - c.wins], dim=1)
    return vpo_loss(
        c.policy,
        c.reference,
        c.policy,
        c.reference,
        c.wins,
        c.weight,
        chosen,
        beta=beta,
        alpha=alpha,
        sign=-1,
    )


def _vpo(c: Columns, *, beta: float, alpha: float) -> Tensor:
    """Optimism; the calibration law is the reference, which draws a third response."""
    pair, third = slice(0, 2), 2
    return vpo_loss(
        c.policy[:, pair],
        c.reference[:, pair],
        c.policy[:, third],
        c.reference[:, third],
        c.wins,
        c.weight,
        c.weight,
        beta=beta,
        alpha=alpha,
        sign=1,
    )


def _xpo(c: Columns, *, beta: float, alpha: float) -> Tensor:
    return xpo_loss(c.policy, c.reference, c.wins, c.weight, beta=beta, alpha=alpha)


def _inpo(c: Columns, *, tau: float, eta: float) -> Tensor:
    return inpo_loss(c.policy, c.reference, c.previous, c.wins, c.weight, tau=tau, eta=eta)


def _apo(c: Columns, *, beta: float) -> Tensor:
    return apo_loss(c.policy, c.previous, c.wins, c.weight, beta=beta)


def _sppo(c: Columns, *, eta: float) -> Tensor:
    """Each response of the pair against the other: an estimate of P(y > pi_t) from one draw, and the loss's gradient
    is linear in it."""
    import torch

    wins = torch.stack([c.wins, 1 - c.wins], dim=1)
    return sppo_loss(c.policy, c.previous, wins, (c.weight[:, None] / 2).expand_as(wins), eta=eta)


def _nash_md(c: Columns, *, tau: float, baseline: float) -> Tensor:
    return nash_md_pg_loss(c.policy[:, 0], c.reference[:, 0], c.wins, c.weight, tau=tau, baseline=baseline)


def _policy_gradient(c: Columns, *, beta: float) -> Tensor:
    return policy_gradient_loss(c.policy[:, 0], c.reference[:, 0], c.reward, c.weight, beta=beta)


# ---- the methods -----------------------------------------------------------------------------------------------------

_DPO = "Rafailov et al., NeurIPS 2023 (arXiv 2305.18290)"
_IPO = "Azar et al., AISTATS 2024 (arXiv 2310.12036)"
_NASH = "Munos et al., ICML 2024 (arXiv 2312.00886)"
_XPO = "Xie et al., ICLR 2025 (arXiv 2405.21046)"
_VPO = "Cen et al., ICLR 2025 (arXiv 2405.19320)"
_DATA: tuple[Drawer, ...] = ("data", "data")
_OWN: tuple[Drawer, ...] = ("policy", "policy")
_PREFERENCE = {"beta": 0.1, "label_smoothing": 0.0}

_ALL = (
    Method("dpo", "Direct preference optimisation", _DPO, _dpo, "offline", _DATA, 2, _PREFERENCE),
    Method("ipo", "Identity preference optimisation", _IPO, _ipo, "offline", _DATA, 2, {"tau": 0.1}),
    Method(
        "rpo",
        "Regularised preference optimisation: DPO with an imitation term",
        "Liu et al., NeurIPS 2024 (arXiv 2405.16436)",
        _rpo,
        "offline",
        _DATA,
        2,
        {"beta": 0.1, "eta": 0.005},
    ),
    Method(
        "vpo_offline",
        "Value-incentivised preference optimisation, the pessimist",
        _VPO,
        _vpo_offline,
        "offline",
        _DATA,
        2,
        {"beta": 0.1, "alpha": 0.01},
    ),
    Method(
        "nash_md",
        "Nash-MD-PG: a policy gradient against the mixture with the reference",
        _NASH,
        _nash_md,
        "online",
        ("policy", "mixture"),
        1,
        {"tau": 0.1, "baseline": 0.5},
        labels="soft",
        sampler={"share": 0.125},
    ),
    Method(
        "nash_ema",
        "Nash-EMA-PG: a policy gradient against the average of the weights",
        _NASH,
        _nash_md,
        "online",
        ("policy", "average"),
        1,
        {"tau": 0.1, "baseline": 0.5},
        labels="soft",
        sampler={"decay": 0.999},
    ),
    Method(
        "kl_policy_gradient",
        "KL-regularised policy gradient on a reward",
        "Ziegler et al. (arXiv 1909.08593)",
        _policy_gradient,
        "online",
        ("policy",),
        1,
        {"beta": 0.1},
        asks="rewards",
    ),
    Method("online_dpo", "DPO on fresh pairs of the policy", _DPO, _dpo, "online", _OWN, 2, _PREFERENCE),
    Method("online_ipo", "IPO on fresh pairs of the policy", _IPO, _ipo, "online", _OWN, 2, {"tau": 0.1}),
    Method(
        "online_xpo",
        "XPO on fresh pairs, of the policy and of the reference",
        _XPO,
        _xpo,
        "online",
        ("policy", "reference"),
        2,
        {"beta": 0.1, "alpha": 1e-5},
    ),
    Method(
        "inpo",
        "Iterative Nash policy optimisation",
        "Zhang et al., ICLR 2025 (arXiv 2407.00617)",
        _inpo,
        "iterative",
        _OWN,
        2,
        {"tau": 0.1, "eta": 3.0},
        previous=True,
    ),
    Method(
        "sppo",
        "Self-play preference optimisation",
        "Wu et al. (arXiv 2405.00675)",
        _sppo,
        "iterative",
        _OWN,
        2,
        {"eta": 3.0},
        previous=True,
        labels="soft",
    ),
    Method(
        "xpo",
        "Exploratory preference optimisation",
        _XPO,
        _xpo,
        "iterative",
        ("policy", "reference"),
        2,
        {"beta": 0.1, "alpha": 1e-5},
        keep=True,
    ),
    Method(
        "vpo",
        "Value-incentivised preference optimisation, the optimist",
        _VPO,
        _vpo,
        "iterative",
        ("policy", "policy", "reference"),
        3,
        {"beta": 0.1, "alpha": 0.01},
        keep=True,
    ),
    Method(
        "iterative_dpo",
        "Rounds of DPO against the first reference",
        "Dong et al. (arXiv 2405.07863)",
        _dpo,
        "iterative",
        _OWN,
        2,
        _PREFERENCE,
    ),
    Method(
        "iterative_dpo_previous",
        "Rounds of DPO against the policy that drew the pairs: the KL to the first reference is not controlled",
        "Dong et al. (arXiv 2405.07863); He et al. (arXiv 2410.06293) without momentum",
        _apo,
        "iterative",
        _OWN,
        2,
        {"beta": 0.1},
        previous=True,
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """ValueError with the nearest names where there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}"
        raise ValueError(f"there is no method {name!r}; {hint}")
    return METHODS[name]


def describe(method: Method) -> dict[str, Any]:
    """What a list of methods shows."""
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "rounds": method.rounds,
        "draws": list(method.draws),
        "asks": method.asks if method.samples else None,
        "parameters": {**method.parameters, **method.sampler},
    }
