"""Active querying on pools: held to PR-LSVI on tables, to the true posterior, and to exact sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from preflab.algorithms.estimation import GaussianPosterior, fit_preferences
from preflab.algorithms.pr_lsvi import PRLSVI, Settings
from preflab.envs import BradleyTerry, BudgetExhausted
from preflab.envs.token_mdp import random_token_mdp
from preflab.llm_bridge.active import (
    ActiveLearner,
    ActiveSettings,
    Ensemble,
    Pool,
    PoolAnnotator,
    RewardPosterior,
    fit_heads,
    linear_fit,
    reward_settings,
    with_linear_reward,
)
from scipy.special import expit


def random_pool(prompts=4, candidates=6, d=3, seed=0, size=2.0):
    rng = np.random.default_rng(seed)
    n = prompts * candidates
    phi = rng.standard_normal((n, d))
    phi /= np.linalg.norm(phi, axis=1).max()
    theta = size * rng.standard_normal(d)
    reference = rng.dirichlet(np.ones(candidates), size=prompts).ravel()
    return Pool(np.repeat(np.arange(prompts), candidates), phi, reference, phi @ theta, theta=theta)


def start(pool, seed=0, budget=None, kind=ActiveLearner, eps=0.3, **changes):
    inner = {k: changes.pop(k) for k in ("query_rate", "sigma_r", "lam", "mle_growth") if k in changes}
    settings = ActiveSettings(reward_settings(pool.dimension, eps, **inner), **changes)
    return kind(pool, PoolAnnotator(pool, seed + 100, budget=budget), settings, seed)


# ---- the same algorithm as on tables --------------------------------------------------------------------------------


class Stretched:
    """A generator from which a horizon of H takes 2 + 2H numbers, as PR-LSVI's does, of which a pool needs 4."""

    def __init__(self, rng, horizon):
        self.rng, self.horizon, self.bit_generator = rng, horizon, rng.bit_generator

    def standard_normal(self, n):
        return self.rng.standard_normal(n)

    def random(self, shape):
        assert shape == (1, 4)
        return self.rng.random(2 + 2 * self.horizon)[None, :4]


def side_by_side(world, kind=ActiveLearner, rounds=300, **changes):
    """The records of PR-LSVI on the world's table, and of the learner on the pool of its responses."""
    settings = Settings.scaled(world, 0.2, transitions="known", **changes)
    table = PRLSVI(world, BradleyTerry(world, 7, keep_log=False), settings, 3).advance(rounds)
    pool, k, H = Pool.of_world(world), world.branching, world.horizon
    first = np.full(world.roots, sum(k**h for h in range(H)))  # the first action all the way: PR-LSVI's pi_0
    learner = kind(pool, PoolAnnotator(pool, 7), ActiveSettings(settings), 3, first=first)
    learner.rng = Stretched(learner.rng, H) if H > 1 else learner.rng
    return table, learner.advance(rounds)


@pytest.mark.parametrize(("k", "horizon"), [(5, 1), (3, 3)])
@pytest.mark.parametrize("changes", [{}, {"query_rate": 0.3}, {"mle_growth": 0.0}])
def test_it_is_pr_lsvi_draw_by_draw(k, horizon, changes):
    table, learner = side_by_side(random_token_mdp(k, horizon, 4, seed=1, d=4), **changes)
    ours, theirs = learner.records, table.records
    assert 20 < ours["bought"].sum() < 300
    np.testing.assert_array_equal(ours["bought"], theirs["queried"])
    for mine, its in (("regret", "regret"), ("gap", "disagreement"), ("log_det", "log_det")):
        np.testing.assert_allclose(ours[mine], theirs[its], atol=1e-12)
    # ours is the error after the round, theirs before it
    np.testing.assert_allclose(ours["error"][:-1], theirs["error"][1:], atol=1e-12)
    np.testing.assert_array_equal(learner.belief.theta, table.theta_hat)


