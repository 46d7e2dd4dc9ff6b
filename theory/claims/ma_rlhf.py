"""Claims about macro actions (`algorithms/ma_rlhf.py`): identities on random batches, exact gradients on token trees.

The trees have 3 tokens and 3 steps (40 responses of different lengths), all of them enumerated with their
probabilities, so that an expected policy gradient is a sum. The learning curves are of the phrase MDP: 24 positions,
3 tokens, the reward at the end is the share of the eight 3-token phrases that are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...algorithms.ma_rlhf import (
    Aggregation,
    Discount,
    Weighting,
    fixed,
    from_starts,
    lengths_of,
    macro_gae,
    perplexity,
    randomised,
    token_gae,
    token_weights,
)
from ...algorithms.planning.dynamic import evaluate, state_occupancy
from ...algorithms.planning.sequences import leaf_trajectories, sequence_law
from ...envs.kernels import Array, Index
from ...envs.mdp import Layered
from ...envs.token_mdp import random_token_mdp
from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_ordering
from ._declare import cells_of, controls

PAPER = "Chai et al., ICLR 2025 (arXiv 2410.02743)"
WEIGHTINGS: tuple[Weighting, ...] = ("equal", "unit", "position", "first")


cell = cells_of(__name__)


def batch(seed: int, B: int = 6, T: int = 15) -> tuple[Array, Array, Array, np.random.Generator]:
    """A mask with prompts and padding of random lengths, rewards and values (garbage outside the mask)."""
    rng = np.random.default_rng([seed, 1])
    first, length = rng.integers(0, 5, size=B), rng.integers(1, T - 4, size=B)
    t = np.arange(T)
    mask = (t >= first[:, None]) & (t < (first + length)[:, None])
    rewards, values = np.where(mask, rng.normal(size=(2, B, T)), np.nan)
    return mask, rewards, values, rng


# ---- identities on batches -------------------------------------------------------------------------------------------


def batches(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """n = 1, n >= T, sums and returns-to-go, against loops over rows and tokens in the words of the definitions.

    Faults: the code's aggregation where rewards are not only terminal; gamma once a macro in place of gamma^len;
    n-grams of 2 taken for tokens.
    """
    mask, rewards, values, rng = batch(seed)
    gamma, lam, n = float(rng.uniform(0.5, 1)), float(rng.uniform(0, 1)), int(rng.integers(2, 6))
    one = fixed(mask, 2 if fault == "bigrams" else 1)
    token = token_gae(rewards, values, mask, gamma=gamma, lam=lam)
    by_token = [
        macro_gae(rewards, values, one, gamma=gamma, lam=lam, weighting=w).advantage for w in WEIGHTINGS
    ]
    aggregation: Aggregation = "code" if fault == "code" else "sum"
    discount: Discount = "macro" if fault == "once" else "smdp"
    whole = macro_gae(rewards, values, fixed(mask, 99), lam=lam, aggregation=aggregation)
    grams = fixed(mask, n)
    plain = macro_gae(rewards, values, grams, aggregation=aggregation)
    go = macro_gae(rewards, values, grams, gamma=gamma, lam=1.0, weighting="first", discount=discount)
    sums, constant, to_go = [], [], []
    for b, inside in enumerate(mask):
        t = np.flatnonzero(inside)
        r, v = rewards[b, t], values[b, t]
        constant += [*(whole.advantage[b, t] - (r.sum() - v.mean()))]
        sums.append(plain.rewards[b].sum() - r.sum())
        for i in range(len(t)):
            start = i - i % n
            tail = sum(gamma**j * r[start + j] for j in range(len(t) - start))
            to_go.append(go.advantage[b, t[i]] - (tail - v[start]))
    return {"by_token": float(np.abs(np.array(by_token) - token).max()), "errors": [*sums, *constant, *to_go]}


def batch_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("batches", s, **broken) for s in plan.seed_range(quick=20, full=200)]


def judge_batches(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "n = 1, to the last bit": judge_identity([o["by_token"] for o in outcomes], 0.0),
            "n >= T, sums, returns-to-go": judge_identity([e for o in outcomes for e in o["errors"]]),
        }
    )


# ---- terminations ----------------------------------------------------------------------------------------------------


def _row_zero(macro: Index, mask: Array) -> Index:
    """The boundaries of row 0 for every row, as the authors' code has it for a batch."""
    return np.where(mask, np.broadcast_to(macro[0], macro.shape), -1)


