"""Annotators against enumeration and closed forms: laws, draws, budgets, logs, continuation, replay."""

import itertools
import json
import os

import mpmath as mp
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.envs.annotators import (
    BradleyTerry,
    BudgetExhausted,
    KernelAnnotator,
    LinkAnnotator,
    RegretPreference,
    Thurstone,
    response_number,
)
from preflab.envs.attainable import optimal_advantage, reward_range
from preflab.envs.comparisons import ComparisonLog, pack, unpack
from preflab.envs.features import FeatureMap
from preflab.envs.links import LOGISTIC, PROBIT
from preflab.envs.mdp import FiniteMDP
from preflab.envs.populations import LabelNoise, Mixture
from preflab.envs.ranking import PlackettLuce
from preflab.envs.replay import Replay, ReplayMismatch
from preflab.envs.trajectories import Trajectories
from scipy import stats

S, A, H = 4, 3, 3


def random_model(seed=0, scale=2.0):
    """Dense, stochastic, with zeros in the transitions and with masked actions."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(S), size=(H, S, A)) * (rng.random((H, S, A, S)) < 0.5)
    P[..., 0] += 1e-3
    P /= P.sum(-1, keepdims=True)
    mask = rng.random((H, S, A)) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    return FiniteMDP.dense(
        P, scale * (rng.random((H, S, A)) - 0.5), np.array([0.5, 0, 0.5, 0]), action_mask=mask
    )


def tree_model(seed=0):
    rng = np.random.default_rng(seed)
    sizes = [1 + 2 * 2**h for h in range(H)]
    return FiniteMDP.tree(2, 2, H, [rng.random((n, 3)) - 0.5 for n in sizes])


def draw(model, n, seed):
    rng = np.random.default_rng(seed)
    mask = model.action_mask if model.action_mask is not None else [np.ones_like(r) for r in model.reward]
    policy = [m / m.sum(1, keepdims=True) for m in mask]
    return model.rollout(policy, n, rng), model.rollout(policy, n, rng)


def every_trajectory(model):
    """All trajectories of positive probability, by walking the model."""
    paths = [([s], []) for s in np.flatnonzero(model.initial > 0)]
    for h in range(model.horizon):
        grown = []
        for states, actions in paths:
            for a in range(model.n_actions):
                if model.action_mask is None or model.action_mask[h][states[-1], a]:
                    successors = np.flatnonzero(model.kernel.dense(h)[states[-1], a] > 0)
                    grown += [([*states, t], [*actions, a]) for t in successors]
        paths = grown
    return Trajectories(np.array([s[:-1] for s, _ in paths]), np.array([a for _, a in paths]))


def cyclic(first, second):
    """An antisymmetric probability that no score explains: rock, paper, scissors on the last actions."""
    return np.array([0.5, 0.9, 0.1])[(first.actions[:, -1] - second.actions[:, -1]) % 3]


def annotators(model):
    users = [BradleyTerry(model, 1), Thurstone(model, 2), KernelAnnotator(model, 3, cyclic)]
    return {
        "bradley_terry": BradleyTerry(model, 5),
        "thurstone": Thurstone(model, 5),
        "regret": RegretPreference(model, 5),
        "kernel": KernelAnnotator(model, 5, cyclic),
        "noise": LabelNoise(BradleyTerry(model, 1), 5, 0.2),
        "mixture": Mixture(users, 5, [0.5, 0.2, 0.3]),
        "noisy_mixture": LabelNoise(Mixture(users, 1), 5, 0.1),
    }


KINDS = list(annotators(random_model()))


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_probabilities_of_both_orders_sum_to_one(kind, seed):
    model = random_model(seed)
    who = annotators(model)[kind]
    first, second = draw(model, 20, seed)
    p, q = who.probability(first, second), who.probability(second, first)
    assert np.abs(p + q - 1).max() < 1e-12
    assert np.abs(who.probability(first, first) - 0.5).max() < 1e-12
    assert p.min() >= 0
    assert who.count == 0 == len(who.log)


@pytest.mark.parametrize("model", [random_model(3), tree_model(3)], ids=["dense", "tree"])
def test_bradley_terry_and_thurstone_are_the_formulas(model):
    first, second = draw(model, 30, 1)
    for k in range(30):
        total = [
            sum(model.reward[h][t.states[k, h], t.actions[k, h]] for h in range(H)) for t in (first, second)
        ]
        x = total[0] - total[1]
        logistic, normal = 1 / (1 + mp.exp(-x)), mp.ncdf(x)
        assert BradleyTerry(model, 0).probability(first, second)[k] == pytest.approx(
            float(logistic), rel=1e-12
        )
        assert Thurstone(model, 0).probability(first, second)[k] == pytest.approx(float(normal), rel=1e-12)


@given(seed=st.integers(0, 2**31), flip=st.floats(0, 0.5))
@settings(max_examples=30, deadline=None)
def test_label_noise_and_mixture_are_the_averages(seed, flip):
    model = random_model(seed)
    first, second = draw(model, 10, seed)
    base = BradleyTerry(model, 0)
    p = base.probability(first, second)
    noisy = LabelNoise(base, 0, flip)
    assert noisy.probability(first, second) == pytest.approx((1 - flip) * p + flip * (1 - p), rel=1e-12)
    users = [base, Thurstone(model, 0), noisy]
    weights = np.random.default_rng(seed).dirichlet(np.ones(3))
    mixture = Mixture(users, 0, weights)
    each = [user.probability(first, second) for user in users]
    average = sum(w * q for w, q in zip(weights, each, strict=True))
    assert mixture.probability(first, second) == pytest.approx(average, rel=1e-12)
    assert mixture.probability(first, second, user=1) == pytest.approx(each[1], rel=1e-12)
    assert Mixture(users, 0).probability(first, second) == pytest.approx(np.mean(each, axis=0), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_the_law(kind):
    """Exact goodness of fit: with p known, each pair's number of wins is binomial."""
    model = random_model(11)
    who = annotators(model)[kind]
    first, second = draw(model, 6, 4)
    n = 4000
    tile = np.tile(np.arange(6), n)
    wins = who.compare(first[tile], second[tile]).reshape(n, 6).sum(axis=0)
    p = who.probability(first, second)
    assert ((p > 0.02) & (p < 0.98)).all()
    statistic = ((wins - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert stats.chi2.sf(statistic, 6) > 1e-3
    # and the test has the power to see a label read backwards
    backwards = ((n - wins - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert stats.chi2.sf(backwards, 6) < 1e-6


def test_outcomes_are_labels_zero_and_one_and_one_means_first():
    model = FiniteMDP.dense(np.ones((1, 1, 2, 1)), [[[0.0, 100.0]]])
    worse, better = (Trajectories([[0]], [[a]]) for a in (0, 1))
    who = BradleyTerry(model, 0)
    assert who.compare(better, worse).dtype == np.int8
    assert (int(who.compare(better, worse)[0]), int(who.compare(worse, better)[0])) == (1, 0)
    assert who.log.outcomes.tolist() == [1, 1, 0]


def test_users_of_a_mixture_are_logged_and_can_be_named():
    model = random_model(2)
    certain = [KernelAnnotator(model, 0, lambda f, s, p=p: np.full(len(f), p), link=None) for p in (0.5, 0.5)]
    mixture = Mixture(certain, 7, [0.25, 0.75])
    first, second = draw(model, 4000, 0)
    mixture.compare(first, second)
    share = (mixture.log.users == 0).mean()
    assert stats.binomtest(int(share * 4000), 4000, 0.25).pvalue > 1e-3
    mixture.compare(first[:5], second[:5], user=1)
    assert (mixture.log.users[-5:] == 1).all()
    with pytest.raises(ValueError, match=r"user 2 is not one of 0\.\.1"):
        mixture.compare(first[:1], second[:1], user=2)


def test_naming_a_user_leaves_later_answers_alone():
    model = random_model(2)
    first, second = draw(model, 50, 0)
    free, named = (Mixture([BradleyTerry(model, 0), Thurstone(model, 0)], 9) for _ in range(2))
    free.compare(first[:10], second[:10])
    named.compare(first[:10], second[:10], user=0)
    assert (free.compare(first, second) == named.compare(first, second)).all()


# ---- attainable returns, kappa, advantages ---------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_reward_range_is_that_of_all_trajectories(seed):
    for model in (random_model(seed), tree_model(seed)):
        returns = model.returns(every_trajectory(model))
        for same in (model, model.to_sparse(), model.to_dense()):
            assert reward_range(same) == pytest.approx((returns.min(), returns.max()), rel=1e-12)


def test_a_transition_without_mass_is_not_attainable():
    P = np.array([[[[1.0, 0.0]], [[0.0, 1.0]]]] * 2)  # two states, each stays; only state 0 starts
    model = FiniteMDP.dense(P, [[[1.0], [50.0]], [[2.0], [90.0]]], 0)
    assert reward_range(model) == (3.0, 3.0)
    assert BradleyTerry(model, 0).kappa == 4.0


def test_kappa_of_each_annotator():
    model = random_model(6)
    returns = model.returns(every_trajectory(model))
    R = returns.max() - returns.min()
    bt = BradleyTerry(model, 0)
    assert bt.radius == pytest.approx(R)
    assert bt.kappa == pytest.approx(2 + np.exp(R) + np.exp(-R))
    assert Thurstone(model, 0).kappa == pytest.approx(np.sqrt(2 * np.pi) * np.exp(R * R / 2))
    assert (bt.link, Thurstone(model, 0).link) == (LOGISTIC, PROBIT)
    assert LabelNoise(bt, 0, 0.25).kappa == pytest.approx(2 * bt.kappa)
    assert LabelNoise(bt, 0, 0.5).kappa == np.inf
    assert LabelNoise(bt, 0, 0).link is LOGISTIC
    assert LabelNoise(bt, 0, 0.1).link is None
    free = KernelAnnotator(model, 0, cyclic)
    assert (free.kappa, LabelNoise(free, 0, 0.1).kappa, Mixture([bt], 0).kappa) == (None, None, None)


def test_a_user_may_have_a_reward_of_its_own():
    rng = np.random.default_rng(0)
    phi, theta = rng.random((H, S, A, 2)), np.array([0.3, -0.4])
    features = FeatureMap(list(phi))
    model = random_model(1).replace(features=features)
    first, second = draw(model, 10, 0)
    want = LOGISTIC.value((features.of(first) - features.of(second)) @ theta)
    for reward in (theta, features.rewards(theta), np.stack(features.rewards(theta))):
        who = BradleyTerry(model, 0, reward=reward)
        assert who.probability(first, second) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="theta has 3 entries; the model's features have 2"):
        BradleyTerry(model, 0, reward=np.ones(3))
    with pytest.raises(ValueError, match="the model has no features"):
        BradleyTerry(random_model(1), 0, reward=theta)
    with pytest.raises(ValueError, match=r"reward\[h=0\] has shape"):
        BradleyTerry(model, 0, reward=np.ones((H, S, A + 1)))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_advantages_of_a_deterministic_world_add_up_to_the_regret(seed):
    model = tree_model(seed)
    advantage = optimal_advantage(model)
    assert max(a.max() for a in advantage) <= 1e-12
    paths = every_trajectory(model)
    returns, starts = model.returns(paths), paths.states[:, 0]
    score = model.replace(reward=advantage).returns(paths)
    best = {s: returns[starts == s].max() for s in set(starts.tolist())}
    assert score == pytest.approx(returns - [best[s] for s in starts.tolist()], abs=1e-12)


def test_regret_preference_masks_and_takes_any_link():
    model = random_model(8)
    advantage = optimal_advantage(model)
    masked = ~np.asarray(model.action_mask)
    assert masked.any()
    assert (np.stack(advantage)[masked] == 0).all()
    first, second = draw(model, 8, 0)
    want = PROBIT.value(
        model.replace(reward=advantage).returns(first) - model.replace(reward=advantage).returns(second)
    )
    assert RegretPreference(model, 0, link="probit").probability(first, second) == pytest.approx(want)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def deterministic_model():
    P = np.zeros((2, 2, 2, 2))
    P[:, :, 0, 0] = P[:, :, 1, 1] = 1
    return FiniteMDP.dense(P, np.zeros((2, 2, 2)), np.array([0.5, 0.5]))


def test_response_number_names_every_trajectory_once():
    model = deterministic_model()
    numbers = response_number(model)(every_trajectory(model))
    assert sorted(numbers) == list(range(8))


def test_matrix_kernel_by_probability_and_by_score():
    model = deterministic_model()
    rng = np.random.default_rng(0)
    g = rng.normal(size=(8, 8))
    g -= g.T
    paths = every_trajectory(model)
    i, j = (k.ravel() for k in np.meshgrid(range(8), range(8)))
    number = response_number(model)(paths)
    by_score = KernelAnnotator(model, 0, g, link="logistic").probability(paths[i], paths[j])
    assert by_score == pytest.approx(LOGISTIC.value(g[number[i], number[j]]))
    by_value = KernelAnnotator(model, 0, LOGISTIC.value(g)).probability(paths[i], paths[j])
    assert by_value == pytest.approx(by_score, rel=1e-12)
    by_function = KernelAnnotator(model, 0, lambda f, s: f.actions[:, 0] - s.actions[:, 0], link=PROBIT)
    difference = paths[i].actions[:, 0] - paths[j].actions[:, 0]
    assert by_function.probability(paths[i], paths[j]) == pytest.approx(PROBIT.value(difference))
    assert by_function.link is PROBIT


def test_matrix_kernel_errors_name_the_cell():
    model = deterministic_model()
    P = np.full((3, 3), 0.5)
    P[1, 2] = 0.6
    with pytest.raises(ValueError, match=r"P\[1, 2\] = 0\.6 and P\[2, 1\] = 0\.5: both must be in \[0, 1\]"):
        KernelAnnotator(model, 0, P)
    with pytest.raises(ValueError, match=r"P\['b', 'c'\] = 0\.6"):
        KernelAnnotator(model, 0, P, names="abc")
    P[1, 2], P[2, 1] = 1.2, -0.2
    with pytest.raises(ValueError, match=r"P\[1, 2\] = 1\.2"):
        KernelAnnotator(model, 0, P)
    P[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"P\[1, 2\] = nan"):
        KernelAnnotator(model, 0, P)
    with pytest.raises(ValueError, match=r"has shape \(2, 3\)"):
        KernelAnnotator(model, 0, np.zeros((2, 3)))
    paths = every_trajectory(model)
    small = KernelAnnotator(model, 0, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"pair \d+ has the numbers .* but the preference matrix has 2 rows"):
        small.compare(paths, paths)
    named = KernelAnnotator(model, 0, np.full((2, 2), 0.5), identify=lambda tau: tau.actions[:, 0])
    assert named.probability(paths, paths).tolist() == [0.5] * 8


def test_function_kernel_that_is_not_antisymmetric_is_refused_and_nothing_is_lost():
    model = random_model(1)
    first, second = draw(model, 5, 0)
    who = KernelAnnotator(model, 0, lambda f, s: np.full(len(f), 0.6))
    before = json.dumps(who.checkpoint())
    with pytest.raises(ValueError, match=r"pair 0: the kernel gives .* = 0\.6 and P\(second, first\) = 0\.6"):
        who.compare(first, second)
    assert json.dumps(who.checkpoint()) == before
    with pytest.raises(ValueError, match=r"returned shape \(1,\); expected \(5,\)"):
        KernelAnnotator(model, 0, lambda f, s: [0.5]).compare(first, second)
    mixture = Mixture([who, who], 0)
    before = json.dumps(mixture.checkpoint())
    with pytest.raises(ValueError, match="antisymmetric"):
        mixture.compare(first, second)
    assert json.dumps(mixture.checkpoint()) == before


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exhausted_budget_loses_nothing(kind):
    model = random_model(0)
    who, free = annotators(model)[kind], annotators(model)[kind]
    first, second = draw(model, 30, 0)
    who.budget = 25
    answers = [who.compare(first[:20], second[:20])]
    before = json.dumps(who.checkpoint())
    with pytest.raises(BudgetExhausted, match="6 answers asked but 5 of the budget of 25 are left") as caught:
        who.compare(first[20:26], second[20:26])
    assert (caught.value.asked, caught.value.remaining, caught.value.budget) == (6, 5, 25)
    assert json.dumps(who.checkpoint()) == before
    assert (who.count, who.remaining, len(who.log)) == (20, 5, 20)
    answers.append(who.compare(first[20:25], second[20:25]))
    assert who.remaining == 0
    assert (np.concatenate(answers) == free.compare(first[:25], second[:25])).all()
    assert free.remaining is None


def test_a_budget_of_zero_answers_only_the_empty_question():
    model = random_model(0)
    first, second = draw(model, 1, 0)
    who = BradleyTerry(model, 0, budget=0)
    assert who.compare(first[:0], second[:0]).shape == (0,)
    with pytest.raises(BudgetExhausted):
        who.compare(first, second)


def test_bad_construction():
    model = random_model(0)
    with pytest.raises(ValueError, match="budget is -1"):
        BradleyTerry(model, 0, budget=-1)
    with pytest.raises(TypeError, match="needs a seed"):
        BradleyTerry(model, None)
    with pytest.raises(ValueError, match="'cauchy' is not one of logistic, probit"):
        LinkAnnotator(model, 0, link="cauchy")
    base = BradleyTerry(model, 0)
    for flip in (-0.1, 0.6, np.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1/2\]"):
            LabelNoise(base, 0, flip)
    with pytest.raises(ValueError, match="give the budget to the outermost one"):
        LabelNoise(BradleyTerry(model, 0, budget=3), 0, 0.1)
    with pytest.raises(ValueError, match="at least one user"):
        Mixture([], 0)
    with pytest.raises(ValueError, match="user 1 annotates a model of other layers"):
        Mixture([base, BradleyTerry(tree_model(), 0)], 0)
    with pytest.raises(ValueError, match=r"weights has shape \(1,\)"):
        Mixture([base, base], 0, [1.0])
    with pytest.raises(ValueError, match=r"weights is not a probability vector: sum 0\.9"):
        Mixture([base, base], 0, [0.5, 0.4])


def test_bad_trajectories_are_named():
    model = tree_model()
    first, second = draw(model, 3, 0)
    who = BradleyTerry(model, 0)
    with pytest.raises(ValueError, match="first holds 3 trajectories of 3 steps but second 2"):
        who.compare(first, second[:2])
    short = Trajectories(first.states[:, :2], first.actions[:, :2])
    with pytest.raises(ValueError, match="have 2 steps but the model's horizon is 3"):
        who.compare(short, short)
    for what, value in (("states", 5), ("states", -1), ("actions", 3)):
        broken = Trajectories(second.states.copy(), second.actions.copy())
        getattr(broken, what)[1, 1] = value
        with pytest.raises(
            ValueError,
            match=rf"second\.{what}\[1, 1\] is {value}; layer 1 has {5 if what == 'states' else 3}",
        ):
            who.compare(first, broken)
    assert who.count == 0


# ---- continuation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_n_then_m_is_n_plus_m_also_through_a_checkpoint(kind, parts, seed):
    model = random_model(seed)
    first, second = draw(model, sum(parts), seed)
    whole, split = annotators(model)[kind], annotators(model)[kind]
    want, got, start = whole.compare(first, second), [], 0
    for part in parts:
        got.append(split.compare(first[start : start + part], second[start : start + part]))
        saved = json.loads(json.dumps(split.checkpoint()))
        split = annotators(model)[kind]
        split.rng.random(3)  # the state it was constructed with must not matter
        split.restore(saved)
        start += part
    assert (np.concatenate(got) == want).all()
    assert split.log == whole.log
    assert split.checkpoint() == whole.checkpoint()


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.MT19937, np.random.SFC64])
def test_any_bit_generator_can_be_continued(bits):
    model = random_model(0)
    first, second = draw(model, 40, 0)
    who = BradleyTerry(model, np.random.Generator(bits(3)), keep_log=False)
    who.compare(first, second)
    saved = json.loads(json.dumps(who.checkpoint()))
    other = BradleyTerry(model, np.random.Generator(bits(4)))
    other.restore(saved)
    assert other.log is None
    assert (who.compare(first, second) == other.compare(first, second)).all()


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing():
    model = random_model(0)
    first, second = draw(model, 4, 0)
    who = BradleyTerry(model, 0)
    who.compare(first, second)
    before = who.checkpoint()
    with pytest.raises(ValueError, match="is of 'Thurstone', not of 'BradleyTerry'"):
        who.restore(Thurstone(model, 0).checkpoint())
    with pytest.raises(ValueError, match="generator is Philox but this one is PCG64"):
        who.restore(BradleyTerry(model, np.random.Generator(np.random.Philox(0))).checkpoint())
    shorter = FiniteMDP.dense(np.ones((1, 1, 1, 1)), [[[0.0]]])
    with pytest.raises(ValueError, match="trajectories of 1 steps, this model's have 3"):
        who.restore(BradleyTerry(shorter, 0).checkpoint())
    assert who.checkpoint() == before


# ---- log and replay --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), n=st.integers(0, 70))
@settings(max_examples=20, deadline=None)
def test_pack_and_log_round_trip(seed, n):
    model = tree_model(seed)
    first, second = draw(model, n, seed)
    back = unpack(pack(first, second))
    log = ComparisonLog(H)
    outcomes = np.random.default_rng(seed).integers(0, 2, n).astype(np.int8)
    for k in range(n):
        log.append(pack(first[[k]], second[[k]]), outcomes[[k]])
    for got in (back, (log.first, log.second), (ComparisonLog.from_text(log.to_text()).first, second)):
        assert (got[0].states == first.states).all()
        assert (got[0].actions == first.actions).all()
        assert (got[1].states == second.states).all()
        assert (got[1].actions == second.actions).all()
    assert (log.outcomes == outcomes).all()
    assert (log.users == -1).all()
    assert ComparisonLog.from_text(log.to_text()) == log
    assert log != "log"


def test_replay_gives_the_recorded_answers_and_refuses_other_questions(tmp_path):
    model = random_model(5)
    first, second = draw(model, 20, 0)
    who = annotators(model)["mixture"]
    answers = who.compare(first, second)
    who.log.save(tmp_path / "log.npz")
    log = ComparisonLog.load(tmp_path / "log.npz")
    assert log == who.log
    assert os.listdir(tmp_path) == ["log.npz"]
    replay = Replay(model, log)
    assert (replay.compare(first[:7], second[:7]) == answers[:7]).all()
    saved = json.loads(json.dumps(replay.checkpoint()))
    replay = Replay(model, log)
    replay.restore(saved)
    other = Trajectories(second.states, second.actions.copy())
    other.actions[9, 2] = (other.actions[9, 2] + 1) % A
    with pytest.raises(
        ReplayMismatch, match=r"comparison 9: the second trajectory asked is states .* recorded"
    ):
        replay.compare(first[7:12], other[7:12])
    assert (replay.compare(first[7:], second[7:]) == answers[7:]).all()
    assert replay.log == log
    with pytest.raises(BudgetExhausted, match="1 answers asked but 0 of the budget of 20"):
        replay.compare(first[:1], second[:1])
    with pytest.raises(TypeError, match="answers, not probabilities"):
        replay.probability(first, second)
    with pytest.raises(ValueError, match="the log compares 3 steps but the model's horizon is 1"):
        Replay(FiniteMDP.dense(np.ones((1, 1, 1, 1)), [[[0.0]]]), log)


def test_damaged_logs_are_refused(tmp_path):
    path = tmp_path / "log.npz"
    good = {"format": 1, "pairs": np.zeros((2, 2, 2, 1), np.int32), "outcomes": np.zeros(2, np.int8)}
    good["users"] = np.zeros(2, np.int32)

    def refused(match, **changes):
        np.savez(path, **{k: v for k, v in (good | changes).items() if v is not None})
        with pytest.raises(ValueError, match=match):
            ComparisonLog.load(path)

    refused(
        r"comparison 1: outcome must be 1 \(first preferred\) or 0 \(second\), got -1",
        outcomes=np.array([1, -1]),
    )
    refused("format 2; this version of preflab reads up to 1", format=2)
    refused("not a readable comparison log", pairs=None)
    refused("expected", pairs=np.zeros((2, 2, 1)))
    refused("not a readable comparison log.*allow_pickle", users=np.array([None, None]))
    for junk in (b"", b"text", b"PK\x03\x04 cut"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="not a readable comparison log"):
            ComparisonLog.load(path)
    np.savez_compressed(path, **good | {"pairs": np.random.default_rng(0).integers(0, 9, (500, 2, 2, 1))})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="not a readable comparison log"):
        ComparisonLog.load(path)
    with pytest.raises(ValueError, match="horizon is 0"):
        ComparisonLog(0)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    log, path = ComparisonLog(1), tmp_path / "log.npz"
    log.save(path)
    old = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["log.npz"]


