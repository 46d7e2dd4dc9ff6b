"""Claims about KL estimators in policy gradients (`algorithms/kl_estimators.py`): which gradient is which.

By enumeration of all responses of random token trees (3 tokens, 3 steps, two prompts) and of tables, at random
parameters. Errors are relative to the largest entry of the gradient of KL(pi, ref).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...algorithms.kl_estimators import FORMS, Form, expected_values, gradient_table, targets
from ...algorithms.optimisation import PrefixTree, SoftmaxTable, Table
from ...algorithms.planning import trajectory_kl
from ...envs.kernels import Array
from ...envs.token_mdp import random_token_mdp
from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_rate, slope_loglog
from ._declare import cells_of

PAPER = "Schulman, Approximating KL Divergence (2020)"
SIZES = (0.1, 0.05, 0.025, 0.0125)  # of the log-ratio
NEAR_FORMS = ("k3, response, loss", "k2, token, loss", "k3, token, loss", "k3, token, corrected")


cell = cells_of(__name__)


def world(seed: int, horizon: int = 3, scale: float = 1.0) -> tuple[PrefixTree, Array, Array]:
    """A tree, theta and log ref of all responses: theta = the reference's own plus scale times a normal vector."""
    model = random_token_mdp(3, horizon, prompts=2, seed=seed, concentration=2.0)
    table, rng = PrefixTree(model.kernel), np.random.default_rng([seed, 1])
    log_reference = model.leaf_log_probabilities()
    theta = table.start(log_reference).numpy() + scale * rng.normal(size=table.size)
    return table, theta, log_reference


def as_table(table: PrefixTree, theta: Array) -> tuple[SoftmaxTable, Array]:
    """The same law with one parameter a response: a tree of one token."""
    import torch

    flat = SoftmaxTable(table.responses, table.prompts)
    return flat, table.log_probabilities(torch.as_tensor(theta)).numpy()


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(*, seed: int, uses: Sequence[str], horizon: int = 3, fault: str = "none") -> dict[str, Any]:
    """Every form with one of these uses, minus the combination of targets that it is said to have.

    Faults: k1_for_k2, k2_for_k3, k3_for_k1 and so on: the estimator is exchanged for another in the forms that use it;
    prefixes_move: the sequence's gradients where prefixes are said to be fixed; prefixes_fixed: the other way round;
    reversed: the two directions of KL exchanged.
    """
    tree, theta, log_reference = world(seed, horizon)
    errors = {form.name: 0.0 for form in FORMS if form.use in uses and form.gradient is not None}
    worlds: list[tuple[Table, Array]] = [(tree, theta)]
    if fault == "none":
        worlds.append(as_table(tree, theta))
    for table, at in worlds:
        found, wanted = gradient_table(table, at, log_reference), targets(table, at, log_reference)
        size = float(np.abs(wanted["reverse"]).max())
        for form in FORMS:
            if form.name in errors and form.gradient is not None:
                measured = found[exchanged(form, fault)]
                expected = sum(
                    (c * wanted[renamed(t, fault)] for t, c in form.gradient.items()), 0 * measured
                )
                away = float(np.abs(measured - expected).max()) / size
                errors[form.name] = max(errors[form.name], away)
    return {"errors": errors}


def exchanged(form: Form, fault: str) -> str:
    old, _, new = fault.partition("_for_")
    return form.name.replace(old, new) if new else form.name


def renamed(target: str, fault: str) -> str:
    if fault == "prefixes_move":
        return target.removeprefix("frozen ")
    if fault == "prefixes_fixed":
        return target if target.startswith("frozen") else f"frozen {target}"
    if fault == "reversed":
        return target.replace("forward", "?").replace("reverse", "forward").replace("?", "reverse")
    return target


LOSSES = ("loss",)
REWARDS = ("reward", "own_reward")
CORRECTED = ("corrected", "sequence_corrected")


def gradient_cells(plan: Plan, uses: Sequence[str], fault: str = "none", horizon: int = 3) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    return [cell("gradients", s, uses=uses, fault=fault, horizon=horizon) for s in seeds]


def judge_gradients(outcomes: Sequence[Outcome]) -> Judgement:
    names = outcomes[0]["errors"] if outcomes else ()
    return all_of({name: judge_identity([o["errors"][name] for o in outcomes]) for name in names})


