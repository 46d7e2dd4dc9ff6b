"""Judges: who says what a response is worth, or which of two is better. All of them are given token ids.

    RewardJudge       a number r a response; P(first > second) = sigma((r(first) - r(second)) / scale)
    PreferenceJudge   P(first > second) alone: no reward need stand behind it
    lattice_judge     the exact table of a lattice's responses, of rewards or of preferences
    text_judge        a function of the decoded text; `text_preference` one of two texts
    named_judge       "sentiment", "readability", "real words", "length", "tokens"; several with commas: their majority
    penalise_missing_end   a reward less a penalty where the completion has no end token

(`model_judges` has a reward model, and a language model that is shown both answers.) Any callable on ids is a judge by
the first two: `RewardJudge("short", lambda prompts, completions: [-len(y) for y in completions])`.

P(a > b) + P(b > a) = 1 holds to the last bit. Judges count the questions that they answered and can have a budget
(`budgeted`); beyond it they raise `envs.budget.BudgetExhausted` before anything is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ...envs.annotators import SYMMETRY_TOLERANCE, check_preference_matrix
from ...envs.budget import Asked
from ...envs.judges import DIGITS, JUDGES
from ...envs.kernels import Array, Index
from ...envs.option_table import nearest
from ...envs.trajectories import Trajectories
from ..lattice import Lattice
from ..policy import Tokens

Texts = Sequence[Tokens]
Orders = Literal["check", "average", "trust"]


class Judge(Protocol):
    """rewards (n,) float64, ValueError where the judge has preferences only; preferences (n,) P(first > second)."""

    @property
    def name(self) -> str: ...

    def rewards(self, prompts: Texts, completions: Texts) -> Array: ...

    def preferences(self, prompts: Texts, first: Texts, second: Texts) -> Array: ...


class Questions(Asked):
    """`count` rewards and comparisons answered so far, of at most `budget` (None: no limit).

    Judges draw nothing: the generator of `Asked` stays as it is.
    """

    def __init__(self, budget: int | None = None) -> None:
        super().__init__(0, budget)

    def answered(self, n: int, ask: Callable[[], Array]) -> Array:
        """The answers to n questions; counted once they are there."""
        self._reserve(n)
        answers = ask()
        self.count += n
        return answers


@dataclass(frozen=True, eq=False)
class RewardJudge:
    """A judge with a reward.

    reward  (prompts, completions) -> (n,) numbers, of token ids
    scale   P(first > second) = sigma((r(first) - r(second)) / scale)
    """

    name: str
    reward: Callable[[Texts, Texts], ArrayLike]
    scale: float = 1.0
    questions: Questions = field(default_factory=Questions, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.scale < np.inf:
            raise ValueError(f"judge {self.name!r}: scale is {self.scale}; it must be positive and finite")

    def rewards(self, prompts: Texts, completions: Texts) -> Array:
        check_lengths(self.name, prompts, completions)
        return self.questions.answered(len(prompts), lambda: self._ask(prompts, completions))

    def preferences(self, prompts: Texts, first: Texts, second: Texts) -> Array:
        check_lengths(self.name, prompts, first, second)

        def ask() -> Array:
            both = self._ask([*prompts, *prompts], [*first, *second])
            return sigmoid((both[: len(prompts)] - both[len(prompts) :]) / self.scale)

        return self.questions.answered(len(prompts), ask)

    def _ask(self, prompts: Texts, completions: Texts) -> Array:
        if not len(prompts):
            return np.empty(0)
        return checked(self.name, self.reward(prompts, completions), len(prompts))


@dataclass(frozen=True, eq=False)
class PreferenceJudge:
    """A judge of pairs.

    preference  (prompts, first, second) -> (n,) P(first > second), of token ids
    orders      "check": ask in both orders, and refuse answers that do not sum to one; "average": ask in both, and
                average, for judges that favour a place; "trust": ask once
    """

    name: str
    preference: Callable[[Texts, Texts, Texts], ArrayLike]
    orders: Orders = "check"
    questions: Questions = field(default_factory=Questions, repr=False)

    def __post_init__(self) -> None:
        if self.orders not in ("check", "average", "trust"):
            raise ValueError(f"orders is {self.orders!r}; it is 'check', 'average' or 'trust'")

    def rewards(self, prompts: Texts, completions: Texts) -> Array:
        raise no_rewards(self.name)

    def preferences(self, prompts: Texts, first: Texts, second: Texts) -> Array:
        check_lengths(self.name, prompts, first, second)
        return self.questions.answered(len(prompts), lambda: self._ask(prompts, first, second))

    def _ask(self, prompts: Texts, first: Texts, second: Texts) -> Array:
        n = len(prompts)
        if not n:
            return np.empty(0)
        forth = checked(self.name, self.preference(prompts, first, second), n, 0.0, 1.0)
        if self.orders == "trust":
            return forth
        back = checked(self.name, self.preference(prompts, second, first), n, 0.0, 1.0)
        bad = np.abs(forth + back - 1) > SYMMETRY_TOLERANCE
        if self.orders == "check" and bad.any():
            i = int(bad.argmax())
            raise ValueError(
                f"judge {self.name!r}, row {i}: P(first > second) = {forth[i]:.10g} and P(second > first) = "
                f"{back[i]:.10g} do not sum to 1; a judge that favours a place needs orders='average'"
            )
        return averaged(forth, back)


_Judge = TypeVar("_Judge", RewardJudge, PreferenceJudge)


def budgeted(judge: _Judge, budget: int) -> _Judge:
    """The same judge with a count of its own, from zero, and a budget of answers."""
    return replace(judge, questions=Questions(budget))


# ---- what judges share ---------------------------------------------------------------------------------------------


def no_rewards(name: str) -> ValueError:
    return ValueError(
        f"judge {name!r} has preferences only: take a method that asks for preferences, or a RewardJudge"
    )


def check_lengths(name: str, prompts: Texts, *completions: Texts) -> None:
    if any(len(column) != len(prompts) for column in completions):
        lengths = " and ".join(str(len(column)) for column in completions)
        raise ValueError(f"judge {name!r} is asked about {len(prompts)} prompts with {lengths} completions")


def checked(name: str, answers: ArrayLike, n: int, low: float = -np.inf, high: float = np.inf) -> Array:
    """Answers as (n,) float64; ValueError that names the judge and the row."""
    try:
        values = np.asarray(answers, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"judge {name!r} did not answer with numbers: {error}") from error
    if values.shape != (n,):
        raise ValueError(
            f"judge {name!r} answered with shape {values.shape} to {n} rows; one number a row is expected"
        )
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        i = int(bad.argmax())
        what = "a finite number" if np.isinf(low) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"judge {name!r} answered {values[i]} to row {i}; an answer must be {what}")
    return values


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), such that sigmoid(x) + sigmoid(-x) is 1 to the last bit."""
    return _complementary(1 / (1 + np.exp(-np.abs(x))), x >= 0)


