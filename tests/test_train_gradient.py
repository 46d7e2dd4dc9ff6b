"""What a step of the loop descends: enumerated gradients of the table's own losses, and the laws that are sampled."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from preflab.algorithms.apo import apo_loss
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.inpo import inpo_loss
from preflab.algorithms.ipo import ipo_loss
from preflab.algorithms.kl_policy_gradient import policy_gradient_loss
from preflab.algorithms.nash_md_pg import nash_md_pg_loss, token_mixture
from preflab.algorithms.optimisation import PrefixTree
from preflab.algorithms.optimisation.losses import average, logistic_loss, margin
from preflab.algorithms.sppo import sppo_loss
from preflab.envs.kernels import TreeKernel
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.table import table_policy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training.collect import collect
from preflab.llm_bridge.training.methods import METHODS
from preflab.llm_bridge.training.rows import Rows
from preflab.llm_bridge.training.settings import TrainSettings
from preflab.llm_bridge.training.setup import make_setup
from preflab.llm_bridge.training.step import gradient
from scipy.stats import t as student

K, H, PROMPTS = 2, 2, 2
TREE = PrefixTree(TreeKernel(PROMPTS, K, H))
L = TREE.responses
END = K
TEXTS = [[K + 1 + x] for x in range(PROMPTS)]


def responses():
    """The L responses in the order of the tree's leaves: by length, then by word; those of H tokens are cut."""
    ended = [[*w, END] for h in range(H) for w in itertools.product(range(K), repeat=h)]
    return ended + [list(w) for w in itertools.product(range(K), repeat=H)]


RESPONSES = responses()
NUMBER = {tuple(y): i for i, y in enumerate(RESPONSES)}


def theta(seed, scale=1.0):
    return scale * torch.randn(TREE.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(seed, scale=1.0, trainable=True, **options):
    return table_policy(TREE, theta(seed, scale), trainable=trainable, micro_batch=512, **options)


def tiny(seed=0, **options):
    """A transformer over the table's token ids; its completions may use the prompts' tokens too."""
    shape = {"vocabulary": K + 1 + PROMPTS, "context": 16, **options}
    model = tiny_model(**shape, seed=seed)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=shape["vocabulary"], context=16)


class TableJudge:
    """Rewards (PROMPTS, L) and preferences (PROMPTS, L, L) by prompt and response."""

    name = "table"

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.r = rng.normal(size=(PROMPTS, L))
        P = rng.uniform(size=(PROMPTS, L, L))
        upper = np.triu(P, 1)
        self.P = upper + np.tril(1 - np.swapaxes(upper, 1, 2), -1) + 0.5 * np.eye(L)

    def rewards(self, prompts, completions):
        return np.array(
            [self.r[x[0] - K - 1, NUMBER[tuple(y)]] for x, y in zip(prompts, completions, strict=True)]
        )

    def preferences(self, prompts, first, second):
        rows = zip(prompts, first, second, strict=True)
        return np.array([self.P[x[0] - K - 1, NUMBER[tuple(a)], NUMBER[tuple(b)]] for x, a, b in rows])


POLICY, REFERENCE, AVERAGE = 1, 2, 3  # seeds of the tables
SETTINGS = TrainSettings(batch=240, horizon=2, round_batches=1, device="cpu", baseline="none")
PARAMETERS = {
    "dpo": {"beta": 0.7, "label_smoothing": 0.1},
    "ipo": {"tau": 0.4},
    "rpo": {"beta": 0.7, "eta": 0.6},
    "vpo_offline": {"beta": 0.7, "alpha": 0.6},
    "nash_md": {"tau": 0.3, "share": 0.3},
    "nash_ema": {"tau": 0.3, "decay": 0.9},
    "kl_policy_gradient": {"beta": 0.5},
    "online_dpo": {"beta": 0.7},
    "online_ipo": {"tau": 0.4},
    "online_xpo": {"beta": 0.7, "alpha": 0.2},
    "inpo": {"tau": 0.3, "eta": 1.5},
    "sppo": {"eta": 1.5},
    "xpo": {"beta": 0.7, "alpha": 0.2},
    "vpo": {"beta": 0.7, "alpha": 0.6},
    "iterative_dpo": {"beta": 0.7},
    "iterative_dpo_previous": {"beta": 0.7},
}