def joint(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """sum_t l_t log pi(y_t), undetached: its gradient minus that of frozen KL minus frozen entropy.

    Faults: kl: the gradient of KL; frozen_kl: of frozen KL.
    """
    table, theta, log_reference = world(seed)
    found, wanted = gradient_table(table, theta, log_reference), targets(table, theta, log_reference)
    expected = wanted["frozen reverse"] - wanted["frozen entropy"]
    if fault != "none":
        expected = wanted["reverse" if fault == "kl" else "frozen reverse"]
    error = np.abs(found["joint form"] - expected).max() / np.abs(wanted["reverse"]).max()
    return {"errors": {"joint form": float(error)}}


def joint_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("joint", s, fault=fault) for s in plan.seed_range(quick=5, full=30)]


def one_token(*, seed: int, horizon: int = 1) -> dict[str, Any]:
    """What freezing the prefixes changes, of both directions of KL; nothing for one token."""
    table, theta, log_reference = world(seed, horizon)
    found = targets(table, theta, log_reference)
    size = np.abs(found["reverse"]).max()
    return {
        "errors": {
            kind: float(np.abs(found[kind] - found[f"frozen {kind}"]).max() / size)
            for kind in ("reverse", "forward")
        }
    }


def one_token_cells(plan: Plan, horizon: int = 1) -> list[Cell]:
    return [cell("one_token", s, horizon=horizon) for s in plan.seed_range(quick=5, full=30)]


# ---- values ----------------------------------------------------------------------------------------------------------


def values(*, seed: int, estimators: Sequence[str] = ("k1", "k3"), fault: str = "none") -> dict[str, Any]:
    """E k, of whole responses and summed over tokens, minus KL(pi, ref) by the recursion over prefixes.

    of_reference: responses are drawn from the reference.
    """
    import torch

    model = random_token_mdp(3, 3, prompts=2, seed=seed, concentration=2.0)
    table, theta, log_reference = world(seed)
    policy = table.policy(torch.as_tensor(theta))
    assert model.reference is not None
    exact = trajectory_kl(model, policy, model.reference)
    found = expected_values(table, theta, log_reference)
    if fault == "of_reference":
        other = table.log_probabilities(torch.as_tensor(theta)).numpy()
        backwards = expected_values(table, table.start(log_reference).numpy(), other)
        found = {name: -value if name.startswith("k1") else value for name, value in backwards.items()}
    return {
        "errors": {
            name: (value - exact) / exact for name, value in found.items() if name.split(",")[0] in estimators
        }
    }


def value_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("values", s, **broken) for s in plan.seed_range(quick=5, full=30)]


def near(*, seed: int, half: float = 0.5, forms: Sequence[str] = NEAR_FORMS) -> dict[str, Any]:
    """As the log-ratio shrinks through SIZES: |E k2 - KL| of whole responses, and |gradient - grad KL| of the forms.

    half  k2 = half l^2
    """
    bias: list[float] = []
    away: dict[str, list[float]] = {name: [] for name in forms}
    for scale in SIZES:
        table, theta, log_reference = world(seed, 3, scale)
        found = expected_values(table, theta, log_reference)
        bias.append(abs(2 * half * found["k2, response"] - found["k1, response"]))
        if not forms:
            continue
        slopes, wanted = gradient_table(table, theta, log_reference), targets(table, theta, log_reference)
        for name in forms:
            away[name].append(float(np.linalg.norm(slopes[name] - wanted["reverse"])))
    return {"bias": bias, "away": away}


def near_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("near", s, **broken) for s in plan.seed_range(quick=8, full=30)]


def bias_cells(plan: Plan, half: float = 0.5) -> list[Cell]:
    return [cell("near", s, half=half, forms=()) for s in plan.seed_range(quick=40, full=120)]


def judge_bias(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(SIZES, [o["bias"] for o in outcomes]), 3.0)


