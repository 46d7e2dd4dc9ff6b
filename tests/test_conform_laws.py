"""Level 2 of conformance: the tests of counts are honest, and every planted bug of sampling is named."""

from __future__ import annotations

import importlib.util
from types import MappingProxyType

import numpy as np
import pytest
from preflab.llm_bridge.conformance import conform_trainer, model_world
from preflab.llm_bridge.conformance.laws import (
    agreement,
    chi_square,
    holm,
    law_p_value,
    noise_floor,
    total_variation,
    tv_p_value,
)
from preflab.llm_bridge.conformance.models import Sampling, mix
from preflab.llm_bridge.conformance.ours_whole import WHOLE, PolicyTrainer
from preflab.llm_bridge.conformance.planted_whole import PLANTED_WHOLE
from scipy.stats import binom

SAMPLING = [name for name, bug in PLANTED_WHOLE.items() if bug.level == 2]
DEFAULT = {  # the others with the slow tests
    "draws_colder",
    "draws_mixture_swapped",
    "draws_reference_with_the_adapter_on",
    "draws_without_mask",
    "draws_from_a_stale_cache",
    "draws_and_strips_the_end",
    "draws_the_second_half_like_the_first",
    "draws_from_a_fixed_seed",
}


# ---- the world -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "table"])
def test_the_second_route_is_a_law_and_its_completions_are_all(kind):
    world = model_world(kind)
    for role in ("policy", "reference"):
        np.testing.assert_allclose(np.exp(world.law(role)).sum(1), 1, atol=1e-12)
    assert len(set(world.completions)) == len(world.completions)
    law = world.law("policy", Sampling(0.7, 3, 0.9))
    np.testing.assert_allclose(np.exp(law).sum(1), 1, atol=1e-12)


def test_a_mixture_is_normalised_and_lies_between():
    world = model_world("tiny")
    pi, ref = world.laws("policy"), world.laws("reference")
    np.testing.assert_allclose(np.exp(mix(pi, ref, 0.3)).sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(mix(pi, ref, 0.0), pi, atol=1e-12)
    np.testing.assert_allclose(mix(pi, ref, 1.0), ref, atol=1e-12)
    np.testing.assert_allclose(np.exp(mix(pi, ref, 0.3, "arithmetic")), 0.7 * np.exp(pi) + 0.3 * np.exp(ref))


# ---- the tests of counts ---------------------------------------------------------------------------------------------


def laws_and_draws(n, trials, seed):
    p = np.exp(model_world("tiny").law("policy")[0])
    return p, np.random.default_rng(seed).multinomial(n, p, size=trials)


@pytest.mark.parametrize("n", [200, 2000])
def test_honest_draws_are_rejected_no_oftener_than_said(n):
    trials = 1000
    p, counts = laws_and_draws(n, trials, n)
    values = {f: np.array([f(c, p) for c in counts]) for f in (chi_square, tv_p_value)}
    values[law_p_value] = np.minimum(1, 2 * np.minimum(values[chi_square], values[tv_p_value]))
    assert values[law_p_value][0] == law_p_value(counts[0], p)
    for level in (0.2, 0.05, 0.01):
        for f, found in values.items():
            # More rejections than these have probability 1e-4 where the level is right.
            assert (found <= level).sum() <= binom.isf(1e-4, trials, level), f.__name__
    if n == 2000:  # and chi-square's are uniform, not just large
        for level in (0.1, 0.5, 0.9):
            assert abs((values[chi_square] <= level).mean() - level) < 4 * np.sqrt(level / trials) + 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_the_noise_floor_covers(alpha):
    p, counts = laws_and_draws(500, 2000, 4)
    above = sum(total_variation(c, p) > noise_floor(500, p, alpha) for c in counts)
    assert above <= binom.isf(1e-4, 2000, alpha)
    assert above < 2000 * alpha  # it is a bound, and not tight
    assert noise_floor(2000, p, alpha) < noise_floor(500, p, alpha)


def test_a_law_beyond_twice_the_floor_is_always_found():
    """The detection limit: where the true law is two floors away, the test of total variation cannot miss often."""
    p, _ = laws_and_draws(1, 1, 0)
    n, alpha = 2000, 0.001
    limit = 2 * noise_floor(n, p, alpha)
    order = np.argsort(p)
    other = p.copy()  # moved from the likeliest to the others by exactly the limit
    other[order[-1]] -= limit
    other[order[:-1]] += limit / (len(p) - 1)
    assert other.min() > 0
    counts = np.random.default_rng(5).multinomial(n, other, size=100)
    assert sum(law_p_value(c, p) > alpha for c in counts) == 0
    near = p + (other - p) * 0.02  # the control: a fault far below the limit is not found
    counts = np.random.default_rng(6).multinomial(n, near, size=100)
    assert sum(law_p_value(c, p) > alpha for c in counts) > 95


def test_something_impossible_is_rejected_for_certain():
    assert chi_square(np.array([10, 1]), np.array([1.0, 0.0])) == 0
    assert law_p_value(np.array([100, 0]), np.array([1.0, 0.0])) == 1


def test_holm_rejects_what_bonferroni_does_and_more():
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]
    assert holm([0.01, 0.02, 0.03], 0.06) == [True, True, True]
    assert holm([], 0.05) == []


