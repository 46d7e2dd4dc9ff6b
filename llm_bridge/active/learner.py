r"""Active querying over pools of candidate responses: PR-LSVI where a response is one action, and its relatives.

A round is an episode of PR-LSVI (`algorithms/pr_lsvi.py`, the same line numbers), with m >= 1 prompts:

  lines 3-4   one theta ~ the belief about the reward, for the whole round                          `Belief.draw`
  line 9      the sampled reward's policy pi_t: the best candidate of a prompt, or, with beta > 0,
              a draw of ref(y|x) exp(<phi, theta>/beta) / Z                                           `respond`
  line 10     the comparator is the PREVIOUS round's policy pi_{t-1}                                  `_comparator`
  line 11     Delta = phi(x, y_t) - phi(x, y_{t-1}), for each prompt of the round
  line 12     the pair is bought iff E |<Delta, theta_0 - theta_1>| > eps, while the budget lasts     `_choose`
  line 13     bought pairs are answered; Sigma_r and the estimate change by these alone               `learn`

Texts have known, deterministic transitions, so that lines 5-8 are exact and sigma_P plays no role. With one prompt a
round and beta = 0 this *is* PR-LSVI on the pool as a contextual bandit, draw by draw (a test holds the two together).

Departures, all declared:
  - m > 1 prompts share one theta; within a round Sigma_r counts the pairs that are bought before they are answered;
  - `buy = b` replaces eps by a label budget a round: of m pairs the b on which the belief disagrees most, one by one,
    pairs of equal responses never;
  - `comparator = "draw"` is double Thompson sampling: both responses follow a draw of this round;
    `comparator = "reference"` and `player = "reference"` take responses of the reference: passive data collection;
  - `settings.query_rate = p` buys by coin; with `buy = b`, b pairs at random: uniform querying;
  - `heads = K` replaces the Gaussian posterior by an ensemble (`beliefs.Ensemble`); with `heads_draw = False` the heads
    only say where a pair is worth a label, by their variance, and theta is drawn as before (`beliefs.Voted`);
  - `ridge` adds a Gaussian prior to the estimate in the ball.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...algorithms.pr_lsvi import Settings
from ...envs.budget import Asked, Seed
from ...envs.comparisons import replace_file
from ...envs.kernels import Array, Index
from ...envs.links import LOGISTIC, Link
from .beliefs import Belief, Ensemble, RewardPosterior, Voted, reward_settings
from .pool import Pool

FORMAT = 1
RECORD = np.dtype(
    [
        ("bought", np.int32),  # pairs of this round that were answered
        ("labels", np.int64),  # answers so far
        ("regret", np.float64),  # a prompt: 2 V* - V(pi_t) - V(comparator), exact on the pool
        (
            "gap",
            np.float64,
        ),  # the mean of the expected disagreements of the round's pairs, before any was bought
        ("log_det", np.float64),  # log det(Sigma_r / lambda); nan for an ensemble
        ("error", np.float64),  # ||theta_hat - theta*||_{Sigma_r}; nan for an ensemble or an unknown theta*
    ]
)


@dataclass(frozen=True)
class ActiveSettings:
    """The settings of a run.

    settings  PR-LSVI's own, of which sigma_r, eps, B, lam, mle_growth and query_rate are used
    beta      0 = the best candidate. batch = m prompts a round. buy = b labels a round, None = by eps (or by coin)
    the rest  as in the module's text
    """

    settings: Settings
    beta: float = 0.0
    batch: int = 1
    buy: int | None = None
    player: Literal["thompson", "reference"] = "thompson"
    comparator: Literal["previous", "draw", "reference"] = "previous"
    heads: int | None = None
    heads_draw: bool = True
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta is {self.beta}; it must be at least 0 (0: the best candidate)")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; a round has at least one prompt")
        if self.buy is not None and not 0 <= self.buy <= self.batch:
            raise ValueError(
                f"buy is {self.buy}; of a batch of {self.batch} pairs 0 to {self.batch} can be bought"
            )
        if self.heads is None and not self.heads_draw:
            raise ValueError("heads_draw is False, and there are no heads: give heads, their number")
        for name, allowed in (
            ("player", ("thompson", "reference")),
            ("comparator", ("previous", "draw", "reference")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")


def prior_settings(pool: Pool, spread: float = 1.0, sigma_r: float = 2.0) -> ActiveSettings:
    """Settings from a prior instead of from constants: theta ~ N(0, tau^2 I) such that a reward <phi, theta> has the
    standard deviation `spread` within a prompt, under the reference. No label is needed for it.

    With sigma_r = 2 the sampling covariance sigma_r^2 Sigma_r^{-1} is Laplace's at theta = 0, where Phi' = 1/4. The
    estimate is the MAP one; the ball is so wide (4 tau sqrt(d)) that it only guards.
    """
    assert pool.law is not None
    w = pool.law[pool.prompt] * pool.reference
    mean = np.zeros((pool.prompts, pool.dimension))
    np.add.at(mean, pool.prompt, pool.reference[:, None] * pool.phi)
    variance = float(w @ ((pool.phi - mean[pool.prompt]) ** 2).sum(axis=1))
    tau = spread / variance**0.5
    inner = reward_settings(
        pool.dimension,
        eps=0.0,
        sigma_r=sigma_r,
        lam=sigma_r**2 / tau**2,
        B=4 * tau * pool.dimension**0.5,
    )
    return ActiveSettings(inner, ridge=tau**-2)


class PoolAnnotator(Asked):
    """Answers comparisons of a pool's candidates, P(first) = Phi(r*(first) - r*(second)); counts, and has a budget."""

    def __init__(self, pool: Pool, seed: Seed, *, budget: int | None = None, link: Link = LOGISTIC) -> None:
        super().__init__(seed, budget)
        self.pool, self.link = pool, link

    def probability(self, first: Index, second: Index) -> Array:
        """(n,) for candidates' numbers. Free."""
        across = self.pool.prompt[first] != self.pool.prompt[second]
        if across.any():
            i = int(across.argmax())
            raise ValueError(
                f"pair {i} compares answers to prompts {self.pool.prompt[first[i]]} and "
                f"{self.pool.prompt[second[i]]}; comparisons are within a prompt"
            )
        return np.asarray(self.link.value(self.pool.reward[first] - self.pool.reward[second]))

    def compare(self, first: Index, second: Index) -> NDArray[np.int8]:
        """1 where the first is preferred, 0 where the second is. Raises `BudgetExhausted`."""
        p = self.probability(first, second)
        self._reserve(len(p))
        self.count += len(p)
        return (self.rng.random(len(p)) < p).view(np.int8)


