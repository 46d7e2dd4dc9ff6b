"""The preference MLE against independent solvers, its optimality conditions, invariances and degenerate data."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preflab.algorithms.estimation import SeparableDataError, fit_preferences, merge_repeated
from preflab.envs.links import LOGISTIC, PROBIT
from scipy.optimize import minimize
from scipy.stats import norm as gaussian
from scipy.stats import ortho_group

LINKS = [LOGISTIC, PROBIT]
SETTINGS = [{}, {"radius": 0.8}, {"radius": 50.0}, {"ridge": 0.6}, {"radius": 0.5, "ridge": 0.3}]


def world(q=80, d=4, seed=0, link=LOGISTIC, repeats=1):
    rng = np.random.default_rng(seed)
    D = rng.normal(size=(q, d))
    theta = rng.normal(size=d)
    return D, rng.binomial(repeats, link.value(D @ theta)).astype(float)


def log_likelihood(theta, D, w, n, link):
    """Written with the textbook formulas, not with the link's own."""
    m = D @ theta
    if link is LOGISTIC:
        return -(w @ np.log1p(np.exp(-m)) + (n - w) @ np.log1p(np.exp(m)))
    return w @ gaussian.logcdf(m) + (n - w) @ gaussian.logcdf(-m)


def score(theta, D, w, n, link):
    m = D @ theta
    if link is LOGISTIC:
        return D.T @ (w - n / (1 + np.exp(-m)))
    up, down = (np.exp(gaussian.logpdf(m) - gaussian.logcdf(s * m)) for s in (1, -1))
    return D.T @ (w * up - (n - w) * down)


