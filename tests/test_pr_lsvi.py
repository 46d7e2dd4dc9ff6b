"""PR-LSVI against a literal transcription of the paper's lines, closed forms and exact planning."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.estimation import fit_preferences
from preflab.algorithms.planning import evaluate, value_iteration
from preflab.algorithms.pr_lsvi import PRLSVI, RECORD, Settings, interpolate
from preflab.envs import AssumptionWarning, FeatureMap, FiniteMDP
from preflab.envs.annotators import BradleyTerry, BudgetExhausted
from preflab.envs.exploration import river_swim
from preflab.envs.linear_mdp import random_linear_mdp, tabular_linear_mdp
from preflab.envs.token_mdp import random_token_mdp


def world(seed=0, mode="sum", **sizes):
    return random_linear_mdp(
        **({"n_states": 6, "n_actions": 3, "d": 4, "horizon": 3} | sizes), seed=seed, mode=mode
    )


def start(model, eps=0.2, seed=0, budget=None, **changes):
    return PRLSVI(
        model, BradleyTerry(model, seed + 1000, budget=budget), Settings.scaled(model, eps, **changes), seed
    )


class Transcript(PRLSVI):
    """Keeps what the lines below need: every past trajectory, comparison, draw and plan."""

    def __init__(self, *args, **kwargs):
        self.pairs, self.comparisons, self.plans = [], [], []
        super().__init__(*args, **kwargs)

    def _plan(self, theta_bar, z):
        value, policy = super()._plan(theta_bar, z)
        self.plans.append((theta_bar.copy(), z.copy(), value, np.array(policy), len(self.pairs)))
        return value, policy

    def _learn_reward(self, delta, label):
        if label >= 0:
            self.comparisons.append((delta, label))
        super()._learn_reward(delta, label)

    def _learn_transitions(self, pair):
        self.pairs.append(pair)
        super()._learn_transitions(pair)


def literal_plan(model, s, theta_bar, z, pairs):
    """Lines 5-9 as printed, with sums over past data and matrix inverses."""
    H, S, A, d = model.horizon, model.sizes[0], model.n_actions, model.features.d
    V, pi, z = np.zeros((H + 1, S)), np.zeros((H, S), int), z.reshape(H, d)
    theta_r = model.features.per_step(theta_bar)
    for h in reversed(range(H)):
        phi = model.features.phi[h]
        Sigma, b = s.lam * np.eye(d), np.zeros(d)
        for pair in pairs:
            for j in range(2 if s.transition_data == "both" else 1):
                x = phi[pair.states[j, h], pair.actions[j, h]]
                Sigma += np.outer(x, x)
                if h + 1 < H:
                    b += x * V[h + 1, pair.states[j, h + 1]]
        inverse = np.linalg.inv(Sigma)
        noise = np.linalg.solve(np.linalg.cholesky(Sigma).T, z[h])  # covariance Sigma^{-1}
        theta = inverse @ b + s.sigma_P * noise
        for x in range(S):
            q = np.empty(A)
            for a in range(A):
                n = math.sqrt(phi[x, a] @ inverse @ phi[x, a])
                q[a] = phi[x, a] @ theta_r[h] + interpolate(
                    n, phi[x, a] @ theta, H - 1 - h, s.alpha_L, s.alpha_U
                )
            V[h, x], pi[h, x] = q.max(), q.argmax()
    return model.initial @ V[0], pi


@pytest.mark.parametrize(("mode", "data"), [("sum", "both"), ("concat", "new")])
def test_every_line_equals_its_transcription(mode, data):
    model = world(mode=mode)
    s = Settings.scaled(model, 0.3, c_r=0.4, transition_data=data, mle_growth=0.0)
    run = Transcript(model, BradleyTerry(model, 1), s, seed=5).advance(60)
    deltas = np.array([d for d, _ in run.comparisons])
    labels = np.array([o for _, o in run.comparisons])
    Sigma = s.lam * np.eye(model.features.dim) + deltas.T @ deltas
    np.testing.assert_allclose(run.L_r @ run.L_r.T, Sigma, atol=1e-10)
    np.testing.assert_allclose(run.theta_hat, fit_preferences(deltas, labels, radius=s.B).theta, atol=1e-6)
    expected_log_det = np.linalg.slogdet(Sigma)[1] - model.features.dim * math.log(s.lam)
    assert run.records["log_det"][-1] == pytest.approx(expected_log_det)
    for theta_bar, z, value, policy, t in run.plans[::7]:
        literal_value, literal_policy = literal_plan(model, s, theta_bar, z, run.pairs[:t])
        assert value == pytest.approx(literal_value, abs=1e-9)
        np.testing.assert_array_equal(policy, literal_policy)
    # line 10: the comparator is the previous episode's policy; line 12 decides; Delta = 0 is never asked
    records = run.records
    np.testing.assert_array_equal(records["comparator"][1:], records["policy"][:-1])
    np.testing.assert_array_equal(records["queried"], records["disagreement"] > s.eps)
    for row, pair in zip(records, run.pairs, strict=True):
        delta = np.subtract(*model.features.of(pair))
        assert delta.any() or not row["queried"]
    assert records["queried"].any()
    assert not records["queried"].all()


def test_regret_is_exact_and_charges_both_policies():
    model = world(seed=3)
    run = start(model).advance(50)
    best = value_iteration(model).value
    values = [evaluate(model, p).value for p in run.policies]
    expected = [2 * best - values[r["policy"]] - values[r["comparator"]] for r in run.records]
    np.testing.assert_allclose(run.records["regret"], expected, atol=1e-12)
    assert (run.records["regret"] >= -1e-12).all()


def test_dense_and_sparse_kernels_give_the_same_run():
    model = world(seed=2)
    other = model.to_sparse()
    a, b = (start(m).advance(80) for m in (model, other))
    for name in ("policy", "queried", "label"):
        np.testing.assert_array_equal(a.records[name], b.records[name])
    np.testing.assert_allclose(a.records["regret"], b.records["regret"], atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda: world(), lambda: world(mode="concat"), lambda: random_token_mdp(seed=1)]
)
@pytest.mark.parametrize("growth", [0.0, 0.05])
def test_n_then_m_equals_n_plus_m_also_through_save_and_load(make, growth, tmp_path):
    model = make()
    changes = {"mle_growth": growth, "transitions": "learned" if model.uniform else "known"}
    whole = start(model, **changes).advance(70)
    parts = start(model, **changes).advance(30)
    parts.save(tmp_path / "run.npz")
    loaded = PRLSVI.load(tmp_path / "run.npz", model, BradleyTerry(model, 99999))
    for run in (parts.advance(40), loaded.advance(40)):
        assert run.records.tobytes() == whole.records.tobytes()
        np.testing.assert_array_equal(run.theta_hat, whole.theta_hat)
        assert len(run.policies) == len(whole.policies)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_load_refuses_other_files(tmp_path):
    model = world()
    run = start(model).advance(3)
    run.save(tmp_path / "run.npz")
    other = world(seed=7).replace(name="another world")
    with pytest.raises(ValueError, match="another world"):
        PRLSVI.load(tmp_path / "run.npz", other, BradleyTerry(other, 0))
    np.savez(tmp_path / "else.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match="not a saved run"):
        PRLSVI.load(tmp_path / "else.npz", model, BradleyTerry(model, 0))


def test_load_refuses_a_newer_format(tmp_path, monkeypatch):
    model = world()
    monkeypatch.setattr("preflab.algorithms.pr_lsvi.FORMAT_VERSION", 99)
    start(model).save(tmp_path / "run.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer"):
        PRLSVI.load(tmp_path / "run.npz", model, BradleyTerry(model, 0))


def test_a_spent_budget_loses_nothing():
    model = world()
    run = start(model, eps=0.01, budget=20)
    with pytest.raises(BudgetExhausted):
        run.advance(200)
    done = len(run.records)
    assert run.records["queried"].sum() == 20
    # with a larger budget from the start, the same episodes come out, and the stopped run goes on from there
    free = start(model, eps=0.01).advance(done + 10)
    assert run.records.tobytes() == free.records[:done].tobytes()
    run.annotator.budget = None
    assert run.advance(10).records.tobytes() == free.records.tobytes()


def test_known_transitions_plan_exactly():
    """With the true reward as theta_bar, the known-transition plan is the optimum of the token world."""
    model = random_token_mdp(seed=4)
    run = start(model, transitions="known")
    value, policy = run._plan(model.theta, np.empty(0))
    assert value == pytest.approx(value_iteration(model).value)
    assert evaluate(model, policy).value == pytest.approx(value)


def test_without_noise_and_with_much_data_it_is_plain_lsvi_and_optimal():
    """Identity (f.6): sigma = 0 and small norms; the regression then finds the true expectations."""
    model = tabular_linear_mdp(river_swim(4, horizon=4).to_dense())
    s = Settings.scaled(model, 0.1, c_r=0.0, c_P=0.0, c_U=1e6, alpha_L=1e5)
    run = PRLSVI(model, BradleyTerry(model, 0), s, seed=0)
    n = 1e9  # sufficient statistics of n visits to every (s, a) at every step
    run.L_P[:] = math.sqrt(n) * np.eye(model.features.d)
    P = np.stack([model.kernel.dense(h).reshape(-1, model.sizes[0]) for h in range(model.horizon)])
    run.cross[:] = n * P
    value, policy = run._plan(model.theta, np.zeros(model.horizon * model.features.d))
    assert value == pytest.approx(value_iteration(model).value, abs=1e-6)
    assert evaluate(model, policy).value == pytest.approx(value_iteration(model).value, abs=1e-9)


def test_action_masks_are_obeyed():
    base = world(n_states=5, n_actions=3)
    mask = np.ones((3, 5, 3), bool)
    mask[:, :, 0] = False
    mask[:, 0, 1] = False
    run = start(base.replace(action_mask=mask)).advance(40)
    for policy in run.policies:
        assert np.take_along_axis(mask, np.asarray(policy)[..., None].astype(int), axis=2).all()


@given(st.floats(0, 5), st.floats(-3, 3), st.floats(0, 5))
def test_interpolation_is_continuous_and_between(n, value, default):
    alpha_L, alpha_U = 0.3, 0.6
    omega = interpolate(n, value, default, alpha_L, alpha_U)
    assert min(value, default) - 1e-12 <= omega <= max(value, default) + 1e-12
    assert interpolate(alpha_L, value, default, alpha_L, alpha_U) == value
    above = interpolate(np.nextafter(alpha_U, 1), value, default, alpha_L, alpha_U)
    assert above == default
    assert interpolate(alpha_U, value, default, alpha_L, alpha_U) == pytest.approx(default)
    assert interpolate(np.nextafter(alpha_L, 1), value, default, alpha_L, alpha_U) == pytest.approx(
        value, abs=1e-9
    )


def test_passive_baseline_asks_by_coin():
    run = start(world(), query_rate=0.25).advance(400)
    assert 60 <= run.records["queried"].sum() <= 140  # Binomial(400, 1/4): five standard deviations
    assert start(world(), query_rate=0.0).advance(20).records["queried"].sum() == 0


def test_theory_settings_have_the_paper_orders():
    small, wide = world(), world(d=8, n_states=8)
    a, b = (Settings.theory(m, 0.1, B=1.0) for m in (small, wide))
    assert b.sigma_r / a.sigma_r == pytest.approx(2**0.5)
    assert b.sigma_P / a.sigma_P == pytest.approx(4)
    assert a.alpha_U / b.alpha_U == pytest.approx(2**2.5)
    assert a.alpha_L == a.alpha_U / 2
    assert a.mle_growth == 0
    assert Settings.theory(small, 0.1).B == 2.0


def test_theory_settings_warn_of_features_that_are_too_long():
    model = world()
    features = FeatureMap([2 * phi for phi in model.features.phi], model.features.mode)
    with pytest.warns(AssumptionWarning, match="the theory assumes at most 1"):
        Settings.theory(model.plain(features=features, theta=model.theta / 2), 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_r": -1.0}, "sigma_r is -1.0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"lam": 0.0}, "lam is 0.0"),
        ({"alpha_L": 0.7, "alpha_U": 0.6}, "below alpha_U"),
        ({"transitions": "guessed"}, "transitions is 'guessed'"),
        ({"query_rate": 1.5}, "probability"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings.scaled(world(), changes.pop("eps", 0.1), **changes)


def test_bad_models_are_named():
    plain = FiniteMDP.dense(np.full((2, 2, 2, 2), 0.5), np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="no features"):
        Settings.scaled(plain, 0.1)
    tree = random_token_mdp(seed=0)
    with pytest.raises(ValueError, match="transitions='known'"):
        start(tree)
    with pytest.raises(ValueError, match="at least 0"):
        start(world()).advance(-1)


def test_unknown_theta_gives_nan_error_and_nothing_else_changes():
    model = world()
    silent = FiniteMDP(
        kernel=model.kernel,
        reward=model.reward,
        initial=model.initial,
        features=model.features,
        name=model.name,
    )
    a, b = start(model).advance(30), start(silent).advance(30)
    assert np.isnan(b.records["error"]).all()
    for name in set(RECORD.names) - {"error"}:
        np.testing.assert_array_equal(a.records[name], b.records[name])


def test_values_on_a_tree_equal_backward_evaluation():
    model = random_token_mdp(prompts=3, seed=6)
    run = start(model, transitions="known").advance(20)
    np.testing.assert_allclose(run.values, [evaluate(model, p).value for p in run.policies], atol=1e-12)