def averaged(forth: Array, back: Array) -> Array:
    """(P(first > second) + 1 - P(second > first)) / 2 from the answers in both orders, 1 to the last bit with its own
    answer to the pair turned around."""
    half = (forth - back) / 2
    return _complementary(0.5 + np.abs(half), half >= 0)


def _complementary(larger: Array, first: Array) -> Array:
    """P from the larger one of P and 1 - P, which is at least 1/2, so that 1 - larger has no rounding."""
    return np.where(first, larger, 1 - larger)


# ---- exact tables --------------------------------------------------------------------------------------------------


def lattice_judge(lattice: Lattice, table: ArrayLike, *, name: str = "table", scale: float = 1.0) -> Any:
    """The exact judge of a lattice's responses, numbered as its leaves; ValueError for any other completion.

    table  rewards (prompts, L) or (prompts * L,), for a RewardJudge; or P(row > column), (prompts, L, L), for a
           PreferenceJudge, L the number of responses to a prompt
    """
    world = lattice.world
    L, numbers = world.n_leaves // world.roots, np.asarray(table, dtype=np.float64)
    if len(set(lattice.prompts)) < len(lattice.prompts):
        raise ValueError("two prompts of the lattice are equal: a table cannot tell their responses apart")
    if numbers.shape in ((world.n_leaves,), (world.roots, L)):
        rewards = checked(name, numbers.reshape(-1), world.n_leaves)
        return RewardJudge(name, lambda x, y: rewards[leaves_of(lattice, x, y)], scale)
    if numbers.shape != (world.roots, L, L):
        raise ValueError(
            f"the table has shape {numbers.shape}; expected rewards ({world.n_leaves},) or ({world.roots}, {L}), or "
            f"preferences ({world.roots}, {L}, {L})"
        )
    for x, P in enumerate(numbers):
        try:
            check_preference_matrix(P)
        except ValueError as error:
            raise ValueError(f"prompt {x}: {error}") from error

    def preference(prompts: Texts, first: Texts, second: Texts) -> Array:
        (x, i), (_, j) = (np.divmod(leaves_of(lattice, prompts, y), L) for y in (first, second))
        return np.asarray(numbers[x, i, j])

    return PreferenceJudge(name, preference, orders="trust")