def partitions(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """How often a termination breaks its rule, over all rows: each token in one macro, macros contiguous, lengths.

    row_zero: the boundaries of row 0 for all rows. no_last: the last token is not alone.
    """
    mask, rewards, _, rng = batch(seed)
    n, log_p = int(rng.integers(2, 6)), -np.abs(np.nan_to_num(rewards))
    last = fault != "no_last"
    made = {
        "fixed": fixed(mask, n),
        "alone": fixed(mask, n, last_alone=last),
        "randomised": randomised(mask, rng, lengths=(1, 2, 3)),
        "perplexity": perplexity(mask, log_p),
        "given": from_starts(mask, rng.random(mask.shape) < 0.3),
    }
    broken = 0
    for name, macro in made.items():
        k = _row_zero(macro, mask) if fault == "row_zero" else macro
        for b, inside in enumerate(mask):
            t = np.flatnonzero(inside)
            row, length = k[b, t], np.bincount(k[b, t][k[b, t] >= 0])
            broken += int((k[b] >= 0).sum() != len(t) or (k[b, ~inside] >= 0).any())
            broken += int(row[0] != 0 or not np.isin(np.diff(row), (0, 1)).all())
            if name == "fixed":
                broken += int((length[:-1] != n).any() or length.max(initial=1) > n)
            elif name == "alone":
                broken += int(len(length) > 0 and length[-1] != 1)
            elif name == "randomised":  # 1, 2, 3 in some order while they last, then the rest
                wanted = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]]
                cuts = {tuple(np.cumsum(w)) for w in wanted}
                found = tuple(np.flatnonzero(np.diff(row)) + 1)
                broken += int(not any(found == tuple(x for x in c if x < len(t)) for c in cuts))
            elif name == "perplexity":
                rises = np.flatnonzero(np.exp(-log_p[b, t])[1:] > np.exp(-log_p[b, t])[:-1]) + 1
                broken += int(not np.array_equal(np.flatnonzero(np.diff(row)) + 1, rises))
    weights = [
        token_weights(made["fixed"], w)[mask].sum() - (made["fixed"].max(axis=1) + 1).sum()
        for w in WEIGHTINGS
    ]
    return {"errors": [broken, *weights]}


def partition_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("partitions", s, **broken) for s in plan.seed_range(quick=20, full=100)]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- credit of the terminal reward -----------------------------------------------------------------------------------


def credit(*, seed: int, n: int, fault: str = "none") -> dict[str, Any]:
    """The terminal reward's share in the first token's advantage, T = 512; and in the code's macro rewards.

    averaged: the code's aggregation without a macro for the last token alone.
    """
    rng = np.random.default_rng([seed, 2])
    T, lam, reward = 512, float(rng.uniform(0.9, 1)), float(rng.normal())
    mask, rewards = np.ones((1, T), dtype=bool), np.zeros((1, T))
    rewards[0, -1] = reward
    grams = fixed(mask, n)
    first = macro_gae(rewards, np.zeros((1, T)), grams, lam=lam).advantage[0, 0]
    alone = fixed(mask, n, last_alone=fault != "averaged")
    code = macro_gae(rewards, np.zeros((1, T)), alone, lam=lam, aggregation="code")
    steps = int(lengths_of(alone).size) - 1
    power = T - 1 if fault == "by_token" else -(-T // n) - 1
    return {
        "errors": [
            first / reward - lam**power,
            code.rewards.sum() - reward,
            code.advantage[0, 0] / reward - lam**steps,
        ]
    }


def credit_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [
        cell("credit", s, n=n, **broken) for s in plan.seed_range(quick=3, full=10) for n in (2, 5, 7, 64)
    ]


# ---- the expected policy gradient ------------------------------------------------------------------------------------


def _policy(sizes: Sequence[int], actions: int, rng: np.random.Generator) -> Layered:
    rows = [0.9 * rng.dirichlet(np.ones(actions), size=n) + 0.1 / actions for n in sizes]
    for layer in rows:
        layer[0] = np.eye(actions)[-1]
    return tuple(rows)


def gradient(*, seed: int, n: int, lam: float, noise: float = 0.0, fault: str = "none") -> dict[str, Any]:
    """E sum_t A_t grad log pi(a_t | s_t) over all responses of a tree minus the exact policy gradient, in all logits.

    noise: standard deviation of an error in the critic's value of every prefix. Faults: the paper's weightings of the
    values of a macro's tokens (equal, unit, position) in place of the value at its start; boundaries by perplexity; the
    last token alone.
    """
    model, rng = random_token_mdp(3, 3, seed=seed), np.random.default_rng([seed, 3])
    policy = _policy(model.sizes[:-1], model.n_actions, rng)
    law, leaves, found = sequence_law(model, policy)[0], leaf_trajectories(model), evaluate(model, policy)
    mask = leaves.states > 0
    s, a, h = leaves.states, leaves.actions, range(model.horizon)
    critic = [v + noise * rng.normal(size=len(v)) for v in found.V[:-1]]
    rewards = np.stack([model.reward[t][s[:, t], a[:, t]] for t in h], axis=1)
    values = np.stack([critic[t][s[:, t]] for t in h], axis=1)
    grams = fixed(mask, n, last_alone=fault == "last_alone")
    if fault == "perplexity":
        grams = perplexity(mask, np.stack([np.log(policy[t][s[:, t], a[:, t]]) for t in h], axis=1))
    weighting: Any = fault if fault in WEIGHTINGS else "first"
    A = macro_gae(rewards, values, grams, lam=lam, weighting=weighting).advantage
    reached, errors = state_occupancy(model, policy), []
    assert found.Q is not None
    for t in h:
        estimate, weight = np.zeros(policy[t].shape), np.where(mask[:, t], law * A[:, t], 0.0)
        np.add.at(estimate, (s[:, t], a[:, t]), weight)
        total = np.bincount(s[:, t], weights=weight, minlength=len(estimate))
        estimate -= total[:, None] * policy[t]
        exact = reached[t][1:, None] * policy[t][1:] * (found.Q[t][1:] - found.V[t][1:, None])
        errors.append(float(np.abs(estimate[1:] - exact).max()))
    return {"error": max(errors)}


def gradient_cells(plan: Plan, **broken: Any) -> list[Cell]:
    """An exact critic at any lambda, and a noisy one at lambda = 1."""
    seeds = plan.seed_range(quick=4, full=30)
    exact = [
        cell("gradient", s, n=n, lam=lam, **broken) for s in seeds for n in (1, 2, 3) for lam in (1.0, 0.9)
    ]
    return exact + [cell("gradient", s, n=n, lam=1.0, noise=0.3, **broken) for s in seeds for n in (1, 2, 3)]


def noisy_cells(plan: Plan) -> list[Cell]:
    return [
        cell("gradient", s, n=n, lam=0.9, noise=0.3)
        for s in plan.seed_range(quick=4, full=30)
        for n in (1, 2)
    ]


def judge_gradient(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["error"] for o in outcomes])


