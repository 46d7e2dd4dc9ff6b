r"""Laws over whole responses on a prefix tree, by enumeration of its leaves.

On a `TreeKernel` with branching B and horizon H a response to a prompt (a root) is either a word of h < H
tokens closed by the end action, or a word of H tokens cut by the horizon. So the leaves of one prompt are
the nodes of the full B-ary tree of depth H; they are numbered by length, then lexicographically, and there
are L = 1 + B + ... + B^H of them. Shapes are (roots, L). Leaves that the action mask forbids have
probability 0 under every policy.

What happens after the end must not matter: the rewards of the "ended" state must be the same for all its
available actions (they are zero in a token MDP). Prompts are the roots, so that the initial law may not
start "ended".

    sequence_law     pi(y|x) = prod_h pi_h(y_h | x, y_<h)
    leaf_returns     R(x, y)
    sequence_gibbs   pi*(y|x) = ref(y|x) exp(R(x,y) / beta) / Z(x), maximising E_pi[R] - beta KL(pi || ref)

On a tree the Gibbs law is the sequence law of the soft policy (`soft.soft_value_iteration`): both maximise
the same objective, and the chain rule writes any law over responses as a policy. With stochastic
transitions it is not: there the Gibbs reweighting of trajectories would also tilt the transitions, which no
policy can. Hence trees only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...envs import FiniteMDP, Trajectories, TreeKernel
from ...envs.kernels import Array
from ...envs.mdp import Layered
from .policies import check_policy, check_reward, layer_mask, layer_probabilities
from .soft import check_temperature, soft_maximum


def tree_of(model: FiniteMDP) -> TreeKernel:
    """The model's prefix tree, or TypeError/ValueError where responses cannot be enumerated."""
    kernel = model.kernel
    if not isinstance(kernel, TreeKernel):
        raise TypeError(
            f"laws over responses need a prefix tree, but the kernel is a {type(kernel).__name__}; "
            "`return_law` and `trajectory_kl` work on every kernel"
        )
    if model.initial[0] > 0:
        raise ValueError(
            f"initial[0] is {model.initial[0]:.6g}: a response cannot start from the ended state"
        )
    return kernel


def leaf_blocks(kernel: TreeKernel) -> list[slice]:
    """Where the responses of h tokens lie among the L leaves of a prompt, for h = 0, ..., H."""
    ends = np.cumsum([kernel.branching**h for h in range(kernel.horizon + 1)])
    return [slice(int(b - kernel.branching**h), int(b)) for h, b in enumerate(ends)]


def leaf_tokens(kernel: TreeKernel, leaf: int) -> tuple[int, ...]:
    """The tokens (without the end action) of leaf number `leaf` of any prompt."""
    for length, block in enumerate(leaf_blocks(kernel)):
        if 0 <= leaf < block.stop:
            word = leaf - block.start
            return tuple(word // kernel.branching**k % kernel.branching for k in reversed(range(length)))
    raise ValueError(f"leaf is {leaf}; a prompt has the leaves 0..{leaf_blocks(kernel)[-1].stop - 1}")


def sequence_law(model: FiniteMDP, policy: Layered) -> Array:
    """pi(y|x) for every prompt x and response y: (roots, L), rows sum to 1."""
    kernel, policy = tree_of(model), check_policy(model, policy)
    blocks = leaf_blocks(kernel)
    law = np.empty((kernel.roots, blocks[-1].stop))
    live = np.ones((kernel.roots, 1))
    for h in range(kernel.horizon):
        pi = layer_probabilities(policy[h], kernel.n_actions)[1:].reshape(kernel.roots, -1, kernel.n_actions)
        law[:, blocks[h]] = live * pi[..., -1]
        live = (live[..., None] * pi[..., :-1]).reshape(kernel.roots, -1)
    law[:, blocks[-1]] = live
    return law


def leaf_returns(model: FiniteMDP, reward: Layered | None = None) -> Array:
    """R(x, y) = sum_h r_h along every response: (roots, L)."""
    kernel, rewards = tree_of(model), check_reward(model, reward)
    blocks = leaf_blocks(kernel)
    idle = _idle_rewards(model, rewards)
    returns = np.empty((kernel.roots, blocks[-1].stop))
    live = np.zeros((kernel.roots, 1))
    for h in range(kernel.horizon):
        r = rewards[h][1:].reshape(kernel.roots, -1, kernel.n_actions)
        returns[:, blocks[h]] = live + r[..., -1] + idle[h + 1 :].sum()
        live = (live[..., None] + r[..., :-1]).reshape(kernel.roots, -1)
    returns[:, blocks[-1]] = live
    return returns


def _idle_rewards(model: FiniteMDP, rewards: Layered) -> Array:
    """(H,) the reward of the ended state at each step (0 at the first, which never is ended)."""
    idle = np.zeros(model.horizon)
    for h in range(1, model.horizon):
        mask = layer_mask(model, h)
        available = rewards[h][0] if mask is None else rewards[h][0][mask[0]]
        if np.ptp(available) > 0:
            raise ValueError(
                f"reward[h={h}, s=0] depends on the action: after the end nothing may matter, "
                "so give the ended state one reward for all its available actions"
            )
        idle[h] = available[0]
    return idle


def leaf_trajectories(model: FiniteMDP) -> Trajectories:
    """The trajectory of every leaf, prompt by prompt: (roots * L, H); after the end the lowest available action."""
    kernel = tree_of(model)
    blocks = leaf_blocks(kernel)
    shape = (kernel.roots, blocks[-1].stop, kernel.horizon)
    states, actions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for h in range(1, kernel.horizon):
        mask = layer_mask(model, h)
        actions[..., h] = 0 if mask is None else mask[0].argmax()
    for length, block in enumerate(blocks):
        word = np.arange(block.stop - block.start)
        root = np.arange(kernel.roots)[:, None]
        for h in range(min(length + 1, kernel.horizon)):
            prefix = word // kernel.branching ** (length - h)
            states[:, block, h] = 1 + root * kernel.branching**h + prefix
            token = word // kernel.branching ** max(length - h - 1, 0) % kernel.branching
            actions[:, block, h] = token if h < length else kernel.branching
    return Trajectories(states.reshape(-1, kernel.horizon), actions.reshape(-1, kernel.horizon))


@dataclass(frozen=True, eq=False)
class SequenceGibbs:
    """law (roots, L) = pi*; values (roots,) = beta log Z(x); value = <rho, values>; returns (roots, L) = R."""

    law: Array
    values: Array
    value: float
    beta: float
    returns: Array = field(repr=False)


def sequence_gibbs(
    model: FiniteMDP, reference: Layered, beta: float, reward: Layered | None = None
) -> SequenceGibbs:
    """The Gibbs law over responses by enumeration; arguments as in `soft_value_iteration`, on a tree."""
    beta = check_temperature(beta)
    returns = leaf_returns(model, reward)
    values, law = soft_maximum(returns, sequence_law(model, reference), beta)
    return SequenceGibbs(law, values, float(model.initial[1:] @ values), beta, returns)
