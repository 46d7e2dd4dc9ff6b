"""What the claims about equilibria and about mirror-prox measure: games with many equilibria, planted faults, cells.

See `nash_md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...algorithms.planning.games import (
    kl,
    mirror_prox_step,
    nash,
    regularised_nash,
    softmax,
)
from ...algorithms.planning.max_entropy import max_entropy_nash
from ...envs.kernels import Array
from ...envs.preference_games import Game, PreferenceGame, random_game
from ...envs.structured_games import LowRankGame, block_game, duplicated_game, random_kernel_game
from ._declare import cells_of
from ._game_runs import game as small_game

WORLDS = ("duplicates", "blocks", "plane", "kernel")


cell = cells_of(__name__)


def many_equilibria(seed: int, world: str) -> PreferenceGame:
    """Duplicates of responses, games side by side, features all around the origin of a plane, each with a random
    reference; and "kernel", which in general has one equilibrium.
    """
    rng = np.random.default_rng([seed, 3])

    def reference(n: int) -> Array:
        return 0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n

    if world == "duplicates":
        copies = rng.integers(1, 4, size=5)
        return duplicated_game(random_game(5, rng), copies, reference=reference(copies.sum()))
    if world == "blocks":
        parts = [random_game(int(n), rng) for n in rng.integers(1, 5, size=3)]
        return block_game(parts, reference=reference(sum(map(len, parts))))
    if world == "plane":
        angles = 2 * np.pi * (np.arange(12) + rng.uniform(-0.4, 0.4, 12)) / 12
        U, C = np.column_stack([np.cos(angles), np.sin(angles)]), np.array([[0, 0.5], [-0.5, 0]])
        return LowRankGame(U, C, reference(12)).dense()
    n = int(rng.integers(4, 10))
    return random_kernel_game(n, rng, scale=2.0, reference=reference(n))


def cold_limit(*, seed: int, world: str, taus: Sequence[float], fault: str = "none") -> dict[str, Any]:
    """The equilibrium of least KL to mu against the regularised ones.

    limit  largest difference from the extrapolation to tau = 0, 2 pi_{tau/2} - pi_tau, tau = 2e-6
    slack  KL(it, mu) - KL(pi_tau, mu) at the taus, at least 0
    gap    what the convex program's own certificates leave open
    """
    g = many_equilibria(seed, world)
    found = max_entropy_nash(g)
    policy, log_policy = found.policy, found.log_policy
    if fault == "vertex":
        chosen = nash(g)
        policy, log_policy = chosen.policy, chosen.log_policy
    if fault == "uniform":
        chosen = max_entropy_nash(PreferenceGame(g.P))
        policy, log_policy = chosen.policy, chosen.log_policy
    cold, colder = (regularised_nash(g, tau).policy for tau in (2e-6, 1e-6))
    far = kl(log_policy, g.log_reference)
    near = [kl(regularised_nash(g, tau).log_policy, g.log_reference) for tau in taus]
    return {
        "limit": float(np.abs(2 * colder - cold - policy).max()),
        "slack": [far - each for each in near],
        "gap": max(abs(found.gap), found.exploitability),
        "dimension": found.dimension,
    }


def one_projection(
    game: Game, pi: Array, log_pi: Array, tau: float, step: float
) -> tuple[Array, Array, Array]:
    """Mirror ascent: the step without its look ahead."""
    law, log_law = softmax(
        (log_pi + step * tau * game.log_reference + step * game.wins(pi)) / (1 + step * tau)
    )
    return law, law, log_law


def from_the_half(
    game: Game, pi: Array, log_pi: Array, tau: float, step: float
) -> tuple[Array, Array, Array]:
    """The second half starts from pi' in place of pi."""
    half, _, _ = mirror_prox_step(game, pi, log_pi, tau, step)
    return one_projection(game, half, np.log(half), tau, step)


PROX = {"mirror_prox": mirror_prox_step, "one_projection": one_projection, "from_the_half": from_the_half}


def prox(
    *, seed: int, world: str, tau: float, step: float, T: int, kind: str = "mirror_prox"
) -> dict[str, Any]:
    """Steps of mirror-prox from mu, as long as KL(pi*, pi) > 1e-16: the largest ratio of (1 + s tau) KL(pi*, next pi)
    to KL(pi*, pi), at most 1, and KL(pi*, pi_t) against its bound."""
    g = small_game(seed, world)
    star = regularised_nash(g, tau).log_policy
    pi, log_pi = g.reference, g.log_reference
    divergence = [kl(star, log_pi)]
    while len(divergence) <= T and divergence[-1] > 1e-16:
        _, pi, log_pi = PROX[kind](g, pi, log_pi, tau, step)
        divergence.append(kl(star, log_pi))
    D = np.array(divergence)
    # below that the rounding of pi* is seen
    contraction = 1 - (1 + step * tau) * (D[1:] / D[:-1])
    return {
        "contraction": float(contraction[D[1:] > 1e-16].min()),
        "bound": float((D[0] * (1 + step * tau) ** -np.arange(float(len(D))) - D).min()),
    }
