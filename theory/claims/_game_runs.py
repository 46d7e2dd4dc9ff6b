"""What the claims about preference games measure: games, planted faults and cells. See `nash_md`, `inpo`, `sppo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...algorithms.inpo import INPO
from ...algorithms.nash_md import NashMD
from ...algorithms.planning.games import divergences, exploitability, kl, nash, regularised_nash, softmax
from ...algorithms.self_play import SelfPlay, mixture
from ...algorithms.sppo import SPPO, hedge_step
from ...envs.kernels import Array
from ...envs.preference_games import (
    PreferenceGame,
    cyclic_game,
    random_game,
    sound_quality_game,
    three_type_game,
    three_type_nash,
)
from ...envs.sound_quality import PIECES, borda
from ._declare import cells_of

cell = cells_of(__name__)


def game(seed: int, kind: str = "random") -> PreferenceGame:
    """The seed's game; a random one has 3 to 8 responses and a random reference, positive everywhere."""
    rng = np.random.default_rng([seed, 1])
    if kind == "cyclic":
        return cyclic_game(rng.uniform(0.6, 0.95, 3))  # type: ignore[arg-type]
    if kind == "listeners":
        return sound_quality_game(PIECES[seed % len(PIECES)])
    n = int(rng.integers(3, 9))
    return random_game(n, rng, reference=0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)


def seeds_of(kind: str, seeds: Sequence[int]) -> list[int]:
    """The seeds that are different games: a piece of music each for the listeners."""
    return [s for s in seeds if kind != "listeners" or s < len(PIECES)]


def concentrated(game: PreferenceGame, seed: int) -> Array:
    """A start near the response that the reference's best response likes least: 1e-6 of the mass lies elsewhere."""
    law = np.full(len(game), 1e-6 / len(game))
    law[np.argmin(game.P @ game.reference)] += 1 - 1e-6
    return law


# ---- planted faults --------------------------------------------------------------------------------------------------


class SwappedWeights(NashMD):
    """The mixture's weights exchanged: eta tau of pi_t, 1 - eta tau of mu."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        opponent, log_mixture = mixture(self.log_policy, self.game.log_reference, 1 - eta * self.tau)
        return softmax(log_mixture + eta * self.game.wins(opponent))


class OwnOpponent(NashMD):
    """The opponent is pi_t in place of the mixture (which is INPO)."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        _, log_mixture = mixture(self.log_policy, self.game.log_reference, eta * self.tau)
        return softmax(log_mixture + eta * self.game.wins(self.policy))


class ArithmeticMixture(NashMD):
    """The arithmetic mean (1 - eta tau) pi_t + eta tau mu in place of the geometric mixture."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        share = eta * self.tau
        mixed = (1 - share) * self.policy + share * self.game.reference
        return softmax(np.log(mixed) + eta * self.game.wins(mixed))


class MixtureOpponent(INPO):
    """INPO whose opponent is the mixture (which is Nash-MD)."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        opponent, log_mixture = mixture(self.log_policy, self.game.log_reference, eta * self.tau)
        return softmax(log_mixture + eta * self.game.wins(opponent))


