"""Kernels: three representations of one law, adjointness, the law of `sample`, and bad input with its place named."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import CSRKernel, DenseKernel, TreeKernel
from scipy import stats

seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def random_layers(sizes, n_actions, rng):
    """Rows with exact zeros in them, so that sparse differs from dense in what it stores."""
    layers = []
    for n, m in itertools.pairwise(sizes):
        p = rng.dirichlet(np.ones(m), size=(n, n_actions)) * (rng.random((n, n_actions, m)) < 0.6)
        p[..., 0] += p.sum(-1) == 0
        layers.append(p / p.sum(-1, keepdims=True))
    return layers


def to_csr(layers):
    return [sp.csr_array(p.reshape(-1, p.shape[2])) for p in layers]


@st.composite
def kernel_pairs(draw):
    """(kernel under test, the plain arrays of the same law)."""
    kind = draw(st.sampled_from(["dense", "stationary", "sparse", "tree"]))
    if kind == "tree":
        k = TreeKernel(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
        return k, brute_tree(k)
    rng = np.random.default_rng(draw(seeds))
    n_actions = draw(st.integers(1, 3))
    if kind == "stationary":
        n, h = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        layers = random_layers([n, n], n_actions, rng) * h
        return DenseKernel(np.broadcast_to(layers[0], (h, *layers[0].shape))), layers
    layers = random_layers(draw(sizes), n_actions, rng)
    return (DenseKernel(layers) if kind == "dense" else CSRKernel(to_csr(layers), n_actions)), layers


def brute_tree(k):
    """The prefix tree written out from its definition, prefix by prefix."""
    alive = [[(r,) for r in range(k.roots)]]
    for _ in range(1, k.horizon):
        alive.append([p + (a,) for p in alive[-1] for a in range(k.branching)])
    layers = []
    for h in range(k.horizon):
        last = h + 1 == k.horizon
        p = np.zeros((1 + len(alive[h]), k.branching + 1, 1 if last else 1 + len(alive[h + 1])))
        p[0, :, 0] = 1.0
        for i, prefix in enumerate(alive[h]):
            for a in range(k.branching + 1):
                ends = last or a == k.branching
                p[1 + i, a, 0 if ends else 1 + alive[h + 1].index(prefix + (a,))] = 1.0
        layers.append(p)
    return layers


@given(kernel_pairs(), seeds)
def test_operations_are_those_of_the_plain_arrays(pair, seed):
    kernel, layers = pair
    rng = np.random.default_rng(seed)
    assert kernel.sizes == (*(p.shape[0] for p in layers), layers[-1].shape[2])
    assert kernel.n_actions == layers[0].shape[1]
    for h, p in enumerate(layers):
        v, mu, batch = (
            rng.normal(size=p.shape[2]),
            rng.normal(size=p.shape[:2]),
            rng.normal(size=(2, 3, p.shape[2])),
        )
        np.testing.assert_allclose(kernel.dense(h), p, atol=1e-15)
        np.testing.assert_allclose(kernel.expect(h, v), np.einsum("sat,t->sa", p, v), atol=1e-12)
        np.testing.assert_allclose(kernel.expect(h, batch), np.einsum("sat,ijt->ijsa", p, batch), atol=1e-12)
        np.testing.assert_allclose(kernel.push(h, mu), np.einsum("sat,sa->t", p, mu), atol=1e-12)


@given(kernel_pairs(), seeds)
def test_push_is_the_adjoint_of_expect_and_keeps_mass(pair, seed):
    kernel, layers = pair
    rng = np.random.default_rng(seed)
    for h, p in enumerate(layers):
        v, mu = rng.normal(size=p.shape[2]), rng.random(p.shape[:2])
        assert np.vdot(mu, kernel.expect(h, v)) == pytest.approx(np.vdot(kernel.push(h, mu), v), abs=1e-10)
        assert kernel.push(h, mu).sum() == pytest.approx(mu.sum(), rel=1e-12)
        np.testing.assert_allclose(kernel.expect(h, np.ones(p.shape[2])), 1.0, atol=1e-12)


@given(kernel_pairs())
def test_sample_inverts_the_cdf(pair):
    """On an even grid of u each successor is hit in proportion to its mass, to one grid cell; zero mass never."""
    kernel, layers = pair
    u = (np.arange(500) + 0.5) / 500
    for h, p in enumerate(layers):
        for s in range(p.shape[0]):
            for a in range(p.shape[1]):
                hits = kernel.sample(h, np.full(500, s), np.full(500, a), u)
                share = np.bincount(hits, minlength=p.shape[2]) / 500
                np.testing.assert_allclose(share, p[s, a], atol=1 / 500 + 1e-9)
                assert not share[p[s, a] == 0].any()


@given(sizes, seeds)
def test_dense_and_sparse_draw_the_same_states(sizes, seed):
    rng = np.random.default_rng(seed)
    layers = random_layers(sizes, 2, rng)
    dense, sparse = DenseKernel(layers), CSRKernel(to_csr(layers), 2)
    for h, p in enumerate(layers):
        s, a, u = rng.integers(len(p), size=50), rng.integers(2, size=50), rng.random(50)
        np.testing.assert_array_equal(dense.sample(h, s, a, u), sparse.sample(h, s, a, u))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_sample_at_the_ends_of_the_unit_interval_stays_on_the_support(u):
    p = np.array([0.0, 0.7, 0.2, 0.1, 0.0])[None, None]  # 0.7 + 0.2 + 0.1 rounds to just below 1
    want = 1 if u == 0 else 3
    for kernel in (DenseKernel([p]), CSRKernel(to_csr([p]), 1)):
        assert kernel.sample(0, np.array([0]), np.array([0]), np.array([u])) == want


def test_law_of_sample_by_chi_square():
    rng = np.random.default_rng(7)
    (p,) = random_layers([1, 6], 1, rng)
    hits = CSRKernel(to_csr([p]), 1).sample(
        0, np.zeros(20_000, int), np.zeros(20_000, int), rng.random(20_000)
    )
    on = p[0, 0] > 0
    assert stats.chisquare(np.bincount(hits, minlength=6)[on], 20_000 * p[0, 0][on]).pvalue > 1e-4


def test_layers_that_share_memory_but_not_meaning_are_told_apart():
    circulant = np.array([[0.1, 0.2, 0.7], [0.7, 0.1, 0.2], [0.2, 0.7, 0.1]])  # rows and columns sum to 1
    p = np.stack([circulant] * 3)
    turned = p.transpose(0, 2, 1)  # same address, same shape, other strides, and a kernel too
    kernel = DenseKernel([p, turned])
    u = np.linspace(0, 0.999, 101)
    for h in range(2):
        got = kernel.sample(h, np.zeros(101, int), np.zeros(101, int), u)
        np.testing.assert_array_equal(got, np.searchsorted(np.cumsum([p, turned][h][0, 0]), u, side="right"))
    bad = np.array([[[0.5, 0.5], [0.4, 0.6]], [[1.0, 0.0], [1.0, 0.0]]])
    with pytest.raises(ValueError, match=r"P\[h=1, s=0, a=0\] sums to 0.9"):
        DenseKernel([bad, bad.transpose(0, 2, 1)])


def test_matrices_from_a_generator_are_kept_apart_and_the_callers_are_left_alone():
    layers = random_layers([3, 3, 3, 3, 3, 3], 2, np.random.default_rng(1))
    kernel = CSRKernel((m for m in to_csr(layers)), 2)
    for h, p in enumerate(layers):
        np.testing.assert_allclose(kernel.dense(h), p)
    twice = sp.csr_array((np.array([0.5, 0.5, 0.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    kernel = CSRKernel([twice], 1)
    assert (twice.nnz, kernel.matrices[0].nnz) == (3, 1)


def test_one_matrix_for_all_layers_is_stored_once():
    (p,) = random_layers([3, 3], 2, np.random.default_rng(2))
    kernel = CSRKernel(to_csr([p]) * 50, 2)
    assert len({id(m) for m in kernel.matrices}) == 1
    dense = DenseKernel(np.broadcast_to(p, (50, *p.shape)))
    assert dense.P.strides[0] == 0
    assert len({id(c) for c in dense._cdf}) == 1


def layers_with(value, place=(2, 3, 1)):
    h, s, a = place
    P = np.full((4, 5, 2, 5), 0.2)
    P[h, s, a, 0] = value
    return P


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.17, "sums to 0.97"),
        (np.nan, "contains NaN"),
        (-0.2, "negative probability"),
        (np.inf, "sums to inf"),
    ],
)
def test_a_bad_row_is_named(value, words):
    P = layers_with(value)
    if value == -0.2:
        P[2, 3, 1, 1] += 0.4  # the row sums to 1 all the same
    for build in (lambda: DenseKernel(P), lambda: DenseKernel(list(P)), lambda: CSRKernel(to_csr(P), 2)):
        with pytest.raises(ValueError, match=rf"P\[h=2, s=3, a=1\].*{words}.*1 row"):
            build()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([], "horizon is 0"),
        (np.empty((0, 2, 2, 2)), "horizon is 0"),
        ([np.ones((2, 0, 2))], "empty action set"),
        ([np.ones((0, 2, 2))], "no states"),
        ([np.ones((2, 2))], r"shape \(2, 2\)"),
        ([np.ones((1, 2, 1)), np.ones((1, 3, 1))], "3 actions but"),
        ([np.ones((1, 2, 1)), np.full((2, 2, 2), 0.5)], "starts from 2 states"),
    ],
)
def test_layers_that_make_no_model(layers, words):
    with pytest.raises(ValueError, match=words):
        DenseKernel(layers)


@pytest.mark.parametrize(
    ("matrices", "n_actions", "words"),
    [
        ([], 2, "horizon is 0"),
        ([sp.csr_array(np.eye(2))], 0, "empty action set"),
        ([sp.csr_array(np.eye(3))], 2, "not a multiple of 2"),
        ([sp.csr_array((2, 3))], 1, "sums to 0"),
        ([sp.csr_array((0, 3))], 1, "no states"),
    ],
)
def test_matrices_that_make_no_model(matrices, n_actions, words):
    with pytest.raises(ValueError, match=words):
        CSRKernel(matrices, n_actions)


@pytest.mark.parametrize("field", ["roots", "branching", "horizon"])
def test_a_tree_needs_one_of_everything(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        TreeKernel(**({"roots": 1, "branching": 2, "horizon": 2} | {field: 0}))


def test_a_tree_stores_nothing():
    kernel = TreeKernel(8, 10, 7)
    assert kernel.sizes[-2] == 8_000_001
    assert sum(v.nbytes for v in vars(kernel).values() if hasattr(v, "nbytes")) == 0