# ---- learning curves on the phrase MDP -------------------------------------------------------------------------------

SHARED, BEST = 10.0, 20.0  # the step of n = 6, and n = 1's own: largest areas on seeds under 100, of 5 to 25


def phrases(*, seed: int, n: int, step: float, lam: float = 0.95, updates: int = 150) -> dict[str, Any]:
    """The exact expected reward after each update of 16 responses; position-wise softmax policy, TD-learned critic.

    T = 24 positions, V = 3 tokens; the reward, at the end, is the share of the 8 phrases (3 tokens) that are the
    seed's. The critic has a value a position and moves 0.3 of the way to the mean target.
    """
    rng = np.random.default_rng([seed, 4])
    T, V, B = 24, 3, 16
    target, logits, value = rng.integers(V, size=T), np.zeros((T, V)), np.zeros(T)
    macro, curve, place = fixed(np.ones((B, T), dtype=bool), n), [], np.arange(T)
    for _ in range(updates):
        pi = np.exp(logits - logits.max(axis=1, keepdims=True))
        pi /= pi.sum(axis=1, keepdims=True)
        curve.append(float(pi[place, target].reshape(-1, 3).prod(axis=1).mean()))
        tokens = (rng.random((B, T, 1)) > np.cumsum(pi, axis=1)[:, :-1]).sum(axis=2)
        rewards = np.zeros((B, T))
        rewards[:, -1] = (tokens == target).reshape(B, -1, 3).all(axis=2).mean(axis=1)
        found = macro_gae(rewards, np.broadcast_to(value, (B, T)), macro, lam=lam)
        logits += step * (found.advantage[:, :, None] * (np.eye(V)[tokens] - pi)).mean(axis=0)
        value += 0.3 * (found.target.mean(axis=0) - value)
    reached = next((i for i, x in enumerate(curve) if x >= 0.9), updates)
    return {"area": float(np.mean(curve)), "reached": reached, "curve": curve[::5]}


def phrase_cells(plan: Plan, lam: float = 0.95, best: float = BEST) -> list[Cell]:
    seeds, runs = plan.seed_range(quick=16, full=60), ((6, SHARED), (1, SHARED), (1, best))
    return [cell("phrases", s, n=n, step=step, lam=lam) for s in seeds for n, step in dict.fromkeys(runs)]


def of_run(outcomes: Sequence[Outcome], n: int, step: float, what: str = "area") -> Array:
    return np.array([o[what] for o in outcomes if (o["n"], o["step"]) == (n, step)])


def judge_phrases(outcomes: Sequence[Outcome]) -> Judgement:
    """Areas under the curves of n = 6 minus those of n = 1, paired over seeds, above 0.01."""
    macro = of_run(outcomes, 6, SHARED)

    def part(step: float) -> Callable[[float], Judgement]:
        differences = macro - of_run(outcomes, 1, step)
        return lambda level: judge_ordering(differences, margin=0.01, level=level)

    steps = sorted({float(o["step"]) for o in outcomes if o["n"] == 1})
    return conjunction({f"n = 1 at step {step:g}": part(step) for step in steps})


