"""Claims about CPL (`algorithms/cpl.py`), on small MDPs all of whose segments are enumerated.

Optimal advantages come from soft value iteration (`planning.soft`). A discount gamma is there a chance 1 - gamma of
falling, at each step, into a state without rewards, over so many steps that what follows is below rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.cpl import advantages, cpl_loss, segment_scores
from ...algorithms.dpo import dpo_loss
from ...algorithms.optimisation import PrefixTree, SoftmaxTable, fit
from ...algorithms.planning.sequences import tree_of
from ...algorithms.planning.soft import soft_value_iteration
from ...envs.annotators import BradleyTerry, RegretPreference
from ...envs.kernels import Array, Index
from ...envs.links import LOGISTIC
from ...envs.mdp import FiniteMDP
from ...envs.token_mdp import random_token_mdp
from ...envs.trajectories import Trajectories
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import judge_identity, judge_inequality
from ._declare import cells_of, controls

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Hejna et al., ICLR 2024 (arXiv 2310.13639)"


cell = cells_of(__name__)


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- worlds and their segments ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """P (S, A, S), reward, reference, optimal policy and advantage A* (S, A), values V (S,) of a discounted MDP."""

    P: Array
    reward: Array
    reference: Array
    policy: Array
    advantage: Array
    V: Array
    alpha: float
    gamma: float


def person(seed: int, kl: bool = False) -> Person:
    """Two states, three actions. Without `kl` the optimum has an entropy bonus, which is KL to the uniform policy up to
    alpha log 3 a step; `advantage` is alpha log pi* without it and alpha log pi*/ref with it."""
    rng, S, A = np.random.default_rng([seed, 1]), 2, 3
    P, reward = rng.dirichlet(np.ones(S), size=(S, A)), rng.normal(size=(S, A))
    alpha, gamma = float(rng.uniform(0.3, 1)), float(rng.uniform(0.5, 0.8))
    uniform = np.full((S, A), 1 / A)
    reference = 0.8 * rng.dirichlet(np.ones(A), size=S) + 0.2 * uniform if kl else uniform
    H = math.ceil(math.log(1e-17) / math.log(gamma))
    alive = np.zeros((S + 1, A, S + 1))
    alive[:S, :, :S], alive[:S, :, S], alive[S, :, S] = gamma * P, 1 - gamma, 1.0
    rewards, references = np.vstack([reward, np.zeros(A)]), np.vstack([reference, uniform[:1]])
    model = FiniteMDP.dense(
        np.broadcast_to(alive, (H, *alive.shape)), np.broadcast_to(rewards, (H, *rewards.shape))
    )
    soft = soft_value_iteration(model, np.broadcast_to(references, (H, *references.shape)), alpha)
    assert soft.Q is not None
    V, Q = soft.V[0][:S], soft.Q[0][:S]
    bonus = 0.0 if kl else alpha * math.log(A)  # V of the entropy form is larger by that, at each step
    return Person(P, reward, reference, soft.policy[0][:S], Q - V[:, None] - bonus, V, alpha, gamma)


def segments(S: int, A: int, lengths: Sequence[int]) -> tuple[Index, Array]:
    """All segments of the given lengths, (n, T) cells s * A + a and (n, T) mask; where there is no step, cell 0."""
    T = max(lengths)
    rows = [list(c) + [0] * (T - n) for n in lengths for c in itertools.product(range(S * A), repeat=n)]
    used = [[t < n for t in range(T)] for n in lengths for _ in range((S * A) ** n)]
    return np.array(rows), np.array(used)


def all_pairs(n: int, rng: np.random.Generator) -> tuple[Index, Tensor]:
    """All pairs (m, 2) of n segments and random weights: the law of the pairs is not to matter."""
    import torch

    pairs, weight = np.column_stack(np.triu_indices(n, 1)), rng.random(n * (n - 1) // 2) + 0.1
    return pairs, torch.as_tensor(weight / weight.sum())


def label_entropy(p: Array, weight: Array) -> float:
    """The least that a logistic loss can be: it is reached by the true log-odds alone."""
    return float(weight @ -(p * np.log(p) + (1 - p) * np.log1p(-p)))


# ---- the bijection ---------------------------------------------------------------------------------------------------


def bijection(*, seed: int, kl: bool, fault: str = "none") -> dict[str, Any]:
    """Errors of sum_a ref exp(A*/alpha) = 1, of A* = alpha log pi*/ref, and of r = A* + V - gamma P V.

    fault  hard: advantages without entropy, Q - max Q; alpha_twice: A* / alpha^2 in the exponent
    """
    who = person(seed, kl)
    A, base = who.advantage, who.reference if kl else np.ones_like(who.policy)
    shift = 0.0 if kl else who.alpha * math.log(A.shape[1])
    if fault == "hard":
        Q = A + who.V[:, None]
        A = Q - Q.max(axis=1, keepdims=True)
    scale = who.alpha**2 if fault == "alpha_twice" else who.alpha
    total = (base * np.exp(A / scale)).sum(axis=1)
    ours = advantages([who.policy], who.alpha, [who.reference] if kl else None)[0]
    bellman = A + shift + who.V[:, None] - who.gamma * who.P @ who.V
    return {"errors": [*(total - 1), *(ours - A).ravel(), *(bellman - who.reward).ravel()]}


def bijections(plan: Plan, **broken: Any) -> list[Cell]:
    return [
        cell("bijection", s, kl=kl, **broken)
        for s in plan.seed_range(quick=10, full=60)
        for kl in (False, True)
    ]


# ---- consistency -----------------------------------------------------------------------------------------------------


def consistency(*, seed: int, kl: bool, lengths: Sequence[int] = (2,), fault: str = "none") -> dict[str, Any]:
    """The minimiser of the population loss on all pairs of segments against log pi*, and its loss against the least.

    fault  conservative: lambda = 1/2; returns: labels by discounted rewards; offset: labels by advantages larger by 1/2
           a step; no_reference: log pi in place of log pi/ref; padded: what stands after a segment's end is counted
    """
    import torch

    who, rng = person(seed, kl), np.random.default_rng([seed, 2])
    S, A = who.policy.shape
    steps, used = segments(S, A, lengths)
    judged = {"returns": who.reward, "offset": who.advantage + 0.5}.get(fault, who.advantage)
    score = (np.where(used, judged.ravel()[steps], 0.0) * who.gamma ** np.arange(steps.shape[1])).sum(axis=1)
    pairs, w = all_pairs(len(steps), rng)
    p = torch.as_tensor(LOGISTIC.value(score[pairs[:, 0]] - score[pairs[:, 1]]))
    at, mask = torch.as_tensor(steps[pairs]), torch.as_tensor(used[pairs])
    reference = torch.as_tensor(np.log(who.reference).ravel())[at] if kl else None

    def loss(log_pi: Tensor) -> Tensor:
        return cpl_loss(
            log_pi[at],
            None if fault == "no_reference" else reference,
            p,
            w,
            None if fault == "padded" else mask,
            alpha=who.alpha,
            gamma=who.gamma,
            lam=0.5 if fault == "conservative" else 1.0,
        )

    table = SoftmaxTable(A, S)
    found = fit(loss, table, tolerance=1e-12)
    errors = table.log_probabilities(found.theta).numpy() - np.log(who.policy).ravel()
    return {"errors": errors, "excess": found.value - label_entropy(p.numpy(), w.numpy())}


def consistencies(plan: Plan, **broken: Any) -> list[Cell]:
    return [
        cell("consistency", s, kl=kl, **broken)
        for s in plan.seed_range(quick=8, full=40)
        for kl in (False, True)
    ]


def without_reference(plan: Plan) -> list[Cell]:
    return [cell("consistency", s, kl=True, fault="no_reference") for s in plan.seed_range(quick=8, full=40)]


def judge_consistency(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in [*o["errors"], o["excess"]]])


def uneven(plan: Plan, fault: str = "none", lengths: Sequence[int] = (1, 2)) -> list[Cell]:
    seeds = plan.seed_range(quick=8, full=40)
    if fault != "none":
        return [cell("consistency", s, kl=False, lengths=lengths, fault=fault) for s in seeds]
    own = [cell("consistency", s, kl=kl, lengths=lengths) for s in seeds for kl in (False, True)]
    return own + [cell("consistency", s, kl=False, lengths=(2,), fault="offset") for s in seeds]


# ---- below lambda = 1 ------------------------------------------------------------------------------------------------


def conservative(*, seed: int, lam: float) -> dict[str, Any]:
    """L_lambda(pi*) minus L_lambda at a minimiser that is looked for from pi*, and how far off that one is."""
    import torch

    who, rng = person(seed), np.random.default_rng([seed, 2])
    S, A = who.policy.shape
    steps, _ = segments(S, A, (2,))
    score = (who.advantage.ravel()[steps] * who.gamma ** np.arange(2)).sum(axis=1)
    pairs, w = all_pairs(len(steps), rng)
    p = torch.as_tensor(LOGISTIC.value(score[pairs[:, 0]] - score[pairs[:, 1]]))
    at = torch.as_tensor(steps[pairs])

    def loss(log_pi: Tensor) -> Tensor:
        return cpl_loss(log_pi[at], None, p, w, alpha=who.alpha, gamma=who.gamma, lam=lam)

    table, star = SoftmaxTable(A, S), np.log(who.policy)
    found = fit(loss, table, star, tolerance=1e-11)
    law = table.log_probabilities(found.theta).exp().numpy()
    gap = loss(torch.as_tensor(star.ravel())).item() - found.value
    return {"gap": gap, "distance": float(np.abs(law - who.policy.ravel()).max())}


def biased(plan: Plan, lams: Sequence[float] = (0.25, 0.5, 0.9)) -> list[Cell]:
    return [cell("conservative", s, lam=lam) for s in plan.seed_range(quick=8, full=40) for lam in lams]


def judge_bias(outcomes: Sequence[Outcome]) -> Judgement:
    """Strictly less than at pi*, by more than rounding (1e-15 of losses near 1) can pretend."""
    return judge_inequality([o["gap"] - 1e-10 for o in outcomes])


# ---- mass on what nobody compared ------------------------------------------------------------------------------------


def unseen(*, seed: int, lam: float, fault: str = "none") -> dict[str, Any]:
    """The loss's change where all actions of the data lose log-probability c, against what lambda makes of it.

    Data: labelled pairs of segments of T steps. For lambda = 1 the loss must not move, for c = 0.1, 1, 10; for any
    lambda dL/dc at 0 must be (1 - lambda) alpha sum_t gamma^t E[sigma(lambda S- - S+)].
    fault  uneven: some segments are shorter; winner: lambda weighs the winner's score; unmoved: only the first segments
           lose
    """
    import torch

    rng = np.random.default_rng([seed, 3])
    m, T = 12, 4
    alpha, gamma = float(rng.uniform(0.1, 1)), float(rng.uniform(0.6, 1))
    policy = torch.as_tensor(np.log(rng.uniform(0.05, 0.6, size=(m, 2, T))))
    won = torch.as_tensor(rng.integers(0, 2, size=m).astype(float))
    mask = torch.ones(m, 2, T, dtype=torch.bool)
    if fault == "uneven":
        mask[:, 0, 2:] = False
    moved = (
        torch.tensor([1.0, 0.0 if fault == "unmoved" else 1.0], dtype=torch.float64)[:, None]
        * torch.ones(T).double()
    )

    def loss(c: Tensor) -> Tensor:
        moves = policy - c * moved
        if fault == "winner":
            S = segment_scores(moves, None, mask, alpha=alpha, gamma=gamma)
            plus, minus = (torch.where(won == k, S[:, 0], S[:, 1]) for k in (1, 0))
            return torch.nn.functional.softplus(minus - lam * plus).mean()
        return cpl_loss(moves, None, won, None, mask, alpha=alpha, gamma=gamma, lam=lam)

    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(c), c)
    S = segment_scores(policy, None, mask, alpha=alpha, gamma=gamma).numpy()
    plus, minus = np.where(won.numpy() == 1, S[:, 0], S[:, 1]), np.where(won.numpy() == 1, S[:, 1], S[:, 0])
    steps = float((gamma ** np.arange(T)).sum())
    expected = (1 - lam) * alpha * steps * float(LOGISTIC.value(lam * minus - plus).mean())
    errors = [slope.item() - expected]
    if lam == 1:
        at = loss(torch.zeros(()).double()).item()
        errors += [loss(torch.tensor(c, dtype=torch.float64)).item() - at for c in (0.1, 1.0, 10.0)]
    return {"errors": errors, "slope": slope.item()}


def unseens(plan: Plan, lams: Sequence[float] = (0.25, 0.5, 1.0), **broken: Any) -> list[Cell]:
    return [cell("unseen", s, lam=lam, **broken) for s in plan.seed_range(quick=10, full=60) for lam in lams]


# ---- DPO -------------------------------------------------------------------------------------------------------------


def like_dpo(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """CPL on responses of a token tree as segments from one start, against DPO: values and gradients.

    fault  discounted: gamma = 0.9; conservative: lambda = 1/2; no_reference; padded: what stands after a response's end
           is counted
    """
    import torch

    rng = np.random.default_rng([seed, 4])
    model = random_token_mdp(2, 3, seed=seed)
    table, beta = PrefixTree(tree_of(model)), float(rng.uniform(0.1, 2))
    pairs, w = all_pairs(table.responses, rng)
    p = torch.as_tensor(rng.random(len(pairs)))
    reference = table.start(model.leaf_log_probabilities())
    used = np.arange(model.horizon) < table.lengths[:, None]
    junk = torch.as_tensor(np.where(used, 0.0, rng.normal(size=used.shape)))
    theta = torch.tensor(rng.normal(size=table.size), requires_grad=True)
    index, mask = torch.as_tensor(pairs), torch.as_tensor(used[pairs])
    token, anchor = (table.token_log_probabilities(x)[index] for x in (theta, reference))
    ours = cpl_loss(
        token + junk[index],
        None if fault == "no_reference" else anchor,
        p,
        w,
        None if fault == "padded" else mask,
        alpha=beta,
        gamma=0.9 if fault == "discounted" else 1.0,
        lam=0.5 if fault == "conservative" else 1.0,
    )
    sums, base = (table.log_probabilities(x)[index] for x in (theta, reference))
    theirs = dpo_loss(sums, base, p, w, beta=beta)
    gradients = [torch.autograd.grad(x, theta)[0] for x in (ours, theirs)]
    return {"errors": [(ours - theirs).item(), *(gradients[0] - gradients[1]).tolist()]}


def likes(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("like_dpo", s, **broken) for s in plan.seed_range(quick=8, full=40)]


# ---- regrets and returns ---------------------------------------------------------------------------------------------


def episodes(kernel: Array, start: int, T: int) -> Trajectories:
    """All (s_0, a_0, ..., a_{T-1}) of positive probability from `start`; kernel (H, S, A, S)."""
    A = kernel.shape[2]
    rows: list[tuple[list[int], list[int]]] = [([start], [])]
    for t in range(T):
        rows = [
            ([*s, n], [*a, b])
            for s, a in rows
            for b in range(A)
            for n in (np.flatnonzero(kernel[t, s[-1], b]).tolist() if t < T - 1 else [0])
        ]
    return Trajectories(np.array([s[:T] for s, _ in rows]), np.array([a for _, a in rows]))


def labels(*, seed: int, dynamics: str, judged: str, fault: str = "none") -> dict[str, Any]:
    """CPL with a reference on all pairs of full episodes, labelled by regret or by return, against the optimum.

    dynamics  deterministic or stochastic; three steps, three states, two actions, one start
    judged    regret: sums of soft advantages; return: sums of rewards
    fault     partial: only the first two steps of an episode are shown and paid; starts: episodes from two states are
              compared; hard: regrets without the KL term
    The errors end with the differences of the labels to those by regret.
    """
    import torch

    rng, H, S, A = np.random.default_rng([seed, 5]), 3, 3, 2
    if dynamics == "deterministic":
        kernel = np.eye(S)[rng.integers(S, size=(H, S, A))]
    else:
        kernel = rng.dirichlet(np.ones(S), size=(H, S, A))
    model = FiniteMDP.dense(kernel, rng.normal(size=(H, S, A)))
    reference = 0.8 * rng.dirichlet(np.ones(A), size=(H, S)) + 0.2 / A
    alpha = float(rng.uniform(0.3, 1))
    soft = soft_value_iteration(model, reference, alpha)
    star = advantages(soft.policy, alpha, reference)
    T = 2 if fault == "partial" else H
    parts = [episodes(kernel, s, H) for s in ((0, 1) if fault == "starts" else (0,))]
    states, actions = (np.concatenate([getattr(p, x) for p in parts]) for x in ("states", "actions"))
    shown = [layer if h < T else 0 * layer for h, layer in enumerate(model.reward)]
    by_regret = BradleyTerry(model, 0, reward=star)
    asked = {
        "regret": RegretPreference(model, 0) if fault == "hard" else by_regret,
        "return": BradleyTerry(model, 0, reward=shown),
    }[judged]
    pairs, w = all_pairs(len(states), rng)
    first, second = (Trajectories(states[i], actions[i]) for i in pairs.T)
    given = asked.probability(first, second)
    p = torch.as_tensor(given)
    cells = (np.arange(H) * S + states) * A + actions
    at, mask = torch.as_tensor(cells[pairs]), torch.ones(len(pairs), 2, H, dtype=torch.bool)
    mask[..., T:] = False
    anchor = torch.as_tensor(np.log(reference).ravel())

    def loss(log_pi: Tensor) -> Tensor:
        return cpl_loss(log_pi[at], anchor[at], p, w, mask, alpha=alpha)

    table = SoftmaxTable(A, H * S)
    found = table.log_probabilities(fit(loss, table, np.log(reference), tolerance=1e-12).theta).numpy()
    seen = np.unique(cells[:, :T])
    errors = (found - np.log(np.asarray(soft.policy)).ravel())[seen]
    theirs = by_regret.probability(first, second)
    return {"errors": [*errors, *(given - theirs)]}


def judged_labels(plan: Plan, fault: str = "none") -> list[Cell]:
    """Returns where transitions are certain and regrets everywhere: all of them lead to the optimum."""
    seeds = plan.seed_range(quick=6, full=30)
    if fault == "stochastic":
        return [cell("labels", s, dynamics="stochastic", judged="return") for s in seeds]
    if fault == "hard":  # with certain transitions these sums, too, are the return up to a constant
        return [cell("labels", s, dynamics="stochastic", judged="regret", fault=fault) for s in seeds]
    if fault != "none":
        return [cell("labels", s, dynamics="deterministic", judged="return", fault=fault) for s in seeds]
    kinds = (("deterministic", "return"), ("deterministic", "regret"), ("stochastic", "regret"))
    return [cell("labels", s, dynamics=d, judged=j) for s in seeds for d, j in kinds]


CLAIMS = (
    Claim(
        name="cpl.bijection",
        kind="identity",
        title="Policies and optimal advantages are the same thing",
        statement=r"$A^*(s,a) = \alpha\log\pi^*(a|s)$ and $\sum_a e^{A^*(s,a)/\alpha} = 1$; with a reference, "
        r"$\alpha\log\pi^*/\pi_{\mathrm{ref}}$ and $\sum_a \pi_{\mathrm{ref}} e^{A^*/\alpha} = 1$; "
        r"$r = A^* + V - \gamma P V$.",
        source=f"{PAPER}: from optimal advantages to optimal policies",
        cells=bijections,
        judge=judge_errors,
        controls=controls(
            bijections,
            hard="advantages of the optimum without entropy",
            alpha_twice="the advantage is divided by alpha twice",
        ),
    ),
    Claim(
        name="cpl.consistency",
        kind="identity",
        title="With lambda = 1 the optimal policy of the person's reward is what the population loss finds",
        statement=r"If $P(\sigma^+ \succ \sigma^-) = \sigma(\sum\gamma^t A^*(\sigma^+) - \sum\gamma^t A^*(\sigma^-))$, "
        r"$\arg\min_\pi L_1 = \pi^*$, and $L_1(\pi^*)$ is the entropy of the labels.",
        assumptions=("all pairs of segments of two steps are compared", "labels follow the regret model"),
        source=f"{PAPER}: consistency with unbounded data",
        cells=consistencies,
        judge=judge_consistency,
        controls=(
            *controls(
                consistencies,
                conservative="lambda = 1/2",
                returns="labels by the segment's discounted rewards",
            ),
            Control("no_reference", "the entropy form where the person has a reference", without_reference),
        ),
    ),
    Claim(
        name="cpl.conservative_bias",
        kind="inequality",
        title="With lambda below 1 no amount of data leads to the optimal policy",
        statement=r"$\min_\pi L_\lambda(\pi) < L_\lambda(\pi^*)$ for $\lambda$ = 0.25, 0.5, 0.9 on the population.",
        assumptions=("labels follow the regret model",),
        source=f"{PAPER}: the conservative bias, a regulariser for finite data",
        cells=biased,
        judge=judge_bias,
        controls=(Control("unbiased", "lambda = 1", lambda plan: biased(plan, (1.0,))),),
    ),
    Claim(
        name="cpl.lengths",
        kind="identity",
        title="Segments of different lengths are no obstacle to advantages, but show a constant of each step",
        statement=r"With segments of one and two steps $\arg\min_\pi L_1 = \pi^*$ still; labels by $A^* + c$ lead to "
        r"$\pi^*$ where all segments have the same length.",
        source=f"{PAPER}: consistency; what a constant does is read off the score",
        cells=uneven,
        judge=judge_consistency,
        controls=controls(
            uneven,
            offset="labels by A* + 1/2 a step on segments of different lengths",
            padded="what stands after a segment's end is counted",
        ),
    ),
    Claim(
        name="cpl.unseen_actions",
        kind="identity",
        title="What it costs to move mass to what nobody compared: nothing at lambda = 1",
        statement=r"If all actions of the data lose $c$ of log-probability, "
        r"$dL_\lambda/dc = (1-\lambda)\,\alpha\sum_t\gamma^t\; E\,\sigma(\lambda S^- - S^+)$ at $c = 0$, "
        r"and $L_1$ does not change at any $c$.",
        assumptions=("segments of equal lengths",),
        source=f"{PAPER}: why finite data need the conservative bias",
        cells=unseens,
        judge=judge_errors,
        controls=controls(
            unseens,
            uneven="the first segments are shorter",
            winner="lambda weighs the winner's score",
            unmoved="only the first segments lose",
        ),
    ),
    Claim(
        name="cpl.dpo",
        kind="identity",
        title="From one start to the end, with a reference, it is DPO",
        statement=r"$L_1 = L_{\mathrm{DPO}}$ with $\beta = \alpha$, $\gamma = 1$, and the gradients in the logits of "
        r"the tokens agree.",
        source=f"{PAPER}: DPO as a special case",
        cells=likes,
        judge=judge_errors,
        controls=controls(
            likes,
            discounted="gamma = 0.9",
            conservative="lambda = 1/2",
            no_reference="log pi without the reference",
            padded="what stands after a response's end is counted",
        ),
    ),
    Claim(
        name="cpl.labels",
        kind="identity",
        title="Labels by return are labels by regret where transitions are certain and episodes whole",
        statement=r"On full episodes of one start with deterministic transitions both labels are equal and the loss "
        r"finds $\pi^*$; with stochastic transitions labels by regret still lead to $\pi^*$.",
        source=f"{PAPER}: regret against partial return; sums of advantages telescope",
        cells=judged_labels,
        judge=judge_errors,
        controls=controls(
            judged_labels,
            stochastic="labels by return, stochastic transitions",
            partial="labels by return of the first two steps of three",
            starts="labels by return, episodes from two starts",
            hard="labels by the regret of the optimum without the KL term, stochastic transitions",
        ),
    ),
)