def test_agreement_is_calibrated_and_sees_copies():
    rng = np.random.default_rng(7)
    honest = [agreement(rng.integers(6, size=100), rng.integers(6, size=100)) for _ in range(500)]
    assert sum(p <= 0.05 for p in honest) <= binom.isf(1e-4, 500, 0.05)
    first = rng.integers(6, size=100)
    assert agreement(first, first) < 1e-12


# ---- trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_our_policies_pass_on_tables(name):
    report = conform_trainer(WHOLE[name], world="table", draws=600)
    assert report.ok, str(report)
    assert {c.level for c in report.checks} <= {2, 3}


def test_our_policies_pass_on_a_transformer():
    report = conform_trainer(PolicyTrainer, draws=400, seed=1)
    assert report.ok, str(report)
    # Three roles, three options of scores and two of draws; a precomputed reference; rewards.
    assert [c.level for c in report.checks] == [3] * 8 + [2] * 6
    assert report.verdict == "conforms"


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("seed", range(3))
def test_our_policies_pass_whatever_the_seed(name, seed):
    report = conform_trainer(WHOLE[name], seed=seed)
    assert report.ok, str(report)


@pytest.mark.slow
def test_false_alarms_are_no_more_than_said():
    """Fifty honest reports at a family-wise alpha of 0.1: more than 14 failures have probability 2e-4."""
    world = model_world("table")
    failed = sum(
        not conform_trainer(PolicyTrainer, levels=(2,), world=world, draws=400, alpha=0.1, seed=seed).ok
        for seed in range(50)
    )
    assert failed <= binom.isf(2e-4, 50, 0.1)


@pytest.mark.llm
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", WHOLE)
def test_our_policies_pass_on_models_of_transformers(kind, name):
    report = conform_trainer(WHOLE[name], world=kind, draws=1000)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DEFAULT)) for n in SAMPLING]
)
def test_a_planted_bug_of_sampling_is_named(name):
    bug = PLANTED_WHOLE[name]
    report = conform_trainer(bug.make, name=name, levels=(2,), draws=1200)
    assert not report.ok
    assert report.cause_name == bug.cause, str(report)
    assert report.cause in str(report)
    assert {c.level for c in report.checks if c.status == "fail"} == {2}


def test_a_law_that_the_catalogue_does_not_have_gets_no_name():
    class Twice(PolicyTrainer):
        """The policy at a temperature, truncated and mixed: several faults at once."""

        roles = ("policy",)
        options = MappingProxyType({})
        log_probabilities = None
        rewards = None

        def sample(self, prompts, horizon, seed, role):
            rows = super().sample(prompts, horizon, seed, "mixture", True)
            return [[(t + 1) % 3 if t < 3 else t for t in y] for y in rows]

    report = conform_trainer(Twice, draws=800)
    assert not report.ok
    assert report.cause_name is None
    assert "none of the catalogue's" in report.cause
    assert report.nearest


def test_a_temperature_just_beyond_the_limit_is_found_and_one_far_below_is_not():
    from dataclasses import replace

    def at(temperature):
        class Warm(PolicyTrainer):
            roles = ("policy",)
            options = MappingProxyType({})
            log_probabilities = None
            rewards = None

            def sample(self, prompts, horizon, seed, role):
                self.policy = replace(self.policy, temperature=temperature)
                return super().sample(prompts, horizon, seed, role, True)

        return Warm

    report = conform_trainer(at(0.85), draws=2000)
    assert report.cause_name == "temperature", str(report)
    said = float(report.cause.split("temperature is ")[1].split(",")[0])
    assert said == pytest.approx(0.85, abs=0.04)
    assert conform_trainer(at(0.999), draws=400).ok
