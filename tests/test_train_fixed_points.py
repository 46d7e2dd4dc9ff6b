"""Where training ends: closed forms and certified solutions, for enumerated and for sampled rounds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preflab.algorithms.dpo import dpo_solution
from preflab.algorithms.inpo import INPO
from preflab.algorithms.ipo import ipo
from preflab.algorithms.nash_md_pg import NashMDPG, token_mixture
from preflab.algorithms.optimisation import PrefixTree
from preflab.algorithms.planning.games import kl, regularised_nash
from preflab.envs import PreferenceGame
from preflab.envs.kernels import TreeKernel
from preflab.llm_bridge.table import table_policy
from preflab.llm_bridge.training.collect import score
from preflab.llm_bridge.training.loop import train
from preflab.llm_bridge.training.methods import METHODS
from preflab.llm_bridge.training.rows import Rows
from preflab.llm_bridge.training.settings import TrainSettings
from preflab.llm_bridge.training.setup import make_setup, weights_as
from preflab.llm_bridge.training.step import gradient

K, H = 2, 2
TREE = PrefixTree(TreeKernel(1, K, H))
L, END = TREE.responses, K
PROMPT = [K + 1]
RESPONSES = [[*w, END] for h in range(H) for w in itertools.product(range(K), repeat=h)]
RESPONSES += [list(w) for w in itertools.product(range(K), repeat=H)]
RNG = np.random.default_rng(7)
REWARDS = RNG.normal(size=L)
_upper = np.triu(RNG.uniform(0.05, 0.95, size=(L, L)), 1)
P = _upper + np.tril(1 - _upper.T, -1) + 0.5 * np.eye(L)  # no reward explains it
REFERENCE = TREE.start(np.log(RNG.dirichlet(np.full(L, 5.0))))
LOG_REFERENCE = TREE.log_probabilities(REFERENCE).numpy()
GAME = PreferenceGame(P, reference=np.exp(LOG_REFERENCE))


class Judge:
    name = "table"

    def __init__(self, P=P):
        self.P, self.number = P, {tuple(y): i for i, y in enumerate(RESPONSES)}

    def rewards(self, prompts, completions):
        return np.array([REWARDS[self.number[tuple(y)]] for y in completions])

    def preferences(self, prompts, first, second):
        pairs = zip(first, second, strict=True)
        return np.array([self.P[self.number[tuple(a)], self.number[tuple(b)]] for a, b in pairs])


def policy():
    return table_policy(TREE, REFERENCE, trainable=True, micro_batch=512)


def log_law(p):
    return TREE.log_probabilities(p.model.theta).detach().numpy()


# ---- rounds that hold the whole population ---------------------------------------------------------------------------


def setup_of(name, rate, **parameters):
    method = METHODS[name]
    return make_setup(
        policy(),
        method,
        method.checked(parameters),
        TrainSettings(optimiser="sgd", learning_rate=rate, device="cpu"),
        reference=None,
        prompts=[PROMPT],
        judge=Judge(),
        folder=None,
    )


def population(setup, laws, previous=None):
    """All rows of a round whose responses are drawn from these laws, and their probabilities."""
    y = np.array(list(itertools.product(range(L), repeat=len(laws))))
    weight = np.prod([law[y[:, k]] for k, law in enumerate(laws)], axis=0)
    scored = y[:, : setup.method.scored]
    numbers = {"reference": LOG_REFERENCE[scored], "advantage": REWARDS[y[:, 0]]}
    if len(laws) > 1:
        numbers["wins"] = P[y[:, 0], y[:, 1]]
    if previous is not None:
        numbers["previous"] = previous[scored]
    columns = [[RESPONSES[i] for i in y[:, k]] for k in range(len(laws))]
    return Rows([PROMPT] * len(y), columns, numbers), weight


def settle(setup, rows_of, steps, tolerance):
    """Steps of the loop's own gradient and optimiser on enumerated rows until it vanishes."""
    for _ in range(steps):
        norm = gradient(setup, *rows_of()).norm
        if norm < tolerance:
            break
        setup.optimiser.step()
    assert norm < tolerance
    return log_law(setup.policy)