class Losing(SPPO):
    """Climbs the probability to lose, P(pi_t > .)."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        return softmax(self.log_policy + eta * (1 - self.game.wins(self.policy)))


KINDS: dict[str, type[NashMD] | type[INPO]] = {
    "nash_md": NashMD,
    "inpo": INPO,
    "swapped_weights": SwappedWeights,
    "own_opponent": OwnOpponent,
    "arithmetic_mixture": ArithmeticMixture,
    "mixture_opponent": MixtureOpponent,
}


# ---- cells -----------------------------------------------------------------------------------------------------------


def mirror_step(*, seed: int, share: float, kind: str = "nash_md") -> dict[str, Any]:
    """One step from a random policy, against its definition, at eta tau = share.

    Every other law q falls short of the step in eta P(q > m) - KL(q, m) by exactly KL(q, step), with m the mixture,
    here multiplied out; so the step is the only maximiser. Measured at random laws q.
    """
    g, rng = game(seed), np.random.default_rng([seed, 2])
    tau = float(rng.uniform(0.05, 1))
    eta = share / tau
    start = 0.9 * rng.dirichlet(np.ones(len(g))) + 0.1 / len(g)
    step = KINDS[kind](g, tau, eta, start).advance(1)
    m = start ** (1 - share) * g.reference**share
    log_m = np.log(m / m.sum())
    wins = g.P @ np.exp(log_m)

    def value(law: Array, log_law: Array) -> float:
        return eta * float(law @ wins) - float(law @ (log_law - log_m))

    best = value(step.policy, step.log_policy)
    errors = []
    for q in 0.99 * rng.dirichlet(np.ones(len(g)), size=8) + 0.01 / len(g):
        errors.append(best - value(q, np.log(q)) - float(q @ (np.log(q) - step.log_policy)))
    return {"errors": errors, "eta": eta}


def course(
    *,
    seed: int,
    tau: float,
    T: int,
    eta: float | None = None,
    start: str = "reference",
    world: str = "random",
    kind: str = "nash_md",
    reverse: bool = False,
    checkpoints: Sequence[int] = (),
) -> dict[str, Any]:
    """T steps: the smallest slacks of the one-step recursion and of the last-iterate bound, and KL at checkpoints.

    reverse: KL(pi_t, pi*) in place of KL(pi*, pi_t).
    """
    g = game(seed, world)
    star = regularised_nash(g, tau).log_policy
    run = KINDS[kind](g, tau, eta, None if start == "reference" else concentrated(g, seed))
    course = np.array([run.log_policy, *(run.advance(1).log_policy for _ in range(T))])
    divergence = divergences(course, star) if reverse else divergences(star, course)
    eta_t = np.array([run.step(t) for t in range(T)])
    recursion = (1 - eta_t * tau) * divergence[:-1] + 2 * eta_t**2 - divergence[1:]  # Theorem 1
    bound = 8 / (tau**2 * (np.arange(1, T + 1) + 1))
    return {
        "recursion": float(recursion.min()),
        "bound": float((bound - divergence[1:]).min()),
        "tightness": float((divergence[1:] / bound).max()),
        "divergence": divergence[np.asarray(checkpoints, dtype=int)],
    }


def bias(*, seed: int, tau: float, shares: Sequence[float], kind: str = "nash_md") -> dict[str, Any]:
    """KL(pi*, limit) at constant steps eta = share / tau, and how far the limit is from where it is said to be.

    own_mixture: distance of the limit of Nash-MD from the best response to its own mixture.
    Each run makes 32 / share steps, so that (1 - share)^steps < 1e-13; KL below 1e-30 is rounding, and set to it.
    """
    g = game(seed)
    star = regularised_nash(g, tau).log_policy
    floors, distances = [], []
    for share in shares:
        run = KINDS[kind](g, tau, share / tau).advance(int(32 / share))
        own, _ = mixture(run.log_policy, g.log_reference, share)
        reply, _ = softmax(g.log_reference + (g.P @ own) / tau)
        floors.append(max(kl(star, run.log_policy), 1e-30))
        distances.append(float(np.abs(reply - run.policy).max()))
    return {"divergence": floors, "own_mixture": distances}


def three_types(*, seed: int, exchanged: bool = False, rule: str = "nash") -> dict[str, Any]:
    """Three kinds of people at a random e: the equilibrium by linear programming, cold, and in closed form.

    exchanged: the shares of the types A and B exchanged in the closed form. rule="bradley_terry": the response with the
    highest Borda score, which is what a reward fitted to uniform comparisons prefers.
    """
    e = float(np.random.default_rng(seed).uniform(-0.5, 0.25))
    g = three_type_game(e)
    closed = three_type_nash(e)
    if exchanged:
        closed = closed[[0, 2, 1]]
    found = nash(g).policy
    if rule == "bradley_terry":
        found = np.eye(3)[int(np.argmax(borda(g.P)))]
    # the bias of the temperature is proportional to it: two temperatures cancel it up to its square
    cold, colder = (regularised_nash(g, tau).policy for tau in (2e-6, 1e-6))
    return {
        "linear_program": float(np.abs(found - closed).max()),
        "newton": float(np.abs(2 * colder - cold - closed).max()),
        "jump": int(np.argmax(borda(g.P))) == int(e > 0),
    }


def steps_agree(*, seed: int, share: float, fault: str = "none") -> dict[str, Any]:
    """R2: INPO's step is Nash-MD's but for the opponent; both are SPPO's at tau = 0. Maximal differences of log pi."""
    g, rng = game(seed), np.random.default_rng([seed, 2])
    tau, start = float(rng.uniform(0.1, 1)), 0.9 * rng.dirichlet(np.ones(len(g))) + 0.1 / len(g)
    eta = share / tau

    def log_step(run: SelfPlay) -> Array:
        return run.advance(1).log_policy

    eta_md = tau / share if fault == "inverse_step" else eta
    mine = log_step(INPO(g, tau, eta, start))
    opponent, _ = mixture(np.log(start), g.log_reference, share)
    # Nash-MD has the mixture as opponent; exchange the two opponents' win rates in its step
    md = log_step(NashMD(g, min(tau, 1 / eta_md), eta_md, start))
    exchanged = md if fault == "same_opponent" else md + eta * (g.P @ (start - opponent))
    cold = tau if fault == "warm" else 1e-14
    limit = log_step(SPPO(g, eta, start))
    differences = [mine - exchanged, *(log_step(k(g, cold, eta, start)) - limit for k in (NashMD, INPO))]
    return {"errors": [float(np.ptp(d)) for d in differences]}


def averages(*, seed: int, world: str, Ts: Sequence[int], fault: str = "none") -> dict[str, Any]:
    """SPPO at eta = sqrt(8 log n / T), a run for every T: exploitability of the average policy, and its bound.

    That exploitability is the regret a step, as P(pi_t > pi_t) = 1/2. The bound: log(1 / min mu) / (eta T) + eta / 8.
    """
    g = game(seed, world)
    exploitabilities, bounds = [], []
    for T in Ts:
        eta = hedge_step(len(g), T)
        run = (Losing if fault == "losing" else SPPO)(g, eta).advance(T)
        policy = run.policy if fault == "last_policy" else run.average
        exploitabilities.append(exploitability(g, policy))
        bounds.append(-float(g.log_reference.min()) / (eta * T) + eta / 8)
    return {"exploitability": exploitabilities, "bound": bounds}