def setup_of(name, policy=None, judge=None, **changed):
    method = METHODS[name]
    return make_setup(
        table(POLICY) if policy is None else policy,
        method,
        method.checked(changed.pop("parameters", PARAMETERS[name])),
        replace(SETTINGS, **changed),
        reference=table(REFERENCE, trainable=False),
        prompts=TEXTS,
        judge=TableJudge() if judge is None else judge,
        folder=None,
    )


def log_law(seed):
    return TREE.log_probabilities(table(seed).model.theta).detach()


def law_of(who, share):
    """(PROMPTS, L): the law of a player, written down."""
    if who == "mixture":
        pi, ref = table(POLICY).model.theta.detach(), table(REFERENCE).model.theta.detach()
        log_pi = token_mixture(TREE, pi, ref, share)
    else:
        log_pi = log_law({"policy": POLICY, "reference": REFERENCE, "average": AVERAGE}[who])
    return log_pi.exp().reshape(PROMPTS, L).numpy()


def exact_loss(name, theta):
    """The population loss as a function of the table's parameters, by the losses of `algorithms` on all responses."""
    log_pi, log_ref = TREE.log_probabilities(theta), log_law(REFERENCE)
    previous = log_pi.detach()
    method, p, judge = METHODS[name], METHODS[name].checked(PARAMETERS[name]), TableJudge()
    pi = previous.exp() / PROMPTS
    P = torch.as_tensor(judge.P)
    if name in ("nash_md", "nash_ema"):
        m = torch.as_tensor(law_of(method.draws[1], p.get("share", 0.0)))
        wins = torch.einsum("xij,xj->xi", P, m).reshape(-1)
        return nash_md_pg_loss(log_pi, log_ref, wins, pi, tau=p["tau"])
    if name == "kl_policy_gradient":
        reward = torch.as_tensor(judge.r).reshape(-1)
        return policy_gradient_loss(log_pi, log_ref, reward, pi, beta=p["beta"])
    if name == "sppo":
        wins = torch.einsum("xij,xj->xi", P, previous.exp().reshape(PROMPTS, L)).reshape(-1)
        spread = (
            torch.as_tensor(law_of("policy", 0))[:, :, None] * torch.as_tensor(law_of("policy", 0))[:, None]
        )
        noise = (p["eta"] ** 2 * (P - wins.reshape(PROMPTS, L, 1)) ** 2 * spread).sum() / PROMPTS
        return (
            sppo_loss(log_pi, previous, wins, pi, eta=p["eta"]) + noise
        )  # one opponent: a variance, a constant
    index, weight, wins = pairs(name)
    policy, ref, before = log_pi[index], log_ref[index], previous[index]
    if name in ("dpo", "online_dpo", "iterative_dpo"):
        smooth = p["label_smoothing"]
        return dpo_loss(policy, ref, wins, weight, beta=p["beta"], label_smoothing=smooth)
    if name in ("ipo", "online_ipo"):
        return ipo_loss(policy, ref, wins, weight, tau=p["tau"])
    if name == "inpo":
        return inpo_loss(policy, ref, before, wins, weight, tau=p["tau"], eta=p["eta"])
    if name == "iterative_dpo_previous":
        return apo_loss(policy, before, wins, weight, beta=p["beta"])
    # What follows is DPO with a term of its own, written out here.
    comparisons = average(logistic_loss(p["beta"] * margin(policy, ref), wins), weight)
    if name in ("xpo", "online_xpo"):
        return comparisons + p["alpha"] * (weight * policy[:, 1]).sum()
    if name == "vpo":
        ratio = log_ref.exp() / PROMPTS * (log_pi - log_ref)
        return comparisons + p["alpha"] * p["beta"] * ratio.sum()
    chosen = (weight[:, None] * torch.stack([wins, 1 - wins], 1) * policy).sum()
    if name == "rpo":
        return comparisons - p["eta"] * p["beta"] * chosen
    constant = (weight[:, None] * torch.stack([wins, 1 - wins], 1) * ref).sum()
    return comparisons - p["alpha"] * p["beta"] * (chosen - constant)


