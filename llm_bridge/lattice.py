r"""Lattices: a language model restricted to finitely many continuations is an exactly known token MDP, and back.

`lattice(policy, prompts, k, horizon)` keeps, at each prefix, the model's k most likely tokens and its end (all end
tokens are one action), up to H tokens, and renormalises over these k + 1 actions. The result is a `TokenMDP` whose
reference policy is the model, exactly, in float64; so exact values, KL, win rates, exploitability and all solvers apply
to real weights. The choice of the k tokens is that of `envs.language_model.enumerate_prefixes`.

`LatticePolicy(policy, lattice)` is the way back: a model on a lattice's tokens as a policy with parameters. It gives
the log-probabilities of all responses, differentiable in the model's weights, in the numbering of the tables of
`algorithms.optimisation`; so `dpo_loss` and its relatives run on it with the whole population.

Cost. With a cache, a prompt is read once and each prefix costs one token, as long as the caches of two neighbouring
layers fit into `memory`; in deeper layers a prefix costs its own h tokens on the prompt's cache. A model without a
cache reads prompt and prefix again. `batch` prefixes are read in one call; beside the tables and the caches, which
`memory` bounds, one such call is all that is held.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..algorithms.optimisation import PrefixTree
from ..envs.comparisons import replace_file
from ..envs.kernels import Array, Index, TreeKernel
from ..envs.mdp import Layered
from ..envs.token_mdp import TokenMDP, ended_mask, prompt_law
from .policy import Tokens, TransformerPolicy, check_logits, copy_of

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
MEMORY = 4 << 30


@dataclass(frozen=True, eq=False)
class Lattice:
    """A language model cut down to a token MDP.

    world    the TokenMDP: its reference policy is the model's; its reward is 0 until `world.with_response_reward`
    ids      ids[h]: (n_h, k) the model's token ids of each prefix, most likely first
    kept     kept[h]: (n_h,) the share of the model's own law that the k + 1 actions have
    margin   margin[h]: (n_h,) the smallest log-odds between neighbours among the k + 1 likeliest tokens
    prompts  the token ids of the prompts; end_ids  the tokens that are the end action
    """

    world: TokenMDP
    ids: tuple[Index, ...]
    kept: tuple[Array, ...]
    margin: tuple[Array, ...]
    prompts: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]

    @property
    def reference(self) -> Layered:
        """The model's policy as exact tables, (S_h, k+1) each, the ended state first."""
        assert self.world.reference is not None
        return self.world.reference

    def completions(self) -> tuple[list[tuple[int, ...]], list[list[int]]]:
        """(prompts, completions) of all leaves as token ids, in the order of the leaves; ended by the first end id."""
        world, rows = self.world, self.world.trajectories(np.arange(self.world.n_leaves))
        completions: list[list[int]] = []
        for s, a in zip(rows.states, rows.actions, strict=True):
            live = [h for h in range(world.horizon) if s[h] > 0]
            completions.append(
                [
                    int(self.ids[h][s[h] - 1, a[h]]) if a[h] < world.branching else self.end_ids[0]
                    for h in live
                ]
            )
        return [self.prompts[i] for i in world.leaf_prompts], completions


class Size(NamedTuple):
    """What a lattice holds: prefixes (one row of the tables each), leaves, and bytes of the finished tables."""

    prefixes: int
    leaves: int
    bytes: int