class SamePolicy(ActiveLearner):
    def _comparator(self, new):
        return new, self.pool.value(new)


class CountsAll(ActiveLearner):
    """Sigma_r grows on rounds that were not asked about, too."""

    def learn(self, round, wins):
        for i in set(range(len(round.first))) - set(round.buy.tolist()):
            self.belief.gram.update(round.differences[i])
        super().learn(round, wins)


class SigmaTwice(ActiveLearner):
    def _gaps(self, ahead, differences):
        return super()._gaps(ahead, differences) * self.settings.settings.sigma_r


@pytest.mark.parametrize("kind", [SamePolicy, CountsAll, SigmaTwice])
def test_a_planted_fault_is_not_pr_lsvi(kind):
    table, learner = side_by_side(random_token_mdp(5, 1, 4, seed=1, d=4), kind)
    assert (learner.records["bought"] != table.records["queried"]).any()
    assert not np.allclose(learner.belief.theta, table.theta_hat, atol=1e-3)


def log_det_of_bought(kind):
    """log det Sigma_r as recorded, and of lambda I + the bought Delta Delta^T."""
    learner, rows = start(random_pool(), kind=kind, eps=0.5), []
    for _ in range(150):
        round = learner.propose()
        rows += list(round.differences[round.buy])
        learner.learn(round, learner.annotator.compare(round.first[round.buy], round.second[round.buy]))
    D, lam = np.array(rows), learner.settings.settings.lam
    return learner.records["log_det"][-1], np.linalg.slogdet(np.eye(3) + D.T @ D / lam)[1]


def test_the_posterior_moves_on_bought_rounds_only():
    recorded, exact = log_det_of_bought(ActiveLearner)
    assert recorded == pytest.approx(exact, abs=1e-10)
    recorded, exact = log_det_of_bought(CountsAll)
    assert recorded > exact + 0.1


def disagreement_ratio(kind):
    """The rule's gap over the mean |<Delta, theta_0 - theta_1>| of 10000 pairs of draws."""
    learner = start(random_pool(seed=3), kind=kind).advance(40)
    delta, rng = learner.pool.phi[:1] - learner.pool.phi[1:2], np.random.default_rng(5)
    draws = np.array([learner.belief.draw(rng) for _ in range(20000)]) @ delta[0]
    measured = np.abs(draws[::2] - draws[1::2])
    gap = learner._gaps(learner.belief.ahead(), delta)[0]
    return gap / measured.mean(), measured.std() / measured.mean() / np.sqrt(len(measured))


def test_the_rule_is_the_expected_disagreement_of_two_draws():
    ratio, error = disagreement_ratio(ActiveLearner)
    assert abs(ratio - 1) < 4 * error
    ratio, error = disagreement_ratio(SigmaTwice)
    assert abs(ratio - 1) > 20 * error


def test_both_policies_are_charged_and_the_comparator_is_the_last_one():
    def charged(kind):
        learner, rounds = start(random_pool(), kind=kind), []
        for _ in range(30):
            rounds.append(learner.propose())
            learner.learn(
                rounds[-1],
                learner.annotator.compare(
                    rounds[-1].first[rounds[-1].buy], rounds[-1].second[rounds[-1].buy]
                ),
            )
        best = learner.pool.value(learner.pool.greedy(learner.pool.reward))
        values = [learner.pool.value(learner.pool.reference), *(r.value for r in rounds)]
        expected = [2 * best - new - old for old, new in pairwise(values)]
        return np.abs(learner.records["regret"] - expected).max()

    assert charged(ActiveLearner) < 1e-12
    assert charged(SamePolicy) > 0.01


# ---- the posterior --------------------------------------------------------------------------------------------------


def answered(n=60, d=2, seed=0, size=2.0):
    rng = np.random.default_rng(seed)
    D, theta = rng.standard_normal((n, d)) / 2, size * rng.standard_normal(d)
    return D, (rng.random(n) < expit(D @ theta)).astype(float)