def leaves_of(lattice: Lattice, prompts: Texts, completions: Texts) -> Index:
    """The number of each response among the lattice's leaves, (n,); any end token is the end."""
    world, k, H = lattice.world, lattice.world.branching, lattice.world.horizon
    roots = {x: i for i, x in enumerate(lattice.prompts)}
    n = len(prompts)
    state, ended = np.empty(n, dtype=np.int64), np.zeros(n, dtype=np.bool_)
    for i, x in enumerate(prompts):
        if (number := roots.get(tuple(int(t) for t in x))) is None:
            raise ValueError(f"row {i}: the prompt {[int(t) for t in x]} is none of the lattice's")
        state[i] = 1 + number
    lengths = np.array([len(y) for y in completions], dtype=np.int64)
    tokens = np.full((n, H + 1), -1, dtype=np.int64)
    for i, y in enumerate(completions):
        tokens[i, : min(len(y), H + 1)] = [int(t) for t in y[: H + 1]]
    states, actions = np.zeros((n, H), dtype=np.int64), np.full((n, H), k, dtype=np.int64)
    for h in range(H):
        states[:, h] = np.where(ended, 0, state)
        stops = np.isin(tokens[:, h], lattice.end_ids)
        equal = lattice.ids[h][state - 1] == tokens[:, h, None]
        wrong = ~ended & ~stops & ~equal.any(1)
        if wrong.any():
            raise _outside(lattice, completions, int(wrong.argmax()), h, state)
        goes_on = ~ended & ~stops
        action = equal.argmax(1)
        actions[:, h] = np.where(goes_on, action, k)
        ended |= stops
        state = np.where(goes_on, 1 + (state - 1) * k + action, 1)
    last = np.where(ended, (actions < k).sum(1) + 1, H)  # an end after H tokens adds nothing
    extra = (lengths > last) & ~((lengths == H + 1) & ~ended & np.isin(tokens[:, H], lattice.end_ids))
    if extra.any():
        i = int(extra.argmax())
        raise ValueError(
            f"row {i}: the completion {[int(t) for t in completions[i]]} goes on after its end, or after the lattice's "
            f"{H} tokens"
        )
    return world.leaves(Trajectories(states, actions))


def _outside(lattice: Lattice, completions: Texts, i: int, h: int, state: Index) -> ValueError:
    """The message for completion i, whose token h is not among the lattice's."""
    y, used = (
        [int(t) for t in completions[i]],
        np.unique(np.concatenate([x.reshape(-1) for x in lattice.ids])),
    )
    pieces = dict(zip(used.tolist(), lattice.world.vocabulary, strict=True))
    text = "".join("<end>" if t in lattice.end_ids else pieces.get(t, f"[{t}]") for t in y)
    if h >= len(y):
        why = f"is over after {len(y)} tokens, without an end token: sample with horizon={lattice.world.horizon}"
    else:
        why = (
            f"has token {y[h]} at place {h}, which is not among the lattice's {lattice.world.branching} there: judge "
            "such texts by another judge, or sample from the LatticePolicy"
        )
    return ValueError(f"row {i}: the completion {text!r}, token ids {y}, {why}")


# ---- texts ---------------------------------------------------------------------------------------------------------


