"""KL estimators against numbers worked by hand, finite differences of exact divergences, and samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import kl_estimators as kle
from preflab.algorithms.optimisation import PrefixTree, SoftmaxTable
from preflab.envs import random_token_mdp

seeds = st.integers(0, 10**6)


def tree(seed, k=2, horizon=2, prompts=1):
    model = random_token_mdp(k, horizon, prompts=prompts, seed=seed, concentration=2.0)
    table = PrefixTree(model.kernel)
    theta = np.random.default_rng(seed).normal(size=table.size)
    return table, theta, model.leaf_log_probabilities()


def test_the_estimators_by_hand():
    x = torch.tensor([-1.0, 0.0, math.log(2)], dtype=torch.float64)
    assert kle.estimate(x, "k1").tolist() == x.tolist()
    np.testing.assert_allclose(kle.estimate(x, "k2"), [0.5, 0, math.log(2) ** 2 / 2], atol=1e-16)
    np.testing.assert_allclose(kle.estimate(x, "k3"), [math.e - 2, 0, math.log(2) - 0.5], atol=1e-15)


@given(st.floats(-20, 20))
def test_k2_and_k3_are_never_negative(x):
    for k in ("k2", "k3"):
        assert kle.estimate(torch.tensor(x, dtype=torch.float64), k) >= 0


def test_two_responses_by_hand():
    # pi = (s, 1 - s), ref = (1/2, 1/2); the derivative of KL(pi, ref) in theta_0 is s (1 - s) log(s / (1 - s))
    table, x = SoftmaxTable(2), 0.8
    s = 1 / (1 + math.exp(-x))
    found = kle.gradient_table(table, np.array([x, 0.0]), np.log([0.5, 0.5]))
    reverse, forward = s * (1 - s) * x, s - 0.5
    assert found["k2, response, loss"][0] == pytest.approx(reverse, abs=1e-15)
    assert found["k1, token, reward"][0] == pytest.approx(reverse, abs=1e-15)
    assert found["k3, response, loss"][0] == pytest.approx(forward, abs=1e-15)
    assert found["k1, response, loss"][0] == pytest.approx(0, abs=1e-15)


@given(seeds)
def test_the_targets_by_finite_differences(seed):
    table, theta, log_reference = tree(seed)

    def laws(x):
        log_pi = table.log_probabilities(torch.as_tensor(x)).numpy()
        return np.exp(log_pi), log_pi

    def reverse(x):
        law, log_pi = laws(x)
        return law @ (log_pi - log_reference)

    def forward(x):
        return np.exp(log_reference) @ (log_reference - laws(x)[1])

    found = kle.targets(table, theta, log_reference)
    for name, f in (("reverse", reverse), ("forward", forward)):
        slopes = [(f(theta + 1e-5 * e) - f(theta - 1e-5 * e)) / 2e-5 for e in np.eye(len(theta))]
        np.testing.assert_allclose(found[name], slopes, atol=1e-8)


@given(seeds)
def test_frozen_targets_are_sums_over_prefixes(seed):
    """By hand: d(prefix) times the derivative of the divergence of its own token law, at each prefix's logits."""
    table, theta, log_reference = tree(seed)
    found = kle.targets(table, theta, log_reference)
    policy, ref = (
        [c.exp().numpy() for c in table.conditionals(t)]
        for t in (torch.as_tensor(theta), table.start(log_reference))
    )
    mass = np.ones(1)
    by_hand = {name: [] for name in ("frozen reverse", "frozen forward", "frozen entropy")}
    for p, q in zip(policy, ref, strict=True):
        log_ratio = np.log(p / q)
        reverse = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True))
        entropy = -p * (np.log(p) - (p * np.log(p)).sum(1, keepdims=True))
        for name, g in zip(by_hand, (reverse, p - q, entropy), strict=True):
            by_hand[name].append((mass[:, None] * g).ravel())
        mass = (mass[:, None] * p[:, :-1]).ravel()
    for name, rows in by_hand.items():
        np.testing.assert_allclose(found[name], np.concatenate(rows), atol=1e-14)


@given(seeds)
def test_the_forms_have_the_gradients_that_the_table_says(seed):
    table, theta, log_reference = tree(seed, prompts=2)
    found, wanted = (f(table, theta, log_reference) for f in (kle.gradient_table, kle.targets))
    assert set(found) == {f.name for f in kle.FORMS} | {"joint form"}
    for form in kle.FORMS:
        if form.gradient is not None:
            expected = sum((c * wanted[t] for t, c in form.gradient.items()), np.zeros(table.size))
            np.testing.assert_allclose(found[form.name], expected, atol=1e-12)
    np.testing.assert_allclose(
        found["joint form"], wanted["frozen reverse"] - wanted["frozen entropy"], atol=1e-12
    )