def test_the_posterior_is_that_of_the_estimation_objects():
    D, wins = answered(d=3)
    settings = reward_settings(3, 0.1, sigma_r=1.3, lam=0.7, mle_growth=0.0)
    belief = RewardPosterior(3, settings)
    belief.add(D, wins)
    fit = fit_preferences(D, wins, radius=settings.B)
    np.testing.assert_allclose(belief.theta, fit.theta, atol=1e-7)
    covariance = 1.3**2 * np.linalg.inv(0.7 * np.eye(3) + D.T @ D)
    draws = np.array([belief.draw(rng) for rng in [np.random.default_rng(2)] for _ in range(20000)])
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05 * covariance.max())
    np.testing.assert_allclose(draws.mean(0), fit.theta, atol=5 * np.sqrt(covariance.max() / 20000))
    np.testing.assert_allclose(
        belief.posterior.deviation(D) ** 2, np.einsum("nd,de,ne->n", D, covariance, D), rtol=1e-9
    )


def grid_posterior(D, wins, precision, width=12.0, n=201):
    """Mean and covariance of the Bayesian posterior in two dimensions, by quadrature on a grid."""
    axis = np.linspace(-width, width, n)
    theta = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    margins = theta @ (D * (2 * wins - 1)[:, None]).T
    log_p = -np.logaddexp(0, -margins).sum(1) - precision / 2 * (theta**2).sum(1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ theta
    return mean, (theta - mean).T @ ((theta - mean) * p[:, None])


def test_laplace_is_near_the_true_posterior_and_never_wider_than_four_times_the_gram():
    D, wins = answered(n=200)
    belief = RewardPosterior(2, reward_settings(2, 0.1, sigma_r=2.0, lam=2.0, B=20.0))
    belief.add(D, wins)
    mean, covariance = grid_posterior(D, wins, precision=0.5)
    laplace = belief.laplace()
    assert laplace.distance(mean) < 0.35  # posterior standard deviations
    ours = np.linalg.inv(laplace.factor @ laplace.factor.T)
    np.testing.assert_allclose(ours, covariance, atol=0.2 * np.abs(covariance).max())
    # Phi' <= 1/4: sigma_r = 2 gives what Laplace gives at theta = 0, which is never more
    narrow = 4 * np.linalg.inv(belief.gram.matrix)
    assert np.linalg.eigvalsh(ours - narrow).min() > -1e-12
    # the control: without the prior's share of the precision the covariance is not the grid's
    wrong = np.linalg.inv(laplace.factor @ laplace.factor.T - 0.5 * np.eye(2))
    few = answered(n=8)
    small = RewardPosterior(2, reward_settings(2, 0.1, sigma_r=2.0, lam=2.0, B=20.0))
    small.add(*few)
    _, true = grid_posterior(*few, precision=0.5)
    factor = small.laplace().factor
    right, wrong = (np.linalg.inv(factor @ factor.T - c * np.eye(2)) for c in (0.0, 0.5))
    assert np.abs(right - true).max() < 0.5 * np.abs(wrong - true).max()


# ---- the ensemble ---------------------------------------------------------------------------------------------------


def test_heads_without_priors_and_weights_are_the_ridge_estimate():
    D, wins = answered(d=3)
    signed, K = D * (2 * wins - 1)[:, None], 3
    heads, certificate = fit_heads(signed, np.ones((len(D), K)), np.zeros((K, 3)), 0.7)
    exact = fit_preferences(D, wins, ridge=0.7).theta
    np.testing.assert_allclose(heads, np.tile(exact, (K, 1)), atol=1e-6)
    assert certificate < 1e-5
    weights = np.random.default_rng(0).exponential(size=(len(D), K))
    heads, _ = fit_heads(signed, weights, np.zeros((K, 3)), 0.7, start=heads)
    for k in range(K):
        weighted = fit_preferences(D, wins * weights[:, k], counts=weights[:, k], ridge=0.7).theta
        np.testing.assert_allclose(heads[k], weighted, atol=1e-6)
    assert np.abs(heads - exact).max() > 0.01


def test_a_head_keeps_its_prior_where_no_comparison_speaks():
    settings = reward_settings(3, 0.1, sigma_r=1.5, lam=2.0)
    belief = Ensemble(3, settings, heads=2000, seed=1)
    D = np.tile([[1.0, 0.0, 0.0]], (30, 1))
    belief.add(D, np.arange(30) % 2)
    np.testing.assert_allclose(belief.heads[:, 1:], belief.prior[:, 1:], atol=1e-7)
    assert belief.heads[:, 1].std() == pytest.approx(1.5 / np.sqrt(2.0), rel=0.05)
    assert belief.heads[:, 0].std() < 0.6 * belief.heads[:, 1].std()
    first, other = belief.ahead().gaps(np.eye(3)[:2])
    assert first < 0.6 * other == pytest.approx(0.6 * 2 / np.sqrt(np.pi) * belief.heads[:, 1].std(ddof=1))


def test_heads_that_only_choose_leave_the_posterior_as_it_is():
    """Where all pairs are bought there is nothing to choose, and the run is PR-LSVI's, bit for bit."""
    pool = random_pool()
    for buy, same in ((4, True), (2, False)):
        one, two = (
            start(pool, batch=4, buy=buy, **more).advance(25)
            for more in ({}, {"heads": 6, "heads_draw": False})
        )
        assert (one.belief.theta.tobytes() == two.belief.theta.tobytes()) is same
        assert np.isfinite(two.records["log_det"]).all()
    heads = Ensemble(3, two.settings.settings, heads=6, seed=np.random.SeedSequence([0, 1]))
    assert np.array_equal(heads.prior, two.belief.ensemble.prior)
    D = pool.phi[:5] - pool.phi[1:6]
    np.testing.assert_array_equal(two.belief.ahead().gaps(D), two.belief.ensemble.ahead().gaps(D))
    assert np.abs(two.belief.ahead().gaps(D) - two.belief.posterior.ahead().gaps(D)).max() > 1e-3


def test_newton_says_when_it_ran_out_of_steps():
    D, wins = answered(d=3)
    with pytest.raises(ArithmeticError, match=r"gradient is still .* after 1 Newton steps"):
        fit_heads(D * (2 * wins - 1)[:, None], np.ones((60, 2)), np.zeros((2, 3)), 0.1, iterations=1)


# ---- labels, regret, variants ---------------------------------------------------------------------------------------


def test_labels_go_down_as_eps_goes_up():
    pool = random_pool(prompts=6, candidates=10, d=4)
    labels = [
        np.mean([start(pool, s, eps=eps).advance(200).labels for s in range(4)])
        for eps in (0.0, 0.3, 0.6, 1.2)
    ]
    assert all(a > 1.2 * b for a, b in pairwise(labels))
    assert start(pool, eps=np.inf).advance(50).labels == 0
    every = start(pool, eps=0.0).advance(100).records
    assert (
        every["bought"] == (every["gap"] > 0)
    ).all()  # eps = 0 asks always, but never about equal responses


def test_the_regret_of_a_round_falls():
    pool = random_pool(prompts=5, candidates=8, d=3, size=4.0)

    def halves(kind):
        regret = np.array(
            [start(pool, s, kind=kind, eps=0.2).advance(250).records["regret"] for s in range(4)]
        )
        return regret[:, :80].mean(), regret[:, 170:].mean()

    early, late = halves(ActiveLearner)
    assert late < 0.5 * early
    early, late = halves(SamePolicy)  # compares a policy with itself: learns nothing
    assert late > 0.8 * early


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 6, "buy": 2},
        {"batch": 6, "buy": 2, "heads": 5},
        {"batch": 6, "buy": 2, "query_rate": 0.5},
        {"batch": 5, "eps": 0.4},
        {"comparator": "draw", "beta": 0.5},
        {"player": "reference", "comparator": "reference", "query_rate": 1.0},
        {"heads": 4, "eps": 0.2, "ridge": 0.5},
        {"batch": 6, "buy": 2, "heads": 5, "heads_draw": False},
    ],
)
def test_n_and_m_rounds_are_n_plus_m_also_through_a_file(changes, tmp_path):
    pool = random_pool()
    whole = start(pool, **changes).advance(14)
    first = start(pool, **changes).advance(5)
    first.save(tmp_path / "run.npz")
    second = ActiveLearner.load(tmp_path / "run.npz", pool, PoolAnnotator(pool, 0)).advance(9)
    assert (
        second.records.tobytes() == whole.records.tobytes()
    )  # bit for bit, nan where an ensemble has no Sigma
    np.testing.assert_array_equal(second.belief.theta, whole.belief.theta)
    assert whole.labels == whole.annotator.count > 0
    if "buy" in changes:
        assert (whole.records["bought"] <= 2).all()