def pairs(name):
    """(m, 2) numbers of responses, their probabilities and who wins: all ordered pairs of each prompt."""
    draws = METHODS[name].draws
    laws = [law_of("policy" if who == "data" else who, 0.0) for who in draws[:2]]
    every = list(itertools.product(range(PROMPTS), range(L), range(L)))
    index = torch.tensor([[x * L + i, x * L + j] for x, i, j in every])
    weight = torch.tensor([laws[0][x, i] * laws[1][x, j] / PROMPTS for x, i, j in every])
    wins = torch.tensor([TableJudge().P[x, i, j] for x, i, j in every])
    return index, weight, wins


def population(name):
    """Rows of all draws of a round, and their probabilities, with the constants that `collect` adds."""
    method, p, judge = METHODS[name], METHODS[name].checked(PARAMETERS[name]), TableJudge()
    laws = [law_of("policy" if who == "data" else who, p.get("share", 0.0)) for who in method.draws]
    R = len(method.draws)
    every = list(itertools.product(range(PROMPTS), *[range(L)] * R))
    numbers = np.array(every)
    x, y = numbers[:, 0], numbers[:, 1:]
    weight = np.prod([laws[k][x, y[:, k]] for k in range(R)], axis=0) / PROMPTS
    columns = {}
    if method.asks == "rewards":
        columns["advantage"] = judge.r[x, y[:, 0]]
    else:
        columns["wins"] = judge.P[x, y[:, 0], y[:, 1]]
    at = x[:, None] * L + y[:, : method.scored]
    if method.samples:
        columns["reference"] = log_law(REFERENCE).numpy()[at]
    if method.previous:
        columns["previous"] = log_law(POLICY).numpy()[at]
    texts = [TEXTS[i] for i in x]
    return Rows(texts, [[RESPONSES[i] for i in y[:, k]] for k in range(R)], columns), weight


def exact_gradient(name):
    theta = table(POLICY).model.theta
    loss = exact_loss(name, theta)
    (found,) = torch.autograd.grad(loss, theta)
    return loss.item(), found


def loop_gradient(setup, rows, weight=None):
    found = gradient(setup, rows, weight)
    return found.loss, torch.cat([p.grad.reshape(-1) for p in setup.weights.values()]).clone()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro_batch", [None, 37])
def test_the_step_descends_the_population_loss_of_the_table(name, micro_batch):
    setup = setup_of(name, micro_batch=micro_batch)
    rows, weight = population(name)
    loss, found = loop_gradient(setup, rows, weight)
    expected_loss, expected = exact_gradient(name)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert (found - expected).abs().max() < 1e-12
    assert expected.abs().max() > 1e-2
    other = {k: v * 1.1 for k, v in PARAMETERS[name].items() if k not in ("share", "decay")}
    _, planted = loop_gradient(setup_of(name, parameters={**PARAMETERS[name], **other}), rows, weight)
    assert (planted - expected).abs().max() > 1e-4  # control: other parameters


# ---- what is drawn ---------------------------------------------------------------------------------------------------

SAMPLING = [name for name, method in METHODS.items() if method.samples]
ROUNDS = 24


def worst_z(setup, name, average=None):
    """The largest |t| over coordinates of the mean of ROUNDS sampled gradients against the exact one, and its bound."""
    _, expected = exact_gradient(name)
    lent = {"theta": average} if average is not None else None
    found = torch.stack(
        [loop_gradient(setup, collect(setup, number, lent).rows)[1] for number in range(ROUNDS)]
    )
    moves = found.std(0) > 1e-9
    t = (found.mean(0) - expected)[moves] * ROUNDS**0.5 / found.std(0)[moves]
    return t.abs().max().item(), student.ppf(1 - 1e-7 / TREE.size / 2, ROUNDS - 1)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_gradients_have_the_exact_mean(name):
    average = table(AVERAGE).model.theta.detach() if name == "nash_ema" else None
    worst, bound = worst_z(setup_of(name), name, average)
    assert worst < bound


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("nash_md", ("policy", "reference")),
        ("nash_ema", ("policy", "policy")),
        ("online_xpo", ("policy", "policy")),
        ("vpo", ("policy", "policy", "policy")),
        ("inpo", ("reference", "policy")),
    ],
)
def test_responses_of_another_player_are_noticed(name, draws):
    setup = setup_of(name)
    planted = replace(setup, method=replace(setup.method, draws=draws))
    worst, bound = worst_z(planted, name)
    assert worst > bound