def test_forms_without_a_target_are_none_of_them():
    table, theta, log_reference = tree(3, 3, 3)
    found, wanted = (f(table, theta, log_reference) for f in (kle.gradient_table, kle.targets))
    angles = kle.compare(found, wanted)
    for form in kle.FORMS:
        if form.gradient is None:
            assert max(abs(cosine) for cosine, _ in angles[form.name].values()) < 0.999
    cosine, scale = angles["k1, token, loss"]["reverse"]
    assert math.isnan(cosine)
    assert scale == 0
    assert angles["k2, response, loss"]["reverse"] == pytest.approx((1, 1), abs=1e-12)


def test_samples_give_the_listed_gradient_on_average():
    table, theta, log_reference = tree(1, 2, 3)
    exact = kle.gradient_table(table, theta, log_reference)
    law = table.log_probabilities(torch.as_tensor(theta)).exp().numpy()
    rng = np.random.default_rng(0)
    drawn = torch.tensor(rng.choice(len(law), size=(300, 40), p=law / law.sum()))
    reference = table.token_log_probabilities(table.start(log_reference))
    for form in (kle.FORMS[2], kle.FORMS[10], kle.FORMS[12], kle.FORMS[23]):
        gradients = []
        for batch in drawn:
            live = torch.tensor(theta, requires_grad=True)
            loss = kle.kl_loss(
                table.token_log_probabilities(live)[batch],
                reference[batch],
                estimator=form.estimator,
                level=form.level,
                use=form.use,
            )
            gradients.append(torch.autograd.grad(loss, live)[0].numpy())
        error = np.mean(gradients, axis=0) - exact[form.name]
        assert (np.abs(error) <= 5 * np.std(gradients, axis=0) / math.sqrt(300) + 1e-12).all(), form.name


@given(seeds)
def test_values_and_the_bias_of_k2(seed):
    table, theta, log_reference = tree(seed)
    law = table.log_probabilities(torch.as_tensor(theta)).exp().numpy()
    ratio = np.log(law) - log_reference
    found = kle.expected_values(table, theta, log_reference)
    for name in ("k1, response", "k1, token", "k3, response", "k3, token"):
        assert found[name] == pytest.approx(law @ ratio, abs=1e-12)
    assert found["k2, response"] == pytest.approx(law @ ratio**2 / 2, abs=1e-12)


def test_padding_adds_nothing_and_the_reference_is_a_constant():
    policy = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    for use in kle.USES:
        for k in kle.ESTIMATORS:
            live = policy.clone().requires_grad_(True)
            short = kle.kl_loss(live, reference, estimator=k, level="token", use=use)
            padded = kle.kl_loss(
                torch.cat([live, zero], 1),
                torch.cat([reference, zero], 1),
                estimator=k,
                level="token",
                use=use,
            )
            slopes = [torch.autograd.grad(x, live)[0] for x in (short, padded)]
            torch.testing.assert_close(*slopes, atol=1e-15, rtol=0)
    assert reference.grad is None
    live = policy.clone().requires_grad_(True)
    own = kle.kl_loss(live, reference, estimator="k1", level="token", use="own_reward")
    torch.testing.assert_close(
        torch.autograd.grad(own, live),
        torch.autograd.grad(kle.joint_form(live, reference, detached=True), live),
    )


def test_bad_names_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="estimator is 'k4'; it is one of k1, k2, k3"):
        kle.kl_loss(x, x, estimator="k4")
    with pytest.raises(ValueError, match="level is 'word'; it is one of response, token"):
        kle.kl_loss(x, x, estimator="k1", level="word")
    with pytest.raises(ValueError, match="use is 'value'"):
        kle.kl_loss(x, x, estimator="k1", use="value")
    with pytest.raises(
        ValueError, match="'own_reward' adds up the tokens' estimates; it needs level 'token'"
    ):
        kle.kl_loss(x, x, estimator="k1", use="own_reward")
    with pytest.raises(ValueError, match=r"theta has shape \(3,\); the table has 2 parameters"):
        kle.targets(SoftmaxTable(2), np.zeros(3), np.log([0.5, 0.5]))


def test_the_spec_reads_the_signature():
    assert kle.LOSS.inputs == ("policy", "reference", "weight")
    assert kle.LOSS.parameters == ("estimator", "level", "use")