def test_a_batch_counts_what_it_has_bought():
    """Twice the same pair in a batch: the second one is known already, as far as the rule can tell."""
    pool = random_pool()
    learner = start(pool, batch=3, buy=2)
    twice = np.stack([pool.phi[0] - pool.phi[1]] * 2 + [0.9 * (pool.phi[2] - pool.phi[3])])
    gaps, buy = learner._choose(twice, np.zeros(3))
    assert gaps[0] == gaps[1]
    assert set(buy.tolist()) == {int(gaps[:2].argmax()), 2}
    ahead = learner.belief.ahead()
    ahead.count(twice[0])
    assert ahead.gaps(twice)[1] < gaps[1]
    assert learner.belief.gram.count == 0  # nothing is learnt by choosing
    nothing = learner._choose(np.zeros((3, 3)), np.zeros(3))[1]
    assert len(nothing) == 0


def test_the_budget_ends_buying_and_not_the_run():
    for changes in ({}, {"batch": 4, "buy": 3}, {"query_rate": 1.0}, {"batch": 4, "eps": 0.0}):
        learner = start(random_pool(), budget=7, **({"eps": 0.0} | changes)).advance(40)
        assert learner.labels == learner.annotator.count == 7
        assert len(learner.records) == 40
    with pytest.raises(BudgetExhausted):
        learner.annotator.compare(np.array([0]), np.array([1]))


