r"""Features phi(x, y) of texts from a frozen transformer, for rewards that are linear in them.

PR-LSVI asks for a feature map with ||phi|| <= 1 and a reward <phi, theta>. On a language model phi is what the head of
a model reads of a text:

    last   the hidden state at the last token of the completion: what the head of a reward model gets
    mean   the mean of the hidden states over the completion's tokens

They are taken at the input of the head by a hook, so that one function serves causal models of transformers, reward
models with a linear head, and `tiny_model`. Wide features are turned onto their principal axes (`principal_axes`).
Comparisons happen within a prompt, so that only deviations from the prompt's mean are ever used; the axes are those of
these deviations, and one number makes the longest of the pool 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ...envs.kernels import Array, Index
from ..policy import Tokens, TransformerPolicy, encode

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["last", "mean"]
HEADS = ("lm_head", "head", "score", "classifier", "v_head")  # where a model's head is looked for


def trunk_features(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    pooling: Sequence[Pooling] = ("mean",),
    head: Any = None,
    side: Literal["left", "right"] = "right",
) -> dict[str, Array]:
    """The hidden states of completions at the input of the model's head: for each pooling (n, width) float64.

    policy  a `TransformerPolicy`; a reward model is wrapped as one too (`TransformerPolicy(model, end_ids=[...])`)
    head    the module whose input is wanted, or its name ("score"); None = the model's output layer
    side    of the padding, which the answer does not depend on
    """
    import torch

    for how in pooling:
        if how not in ("last", "mean"):
            raise ValueError(f"pooling holds {how!r}; expected 'last' or 'mean'")
    policy.check(prompts, completions)
    assert policy.pad_id is not None
    seen: list[Tensor] = []
    hook = find_head(policy.model, head).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    found: dict[str, list[Array]] = {how: [] for how in pooling}
    try:
        with torch.no_grad():
            for first in range(0, len(prompts), policy.micro_batch):
                rows = slice(first, first + policy.micro_batch)
                batch = encode(prompts[rows], completions[rows], policy.pad_id, side, policy.device)
                seen.clear()
                policy.logits(batch.ids, batch.mask, batch.positions)
                hidden = _states(seen, batch.ids)
                for how in pooling:
                    found[how].append(pooled(hidden, batch.scored, how).double().cpu().numpy())
    finally:
        hook.remove()
    features = {how: np.concatenate(parts) for how, parts in found.items()}
    for name, x in features.items():
        if not np.isfinite(x).all():
            raise ValueError(
                f"the {name} hidden state of completion {int(np.argwhere(~np.isfinite(x))[0, 0])} is not finite: the "
                "weights are damaged, or the number format is too narrow"
            )
    return features


def pooled(hidden: Tensor, scored: Tensor, how: Pooling) -> Tensor:
    """(n, width) of hidden states (n, L, width) over the completion's tokens, `scored` (n, L)."""
    import torch

    if how == "mean":
        weight = scored.to(hidden.dtype) / scored.sum(1, keepdim=True)
        return torch.einsum("nl,nlw->nw", weight, hidden)
    last = scored.shape[1] - 1 - scored.flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def find_head(model: Any, head: Any = None) -> Any:
    """The module that turns hidden states into logits or rewards."""
    if isinstance(head, str):
        modules = dict(model.named_modules()) if hasattr(model, "named_modules") else {}
        if head not in modules:
            close = ", ".join(name for name in modules if name.count(".") == 0 and name) or "none"
            raise ValueError(f"{type(model).__name__} has no module {head!r}; its outermost ones: {close}")
        return modules[head]
    if head is not None:
        return head
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        return model.get_output_embeddings()
    for name in HEADS:
        if hasattr(getattr(model, name, None), "register_forward_pre_hook"):
            return getattr(model, name)
    raise ValueError(
        f"no head was found in {type(model).__name__}: give head=..., the torch module (or its name) whose input are "
        "the hidden states. A table has none: its features are those of its world"
    )


def _states(seen: Sequence[Tensor], ids: Tensor) -> Tensor:
    if len(seen) != 1 or seen[0].shape[:2] != ids.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in seen) or "nothing"
        raise ValueError(
            f"the head was given {shapes} for {tuple(ids.shape)} token ids; it must be called once, with the hidden "
            "states of all tokens: give another head"
        )
    return seen[0]


# ---- from hidden states to phi ---------------------------------------------------------------------------------------


def within(x: Array, prompt: Index, weight: ArrayLike | None = None) -> Array:
    """x (n, d) minus the (weighted) mean of its prompt's rows; prompt (n,) numbers."""
    w = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=np.float64)
    groups = int(prompt.max()) + 1
    total = np.bincount(prompt, weights=w, minlength=groups)
    means = np.zeros((groups, x.shape[1]))
    np.add.at(means, prompt, w[:, None] * x)
    return x - (means / np.where(total > 0, total, 1.0)[:, None])[prompt]


@dataclass(frozen=True, eq=False)
class PrincipalAxes:
    """phi = x @ axes / scale for deviations x (n, width) from the prompts' means; what is longer than 1 is cut to 1.

    axes       (width, d), the first has the largest variance; of unit length, or divided by the deviation (whitened)
    scale      the longest ||x @ axes|| of the pool
    explained  (d,) the share of the pool's variance within prompts that each axis has
    """

    axes: Array
    scale: float
    explained: Array

    def apply(self, deviations: Array) -> Array:
        phi = deviations @ self.axes / self.scale
        return phi / np.maximum(1.0, np.linalg.norm(phi, axis=1))[:, None]


def principal_axes(
    deviations: Array, dimension: int, *, whiten: bool = False, weight: ArrayLike | None = None
) -> PrincipalAxes:
    """The principal axes of deviations within prompts (n, width), from `within`.

    dimension  how many are kept; ValueError where the deviations span fewer
    whiten     divide each coordinate by its standard deviation: all directions are then equally likely to matter
    """
    x = np.asarray(deviations, dtype=np.float64)
    w = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=np.float64)
    root = np.sqrt(w / w.sum())
    _, s, Vt = np.linalg.svd(x * root[:, None], full_matrices=False)
    rank = int((s > s[0] * max(x.shape) * np.finfo(np.float64).eps).sum())
    if not 1 <= dimension <= rank:
        raise ValueError(
            f"dimension is {dimension}; the pool's deviations span {rank} directions: 1 to {rank}"
        )
    axes = Vt[:dimension].T
    # the sign of an axis is arbitrary: its largest entry is positive, so that a rebuilt pool has the same features
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dimension)])
    if whiten:
        axes = axes / s[:dimension]
    scale = float(np.linalg.norm(x @ axes, axis=1).max())
    return PrincipalAxes(axes, scale, s[:dimension] ** 2 / float(s @ s))
