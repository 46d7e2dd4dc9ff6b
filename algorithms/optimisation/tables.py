r"""Policies whose every response can be written down, as functions of their parameters theta (torch, float64).

    SoftmaxTable   one logit a response: log pi(y|x) = theta_xy - log sum_y' exp theta_xy'
    PrefixTree     one logit a prefix and token: log pi(y|x) = sum_h log softmax(theta_{x, y_<h})(y_h), the form that a
                   language model has

Responses are numbered as the leaves of `sequences` (prompt by prompt, by length, then in the order of their words), so
that both tables give log-probabilities (prompts * L,) and the same index means the same response. theta is one flat
vector; a constant added to the logits of a prompt (of a prefix) changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...envs.kernels import Array, Kernel, TreeKernel
from ..planning.sequences import leaf_blocks

if TYPE_CHECKING:
    from torch import Tensor


class Table(Protocol):
    """log_probabilities(theta) is differentiable, (prompts * responses,); start(log_law) is a theta with that law."""

    @property
    def prompts(self) -> int: ...

    @property
    def responses(self) -> int: ...

    @property
    def size(self) -> int: ...

    def log_probabilities(self, theta: Tensor) -> Tensor: ...

    def start(self, log_law: Array | None = None) -> Tensor: ...


def _rows(log_law: Array, table: Table) -> Array:
    """(prompts, responses), finite, from (prompts * responses,) or (prompts, responses)."""
    rows = np.asarray(log_law, dtype=np.float64).reshape(-1)
    if rows.size != table.prompts * table.responses:
        raise ValueError(
            f"the law has {rows.size} entries; the table has {table.prompts} prompts of {table.responses} responses"
        )
    if not np.isfinite(rows).all():
        i = int(np.flatnonzero(~np.isfinite(rows))[0])
        raise ValueError(
            f"log_law[prompt {i // table.responses}, response {i % table.responses}] is {rows[i]}; "
            "a softmax gives every response mass"
        )
    return rows.reshape(table.prompts, table.responses)


@dataclass(frozen=True)
class SoftmaxTable:
    """One logit for each of `responses` responses to each of `prompts` prompts."""

    responses: int
    prompts: int = 1

    @property
    def size(self) -> int:
        return self.prompts * self.responses

    def log_probabilities(self, theta: Tensor) -> Tensor:
        return theta.reshape(self.prompts, self.responses).log_softmax(1).reshape(-1)

    def start(self, log_law: Array | None = None) -> Tensor:
        """theta of a law given by its logarithm (prompts * responses,); None = uniform."""
        import torch

        if log_law is None:
            return torch.zeros(self.size, dtype=torch.float64)
        return torch.tensor(_rows(log_law, self).reshape(-1))


@dataclass(frozen=True)
class PrefixTree:
    """One logit for each prefix and each of its k + 1 actions, k tokens and the end, on a `TreeKernel`.

    theta lies layer by layer, (roots * k^h, k + 1) each, prefixes in the order of the tree's states. A response of
    H tokens is cut by the horizon and has no end action.
    """

    kernel: Kernel

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, TreeKernel):
            raise TypeError(
                f"the kernel is a {type(self.kernel).__name__}; a prefix tree is a TokenMDP's, on a TreeKernel"
            )

    @property
    def tree(self) -> TreeKernel:
        assert isinstance(self.kernel, TreeKernel)
        return self.kernel

    @property
    def prompts(self) -> int:
        return self.tree.roots

    @property
    def responses(self) -> int:
        return leaf_blocks(self.tree)[-1].stop

    @cached_property
    def _layers(self) -> list[slice]:
        sizes = [(n - 1) * self.tree.n_actions for n in self.tree.sizes[:-1]]
        ends = np.cumsum(sizes)
        return [slice(int(e - n), int(e)) for n, e in zip(sizes, ends, strict=True)]

    @property
    def size(self) -> int:
        return self._layers[-1].stop

    def conditionals(self, theta: Tensor) -> list[Tensor]:
        """log pi_h(token | prefix), (roots * k^h, k + 1) for h = 0, ..., H-1."""
        return [theta[layer].reshape(-1, self.tree.n_actions).log_softmax(1) for layer in self._layers]

    def log_probabilities(self, theta: Tensor) -> Tensor:
        import torch

        roots, live, blocks = self.prompts, theta.new_zeros(self.prompts), []
        for log_pi in self.conditionals(theta):
            blocks.append((live + log_pi[:, -1]).reshape(roots, -1))
            live = (live[:, None] + log_pi[:, :-1]).reshape(-1)
        return torch.cat([*blocks, live.reshape(roots, -1)], dim=1).reshape(-1)

    def token_log_probabilities(self, theta: Tensor) -> Tensor:
        """(prompts * responses, H): log pi of each action, 0 after the last; the sum is log pi(y|x)."""
        return self.along(self.conditionals(theta))

    def along(self, layers: Sequence[Tensor]) -> Tensor:
        """Layered (roots * k^h, k + 1) quantities written out along every response: (prompts * responses, H)."""
        import torch

        roots, H = self.prompts, self.tree.horizon
        live, blocks = layers[0].new_zeros(roots, 0), []
        for h, x in enumerate(layers):
            ended = torch.cat([live, x[:, -1:], x.new_zeros(len(x), H - h - 1)], dim=1)
            blocks.append(ended.reshape(roots, -1, H))
            k = x.shape[1] - 1
            live = torch.cat([live.repeat_interleave(k, dim=0), x[:, :-1].reshape(-1, 1)], dim=1)
        return torch.cat([*blocks, live.reshape(roots, -1, H)], dim=1).reshape(-1, H)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of actions of each response, its end included: (prompts * responses,)."""
        H = self.tree.horizon
        blocks = leaf_blocks(self.tree)
        one = np.concatenate([np.full(b.stop - b.start, min(h + 1, H)) for h, b in enumerate(blocks)])
        return np.tile(one, self.prompts)

    def start(self, log_law: Array | None = None) -> Tensor:
        """theta whose law over responses is the given one, by the chain rule; None = all tokens equally likely."""
        import torch

        if log_law is None:
            return torch.zeros(self.size, dtype=torch.float64)
        rows, blocks = _rows(log_law, self), leaf_blocks(self.tree)
        layers: list[Array] = []
        below = rows[:, blocks[-1]].reshape(-1)
        for h in reversed(range(self.tree.horizon)):
            ended = rows[:, blocks[h]].reshape(-1, 1)
            logits = np.concatenate([below.reshape(-1, self.tree.branching), ended], axis=1)
            layers.append(logits)
            below = np.logaddexp.reduce(logits, axis=1)
        return torch.tensor(np.concatenate([x.reshape(-1) for x in reversed(layers)]))

    def policy(self, theta: Tensor) -> tuple[Array, ...]:
        """The layered policy, (S_h, k + 1), of a `TokenMDP` on the same tree; the ended state takes the end action."""
        ended = np.eye(self.tree.n_actions)[-1:]
        with_ended = [np.concatenate([ended, x.detach().exp().numpy()]) for x in self.conditionals(theta)]
        return tuple(with_ended)
