r"""What a judge says about a language model's lattice, in exact numbers: value, KL, win rate, exploitability, optimum.

On a `Lattice` every response of every prompt is written down, so that nothing here is estimated. With rho the law of
the prompts, pi_x the policy's law of the responses to x, mu_x that of the model the lattice was made from, r the
judge's reward, P the judge's preference:

    value                 E_rho E_pi[r]
    kl                    E_rho KL(pi_x, mu_x)
    entropy               E_rho H(pi_x), in nats
    win_rate              E_rho P(pi_x > mu_x)
    exploitability        E_rho max_y P(y > pi_x) - 1/2
    distance              E_rho KL(pi_x, pi*_x) to the `optimum` of the method's own objective on the lattice, where it
                          has one: the Gibbs law mu exp(r / beta) / Z, or the regularised Nash equilibrium at tau
    covered               the share of the policy's own texts, of its full vocabulary cut at H tokens, that lie on the
                          lattice: what the restriction leaves out is 1 - covered

They are numbers of the policy restricted to the lattice (k tokens and the end at each prefix, renormalised), and of
these prompts; not of other prompts, nor of longer texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import entr, expit

from ...algorithms.planning import exploitability, nash, regularised_nash
from ...algorithms.planning.games import divergences, softmax
from ...envs import FeatureMap, PreferenceGame
from ...envs.kernels import Array, Index
from ...envs.mdp import Layered
from ...envs.token_mdp import TokenMDP
from ..lattice import Lattice, LatticePolicy
from .judges import Judge, RewardJudge

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int], None]

PAIRS = 1_000_000  # a judge of preferences alone is asked about so many pairs at most
MATRIX = 4096  # responses a prompt, up to which a preference matrix is kept
CHUNK = 4096  # questions to a judge in one call

# The optimum of a method's objective with unlimited data, by the method's name.
GIBBS = ("kl_policy_gradient",)  # mu exp(r / beta) / Z
GIBBS_OF_PREFERENCES = (  # the same for the reward behind Bradley-Terry preferences, r / scale
    "dpo",
    "rpo",
    "vpo",
    "vpo_offline",
    "xpo",
    "online_dpo",
    "online_xpo",
    "iterative_dpo",
)
REGULARISED_NASH = ("nash_md", "nash_ema", "inpo", "online_ipo")  # pi ∝ mu exp(P(. > pi) / tau)
NASH = ("sppo",)


@dataclass(frozen=True, eq=False)
class Optimum:
    """law (roots, L) of the responses; name and how it is made, in words."""

    name: str
    law: Array


@dataclass(frozen=True, eq=False)
class JudgedLattice:
    """A lattice with the judge's answers about all its responses.

    rewards   (roots, L), None where the judge has preferences only
    games     a `PreferenceGame` a prompt, over the responses `support[x]`; None where there are too many responses
    support   (m_x,) a prompt: the responses that the reference can write
    optimum   of a method's objective, None where it is not known in closed form
    """

    lattice: Lattice
    judge: str | None
    rewards: Array | None
    games: tuple[PreferenceGame, ...] | None
    support: tuple[Index, ...]
    optimum: Optimum | None = None

    @property
    def world(self) -> TokenMDP:
        return self.lattice.world

    @property
    def rho(self) -> Array:
        return self.world.initial[1:]

    def law(self, policy: Layered | None = None) -> Array:
        """(roots, L) of the responses under exact tables; None = the reference."""
        return self.world.leaf_probabilities(policy).reshape(self.world.roots, -1)

    def numbers(self, law: Array) -> dict[str, Any]:
        """The numbers of the module's docstring, of a policy's law (roots, L), but for `covered`."""
        by_prompt = self._by_prompt(law)
        found: dict[str, Any] = {name: float(self.rho @ x) for name, x in by_prompt.items()}
        return found | {"by_prompt": {name: x.tolist() for name, x in by_prompt.items()}}

    def _by_prompt(self, law: Array) -> dict[str, Array]:
        with np.errstate(divide="ignore"):
            log_pi, log_mu = np.log(law), self.world.leaf_log_probabilities().reshape(law.shape)
        found: dict[str, Array] = {}
        if self.rewards is not None:
            found["value"] = (law * self.rewards).sum(1)
        found["kl"] = divergences(log_pi, log_mu)
        found["entropy"] = entr(law).sum(1)
        if self.games is not None:
            rows = [law[x, self.support[x]] for x in range(len(law))]
            rows = [row / row.sum() for row in rows]
            games = list(zip(self.games, rows, strict=True))
            found["win_rate"] = np.array([game.probability(row, game.reference) for game, row in games])
            found["exploitability"] = np.array([exploitability(game, row) for game, row in games])
        if self.optimum is not None:
            with np.errstate(divide="ignore"):
                found["distance"] = divergences(log_pi, np.log(self.optimum.law))
        return found


def judge_lattice(
    lattice: Lattice,
    judge: Judge | None,
    method: str | None = None,
    parameters: Mapping[str, float] | None = None,
    *,
    pairs: int = PAIRS,
    progress: Progress | None = None,
) -> JudgedLattice:
    """Ask the judge about all responses of a lattice; without a judge only KL and entropy are known.

    method, parameters  of a trainer: its optimum on the lattice goes into `optimum`
    pairs               a judge of preferences alone is asked about all pairs of responses to a prompt; ValueError where
                        they are more
    """
    world = lattice.world
    n = world.n_leaves // world.roots
    law = world.leaf_probabilities().reshape(world.roots, n)
    support = tuple(np.flatnonzero(row > 0) for row in law)
    if judge is None:
        return JudgedLattice(lattice, None, None, None, support)
    prompts, completions = lattice.completions()
    rewards, scale = None, None
    if isinstance(judge, RewardJudge):
        rewards = _rewards(judge, prompts, completions, progress).reshape(world.roots, n)
        scale = float(judge.scale)
        kept = [r[s] / scale for r, s in zip(rewards, support, strict=True)]
        matrices = None if n > MATRIX else [expit(r[:, None] - r) for r in kept]
    else:
        matrices = _matrices(judge, prompts, completions, support, n, pairs, progress)
    games = None
    if matrices is not None:
        games = tuple(
            PreferenceGame(P, row[s] / row[s].sum(), name=f"{judge.name}, prompt {x}")
            for x, (P, row, s) in enumerate(zip(matrices, law, support, strict=True))
        )
    found = JudgedLattice(lattice, judge.name, rewards, games, support)
    optimum = None if method is None else _optimum(found, scale, method, parameters or {})
    return replace(found, optimum=optimum)


def _rewards(judge: Judge, prompts: Any, completions: Any, progress: Progress | None) -> Array:
    found = np.empty(len(prompts))
    for first in range(0, len(prompts), CHUNK):
        rows = slice(first, first + CHUNK)
        found[rows] = judge.rewards(prompts[rows], completions[rows])
        if progress is not None:
            progress(min(first + CHUNK, len(prompts)), len(prompts))
    return found


def _matrices(
    judge: Judge,
    prompts: Any,
    completions: Any,
    support: Sequence[Index],
    n: int,
    pairs: int,
    progress: Progress | None,
) -> list[Array]:
    """P between the responses of each prompt, asked pair by pair."""
    asked = sum(len(s) * (len(s) - 1) // 2 for s in support)
    if asked > pairs:
        raise ValueError(
            f"the judge {judge.name} has preferences only, and the lattice's responses make {asked} pairs, more than "
            f"{pairs}: take a smaller k or horizon, or fewer prompts"
        )
    found, done = [], 0
    for x, s in enumerate(support):
        P = np.full((len(s), len(s)), 0.5)
        i, j = np.triu_indices(len(s), 1)
        for first in range(0, len(i), CHUNK):
            a, b = i[first : first + CHUNK], j[first : first + CHUNK]
            ones, twos = ([completions[x * n + s[y]] for y in side] for side in (a, b))
            answers = np.asarray(judge.preferences([prompts[x * n]] * len(a), ones, twos), dtype=np.float64)
            P[a, b], P[b, a] = answers, 1 - answers
            done += len(a)
            if progress is not None:
                progress(done, asked)
        found.append(P)
    return found


def _optimum(
    judged: JudgedLattice, scale: float | None, method: str, parameters: Mapping[str, float]
) -> Optimum | None:
    shape = (judged.world.roots, judged.world.n_leaves // judged.world.roots)
    log_mu = judged.world.leaf_log_probabilities().reshape(shape)
    if judged.rewards is not None and method in GIBBS + GIBBS_OF_PREFERENCES:
        beta = parameters["beta"]
        unit = 1.0 if method in GIBBS else float(scale or 1.0)
        tilted = log_mu + judged.rewards / (unit * beta)
        return Optimum(
            f"the Gibbs law, reference times exp(reward / {unit * beta:g})",
            np.array([softmax(row)[0] for row in tilted]),
        )
    if judged.games is not None and method in REGULARISED_NASH + NASH:
        law = np.zeros(shape)
        for x, (game, kept) in enumerate(zip(judged.games, judged.support, strict=True)):
            found = nash(game) if method in NASH else regularised_nash(game, parameters["tau"])
            law[x, kept] = found.policy
        name = (
            "the Nash equilibrium"
            if method in NASH
            else f"the regularised Nash equilibrium at tau = {parameters['tau']:g}"
        )
        return Optimum(name, law)
    return None


# ---- a policy's own numbers ------------------------------------------------------------------------------------------


def policy_numbers(judged: JudgedLattice, policy: LatticePolicy | None = None) -> dict[str, Any]:
    """All numbers of a model on the lattice, as its weights are now; None = of the model the lattice was made from."""
    return measured(judged, policy)[0]


def measured(judged: JudgedLattice, policy: LatticePolicy | None = None) -> tuple[dict[str, Any], Array]:
    """`policy_numbers`, and the law (roots, L) they are of: the model reads the lattice once for both."""
    lattice = judged.lattice
    if policy is None:
        tables = lattice.reference
        kept = lattice.kept
    else:
        tables, kept = _tables_and_kept(policy)
    covered = _covered(judged.world, tables, kept)
    law = judged.law(tables)
    found = judged.numbers(law)
    found["by_prompt"]["covered"] = covered.tolist()
    return found | {"covered": float(judged.rho @ covered)}, law


def _tables_and_kept(policy: LatticePolicy) -> tuple[Layered, tuple[Array, ...]]:
    """The restricted policy's tables, and the share of the model's own law that each prefix's k + 1 actions have."""
    import torch

    with torch.no_grad():
        logits = policy.logits()
    tables = policy.tree.policy(logits)
    actions = policy.lattice.world.n_actions
    flat = (
        np.exp(logits.numpy()).reshape(-1, actions).sum(1)
    )  # log of the model's own law: nothing is cut off yet
    ends = np.cumsum([len(x) for x in policy.lattice.kept])
    return tables, tuple(np.split(flat, ends[:-1]))


