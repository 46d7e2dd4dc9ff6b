"""A prefix tree as a language model: what runs on transformers runs on tables, where every answer is known.

Token ids: 0, ..., k-1 are the tree's tokens, k is the end, k + 1 + x is prompt number x, a text of one token. After the
end, and at the horizon, the end has probability one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..algorithms.optimisation import PrefixTree
from .policy import TransformerPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TableModel:
    """(input_ids, attention_mask, position_ids) -> logits (n, T, k + 1 + prompts), differentiable in theta (size,).

    Positions must be those of the mask; they are the depth in the tree, so that wrong ones are wrong logits.
    """

    table: PrefixTree
    theta: Tensor

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        import torch

        tree = self.table.tree
        k, H = tree.branching, tree.horizon
        rows = torch.cat(self.table.conditionals(self.theta))
        ended = rows.new_full((1, k + 1), -torch.inf)
        ended[0, k] = 0.0
        rows = torch.cat([rows, ended])
        first = torch.tensor([0, *(self.prompts * k**h for h in range(H))]).cumsum(
            0
        )  # of each layer, and the last row
        prefix = torch.full_like(
            input_ids[:, 0], -1
        )  # its number within its layer; -1 = there is none (any more)
        at = []
        for t in range(input_ids.shape[1]):
            token, depth = input_ids[:, t], position_ids[:, t].clamp(max=H)
            below = torch.where((prefix >= 0) & (token < k) & (depth < H), prefix * k + token, -1)
            after = torch.where(token > k, token - k - 1, below)
            prefix = torch.where(attention_mask[:, t].bool(), after, prefix)
            at.append(torch.where(prefix >= 0, first[depth] + prefix, len(rows) - 1))
        found = rows[torch.stack(at, 1)]
        return torch.cat([found, found.new_full((*found.shape[:2], self.prompts), -torch.inf)], 2)

    @property
    def prompts(self) -> int:
        return self.table.prompts


def table_policy(
    table: PrefixTree, theta: Tensor, *, trainable: bool = False, **options: Any
) -> TransformerPolicy:
    """The table as a policy of texts; `options` are those of `TransformerPolicy`.

    trainable  theta becomes the parameter of a torch module, `policy.model.theta`, a copy of the given one
    """
    k = table.tree.branching
    model = table_module(table, theta) if trainable else TableModel(table, theta)
    return TransformerPolicy(model, end_ids=[k], pad_id=k, vocabulary=k + 1 + table.prompts, **options)


def table_module(table: PrefixTree, theta: Tensor) -> Any:
    """A `TableModel` whose theta is the parameter of a torch module, for what trains modules."""
    from torch import nn

    class TableModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(theta.detach().clone())

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            return TableModel(table, self.theta)(input_ids, attention_mask, position_ids)

    return TableModule()