# ---- rankings --------------------------------------------------------------------------------------------------------


def test_plackett_luce_is_a_law_over_orders_and_bradley_terry_for_two():
    model = random_model(4)
    tau, other = draw(model, 3, 2)
    who = PlackettLuce(model, 3, budget=6000)
    orders = list(itertools.permutations(range(3)))
    p = np.exp([who.log_probability(tau, np.array(o)) for o in orders])
    weights = np.exp(model.returns(tau))
    by_hand = [
        weights[o[0]] / weights.sum() * weights[o[1]] / (weights[o[1]] + weights[o[2]]) for o in orders
    ]
    assert p == pytest.approx(by_hand, rel=1e-12)
    assert p.sum() == pytest.approx(1, rel=1e-12)
    pair = Trajectories.concatenate([tau[:1], other[:1]])
    bt = BradleyTerry(model, 0).probability(tau[:1], other[:1])[0]
    assert np.exp(who.log_probability(pair, np.array([0, 1]))) == pytest.approx(bt, rel=1e-12)
    seen = [tuple(int(k) for k in who.rank(tau)) for _ in range(6000)]
    counts = np.array([seen.count(o) for o in orders])
    assert stats.chisquare(counts, 6000 * p).pvalue > 1e-3
    with pytest.raises(BudgetExhausted):
        who.rank(tau)
    with pytest.raises(ValueError, match=r"order \[0, 0, 1\] is not a permutation of 0\.\.2"):
        who.log_probability(tau, np.array([0, 0, 1]))


def test_rankings_continue_bit_for_bit():
    model = random_model(4)
    tau, _ = draw(model, 5, 2)
    whole, part = PlackettLuce(model, 3), PlackettLuce(model, 3)
    want = [whole.rank(tau).tolist() for _ in range(10)]
    got = [part.rank(tau).tolist() for _ in range(4)]
    saved = json.loads(json.dumps(part.checkpoint()))
    part = PlackettLuce(model, 99)
    part.restore(saved)
    assert got + [part.rank(tau).tolist() for _ in range(6)] == want
    assert part.count == 10


def test_sparse_matrices_shared_by_layers_have_the_same_range():
    m = sp.csr_array(np.array([[0.5, 0.5], [0, 1.0], [1.0, 0], [0, 1.0]]))
    model = FiniteMDP.sparse([m, m], 2, np.arange(8.0).reshape(2, 2, 2))
    assert reward_range(model) == reward_range(model.to_dense())
