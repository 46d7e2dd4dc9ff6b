r"""A world for whole trainers: models so small that every completion of every prompt can be written down.

Three models share one vocabulary: "policy", "reference", and "base", which is what a policy without its adapter is
where training goes on from a trained adapter. Completions have at most H tokens; they are ended by the end token, which
is scored, or cut at H. The end token is also the pad token, and stands inside one prompt, as with chat templates.
Prompts have one, four and two tokens, so that a batch of them is padded.

The exact side is a second route: one text at a time, without padding, without a cache, dropout off, in float64, and
plain NumPy after the logits (`ModelWorld.logits`). A `layout` reads the same text as a faulty trainer would:

  plain            the text alone, positions 0, 1, ...
  positions        padded on the left, and positions count the padding
  padding_read     padded on the left, and the mask lets the padding be read; with positions of the row, or of the text
  mask_by_id       the mask is `ids != pad`, so that an end token in the prompt is hidden
  right            padded on the right before the completion, and the first token is drawn at the padding
  cache_stale      of the completion only the last token is read
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from ...envs.kernels import Array, Index
from ..policy import Tokens, logits_of

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("policy", "reference", "base")
KINDS = ("tiny", "table", "gpt2", "llama")
LAYOUTS = (
    "plain",
    "positions",
    "padding_read",
    "padding_read_placed",
    "mask_by_id",
    "right",
    "right_row",
    "cache_stale",
    "cache_stale_placed",
)
TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True)
class Sampling:
    """The law that a trainer says it samples from: softmax at a temperature, the top_k likeliest, of these the fewest
    whose share is at least top_p; then normalised. Written once more in NumPy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def law(self, logits: Array) -> Array:
        """log-probabilities (..., V)."""
        x = np.asarray(logits, dtype=float) / self.temperature
        if self.top_k is not None and self.top_k < x.shape[-1]:
            kth = np.sort(x, axis=-1)[..., -self.top_k, None]
            x = np.where(x < kth, -np.inf, x)
        if self.top_p is not None:
            order = np.argsort(-x, axis=-1, kind="stable")
            p = np.exp(log_softmax(np.take_along_axis(x, order, -1), axis=-1))
            out = np.cumsum(p, axis=-1) - p >= self.top_p
            drop = np.zeros_like(out)
            np.put_along_axis(drop, order, out, -1)
            x = np.where(drop, -np.inf, x)
        return np.asarray(log_softmax(x, axis=-1))

    @property
    def plain(self) -> bool:
        return self == Sampling()


