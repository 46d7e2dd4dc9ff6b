"""Geometric mixtures of two language models, against tables, enumeration and closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.nash_md_pg import sequence_mixture as table_sequence_mixture
from preflab.algorithms.nash_md_pg import token_mixture as table_token_mixture
from preflab.llm_bridge.lattice import LatticePolicy, lattice
from preflab.llm_bridge.mixture import (
    TokenMixture,
    importance_weights,
    sample_sequence_mixture,
    sequence_mixture,
)
from preflab.llm_bridge.policy import TransformerPolicy, precompute
from preflab.llm_bridge.tiny import tiny_model
from scipy.stats import chi2

V, END, H = 3, 2, 3
PROMPTS = [[0], [1, 0, 1]]


def tiny(seed, **options):
    model = tiny_model(V, context=16, seed=seed, scale=0.8)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=V, context=16, **options)


PI, MU = tiny(0), tiny(1)


@pytest.fixture(scope="module")
def world():
    """All completions of two tokens and the end: the lattice is the whole law, nothing is cut off."""
    found = lattice(MU, PROMPTS, k=V - 1, horizon=H)
    return found, *(LatticePolicy(p, found) for p in (PI, MU))


def scores(policy, found):
    with torch.no_grad():
        return policy.log_probabilities(*found.completions())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_both_mixtures_are_those_of_the_tables(world, share):
    found, pi, mu = world
    mine = scores(TokenMixture(PI, MU, share), found)
    theirs = table_token_mixture(pi.tree, pi.logits().detach(), mu.logits().detach(), share)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    lp, ref = (x.log_probabilities().detach() for x in (pi, mu))
    whole = sequence_mixture(lp, ref, share, prompts=2)
    by_prompt = zip(lp.reshape(2, -1), ref.reshape(2, -1), strict=True)
    rows = [table_sequence_mixture(p, r, share) for p, r in by_prompt]
    torch.testing.assert_close(whole, torch.cat(rows), atol=1e-12, rtol=0)
    torch.testing.assert_close(mine.exp().reshape(2, -1).sum(1), torch.ones(2).double())
    gap = (mine.exp() - whole.exp()).abs().max()
    assert gap < 1e-12 if share in (0, 1) else gap > 1e-3  # they differ beyond one token


def test_for_one_token_they_are_one():
    found = lattice(MU, PROMPTS, k=V - 1, horizon=1)
    lp, ref = (scores(p, found) for p in (PI, MU))
    torch.testing.assert_close(
        scores(TokenMixture(PI, MU, 0.3), found),
        sequence_mixture(lp, ref, 0.3, prompts=2),
        atol=1e-12,
        rtol=0,
    )


def test_the_share_is_the_references():
    found = lattice(MU, PROMPTS, k=V - 1, horizon=H)
    torch.testing.assert_close(scores(TokenMixture(PI, MU, 1.0), found), scores(MU, found))
    right, swapped = (scores(TokenMixture(PI, MU, s), found).exp() for s in (0.2, 0.8))
    assert (right - swapped).abs().max() > 0.01
    narrow = replace(MU, top_k=1)  # what one of them rules out, the mixture rules out, but at its weight 0
    assert scores(TokenMixture(PI, narrow, 0.5), found).isneginf().any()
    torch.testing.assert_close(scores(TokenMixture(PI, narrow, 0.0), found), scores(PI, found))


def test_scores_carry_gradients_to_both():
    mixture = TokenMixture(tiny(3), tiny(4), 0.3)
    mixture.log_probabilities(PROMPTS, [[1, END], [0]]).sum().backward()
    for model in (mixture.policy.model, mixture.reference.model):
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("cached", [True, False])
def test_samples_with_one_cache_each_follow_the_law(cached):
    mixture = TokenMixture(replace(PI, micro_batch=3000), replace(MU, micro_batch=3000), 0.3)
    assert mixture.micro_batch == 3000
    found = lattice(MU, PROMPTS, k=V - 1, horizon=H)
    prompts = PROMPTS * 3000
    drawn = mixture.sample(prompts, H, torch.Generator().manual_seed(0), cached)
    torch.testing.assert_close(
        drawn.log_probabilities[:20],
        mixture.log_probabilities(prompts[:20], drawn.completions[:20]).detach(),
        atol=1e-10,
        rtol=0,
    )
    law = scores(mixture, found).exp().numpy().reshape(2, -1)
    swapped = scores(replace(mixture, share=0.7), found).exp().numpy().reshape(2, -1)
    leaves = found.completions()[1]
    for x in range(2):
        number = {tuple(y): i for i, y in enumerate(leaves[x * law.shape[1] :][: law.shape[1]])}
        counts = np.bincount([number[tuple(y)] for y in drawn.completions[x::2]], minlength=law.shape[1])
        assert not rejected(counts, law[x])
        assert rejected(counts, swapped[x])


def rejected(counts, law):
    """The chi-square test at one in a million; cells that expect fewer than 5 are pooled."""
    expected = counts.sum() * law
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    return ((counts - expected) ** 2 / expected).sum() > chi2.ppf(1 - 1e-6, len(counts) - 1)


# ---- importance weights -------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1))
def test_weights_of_all_responses_at_once_are_the_mixture(seed, n, share):
    """Proposals that are each response once, from the uniform law: the weights are m, and their mean is Z exactly."""
    rng = np.random.default_rng(seed)
    pi, mu = torch.tensor(rng.normal(size=(2, 3, n))).log_softmax(-1)
    found = importance_weights(pi, mu, torch.full((3, n), -np.log(n), dtype=torch.float64), share)
    expected = sequence_mixture(pi.reshape(-1), mu.reshape(-1), share, prompts=3).exp().reshape(3, n)
    torch.testing.assert_close(found.weights, expected, atol=1e-12, rtol=0)
    log_z = ((1 - share) * pi + share * mu).logsumexp(-1)
    torch.testing.assert_close(found.log_normaliser, log_z, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.effective, 1 / expected.square().sum(1))


def test_a_proposal_that_is_the_mixture_needs_no_weights():
    law = torch.tensor([0.2, 0.8]).double().log()[torch.tensor([[0, 1, 1, 1]])]
    found = importance_weights(law, law, law, 0.4)
    torch.testing.assert_close(found.weights, torch.full((1, 4), 0.25).double())
    assert found.effective.item() == pytest.approx(4)
    assert found.log_normaliser.item() == pytest.approx(0, abs=1e-12)


def test_the_mean_of_the_weights_estimates_z():
    share, n = 0.4, 4000
    found = lattice(MU, PROMPTS, k=V - 1, horizon=H)
    lp, ref = (scores(p, found).reshape(2, -1) for p in (PI, MU))
    z = ((1 - share) * lp + share * ref).logsumexp(1).exp()
    prompts = [x for x in PROMPTS for _ in range(n)]
    proposal = TokenMixture(replace(PI, micro_batch=n), replace(MU, micro_batch=n), share)
    drawn = proposal.sample(prompts, H, torch.Generator().manual_seed(1))
    pi, mu = (
        precompute(p, prompts, drawn.completions).log_probabilities(prompts, drawn.completions)
        for p in (PI, MU)
    )
    q = drawn.log_probabilities
    estimate = importance_weights(*(x.reshape(2, n) for x in (pi, mu, q)), share)
    w = ((1 - share) * pi + share * mu - q).exp().reshape(2, n)
    error = (estimate.log_normaliser.exp() - z).abs()
    assert (error < 5 * w.std(1) / n**0.5).all()
    assert (error < (z - 1).abs() / 3).all()  # so that Z = 1 is ruled out


def test_resampled_completions_follow_the_sequence_mixture_and_not_the_token_mixture():
    pi, mu = (replace(tiny(s), micro_batch=12000) for s in (4, 14))
    share, n = 0.5, 600
    found = lattice(mu, PROMPTS[:1], k=V - 1, horizon=H)
    lp, ref = (scores(p, found) for p in (pi, mu))
    law = sequence_mixture(lp, ref, share).exp().numpy()
    by_token = scores(TokenMixture(pi, mu, share), found).exp().numpy()
    kept, weights = sample_sequence_mixture(
        pi, mu, share, PROMPTS[:1] * n, H, torch.Generator().manual_seed(2), proposals=20
    )
    number = {tuple(y): i for i, y in enumerate(found.completions()[1])}
    counts = np.bincount([number[tuple(y)] for y in kept], minlength=len(law))
    assert weights.weights.shape == (n, 20)
    assert ((weights.effective > 1) & (weights.effective <= 20)).all()
    assert not rejected(counts, law)
    assert rejected(counts, by_token)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"share is 1\.2"):
        TokenMixture(PI, MU, 1.2)
    other = TransformerPolicy(MU.model, end_ids=[1], pad_id=1, vocabulary=V, context=16)
    with pytest.raises(ValueError, match=r"end_ids of the policy is \(2,\) and of the reference \(1,\)"):
        TokenMixture(PI, other, 0.5)
    with pytest.raises(ValueError, match="vocabulary of the policy is 3 and of the reference None"):
        TokenMixture(PI, replace(MU, vocabulary=None), 0.5)
    x = torch.zeros(2, 3).double()
    with pytest.raises(ValueError, match="must be equal"):
        importance_weights(x, x, x[:1], 0.5)
    with pytest.raises(ValueError, match="probability 0 under its proposal"):
        importance_weights(x, x, x - torch.inf, 0.5)
    with pytest.raises(ValueError, match="no draw of some prompt is possible"):
        importance_weights(x - torch.inf, x, x, 0.5)
    with pytest.raises(ValueError, match="proposals is 0"):
        sample_sequence_mixture(PI, MU, 0.5, PROMPTS, 2, torch.Generator(), proposals=0)
