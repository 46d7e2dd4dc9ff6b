"""What the claims about VPO, XPO and RPO measure: bandits, planted faults, cells. See `vpo`, `xpo`, `rpo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ...algorithms.dpo import dpo_solution
from ...algorithms.incentives import (
    OnlinePreferences,
    best_value,
    comparison_loss,
    fit_rewards,
    policy_of,
    shortfall,
)
from ...algorithms.optimisation import Pairs, PrefixTree, SoftmaxTable, fit, gather
from ...algorithms.rpo import adversarial_value, chosen_law, rpo_loss, rpo_rewards
from ...algorithms.vpo import VPO, Sign, calibrate, reward_objective, vpo_loss, vpo_rewards
from ...algorithms.xpo import XPO, xpo_loss
from ...envs.kernels import Array
from ...envs.preference_games import PreferenceGame
from ...envs.token_mdp import random_token_mdp
from ._declare import cells_of
from ._loss_runs import bandit, connected

if TYPE_CHECKING:
    from torch import Tensor


cell = cells_of(__name__)


def drawn(seed: int) -> tuple[Array, PreferenceGame, float, Array, np.random.Generator]:
    """A bandit, its beta, a law q with full support, and the generator for more."""
    rewards, game = bandit(seed)
    rng = np.random.default_rng([seed, 3])
    beta, n = float(rng.uniform(0.3, 2)), len(game)
    return rewards, game, beta, 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n, rng


def population(game: PreferenceGame, rng: np.random.Generator) -> tuple[Pairs, Array]:
    """Pairs that connect all responses with their probabilities, and the same as expected wins (n, n), of sum 1."""
    y = connected(len(game), len(game), rng)
    pairs = Pairs(y, game.P[y[:, 0], y[:, 1]], rng.random(len(y)) + 0.5)
    wins = np.zeros((len(game), len(game)))
    wins[y[:, 0], y[:, 1]] = pairs.weight * pairs.preferred
    wins[y[:, 1], y[:, 0]] = pairs.weight * (1 - pairs.preferred)
    return pairs, wins


def bounded(wins: Array) -> float:
    """The strength up to which optimism has a finite minimum whatever law it calibrates on: a set of responses that
    moves away from the rest gains at most that, and pays with the surprise of at least one pair."""
    either = np.minimum(wins, wins.T)
    return float(either[either > 0].min())


def tensor(x: Any) -> Tensor:
    import torch

    return torch.tensor(np.asarray(x))


# ---- the value and its two forms -------------------------------------------------------------------------------------


def value_identity(*, seed: int, fault: str = "none", law: str = "any") -> dict[str, Any]:
    """J*(r) - (E_q[r] - beta E_q[log pi_r/ref]) at random q, or at q = ref; J* is also J(r, pi_r), multiplied out.

    fault  beta_dropped; beta_twice; minus: the sign of the second term; own_reward: E_{pi_r}[r] in place of E_q[r]
    """
    rewards, game, beta, _, rng = drawn(seed)
    n = len(game)
    pi, log_pi = policy_of(rewards, game.log_reference, beta)
    ratio = log_pi - game.log_reference
    best = float(best_value(rewards, game.log_reference, beta))
    errors = [best - float(pi @ (rewards - beta * ratio))]
    scale = {"beta_dropped": 1.0, "beta_twice": beta**2, "minus": -beta}.get(fault, beta)
    laws = rng.dirichlet(np.ones(n), size=6) if law == "any" else game.reference[None]
    for q in laws:
        mean = pi @ rewards if fault == "own_reward" else q @ rewards
        errors.append(best - float(mean - scale * (q @ ratio)))
    return {"errors": errors}


def two_forms(*, seed: int, sign: Sign, fault: str = "none") -> dict[str, Any]:
    """VPO's policy form at pi_r against its reward form at r + c, for random rewards r and constants c.

    fault  wrong_sign; beta_dropped: the calibration term without beta; own_responses: y_cal from pi_r;
           uncalibrated: the reward form at r + c itself
    """
    _, game, beta, q, rng = drawn(seed)
    pairs, wins = population(game, rng)
    p, w = pairs.tensors()
    alpha, ref = float(rng.uniform(0.1, 2)), tensor(game.log_reference)
    errors = []
    for r in rng.normal(size=(4, len(game))) * 2:
        pi, log_pi = policy_of(r, game.log_reference, beta)
        policy = vpo_loss(
            gather(tensor(log_pi), pairs),
            gather(ref, pairs),
            tensor(log_pi),
            ref,
            p,
            w,
            tensor(pi if fault == "own_responses" else q),
            beta=beta,
            alpha=alpha / beta if fault == "beta_dropped" else alpha,
            sign=-sign if fault == "wrong_sign" else sign,  # type: ignore[arg-type]
        ).item()
        shifted = r + rng.normal() * 3
        reward = float(
            reward_objective(shifted, wins, game.log_reference, q, beta=beta, alpha=alpha, sign=sign)
        )
        if fault == "uncalibrated":
            value = best_value(shifted, game.log_reference, beta)
            reward = float(comparison_loss(wins, shifted) - sign * alpha * value)
        errors.append(policy - reward)
    return {"errors": errors}


def two_fits(*, seed: int, sign: Sign, share: float, fault: str = "none") -> dict[str, Any]:
    """log pi at the minimum of the policy form (autograd) against the reward form (Newton in NumPy); at alpha = 0
    against DPO's closed form. alpha = share of `bounded`.

    fault  wrong_sign; beta_dropped; other_law: y_cal from the reference; bonus: alpha > 0 where 0 is promised
    """
    rewards, game, beta, q, rng = drawn(seed)
    pairs, wins = population(game, rng)
    p, w = pairs.tensors()
    ref, table = tensor(game.log_reference), SoftmaxTable(len(game))
    alpha = share * bounded(wins)
    used = {"beta_dropped": alpha * beta, "bonus": bounded(wins) / 4}.get(fault, alpha)
    law = tensor(game.reference if fault == "other_law" else q)

    def loss(lp: Tensor) -> Tensor:
        return vpo_loss(
            gather(lp, pairs),
            gather(ref, pairs),
            lp,
            ref,
            p,
            w,
            law,
            beta=beta,
            alpha=used,
            sign=-sign if fault == "wrong_sign" else sign,  # type: ignore[arg-type]
        )

    start = dpo_solution(rewards, game.log_reference, beta)[1]
    found = table.log_probabilities(fit(loss, table, start, tolerance=1e-12).theta).numpy()
    if alpha == 0:
        return {"error": float(np.abs(found - start).max())}
    numpy = vpo_rewards(wins, game.log_reference, q, beta=beta, alpha=alpha, sign=sign, box=40.0)
    return {"error": float(np.abs(found - policy_of(numpy.rewards, game.log_reference, beta)[1]).max())}


def calibration_slope(*, seed: int, sign: Sign, fault: str = "none") -> dict[str, Any]:
    """The expected gradient of VPO's term in the logits against sign alpha beta (pi_cal - pi).

    fault  own_responses: y_cal ~ pi, drawn anew at each gradient (a constant law for the gradient); wrong_sign;
           beta_dropped
    """
    import torch

    _, game, beta, q, rng = drawn(seed)
    alpha = float(rng.uniform(0.1, 2))
    theta = torch.tensor(rng.normal(size=len(game)), requires_grad=True)
    log_pi = theta.log_softmax(0)
    pi = log_pi.detach().exp()
    law = pi if fault == "own_responses" else tensor(q)
    none = log_pi[:2].detach()[None]
    term = vpo_loss(
        none,
        none,
        log_pi,
        tensor(game.log_reference),
        torch.ones(1).double(),
        None,
        law,
        beta=beta,
        alpha=alpha / beta if fault == "beta_dropped" else alpha,
        sign=-sign if fault == "wrong_sign" else sign,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(term, theta)
    expected = sign * alpha * beta * (tensor(q) - pi)
    return {"errors": (gradient - expected).tolist()}


def value_path(*, seed: int, sign: Sign, alphas: Sequence[float], fault: str = "none") -> dict[str, Any]:
    """J*(r_alpha) - E_cal[r_alpha] along alphas, in the direction it should go, and its slope by finite differences
    against the implicit function's, sign (pi - q)^T H^+ (pi - q).

    fault  wrong_sign: the other sign is minimised; no_incentive: alpha = 0 whatever alpha is
    """
    _, game, beta, q, rng = drawn(seed)
    _, wins = population(game, rng)
    used = -sign if fault == "wrong_sign" else sign

    def solved(alpha: float) -> Array:
        incentive = 0.0 if fault == "no_incentive" else -used * alpha
        found = fit_rewards(wins, game.log_reference, beta, incentive=incentive, law=q, box=12.0)
        return calibrate(found.rewards, q)

    def value(alpha: float) -> float:
        return float(best_value(solved(alpha), game.log_reference, beta))

    values = np.array([value(a) for a in alphas])
    at = 0.3 * bounded(wins)
    h = at * 1e-3
    slope = (value(at + h) - value(at - h)) / (2 * h)
    r = solved(at)
    pi = policy_of(r, game.log_reference, beta)[0]
    lost = expit(r - r[:, None])
    curvature = (wins + wins.T) * lost * (1 - lost)
    H = np.diag(curvature.sum(1)) - curvature - sign * at / beta * (np.diag(pi) - np.outer(pi, pi))
    implicit = sign * float((pi - q) @ np.linalg.pinv(H, rcond=1e-10) @ (pi - q))
    steps = sign * np.diff(values)
    return {"steps": steps, "moved": float(steps.sum()), "slope": (slope - implicit) / (1 + abs(implicit))}


def imitation(*, seed: int, strengths: Sequence[float], fault: str = "none") -> dict[str, Any]:
    """max |pi - pi_base| of the pessimist at growing strengths, N = 1: the law of the chosen responses is to be
    imitated.

    fault  wrong_sign; rejected: the rejected responses are imitated
    """
    _, game, beta, _, rng = drawn(seed)
    _, wins = population(game, rng)
    base = chosen_law(wins)
    law = chosen_law(wins.T) if fault == "rejected" else base
    distances = []
    for strength in strengths:
        c = -strength if fault == "wrong_sign" else strength
        r = fit_rewards(wins, game.log_reference, beta, incentive=c, law=law, box=40.0).rewards
        distances.append(float(np.abs(policy_of(r, game.log_reference, beta)[0] - base).max()))
    return {"distances": distances}


# ---- XPO is VPO; RPO is VPO ------------------------------------------------------------------------------------------


def xpo_is_vpo(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """XPO's loss on pairs (pi_t, ref) against VPO's with sign 1, alpha / beta and the second responses to calibrate:
    their difference at random policies less that at the first (constant), and log pi at both minima.

    fault  minus: -alpha log pi; beta_twice: alpha for alpha / beta; own_samples: VPO calibrates on the first responses
    """
    rewards, game, beta, current, rng = drawn(seed)
    n, joint = len(game), np.outer(current, game.reference)
    i, j = (x.reshape(-1) for x in np.indices((n, n)))
    pairs = Pairs(np.column_stack([i, j]), game.P[i, j], joint.reshape(-1))
    wins = joint * game.P + joint.T * game.P
    alpha = 0.5 * bounded(wins) * beta * min(beta, 1.0)
    p, w = pairs.tensors()
    ref, table = tensor(game.log_reference), SoftmaxTable(n)
    anchor = gather(ref, pairs)

    def xpo(lp: Tensor) -> Tensor:
        policy = gather(lp, pairs)
        if fault == "minus":
            return xpo_loss(policy, anchor, p, w, beta=beta, alpha=0.0) - alpha * (w * policy[:, 1]).sum()
        return xpo_loss(policy, anchor, p, w, beta=beta, alpha=alpha)

    def vpo(lp: Tensor) -> Tensor:
        policy, side = gather(lp, pairs), 0 if fault == "own_samples" else 1
        strength = alpha if fault == "beta_twice" else alpha / beta
        return vpo_loss(
            policy, anchor, policy[:, side], anchor[:, side], p, w, w, beta=beta, alpha=strength, sign=1
        )

    laws = tensor(np.log(0.95 * rng.dirichlet(np.ones(n), size=5) + 0.05 / n))
    differences = np.array([(xpo(lp) - vpo(lp)).item() for lp in laws])
    start = dpo_solution(rewards, game.log_reference, beta)[1]
    minima = [
        table.log_probabilities(fit(f, table, start, tolerance=1e-12).theta).numpy() for f in (xpo, vpo)
    ]
    return {
        "constant": differences - differences[0],
        "minima": float(np.abs(minima[0] - minima[1]).max()),
    }


def rpo_is_vpo(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """log pi at the minimum of RPO's loss with the chosen responses (autograd) and of VPO's reward form offline,
    calibrated on the same law (Newton's method in NumPy).

    fault  wrong_sign: VPO online; eta_twice: RPO with eta beta for eta; rejected: VPO calibrated on the rejected
    """
    rewards, game, beta, _, rng = drawn(seed)
    pairs, wins = population(game, rng)
    p, w = pairs.tensors()
    eta, table = 0.5 * bounded(wins), SoftmaxTable(len(game))
    anchor = gather(tensor(game.log_reference), pairs)
    law = chosen_law(wins.T if fault == "rejected" else wins)

    def rpo(lp: Tensor) -> Tensor:
        used = eta * beta if fault == "eta_twice" else eta
        return rpo_loss(gather(lp, pairs), anchor, p, w, beta=beta, eta=used)

    start = dpo_solution(rewards, game.log_reference, beta)[1]
    ours = table.log_probabilities(fit(rpo, table, start, tolerance=1e-12).theta).numpy()
    sign: Sign = 1 if fault == "wrong_sign" else -1
    vpo = vpo_rewards(wins, game.log_reference, law, beta=beta, alpha=eta, sign=sign, box=40.0)
    return {"error": float(np.abs(ours - policy_of(vpo.rewards, game.log_reference, beta)[1]).max())}


# ---- RPO -------------------------------------------------------------------------------------------------------------


def saddle(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Both sides of RPO's saddle on 60 sampled comparisons of 5 responses: the minimum over rewards of the minimax form
    by Newton's method; and L-BFGS over policies for the maximum of the adversary's minimum (`adversarial_value`), which
    knows nothing of pi_r.

    policy: from the reward side against the policy side. fault (of the reward side)  rejected: pi_base from the
    rejected; eta_twice: eta beta for eta; no_adversary: eta = 0, plain DPO
    """
    rng = np.random.default_rng([seed, 4])
    n, beta, eta, box = 5, 0.5, 0.8, 8.0
    rewards, ref = rng.normal(size=n), 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n
    y = rng.integers(n, size=(60, 2))
    won = rng.random(60) < expit(rewards[y[:, 0]] - rewards[y[:, 1]])
    wins = np.zeros((n, n))
    np.add.at(wins, (np.where(won, y[:, 0], y[:, 1]), np.where(won, y[:, 1], y[:, 0])), 1.0)
    np.fill_diagonal(wins, 0.0)
    base, log_ref = chosen_law(wins), np.log(ref)

    def climb(u: Array) -> tuple[float, Array]:
        pi, log_pi = policy_of(u, np.zeros(n), 1.0)
        value, r = adversarial_value(log_pi, wins, log_ref, base, beta=beta, eta=eta, box=box)
        slope = eta * (r - beta * (log_pi - log_ref))
        return -value, -pi * (slope - pi @ slope)

    options = {"ftol": 0.0, "gtol": 1e-12, "maxiter": 2000, "maxcor": 20}
    top = minimize(climb, log_ref, jac=True, method="L-BFGS-B", options=options)
    used = {"eta_twice": eta * beta, "no_adversary": 0.0}.get(fault, eta)
    law = chosen_law(wins.T) if fault == "rejected" else base
    found = rpo_rewards(wins, log_ref, law, beta=beta, eta=used, box=box)
    ours = policy_of(found.rewards, log_ref, beta)[0]
    theirs = policy_of(top.x, np.zeros(n), 1.0)[0]
    return {"value": float(found.value + top.fun), "policy": float(np.abs(ours - theirs).max())}


def rpo_two_forms(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """RPO's loss at pi_r against the minimax objective at r less eta beta E_base[log ref], on a token tree.

    fault  rejected; eta_twice: eta beta^2; mean_tokens: the imitation term averages over tokens
    """
    rng = np.random.default_rng([seed, 3])
    mdp = random_token_mdp(2, 3, seed=seed)
    table, log_ref = PrefixTree(mdp.kernel), mdp.leaf_log_probabilities()
    n, lengths = table.responses, table.lengths
    beta, eta = float(rng.uniform(0.3, 2)), float(rng.uniform(0.1, 2))
    y = connected(n, n, rng)
    pairs = Pairs(y, rng.random(len(y)), rng.random(len(y)) + 0.5)
    p, w = pairs.tensors()
    wins = np.zeros((n, n))
    wins[y[:, 0], y[:, 1]] = pairs.weight * pairs.preferred
    wins[y[:, 1], y[:, 0]] = pairs.weight * (1 - pairs.preferred)
    base = chosen_law(wins)
    errors = []
    for r in rng.normal(size=(4, n)):
        log_pi = tensor(policy_of(r, log_ref, beta)[1])
        policy, anchor = gather(log_pi, pairs), gather(tensor(log_ref), pairs)
        imitated, law, used = None, None, eta
        if fault == "rejected":
            imitated, law = log_pi, tensor(chosen_law(wins.T))
        elif fault == "mean_tokens":
            imitated, law = log_pi / tensor(lengths), tensor(base)
        elif fault == "eta_twice":
            used = eta * beta
        loss = rpo_loss(policy, anchor, p, w, imitated, law, beta=beta, eta=used).item()
        objective = comparison_loss(wins, r) + eta * (best_value(r, log_ref, beta) - base @ r)
        errors.append(loss - float(objective - eta * beta * base @ log_ref))
    return {"errors": errors}


def imitation_slope(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """d/dr [beta log Z(r) - E_base r] by autograd against pi_r - pi_base. fault  reference, beta_twice, reversed."""
    import torch

    rewards, game, beta, base, _ = drawn(seed)
    r = torch.tensor(rewards, requires_grad=True)
    scale = beta**2 if fault == "beta_twice" else beta
    value = scale * (tensor(game.log_reference) + r / scale).logsumexp(0)
    law = game.reference if fault == "reference" else base
    value = value - r @ tensor(law)
    (gradient,) = torch.autograd.grad(value if fault != "reversed" else -value, r)
    return {"errors": gradient.numpy() - (policy_of(rewards, game.log_reference, beta)[0] - base)}


def unseen(*, seed: int, etas: Sequence[float], fault: str = "none") -> dict[str, Any]:
    """A response that nobody compared, and one that was compared once in N and won.

    unseen: pi(u) - pi_base(u) at each eta, from two starts; lucky: pi(l) - pi_base(l) - sigma(r_j - r_l) / (N eta);
    falls: how much pi(l) falls from one eta to the next. fault  dpo: eta = 0 throughout; bonus: the sign of eta,
    optimism; reference: the reference is imitated
    """
    rng = np.random.default_rng([seed, 5])
    n, N, beta = 4, 200, float(rng.uniform(0.2, 1))
    ref = 0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n
    rewards, log_ref = rng.normal(size=n), np.log(ref)
    base = 0.6 * rng.dirichlet(np.ones(n)) + 0.4 / n
    wins = np.zeros((n, n))  # response 2 is the lucky one, response 3 unseen
    share = expit(rewards[0] - rewards[1])
    wins[0, 1], wins[1, 0], wins[2, 1] = (N - 1) * share / N, (N - 1) * (1 - share) / N, 1 / N
    unseen, lucky, masses = [], [], []
    for eta in etas:
        used = {"dpo": 0.0, "bonus": -eta}.get(fault, eta)
        law = ref if fault == "reference" else base
        for start in ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]):
            r = fit_rewards(wins, log_ref, beta, incentive=used, law=law, box=60.0, start=start).rewards
            pi = policy_of(r, log_ref, beta)[0]
            unseen.append(float(pi[3] - base[3]))
        lucky.append(float(pi[2] - base[2] - expit(r[1] - r[2]) / (N * eta)))
        masses.append(float(pi[2]))
    return {"unseen": unseen, "lucky": lucky, "falls": -np.diff(masses)}


def offline_gaps(
    *, seed: int, Ns: Sequence[int], method: str = "rpo", c: float = 0.1, fixed: bool = False
) -> dict[str, Any]:
    """J(pi*) - J(pi_hat) after N comparisons of three responses: N - 1 of the first two, and one that the third won.

    The third is the worst, and its optimal mass is below 1e-5: pi* is covered. method  rpo: pi_base = the chosen
    responses; vpo: pi_cal = all responses of the data. eta = c / sqrt(N), or c when fixed; c = 0 is DPO. beta = 0.05,
    and rewards differ by at most 2 in the class.
    """
    rng = np.random.default_rng([seed, 1])
    beta, log_ref = 0.05, np.log(np.full(3, 1 / 3))
    rewards = np.array([rng.uniform(0.3, 0.6), 0.0, -rng.uniform(0.3, 0.6)])
    N = np.asarray(Ns)
    k = rng.binomial(N - 1, expit(rewards[0] - rewards[1]))
    wins = np.zeros((len(N), 3, 3))
    wins[:, 0, 1], wins[:, 1, 0], wins[:, 2, 1] = k, N - 1 - k, 1
    law = (
        chosen_law(wins) if method == "rpo" else (chosen_law(wins) + chosen_law(wins.transpose(0, 2, 1))) / 2
    )
    eta = np.full(len(N), c) if fixed else c / np.sqrt(N)
    found = rpo_rewards(wins, log_ref, law, beta=beta, eta=eta, box=2.0)
    log_pi = policy_of(found.rewards, log_ref, beta)[1]
    return {"gaps": shortfall(log_pi, rewards, log_ref, beta), "mass": np.exp(log_pi[:, 2])}


# ---- rounds online ---------------------------------------------------------------------------------------------------

BETA, BOX, BATCH = 0.05, 2.0, 8


class ReferencePairs(VPO):
    """VPO whose second responses come from the reference, as XPO's do."""

    def _second(self, policy: Array) -> Array:
        return self.reference


class Pessimist(XPO):
    """XPO with -alpha log pi."""

    def _incentive(self) -> tuple[float, Array]:
        incentive, law = super()._incentive()
        return -incentive, law


def hidden(seed: int, world: str) -> tuple[Array, Array]:
    """Three responses, of which the reference shows the first once in exp(10) draws: rewards and log ref (3,) each.

    world  best: the first is better by at least 0.6, more than its divergence of 10 beta = 0.5; worst: it is no better
           than the third
    """
    rng = np.random.default_rng([seed, 1])
    first = rng.uniform(0.9, 1.1) if world == "best" else rng.uniform(-0.2, 0.0)
    rewards = np.array([first, rng.uniform(0.1, 0.3), 0.0])
    rest, rare = rng.uniform(0.3, 0.7), np.exp(-0.5 / BETA)
    return rewards, np.log([rare, (1 - rare) * rest, (1 - rare) * (1 - rest)])


def online(
    *,
    seed: int,
    Ts: Sequence[int],
    world: str,
    method: str,
    c: float = 0.0,
    size: int = 48,
    tuned: bool = True,
) -> dict[str, Any]:
    """Cumulative regret of `size` runs (a block of seeds) after each of Ts comparisons, (size, len(Ts)), 8 a round.

    method  passive: iterative DPO, both responses from the policy; xpo: alpha = c beta / sqrt(T); vpo: alpha = c
            sqrt(T); vpo_reference: the same, the second response from the reference; pessimist: XPO with a minus;
            vpo_pessimist. A run for every T where alpha depends on it, else one run
    """
    seeds = [seed * size + k for k in range(size)]
    worlds = [hidden(s, world) for s in seeds]
    rewards, log_ref = (np.array(x) for x in zip(*worlds, strict=True))
    general: dict[str, Any] = {"box": BOX, "seeds": seeds, "batch": BATCH}

    def start(T: int) -> OnlinePreferences:
        if method == "passive":
            return OnlinePreferences(rewards, log_ref, BETA, **general)
        if method in ("xpo", "pessimist"):
            kind = XPO if method == "xpo" else Pessimist
            return kind(rewards, log_ref, BETA, alpha=c * BETA / np.sqrt(T), **general)
        sign: Sign = -1 if method == "vpo_pessimist" else 1
        which = ReferencePairs if method == "vpo_reference" else VPO
        return which(rewards, log_ref, BETA, alpha=c * np.sqrt(T), sign=sign, **general)

    if method == "passive" or c == 0:
        course = start(max(Ts)).advance(max(Ts) // BATCH).regret.cumsum(axis=1)
        return {"regret": BATCH * course[:, np.asarray(Ts) // BATCH - 1]}
    return {"regret": BATCH * np.stack([start(T).advance(T // BATCH).regret.sum(axis=1) for T in Ts], axis=1)}


def promises(*, seed: int, T: int, method: str = "xpo") -> dict[str, Any]:
    """In every round: what the fitted reward promises, J*(r_t) - E_q[r_t], less what optimism guarantees for it,
    J*(r*) - E_q[r*] - (ell(r*) - ell(r_t)) / incentive. method  xpo; pessimist; passive: XPO's pairs, no bonus."""
    size, c = 8, 1.0
    seeds = [seed * size + k for k in range(size)]
    rewards, log_ref = (np.array(x) for x in zip(*[hidden(s, "best") for s in seeds], strict=True))
    alpha = c * BETA / np.sqrt(T)
    kind = Pessimist if method == "pessimist" else XPO
    run = kind(rewards, log_ref, BETA, alpha=0.0 if method == "passive" else alpha, box=BOX, seeds=seeds)
    slack = []
    for t in range(1, T + 1):
        run.advance(1)
        strength, q = alpha * t / BETA, run.second_counts / t
        promised, true = (best_value(r, log_ref, BETA) - (q * r).sum(1) for r in (run.fitted, rewards))
        lost = comparison_loss(run.wins, rewards) - comparison_loss(run.wins, run.fitted)
        slack.append(float((promised - true + lost / strength).min()))
    return {"slack": min(slack), "scale": float(strength)}
