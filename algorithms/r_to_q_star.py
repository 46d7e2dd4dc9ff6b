r"""From r to Q*: what DPO says about single tokens.

R. Rafailov, J. Hejna, R. Park, C. Finn, "From r to Q*: Your Language Model is Secretly a Q-Function", COLM 2024
(arXiv 2404.12358). Writing is an MDP: a state is a prefix, an action a token, transitions are certain, V* = 0 after the
end, gamma = 1. With a reward r(s, a) and a KL penalty beta to the reference

  V*(s)   = beta log sum_a ref(a|s) exp(Q*(s,a) / beta),    Q*(s,a) = r(s,a) + V*(s')      `planning.soft` computes both
  pi*     = ref exp((Q* - V*) / beta),    so    beta log pi*/ref = Q* - V* = r + V*(s') - V*(s)       `token_rewards`
  sum_t beta log pi*/ref (a_t|s_t) = sum_t r(s_t, a_t) - V*(s_0)                                      (telescoping)

so that the Bradley-Terry difference of two responses to one prompt is free of V*(s_0), and DPO on whole responses
(`token_dpo_loss`) is a method for the token MDP: its population minimiser has the optimal conditionals of every prefix.
Turned around, every policy is optimal for a reward, one for each choice of values (`inverse_soft_q`), and its logits
are the optimal Q of one of them, the reference's part taken out (`q_function`). Rewards that differ by a potential,
r + Phi(s') - Phi(s) with Phi = 0 after the end, have the same optimum (`shaped`).

Search by sum_t beta log pi*/ref is search by rewards so far plus V* of the prefix, for beams of any width
(`beam_search`): the totals differ by V*(s_0). Among whole responses it ranks by their reward; a beam that does not hold
all prefixes need not find the best. Search by log pi* itself is the same for the reward r + beta log ref.

A layered quantity is x[h]: (S_h, A), values V[h]: (S_h,) for h = 0, ..., H; beta > 0 in units of reward. With
stochastic transitions V*(s') is an expectation: `inverse_soft_q` and `shaped` hold as they stand, telescoping only on
average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import logsumexp

from ..envs.kernels import Array, Index
from ..envs.mdp import FiniteMDP, Layered
from .cpl import advantages, segment_scores
from .optimisation.losses import average, check_positive, logistic_loss
from .planning.sequences import tree_of
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def token_dpo_loss(
    policy: Tensor,
    reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """DPO from token log-probabilities (..., 2, T): the logistic loss of the difference of summed token rewards.

    mask (..., 2, T) bool, False where a response has no token; None = all count. It is `dpo_loss` of the sums.
    """
    rewards = segment_scores(policy, reference, mask, alpha=check_positive(beta, "beta"))
    if rewards.shape[-1:] != (2,):
        raise ValueError(f"policy has shape {tuple(policy.shape)}; comparisons of tokens are (..., 2, T)")
    return average(logistic_loss(rewards[..., 0] - rewards[..., 1], preferred), weight)


def token_rewards(policy: Layered, reference: Layered, beta: float) -> list[Array]:
    """beta log pi/ref of every token, layered (S_h, A), the Q - V for which `policy` is optimal; 0 where ref is 0."""
    return advantages(policy, check_positive(beta, "beta"), reference)


def q_function(logits: Layered, reference: Layered, beta: float) -> tuple[list[Array], list[Array]]:
    """Q (S_h, A) and V (S_h,), h < H, that the logits of a policy stand for: Q = beta (logits - log ref),
    V = beta log sum_a exp(logits).

    With V = 0 after the last step the policy softmax(logits) is optimal for r = Q - P V. Q is -inf, and the logit must
    be, where the reference has no mass.
    """
    beta = check_positive(beta, "beta")
    Q, V = [], []
    for h, (x, ref) in enumerate(zip(logits, reference, strict=True)):
        if (outside := (ref == 0) & (x > -np.inf)).any():
            s, a = np.argwhere(outside)[0]
            raise ValueError(
                f"logits[h={h}, s={s}, a={a}] is {x[s, a]:.6g} where the reference has no mass; it must be -inf"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            Q.append(np.where(ref > 0, beta * (x - np.log(ref)), -np.inf))
        V.append(beta * logsumexp(x, axis=1))
    return Q, V


def inverse_soft_q(
    model: FiniteMDP, policy: Layered, reference: Layered, beta: float, values: Layered | None = None
) -> list[Array]:
    """The reward for which `policy` is the KL-regularised optimum with the given values, layered (S_h, A).

    r_h = beta log pi/ref + V_h - P_h V_{h+1}. values: V[h] (S_h,), h = 0..H, with V[H] = 0; None = 0 everywhere, the
    reward beta log pi/ref itself. It is one reward a choice of V, and these are all that there are. On a token MDP V of
    the ended state is 0, too, else the end is paid.
    """
    layers = token_rewards(policy, reference, beta)
    return layers if values is None else shaped(model, [-v for v in values], layers)


def shaped(model: FiniteMDP, potential: Layered, reward: Layered | None = None) -> list[Array]:
    """r_h + P_h Phi_{h+1} - Phi_h, layered (S_h, A): same optimum, values less by Phi.

    potential  Phi[h] (S_h,), h = 0..H, with Phi[H] = 0: what is left at the end would be a reward of its own
    reward     in place of the model's own
    """
    sizes = model.sizes
    if len(potential) != model.horizon + 1 or any(
        np.shape(p) != (n,) for p, n in zip(potential, sizes, strict=True)
    ):
        raise ValueError(
            f"potential has shapes {[np.shape(p) for p in potential]}; expected {[(n,) for n in sizes]}"
        )
    if np.any(potential[-1]):
        s = int(np.flatnonzero(potential[-1])[0])
        raise ValueError(
            f"potential[h={model.horizon}, s={s}] is {potential[-1][s]:.6g}; it must be 0 after the last step"
        )
    return [
        r + model.kernel.expect(h, np.asarray(potential[h + 1])) - np.asarray(potential[h])[:, None]
        for h, r in enumerate(model.reward if reward is None else reward)
    ]


class Beam(NamedTuple):
    """What `beam_search` keeps, best first: leaves (m,) among the prompt's responses, totals (m,), and the trace: for
    each step the tuple of what was kept, (length, word, ended) each."""

    leaves: Index
    totals: Array
    trace: list[tuple[tuple[int, int, bool], ...]]


def beam_search(
    model: FiniteMDP, scores: Layered, width: int, values: Layered | None = None, prompt: int = 0
) -> Beam:
    """The responses that a beam of `width` hypotheses ends with, on a prefix tree.

    scores  layered (S_h, A), added up along a hypothesis
    values  V[h] (S_h,), h = 0..H: what is added to the total of a hypothesis that is not finished; None = nothing
    At each step all live hypotheses are extended by all tokens and the end, finished ones stay, and the best `width`
    are kept. Ties go to finished hypotheses, then to what ranked first, then to the smaller token.
    """
    if width < 1:
        raise ValueError(f"width is {width}; a beam holds at least 1 hypothesis")
    tree = tree_of(model)
    if not 0 <= prompt < tree.roots:
        raise ValueError(f"prompt is {prompt}; the model has prompts 0..{tree.roots - 1}")
    k, H = tree.branching, tree.horizon
    starts = np.cumsum([0, *(k**h for h in range(H))])  # the first leaf of each length
    beam: list[tuple[float, float, int, int, bool]] = [
        (0.0, 0.0, 0, 0, False)
    ]  # rank, total, length, word, ended
    trace = []
    for h in range(H):
        candidates = [b for b in beam if b[4]]
        for _, total, _, word, _ in (b for b in beam if not b[4]):
            row = np.asarray(scores[h])[1 + prompt * k**h + word]
            for a in range(k):
                child = word * k + a
                finished = h == H - 1  # by the horizon
                later = values is not None and not finished
                to_go = float(values[h + 1][1 + prompt * k ** (h + 1) + child]) if later else 0.0  # type: ignore[index]
                so_far = total + float(row[a])
                candidates.append((so_far + to_go, so_far, h + 1, child, finished))
            candidates.append((total + float(row[k]), total + float(row[k]), h, word, True))
        beam = sorted(candidates, key=lambda b: -b[0])[:width]
        trace.append(tuple(b[2:] for b in beam))
    leaves = np.array([starts[length] + word for _, _, length, word, _ in beam], dtype=np.int64)
    return Beam(leaves, np.array([b[1] for b in beam]), trace)


LOSS = LossSpec(
    name="r_to_q_star",
    title="DPO on tokens, as inverse soft Q-learning",
    paper="Rafailov et al., COLM 2024 (arXiv 2404.12358)",
    loss=token_dpo_loss,
)