def draw_phrases(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    updates = np.arange(1, 151, 5)
    runs = ((6, SHARED), (1, SHARED), (1, BEST))
    lines = [figures.Curve(f"n = {n}, step {x:g}", updates, of_run(outcomes, n, x, "curve")) for n, x in runs]
    return figures.loglog(lines, x="updates", y="expected reward")


# ---- the claims ------------------------------------------------------------------------------------------------------


CLAIMS = (
    Claim(
        name="ma_rlhf.identities",
        kind="identity",
        title="One-token macros are token GAE to the last bit; one macro is REINFORCE; rewards add up",
        statement=r"$n = 1$: $\hat A_t$ is token GAE, bit for bit. $n \geq T$: $\hat A_t = \sum r - \bar V$ for all "
        r"$t$. $\sum_m R_m = \sum_t r_t$ at $\gamma = 1$. $\lambda = 1$: $\hat A_t = \sum_{j \geq 0} \gamma^j "
        r"r_{\tau + j} - V_\tau$, $\tau$ the start of $t$'s macro, with $\gamma^{\mathrm{len}}$ between macros.",
        source=f"{PAPER}, section 3 (macro-level GAE)",
        cells=batch_cells,
        judge=judge_batches,
        controls=controls(
            batch_cells,
            code="the code's mean of rewards, which are not only terminal",
            once="gamma once a macro in place of gamma^len",
            bigrams="n = 2 taken for n = 1",
        ),
    ),
    Claim(
        name="ma_rlhf.partition",
        kind="identity",
        title="Every termination puts each token of each row into one macro, by its rule",
        statement=r"Fixed and randomised $n$-grams, rising perplexity and given boundaries: the macros of a row are "
        r"contiguous, cover its tokens once, and have the rule's lengths; the last has one token where asked for.",
        source=f"{PAPER}, section 3.1 (terminations), and its code",
        cells=partition_cells,
        judge=judge_errors,
        controls=controls(
            partition_cells,
            row_zero="the boundaries of row 0 for every row",
            no_last="the last token is not alone",
        ),
    ),
    Claim(
        name="ma_rlhf.credit",
        kind="identity",
        title="Macros bring the terminal reward closer: its credit decays once a macro",
        statement=r"Of a terminal reward $R$ the first token is credited with $\lambda^{\lceil T/n\rceil - 1} R$, "
        r"$T = 512$; with the code's aggregation the macros' rewards sum to $R$ if the last token is alone.",
        source=f"{PAPER}, the decay of credit over tokens (its motivation), and its code",
        cells=credit_cells,
        judge=judge_errors,
        controls=controls(
            credit_cells,
            averaged="the terminal reward averaged into the last n-gram",
            by_token="the decay over tokens",
        ),
    ),
    Claim(
        name="ma_rlhf.gradient",
        kind="identity",
        title="With values at the macros' starts the expected policy gradient does not depend on n",
        statement=r"$E\sum_t \hat A_t \nabla\log\pi(a_t|s_t) = \nabla J$ for $n = 1, 2, 3$: at any $\lambda$ with an "
        r"exact critic, at $\lambda = 1$ with any critic.",
        assumptions=(
            "boundaries fixed in advance",
            "$V_m$ is the value of the prefix where the macro starts",
        ),
        source=f"consistency of {PAPER}, macro-level GAE; derived here",
        cells=gradient_cells,
        judge=judge_gradient,
        controls=(
            Control("noisy_critic", "lambda = 0.9 with a noisy critic", noisy_cells),
            *controls(
                gradient_cells,
                equal="the paper's default: the mean of the values of the macro's tokens",
                unit="the value of the macro's last token",
                position="weights in proportion to 1/(i+1)",
                perplexity="boundaries that look at the token they precede",
                last_alone="a macro for the last token, where that token decides that it is the last",
            ),
        ),
    ),
    Claim(
        name="ma_rlhf.speed",
        kind="ordering",
        title="On the phrase MDP macros of six tokens learn faster than tokens, through the decay of credit",
        statement=r"$\lambda = 0.95$: the area under the curve of the exact expected reward is larger for $n = 6$ than "
        r"for $n = 1$ by more than $0.01$, with the same step and with $n = 1$'s best. At $\lambda = 1$ it is not (the "
        r"control).",
        assumptions=("T = 24, V = 3, 16 responses, 150 updates", "steps chosen on other seeds"),
        source=f"{PAPER}, the learning curves (the size of the effect is not asserted)",
        cells=phrase_cells,
        judge=judge_phrases,
        controls=(
            Control(
                "no_decay",
                "lambda = 1, where credit does not decay",
                lambda plan: phrase_cells(plan, 1.0, SHARED),
            ),
        ),
        figure=draw_phrases,
    ),
)