def test_the_gibbs_policy_answers_by_its_law():
    pool = random_pool(prompts=1, candidates=5)
    learner = start(pool, beta=0.7)
    scores = pool.phi @ np.array([1.0, -2.0, 0.5])
    law = pool.reference * np.exp(scores / 0.7)
    policy = learner.policy(np.array([1.0, -2.0, 0.5]))
    np.testing.assert_allclose(policy, law / law.sum(), rtol=1e-12)
    n = 20000
    drawn = learner._respond(policy, np.zeros(n, int), np.random.default_rng(0).random(n))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / n, policy, atol=4 * np.sqrt(0.25 / n))


def test_an_interruption_leaves_the_last_whole_round():
    class Broken(PoolAnnotator):
        def compare(self, first, second):
            raise KeyboardInterrupt

    pool = random_pool()
    learner = start(pool, eps=0.0).advance(3)
    whole, learner.annotator = learner.annotator, Broken(pool, 0)
    with pytest.raises(KeyboardInterrupt):
        learner.advance(1)
    learner.annotator = whole
    np.testing.assert_array_equal(learner.advance(4).records, start(pool, eps=0.0).advance(7).records)


def test_answers_may_come_from_outside():
    pool = random_pool()
    learner = ActiveLearner(pool, None, ActiveSettings(reward_settings(3, 0.0), batch=4, buy=2))
    while len(learner.records) < 5 or learner.labels < 4:
        round = learner.propose()
        learner.learn(round, (pool.reward[round.first] > pool.reward[round.second])[round.buy].astype(int))
    with pytest.raises(ValueError, match="there is no annotator"):
        learner.advance(1)
    round = learner.propose()
    with pytest.raises(ValueError, match=r"the round buys \d answers"):
        learner.learn(round, [1] * 9)