@pytest.mark.parametrize("link", LINKS, ids=lambda x: x.name)
@pytest.mark.parametrize("given_", SETTINGS, ids=str)
def test_against_slsqp(link, given_):
    D, w = world(link=link)
    n = np.ones(len(w))
    ridge, radius = given_.get("ridge", 0.0), given_.get("radius")
    answer = minimize(
        lambda x: -log_likelihood(x, D, w, n, link) + ridge / 2 * x @ x,
        np.zeros(4),
        jac=lambda x: -score(x, D, w, n, link) + ridge * x,
        method="SLSQP",
        constraints=[] if radius is None else {"type": "ineq", "fun": lambda x: radius**2 - x @ x},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    fit = fit_preferences(D, w, link=link, **given_)
    assert fit.converged
    np.testing.assert_allclose(fit.theta, answer.x, atol=2e-6)
    assert (
        -answer.fun <= fit.log_likelihood - ridge / 2 * fit.theta @ fit.theta + 1e-8
    )  # SLSQP leaves the ball by 1e-9
    assert fit.log_likelihood == pytest.approx(log_likelihood(fit.theta, D, w, n, link), rel=1e-12)


@pytest.mark.parametrize("radius", [0.7, 20.0])
def test_against_trust_constr(radius):
    from scipy.optimize import NonlinearConstraint

    D, w = world(seed=1)
    n = np.ones(len(w))
    answer = minimize(
        lambda x: -log_likelihood(x, D, w, n, PROBIT),
        np.zeros(4),
        jac=lambda x: -score(x, D, w, n, PROBIT),
        method="trust-constr",
        constraints=NonlinearConstraint(
            lambda x: x @ x, 0, radius**2, jac=lambda x: 2 * x[None], hess="2-point"
        ),
        options={"gtol": 1e-9, "xtol": 1e-12, "maxiter": 400},
    )
    np.testing.assert_allclose(fit_preferences(D, w, link=PROBIT, radius=radius).theta, answer.x, atol=1e-5)


@pytest.mark.parametrize("radius", [0.5, 30.0])
def test_against_cvxpy(radius):
    cp = pytest.importorskip("cvxpy")
    D, w = world(d=5, seed=2, repeats=3)
    x = cp.Variable(5)
    loss = w @ cp.logistic(-D @ x) + (3 - w) @ cp.logistic(D @ x)
    constraint = cp.norm(x, 2) <= radius
    cp.Problem(cp.Minimize(loss), [constraint]).solve(solver="CLARABEL")
    fit = fit_preferences(D, w, counts=np.full(len(w), 3), radius=radius)
    np.testing.assert_allclose(fit.theta, x.value, atol=1e-5)
    # The solver's multiplier belongs to |theta| <= R, ours to grad = nu theta.
    assert fit.multiplier * radius == pytest.approx(float(constraint.dual_value), abs=1e-4)
    assert fit.log_likelihood == pytest.approx(-loss.value, rel=1e-7)


def test_against_choix_on_items():
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(3)
    strength = rng.normal(size=6)
    pairs, D, w = [], [], []
    for _ in range(400):
        i, j = rng.choice(6, 2, replace=False)
        won = rng.random() < LOGISTIC.value(strength[i] - strength[j])
        pairs.append((i, j) if won else (j, i))
        D.append(np.eye(6)[i] - np.eye(6)[j])
        w.append(won)
    fit = fit_preferences(*merge_repeated(D, w)[:2], counts=merge_repeated(D, w)[2])
    # Item strengths are determined up to a constant: ours is the centred one.
    assert abs(fit.theta.sum()) < 1e-12
    for peer in (choix.ilsr_pairwise(6, pairs, tol=1e-12), choix.opt_pairwise(6, pairs, tol=1e-12)):
        np.testing.assert_allclose(fit.theta, peer - peer.mean(), atol=1e-5)
    regularised = choix.opt_pairwise(6, pairs, alpha=0.4, tol=1e-12)  # penalty alpha |theta|^2
    np.testing.assert_allclose(fit_preferences(D, w, ridge=0.8).theta, regularised, atol=1e-5)


@given(
    st.integers(1, 4),
    st.integers(1, 14),
    st.integers(0, 2**32 - 1),
    st.sampled_from([{"radius": 0.3}, {"radius": 3.0}, {"ridge": 0.05}, {"radius": 1.0, "ridge": 2.0}]),
    st.sampled_from(LINKS),
)
@settings(max_examples=150, deadline=None)
def test_optimality_conditions(d, q, seed, given_, link):
    """grad f = nu theta, nu >= 0, |theta| <= R, nu (R - |theta|) = 0, theta in the span; small integer features."""
    rng = np.random.default_rng(seed)
    D = rng.integers(-2, 3, size=(q, d)).astype(float)
    n = rng.integers(0, 5, size=q).astype(float)
    w = rng.binomial(n.astype(int), 0.6).astype(float)
    fit = fit_preferences(D, w, counts=n, link=link, **given_)
    scale = n @ np.linalg.norm(D, axis=1) + 1e-300
    gradient = score(fit.theta, D, w, n, link) - given_.get("ridge", 0.0) * fit.theta
    residual = np.linalg.norm(gradient - fit.multiplier * fit.theta)
    assert fit.converged
    assert residual <= 1e-9 * scale
    assert fit.gradient_norm == pytest.approx(residual, abs=1e-12 * scale)
    assert fit.multiplier >= 0
    radius = given_.get("radius", np.inf)
    assert np.linalg.norm(fit.theta) <= radius * (1 + 1e-12)
    assert fit.multiplier == 0 or np.linalg.norm(fit.theta) >= radius * (1 - 1e-9)
    in_span = D.T @ np.linalg.lstsq(D.T, fit.theta)[0]
    np.testing.assert_allclose(in_span, fit.theta, atol=1e-9 * (1 + np.abs(fit.theta).max()))


def exactly_separable(X):
    """For integer rows X (m, 2): is there u with X u >= 0, X u != 0? Candidates: the rays that bound the cone."""
    candidates = [u for x, y in X for u in ((-y, x), (y, -x), (x, y), (-x, -y))]
    return any((X @ np.array(u) >= 0).all() and (X @ np.array(u) > 0).any() for u in candidates)


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2, st.booleans()), min_size=1, max_size=9),
    st.sampled_from(LINKS),
)
@settings(max_examples=80, deadline=None)
def test_separable_data_are_recognised_exactly(rows, link):
    D = np.array([r[:2] for r in rows])
    w = np.array([r[2] for r in rows])
    if exactly_separable(np.where(w[:, None], D, -D)):
        with pytest.raises(SeparableDataError, match=r"give radius= .* or ridge="):
            fit_preferences(D, w, link=link)
    else:
        fit = fit_preferences(D, w, link=link)
        assert fit.converged
        assert np.linalg.norm(score(fit.theta, D, w, np.ones(len(w)), link)) <= 1e-8 * np.abs(D).sum()


