"""A causal transformer of a few thousand weights, on which every law can be enumerated; transformers is not needed.

It is called as a transformers model is, `model(input_ids, attention_mask, position_ids, past_key_values=None,
use_cache=False, logits_to_keep=0)`, and answers with `.logits` and `.past_key_values`, so that tests of trainers run on
it in milliseconds. torch is imported when a model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TinyCache:
    """Keys and values of the tokens so far, one (keys, values) a layer of shape (rows, positions, width) each."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        if layer == len(self.layers):
            self.layers.append(TinyCacheLayer(keys, values))
        else:
            kept = self.layers[layer]
            kept.keys, kept.values = torch.cat([kept.keys, keys], 1), torch.cat([kept.values, values], 1)
        return self.layers[layer].keys, self.layers[layer].values

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[indices], layer.values[indices]


class TinyCacheLayer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class TinyOutput(NamedTuple):
    """What a call gives: logits (n, T, V), the cache where one was asked for; a tuple, so that FSDP sees into it."""

    logits: Tensor
    past_key_values: TinyCache | None


def tiny_model(
    vocabulary: int,
    *,
    width: int = 16,
    layers: int = 2,
    context: int = 32,
    dropout: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    dtype: str = "float64",
) -> Any:
    """A torch module with random weights of standard deviation scale / sqrt(width); one head, learnt positions.

    Position ids matter (they are looked up in a table of `context` rows), and so does the mask.
    """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.drop = nn.Dropout(dropout)

        def forward(self, x: Tensor, allowed: Tensor, cache: TinyCache, number: int) -> Tensor:
            query, key, value = self.inward(self.norms[0](x)).chunk(3, dim=-1)
            key, value = cache.update(number, key, value)
            scores = (query @ key.transpose(1, 2) / width**0.5).masked_fill(~allowed, -1e30)
            x = x + self.drop(self.outward(scores.softmax(-1) @ value))
            return x + self.drop(self.down(torch.tanh(self.up(self.norms[1](x)))))

    class TinyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.head = nn.Linear(width, vocabulary)

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            position_ids: Tensor,
            past_key_values: TinyCache | None = None,
            use_cache: bool = False,
            logits_to_keep: int = 0,
        ) -> TinyOutput:
            cache = TinyCache() if past_key_values is None else past_key_values
            new, total = input_ids.shape[1], attention_mask.shape[1]
            order = torch.arange(total, device=input_ids.device)
            causal = order[None, :] <= order[total - new :, None]
            allowed = causal[None] & attention_mask.bool()[:, None, :]
            x = self.tokens(input_ids) + self.places(position_ids)
            for number, block in enumerate(self.blocks):
                x = block(x, allowed, cache, number)
            return TinyOutput(self.head(x[:, -logits_to_keep:]), cache if use_cache else None)

    model = TinyModel()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norms" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale / width**0.5)
    return model.to(getattr(torch, dtype)).eval()
