r"""An exact world that feeds a trainer its whole population as one batch.

Responses are the leaves of a prefix tree (`PrefixTree`: every prefix has its own softmax over k tokens and the end), so
they have unequal lengths; prompts have unequal lengths too. All laws that a batch is drawn from are made of whole
numbers: a response of probability 3/24 stands three times among 24 rows, a preference of 3/4 is three rows of one label
and one of the other. So the mean over one batch IS the expectation, to rounding, for a trainer that knows no weights.

  pairs      y, y' iid from pi_t (y != y'), labels with P(y > y') in {1/4, 1/2, 3/4}
  exploring  pairs of XPO: y from pi_t, y~ from the reference
  samples    groups of three responses of the policy to one prompt: (i, j, i + j mod N) over all i, j < N, an orthogonal
             array, in which any two members are independent, so that baselines made of the others are unbiased

The parameters are the tree's logits, then those of the prompt's tokens and of padding, which a right loss leaves alone.
The optimum is decided first, and rewards and preferences are made from it (`ExactWorld.reward_of`, `game_of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ...algorithms.optimisation import Pairs, PrefixTree
from ...algorithms.planning.sequences import leaf_tokens
from ...envs.kernels import Array, Index, TreeKernel
from .batch import Completions, PairBatch, SampleBatch

if TYPE_CHECKING:
    from torch import Tensor

TOTAL = 24  # the number of rows that a prompt's law is spread over
CHUNKS = 4  # micro-batches
GROUP = 3


@dataclass(frozen=True, eq=False)
class ExactWorld:
    """`prompts` prompts, k tokens, horizon H; laws are counts (prompts, L), each row adding up to TOTAL.

    policy, reference, previous, optimum  counts of the laws
    start        parameters at which pair losses are compared: a policy far from the reference
    strengths    (prompts, L) in {1, 3}: P(y > y') = a / (a + a') is Bradley-Terry with rewards log a
    general      (prompts, L, L) preferences in {1/4, 1/2, 3/4}, no reward behind them
    """

    table: PrefixTree
    policy: Index
    reference: Index
    previous: Index
    optimum: Index
    start: Array
    reference_extra: Array
    strengths: Index
    general: Array
    prompt_lengths: tuple[int, ...]

    # ---- sequences -----------------------------------------------------------------------------------------------

    @property
    def responses(self) -> int:
        return self.table.responses

    @property
    def end(self) -> int:
        return self.table.tree.branching

    @cached_property
    def width(self) -> int:
        """T: room for the longest prompt, the longest completion and at least one position of padding."""
        return max(self.prompt_lengths) + self.table.tree.horizon + 1

    @cached_property
    def _layout(self) -> tuple[Index, Index, Index]:
        """ids (n, T), mask (n, T) and where each position's log-probability lies in `_flat`, (n, T)."""
        tree, L, H = self.table.tree, self.responses, self.table.tree.horizon
        n, offsets = self.table.prompts * L, np.cumsum((0, *self.prompt_lengths))
        ids = np.full((n, self.width), self.end, dtype=np.int64)
        mask = np.zeros((n, self.width), dtype=bool)
        where = np.full((n, self.width), n * H + offsets[-1], dtype=np.int64)  # the last entry: padding
        for i in range(n):
            prompt, leaf = divmod(i, L)
            words, length = leaf_tokens(tree, leaf), int(self.table.lengths[i])
            first = self.prompt_lengths[prompt]
            ids[i, :first] = np.arange(first) % self.end
            where[i, :first] = n * H + offsets[prompt] + np.arange(first)
            ids[i, first : first + len(words)] = words
            mask[i, first : first + length] = True
            where[i, first : first + length] = i * H + np.arange(length)
        return ids, mask, where

    @property
    def extra(self) -> int:
        """Parameters beyond the tree's: a softmax for each token of a prompt, and one for padding."""
        return (sum(self.prompt_lengths) + 1) * (self.end + 1)

    @property
    def size(self) -> int:
        return self.table.size + self.extra

    def token_log_probabilities(self, theta: Tensor) -> Tensor:
        """(n, T): all responses to all prompts, prompt and padding included."""
        import torch

        _, _, where = self._layout
        tokens = self.table.token_log_probabilities(theta[: self.table.size]).reshape(-1)
        rows = theta[self.table.size :].reshape(-1, self.end + 1).log_softmax(1)
        spoken = [int(j) for length in self.prompt_lengths for j in np.arange(length) % self.end]
        outside = rows[torch.arange(len(rows)), torch.tensor([*spoken, self.end])]
        return torch.cat([tokens, outside])[torch.as_tensor(where)]

    def parameters(self, log_law: Array, extra: Array | None = None) -> Tensor:
        """theta of a law (prompts, L), given by its logarithm."""
        import torch

        outside = np.zeros(self.extra) if extra is None else extra
        return torch.cat([self.table.start(log_law), torch.as_tensor(outside)])

    def of_counts(self, counts: Index) -> Tensor:
        return self.parameters(np.log(counts / TOTAL), self.start[self.table.size :])

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        """Token log-probabilities of the reference and of pi_t, (n, T)."""
        reference = self.parameters(np.log(self.reference / TOTAL), self.reference_extra)
        previous = self.parameters(np.log(self.previous / TOTAL), self.reference_extra[::-1].copy())
        return self.token_log_probabilities(reference), self.token_log_probabilities(previous)

    def completions(self, tokens: Tensor, rows: Index) -> Completions:
        import torch

        ids, mask, _ = self._layout
        at, (reference, previous) = torch.as_tensor(rows), self._constants

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, at)

        return Completions(
            pick(tokens),
            pick(reference),
            pick(previous),
            pick(torch.as_tensor(mask)),
            pick(torch.as_tensor(ids)),
            self.end,
        )

    def lengths(self, rows: Index) -> Index:
        return np.asarray(self.table.lengths)[rows]

    # ---- laws as rows --------------------------------------------------------------------------------------------

    def rows_of(self, counts: Index) -> Index:
        """(prompts, TOTAL): every response as often as it is counted."""
        L = self.responses
        return np.stack([x * L + np.repeat(np.arange(L), c) for x, c in enumerate(counts)])

    def preferences(self, general: bool) -> Array:
        """P (prompts, L, L)."""
        if general:
            return self.general
        a = self.strengths.astype(float)
        return a[:, :, None] / (a[:, :, None] + a[:, None, :])

    def population(self, general: bool) -> Pairs:
        """The pairs with their exact probabilities, for exact gradients."""
        L, index, preferred, weight = self.responses, [], [], []
        for x, (m, P) in enumerate(zip(self.previous, self.preferences(general), strict=True)):
            first, second = np.triu_indices(L, 1)
            index.append(np.stack([first, second], axis=1) + x * L)
            preferred.append(P[first, second])
            weight.append(m[first] * m[second])
        return Pairs(np.concatenate(index), np.concatenate(preferred), np.concatenate(weight))

    def pair_rows(self, general: bool) -> tuple[Index, Index]:
        """Numbers of the chosen and of the rejected response, one entry a row of the batch that is the population."""
        chosen, rejected = [], []
        for x, (m, P) in enumerate(zip(self.previous, self.preferences(general), strict=True)):
            first, second = np.triu_indices(self.responses, 1)
            won = np.rint(4 * P[first, second]).astype(int)
            times = m[first] * m[second]
            base = x * self.responses
            w = np.concatenate([np.repeat(first, times * won), np.repeat(second, times * (4 - won))])
            loser = np.concatenate([np.repeat(second, times * won), np.repeat(first, times * (4 - won))])
            chosen.append(base + w)
            rejected.append(base + loser)
        return np.concatenate(chosen), np.concatenate(rejected)

    def exploring_rows(self) -> tuple[Index, Index, Index]:
        """`pair_rows` of XPO: y drawn from pi_t, y~ from the reference, labels of Bradley-Terry; and the number of y~.

        y = y~ happens, and is a row of each label like any other pair: the bonus of XPO counts all y~.
        """
        chosen, rejected, drawn = [], [], []
        L = self.responses
        for x, (m, ref, P) in enumerate(
            zip(self.previous, self.reference, self.preferences(False), strict=True)
        ):
            y, other = (z.reshape(-1) for z in np.meshgrid(np.arange(L), np.arange(L), indexing="ij"))
            won, times = np.rint(4 * P[y, other]).astype(int), m[y] * ref[other]
            for winner, loser, count in ((y, other, times * won), (other, y, times * (4 - won))):
                chosen.append(x * L + np.repeat(winner, count))
                rejected.append(x * L + np.repeat(loser, count))
                drawn.append(x * L + np.repeat(other, count))
        return np.concatenate(chosen), np.concatenate(rejected), np.concatenate(drawn)

    def group_rows(self, counts: Index) -> Index:
        """(groups, GROUP) numbers of responses; see the module for the design."""
        i, j = (x.reshape(-1) for x in np.meshgrid(np.arange(TOTAL), np.arange(TOTAL), indexing="ij"))
        design = np.stack([i, j, (i + j) % TOTAL], axis=1)
        return np.concatenate([rows[design] for rows in self.rows_of(counts)])

    # ---- rewards and games made from an optimum ----------------------------------------------------------------------

    def reward_of(self, beta: float) -> Array:
        """(prompts, L): r = beta log optimum/reference + a constant of the prompt, so that the optimum is known."""
        r = beta * (np.log(self.optimum) - np.log(self.reference))
        return r + np.arange(1, len(r) + 1)[:, None] / 4

    def game_of(self, tau: float, share: float) -> Array:
        """P (prompts, L, L) with P(. > m) = 1/2 + tau log optimum/reference + const, m the mixture of the optimum.

        m is proportional to optimum^{1 - share} reference^share. P - 1/2 = v 1^T - 1 v^T + (u w^T - w u^T), with u and
        w orthogonal to m, so that who the opponent is matters, except at the optimum.
        """
        L, rng, games = self.responses, np.random.default_rng(5), []
        for best, ref in zip(self.optimum / TOTAL, self.reference / TOTAL, strict=True):
            m = best ** (1 - share) * ref**share
            m /= m.sum()
            v = tau * np.log(best / ref)
            v -= v @ m
            u, w = rng.normal(size=(2, L))
            u, w = u - u @ m, w - w @ m
            A = v[:, None] - v[None, :]
            turn = np.outer(u, w) - np.outer(w, u)
            room = 0.45 - np.abs(A).max()
            if room <= 0:
                raise ValueError(
                    f"tau is {tau}; this world's game needs tau <= {tau * 0.4 / np.abs(A).max():.2g}"
                )
            games.append(0.5 + A + turn * min(0.25, room) / np.abs(turn).max())
        return np.stack(games)

    # ---- batches -------------------------------------------------------------------------------------------------

    def pair_batch(
        self, tokens: Tensor, chosen: Index, rejected: Index, drawn: Index | None = None
    ) -> PairBatch:
        """tokens (n, T): the policy's, of `token_log_probabilities`; drawn: by the reference, None = its whole law."""
        one = self.completions
        drawn = self.rows_of(self.reference).reshape(-1) if drawn is None else drawn
        return PairBatch(one(tokens, chosen), one(tokens, rejected), one(tokens, drawn))

    def sample_batch(self, tokens: Tensor, rows: Index, reward: Array, P: Array) -> SampleBatch:
        """tokens (n, T) as above; rows (groups, size); reward (prompts, L); P (prompts, L, L)."""
        import torch

        flat, L = rows.reshape(-1), self.responses
        prompt, y = np.divmod(flat, L)
        mask = torch.as_tensor(self._layout[1])
        log_pi = tokens.detach().masked_fill(~mask, 0.0).sum(1).reshape(-1, L)
        log_ref = torch.as_tensor(np.log(self.reference / TOTAL))
        wins = np.einsum("xij,xj->xi", P, self.previous / TOTAL)
        at = torch.as_tensor(prompt)
        return SampleBatch(
            self.completions(tokens, flat),
            torch.as_tensor(reward[prompt, y]),
            torch.as_tensor(wins[prompt, y]),
            torch.arange(len(rows)).repeat_interleave(rows.shape[1]),
            rows.shape[1],
            log_pi[at],
            log_ref[at],
            torch.as_tensor(P[prompt, y]),
        )