@pytest.mark.parametrize("link", LINKS, ids=lambda x: x.name)
def test_one_contradiction_makes_large_margins_legitimate(link):
    """A maximiser far out (margin 14) is found, not refused: 10^6 wins against one loss."""
    fit = fit_preferences([[2.0]], [1e6], counts=[1e6 + 1], link=link)
    assert fit.converged
    assert fit.theta[0] == pytest.approx(link.inverse(1e6 / (1e6 + 1)) / 2, rel=1e-8)
    far = fit_preferences([[1.0], [40.0]], [2.0, 1.0], counts=[3.0, 1.0])  # margin 40 log 2 on the second
    assert far.theta[0] == pytest.approx(np.log(2), rel=1e-6)


def test_a_loose_tolerance_neither_hides_nor_invents_separation():
    with pytest.raises(SeparableDataError):
        fit_preferences([[1.0]], [1], tolerance=1e-3)
    assert fit_preferences([[1.0]], [2], counts=[3], tolerance=1e-3).theta[0] == pytest.approx(
        np.log(2), abs=1e-3
    )
    # Converged from the start, at a margin beyond which only the linear program is believed.
    far = fit_preferences([[1.0], [40.0]], [2.0, 1.0], counts=[3.0, 1.0], start=[np.log(2)])
    assert far.theta[0] == pytest.approx(np.log(2), rel=1e-6)


def test_newton_steps_that_overshoot_are_shortened():
    """At theta = 9 the curvature is a thousandth of that at the optimum, 5: the full step would lead to -44."""
    fit = fit_preferences([[1.0]], [993.307149], counts=[1000.0], start=[9.0])
    assert fit.converged
    assert fit.theta[0] == pytest.approx(LOGISTIC.inverse(0.993307149), rel=1e-9)


def test_many_separable_comparisons_are_refused_without_dense_programs():
    rng = np.random.default_rng(0)
    D = rng.normal(size=(3000, 3))
    with pytest.raises(SeparableDataError, match="3000 comparison"):
        fit_preferences(D, D @ [1.0, -2.0, 0.5] > 0)


def test_slow_divergence_is_separable_too():
    """Quasi-separation: one direction has an optimum, the other is contradicted by nobody."""
    D = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1e-3]])
    with pytest.raises(SeparableDataError, match="4 comparison"):
        fit_preferences(D, [1, 1, 0, 1])
    assert fit_preferences(D, [1, 1, 0, 1], radius=5.0).theta[1] > 4.9


def test_zero_and_silent_comparisons():
    empty = fit_preferences(np.zeros((0, 3)), [], ridge=0.5)
    np.testing.assert_array_equal(empty.theta, np.zeros(3))
    np.testing.assert_array_equal(empty.hessian, 0.5 * np.eye(3))
    assert (empty.converged, empty.gradient_norm, empty.log_likelihood) == (True, 0.0, 0.0)
    silent = fit_preferences(np.zeros((2, 3)), [1, 2], counts=[1, 4])  # equal features: only chance
    np.testing.assert_array_equal(silent.theta, np.zeros(3))
    assert silent.log_likelihood == pytest.approx(5 * np.log(0.5))
    D, w = world()
    mixed = fit_preferences(np.vstack([D, np.zeros((1, 4))]), np.append(w, 1))
    plain = fit_preferences(D, w)
    np.testing.assert_array_equal(mixed.theta, plain.theta)
    assert mixed.log_likelihood == pytest.approx(plain.log_likelihood + np.log(0.5))