def test_swapped_weights_of_the_mixture_are_noticed():
    setup = setup_of("nash_md", parameters={**PARAMETERS["nash_md"], "share": 0.7})
    worst, bound = worst_z(setup, "nash_md")
    assert worst > bound


@pytest.mark.parametrize("group", [1, 4])
def test_the_mean_of_the_others_is_a_baseline_without_bias_and_with_less_variance(group):
    judge = TableJudge()
    judge.r += 3.0  # a constant that the gradient does not see, on average
    plain = setup_of("kl_policy_gradient", judge=judge, group=group)
    centred = setup_of("kl_policy_gradient", judge=judge, group=group, baseline="others")
    worst, bound = worst_z(centred, "kl_policy_gradient")
    assert worst < bound
    spread = [
        torch.stack([loop_gradient(s, collect(s, i).rows)[1] for i in range(10)]).var(0).sum()
        for s in (plain, centred)
    ]
    assert spread[1] < spread[0] / 2


def test_labels_are_drawn_soft_or_certain():
    wins = {}
    for labels in ("soft", "draw", "argmax"):
        rows = collect(setup_of("online_dpo", labels=labels), 0).rows
        wins[labels], P = rows.numbers["wins"], rows.numbers["preference"]
    assert np.array_equal(wins["soft"], P)
    assert set(wins["draw"]) == {0.0, 1.0}
    assert abs((wins["draw"] - P).mean()) < 5 * 0.5 / len(P) ** 0.5
    assert np.array_equal(wins["argmax"], np.where(P == 0.5, 0.5, P > 0.5))


def test_groups_of_responses_answer_one_prompt():
    rows = collect(setup_of("kl_policy_gradient", group=4, batch=16), 3).rows
    groups = np.array(rows.prompts).reshape(4, 4)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == sorted([x[0] for x in TEXTS] * 2)  # every prompt alike often


# ---- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "nash_md", "vpo"])
@pytest.mark.parametrize("micro_batch", [1, 3, 7, 20])
def test_any_split_gives_the_same_gradient(name, micro_batch):
    rows = unequal(name)
    _, whole = loop_gradient(setup_of(name, policy=tiny(1)), rows)
    _, split = loop_gradient(setup_of(name, policy=tiny(1), micro_batch=micro_batch), rows)
    assert (split - whole).abs().max() < 1e-12 * whole.abs().max()


def unequal(name, n=11):
    """Rows with prompts and completions of unequal lengths."""
    rng, R = np.random.default_rng(4), len(METHODS[name].draws)
    text = [rng.integers(0, 5, size=rng.integers(1, 7)).tolist() for _ in range(n * (R + 1))]
    columns = {k: rng.uniform(size=n) for k in ("wins", "advantage")}
    columns["reference"] = rng.normal(size=(n, METHODS[name].scored))
    return Rows(text[:n], [text[n * (k + 1) : n * (k + 2)] for k in range(R)], columns)


def test_a_mean_of_means_over_unequal_pieces_would_differ():
    rows, setup = unequal("dpo"), setup_of("dpo", policy=tiny(1))
    _, whole = loop_gradient(setup, rows)
    pieces = [rows.take(np.arange(a, b)) for a, b in ((0, 4), (4, 8), (8, 11))]
    planted = torch.stack([loop_gradient(setup, piece)[1] for piece in pieces]).mean(0)
    assert (planted - whole).abs().max() > 1e-3 * whole.abs().max()
