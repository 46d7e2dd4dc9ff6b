"""Claims about PRO (`algorithms/pro.py`): what its loss is, where it is least, and what longer rankings buy.

Losses and gradients are measured against loops over the formula (`stages`), laws against closed forms and enumerations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from ...algorithms.dpo import plackett_luce_loss
from ...algorithms.optimisation import PrefixTree, SoftmaxTable, minimise
from ...algorithms.planning.sequences import tree_of
from ...algorithms.pro import pro_loss, pro_solution, ranking_loss
from ...envs.kernels import Array, Index
from ...envs.token_mdp import random_token_mdp
from ..cells import Cell
from ..claim import Claim, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_inequality, judge_ordering
from ._declare import cells_of, controls

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Song et al., AAAI 2024 (arXiv 2306.17492)"


cell = cells_of(__name__)


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- the loss --------------------------------------------------------------------------------------------------------


def multipliers(rewards: Array, positive: str = "largest") -> Array:
    """m (n, n): gaps r_k - r_i for i > k, on the diagonal the largest (or smallest) of them, below it nothing."""
    n = len(rewards)
    m = np.full((n, n), np.nan)
    for k in range(n - 1):
        gaps = rewards[k] - rewards[k + 1 :]
        m[k, k + 1 :], m[k, k] = gaps, gaps.max() if positive == "largest" else gaps.min()
    return m


def stages(scores: Array, m: Array) -> tuple[float, Array]:
    """The loss of one ranking and its gradient in the scores, by the formula."""
    total, gradient = 0.0, np.zeros(len(scores))
    for k in range(len(scores) - 1):
        logits = m[k, k:] * scores[k:]
        total += logsumexp(logits) - logits[0]
        share = np.exp(logits - logsumexp(logits))
        gradient[k:] += share * m[k, k:]
        gradient[k] -= m[k, k]
    return float(total), gradient


def drawn(seed: int, n: int) -> tuple[Array, Array]:
    """Scores like mean log-probabilities and descending rewards, (n,) each."""
    rng = np.random.default_rng([seed, 1])
    return rng.uniform(-3, -0.1, size=n), np.sort(rng.normal(size=n))[::-1].copy()


def value_and_gradient(scores: Array, rewards: Array, **options: Any) -> tuple[float, Array]:
    import torch

    s = torch.tensor(scores, requires_grad=True)
    loss = ranking_loss(s[None], torch.as_tensor(rewards)[None], **options)[0]
    (gradient,) = torch.autograd.grad(loss, s)
    return loss.item(), gradient.numpy()


def pair(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Two tokenised responses: the loss against log(1 + exp(-T (s_1 - s_2))) + sft_weight sum, by hand.

    fault  divided: T = 1 / (r_1 - r_2); summed: sums of log-probabilities for scores; mean_sft: the mean in place of
           the sum in the imitation term
    """
    import torch

    rng = np.random.default_rng([seed, 2])
    _, rewards = drawn(seed, 2)
    tokens = [np.log(rng.uniform(0.05, 0.9, size=k)) for k in rng.integers(1, 6, size=2)]
    padded, mask = np.full((2, 5), -9.0), np.zeros((2, 5), dtype=bool)
    for row, x in enumerate(tokens):
        padded[row, : len(x)], mask[row, : len(x)] = x, True
    T = 1 / (rewards[0] - rewards[1]) if fault == "divided" else rewards[0] - rewards[1]
    s = [x.sum() if fault == "summed" else x.mean() for x in tokens]
    sft = tokens[0].mean() if fault == "mean_sft" else tokens[0].sum()
    by_hand = math.log1p(math.exp(-T * (s[0] - s[1]))) - 0.05 * sft
    policy, scores, used = (torch.as_tensor(x)[None] for x in (padded, rewards, mask))
    loss = pro_loss(policy, scores, None, used)
    alone = pro_loss(policy[:, :1], scores[:, :1], None, used[:, :1])
    return {"errors": [loss.item() - by_hand, alone.item()]}


def pair_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("pair", s, **broken) for s in plan.seed_range(quick=20, full=100)]


