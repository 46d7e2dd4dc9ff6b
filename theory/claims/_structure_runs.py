"""What the claims about the structure of preferences measure: cells and planted faults.

See `heron`, `bradley_terry_fit` and `judges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from ...algorithms.estimation.bradley_terry import fit_bradley_terry
from ...algorithms.planning.games import exploitability, kl, nash, regularised_nash, softmax
from ...envs.judges import JUDGES, judged_game
from ...envs.kernels import Array
from ...envs.lexicographic import LexicographicComparator, lexicographic_weights, uniform_cycle_share
from ...envs.preference_games import (
    PreferenceGame,
    bradley_terry_game,
    cyclic_game,
    random_game,
    three_type_game,
    three_type_nash,
)
from ...envs.tournaments import beats, condorcet_winner, cycles, is_preorder, schwartz_set, smith_set
from ._declare import cells_of

cell = cells_of(__name__)


# ---- heron: factors in their order of importance --------------------------------------------------------------------


def preorder(
    *, seed: int, kind: str = "integers", margin: float = 0.0, real: bool = False, fault: str = "none"
) -> dict[str, Any]:
    """40 responses with three factors, whole-numbered or real, compared in a random order of importance.

    cycles       cyclic triples, and 1 more if the relation is no total preorder
    ranking      pairs on which the tree and Python's order of tuples disagree
    weights      pairs on which the tree and the weighted sum of `lexicographic_weights` disagree
    real         a random part of a unit is added to each whole number
    fault        reversed: the least important factor first in the tree
    """
    rng = np.random.default_rng([seed, 1])
    ranges = rng.integers(2, 6, size=3)
    z = rng.integers(0, ranges, size=(40, 3)) if kind == "integers" else rng.random((40, 3)) * ranges
    z = z + rng.random(z.shape) if real else z
    order = tuple(int(column) for column in rng.permutation(3))
    asked = order[::-1] if fault == "reversed" else order
    game = LexicographicComparator.measured(z, asked, (margin, 0.0, 0.0)).game(z)
    keys = [tuple(float(x) for x in row[list(order)]) for row in z]
    ranked = np.array([[a > b for b in keys] for a in keys])
    total = z[:, order] @ lexicographic_weights(ranges[list(order)])
    return {
        "cycles": cycles(game).count + (not is_preorder(game)),
        "ranking": int((beats(game) != ranked).sum()),
        "weights": int((beats(game) != (total[:, None] > total)).sum()),
    }


def invariance(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Differing entries of P for 40 responses with three real factors; each is 0 by the statement.

    antisymmetry  P + P^T against 1, margins included
    monotone      each factor through an increasing function, no margins
    rescaled      each factor times a positive number, margins in units of the standard deviation
    single        one factor, no margin, against its ranking
    comonotone    factors that rise together, no margins, against a sum with random positive weights
    fault         margin: monotone functions with margins; absolute: margins in the units of the factors
    """
    rng = np.random.default_rng([seed, 2])
    z, order, margins = rng.standard_normal((40, 3)), (1, 0, 2), (0.3, 0.2, 0.0)
    plain = LexicographicComparator(order)
    transformed = np.column_stack([np.exp(z[:, 0]), z[:, 1] ** 3, np.arctan(z[:, 2])])
    bare = LexicographicComparator(order, margins) if fault == "margin" else plain
    scaled = z * rng.uniform(0.2, 5, 3)

    def with_margins(table: Array) -> LexicographicComparator:
        if fault == "absolute":
            return LexicographicComparator(order, margins)
        return LexicographicComparator.measured(table, order, margins)

    P = with_margins(z).compare(z[:, None], z)
    rise = np.sort(rng.random(40))
    together = np.column_stack([rise, rise**2, np.floor(5 * rise)])
    linear = together @ rng.uniform(0.1, 2, 3)
    return {
        "antisymmetry": int((P + P.T != 1).sum()),
        "monotone": int((bare.game(transformed).P != bare.game(z).P).sum()),
        "rescaled": int((with_margins(scaled).compare(scaled[:, None], scaled) != P).sum()),
        "single": int((beats(LexicographicComparator((1,)).game(z)) != (z[:, 1][:, None] > z[:, 1])).sum()),
        "comonotone": int((beats(plain.game(together)) != (linear[:, None] > linear)).sum()),
    }