def test_the_policy_gradient_ends_at_gibbs():
    setup = setup_of("kl_policy_gradient", 2.0, beta=0.8)
    found = settle(setup, lambda: population(setup, [np.exp(log_law(setup.policy))]), 2000, 1e-9)
    np.testing.assert_allclose(found, dpo_solution(REWARDS, LOG_REFERENCE, 0.8)[1], atol=1e-6)
    assert np.abs(found - LOG_REFERENCE).max() > 0.3


def test_nash_md_ends_at_the_best_response_to_its_own_mixture():
    tau, share = 0.3, 0.4
    setup = setup_of("nash_md", 4.0, tau=tau, share=share)

    def rows():
        mixture = token_mixture(TREE, setup.policy.model.theta.detach(), REFERENCE, share).exp().numpy()
        return population(setup, [np.exp(log_law(setup.policy)), mixture])

    found = settle(setup, rows, 3000, 1e-9)
    exact = NashMDPG(TREE, GAME, tau, eta=4.0, share=share, mixture="token").settle(1e-10).log_policy
    np.testing.assert_allclose(found, exact, atol=1e-6)
    assert np.abs(found - np.log(regularised_nash(GAME, tau).policy)).max() > 1e-3  # not the equilibrium


def test_nash_ema_ends_at_the_regularised_equilibrium():
    tau = 0.3
    setup = setup_of("nash_ema", 4.0, tau=tau, decay=0.5)
    average = {"theta": REFERENCE.clone()}

    def rows():
        theta = setup.policy.model.theta.detach()
        average["theta"] = 0.5 * average["theta"] + 0.5 * theta
        with weights_as(setup.weights, average):
            theirs = np.exp(log_law(setup.policy))
        return population(setup, [np.exp(log_law(setup.policy)), theirs])

    found = settle(setup, rows, 3000, 1e-9)
    np.testing.assert_allclose(found, np.log(regularised_nash(GAME, tau).policy), atol=1e-6)


def test_rounds_of_inpo_are_mirror_descent():
    tau, eta, rounds = 0.5, 1.0, 4
    setup, exact = setup_of("inpo", 0.3, tau=tau, eta=eta), INPO(GAME, tau, eta)
    for _ in range(rounds):
        previous = log_law(setup.policy)
        settle(setup, lambda: population(setup, [np.exp(previous)] * 2, previous), 2000, 1e-8)  # noqa: B023
        np.testing.assert_allclose(log_law(setup.policy), exact.advance(1).log_policy, atol=1e-6)
    target = np.log(regularised_nash(GAME, tau).policy)
    assert kl(target, exact.log_policy) < kl(target, LOG_REFERENCE) / 10


def test_online_ipo_rests_at_the_equilibrium_and_nowhere_near_it():
    tau = 0.4
    setup = setup_of("online_ipo", 1.0, tau=tau)
    norms = []
    for law in (np.log(regularised_nash(GAME, tau).policy), LOG_REFERENCE):
        with torch.no_grad():
            setup.policy.model.theta.copy_(TREE.start(law))
        norms.append(gradient(setup, *population(setup, [np.exp(law)] * 2)).norm)
    assert norms[0] < 1e-7
    assert norms[1] > 1e-2


# ---- train() itself -----------------------------------------------------------------------------------------------


def records(P):
    """Every pair once: the responses are iid uniform."""
    texts = [tuple(y) for y in RESPONSES]
    return [
        SimpleNamespace(
            prompt=tuple(PROMPT), chosen=texts[i], rejected=texts[j], p_chosen=P[i, j], ref_logp=None
        )
        for i, j in itertools.combinations(range(L), 2)
    ]


SETTINGS = TrainSettings(
    steps=250, batch=64, horizon=H, learning_rate=0.3, schedule="cosine", device="cpu", log_with=None
)