def luce(*, seed: int, n: int, fault: str = "none") -> dict[str, Any]:
    """The untempered loss against Plackett-Luce: another implementation, and the sum of exp(-loss) over all orders.

    fault  gap: with temperatures, on equal gaps 1
    """
    import torch

    scores, _ = drawn(seed, n)
    rewards, temperature = np.arange(n, 0, -1.0), "gap" if fault == "gap" else "none"
    s = torch.as_tensor(scores[np.array(list(itertools.permutations(range(n))))])
    ours = ranking_loss(s, torch.as_tensor(rewards).expand(s.shape), temperature=temperature)  # type: ignore[arg-type]
    flat = torch.zeros(1, n, dtype=torch.float64)
    theirs = torch.stack([plackett_luce_loss(row[None], flat, beta=1.0) for row in s])
    return {"errors": [*(ours - theirs).tolist(), (-ours).exp().sum().item() - 1]}


def luces(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("luce", s, n=n, **broken) for s in plan.seed_range(quick=6, full=30) for n in (3, 4)]


def shift(*, seed: int, n: int, fault: str = "none") -> dict[str, Any]:
    """sum_i dL/ds_i without temperatures, and with them against the formula; `slack` is what the latter is below 0.

    fault  tempered: the first with temperatures; smallest: the formula with the smallest gap for the best response
    """
    scores, rewards = drawn(seed, n)
    temperature = "gap" if fault == "tempered" else "none"
    _, flat = value_and_gradient(scores, rewards, temperature=temperature)
    value, gradient = value_and_gradient(scores, rewards)
    m = multipliers(rewards, "smallest" if fault == "smallest" else "largest")
    by_hand, formula = stages(scores, m)
    return {
        "errors": [flat.sum(), value - by_hand, *(gradient - formula)],
        "slack": -formula.sum(),
    }


def shifts(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("shift", s, n=n, **broken) for s in plan.seed_range(quick=10, full=60) for n in (3, 5)]


def judge_shift(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the gradient": judge_errors(outcomes),
            "falls when all scores rise": judge_inequality([o["slack"] - 1e-12 for o in outcomes]),
        }
    )


# ---- where it is least -----------------------------------------------------------------------------------------------


def luce_rankings(rewards: Array, n: int) -> tuple[Index, Array]:
    """All rankings of n of the responses (m, n) with their Plackett-Luce probabilities; all subsets equally often."""
    orders = np.array(list(itertools.permutations(range(len(rewards)), n)))
    r = rewards[orders]
    log_p = sum(r[:, k] - logsumexp(r[:, k:], axis=1) for k in range(n))
    return orders, np.exp(log_p) / math.comb(len(rewards), n)