def test_one_comparison():
    D = np.array([[3.0, -4.0]])
    np.testing.assert_allclose(fit_preferences(D, [1], radius=2.0).theta, [1.2, -1.6], rtol=1e-12)
    np.testing.assert_allclose(fit_preferences(D, [0], radius=2.0).theta, [-1.2, 1.6], rtol=1e-12)
    fit = fit_preferences(D, [1], ridge=0.3)
    a = fit.theta[0] / 3.0  # theta = a D with 0.3 a = Phi(-25 a)
    np.testing.assert_allclose(fit.theta, a * D[0], rtol=1e-12)
    assert 0.3 * a == pytest.approx(LOGISTIC.value(-25 * a), rel=1e-9)
    with pytest.raises(SeparableDataError, match="1 comparison"):
        fit_preferences(D, [1])
    half = fit_preferences(D, [0.5])  # a soft label has an optimum
    np.testing.assert_allclose(half.theta, 0, atol=1e-12)


@pytest.mark.parametrize("given_", SETTINGS, ids=str)
def test_duplicated_features_share_their_weight(given_):
    D, w = world(d=2, seed=5)
    doubled = fit_preferences(np.column_stack([D, D[:, 1]]), w, **given_)
    # |(a, b, b)| = |(a, sqrt(2) b)|: the fit on (D_0, sqrt(2) D_1) is the same problem without the duplicate.
    single = fit_preferences(D * [1, np.sqrt(2)], w, **given_)
    assert doubled.converged
    assert doubled.theta[1] == pytest.approx(doubled.theta[2], rel=1e-9)
    np.testing.assert_allclose(doubled.theta[:2], single.theta / [1, np.sqrt(2)], rtol=1e-8)


@pytest.mark.parametrize("link", LINKS, ids=lambda x: x.name)
@pytest.mark.parametrize("given_", SETTINGS, ids=str)
def test_invariances(link, given_):
    D, w = world(d=3, seed=6, link=link)
    theta = fit_preferences(D, w, link=link, **given_).theta
    Q = ortho_group.rvs(3, random_state=0)
    np.testing.assert_allclose(fit_preferences(D @ Q, w, link=link, **given_).theta, Q.T @ theta, atol=1e-8)
    c = 37.0
    scaled = {name: value * (1 / c if name == "radius" else c**2) for name, value in given_.items()}
    np.testing.assert_allclose(fit_preferences(c * D, w, link=link, **scaled).theta, theta / c, rtol=1e-8)
    flipped = np.arange(len(w)) % 2 == 0  # the pair in the other order, with the other label
    turned = fit_preferences(
        np.where(flipped[:, None], -D, D), np.where(flipped, 1 - w, w), link=link, **given_
    )
    np.testing.assert_allclose(turned.theta, theta, atol=1e-8)
    order = np.random.default_rng(0).permutation(len(w))
    np.testing.assert_allclose(
        fit_preferences(D[order], w[order], link=link, **given_).theta, theta, atol=1e-8
    )


def test_features_on_wild_scales():
    """Unconstrained, the margins do not depend on the units of the features: here 10^-6 to 10^6."""
    D, w = world(d=3, seed=7)
    units = np.array([1e-6, 1.0, 1e6])
    np.testing.assert_allclose(
        fit_preferences(D * units, w).theta * units, fit_preferences(D, w).theta, rtol=1e-7
    )


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_repeated_pairs_are_sufficient_statistics(seed):
    rng = np.random.default_rng(seed)
    D = rng.integers(-1, 2, size=(40, 2)).astype(float)
    w = rng.integers(0, 2, size=40).astype(float)
    rows, wins, counts = merge_repeated(D, w)
    assert len(rows) <= 4  # up to sign there are four non-zero pairs
    assert counts.sum() == D.any(axis=1).sum()
    theta = rng.normal(size=2)
    moves = D.any(axis=1)
    one_by_one = log_likelihood(theta, D[moves], w[moves], np.ones(moves.sum()), LOGISTIC)
    assert log_likelihood(theta, rows, wins, counts, LOGISTIC) == pytest.approx(one_by_one, rel=1e-12)
    assume(len(rows) > 0)
    merged, single = fit_preferences(rows, wins, counts=counts, radius=2.0), fit_preferences(D, w, radius=2.0)
    np.testing.assert_allclose(merged.theta, single.theta, atol=1e-7)
    np.testing.assert_allclose(merged.hessian, single.hessian, atol=1e-7)


