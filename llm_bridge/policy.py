r"""Language models as policies: log-probabilities and samples of completions, token ids from end to end.

A policy pi is a causal language model with its end tokens. A completion y of a prompt x is a list of token ids; it is
ended by an end token, which is scored like any other, or cut at the horizon, and then no end is scored:

  log pi(y|x) = sum_t log pi(y_t | x, y_<t)     over the tokens of y alone             `log_probabilities`

    TransformerPolicy    around a transformers causal LM, or any (input_ids, attention_mask, position_ids) -> logits
    frozen_copy          the reference policy as a copy that no optimiser reaches
    adapter_off          ... as the same model with its peft adapter disabled
    precompute           ... as numbers, computed once

What is easy to get wrong is settled here once. Position ids always come from the mask, so that padding on the left, on
the right and none give one number. Which tokens are scored is decided by their place and never by their id, so that the
pad token may be the end token. Dropout is off in every call, whatever mode the model is in. Logits below float32 are
raised to it before they are normalised. With a temperature or a truncation, which only come when asked for, the
log-probabilities are those of the law that is sampled. Each row draws from uniforms of its own, so that the cache, the
size of the micro-batches and the padding leave a float64 sample as it is. In float32 they move the law of a token by
about 1e-6, which is seen now and then in a draw among many unlikely tokens; scores are always of the tokens drawn.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from ..envs.comparisons import replace_file
from ..envs.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import Generator, Tensor

Tokens = Sequence[int]
Side = Literal["left", "right"]


class Scored(Protocol):
    """What a reference policy has to offer: log pi(y|x) of completions, (n,)."""

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Tensor: ...


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """n rows of prompt and completion, padded to the length L of the longest.

    ids, mask, positions  (n, L) integers; positions count the real tokens of a row from 0
    scored                (n, L) booleans: the tokens of the completions
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    scored: Tensor


def encode(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    pad_id: int,
    side: Side = "right",
    device: Any = None,
) -> Batch:
    """Rows of prompt + completion with `pad_id` on the given side; what it is does not matter, the mask hides it."""
    import torch

    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}; padding is on the 'left' or on the 'right'")
    rows = [[*x, *y] for x, y in zip(prompts, completions, strict=True)]
    lengths = np.array([len(row) for row in rows])
    before = np.array([len(x) for x in prompts])
    first = np.zeros_like(lengths) if side == "right" else lengths.max() - lengths
    places = np.arange(lengths.max())[None, :] - first[:, None]  # of a row's tokens: 0, 1, ...
    real = (places >= 0) & (places < lengths[:, None])
    table = np.full(real.shape, pad_id, dtype=np.int64)
    table[real] = [int(token) for row in rows for token in row]
    ids, mask = torch.from_numpy(table), torch.from_numpy(real.astype(np.int64))
    scored = torch.from_numpy(real & (places >= before[:, None]))
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    return Batch(ids, mask, positions_of(mask), scored)


def positions_of(mask: Tensor) -> Tensor:
    """0, 1, ... over the real tokens of a row; 0 where it is padded in front."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Samples:
    """n completions drawn, in the order of their prompts.

    completions              lists of token ids, with the end token where one was drawn
    token_log_probabilities  (n, T): log of the probability with which each token was drawn, 0 after the last
    mask                     (n, T): the tokens that there are
    ended                    (n,): by an end token; else cut at the horizon
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    token_log_probabilities: Tensor
    mask: Tensor
    ended: Tensor

    @property
    def log_probabilities(self) -> Tensor:
        """log pi(y|x), (n,)."""
        return self.token_log_probabilities.sum(1)


# ---- what all token policies share ---------------------------------------------------------------------------------


class Decoder(Protocol):
    """Texts that grow. laws (n, V): log pi(. | text so far); advance(tokens (n,)) appends one token to each row."""

    laws: Tensor

    def advance(self, tokens: Tensor) -> None: ...