def draw_bias(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = np.array([o["bias"] for o in outcomes])
    line = figures.Curve("k2", SIZES, Y, slope_loglog(SIZES, Y))
    return figures.loglog([line], x="size of the log-ratio", y="|E k2 - KL|", reference=3.0)


def distances(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    names = outcomes[0]["away"] if outcomes else ()
    return {name: np.array([o["away"][name] for o in outcomes]) for name in names}


def judge_near(outcomes: Sequence[Outcome]) -> Judgement:
    def part(Y: Any) -> Any:
        return lambda level: judge_rate(slope_loglog(SIZES, Y, level=level), 2.0)

    return conjunction({name: part(Y) for name, Y in distances(outcomes).items()})


def draw_near(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = [figures.Curve(name, SIZES, Y, slope_loglog(SIZES, Y)) for name, Y in distances(outcomes).items()]
    return figures.loglog(lines, x="size of the log-ratio", y="distance to grad KL", reference=2.0)


# ---- the claims ------------------------------------------------------------------------------------------------------

ON_POLICY = ("responses are drawn from the policy",)


def exchange(old: str, new: str, uses: Sequence[str]) -> Control:
    name = f"{old}_for_{new}"
    return Control(name, f"{new} where {old} is said to be", lambda plan: gradient_cells(plan, uses, name))


CLAIMS = (
    Claim(
        name="kl_estimators.as_losses",
        kind="identity",
        title="Differentiated, k1 gives nothing, k2 the KL's gradient, k3 that of the other KL",
        statement=r"$\mathbb{E}_\pi\nabla k_1 = 0$, $\mathbb{E}_\pi\nabla k_2 = \nabla\mathrm{KL}(\pi, "
        r"\pi_{\mathrm{ref}})$, $\mathbb{E}_\pi\nabla k_3 = \nabla\mathrm{KL}(\pi_{\mathrm{ref}}, \pi)$ of whole "
        r"responses; token by token the same of each token's law, with the prefixes' law held fixed.",
        assumptions=ON_POLICY,
        source="derived in `algorithms/kl_estimators.py`",
        cells=lambda plan: gradient_cells(plan, LOSSES),
        judge=judge_gradients,
        controls=(
            exchange("k1", "k2", LOSSES),
            exchange("k2", "k3", LOSSES),
            exchange("k3", "k2", LOSSES),
            Control(
                "prefixes_move",
                "token by token taken for the gradient of the sequence",
                lambda plan: gradient_cells(plan, LOSSES, "prefixes_move"),
            ),
            Control(
                "reversed",
                "the two directions of KL exchanged",
                lambda plan: gradient_cells(plan, LOSSES, "reversed"),
            ),
        ),
    ),
    Claim(
        name="kl_estimators.as_rewards",
        kind="identity",
        title="In the reward k1 is exact; k3 has the difference of two gradients",
        statement=r"$\mathbb{E}_\pi[k_1 \nabla\log\pi] = \nabla\mathrm{KL}(\pi, \pi_{\mathrm{ref}})$, also token by "
        r"token with each token's estimate charged to the tokens up to it; charged to itself alone, with the law of "
        r"prefixes held fixed. $\mathbb{E}_\pi[k_3 \nabla\log\pi] = \nabla\mathrm{KL}(\pi, \pi_{\mathrm{ref}}) - "
        r"\nabla\mathrm{KL}(\pi_{\mathrm{ref}}, \pi)$.",
        assumptions=ON_POLICY,
        source="derived in `algorithms/kl_estimators.py`",
        cells=lambda plan: gradient_cells(plan, REWARDS),
        judge=judge_gradients,
        controls=(
            exchange("k1", "k2", REWARDS),
            exchange("k3", "k1", REWARDS),
            Control(
                "prefixes_fixed",
                "whole responses taken for the prefixes held fixed",
                lambda plan: gradient_cells(plan, REWARDS, "prefixes_fixed"),
            ),
        ),
    ),
    Claim(
        name="kl_estimators.corrected",
        kind="identity",
        title="With the ratio of whole responses k1 and k3 are exact; with tokens' ratios the prefixes are fixed",
        statement=r"$\nabla\mathbb{E}[(\pi/\mathrm{sg}[\pi])\, k] = \nabla\mathrm{KL}(\pi, \pi_{\mathrm{ref}})$ for "
        r"$k_1$ and $k_3$ of responses, and of tokens added up; with each token's own ratio the gradient at fixed "
        r"prefixes.",
        assumptions=ON_POLICY,
        source="derived in `algorithms/kl_estimators.py`",
        cells=lambda plan: gradient_cells(plan, CORRECTED),
        judge=judge_gradients,
        controls=(
            exchange("k1", "k2", CORRECTED),
            exchange("k3", "k2", CORRECTED),
            Control(
                "prefixes_move",
                "tokens' ratios taken for the response's",
                lambda plan: gradient_cells(plan, CORRECTED, "prefixes_move"),
            ),
        ),
    ),
    Claim(
        name="kl_estimators.joint_form",
        kind="identity",
        title="A log-ratio times a log-probability, both differentiated, descends frozen KL and climbs entropy",
        statement=r"$\mathbb{E}_\pi\nabla\sum_t \log\frac{\pi}{\pi_{\mathrm{ref}}}(y_t) \log\pi(y_t)$ is the gradient "
        r"of $\sum_t \mathrm{KL}(\pi, \pi_{\mathrm{ref}}) - \mathcal{H}(\pi)$ of each token's law at fixed prefixes.",
        assumptions=ON_POLICY,
        source="the form in an open Nash-MD trainer; derived in `algorithms/kl_estimators.py`",
        cells=joint_cells,
        judge=judge_gradients,
        controls=(
            Control("kl", "taken for the gradient of KL", lambda plan: joint_cells(plan, "kl")),
            Control("frozen_kl", "taken for that of frozen KL", lambda plan: joint_cells(plan, "frozen_kl")),
        ),
    ),
    Claim(
        name="kl_estimators.one_token",
        kind="identity",
        title="For one token there are no prefixes to freeze",
        statement=r"At $H = 1$ the gradients at fixed prefixes are those of $\mathrm{KL}(\pi, \pi_{\mathrm{ref}})$ and "
        r"$\mathrm{KL}(\pi_{\mathrm{ref}}, \pi)$.",
        source="the chain rule of KL",
        cells=one_token_cells,
        judge=judge_gradients,
        controls=(
            Control("three_tokens", "responses of three tokens", lambda plan: one_token_cells(plan, 3)),
        ),
    ),
    Claim(
        name="kl_estimators.values",
        kind="identity",
        title="As values k1 and k3 are unbiased, of responses and of tokens added up",
        statement=r"$\mathbb{E}_\pi k_1 = \mathbb{E}_\pi k_3 = \mathrm{KL}(\pi, \pi_{\mathrm{ref}})$.",
        assumptions=ON_POLICY,
        source=PAPER,
        cells=value_cells,
        judge=judge_gradients,
        controls=(
            Control("k2", "k2 in their place", lambda plan: value_cells(plan, estimators=("k2",))),
            Control(
                "of_reference",
                "responses of the reference",
                lambda plan: value_cells(plan, fault="of_reference"),
            ),
        ),
    ),
    Claim(
        name="kl_estimators.k2_bias",
        kind="rate",
        title="The bias of k2 is of third order in the log-ratio",
        statement=r"$|\mathbb{E}_\pi k_2 - \mathrm{KL}(\pi, \pi_{\mathrm{ref}})| = \Theta(\epsilon^3)$ for "
        r"$\theta = \theta_{\mathrm{ref}} + \epsilon v$.",
        assumptions=(r"$\epsilon$ in 0.0125 to 0.1, $v$ normal", "a slack of 0.1 on the exponent"),
        source=f"{PAPER}; the order is derived in `algorithms/kl_estimators.py`",
        cells=bias_cells,
        judge=judge_bias,
        controls=(Control("no_half", "l^2 in place of l^2 / 2", lambda plan: bias_cells(plan, 1.0)),),
        figure=draw_bias,
    ),
    Claim(
        name="kl_estimators.near_the_reference",
        kind="rate",
        title="Near the reference the wrong gradients differ from the right one by a second-order term",
        statement=r"$|g - \nabla\mathrm{KL}(\pi, \pi_{\mathrm{ref}})| = \Theta(\epsilon^2)$ at "
        r"$\theta_{\mathrm{ref}} + \epsilon v$, where $\nabla\mathrm{KL}$ itself is of order $\epsilon$, for $k_3$ "
        r"differentiated and for the forms at fixed prefixes.",
        assumptions=(r"$\epsilon$ in 0.0125 to 0.1, $v$ normal", "a slack of 0.1 on the exponent"),
        source="derived in `algorithms/kl_estimators.py`",
        cells=near_cells,
        judge=judge_near,
        controls=(
            Control(
                "k1_as_loss", "k1 differentiated", lambda plan: near_cells(plan, forms=("k1, token, loss",))
            ),
            Control(
                "k3_as_reward",
                "k3 in the reward",
                lambda plan: near_cells(plan, forms=("k3, response, reward",)),
            ),
        ),
        figure=draw_near,
    ),
)