# ---- labels are bought where the rule says so, and nowhere else ----------------------------------------------------


class Asking(PoolAnnotator):
    """Writes down every pair that it is asked about."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.asked = []

    def compare(self, first, second):
        self.asked.append(list(zip(first.tolist(), second.tolist(), strict=True)))
        return super().compare(first, second)


def pairs_by_the_rule(pool, settings, budget, rounds):
    """Line 12 written again, with an inverse: the pairs of each round that the rule asks about."""
    s, annotator = settings.settings, Asking(pool, 11, budget=budget)
    learner = ActiveLearner(pool, annotator, settings, 4)
    Sigma, expected = s.lam * np.eye(pool.dimension), []
    for _ in range(rounds):
        round, left = learner.propose(), budget - annotator.count
        ask = []
        for i, (x, y) in enumerate(zip(round.first, round.second, strict=True)):
            delta = pool.phi[x] - pool.phi[y]
            if (
                len(ask) < left
                and 2 / np.sqrt(np.pi) * s.sigma_r * np.sqrt(delta @ np.linalg.inv(Sigma) @ delta) > s.eps
            ):
                ask.append(i)
                Sigma += np.outer(delta, delta)
        expected.append([(int(round.first[i]), int(round.second[i])) for i in ask])
        learner.learn(round, annotator.compare(round.first[round.buy], round.second[round.buy]))
    return learner, annotator, expected


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(("eps", "budget"), [(0.4, 10**6), (0.4, 23), (0.0, 31), (np.inf, 10**6)])
def test_every_label_is_one_that_the_rule_asks_for(batch, eps, budget):
    pool = random_pool(prompts=6, candidates=8)
    settings = ActiveSettings(reward_settings(3, eps), batch=batch)
    learner, annotator, expected = pairs_by_the_rule(pool, settings, budget, 120 // batch)
    assert annotator.asked == expected
    wanted = sum(map(len, expected))
    assert learner.labels == annotator.count == wanted == learner.records["bought"].sum() <= budget
    assert (wanted == 0) == (eps == np.inf)
    if budget < 10**6:
        assert wanted == budget  # it is spent, and not overdrawn
    elif eps:
        assert wanted < 60  # of 120 pairs: the rule does save


def test_a_learner_that_asks_more_is_caught(monkeypatch):
    choose = ActiveLearner._choose

    def greedy(self, differences, coins):
        gaps, buy = choose(self, differences, coins)
        return gaps, np.union1d(buy, [0])

    monkeypatch.setattr(ActiveLearner, "_choose", greedy)
    pool, settings = random_pool(prompts=6, candidates=8), ActiveSettings(reward_settings(3, 0.4), batch=6)
    learner, annotator, expected = pairs_by_the_rule(pool, settings, 10**6, 20)
    assert annotator.asked != expected
    assert learner.labels > sum(map(len, expected))


# ---- pools ----------------------------------------------------------------------------------------------------------


def test_the_win_rate_and_the_value_are_the_sums():
    pool = random_pool(prompts=3, candidates=4)
    policy = pool.gibbs(pool.reward, 0.3)
    won, value = 0.0, 0.0
    for x in range(3):
        at = np.flatnonzero(pool.prompt == x)
        value += sum(policy[i] * pool.reward[i] for i in at) / 3
        won += (
            sum(
                policy[i] * pool.reference[j] * expit(pool.reward[i] - pool.reward[j]) for i in at for j in at
            )
            / 3
        )
    assert pool.win_rate(policy) == pytest.approx(won, abs=1e-14)
    assert pool.value(policy) == pytest.approx(value, abs=1e-14)
    assert pool.win_rate(pool.reference) == pytest.approx(0.5, abs=1e-14)
    assert pool.value(pool.greedy(pool.reward)) == pool.optimal_value >= value


def test_part_of_a_pool_and_its_linear_reward():
    pool = random_pool(prompts=4, candidates=5)
    part = replace(pool, texts=tuple(f"t{i}" for i in range(20))).of_prompts([3, 1])
    assert part.texts[:2] == ("t15", "t16")
    np.testing.assert_array_equal(part.reward, pool.reward[[*range(15, 20), *range(5, 10)]])
    theta, r2 = linear_fit(
        replace(pool, reward=pool.reward + 3.0 * pool.prompt)
    )  # a prompt's constant is free
    np.testing.assert_allclose(theta, pool.theta, atol=1e-10)
    assert r2 == pytest.approx(1)
    bent = replace(pool, reward=pool.reward**3)
    assert 0 < linear_fit(bent)[1] < 0.99
    straight = with_linear_reward(bent)
    assert linear_fit(straight)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phi": np.ones((23, 3))}, r"phi has shape \(23, 3\)"),
        ({"phi": np.ones(24)}, "phi has shape"),
        ({"phi": np.full((24, 3), np.nan)}, r"phi\[0\] is not finite"),
        ({"prompt": np.arange(24)[::-1] // 6}, "sort the candidates"),
        ({"reference": np.full(24, 0.2)}, "reference of prompt 0 sums to 1.2"),
        ({"law": np.ones(4)}, "law must be 4 probabilities"),
    ],
)
def test_bad_pools_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(random_pool(), **changes)


def test_bad_settings_are_refused(tmp_path):
    inner, pool = reward_settings(3, 0.1), random_pool()
    for changes, message in (
        ({"beta": -1.0}, "beta is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2, "buy": 3}, "buy is 3; of a batch of 2"),
        ({"comparator": "same"}, "comparator is 'same'"),
        ({"player": "me"}, "player is 'me'"),
        ({"heads_draw": False}, "heads_draw is False, and there are no heads"),
    ):
        with pytest.raises(ValueError, match=message):
            ActiveSettings(inner, **changes)
    with pytest.raises(ValueError, match="heads is 1"):
        start(pool, heads=1)
    with pytest.raises(ValueError, match="sigma_r is 0"):
        start(pool, heads=3, sigma_r=0.0)
    with pytest.raises(ValueError, match="rounds is -1"):
        start(pool).advance(-1)
    with pytest.raises(ValueError, match="pair 0 compares answers to prompts 0 and 1"):
        start(pool).annotator.compare(np.array([0]), np.array([6]))
    with pytest.raises(ValueError, match="beta is 0"):
        pool.gibbs(pool.reward, 0.0)
    with pytest.raises(ValueError, match="has no linear reward"):
        Pool.of_world(random_token_mdp(2, 1).replace(theta=None))
    start(pool).advance(2).save(tmp_path / "run.npz")
    with pytest.raises(ValueError, match="a run on 24 candidates; this pool has 12"):
        ActiveLearner.load(tmp_path / "run.npz", random_pool(prompts=2), None)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="is not a saved run"):
        ActiveLearner.load(tmp_path / "other.npz", pool, None)


def test_a_run_without_an_annotator_is_saved_too(tmp_path):
    learner = ActiveLearner(random_pool(), None, ActiveSettings(reward_settings(3, 0.1)))
    learner.save(tmp_path / "run.npz")
    again = ActiveLearner.load(tmp_path / "run.npz", random_pool(), None)
    np.testing.assert_array_equal(again.propose().first, learner.propose().first)
    assert isinstance(learner.belief.posterior, GaussianPosterior)