def _counts(rng: np.random.Generator, prompts: int, L: int, most: int = 3) -> Index:
    """(prompts, L) whole numbers, at least 1 and at most `most`, adding up to TOTAL in each row."""
    rows = np.ones((prompts, L), dtype=np.int64)
    for row in rows:
        while row.sum() < TOTAL:
            i = rng.integers(L)
            row[i] += row[i] < most
    return rows


@lru_cache(maxsize=4)
def exact_world(seed: int = 0) -> ExactWorld:
    """Two prompts of one and three tokens, k = 2, H = 3: 15 responses each, of 1, 2 or 3 tokens with their end."""
    rng = np.random.default_rng([seed, 977])
    table = PrefixTree(TreeKernel(2, 2, 3))
    L, lengths = table.responses, (1, 3)
    general = np.full((2, L, L), 0.5)
    first, second = np.triu_indices(L, 1)
    for P in general:
        P[first, second] = rng.choice([0.25, 0.5, 0.75], size=len(first))
        P[second, first] = 1 - P[first, second]
    extra = (sum(lengths) + 1) * 3
    policy, reference, previous, optimum = (_counts(rng, 2, L) for _ in range(4))
    return ExactWorld(
        table,
        policy=policy,
        reference=reference,
        previous=previous,
        optimum=optimum,
        start=rng.normal(size=table.size + extra) * 3.0,
        reference_extra=rng.normal(size=extra),
        strengths=rng.choice([1, 3], size=(2, L)),
        general=general,
        prompt_lengths=lengths,
    )