def _covered(world: TokenMDP, tables: Layered, kept: Sequence[Array]) -> Array:
    """(roots,) the model's own probability of the lattice's responses, all together."""
    shares = [np.concatenate([[1.0], x])[:, None] * table for x, table in zip(kept, tables, strict=True)]
    return np.asarray(world.leaf_probabilities(shares).reshape(world.roots, -1).sum(1))


# ---- what there is to read -------------------------------------------------------------------------------------------


def best_responses(judged: JudgedLattice, law: Array | None = None) -> list[dict[str, Any]]:
    """For each prompt the response that the judge likes best: the largest reward, or where there is none, the likeliest
    to win against the reference. `law` adds its probability under a policy."""
    found = []
    mu = judged.law()
    for x in range(judged.world.roots):
        if judged.rewards is not None:
            score = judged.rewards[x]
            i = int(np.argmax(score))
            entry: dict[str, Any] = {"reward": float(score[i])}
        elif judged.games is not None:
            wins = judged.games[x].wins(judged.games[x].reference)
            j = int(np.argmax(wins))
            i, entry = int(judged.support[x][j]), {"wins": float(wins[j])}
        else:
            return []
        leaf = x * mu.shape[1] + i
        found.append(
            {"prompt": x, "text": judged.world.text(judged.world.trajectories(leaf))[0]}
            | entry
            | {"reference": float(mu[x, i])}
            | ({} if law is None else {"policy": float(law[x, i])})
        )
    return found