def decode(tokenizer: Any, texts: Texts) -> list[str]:
    """The texts without special tokens, as they are (no blanks are tidied)."""
    return [
        str(
            tokenizer.decode(
                [int(t) for t in y], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        for y in texts
    ]


def text_judge(
    name: str,
    score: Callable[..., float],
    tokenizer: Any,
    *,
    with_prompt: bool = False,
    scale: float = 1.0,
) -> RewardJudge:
    """score(text of the completion) -> number; with_prompt: score(text of the prompt, text of the completion)."""

    def reward(prompts: Texts, completions: Texts) -> list[float]:
        return _each(name, score, _columns(tokenizer, with_prompt, prompts, completions))

    return RewardJudge(name, reward, scale)


def text_preference(
    name: str,
    preference: Callable[..., float],
    tokenizer: Any,
    *,
    with_prompt: bool = False,
    orders: Orders = "check",
) -> PreferenceJudge:
    """preference(first, second) -> P(first > second), of texts; with_prompt: preference(prompt, first, second)."""

    def asked(prompts: Texts, first: Texts, second: Texts) -> list[float]:
        return _each(name, preference, _columns(tokenizer, with_prompt, prompts, first, second))

    return PreferenceJudge(name, asked, orders)


def _columns(tokenizer: Any, with_prompt: bool, prompts: Texts, *completions: Texts) -> list[list[str]]:
    shown = [prompts, *completions] if with_prompt else completions
    return [decode(tokenizer, texts) for texts in shown]


def _each(name: str, function: Callable[..., float], columns: Sequence[Sequence[str]]) -> list[float]:
    answers = []
    for i, row in enumerate(zip(*columns, strict=True)):
        try:
            answers.append(float(function(*row)))
        except Exception as error:
            error.add_note(f"judge {name!r} failed at row {i}: {', '.join(map(repr, row))}")
            raise
    return answers


# ---- judges by name ------------------------------------------------------------------------------------------------

TOKENS = "tokens"
NAMES = (*JUDGES, TOKENS)


def named_judge(
    name: str, tokenizer: Any = None, *, scale: float = 1.0, strict: bool = False
) -> RewardJudge | PreferenceJudge:
    """An offline judge by name, or the majority of several, such as "sentiment, length".

        sentiment    VADER's compound sentiment, mapped to [0, 1]
        real words   the share of English words; readability  Flesch's reading ease; length  the number of characters
        tokens       the number of the completion's tokens; the one that needs no tokenizer

    scale  of a single judge; strict  of a majority: 1, 1/2, 0 in place of the share
    """
    names = [part.strip() for part in name.split(",")]
    if len(names) > 1:
        return majority_judge([_named(part, tokenizer, 1.0) for part in names], strict=strict)
    return _named(name, tokenizer, scale)


def _named(name: str, tokenizer: Any, scale: float) -> RewardJudge:
    if name not in NAMES:
        raise ValueError(f"judge {name!r} {nearest(name, NAMES)}")
    if name == TOKENS:
        return RewardJudge(name, lambda prompts, completions: [len(y) for y in completions], scale)
    if tokenizer is None:
        raise ValueError(f"judge {name!r} reads texts: give a tokenizer, or take the judge {TOKENS!r}")
    return text_judge(name, _makers()[name](), tokenizer, scale=scale)


def _makers() -> Mapping[str, Callable[[], Callable[[str], float]]]:
    from ...envs import judge_scores
    from ...envs.language_model import vader_judge

    return {"sentiment": vader_judge, **judge_scores.JUDGES}


def majority_judge(judges: Sequence[RewardJudge], *, strict: bool = False) -> PreferenceJudge:
    """P = the share of the judges that prefer the first, ties half, as `envs.judges.majority`; it can be intransitive.

    strict  1, 1/2 or 0, as the share is above, at or below 1/2
    """
    names = [judge.name for judge in judges]
    if not judges or len(set(names)) < len(names):
        raise ValueError(f"judges are {names}; at least one is needed, and each at most once")

    def preference(prompts: Texts, first: Texts, second: Texts) -> Array:
        balance = np.zeros(len(prompts))
        for judge in judges:
            a, b = (np.round(judge.rewards(prompts, y), DIGITS) for y in (first, second))
            balance += np.sign(a - b)
        return 0.5 + 0.5 * (np.sign(balance) if strict else balance / len(judges))

    return PreferenceJudge(f"majority of {', '.join(names)}", preference, orders="trust")


def penalise_missing_end(judge: RewardJudge, end_ids: Sequence[int], penalty: float) -> RewardJudge:
    """r - penalty where the completion does not end by an end token; what the prompt holds plays no part."""
    ends = frozenset(int(i) for i in end_ids)
    if not ends:
        raise ValueError("end_ids is empty: every completion would be penalised")
    if not 0 <= penalty < np.inf:
        raise ValueError(f"penalty is {penalty}; it is subtracted, so give a number >= 0")

    def reward(prompts: Texts, completions: Texts) -> Array:
        missing = np.array([not len(y) or int(y[-1]) not in ends for y in completions])
        return judge.rewards(prompts, completions) - penalty * missing

    return RewardJudge(judge.name, reward, judge.scale)