class TokenPolicy:
    """log_probabilities and sample, from the laws of the next token that a subclass gives."""

    end_ids: Sequence[int] | None
    pad_id: int | None
    vocabulary: int | None
    context: int | None
    micro_batch: int

    @property
    def device(self) -> Any:
        raise NotImplementedError

    def laws(self, batch: Batch, first_row: int = 0) -> Tensor:
        """log pi(. | what is before), (m, V), at the m scored tokens of a batch, row by row."""
        raise NotImplementedError

    def decoder(self, prompts: Sequence[Tokens], cached: bool | None = None) -> Decoder:
        raise NotImplementedError

    def token_log_probabilities(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], side: Side = "right"
    ) -> tuple[Tensor, Tensor]:
        """log pi(y_t | x, y_<t), (n, T), zero after the last token, and the mask (n, T) of the tokens there are."""
        import torch

        self.check(prompts, completions)
        assert self.pad_id is not None
        parts = []
        for first in range(0, len(prompts), self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            batch = encode(prompts[rows], completions[rows], self.pad_id, side, self.device)
            targets = batch.ids[batch.scored]
            parts.append(self.laws(batch, first).gather(1, targets[:, None])[:, 0])
        values = torch.cat(parts)
        lengths = torch.tensor([len(y) for y in completions], device=values.device)
        mask = torch.arange(int(lengths.max()), device=values.device)[None, :] < lengths[:, None]
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask

    def log_probabilities(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], side: Side = "right"
    ) -> Tensor:
        """log pi(y|x), (n,): the sum over the completion's tokens, its end token among them."""
        return self.token_log_probabilities(prompts, completions, side)[0].sum(1)

    def sample(
        self,
        prompts: Sequence[Tokens],
        horizon: int,
        generator: Generator | None = None,
        cached: bool | None = None,
        *,
        uniforms: Tensor | None = None,
    ) -> Samples:
        """One completion a prompt, of at most `horizon` tokens, from the policy's law; without gradients.

        cached    keep keys and values instead of reading the whole text again at each token; None = where the model can
        uniforms  (n, horizon) float64 in [0, 1), in place of the generator: each prompt's own randomness, so that a
                  prompt is answered alike in whatever batch, and on whatever process, it is drawn
        """
        import torch

        self.check(prompts, horizon=horizon)
        if (generator is None) == (uniforms is None):
            raise ValueError("give either a generator or uniforms: what the completions are drawn from")
        if generator is not None:
            u = torch.rand(
                len(prompts), horizon, dtype=torch.float64, generator=generator, device=generator.device
            )
        else:
            assert uniforms is not None
            u = uniforms
            if u.shape != (len(prompts), horizon):
                raise ValueError(f"uniforms are {tuple(u.shape)}; expected ({len(prompts)}, {horizon})")
        u = u.to(self.device)
        tokens, scores = [], []
        with torch.no_grad():
            for first in range(0, len(prompts), self.micro_batch):
                rows = slice(first, first + self.micro_batch)
                drawn, log_pi = self._draw(prompts[rows], u[rows], cached)
                tokens += drawn
                scores += log_pi
        lengths = torch.tensor([len(y) for y in tokens], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device)[None, :] < lengths[:, None]
        table = torch.zeros(mask.shape, dtype=scores[0].dtype, device=self.device)
        return Samples(
            prompts=[[int(t) for t in x] for x in prompts],
            completions=tokens,
            token_log_probabilities=table.masked_scatter(mask, torch.cat(scores)),
            mask=mask,
            ended=torch.tensor([y[-1] in self._ends for y in tokens], device=self.device),
        )

    def _draw(
        self, prompts: Sequence[Tokens], u: Tensor, cached: bool | None
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Completions of a micro-batch, and the log-probabilities of their tokens."""
        import torch

        decoder, columns, scores = self.decoder(prompts, cached), [], []
        ends = torch.tensor(self._ends, device=self.device)
        live = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        for step in range(u.shape[1]):
            token = inverse_cdf(decoder.laws, u[:, step])
            columns.append(token)
            scores.append(decoder.laws.gather(1, token[:, None])[:, 0])
            live = live & ~torch.isin(token, ends)
            if step + 1 == u.shape[1] or not live.any():
                break
            decoder.advance(token)  # rows that have ended go on unread
        drawn, table = torch.stack(columns, 1), torch.stack(scores, 1)
        stop = torch.isin(drawn, ends)
        length = torch.where(stop.any(1), stop.int().argmax(1) + 1, drawn.shape[1]).tolist()
        return [row[:n].tolist() for row, n in zip(drawn, length, strict=True)], [
            row[:n] for row, n in zip(table, length, strict=True)
        ]

    @property
    def _ends(self) -> list[int]:
        assert self.end_ids is not None
        return [int(i) for i in self.end_ids]

    def check(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens] | None = None,
        horizon: int = 0,
    ) -> None:
        """ValueError where a text is empty, too long, or holds a token that the model does not know."""
        if not len(prompts):
            raise ValueError("there are no prompts")
        if completions is None:
            if horizon < 1:
                raise ValueError(f"horizon is {horizon}; a completion has at least one token")
        elif len(completions) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: give one for each")
        self._check_texts(prompts, "prompt", "the model needs a token to start from, such as its first one")
        if completions is not None:
            self._check_texts(completions, "completion", "a response has at least its end token")
        if self.context is None:
            return
        for i, x in enumerate(prompts):
            more = horizon if completions is None else len(completions[i])
            if len(x) + more > self.context:
                what = f"horizon {horizon}" if completions is None else f"completion {more}"
                raise ValueError(
                    f"prompt {i} has {len(x)} tokens and its {what}; together they exceed the model's context of "
                    f"{self.context}: shorten the prompt"
                )

    def _check_texts(self, texts: Sequence[Tokens], what: str, why: str) -> None:
        if not _all_known(texts, self.vocabulary):  # then find the first that is wrong
            for i, tokens in enumerate(texts):
                self._check_text(tokens, f"{what} {i}", why)

    def _check_text(self, tokens: Tokens, what: str, why: str) -> None:
        ids = np.asarray(tokens)
        if not ids.size:
            raise ValueError(f"{what} is empty; {why}")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{what} is not a list of token ids; apply the tokenizer first")
        bad = ids < 0 if self.vocabulary is None else (ids < 0) | (ids >= self.vocabulary)
        if bad.any():
            at = int(bad.argmax())
            known = "0 or more" if self.vocabulary is None else f"0 to {self.vocabulary - 1}"
            raise ValueError(f"{what}, token {at} is {ids[at]}; the model's token ids are {known}")


def _all_known(texts: Sequence[Tokens], vocabulary: int | None) -> bool:
    """All texts at once: none is empty, all tokens are whole numbers from 0 to vocabulary - 1."""
    try:
        tokens = np.array([token for text in texts for token in text])
    except (TypeError, ValueError):  # numbers in place of texts, or texts of texts
        return False
    if (
        tokens.ndim != 1
        or not np.issubdtype(tokens.dtype, np.integer)
        or not all(len(text) for text in texts)
    ):
        return False
    return bool(tokens.min() >= 0 and (vocabulary is None or tokens.max() < vocabulary))


def inverse_cdf(laws: Tensor, u: Tensor) -> Tensor:
    """The token at which the distribution function passes u, row by row: laws (n, V) logarithms, u (n,) in [0, 1)."""
    import torch

    total = laws.double().exp().cumsum(1)
    last = total[:, -1]
    at = torch.minimum(u.to(last) * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(total, at[:, None], right=True)[:, 0]


# ---- a model as a policy -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TransformerPolicy(TokenPolicy):
    """A causal language model as a policy.

    model        a transformers model, or any callable (input_ids, attention_mask, position_ids) -> logits (n, T, V)
    end_ids      the tokens that end a completion; None = the model's own
    pad_id       fills rows; None = the model's own
    vocabulary   number of token ids, context  largest number of tokens; None = the model's own, or unchecked
    temperature  of the softmax; top_k, top_p  keep the k likeliest tokens, then the fewest whose share is at least p
                 (ties with the k-th are kept). The policy is the law that this leaves, for sampling and for scoring; a
                 completion outside has log-probability -inf
    micro_batch  rows in one call of the model
    cached       the model keeps keys and values when asked; None = it does if it takes `past_key_values`
    """

    model: Any
    end_ids: Sequence[int] | None = None
    pad_id: int | None = None
    vocabulary: int | None = None
    context: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    micro_batch: int = 16
    cached: bool | None = None
    _accepted: ClassVar[frozenset[str]] = (
        frozenset()
    )  # set for each policy: what its model can be called with

    def __post_init__(self) -> None:
        config, name = getattr(self.model, "config", None), type(self.model).__name__
        settings = (getattr(self.model, "generation_config", None), config)
        found: dict[str, Any] = {
            "end_ids": self.end_ids,
            "pad_id": self.pad_id,
            "vocabulary": self.vocabulary,
            "context": self.context,
            "cached": self.cached,
        }
        own = {"end_ids": "eos_token_id", "pad_id": "pad_token_id"}
        for field, theirs in own.items():
            if found[field] is None:
                values = [getattr(s, theirs, None) for s in settings]
                found[field] = next((v for v in values if v is not None), None)
        if found["end_ids"] is None:
            raise ValueError(f"{name} has no end token: give end_ids=[...], the tokens that end a completion")
        ends = found["end_ids"]
        found["end_ids"] = tuple(int(i) for i in (ends if isinstance(ends, Sequence) else [ends]))
        if not found["end_ids"]:
            raise ValueError("end_ids is empty: a completion needs a token that ends it")
        if found["pad_id"] is None:
            raise ValueError(
                f"{name} has no pad token: give pad_id=...; any token will do, such as the end token "
                f"{found['end_ids'][0]}, since masks are made from lengths"
            )
        if found["vocabulary"] is None and hasattr(self.model, "get_input_embeddings"):
            found["vocabulary"] = int(self.model.get_input_embeddings().weight.shape[0])
        if found["context"] is None:
            found["context"] = getattr(config, "max_position_embeddings", None)
        accepted = accepted_inputs(self.model)
        if found["cached"] is None:
            found["cached"] = "past_key_values" in accepted
        object.__setattr__(self, "_accepted", accepted)
        for field, value in found.items():
            object.__setattr__(self, field, value)
        self._check_settings()

    def _check_settings(self) -> None:
        for what, ids in (("end_ids", self._ends), ("pad_id", [self.pad_id])):
            for i in ids:
                assert i is not None
                if i < 0 or (self.vocabulary is not None and i >= self.vocabulary):
                    raise ValueError(f"{what} holds {i}; the model has {self.vocabulary} tokens")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it must be positive and finite "
                "(the most likely token: top_k=1)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1 token must be left")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; it must be at least 1")

    @classmethod
    def of(cls, language_model: LanguageModel, **options: Any) -> TransformerPolicy:
        """The policy of `envs.language_model`'s model with its end tokens; padded by the first of them."""
        ends = language_model.end_ids
        return cls(language_model.model, **{"end_ids": ends, "pad_id": ends[0], **options})

    @property
    def device(self) -> Any:
        parameters = getattr(self.model, "parameters", None)
        return None if parameters is None else next(parameters()).device

    def law(self, logits: Tensor) -> Tensor:
        """log of the law that is sampled, (..., V), from the model's logits."""
        import torch

        x = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature != 1:
            x = x / self.temperature
        if self.top_k is not None:
            kth = x.topk(min(self.top_k, x.shape[-1])).values[..., -1:]
            x = x.masked_fill(x < kth, -torch.inf)
        if self.top_p is not None:
            ordered = x.sort(dim=-1, descending=True, stable=True)
            share = ordered.values.softmax(-1)
            enough = share.cumsum(-1) - share >= self.top_p  # of the tokens before it
            x = x.masked_fill(torch.zeros_like(enough).scatter(-1, ordered.indices, enough), -torch.inf)
        return x.log_softmax(-1)

    def logits(
        self, ids: Tensor, mask: Tensor, positions: Tensor, *, keep: int = 0, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """The model's logits, with dropout off: (n, T, V), of the last `keep` positions alone where keep > 0.

        cache  None = read without one; a cache, or "new" for an empty one: the second answer is the cache afterwards
        """
        with _without_dropout(self.model):
            if not (self.cached or hasattr(self.model, "config")):
                logits, after = logits_of(self.model(ids, mask, positions)), None
            else:
                inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
                if "position_ids" in self._accepted or not hasattr(self.model, "config"):
                    inputs["position_ids"] = positions  # else the model has none, or makes them from the mask
                if keep and "logits_to_keep" in self._accepted:
                    inputs["logits_to_keep"] = keep
                if cache is not None:
                    inputs |= {"use_cache": True, "past_key_values": None if cache == "new" else cache}
                elif self.cached:
                    inputs["use_cache"] = False
                output = self.model(**inputs)
                logits, after = logits_of(output), getattr(output, "past_key_values", None)
        return logits[:, -keep:], after

    def laws(self, batch: Batch, first_row: int = 0) -> Tensor:
        before = batch.scored.roll(-1, 1)  # the logits before a token are its law; column 0 is never scored
        keep = before.shape[1] - int(before.any(0).int().argmax())
        logits, _ = self.logits(batch.ids, batch.mask, batch.positions, keep=keep)
        chosen = logits[before[:, -keep:]]
        check_logits(chosen, lambda i: _place(batch, i, first_row))
        return self.law(chosen)

    def decoder(self, prompts: Sequence[Tokens], cached: bool | None = None) -> Decoder:
        if cached and not self.cached:
            raise ValueError(
                f"{type(self.model).__name__} keeps no cache: leave cached out, or make it False"
            )
        return _ModelDecoder(self, prompts, bool(self.cached if cached is None else cached))


def logits_of(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def accepted_inputs(model: Any) -> frozenset[str]:
    """The names of what a model can be called with, below the wrappers of peft, DDP and torch.compile."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif callable(inner := getattr(model, "module", getattr(model, "_orig_mod", None))):
            model = inner
        else:
            return frozenset(inspect.signature(getattr(model, "forward", model)).parameters)


def check_logits(logits: Tensor, place: Callable[[int], str]) -> None:
    """ValueError where a row of (m, V) is no law; `place` names row i. A single -inf is a token that is ruled out."""
    bad = ~logits.logsumexp(-1).isfinite()
    if bad.any():
        raise ValueError(
            f"the model's logits at {place(int(bad.int().argmax()))} are not numbers (nan, inf, or all -inf): its "
            "weights are damaged, the number format is too narrow, or a float64 model with eager attention met padding "
            "(load it with attn_implementation='sdpa')"
        )


def _place(batch: Batch, i: int, first_row: int) -> str:
    row, column = (int(x) for x in batch.scored.nonzero()[i])
    token = int(batch.scored[row, :column].sum())
    return f"completion {first_row + row}, token {token}"


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    modules = [m for m in model.modules() if m.training] if hasattr(model, "modules") else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


class _ModelDecoder:
    """Texts padded on the left, so that all grow at the same end; a prompt of several rows is read once."""

    laws: Tensor

    def __init__(self, policy: TransformerPolicy, prompts: Sequence[Tokens], cached: bool) -> None:
        import torch

        assert policy.pad_id is not None
        first: dict[tuple[int, ...], int] = {}  # the rows of the distinct prompts
        for row, prompt in enumerate(prompts):
            first.setdefault(_key(prompt), row)
        batch = encode(list(first), [[]] * len(first), policy.pad_id, "left", policy.device)
        self._policy, self._cached = policy, cached
        self._cache: Any = "new" if cached else None
        self._ids, self._mask = batch.ids, batch.mask
        self._read(batch.ids, list(first.values()))
        if len(first) == len(prompts):
            return
        number = {prompt: i for i, prompt in enumerate(first)}
        rows = torch.tensor([number[_key(prompt)] for prompt in prompts], device=batch.ids.device)
        self._ids, self._mask, self.laws = (x[rows] for x in (self._ids, self._mask, self.laws))
        if cached and not spread(self._cache, rows):
            self._cache = "new"
            self._read(self._ids)

    def _read(self, new: Tensor, rows: Sequence[int] | None = None) -> None:
        """`rows` are those that an error names, where they are not 0, 1, ..."""
        positions = positions_of(self._mask)[:, -new.shape[1] :]
        found, self._cache = self._policy.logits(new, self._mask, positions, keep=1, cache=self._cache)
        logits = found[:, 0]
        check_logits(
            logits,
            lambda i: f"row {i if rows is None else rows[i]}, after {int(self._mask[i].sum())} tokens",
        )
        self.laws = self._policy.law(logits)

    def advance(self, tokens: Tensor) -> None:
        import torch

        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        self._read(tokens[:, None] if self._cached else self._ids)


CACHES = ("DynamicCache", "TinyCache")
LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "TinyCacheLayer")


def spread(cache: Any, rows: Tensor) -> bool:
    """Make a cache that of the given rows, layer by layer, so that there are never two; False, and untouched, where a
    layer keeps more than keys and values by row (a recurrent state, say), which a choice of rows would not reach."""
    if type(cache).__name__ not in CACHES or any(type(x).__name__ not in LAYERS for x in cache.layers):
        return False
    cache.batch_select_indices(rows)
    return True


def copy_of(cache: Any, rows: Tensor) -> Any:
    """The cache of the given rows, in this order and with repetitions; the cache that they come from stays as it was.

    For transformers' dynamic caches, whose layers replace their tensors and never write into them. Gradients pass.
    ValueError for others, which a choice of rows would not reach.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    if not spread(new, rows):
        kinds = sorted({type(layer).__name__ for layer in cache.layers} - set(LAYERS)) or [
            type(cache).__name__
        ]
        raise ValueError(
            f"the model's cache has {', '.join(kinds)}, which keeps more than keys and values by row: make the policy "
            "with cached=False"
        )
    return new


# ---- reference policies --------------------------------------------------------------------------------------------


def frozen_copy(policy: TransformerPolicy) -> TransformerPolicy:
    """The policy as it is now, with weights of its own that take no gradients."""
    model = copy.deepcopy(policy.model)
    if hasattr(model, "requires_grad_"):
        model.requires_grad_(False)
    return _plain(policy, model)


def _plain(policy: TransformerPolicy, model: Any) -> TransformerPolicy:
    """Another model with the policy's settings; what a subclass adds, such as an engine, belongs to the old one."""
    own = {f.name: getattr(policy, f.name) for f in fields(TransformerPolicy)}
    return TransformerPolicy(**own | {"model": model})


def adapter_off(policy: TransformerPolicy) -> TransformerPolicy:
    """The base model under a peft adapter, without a second copy of the weights.

    It is the policy at the start of training only if the adapter starts as zero, as LoRA's does. A run that goes on
    from a trained adapter needs a `frozen_copy` or `precompute`.
    """
    if not hasattr(policy.model, "disable_adapter"):
        raise ValueError(
            f"{type(policy.model).__name__} has no adapter to disable: wrap it by peft, or take a frozen_copy"
        )
    return _plain(policy, _AdapterOff(policy.model))


class _AdapterOff:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        import torch

        with self._model.disable_adapter(), torch.no_grad():
            return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self._model, name)


@dataclass(frozen=True, eq=False)
class Precomputed:
    """log pi(y|x) by prompt and completion; anything else is refused."""

    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], float]

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Tensor:
        """(n,) float64."""
        import torch

        found = []
        for i, key in enumerate(zip(map(_key, prompts), map(_key, completions), strict=True)):
            if key not in self.numbers:
                raise ValueError(
                    f"completion {i} was not precomputed for its prompt: compute it, or take a live reference"
                )
            found.append(self.numbers[key])
        return torch.tensor(found, dtype=torch.float64)

    @classmethod
    def of_records(cls, records: Sequence[Any]) -> Precomputed:
        """From the `ref_logp` of comparisons, of chosen and of rejected; ValueError where two differ."""
        numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for i, record in enumerate(records):
            if record.ref_logp is None:
                raise ValueError(
                    f"record {i} has no ref_logp: precompute(policy, prompts, completions) computes it"
                )
            for y, value in zip((record.chosen, record.rejected), record.ref_logp, strict=True):
                key = _key(record.prompt), _key(y)
                if numbers.setdefault(key, float(value)) != float(value):
                    raise ValueError(
                        f"record {i} has ref_logp {value} for a completion that has {numbers[key]} in an earlier "
                        "record: they are of different references"
                    )
        return cls(numbers)

    def save(self, path: str | Path) -> None:
        """As safetensors: tokens, all in a row; lengths (n, 2) of prompt and completion; values (n,) float64."""
        import torch
        from safetensors.torch import save

        keys = list(self.numbers)
        tokens = [token for x, y in keys for token in (*x, *y)]
        tensors = {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "lengths": torch.tensor([[len(x), len(y)] for x, y in keys], dtype=torch.int64).reshape(-1, 2),
            "values": torch.tensor([self.numbers[key] for key in keys], dtype=torch.float64),
        }
        data = save(tensors, metadata={"format": "preflab precomputed 1"})
        replace_file(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | Path) -> Precomputed:
        """What `save` wrote; ValueError where the file is something else, or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != "preflab precomputed 1":
                    raise ValueError(
                        f"{path} holds no precomputed log-probabilities: give a file of Precomputed.save"
                    )
                tokens, lengths, values = (file.get_tensor(n) for n in ("tokens", "lengths", "values"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors ({error}): compute it again") from error
        parts = tokens.split(lengths.reshape(-1).tolist())
        texts = [tuple(part.tolist()) for part in parts]
        return cls(dict(zip(zip(texts[::2], texts[1::2], strict=True), values.tolist(), strict=True)))


def precompute(policy: Scored, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Precomputed:
    """A policy's log-probabilities of these completions, once and for all."""
    import torch

    with torch.no_grad():
        values = policy.log_probabilities(prompts, completions).tolist()
    keys = zip(map(_key, prompts), map(_key, completions), strict=True)
    return Precomputed(dict(zip(keys, values, strict=True)))


def _key(tokens: Tokens) -> tuple[int, ...]:
    return tuple(int(t) for t in tokens)


# ---- from disk -----------------------------------------------------------------------------------------------------


def check_weights(path: Path) -> None:
    """FileNotFoundError or ValueError where a folder has no configuration, or no weights as safetensors."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json: give a folder that transformers' save_pretrained wrote"
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        held = (
            f"weights as pickle ({', '.join(pickles)}), which can run code when loaded"
            if pickles
            else "no weights"
        )
        raise ValueError(f"{path} holds {held}: save the model with safe_serialization=True")


def load_policy(
    folder: str | Path, *, dtype: str = "float32", device: str = "cpu", **options: Any
) -> TransformerPolicy:
    """A transformers causal LM from a folder with safetensors weights; pickles are refused, nothing is downloaded.

    options  of `TransformerPolicy`
    """
    path = Path(folder)
    check_weights(path)
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    return TransformerPolicy(model.to(device).eval(), **options)
