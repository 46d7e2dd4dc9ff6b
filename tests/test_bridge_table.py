"""Tables and transformers behind one protocol: the same tests on all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preflab.algorithms.dpo import dpo_loss, dpo_solution
from preflab.algorithms.nash_md_pg import token_mixture
from preflab.algorithms.optimisation import Pairs, PrefixTree, SoftmaxTable, gather, minimise
from preflab.envs import bradley_terry_game, random_token_mdp
from preflab.envs.kernels import TreeKernel
from preflab.llm_bridge.lattice import LatticePolicy, lattice
from preflab.llm_bridge.mixture import TokenMixture
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.table import TableModel, table_policy
from preflab.llm_bridge.tiny import tiny_model
from scipy.stats import chi2

K, H, ROOTS = 2, 3, 2
TREE = PrefixTree(TreeKernel(ROOTS, K, H))
THETA = torch.randn(TREE.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def leaves(tree=TREE):
    """(prompts, completions) of a table policy, in the order of the leaves."""
    k, h = tree.tree.branching, tree.tree.horizon
    world = random_token_mdp(k, h, prompts=tree.prompts)
    rows = world.trajectories(np.arange(world.n_leaves))
    completions = [
        [int(a) for a, s in zip(actions, states, strict=True) if s > 0]
        for actions, states in zip(rows.actions, rows.states, strict=True)
    ]
    return [[k + 1 + int(x)] for x in world.leaf_prompts], completions


# ---- a tree as a language model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tree_scores_as_its_table_and_has_its_gradient(side):
    theta = THETA.clone().requires_grad_(True)
    policy = table_policy(TREE, theta, micro_batch=7)
    scores = policy.log_probabilities(*leaves(), side)
    torch.testing.assert_close(scores, TREE.log_probabilities(theta), atol=1e-12, rtol=0)
    weights = torch.arange(len(scores)).double()
    (mine,) = torch.autograd.grad((weights * scores).sum(), theta)
    (tables,) = torch.autograd.grad((weights * TREE.log_probabilities(theta)).sum(), theta)
    torch.testing.assert_close(mine, tables, atol=1e-12, rtol=0)


def test_its_samples_follow_the_table():
    policy = table_policy(TREE, THETA, micro_batch=6000)
    prompts, completions = leaves()
    n, responses = 3000, TREE.responses
    drawn = policy.sample([prompts[0], prompts[-1]] * n, H, torch.Generator().manual_seed(0))
    law = TREE.log_probabilities(THETA).exp().numpy().reshape(ROOTS, responses)
    number = {tuple(y): i for i, y in enumerate(completions[:responses])}
    for x in range(ROOTS):
        counts = np.bincount([number[tuple(y)] for y in drawn.completions[x::2]], minlength=responses)
        distance = ((counts - n * law) ** 2 / (n * law)).sum(1)  # from both prompts' laws
        limit = chi2.ppf(1 - 1e-6, responses - 1)
        assert distance[x] < limit < distance[1 - x]


def test_wrong_positions_are_wrong_logits():
    prompt, text = [K + 1], [1, 0]
    ids, mask = torch.tensor([[K, *prompt, *text]]), torch.tensor([[0, 1, 1, 1]])
    model = TableModel(TREE, THETA)
    right = model(ids, mask, torch.tensor([[0, 0, 1, 2]])).log_softmax(-1)
    planted = model(ids, mask, torch.arange(4)[None]).log_softmax(-1)
    assert right[0, -1, :K].isfinite().all()
    assert (right[0, 1:] - planted[0, 1:]).nan_to_num().abs().max() > 0.01


def test_what_comes_after_the_end_or_the_horizon_ends():
    policy = table_policy(TREE, THETA)
    for text in ([K + 1, K], [K + 1, 0, K], [K + 2, 0, 1, 1]):
        (law,) = policy.decoder([text]).laws.exp()
        assert law.tolist() == [0] * K + [1] + [0] * ROOTS


def test_its_lattice_is_the_tree_and_its_mixture_the_tables_mixture():
    policy, other = table_policy(TREE, THETA), table_policy(TREE, THETA.flip(0))
    prompts, completions = leaves()
    found = lattice(policy, [prompts[0], prompts[-1]], K, H)
    ordered = {(x[0], *y): i for i, (x, y) in enumerate(zip(prompts, completions, strict=True))}
    index = [ordered[(x[0], *y)] for x, y in zip(*found.completions(), strict=True)]
    np.testing.assert_allclose(
        found.world.leaf_log_probabilities(), TREE.log_probabilities(THETA)[index], atol=1e-12
    )
    mixture = TokenMixture(policy, other, 0.3).log_probabilities(prompts, completions)
    torch.testing.assert_close(mixture, token_mixture(TREE, THETA, THETA.flip(0), 0.3), atol=1e-12, rtol=0)


# ---- one suite for all tables -------------------------------------------------------------------------------------


def transformer():
    policy = TransformerPolicy(tiny_model(6, context=16, scale=0.5), [5], 5, 6, 16)
    return LatticePolicy(policy, lattice(policy, [[0], [1, 2]], 2, 2))


TABLES = {
    "softmax": lambda: SoftmaxTable(7, 2),
    "tree": lambda: PrefixTree(TreeKernel(2, 2, 2)),
    "transformer": transformer,
}


@pytest.fixture(scope="module", params=TABLES)
def table(request):
    return TABLES[request.param]()


def test_every_prompt_has_mass_one_and_theta_is_differentiable(table):
    theta = table.start().requires_grad_(True)
    assert theta.shape == (table.size,)
    lp = table.log_probabilities(theta)
    assert lp.shape == (table.prompts * table.responses,)
    torch.testing.assert_close(lp.exp().reshape(table.prompts, -1).sum(1), torch.ones(table.prompts).double())
    direction = torch.randn(table.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(lp[3], theta)
    ends = [table.log_probabilities(theta.detach() + s * direction)[3].item() for s in (1e-6, -1e-6)]
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient @ direction).item(), abs=1e-7)
    # a score has expectation zero: sum_y pi(y|x) grad log pi(y|x) = 0
    (score,) = torch.autograd.grad((lp.detach().exp() * table.log_probabilities(theta)).sum(), theta)
    assert score.abs().max() < 1e-12


def test_one_loss_three_policies_one_optimum(table):
    rng, beta, n = np.random.default_rng(3), 0.6, table.responses
    reference = table.log_probabilities(table.start()).detach()
    parts, solution = [], []
    for x in range(table.prompts):
        rewards, ref = rng.normal(size=n), reference.reshape(-1, n)[x].numpy()
        parts.append(Pairs.population(bradley_terry_game(rewards, reference=np.exp(ref))))
        solution.append(dpo_solution(rewards, ref, beta)[1])
    index = np.concatenate([p.index + x * n for x, p in enumerate(parts)])
    pairs = Pairs(index, *(np.concatenate([getattr(p, a) for p in parts]) for a in ("preferred", "weight")))
    p, w = pairs.tensors()

    def loss(theta):
        lp = table.log_probabilities(theta)
        return dpo_loss(gather(lp, pairs), gather(reference, pairs), p, w, beta=beta)

    best = minimise(loss, table.start(), tolerance=1e-8)
    reached = table.log_probabilities(best.theta).numpy()
    assert np.abs(reached - np.concatenate(solution)).max() < 1e-5
    assert np.abs(reference.numpy() - np.concatenate(solution)).max() > 0.3


def test_a_trainable_table_is_the_same_policy_with_a_parameter():
    prompts, completions = leaves()
    fixed, trainable = table_policy(TREE, THETA), table_policy(TREE, THETA, trainable=True)
    scores = trainable.log_probabilities(prompts, completions)
    torch.testing.assert_close(scores, fixed.log_probabilities(prompts, completions), atol=0, rtol=0)
    scores[0].backward()
    assert trainable.model.theta.grad.abs().max() > 0
    assert trainable.model.theta.data_ptr() != THETA.data_ptr()
