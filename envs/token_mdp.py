"""TokenMDP: writing a response one token at a time, as an exactly known finite-horizon MDP.

States are prefixes, actions are tokens. At each live prefix one may append one of k tokens or end the response
(the EOS action, number k). A response ends by EOS or by its H-th token. The transition kernel is a `TreeKernel`,
which stores nothing, so that the memory is that of the rewards and of the reference policy.

Symbols: x = prompt (the first state), y = response, pi_ref = the reference policy, phi(prefix, token) in R^d.

A *leaf* is one (prompt, response). The leaves of a prompt are numbered by length, 0 to H, and within a length in the
order of their words; those of the next prompt follow. Every quantity of whole responses (reward, probability,
features) is an array over leaves, (roots * L, ...), where L = 1 + k + ... + k^H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from .features import FeatureMap
from .kernels import Array, Index, TreeKernel
from .mdp import FiniteMDP, Layered, check_distribution
from .trajectories import Trajectories

ENDED = "<ended>"
# (prompt (n,), tokens (n, H) with -1 from the end of the response on) -> rewards (n,)
ResponseReward = Callable[[Index, Index], np.ndarray]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMDP(FiniteMDP):
    """A FiniteMDP on a prefix tree, with texts and a reference policy.

    kernel      a `TreeKernel(roots = number of prompts, branching = k, horizon = H)`; state 0 of each layer is "ended",
                states 1 + i are the live prefixes; action k is EOS
    prompts     the text of each root (shown in front of the response); empty texts when not given
    vocabulary  the string table: k strings shared by all prefixes, or what `tokens` points into
    tokens      tokens[h]: (n_h, k) indices into `vocabulary`, where each prefix has its own k tokens; None = shared
    reference   pi_ref[h]: (S_h, k+1), rows are probability vectors and the ended state takes EOS; None = uniform
    gold        a second reward, over leaves (n_leaves,): the true objective where `reward` is a model of it
    provenance  where the numbers come from (JSON-able)

    In the ended state all actions are equal: reward 0, features 0, the state absorbs. `ended_mask` restricts it to EOS;
    pass it as `action_mask` where an exact KL to `reference` of a deterministic policy is wanted (the reference has no
    other mass there). Large trees are better without a mask.
    """

    reference: Layered | None = None  # type: ignore[assignment]
    vocabulary: tuple[str, ...] = ()
    tokens: Sequence[np.ndarray] | None = None
    prompts: tuple[str, ...] = ()
    gold: Array | None = None
    provenance: Mapping[str, Any] | None = None
    name: str = "TokenMDP"

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, TreeKernel):
            raise TypeError(f"kernel is a {type(self.kernel).__name__}; a TokenMDP lives on a TreeKernel")
        super().__post_init__()
        if self.initial[0] > 0:
            raise ValueError(
                f"initial[0] is {self.initial[0]:.6g}: a response cannot begin in the ended state"
            )
        self._check_texts()
        self._check_ended()
        reference = self._uniform_reference() if self.reference is None else self.reference
        layers = tuple(np.asarray(p, dtype=np.float64) for p in reference)
        if len(layers) != self.horizon:
            raise ValueError(f"reference has {len(layers)} layers but the horizon is {self.horizon}")
        for h, p in enumerate(layers):
            if p.shape != (self.sizes[h], self.n_actions):
                raise ValueError(
                    f"reference[h={h}] has shape {p.shape}; expected {(self.sizes[h], self.n_actions)}"
                )
            check_distribution(p, f"reference[h={h}]")
            if p[0, -1] != 1.0:
                raise ValueError(
                    f"reference[h={h}, s=0] must take EOS (action {self.branching}) with probability 1"
                )
        object.__setattr__(self, "reference", layers)
        if self.gold is not None:
            object.__setattr__(self, "gold", self._leaf_array(self.gold, "gold"))

    def _check_texts(self) -> None:
        vocabulary = tuple(self.vocabulary)
        if not vocabulary and self.tokens is None:
            vocabulary = default_vocabulary(self.branching)
        if self.tokens is None and len(vocabulary) != self.branching:
            raise ValueError(
                f"vocabulary has {len(vocabulary)} strings but each prefix has {self.branching} tokens; "
                "give that many (EOS is not one of them), or per-prefix `tokens`"
            )
        object.__setattr__(self, "vocabulary", vocabulary)
        prompts = tuple(self.prompts) or ("",) * self.roots
        if len(prompts) != self.roots:
            raise ValueError(f"{len(prompts)} prompts but the tree has {self.roots} roots")
        object.__setattr__(self, "prompts", prompts)
        if self.tokens is None:
            return
        layers = tuple(np.asarray(t) for t in self.tokens)
        if len(layers) != self.horizon:
            raise ValueError(f"tokens has {len(layers)} layers but the horizon is {self.horizon}")
        for h, t in enumerate(layers):
            if t.shape != (self.sizes[h] - 1, self.branching):
                raise ValueError(
                    f"tokens[h={h}] has shape {t.shape}; expected {(self.sizes[h] - 1, self.branching)}"
                )
            if not np.issubdtype(t.dtype, np.integer):
                raise TypeError(f"tokens[h={h}] has dtype {t.dtype}; expected integers")
            if t.min() < 0 or t.max() >= len(vocabulary):
                i, a = np.argwhere((t < 0) | (t >= len(vocabulary)))[0]
                raise ValueError(
                    f"tokens[h={h}, prefix={i}, a={a}] is {t[i, a]}, outside the table of {len(vocabulary)} strings"
                )
        object.__setattr__(self, "tokens", layers)

    def _check_ended(self) -> None:
        """The ended state pays nothing, else responses would have rewards after their end."""
        for h in range(self.horizon):
            if np.any(self.reward[h][0]):
                raise ValueError(f"reward[h={h}, s=0] is not 0: the ended state pays nothing")
            if self.features is not None and np.any(self.features.phi[h][0]):
                raise ValueError(f"phi[h={h}, s=0] is not 0: the ended state has no features")

    def _uniform_reference(self) -> list[Array]:
        layers = [np.full((n, self.n_actions), 1.0 / self.n_actions) for n in self.sizes[:-1]]
        for p in layers:
            p[0] = np.eye(self.n_actions)[-1]
        return layers

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def from_response_reward(
        cls,
        response_reward: ResponseReward | np.ndarray,
        *,
        horizon: int,
        vocabulary: Sequence[str] | int | None = None,
        tokens: Sequence[np.ndarray] | None = None,
        prompts: Sequence[str] = ("",),
        initial: Array | None = None,
        chunk: int = 1 << 18,
        **rest: Any,
    ) -> Self:
        """The reward is given on the whole response and is paid with its last action; all others pay 0.

        response_reward  an array over leaves, (n_leaves,), or a function of prompts (n,) and tokens (n, H), where
                         tokens are action numbers and -1 stands from the end of the response on. The function is
                         called on at most `chunk` leaves at a time.
        vocabulary       the shared strings, or their number k; with `tokens` the table that they point into
        initial          the law of the prompts, (roots,); None = uniform
        No transition table is built; the largest array is the last layer of the reward, (1 + roots k^(H-1), k+1).
        """
        if tokens is not None:
            branching = int(np.asarray(tokens[0]).shape[1])
        elif isinstance(vocabulary, int | np.integer):
            branching = int(vocabulary)
        else:
            branching = len(vocabulary or ())
        strings = () if vocabulary is None or isinstance(vocabulary, int | np.integer) else tuple(vocabulary)
        kernel = TreeKernel(len(prompts), branching, horizon)
        return cls(
            kernel=kernel,
            reward=_spread(kernel, response_reward, chunk),
            initial=prompt_law(len(prompts), initial),
            vocabulary=strings,
            tokens=tokens,
            prompts=tuple(prompts),
            **rest,
        )

    @classmethod
    def from_language_model(cls, *args: Any, **options: Any) -> TokenMDP:
        """A transformers causal language model cut down to k tokens a step: see `language_model.build`."""
        from .language_model import build

        return build(*args, **options)

    def with_response_reward(self, response_reward: ResponseReward | np.ndarray, **changes: Any) -> Self:
        """The same tree with another reward on whole responses (the features stay, theta goes)."""
        reward = _spread(self._tree, response_reward, 1 << 18)
        return self.replace(**({"theta": None} | changes | {"reward": reward}))

    def with_gold_reward(self) -> Self:
        """The same tree, paid by the gold reward."""
        if self.gold is None:
            raise ValueError(f"{self.name} has no gold reward; give one as `gold`, an array over its leaves")
        return self.with_response_reward(self.gold, name=f"{self.name} (gold reward)")

    # ---- shapes ------------------------------------------------------------------------------------------------

    @property
    def _tree(self) -> TreeKernel:
        assert isinstance(self.kernel, TreeKernel)
        return self.kernel

    @property
    def roots(self) -> int:
        return self._tree.roots

    @property
    def branching(self) -> int:
        """k, the number of tokens at each prefix; also the number of the EOS action."""
        return self._tree.branching

    @cached_property
    def ended_mask(self) -> Layered:
        """mask[h]: (S_h, k+1), everything but in the ended state, where only EOS is left."""
        return ended_mask(self._tree)

    @property
    def n_leaves(self) -> int:
        return _n_leaves(self._tree)

    # ---- leaves ------------------------------------------------------------------------------------------------

    def leaf(self, h: Any, state: Any, action: Any) -> Index:
        """The leaf in which (h, state, action), elementwise, ends a response."""
        h, state, action = (np.asarray(x, dtype=np.int64) for x in (h, state, action))
        k, powers = self.branching, _powers(self._tree)
        last = h == self.horizon - 1
        if np.any(state < 1):
            raise ValueError("state 0 is 'ended': no response ends there")
        if np.any(~last & (action != k)):
            raise ValueError(f"before the last step only EOS (action {k}) ends a response")
        prompt, word = np.divmod(state - 1, powers[h])
        full = action < k  # H tokens, the last of them at the last step
        length, word = h + full, np.where(full, word * k + action, word)
        return np.asarray(prompt * powers.sum() + _starts(self._tree)[length] + word)

    def locate(self, leaf: Any) -> tuple[Index, Index, Index]:
        """The (h, state, action) that ends each leaf; inverse of `leaf`."""
        leaf = np.asarray(leaf, dtype=np.int64)
        if np.any((leaf < 0) | (leaf >= self.n_leaves)):
            raise ValueError(f"leaf ids lie in 0..{self.n_leaves - 1}")
        return _locate(self._tree, leaf)

    def trajectories(self, leaf: Any) -> Trajectories:
        """The trajectory of each leaf; after the end: state 0 and EOS."""
        leaf = np.atleast_1d(np.asarray(leaf, dtype=np.int64))
        self.locate(leaf)
        prompts, tokens = _tokens(self._tree, leaf)
        states = np.zeros(tokens.shape, dtype=np.int64)
        s = 1 + prompts
        for h in range(self.horizon):
            states[:, h] = s
            live = (s > 0) & (tokens[:, h] >= 0)
            s = np.where(live, 1 + (s - 1) * self.branching + tokens[:, h], 0)
        return Trajectories(states, np.where(tokens < 0, self.branching, tokens))

    def leaves(self, trajectories: Trajectories) -> Index:
        """The leaf that each trajectory reaches; inverse of `trajectories` up to what is done after the end."""
        s, a = trajectories.states, trajectories.actions
        h = np.minimum((s > 0).sum(axis=1) - 1, self.horizon - 1)
        rows = np.arange(len(s))
        return self.leaf(h, s[rows, h], a[rows, h])

    def responses(self, chunk: int = 1 << 16) -> Iterator[tuple[Index, Trajectories]]:
        """All leaves in order, at most `chunk` at a time: (leaf ids, their trajectories)."""
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1")
        for first in range(0, self.n_leaves, chunk):
            ids = np.arange(first, min(first + chunk, self.n_leaves), dtype=np.int64)
            yield ids, self.trajectories(ids)

    def along(self, layers: Layered) -> Array:
        """Sum a layered quantity (S_h, k+1, ...) along each response: (n_leaves, ...)."""
        trailing = np.shape(layers[0])[2:]
        starts = _starts(self._tree)
        result = np.empty((self.roots, self.n_leaves // self.roots, *trailing))
        prefix: Array = np.zeros((self.roots, 1, 1, *trailing))
        for h in range(self.horizon):
            x = layers[h][1:].reshape(self.roots, -1, self.n_actions, *trailing)
            result[:, starts[h] : starts[h + 1]] = prefix[:, :, 0] + x[:, :, -1]
            written = prefix + x[:, :, :-1]
            prefix = written.reshape(self.roots, -1, 1, *trailing)
        result[:, starts[-1] :] = prefix[:, :, 0]
        return result.reshape(self.n_leaves, *trailing)

    @property
    def leaf_rewards(self) -> Array:
        """r(x, y): (n_leaves,)."""
        return self.along(self.reward)

    @property
    def leaf_features(self) -> Array:
        """phi(x, y) = sum of phi(prefix, token): (n_leaves, d). For features of mode "sum"."""
        if self.features is None or self.features.mode != "sum":
            raise ValueError("leaf features need a FeatureMap of mode 'sum'")
        return self.along(self.features.phi)

    @property
    def leaf_prompts(self) -> Index:
        """The prompt of each leaf: (n_leaves,)."""
        return np.repeat(np.arange(self.roots), self.n_leaves // self.roots)

    def leaf_log_probabilities(self, policy: Layered | None = None) -> Array:
        """log pi(y | x): (n_leaves,), of `policy` (probabilities (S_h, k+1)), by default of the reference."""
        with np.errstate(divide="ignore"):
            return self.along([np.log(p) for p in (self._reference if policy is None else policy)])

    def leaf_probabilities(self, policy: Layered | None = None) -> Array:
        """pi(y | x): (n_leaves,); sums to 1 over the leaves of each prompt."""
        return np.exp(self.leaf_log_probabilities(policy))

    @property
    def _reference(self) -> Layered:
        assert self.reference is not None
        return self.reference

    def _leaf_array(self, values: Any, what: str) -> Array:
        return _checked_leaves(self._tree, values, what)

    # ---- texts -------------------------------------------------------------------------------------------------

    def action_text(self, h: int, state: int, action: int) -> str:
        """The string that an action appends: "" for EOS and in the ended state."""
        if state == 0 or action == self.branching:
            return ""
        if self.tokens is None:
            return self.vocabulary[action]
        return self.vocabulary[int(self.tokens[h][state - 1, action])]

    def decode(self, h: int, state: int) -> str:
        """The text of a prefix, prompt in front; "<ended>" for the ended state, which does not know its text."""
        if not 0 <= h <= self.horizon or not 0 <= state < self.sizes[h]:
            raise ValueError(f"there is no state {state} in layer {h}")
        if state == 0:
            return ENDED
        pieces = []
        for earlier in range(h - 1, -1, -1):
            parent, action = divmod(state - 1, self.branching)
            state = parent + 1
            pieces.append(self.action_text(earlier, state, action))
        return self.prompts[state - 1] + "".join(reversed(pieces))

    def text(self, trajectories: Trajectories) -> list[str]:
        """What each trajectory wrote, prompt in front."""
        return [
            self.prompts[s[0] - 1]
            + "".join(self.action_text(h, int(s[h]), int(a[h])) for h in range(self.horizon) if s[h] > 0)
            for s, a in zip(trajectories.states, trajectories.actions, strict=True)
        ]


def default_vocabulary(k: int) -> tuple[str, ...]:
    """a, b, c, ... where letters suffice, else [0][1][2]..."""
    return tuple(chr(ord("a") + i) for i in range(k)) if k <= 26 else tuple(f"[{i}]" for i in range(k))


def ended_mask(tree: TreeKernel) -> Layered:
    """mask[h]: (S_h, k+1), True but for the tokens of the ended state."""
    layers = [np.ones((n, tree.n_actions), dtype=np.bool_) for n in tree.sizes[:-1]]
    for mask in layers:
        mask[0, :-1] = False
    return tuple(layers)


def prompt_law(roots: int, law: Array | None = None) -> Array:
    """The law of the first state, (1 + roots,), from a law of the prompts, (roots,); uniform when None."""
    given = np.full(roots, 1.0 / roots) if law is None else np.asarray(law, dtype=np.float64)
    return np.concatenate([[0.0], given])


def random_token_mdp(
    vocabulary: int = 3,
    horizon: int = 4,
    prompts: int = 1,
    seed: int | np.random.Generator = 0,
    d: int = 6,
    concentration: float = 1.0,
) -> TokenMDP:
    """A random token MDP whose reward is linear: V = vocabulary tokens and EOS, H = horizon.

    Reference rows are Dirichlet(concentration). Features are random points of the d-simplex, scaled so that those of
    a whole response add up to a point of the simplex (1/H a token; EOS before the last step takes what is left), and
    theta is uniform in [0,1]^d: every ||phi||_2 <= 1, every reward and every return lies in [0,1], and no length is
    favoured. V = 3, H = 4 has 81 responses of full length.
    """
    if d < 1:
        raise ValueError(f"d is {d}; it must be at least 1")
    rng = np.random.default_rng(seed)
    kernel = TreeKernel(prompts, vocabulary, horizon)
    reference, phi = [], []
    for h, n in enumerate(kernel.sizes[:-1]):
        rows = rng.dirichlet(np.full(vocabulary + 1, concentration), size=n)
        rows[0] = np.eye(vocabulary + 1)[-1]
        reference.append(rows)
        x = rng.dirichlet(np.ones(d), size=(n, vocabulary + 1)) / horizon
        x[:, -1] *= horizon - h
        x[0] = 0.0
        phi.append(x)
    features = FeatureMap(phi)
    theta = rng.random(d)
    return TokenMDP(
        kernel=kernel,
        reward=features.rewards(theta),
        initial=prompt_law(prompts),
        action_mask=ended_mask(kernel),
        features=features,
        theta=theta,
        reference=reference,
        prompts=tuple(f"{i}: " for i in range(prompts)) if prompts > 1 else ("",),
        name=f"random token MDP (V={vocabulary}, H={horizon})",
    )


# ---- the numbering of leaves, on a bare tree ---------------------------------------------------------------------


def _powers(tree: TreeKernel) -> Index:
    """The number of responses of length 0, ..., H of a prompt."""
    return tree.branching ** np.arange(tree.horizon + 1, dtype=np.int64)


def _starts(tree: TreeKernel) -> Index:
    """starts[l] = number of the first response of length l of a prompt."""
    powers = _powers(tree)
    return np.cumsum(powers) - powers


def _n_leaves(tree: TreeKernel) -> int:
    return tree.roots * int(_powers(tree).sum())


def _split(tree: TreeKernel, leaf: Index) -> tuple[Index, Index, Index]:
    """The prompt of each leaf, its length, and its word: the tokens as digits of a number to the base k."""
    prompt, inner = np.divmod(leaf, _powers(tree).sum())
    length = np.searchsorted(_starts(tree), inner, side="right") - 1
    return prompt, length, inner - _starts(tree)[length]


def _locate(tree: TreeKernel, leaf: Index) -> tuple[Index, Index, Index]:
    k, powers = tree.branching, _powers(tree)
    prompt, length, word = _split(tree, leaf)
    full = length == tree.horizon
    h = np.where(full, tree.horizon - 1, length)
    state = 1 + prompt * powers[h] + np.where(full, word // k, word)
    return h, state, np.where(full, word % k, k)


def _tokens(tree: TreeKernel, leaf: Index) -> tuple[Index, Index]:
    """Prompts (n,) and tokens (n, H) of leaves, -1 from the end of the response on."""
    prompt, length, word = _split(tree, leaf)
    tokens = np.full((len(leaf), tree.horizon), -1, dtype=np.int64)
    for step in range(tree.horizon - 1, -1, -1):
        written = length > step
        tokens[written, step] = word[written] % tree.branching
        word = np.where(written, word // tree.branching, word)
    return prompt, tokens


def _checked_leaves(tree: TreeKernel, values: Any, what: str) -> Array:
    leaves = np.asarray(values, dtype=np.float64)
    if leaves.shape != (_n_leaves(tree),):
        raise ValueError(
            f"{what} has shape {leaves.shape}; expected one number per leaf, ({_n_leaves(tree)},)"
        )
    if not np.isfinite(leaves).all():
        i = int(np.flatnonzero(~np.isfinite(leaves))[0])
        raise ValueError(f"{what}[leaf={i}] is {leaves[i]}; rewards must be finite")
    return leaves


def _spread(tree: TreeKernel, response_reward: ResponseReward | np.ndarray, chunk: int) -> list[Array]:
    """r[h]: (S_h, k+1) with the leaf's reward at the action that ends it and 0 elsewhere."""
    if callable(response_reward):
        leaves = np.empty(_n_leaves(tree))
        for first in range(0, len(leaves), chunk):
            ids = np.arange(first, min(first + chunk, len(leaves)), dtype=np.int64)
            leaves[ids] = response_reward(*_tokens(tree, ids))
    else:
        leaves = _checked_leaves(tree, response_reward, "response reward")
    starts, by_prompt = _starts(tree), leaves.reshape(tree.roots, -1)
    layers = [np.zeros((n, tree.n_actions)) for n in tree.sizes[:-1]]
    for h, r in enumerate(layers):
        r[1:, -1] = by_prompt[:, starts[h] : starts[h + 1]].reshape(-1)
    layers[-1][1:, :-1] = by_prompt[:, starts[-1] :].reshape(-1, tree.branching)
    return layers