def likeliest(judged: JudgedLattice, law: Array) -> list[dict[str, Any]]:
    """For each prompt the response with the largest probability under a law (roots, L)."""
    found = []
    for x, row in enumerate(law):
        i = int(np.argmax(row))
        text = judged.world.text(judged.world.trajectories(x * law.shape[1] + i))[0]
        reward = {} if judged.rewards is None else {"reward": float(judged.rewards[x, i])}
        found.append({"prompt": x, "text": text, "probability": float(row[i]), **reward})
    return found


def frontier(judged: JudgedLattice, points: int = 40) -> list[tuple[float, float]] | None:
    """(KL, value) of the Gibbs laws mu exp(r / beta) / Z, from a large beta to a small one: no policy on the lattice
    has more value at so little KL. None without rewards."""
    if judged.rewards is None:
        return None
    log_mu = judged.world.leaf_log_probabilities().reshape(judged.rewards.shape)
    spread = max(float(np.ptp(judged.rewards)), 1e-12)
    found = []
    for beta in spread * np.geomspace(30, 0.01, points):
        solved = [softmax(row) for row in log_mu + judged.rewards / beta]
        laws, logs = (np.array(part) for part in zip(*solved, strict=True))
        kl, value = judged.rho @ divergences(logs, log_mu), judged.rho @ (laws * judged.rewards).sum(1)
        found.append((float(kl), float(value)))
    return found


def as_language_world(lattice: Lattice, rewards: Array | None, provenance: Mapping[str, Any]) -> TokenMDP:
    """The lattice as `save_language_world` writes it: one feature, the judge's reward paid at the end; theta = 1.

    Without rewards the feature is "ends here" and theta = 0: the world pays nothing until
    `world.with_response_reward` says what it pays.
    """
    world = lattice.world
    if rewards is None:
        ends = np.zeros((world.roots, world.n_leaves // world.roots))
        ends[:, : -(world.branching**world.horizon)] = 1.0
        name, leaves, theta = "ends here", ends.reshape(-1), np.zeros(1)
    else:
        name, leaves, theta = "the judge's reward", rewards.reshape(-1), np.ones(1)
    paid = world.with_response_reward(leaves)
    features = FeatureMap([np.asarray(r)[..., None] for r in paid.reward], names=(name,))
    gold = theta[0] * leaves
    return world.replace(
        features=features,
        theta=theta,
        reward=features.rewards(theta),
        gold=gold,
        provenance=dict(provenance),
    )