def test_dpo_on_the_population_ends_at_its_closed_form():
    beta = 0.5
    bradley_terry = 1 / (1 + np.exp(REWARDS[None, :] - REWARDS[:, None]))
    result = train(
        policy(), "dpo", records=records(bradley_terry), parameters={"beta": beta}, settings=SETTINGS
    )
    np.testing.assert_allclose(
        log_law(result.policy), dpo_solution(REWARDS, LOG_REFERENCE, beta)[1], atol=1e-4
    )
    assert result.metrics[-1]["gradient_norm"] < 1e-4
    assert result.metrics[0]["gradient_norm"] > 1e-2


def test_ipo_on_the_population_ends_at_its_closed_form():
    result = train(policy(), "ipo", records=records(P), parameters={"tau": 0.5}, settings=SETTINGS)
    exact = np.log(ipo(GAME, np.full(L, 1 / L), 0.5))
    np.testing.assert_allclose(log_law(result.policy), exact, atol=1e-4)


def test_given_reference_numbers_are_used_in_place_of_the_model():
    known = score(policy(), [PROMPT] * L, [RESPONSES])[:, 0]
    number = {tuple(y): i for i, y in enumerate(RESPONSES)}

    def with_numbers(shift):
        return [
            SimpleNamespace(
                **{
                    **vars(r),
                    "ref_logp": (
                        known[number[r.chosen]] + shift * number[r.chosen],
                        known[number[r.rejected]],
                    ),
                }
            )
            for r in records(P)
        ]

    settings = replace(SETTINGS, steps=3)
    live, given, planted = (
        log_law(train(policy(), "dpo", records=r, settings=settings).policy)
        for r in (records(P), with_numbers(0.0), with_numbers(0.5))
    )
    np.testing.assert_allclose(given, live, atol=1e-12)
    assert np.abs(planted - live).max() > 1e-6


def sampled(name, parameters, steps=150, **changed):
    settings = replace(SETTINGS, steps=steps, batch=128, learning_rate=0.1, **changed)
    result = train(policy(), name, prompts=[PROMPT], judge=Judge(), parameters=parameters, settings=settings)
    return log_law(result.policy), result


def test_a_sampled_policy_gradient_comes_near_gibbs():
    found, result = sampled("kl_policy_gradient", {"beta": 0.8})
    best = dpo_solution(REWARDS, LOG_REFERENCE, 0.8)[1]
    assert kl(found, best) < 0.02 * kl(LOG_REFERENCE, best)
    other = dpo_solution(REWARDS, LOG_REFERENCE, 1.2)[1]  # control: another temperature is told apart
    assert kl(found, other) > 0.02 * kl(LOG_REFERENCE, best)
    # The estimate of KL(pi, ref) in the metrics, of 20 batches at the end, where the policy hardly moves.
    values = np.array([row["kl"] for row in result.metrics[-20:]])
    assert abs(values.mean() - kl(found, LOG_REFERENCE)) < 5 * values.std() / 20**0.5
    rewards = np.array([row["reward"] for row in result.metrics[-20:]])
    assert abs(rewards.mean() - np.exp(found) @ REWARDS) < 5 * rewards.std() / 20**0.5


@pytest.mark.parametrize(("name", "share"), [("nash_md", 0.4), ("nash_ema", 0.0)])
def test_sampled_games_come_near_their_fixed_points(name, share):
    tau = 0.3
    parameters = {"tau": tau, "share": share} if share else {"tau": tau, "decay": 0.9}
    found, _ = sampled(name, parameters)
    exact = NashMDPG(TREE, GAME, tau, eta=4.0, share=share, mixture="token").settle(1e-9).log_policy
    assert kl(found, exact) < 0.05 * kl(LOG_REFERENCE, exact)


def test_rounds_of_sampled_inpo_come_near_the_equilibrium():
    tau = 0.5
    found, _ = sampled("inpo", {"tau": tau, "eta": 1.0}, steps=200, round_batches=8, epochs=3, labels="soft")
    target = np.log(regularised_nash(GAME, tau).policy)
    assert kl(target, found) < 0.05 * kl(target, LOG_REFERENCE)