def circles(*, seed: int, margin: float, draws: int, fault: str = "none") -> dict[str, Any]:
    """Independent triples of responses with two uniform factors, a margin on the first, in units of its range: how many
    run in a circle of one orientation, the first beats the second, the second the third, the third the first.

    fault  both: of either orientation; deviations: the margin is in standard deviations
    """
    z = np.random.default_rng([seed, 3]).random((3, draws, 2))
    unit = 12**-0.5 if fault == "deviations" else 1.0
    tree = LexicographicComparator((0, 1), (margin, 0.0), (unit, 1.0))
    wins = np.array([tree.compare(z[i], z[(i + 1) % 3]) for i in range(3)])
    found = (wins == 1).all(axis=0)
    if fault == "both":
        found |= (wins == 0).all(axis=0)
    return {"found": int(found.sum()), "expected": uniform_cycle_share(margin) / 2}


def lightest(*, seed: int, sizes: Sequence[int], whole: bool = False) -> dict[str, Any]:
    """For samples of two factors, uniform on [0, 1], the largest w for which z_1 + w z_2 orders them lexicographically:
    the smallest (z_1 - z_1') / (z_2' - z_2) over pairs that the second factor would order otherwise.

    whole  factors in {0, 1/9, ..., 1}
    """
    rng = np.random.default_rng([seed, 10])
    found = []
    for n in sizes:
        z = rng.integers(0, 10, (n, 2)) / 9 if whole else rng.random((n, 2))
        d = z[:, None] - z
        against = (d[..., 0] > 0) & (d[..., 1] < 0)
        found.append(float((d[..., 0][against] / -d[..., 1][against]).min()))
    return {"weight": found}


def heron_game(seed: int, n: int, margin: float) -> PreferenceGame:
    """n responses with two factors uniform on [0, 1], a margin on the first in units of its range."""
    z = np.random.default_rng([seed, 4]).random((n, 2))
    return LexicographicComparator((0, 1), (margin, 0.0)).game(z)


def misfit(*, seed: int, n: int, margin: float, fault: str = "none") -> dict[str, Any]:
    """The smallest KL a comparison between the labels of HERON and a Bradley-Terry law, and its bound by cycles.

    A triple {i, j, k} in a circle costs at least 3 log 2 (its three differences of rewards sum to 0, and -log sigma is
    convex), and a pair lies in n - 2 triples: (n - 2) sum_pairs KL >= 3 log 2 * cycles.
    fault  alone: as if a pair lay in one triple only
    """
    game = heron_game(seed, n, margin)
    fit, count = fit_bradley_terry(game), cycles(game).count
    bound = 3 * np.log(2) * count / (1 if fault == "alone" else n - 2) / (n * (n - 1) / 2)
    flat = fit_bradley_terry(heron_game(seed, n, 0.0)).misfit
    return {
        "misfit": fit.misfit,
        "bound": bound,
        "without_margin": flat,
        "cycles": count,
        "certificate": fit.certificate,
    }


def winner(*, seed: int, n: int, margin: float, noise: float = 0.0) -> dict[str, Any]:
    """What the response with the highest Bradley-Terry reward loses to its best reply, and what Nash's policy does.

    noise  of the labels that the first factor decides, P -> noise / 2 + (1 - noise) P; the second one's are certain
    """
    rng = np.random.default_rng([seed, 4])
    z = rng.random((n, 2))
    P = LexicographicComparator((0, 1), (margin, 0.0)).game(z).P
    first = np.abs(z[:, 0][:, None] - z[:, 0]) > margin
    game = PreferenceGame(np.where(first, noise / 2 + (1 - noise) * P, P))
    return {
        "condorcet": condorcet_winner(game) is not None,
        "reward": exploitability(game, np.eye(n)[fit_bradley_terry(game).best]),
        "nash": exploitability(game, nash(game).policy),
    }


# ---- bradley_terry_fit: what a reward depends on --------------------------------------------------------------------


def connected_law(n: int, rng: np.random.Generator) -> Array:
    """A joint law (n, n) of comparisons on a random spanning tree and some further pairs."""
    joint = np.zeros((n, n))
    order = rng.permutation(n)
    for k in range(1, n):
        joint[order[k], order[rng.integers(k)]] = rng.uniform(0.2, 1)
    extra = (rng.random((n, n)) < 0.2) & ~np.eye(n, dtype=bool)
    joint += extra * rng.uniform(0.2, 1, (n, n))
    return joint / joint.sum()