@dataclass(frozen=True, eq=False)
class ModelWorld:
    """models  a role -> a fresh model, called as transformers' models are, in training mode (a trainer turns
            dropout off)
    words   the text of each token; `encode` reads a text by the longest match, so that "a" + "b" becomes "ab"
    dtype   of the models
    """

    kind: str
    models: Mapping[str, Callable[[], Any]]
    prompts: tuple[tuple[int, ...], ...]
    horizon: int
    end: int
    vocabulary: int
    context: int
    words: tuple[str, ...]
    dtype: str = "float64"
    seed: int = 0
    _exact: dict[str, Any] = field(default_factory=dict, repr=False)

    # ---- what a trainer is given -------------------------------------------------------------------------------------

    @property
    def pad(self) -> int:
        return self.end

    def model(self, role: str = "policy") -> Any:
        """A fresh copy, which a trainer may do with as it likes."""
        if role not in self.models:
            raise ValueError(f"there is no model {role!r} in this world; there are {', '.join(self.models)}")
        return self.models[role]()

    def adapter(self, below: str = "reference") -> Any:
        """One module: the policy while its adapter is on, the model `below` it in `with module.disable_adapter()`."""
        return adapted(self.model("policy"), self.model(below))

    def at_reference(self) -> ModelWorld:
        """The same world with a policy that starts as the reference."""
        return replace(self, models={**self.models, "policy": self.models["reference"]}, _exact={})

    def decode(self, tokens: Tokens) -> str:
        return "".join(self.words[int(t)] for t in tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids by the longest match from the left."""
        found, at = [], 0
        by_length = sorted(range(len(self.words)), key=lambda t: -len(self.words[t]))
        while at < len(text):
            token = next((t for t in by_length if text.startswith(self.words[t], at)), None)
            if token is None:
                raise ValueError(f"no token begins at {text[at : at + 8]!r}; the tokens are {self.words}")
            found.append(token)
            at += len(self.words[token])
        return found

    def scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A reward model: the score (n, L) of the text up to and with each position; masked positions are not read."""
        import torch

        weight = torch.tensor(np.random.default_rng([self.seed, 41]).normal(size=self.vocabulary))
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        part = weight[ids] * (1 + place) ** 0.5 * mask
        return torch.sin(part.cumsum(-1)) + 0.1 * part

    # ---- completions -------------------------------------------------------------------------------------------------

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """All of them, shortest first: words and the end token, or H words."""
        H, words = self.horizon, self.spoken
        ended = [(*w, self.end) for n in range(H) for w in itertools.product(words, repeat=n)]
        return ended + list(itertools.product(words, repeat=H))

    @property
    def spoken(self) -> list[int]:
        """The tokens that a completion is made of, before the end."""
        inside = self.vocabulary if self.kind != "table" else self.end
        return [t for t in range(inside) if t != self.end]

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        return [w for n in range(self.horizon) for w in itertools.product(self.spoken, repeat=n)]

    @cached_property
    def _steps(self) -> tuple[Index, Index, Array]:
        """Of each completion and step: the prefix's number, the token, and whether there is one, (C, H) each."""
        number = {w: i for i, w in enumerate(self.prefixes)}
        C, H = len(self.completions), self.horizon
        at, token, live = np.zeros((C, H), int), np.zeros((C, H), int), np.zeros((C, H), bool)
        for c, y in enumerate(self.completions):
            for t, word in enumerate(y):
                at[c, t], token[c, t], live[c, t] = number[y[:t]], word, True
        return at, token, live

    def law_of(self, laws: Array) -> Array:
        """log pi(y|x), (prompts, C), from the laws of the next token (prompts, prefixes, V)."""
        at, token, live = self._steps
        return np.where(live, laws[:, at, token], 0.0).sum(-1)

    # ---- the second route --------------------------------------------------------------------------------------------

    def exact_model(self, role: str) -> Any:
        if role not in self._exact:
            model = copy.deepcopy(self.model(role)).double()
            self._exact[role] = model.eval()
        return self._exact[role]

    def _forward(self, role: str, ids: Sequence[int], mask: Sequence[int], positions: Sequence[int]) -> Array:
        import torch

        rows = [torch.tensor([list(x)]) for x in (ids, mask, positions)]
        with torch.no_grad():
            out = self.exact_model(role)(input_ids=rows[0], attention_mask=rows[1], position_ids=rows[2])
        return np.asarray(logits_of(out)[0].double().numpy())

    def row_logits(
        self, role: str, prompt: Tokens, completion: Tokens, layout: str = "plain", pads: int = 0
    ) -> Array:
        """Logits (T, V) from which each token of the completion is scored, and those of one token more."""
        x, y, n = list(prompt), list(completion), len(prompt)
        T = len(y) + 1
        if layout == "plain" or (
            pads == 0 and layout not in ("mask_by_id", "cache_stale", "cache_stale_placed")
        ):
            return self._forward(role, [*x, *y], [1] * (n + len(y)), range(n + len(y)))[n - 1 :]
        if layout == "mask_by_id":
            ids = [*x, *y]
            mask = [int(t != self.pad) for t in ids]
            mask[0] = 1 if not any(mask) else mask[0]
            return self._forward(role, ids, mask, _counted(mask))[n - 1 :]
        if layout in ("positions", "padding_read", "padding_read_placed"):
            ids = [self.pad] * pads + x + y
            real = [0] * pads + [1] * (len(ids) - pads)
            mask = real if layout == "positions" else [1] * len(ids)
            places = _counted(real) if layout == "padding_read_placed" else list(range(len(ids)))
            return self._forward(role, ids, mask, places)[-T:]
        if layout in ("right", "right_row"):
            ids = x + [self.pad] * pads + y
            mask = [1] * n + [0] * pads + [1] * len(y)
            places = _counted(mask) if layout == "right" else list(range(len(ids)))
            return self._forward(role, ids, mask, places)[-T:]
        if layout in ("cache_stale", "cache_stale_placed"):
            found = [self._forward(role, x, [1] * n, range(n))[-1]]
            for t, word in enumerate(y):
                place = n if layout == "cache_stale" else n + t
                found.append(self._forward(role, [*x, word], [1] * (n + 1), [*range(n), place])[-1])
            return np.stack(found)
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")

    def logits(self, role: str = "policy", layout: str = "plain") -> Array:
        """Logits of the next token after every prefix, (prompts, prefixes, V); prompts padded to the longest."""
        key = f"{role} {layout} {self.horizon}"
        if key not in self._exact:
            width = max(map(len, self.prompts))
            rows = [
                [self.row_logits(role, x, w, layout, width - len(x))[-1] for w in self.prefixes]
                for x in self.prompts
            ]
            self._exact[key] = np.array(rows)
        return self._exact[key]  # type: ignore[no-any-return]

    def laws(self, role: str = "policy", sampling: Sampling | None = None, layout: str = "plain") -> Array:
        """log of the next token's law after every prefix."""
        return (sampling or Sampling()).law(self.logits(role, layout))

    def law(self, role: str = "policy", sampling: Sampling | None = None) -> Array:
        """log pi(y|x), (prompts, C)."""
        return self.law_of(self.laws(role, sampling))


def _counted(mask: Sequence[int]) -> list[int]:
    return [max(0, int(c) - 1) for c in np.cumsum(mask)]


# ---- mixtures ------------------------------------------------------------------------------------------------------


def mix(policy: Array, reference: Array, share: float, how: str = "geometric") -> Array:
    """log of the mixture of two laws along the last axis; `share` is the reference's."""
    if how == "arithmetic":
        return np.logaddexp(policy + np.log1p(-share), reference + np.log(share))
    with np.errstate(invalid="ignore"):
        both = (1 - share) * policy + share * reference
    return np.asarray(log_softmax(np.where(np.isnan(both), -np.inf, both), axis=-1))


# ---- models --------------------------------------------------------------------------------------------------------


def adapted(on: Any, off: Any) -> Any:
    """A module that is `on` while its adapter is on, and `off` in `with module.disable_adapter()`, as peft's are."""
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on, self.off, self.enabled = on, off.requires_grad_(False), True
            self.config = getattr(
                on, "config", None
            )  # there, so that it is called by keywords as transformers' are
            self.generation_config = getattr(on, "generation_config", None)

        def get_base_model(self) -> Any:
            return self.on  # what it can be called with is read off the model inside

        def forward(self, *inputs: Any, **named: Any) -> Any:
            return (self.on if self.enabled else self.off)(*inputs, **named)

        @contextmanager
        def disable_adapter(self) -> Iterator[None]:
            self.enabled = False
            try:
                yield
            finally:
                self.enabled = True

    return Adapted()


PROMPTS = ((0,), (1, 3, 2, 0), (2, 2))  # 3 is the end token
WORDS = ("a", "b", "ab", "<end>")


@lru_cache(maxsize=8)
def model_world(kind: str = "tiny", *, horizon: int = 3, seed: int = 0, dtype: str = "float64") -> ModelWorld:
    """kind  "tiny"   the package's transformer of a few thousand weights, dropout 0.1
    "table"  a prefix tree as a language model; prompts are single tokens
    "gpt2", "llama"  random models of transformers, for trainers that insist on it
    """
    if kind not in KINDS:
        raise ValueError(f"there is no world {kind!r}; there are {', '.join(KINDS)}")
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype is {dtype!r}; it is one of {', '.join(TOLERANCES)}")
    make = {"tiny": _tiny, "table": _table}.get(kind, _transformers)
    models = {role: make(kind, horizon, 10 * (seed + 3) + i, dtype) for i, role in enumerate(ROLES)}
    if kind == "table":
        return ModelWorld(
            kind,
            models,
            ((3,), (4,)),
            horizon,
            2,
            5,
            horizon + 2,
            ("a", "b", "<end>", "<x>", "<y>"),
            dtype,
            seed,
        )
    return ModelWorld(kind, models, PROMPTS, horizon, 3, 4, 16, WORDS, dtype, seed)


def _tiny(_: str, horizon: int, seed: int, dtype: str) -> Callable[[], Any]:
    from ..tiny import tiny_model

    return lambda: tiny_model(4, context=16, dropout=0.1, scale=0.8, seed=seed, dtype=dtype).train()


def _table(_: str, horizon: int, seed: int, dtype: str) -> Callable[[], Any]:
    import torch

    from ...algorithms.optimisation import PrefixTree
    from ...envs.kernels import TreeKernel
    from ..table import table_module

    table = PrefixTree(TreeKernel(2, 2, horizon))
    theta = torch.tensor(
        np.random.default_rng([seed, 3]).normal(size=table.size), dtype=getattr(torch, dtype)
    )
    return lambda: table_module(table, theta)


def _transformers(kind: str, horizon: int, seed: int, dtype: str) -> Callable[[], Any]:
    import torch
    import transformers

    ids: dict[str, Any] = {
        "vocab_size": 4,
        "eos_token_id": 3,
        "pad_token_id": 3,
        "bos_token_id": 0,
        "initializer_range": 1.0,
    }
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(**ids, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    else:
        config = transformers.LlamaConfig(
            **ids,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )

    def make() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # A copy: trainers write into the configuration of their model, its dtype among others.
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return model.to(getattr(torch, dtype)).train()

    return make