@dataclass(frozen=True, eq=False)
class Round:
    """A round before its answers.

    first, second  (m,) candidates' numbers: of the new policy, and of the comparator
    differences    (m, d) Delta = phi(first) - phi(second); gaps (m,) the expected disagreement about each pair
    buy            (b,) the pairs to be answered
    policy, value  the new policy, (n,), and its exact value; regret  2 V* - V(new) - V(comparator)
    """

    first: Index
    second: Index
    differences: Array
    gaps: Array
    buy: Index
    policy: Array
    value: float
    regret: float


class ActiveLearner:
    """A run on a pool.

    pool       the candidates; its reward serves the exact figures only
    annotator  answers what is bought; None = answers come from outside: `propose`, ask somebody, `learn`
    settings   `ActiveSettings`
    seed       of the learner; the annotator has its own
    first      pi_0, (P,) the candidate of each prompt as a number within the prompt; None = the reference policy
    belief     another belief than that of the settings, such as `quadrature.GridPosterior`; such a run is not saved

    records    structured array, one row a round (`RECORD`)
    """

    def __init__(
        self,
        pool: Pool,
        annotator: PoolAnnotator | None,
        settings: ActiveSettings,
        seed: int = 0,
        *,
        first: ArrayLike | None = None,
        belief: Belief | None = None,
    ) -> None:
        self.pool, self.annotator, self.settings, self.seed = pool, annotator, settings, seed
        self.rng = np.random.default_rng(seed)
        self.link = LOGISTIC if annotator is None else annotator.link
        self._given = belief is not None
        self.belief: Belief = self._believed() if belief is None else belief
        assert pool.law is not None
        self._cdf = np.cumsum(pool.law) / pool.law.sum()
        self._records: list[tuple[Any, ...]] = []
        self.labels = 0
        if first is None:
            self._previous: Array = pool.reference
        else:
            self._previous = np.zeros(len(pool.prompt))
            self._previous[pool.starts[:-1] + np.asarray(first, dtype=np.int64)] = 1.0
        self._previous_value = pool.value(self._previous)

    def _believed(self) -> Belief:
        d, s = self.pool.dimension, self.settings
        posterior = RewardPosterior(d, s.settings, ridge=s.ridge, link=self.link)
        if s.heads is None:
            return posterior
        stream = np.random.SeedSequence([self.seed, 1])
        ensemble = Ensemble(d, s.settings, heads=s.heads, ridge=s.ridge, seed=stream, link=self.link)
        return ensemble if s.heads_draw else Voted(posterior, ensemble)

    @property
    def _posterior(self) -> RewardPosterior | None:
        belief = self.belief.posterior if isinstance(self.belief, Voted) else self.belief
        return belief if isinstance(belief, RewardPosterior) else None

    @property
    def _ensemble(self) -> Ensemble | None:
        belief = self.belief.ensemble if isinstance(self.belief, Voted) else self.belief
        return belief if isinstance(belief, Ensemble) else None

    # ---- a round -----------------------------------------------------------------------------------------------------

    def policy(self, theta: Array) -> Array:
        """Line 9: the policy of a reward parameter, (n,)."""
        scores = self.pool.phi @ theta
        return (
            self.pool.gibbs(scores, self.settings.beta)
            if self.settings.beta > 0
            else self.pool.greedy(scores)
        )

    @property
    def answer(self) -> Array:
        """The policy of the point estimate: what has been learnt, (n,)."""
        return self.policy(self.belief.theta)

    def _comparator(self, new: Array) -> tuple[Array, float]:
        """Line 10: the previous round's policy, and its value."""
        if self.settings.comparator == "previous":
            return self._previous, self._previous_value
        policy = (
            self.pool.reference
            if self.settings.comparator == "reference"
            else self.policy(self.belief.draw(self.rng))
        )
        return policy, self.pool.value(policy)

    def propose(self) -> Round:
        """Lines 4 to 12. It draws, and changes nothing else."""
        pool, m = self.pool, self.settings.batch
        thompson = self.settings.player == "thompson"
        new = self.policy(self.belief.draw(self.rng)) if thompson else pool.reference
        old, old_value = self._comparator(new)
        u = self.rng.random((m, 4))  # of each prompt: which one, the coin, and the two responses
        x = np.searchsorted(self._cdf, u[:, 0], side="right")
        first, second = self._respond(new, x, u[:, 2]), self._respond(old, x, u[:, 3])
        differences = pool.phi[first] - pool.phi[second]
        gaps, buy = self._choose(differences, u[:, 1])
        value = pool.value(new)
        regret = 2 * pool.optimal_value - value - old_value
        return Round(first, second, differences, gaps, buy, new, value, regret)

    def _respond(self, policy: Array, x: Index, u: Array) -> Index:
        """A candidate of each prompt, by inverting the policy's distribution function."""
        chosen = np.empty(len(x), dtype=np.int64)
        for i, (prompt, at) in enumerate(zip(x, u, strict=True)):
            rows = self.pool.rows(prompt)
            cdf = np.cumsum(policy[rows])
            chosen[i] = rows.start + np.searchsorted(cdf / cdf[-1], at, side="right")
        return chosen

    def _choose(self, differences: Array, coins: Array) -> tuple[Array, Index]:
        """Line 12: the disagreements about all pairs, and the numbers of those to buy, within the budget."""
        s, ahead = self.settings, self.belief.ahead()
        gaps, m = self._gaps(ahead, differences), len(differences)
        left = None if self.annotator is None else self.annotator.remaining
        most = m if left is None else min(m, left)
        rate = s.settings.query_rate
        if rate is not None:
            if s.buy is None:
                return gaps, np.flatnonzero(coins < rate)[:most]
            order = np.argsort(coins)
            return gaps, np.sort(order[differences[order].any(axis=1)][: min(s.buy, most)])
        buy: list[int] = []
        if s.buy is None:
            for i in range(m):
                gap = gaps[i] if not buy else self._gaps(ahead, differences[i : i + 1])[0]
                if len(buy) < most and gap > s.settings.eps:
                    buy.append(i)
                    ahead.count(differences[i])
        else:
            now = gaps.copy()
            for _ in range(min(s.buy, most)):
                now[buy] = -np.inf
                i = int(now.argmax())
                if not now[i] > 0:  # what is left are pairs of equal responses
                    break
                buy.append(i)
                ahead.count(differences[i])
                now = self._gaps(ahead, differences)
        return gaps, np.array(sorted(buy), dtype=np.int64)

    def _gaps(self, ahead: Any, differences: Array) -> Array:
        """E |<Delta, theta_0 - theta_1>| of each pair, on the scale of the reward."""
        return np.asarray(ahead.gaps(differences))

    def learn(self, round: Round, wins: ArrayLike) -> None:
        """Lines 13 and 3: wins (b,), 1 where the first of a bought pair was preferred; then the round is over."""
        wins = np.asarray(wins)
        if wins.shape != round.buy.shape or not np.isin(wins, (0, 1)).all():
            raise ValueError(
                f"wins has shape {wins.shape}; the round buys {len(round.buy)} answers, each 0 or 1: "
                f"({len(round.buy)},)"
            )
        if len(wins):
            self._update(round, wins)
        self.labels += len(wins)
        self._previous, self._previous_value = round.policy, round.value
        log_det, error = self._measures()
        gap = float(round.gaps.mean())
        self._records.append((len(wins), self.labels, round.regret, gap, log_det, error))

    def _update(self, round: Round, wins: Array) -> None:
        """Sigma_r and the estimate change by the bought pairs alone."""
        self.belief.add(round.differences[round.buy], wins)

    def _measures(self) -> tuple[float, float]:
        posterior = self._posterior
        if posterior is None:
            return math.nan, math.nan
        theta, gram = self.pool.theta, posterior.gram
        error = math.nan if theta is None else gram.weighted_norm(self.belief.theta - theta)
        return gram.log_determinant, error

    def advance(self, rounds: int) -> Self:
        """More rounds with the annotator's answers. N and then M rounds are N + M, bit for bit."""
        if rounds < 0:
            raise ValueError(f"rounds is {rounds}; it must be at least 0")
        if self.annotator is None:
            raise ValueError(
                "there is no annotator: propose() a round, have it answered, and learn() the answers"
            )
        for _ in range(rounds):
            before = self.rng.bit_generator.state
            try:
                round = self.propose()
                wins = self.annotator.compare(round.first[round.buy], round.second[round.buy])
            except BaseException:  # an interruption leaves the run at the last whole round
                self.rng.bit_generator.state = before
                raise
            self.learn(round, wins)
        return self

    @property
    def records(self) -> np.ndarray:
        return np.array(self._records, dtype=RECORD)

    # ---- save and load -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """The whole state as one .npz without pickles; it appears by rename."""
        if self._given:
            raise ValueError("this run's belief was given to it, and is not of its settings: it is not saved")
        saved = None if self.annotator is None else self.annotator.checkpoint()
        heads = self._ensemble
        meta = {
            "format": FORMAT,
            "learner": "active",
            "settings": asdict(self.settings),
            "seed": self.seed,
            "labels": self.labels,
            "candidates": len(self.pool.prompt),
            "rng": self.rng.bit_generator.state,
            "annotator": saved,
            "heads_rng": None if heads is None else heads.rng.bit_generator.state,
        }
        arrays = {f"belief_{k}": v for k, v in self.belief.arrays().items()} | {
            "records": self.records,
            "previous": self._previous,
            "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        }
        replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str], pool: Pool, annotator: PoolAnnotator | None) -> ActiveLearner:
        """Continue a saved run on the same pool; the annotator is brought to where it stood."""
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "meta" not in arrays:
            raise ValueError(f"{path} is not a saved run of active querying")
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta.get("learner") != "active" or meta["format"] > FORMAT:
            raise ValueError(
                f"{path} is not a run that this version of preflab can continue: {meta.get('learner')!r}"
            )
        if meta["candidates"] != len(pool.prompt):
            raise ValueError(
                f"{path} is a run on {meta['candidates']} candidates; this pool has {len(pool.prompt)}"
            )
        given = meta["settings"]
        settings = ActiveSettings(**(given | {"settings": Settings(**given["settings"])}))
        run = cls(pool, annotator, settings, meta["seed"])
        belief: Any = run.belief
        belief.restore({k[7:]: v for k, v in arrays.items() if k.startswith("belief_")})
        if run._ensemble is not None:
            run._ensemble.rng.bit_generator.state = meta["heads_rng"]
        run.rng.bit_generator.state = meta["rng"]
        if annotator is not None:
            annotator.restore(meta["annotator"])
        run._records = [tuple(row) for row in arrays["records"].tolist()]
        run.labels = meta["labels"]
        run._previous = arrays["previous"]
        run._previous_value = pool.value(run._previous)
        return run