def sampling_free(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Two laws of comparisons of a Bradley-Terry population: the fits against each other and against the truth.

    fault  random: a random game in its place, and its fit to uniform comparisons for the truth
    """
    rng = np.random.default_rng([seed, 5])
    n = int(rng.integers(3, 9))
    reward = rng.normal(0, 1.5, n)
    game = bradley_terry_game(reward)
    if fault == "random":
        game = random_game(n, rng)
        reward = fit_bradley_terry(game).reward
    fits = [fit_bradley_terry(game, connected_law(n, rng)) for _ in range(2)]
    return {
        "errors": [float(np.ptp(f.reward - reward)) for f in fits]
        + [float(np.ptp(fits[0].reward - fits[1].reward))],
        "certificate": max(f.certificate for f in fits),
    }


def win_rates(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Pairs of a random law over the responses of a random game: the reward's order, and the fitted win rates.

    order  pairs that the reward orders otherwise than P(. > law);  rates  largest error of the fitted win rates
    fault  uniform: win rates against the uniform law; joint: pairs from a joint law that is not iid
    """
    rng = np.random.default_rng([seed, 6])
    n = int(rng.integers(3, 9))
    law = 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n
    game = random_game(n, rng)
    pairs = rng.dirichlet(np.ones(n * n)).reshape(n, n) if fault == "joint" else law
    r = fit_bradley_terry(game, pairs).reward
    opponents = np.full(n, 1 / n) if fault == "uniform" else law
    wins = game.P @ opponents
    return {
        "order": int(((r[:, None] > r) != (wins[:, None] > wins)).sum()),
        "rates": float(np.abs(expit(r[:, None] - r) @ opponents - wins).max()),
    }


def jump(*, seed: int, step: float, fault: str = "none") -> dict[str, Any]:
    """Three types of people on both sides of e = 0, at -step and step: the best response, the reward, the equilibrium.

    policy  total variation between the best policies of both sides, 1 = they share nothing
    reward  how far the reward moves;  nash  total variation between the equilibria (linear program)
    best    whether at a random e the best response is 1 (B's favourite) for e > 0, else 0
    fault   bradley_terry: people whose answers follow a reward; nash: the equilibrium in place of the best response
    """
    rng = np.random.default_rng([seed, 7])
    e = float(rng.uniform(0.01, 0.3) if rng.random() < 0.5 else rng.uniform(-0.6, -0.01))

    def people(e: float) -> PreferenceGame:
        return (
            bradley_terry_game([1 - e, 1 + e, 0.3 + 2 * e])
            if fault == "bradley_terry"
            else three_type_game(e)
        )

    if fault == "bradley_terry":  # a reward that leads by more than e moves it

        def people(e: float) -> PreferenceGame:
            return bradley_terry_game([1 - e, 0.5 + e, 0.0])

    def policy(e: float) -> Array:
        game = people(e)
        return nash(game).policy if fault == "nash" else np.eye(3)[fit_bradley_terry(game).best]

    sides = [people(-step), people(step)]
    rewards = [fit_bradley_terry(side).reward for side in sides]
    equilibria = [nash(side).policy for side in sides]
    return {
        "policy": float(np.abs(policy(-step) - policy(step)).sum() / 2),
        "reward": float(np.ptp(rewards[1] - rewards[0])),
        "nash": float(np.abs(equilibria[1] - equilibria[0]).sum() / 2),
        "closed": float(np.abs(equilibria[1] - three_type_nash(step)).max()),
        "best": int(fit_bradley_terry(people(e)).best) == int(e > 0),
        "e": e,
    }


def two_laws(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """A cycle, and three policies that write the comparisons, each with most of its mass on another response m.

    The response that beats m is the best: with pi_c / pi_m < (smallest margin) for both others c, sigma(r_a - r_m) >=
    P(a > m) - pi_c / pi_m > 1/2 where a beats m and c is the third, and likewise m is above c.
    wrong   policies whose best response is another;  winners  how many responses are the best of some policy
    slack   of the bound on sigma(r_a - r_m)
    spread  the largest difference between two of the three rewards, constants aside
    fault   bradley_terry: a population that follows a reward; uniform: the three policies are all uniform
    """
    rng = np.random.default_rng([seed, 8])
    wins = rng.uniform(0.6, 0.95, 3)
    game = cyclic_game(wins)  # type: ignore[arg-type]
    if fault == "bradley_terry":
        game = bradley_terry_game(rng.normal(0, 1, 3))
    ratio = 0.9 * (wins.min() - 0.5)
    best, slack, rewards, predicted = [], [], [], []
    for m in range(3):
        law = np.full(3, ratio)
        law[m] = 1.0
        law = np.full(3, 1 / 3) if fault == "uniform" else law / law.sum()
        fit, above = fit_bradley_terry(game, law), (m - 1) % 3
        best.append(fit.best)
        predicted.append(above)
        rewards.append(fit.reward)
        slack.append(float(expit(fit.reward[above] - fit.reward[m]) - (game.P[above, m] - ratio)))
    return {
        "wrong": sum(a != b for a, b in zip(best, predicted, strict=True)),
        "winners": len(set(best)),
        "slack": min(slack),
        "spread": max(float(np.ptp(a - b)) for a in rewards for b in rewards),
    }


# ---- judges: a majority on the language world -----------------------------------------------------------------------


def majority_cycles(
    *, seed: int, prompt: int, judges: Sequence[str] = JUDGES, strict: bool = False
) -> dict[str, Any]:
    """The cycles of the majority over the answers to one prompt. Nothing here is random."""
    made = judged_game(prompt, judges, strict=strict, merge=True)
    game = made.game
    found = cycles(game)
    likely = found.likely or ()
    return {
        "count": found.count,
        "share": found.share,
        "triple": [made.texts[i] for i in likely],
        "wins": [float(game.P[a, b]) for a, b in zip(likely, (*likely[1:], *likely[:1]), strict=True)],
        "condorcet": condorcet_winner(game) is not None,
        "smith": len(smith_set(game)),
        "schwartz": len(schwartz_set(game)),
        "responses": len(game),
        "preorder": is_preorder(game),
    }


def one_judge(*, seed: int, prompt: int, judges: Sequence[str]) -> dict[str, Any]:
    """Whether a majority of one ranks the answers by its score, and is a limit of Bradley-Terry's laws."""
    made = judged_game(prompt, judges, merge=True)
    score = made.scores[:, 0]
    fit = fit_bradley_terry(made.game)
    return {
        "ranking": int((beats(made.game) != (score[:, None] > score)).sum()),
        "cycles": cycles(made.game).count,
        "misfit": fit.misfit,
    }


def reward_errors(
    *, seed: int, prompt: int, judges: Sequence[str] = JUDGES, fault: str = "none"
) -> dict[str, Any]:
    """How often rewards rank two draws from the reference against the majority: Bradley-Terry's, each judge's score, a
    random one, and the majority's own count of wins minus losses. A triple in a circle has a pair that any reward gets
    wrong, and a random triple has three pairs: at least share / 3.

    fault  preference: the majority itself in place of the rewards, which depends on both responses
    """
    made = judged_game(prompt, judges, merge=True)
    game, rng = made.game, np.random.default_rng([seed, 9])
    D, mu, share = beats(game), game.reference, cycles(game).share
    if fault == "preference":
        return {"share": share, "wrong": {fault: 2 * float(mu @ (D & ~(game.P > 0.5)) @ mu)}}
    fit = fit_bradley_terry(game)
    ranked = fit.reward - fit.group * (1 + np.ptp(fit.reward))  # a better group before a worse one
    rewards = {
        "bradley_terry": ranked,
        "random": rng.standard_normal(len(game)),
        "wins": D.sum(axis=1) - D.sum(axis=0),
    }
    rewards |= {name: made.scores[:, i] for i, name in enumerate(made.judges)}
    wrong = {name: 2 * float(mu @ (D & (r[:, None] <= r)) @ mu) for name, r in rewards.items()}
    return {"share": share, "wrong": wrong, "certificate": fit.certificate}


def duel(
    *, seed: int, prompt: int, tau: float, times: float = 1.0, exchanged: bool = False
) -> dict[str, Any]:
    """The regularised equilibrium against mu exp(r / beta) / Z, r the best Bradley-Terry reward of comparisons of the
    reference's answers, beta such that both have the same KL to the reference.

    times  the reward's policy may have that many times the KL;  exchanged: how far the reward's policy is ahead
    """
    from scipy.optimize import brentq

    game = judged_game(prompt, merge=True).game
    star, fit = regularised_nash(game, tau), fit_bradley_terry(game)
    budget = times * kl(star.log_policy, game.log_reference)

    def tilted(inverse: float) -> tuple[Array, Array]:
        return softmax(game.log_reference + inverse * fit.reward)

    inverse = brentq(lambda b: kl(tilted(b)[1], game.log_reference) - budget, 0, 1000, xtol=1e-13, rtol=1e-14)
    policy, log_policy = tilted(inverse)
    wins = game.probability(star.policy, policy)
    return {
        "lead": 0.5 - wins if exchanged else wins - 0.5,
        "kl": [kl(star.log_policy, game.log_reference), kl(log_policy, game.log_reference)],
        "certificate": max(fit.certificate, star.exploitability),
        "exploitability": [exploitability(game, star.policy, tau), exploitability(game, policy, tau)],
    }