def noisy(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The minimiser over the token policies of a tree, on the population of noisy rankings, against `pro_solution`.

    Seven responses of one and two tokens, rankings of three. fault: gap, with temperatures; sft, with imitation;
    summed, sums of log-probabilities for scores.
    """
    import torch

    rng = np.random.default_rng([seed, 3])
    table = PrefixTree(tree_of(random_token_mdp(2, 2, seed=seed)))
    rewards = rng.normal(size=table.responses) / 2
    orders, p = luce_rankings(rewards, 3)
    at, w = torch.as_tensor(orders), torch.as_tensor(p)
    mask = torch.as_tensor(np.arange(2) < table.lengths[:, None])[at]
    descending = torch.as_tensor(np.sort(rewards[orders], axis=1)[:, ::-1].copy())
    stretch = torch.as_tensor(table.lengths.astype(float))[at][..., None] if fault == "summed" else 1.0

    def loss(theta: Tensor) -> Tensor:
        tokens = table.token_log_probabilities(theta)[at] * stretch
        return pro_loss(
            tokens,
            descending,
            w,
            mask,
            sft_weight=0.05 if fault == "sft" else 0.0,
            temperature="gap" if fault == "gap" else "none",
        )

    found = minimise(loss, table.start(), tolerance=1e-11)
    errors = table.log_probabilities(found.theta).numpy() - pro_solution(rewards, table.lengths)
    return {"errors": errors}


def noisies(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("noisy", s, **broken) for s in plan.seed_range(quick=6, full=30)]


RAY = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)


def ray(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Losses at pi_c ∝ exp(c r) for growing c, on rankings without noise of three out of five responses of one token.

    bare    without temperatures and imitation, on all rankings; with it: imitation alone, on all rankings
    single  both together, on one ranking of all five responses
    fault   noisy: rankings are Plackett-Luce; imitating: `bare` holds the imitation term
    """
    import torch

    rng = np.random.default_rng([seed, 4])
    n, of = 3, 5
    rewards = np.sort(rng.normal(size=of))[::-1].copy()
    if fault == "noisy":
        orders, p = luce_rankings(rewards, n)
    else:
        orders = np.array(list(itertools.combinations(range(of), n)))  # ascending numbers, descending rewards
        p = np.full(len(orders), 1 / len(orders))
    table, at, w = SoftmaxTable(of), torch.as_tensor(orders), torch.as_tensor(p)
    descending = torch.arange(n, 0, -1.0, dtype=torch.float64).expand(at.shape)

    def losses(log_pi: Tensor) -> tuple[float, float, float]:
        tokens = log_pi[:, None]
        bare = pro_loss(tokens[at], descending, w, sft_weight=0.0, temperature="none").item()
        imitation = pro_loss(tokens[at], descending, w, temperature="none").item() - bare
        one = pro_loss(tokens[None], torch.as_tensor(rewards)[None], temperature="none").item()
        return (bare + imitation if fault == "imitating" else bare), imitation, one

    rows = [losses(table.log_probabilities(torch.as_tensor(c * rewards))) for c in RAY]
    delta = float(-np.diff(rewards).max())  # the smallest gap
    best = float(rewards[0] - p @ rewards[orders[:, 0]])
    return {
        "bare": [r[0] for r in rows],
        "bound": [(n - 1) * math.log1p((n - 1) * math.exp(-c * delta)) for c in RAY],
        "imitation": [r[1] for r in rows],
        "growth": [0.05 * (n - 1) ** 2 * c * best for c in RAY],
        "single": [r[2] for r in rows],
        "single_bound": [
            ((of - 1) + 0.05 * (of - 1) ** 2) * math.log1p((of - 1) * math.exp(-c * delta)) for c in RAY
        ],
    }


def rays(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("ray", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_rays(outcomes: Sequence[Outcome]) -> Judgement:
    def gathered(of: Any) -> list[float]:
        return [float(x) for o in outcomes for x in of(o)]

    return all_of(
        {
            "the loss falls": judge_inequality(gathered(lambda o: -np.diff(o["bare"])), 1e-14),
            "below a bound that vanishes": judge_inequality(
                gathered(lambda o: np.subtract(o["bound"], o["bare"])), 1e-12
            ),
            "imitation grows": judge_inequality(
                gathered(lambda o: np.subtract(o["imitation"], o["growth"])), 1e-12
            ),
            "a single ranking is imitated for nothing": judge_inequality(
                gathered(lambda o: np.subtract(o["single_bound"], o["single"])), 1e-12
            ),
        }
    )


# ---- longer rankings -------------------------------------------------------------------------------------------------

SIZES = (2, 3, 5)


def longer(*, seed: int, kappa: float = 0.3, steps: int = 5000, fault: str = "none") -> dict[str, Any]:
    """E r and Kendall's tau of policies trained on rankings of 2, 3, 5 responses, stopped at KL(pi, ref) = kappa.

    Two prompts of a token tree with 40 responses each; rewards have mean 0 and variance 1 under the reference. Each
    prompt has 8 rankings of responses drawn from the reference without repetition, scored by reward plus
    Gumbel noise (so that the order is Plackett-Luce), the shorter ones by leaving out the last drawn. Full-batch
    gradient descent on the tokens' logits from the reference, with the paper's loss; the last step is cut so that the
    exact KL, averaged over prompts, is kappa. Both numbers are exact, by enumeration.
    fault  duplicates: 3 and 5 responses by repeating two; reversed: the worst is ranked first; noise: scores are noise
    """
    prompts, rankings, longest = 2, 8, SIZES[-1]
    model = random_token_mdp(3, 3, prompts=prompts, seed=seed)
    table, rng = PrefixTree(tree_of(model)), np.random.default_rng([seed, 5])
    law = model.leaf_probabilities().reshape(prompts, -1)
    r = model.leaf_rewards.reshape(prompts, -1)
    r = r - (law * r).sum(axis=1, keepdims=True)
    r /= np.sqrt((law * r**2).sum(axis=1, keepdims=True))
    responses, scores = [], []
    for x in range(prompts):
        for _ in range(rankings):
            y = np.argsort(-(np.log(law[x]) + rng.gumbel(size=law.shape[1])))[:longest]
            z = (0.0 if fault == "noise" else -1.0 if fault == "reversed" else 1.0) * r[x, y]
            responses.append(x * law.shape[1] + y)
            scores.append(z + rng.gumbel(size=longest))
    y, z = np.array(responses), np.array(scores)
    rewards, taus = [], []
    for n in SIZES:
        columns = np.arange(n) % 2 if fault == "duplicates" else np.arange(n)
        order = np.argsort(-z[:, columns], axis=1, kind="stable")
        log_pi = _stopped(
            table,
            model.leaf_log_probabilities(),
            np.take_along_axis(y[:, columns], order, 1),
            np.take_along_axis(z[:, columns], order, 1),
            kappa,
            steps,
        ).reshape(prompts, -1)
        rewards.append(float((np.exp(log_pi) * r).sum() / prompts))
        taus.append(float(np.mean([kendall(a, b) for a, b in zip(log_pi, r, strict=True)])))
    return {"rewards": rewards, "taus": taus}


def kendall(x: Array, y: Array) -> float:
    """Kendall's tau of two vectors without ties (scipy.stats has it, but every worker would wait for its import)."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.mean(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])))


def _stopped(table: PrefixTree, log_reference: Array, y: Index, z: Array, kappa: float, steps: int) -> Array:
    """log pi where gradient descent on `pro_loss` reaches KL = kappa."""
    import torch

    at, scores, anchor = torch.as_tensor(y), torch.as_tensor(z), torch.as_tensor(log_reference)
    mask = torch.as_tensor(np.arange(table.tree.horizon) < table.lengths[:, None])[at]

    def kl(theta: Tensor) -> float:
        log_pi = table.log_probabilities(theta)
        return float((log_pi.exp() * (log_pi - anchor)).sum()) / table.prompts

    theta = table.start(log_reference)
    for _ in range(steps):
        leaf = theta.clone().requires_grad_(True)
        loss = pro_loss(table.token_log_probabilities(leaf)[at], scores, None, mask)
        (gradient,) = torch.autograd.grad(loss, leaf)
        step = -0.5 * gradient
        if kl(theta + step) >= kappa:
            break
        theta = theta + step
    else:
        raise ArithmeticError(f"KL is {kl(theta):.3g} after {steps} steps, below {kappa}")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(theta + middle * step) < kappa else (low, middle)
    return table.log_probabilities(theta + low * step).numpy()


def longers(plan: Plan, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(20, 60) if fault == "none" else plan.seed_range(8, 24)
    return [cell("longer", s, fault=fault) for s in seeds]


def judge_longer(outcomes: Sequence[Outcome]) -> Judgement:
    R, tau = (np.array([o[x] for o in outcomes]) for x in ("rewards", "taus"))
    differences = {
        "E r, 3 against 2": R[:, 1] - R[:, 0],
        "E r, 5 against 3": R[:, 2] - R[:, 1],
        "tau, 5 against 2": tau[:, 2] - tau[:, 0],
    }
    return conjunction(
        {name: lambda level, d=d: judge_ordering(d, level=level) for name, d in differences.items()}  # type: ignore[misc]
    )


CLAIMS = (
    Claim(
        name="pro.pair",
        kind="identity",
        title="Two responses: a logistic loss whose slope is the gap of their scores",
        statement=r"$n = 2$: $L = -\log\sigma((r^1 - r^2)(s_1 - s_2)) - w\sum_t\log\pi(y^1_t)$; $n = 1$: $L = 0$.",
        source=f"{PAPER}: the loss with temperatures, the imitation term, and the authors' code",
        cells=pair_cells,
        judge=judge_errors,
        controls=controls(
            pair_cells,
            divided="the temperature is the gap, not its reciprocal",
            summed="scores are sums of log-probabilities",
            mean_sft="the imitation term is a mean over tokens",
        ),
    ),
    Claim(
        name="pro.plackett_luce",
        kind="identity",
        title="Without temperatures the loss is the likelihood of a Plackett-Luce ranking",
        statement=r"With all multipliers 1, $L_{\mathrm{PRO}} = -\log P_{\mathrm{PL}}(y^1 \succ \dots \succ y^n)$ for "
        r"scores $s$; $\sum e^{-L}$ over all orders is 1.",
        source=f"{PAPER}: one against the rest, again and again",
        cells=luces,
        judge=judge_errors,
        controls=controls(luces, gap="with temperatures, equal gaps"),
    ),
    Claim(
        name="pro.common_shift",
        kind="identity",
        title="Temperatures make the loss fall when all scores rise",
        statement=r"$\sum_i \partial L/\partial s_i = 0$ without temperatures; with them it is "
        r"$\sum_k (\sum_i p_{ki} m_{ki} - m_{kk})$, $p_k$ the softmax of stage $k$, which is negative.",
        assumptions=("three or more responses with different scores",),
        source="derived from the loss with temperatures",
        cells=shifts,
        judge=judge_shift,
        controls=controls(
            shifts,
            tempered="the first statement with temperatures",
            smallest="the best response takes the smallest gap",
        ),
    ),
    Claim(
        name="pro.noisy_target",
        kind="identity",
        title="Without temperatures noisy rankings lead to mean log-probabilities that are the reward",
        statement=r"On Plackett-Luce rankings with rewards $r$, $\arg\min L = \pi$ with "
        r"$\log\pi(y) = |y|\,(r(y) + c)$.",
        assumptions=("no imitation term", "all triples are ranked"),
        source="derived: the likelihood of a Plackett-Luce ranking is largest at the true scores",
        cells=noisies,
        judge=judge_errors,
        controls=controls(
            noisies,
            gap="with temperatures",
            sft="with the imitation term",
            summed="scores are sums of log-probabilities",
        ),
    ),
    Claim(
        name="pro.no_minimiser",
        kind="inequality",
        title="Rankings without noise are never satisfied; imitation holds the policy only where tops differ",
        statement=r"Along $\pi_c \propto e^{cr}$ the loss without temperatures falls to 0 as $c \to \infty$, the "
        r"imitation term grows at least like $w(n-1)^2 c\,(\max r - E\,r(y^1))$, and on a single ranking both together "
        r"fall to 0.",
        source="derived from the loss and its imitation term",
        cells=rays,
        judge=judge_rays,
        controls=controls(
            rays, noisy="rankings are Plackett-Luce", imitating="the loss holds the imitation term"
        ),
    ),
    Claim(
        name="pro.longer_rankings",
        kind="ordering",
        title="At equal KL, longer rankings of as many prompts earn more",
        statement=r"At $\mathrm{KL}(\pi, \pi_{\mathrm{ref}}) = 0.3$, $E\,r$ rises from $n = 2$ to 3 and to 5, and "
        r"Kendall's $\tau$ between $\pi$ and $r$ from 2 to 5.",
        assumptions=(
            "8 rankings a prompt, Plackett-Luce",
            "gradient descent, stopped where it reaches the KL",
        ),
        source=f"{PAPER}: experiments with longer rankings",
        cells=longers,
        judge=judge_longer,
        controls=controls(
            longers,
            duplicates="3 and 5 responses by repeating two",
            reversed="the worst response is ranked first",
            noise="responses are ranked at random",
        ),
    ),
)