def lattice_size(prompts: int, k: int, horizon: int) -> Size:
    """The size of a lattice before it is made."""
    for name, value in (("prompts", prompts), ("k", k), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    prefixes = prompts * sum(k**h for h in range(horizon))
    leaves = prefixes + prompts * k**horizon
    # ids and indices of tokens; law, reference and reward; mask; kept and margin; two numbers a leaf; the last prefixes
    a_prefix = 16 * k + 24 * (k + 1) + (k + 1) + 16
    return Size(
        prefixes, leaves, prefixes * a_prefix + 16 * leaves + 8 * horizon * prompts * k ** (horizon - 1)
    )


def check_size(prompts: int, k: int, horizon: int, memory: int) -> Size:
    """The size, or MemoryError with what would fit."""
    size = lattice_size(prompts, k, horizon)
    if size.bytes <= memory:
        return size

    def fits(k: int, horizon: int) -> bool:
        return lattice_size(prompts, k, horizon).bytes <= memory

    shorter = next((h for h in range(horizon, 0, -1) if fits(k, h)), None)
    narrower = next((j for j in range(k, 0, -1) if fits(j, horizon)), None)
    could = [
        *([f"k = {k} with horizon = {shorter}"] if shorter else []),
        *([f"k = {narrower} with horizon = {horizon}"] if narrower else []),
    ]
    raise MemoryError(
        f"the lattice of {prompts} prompts with k = {k} and horizon = {horizon} has {size.prefixes:.4g} prefixes and "
        f"{size.leaves:.4g} responses, {_binary(size.bytes)} of tables, more than memory = {_binary(memory)}; "
        f"what fits: {' or '.join(could) or 'nothing, take fewer prompts'}"
    )


def _binary(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if n < 1024 or unit == "EiB":
            break
        n /= 1024
    return f"{n:.3g} {unit}"


# ---- from a model to a lattice -------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One layer of all prompts: ids (n, k), law (n, k+1), kept (n,), margin (n,)."""

    ids: Index
    law: Array
    kept: Array
    margin: Array


def lattice(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    k: int,
    horizon: int,
    *,
    banned: Sequence[int] = (),
    initial: Array | None = None,
    pieces: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    batch: int = 64,
    memory: int = MEMORY,
    progress: Progress | None = None,
    save: str | Path | None = None,
    name: str = "lattice",
) -> Lattice:
    """Restrict a language model to its k most likely tokens a prefix and its end, and to H tokens.

    prompts   token ids; texts  what is shown for them, default: empty
    banned    token ids that are never used (end tokens never are: they are the end action)
    initial   (prompts,) their law, None = uniform
    pieces    the string of each token id of the vocabulary; None = "[17]" for token 17
    memory    bytes for tables and caches. MemoryError before anything is computed, where the tables exceed it
    progress  called with (prefixes read, prefixes in all) after each batch
    save      a folder for finished layers, each written aside and renamed. With the same folder the work goes on where
              it stopped, also for a larger horizon; layers of other prompts, settings or weights are refused
    """
    size = check_size(len(prompts), k, horizon, memory)
    policy.check(prompts, horizon=horizon)
    if policy.top_k is not None or policy.top_p is not None:
        raise ValueError("a lattice truncates by itself: take a policy without top_k and top_p")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    import torch

    never = sorted({*(int(i) for i in banned), *_ends(policy)})
    folder = None if save is None else Path(save)
    key = json.dumps(
        {
            "prompts": [[int(t) for t in x] for x in prompts],
            "k": k,
            "end_ids": _ends(policy),
            "banned": never,
            "temperature": policy.temperature,
        }
    )
    reader = _Reader(policy, prompts, k, batch, memory - size.bytes)
    layers: list[_Layer] = []
    words: Index = np.empty((len(prompts), 1, 0), dtype=np.int64)
    done = 0
    with torch.no_grad():
        for h in range(horizon):
            stored = None if folder is None else _load_layer(folder, h, key, words.shape[:2], k)
            if (
                stored is None or h == 0
            ):  # the first layer is always read: its caches are needed, and it tells the model
                parts = []
                for rows, logits in reader.read(words, last=h + 1 == horizon):
                    parts.append(_restrict(policy, logits, k, never, rows))
                    done += len(logits)
                    if progress is not None:
                        progress(done, size.prefixes)
                layer = _Layer(*(np.concatenate(x) for x in zip(*parts, strict=True)))
                if stored is not None:
                    _check_same_model(layer, stored, folder)
                elif folder is not None:
                    _save_layer(folder, h, key, layer)
            else:
                layer = stored
                reader.forget()
                done += len(layer.ids)
                if progress is not None:
                    progress(done, size.prefixes)
            layers.append(layer)
            words = np.concatenate([words.repeat(k, axis=1), layer.ids.reshape(len(prompts), -1, 1)], axis=2)
    return _assemble(policy, prompts, k, layers, initial, pieces, texts, name)


def _restrict(policy: TransformerPolicy, logits: Tensor, k: int, never: list[int], where: str) -> _Layer:
    import torch

    laws = _laws(policy, logits, where)
    V = laws.shape[1]
    if never[0] < 0 or never[-1] >= V:
        raise ValueError(
            f"banned tokens run from {never[0]} to {never[-1]}; the model has tokens 0 to {V - 1}"
        )
    usable = torch.ones(V, dtype=torch.bool, device=laws.device)
    usable[never] = False
    able = usable.nonzero()[:, 0]
    if k > len(able):
        raise ValueError(
            f"k is {k}; {len(able)} tokens are left when the end tokens and the banned ones are not"
        )
    top = laws[:, able].topk(min(k + 1, len(able)), dim=1)
    ids = able[top.indices[:, :k]]
    chosen = _actions(policy, laws, ids, where)
    steps = (top.values[:, :-1] - top.values[:, 1:]).nan_to_num(
        nan=0.0, posinf=torch.inf
    )  # -inf twice is a tie
    margin = steps.min(1).values if steps.shape[1] else torch.full_like(chosen[:, 0], torch.inf)
    parts = ids, chosen.softmax(1), chosen.exp().sum(1), margin
    return _Layer(*(part.cpu().numpy() for part in parts))


def _laws(policy: TransformerPolicy, logits: Tensor, where: str) -> Tensor:
    """The model's whole law, (n, V) float64 logarithms."""
    check_logits(logits, lambda i: f"{where}, row {i} of the batch")
    return policy.law(logits.double())


def _actions(policy: TransformerPolicy, laws: Tensor, ids: Tensor, where: str) -> Tensor:
    """log of the mass of the k + 1 actions, tokens `ids` (n, k) and the end, (n, k + 1), before it is renormalised."""
    import torch

    end = laws[:, _ends(policy)].logsumexp(1, keepdim=True)
    chosen = torch.cat([laws.gather(1, ids), end], 1)
    if chosen.isneginf().all(1).any():
        raise ValueError(f"at {where} the model gives no mass to any token of the lattice, nor to the end")
    return chosen


def _assemble(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    k: int,
    layers: Sequence[_Layer],
    initial: Array | None,
    pieces: Sequence[str] | None,
    texts: Sequence[str] | None,
    name: str,
) -> Lattice:
    used = np.unique(np.concatenate([np.unique(layer.ids) for layer in layers]))
    kernel = TreeKernel(len(prompts), k, len(layers))
    ended = np.eye(k + 1)[-1:]
    world = TokenMDP(
        kernel=kernel,
        reward=[np.zeros((n, k + 1)) for n in kernel.sizes[:-1]],
        initial=prompt_law(len(prompts), initial),
        action_mask=ended_mask(kernel),
        reference=[np.concatenate([ended, layer.law]) for layer in layers],
        vocabulary=tuple(f"[{i}]" if pieces is None else pieces[i] for i in used),
        tokens=[np.searchsorted(used, layer.ids) for layer in layers],
        prompts=("",) * len(prompts) if texts is None else tuple(texts),
        name=name,
    )
    return Lattice(
        world=world,
        ids=tuple(layer.ids for layer in layers),
        kept=tuple(layer.kept for layer in layers),
        margin=tuple(layer.margin for layer in layers),
        prompts=tuple(tuple(int(t) for t in x) for x in prompts),
        end_ids=tuple(_ends(policy)),
    )


def _ends(policy: TransformerPolicy) -> list[int]:
    assert policy.end_ids is not None
    return [int(i) for i in policy.end_ids]


class _Reader:
    """The logits after every prefix, layer by layer; it keeps the caches of the last layer where they fit."""

    def __init__(
        self, policy: TransformerPolicy, prompts: Sequence[Tokens], k: int, batch: int, budget: float
    ) -> None:
        import torch

        # A batch's parents always lie in one batch: c * batch * k, where those change, is a multiple of batch.
        self._policy, self._k, self._batch, self._budget = policy, k, batch, budget
        self._prompts = [torch.tensor([[int(t) for t in x]], device=policy.device) for x in prompts]
        self._roots: list[Any] = [None] * len(prompts)
        self._parents: list[list[Any]] | None = None
        self._bytes = 0.0

    def forget(self) -> None:
        """Drop the caches of the last layer: the next one reads its own tokens on the prompts' caches."""
        self._parents, self._bytes = None, 0.0

    def read(self, words: Index, last: bool) -> Iterator[tuple[str, Tensor]]:
        """(place, logits (n, V)) for the prefixes of a layer, words (prompts, n, h): by prompts, then by batches."""
        import torch

        prompts, n, h = words.shape
        # Layer 0 is the roots, which stay; a deeper layer is kept if it fits together with its parents.
        size = (
            0.0
            if h == 0
            else n * sum(_cache_bytes(c) * (1 + h / x.shape[1]) for c, x in self._with_prompts())
        )
        keep = bool(self._policy.cached) and not last and h > 0 and size + self._bytes <= self._budget
        caches: list[list[Any]] = [[] for _ in range(prompts)]
        for i in range(prompts):
            own = torch.as_tensor(words[i], device=self._policy.device)
            for first in range(0, n, self._batch):
                rows = slice(first, min(first + self._batch, n))
                logits, cache = self._call(i, own, rows)
                if keep:
                    caches[i].append(cache)
                yield f"prompt {i}, prefixes {rows.start} to {rows.stop - 1} of layer {h}", logits
        if h == 0:
            self._parents, self._bytes = ([[c] for c in self._roots] if self._policy.cached else None), 0.0
        else:
            self._parents, self._bytes = (caches, size) if keep else (None, 0.0)

    def _with_prompts(self) -> Iterator[tuple[Any, Tensor]]:
        return zip(self._roots, self._prompts, strict=True)

    def _call(self, i: int, own: Tensor, rows: slice) -> tuple[Tensor, Any]:
        """Logits (n, V) after the prefixes own[rows] of prompt i, and their cache."""
        import torch

        prompt, count, h = self._prompts[i], rows.stop - rows.start, own.shape[1]
        where = torch.arange(rows.start, rows.stop, device=own.device)
        cache: Any = "new" if self._policy.cached else None
        if not self._policy.cached or h == 0:
            new = torch.cat([prompt.expand(count, -1), own[rows]], 1)
        elif self._parents is None:
            cache, new = copy_of(self._roots[i], torch.zeros_like(where)), own[rows]
        else:
            parents = where // self._k
            which = int(parents[0]) // self._batch
            cache = copy_of(self._parents[i][which], parents - which * self._batch)
            new = own[rows, -1:]
        total = prompt.shape[1] + h
        mask = torch.ones(count, total, dtype=torch.long, device=own.device)
        positions = torch.arange(total - new.shape[1], total, device=own.device).expand(count, -1)
        logits, after = self._policy.logits(new, mask, positions, keep=1, cache=cache)
        if h == 0:
            self._roots[i] = after
        return logits[:, 0], after


def _cache_bytes(cache: Any) -> float:
    """Bytes of a cache's tensors."""
    tensors = [
        x
        for layer in getattr(cache, "layers", ())
        for x in vars(layer).values()
        if hasattr(x, "element_size")
    ]
    return float(sum(x.numel() * x.element_size() for x in tensors))


# ---- finished layers on disk ---------------------------------------------------------------------------------------


def _save_layer(folder: Path, h: int, key: str, layer: _Layer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    meta = np.frombuffer(key.encode(), dtype=np.uint8)
    replace_file(
        folder / f"layer_{h}.npz",
        lambda file: np.savez_compressed(file, allow_pickle=False, meta=meta, **layer._asdict()),
    )


def _load_layer(folder: Path, h: int, key: str, shape: tuple[int, ...], k: int) -> _Layer | None:
    path = folder / f"layer_{h}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            meta = archive["meta"].tobytes().decode()
            layer = _Layer(*(archive[field] for field in _Layer._fields))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or no layer of a lattice ({error}): delete it") from error
    n = int(np.prod(shape))
    if meta != key or layer.ids.shape != (n, k) or layer.law.shape != (n, k + 1):
        raise ValueError(
            f"{path} belongs to a lattice with other prompts, k, end tokens, banned tokens or temperature: "
            "take another folder"
        )
    return layer


def _check_same_model(layer: _Layer, stored: _Layer, folder: Path | None) -> None:
    if not np.array_equal(layer.ids, stored.ids) or not np.allclose(layer.law, stored.law, atol=1e-4):
        raise ValueError(
            f"{folder} holds layers of another model: its first layer differs; take another folder"
        )


# ---- from a lattice to a trainable policy --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LatticePolicy:
    """A language model on the tokens of a lattice: renormalised at each prefix over its k tokens and the end.

    theta is all trainable weights of the model as one vector (`start`, `write`), so that `minimise` works on it as on a
    table; where theta is None the model's own weights are used, and gradients go to them, as a trainer wants it.
    Everything is float64 after the model's logits; for exact work let the model be float64 too.
    """

    policy: TransformerPolicy
    lattice: Lattice
    batch: int = 64

    def __post_init__(self) -> None:
        if _ends(self.policy) != list(self.lattice.end_ids):
            raise ValueError(
                f"the policy ends by {_ends(self.policy)} and the lattice by {list(self.lattice.end_ids)}"
            )
        if self.policy.top_k is not None or self.policy.top_p is not None:
            raise ValueError("a lattice truncates by itself: take a policy without top_k and top_p")
        largest = max(int(ids.max()) for ids in self.lattice.ids)
        if self.policy.vocabulary is not None and largest >= self.policy.vocabulary:
            raise ValueError(
                f"the lattice has token {largest}; the model has {self.policy.vocabulary} tokens"
            )
        self.policy.check(self.lattice.prompts, horizon=self.lattice.world.horizon)

    @cached_property
    def tree(self) -> PrefixTree:
        """The table of which this policy is a restriction: one logit a prefix and action."""
        kernel = self.lattice.world.kernel
        assert isinstance(kernel, TreeKernel)
        return PrefixTree(kernel)

    @property
    def prompts(self) -> int:
        return self.tree.prompts

    @property
    def responses(self) -> int:
        return self.tree.responses

    @cached_property
    def _trainable(self) -> list[tuple[str, Any]]:
        if not hasattr(self.policy.model, "named_parameters"):
            raise ValueError(
                f"{type(self.policy.model).__name__} is no torch module: its weights are not known"
            )
        return [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """The number of trainable weights."""
        return sum(p.numel() for _, p in self._trainable)

    def start(self, log_law: Array | None = None) -> Tensor:
        """theta: the model's weights as they are, float64."""
        import torch

        if log_law is not None:
            raise ValueError("no weights are known for a given law: start from the model's own, log_law=None")
        return torch.cat([p.detach().double().reshape(-1) for _, p in self._trainable])

    def write(self, theta: Tensor) -> None:
        """Let theta be the model's weights."""
        import torch

        with torch.no_grad():
            for (_, p), values in zip(self._trainable, self._split(theta), strict=True):
                p.copy_(values.reshape(p.shape))

    def _split(self, theta: Tensor) -> list[Tensor]:
        if theta.shape != (self.size,):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}; the model has {self.size} trainable weights"
            )
        return list(theta.split([p.numel() for _, p in self._trainable]))

    def logits(self, theta: Tensor | None = None) -> Tensor:
        """(tree.size,) the parameters of `tree` that are this policy: log-probabilities up to a constant a prefix."""
        import torch

        policy = self.policy
        if theta is not None:
            named = zip(self._trainable, self._split(theta), strict=True)
            weights = {name: values.reshape(p.shape).to(p) for (name, p), values in named}
            policy = replace(policy, model=_WithWeights(policy.model, weights))
        k, prompts = self.lattice.world.branching, self.lattice.prompts
        reader = _Reader(policy, prompts, k, self.batch, float("inf"))
        words: Index = np.empty((len(prompts), 1, 0), dtype=np.int64)
        parts = []
        for h, ids in enumerate(self.lattice.ids):
            first = 0
            for where, logits in reader.read(words, last=h + 1 == len(self.lattice.ids)):
                kept = torch.as_tensor(ids[first : first + len(logits)], device=logits.device)
                parts.append(_actions(policy, _laws(policy, logits, where), kept, where).reshape(-1))
                first += len(logits)
            words = np.concatenate([words.repeat(k, axis=1), ids.reshape(len(prompts), -1, 1)], axis=2)
        return torch.cat(parts).cpu()

    def log_probabilities(self, theta: Tensor | None = None) -> Tensor:
        """log pi(y|x) of all responses, (prompts * responses,), in the order of the lattice's leaves."""
        return self.tree.log_probabilities(self.logits(theta))

    def token_log_probabilities(self, theta: Tensor | None = None) -> Tensor:
        """(prompts * responses, H), 0 after the last action."""
        return self.tree.token_log_probabilities(self.logits(theta))

    def tables(self, theta: Tensor | None = None) -> tuple[Array, ...]:
        """The policy of the lattice's TokenMDP, (S_h, k + 1) each."""
        import torch

        with torch.no_grad():
            return self.tree.policy(self.logits(theta))


class _WithWeights:
    """A module called with other weights than its own."""

    def __init__(self, model: Any, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = model, weights

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        from torch.func import functional_call

        return functional_call(self._model, self._weights, inputs, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