def test_merging_nothing():
    rows, wins, counts = merge_repeated(np.zeros((3, 2)), [1, 0, 1])
    assert (rows.shape, wins.shape, counts.shape) == ((0, 2), (0,), (0,))


@pytest.mark.parametrize("link", LINKS, ids=lambda x: x.name)
def test_hessian_is_the_derivative_of_the_score(link):
    D, w = world(seed=8, link=link)
    n, h = np.ones(len(w)), 1e-6
    fit = fit_preferences(D, w, link=link, ridge=0.2)
    columns = [
        (score(fit.theta - h * e, D, w, n, link) - score(fit.theta + h * e, D, w, n, link)) / (2 * h)
        for e in np.eye(4)
    ]
    np.testing.assert_allclose(fit.hessian, np.array(columns) + 0.2 * np.eye(4), rtol=1e-5, atol=1e-6)


def test_starts_change_the_work_and_not_the_answer():
    D, w = world(q=300, seed=9)
    cold = fit_preferences(D, w)
    warm = fit_preferences(D, w, start=cold.theta + 1e-4)
    assert warm.iterations < cold.iterations
    for start in (cold.theta, 1e3 * np.ones(4), -50 * cold.theta):
        np.testing.assert_allclose(fit_preferences(D, w, start=start).theta, cold.theta, atol=1e-9)
    inside = fit_preferences(D, w, radius=0.4)
    outside = fit_preferences(D, w, radius=0.4, start=100 * cold.theta)
    np.testing.assert_allclose(outside.theta, inside.theta, atol=1e-9)
    # A start on the flat end of the likelihood, where every derivative underflows.
    flat = fit_preferences([[1.0]], [1], radius=1000.0, start=[900.0])
    assert flat.log_likelihood == pytest.approx(0, abs=1e-12)


def test_separable_data_reach_the_sphere():
    D, w = world(q=3, d=5, seed=10)
    for radius in (0.1, 1.0, 10.0):
        fit = fit_preferences(D, w, radius=radius)
        assert np.linalg.norm(fit.theta) == pytest.approx(radius, rel=1e-12)
        assert fit.multiplier > 0


def test_running_out_of_iterations_is_reported():
    D, w = world()
    stopped = fit_preferences(D, w, max_iterations=0)
    assert not stopped.converged
    np.testing.assert_array_equal(stopped.theta, 0)
    assert stopped.gradient_norm == pytest.approx(
        np.linalg.norm(score(np.zeros(4), D, w, np.ones(80), LOGISTIC))
    )
    once = fit_preferences(D, w, max_iterations=1)
    assert once.iterations == 1
    assert once.log_likelihood > stopped.log_likelihood


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wins": [1, 0, 2]}, r"wins\[2\] is 2; it must lie between 0 and the number of comparisons, 1"),
        ({"wins": [1, -1, 0]}, r"wins\[1\] is -1"),
        ({"wins": [1, np.nan, 0]}, r"wins\[1\] is nan"),
        ({"wins": [1, 0]}, r"wins has shape \(2,\); differences has 3 rows"),
        ({"counts": [1, 1]}, r"counts has shape \(2,\)"),
        ({"counts": [1, 1, np.inf]}, r"counts\[2\] is inf"),
        ({"counts": [1, -1, 1]}, r"counts\[1\] is -1"),
        ({"differences": [[1, 2], [np.nan, 1], [0, 1]]}, r"differences\[1\] is not finite"),
        ({"differences": [1, 2, 3]}, r"differences has shape \(3,\)"),
        ({"differences": np.zeros((3, 0))}, r"d >= 1"),
        ({"radius": 0.0}, "radius is 0.0"),
        ({"radius": np.inf}, "or None for no ball"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"start": [0.0]}, r"start must be a finite vector of shape \(2,\)"),
        ({"link": "cauchit"}, "link 'cauchit' is not one of logistic, probit"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_iterations": -1}, "max_iterations is -1"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"differences": [[1, 2], [0, 1], [2, 1]], "wins": [1, 0, 1], "radius": 1.0}
    assert fit_preferences(**good).converged
    with pytest.raises(ValueError, match=message):
        fit_preferences(**{**good, **change})
