r"""Pools: finitely many candidate responses of each prompt, with features, a reference law and a reward.

On a pool every quantity of a learner is a finite sum: the value of its policy, its regret, and its win rate against the
reference, sum_x law(x) sum_{y, y'} pi(y|x) ref(y'|x) sigma(r(x, y) - r(x, y')). A pool comes from

    Pool.of_world  all responses of a token MDP with a linear reward: everything is exact
    text_pool      given texts with a model's hidden states as phi, such as all the texts of a `lattice`
    sample_pool    texts that a model writes: the reference is the law of one of them at random
    load_pool      texts that SmolLM2 wrote, shipped with preflab; the reward is their sentiment

The shipped file was made by

    python -m preflab.llm_bridge.active.pool --out pool.npz     sample, read and judge (six minutes on one core)
    python -m preflab.llm_bridge.active.pool --check            do it again, and compare with the shipped file
    python -m preflab.llm_bridge.active.pool --show             the texts, with their rewards
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from ...envs.comparisons import replace_file
from ...envs.kernels import Array, Index
from ...envs.language_model import LanguageModel, Question, context, load_smollm2, vader_judge
from ...envs.mdp import Layered
from ...envs.token_mdp import TokenMDP
from ..policy import Tokens, TransformerPolicy
from .features import Pooling, principal_axes, trunk_features, within

FORMAT = 1
SHIPPED = "smollm2_pool.npz"
AXES = 64  # principal axes that the shipped file keeps of each pooling


@dataclass(frozen=True, eq=False)
class Pool:
    """n candidates of P prompts, those of a prompt side by side.

    prompt     (n,) the number of the prompt, non-decreasing, each of 0, ..., P-1
    phi        (n, d) features; only differences within a prompt are used
    reference  (n,) pi_ref(y|x), sums to 1 over the candidates of a prompt
    reward     (n,) r*(x, y), in the unit in which P(y > y') = sigma(r* - r*'); it serves answers and exact figures only
    law        (P,) of the prompts; None = uniform
    texts      (n,) of the candidates, for people
    theta      the parameter of the reward where it is linear: r* = <phi, theta> + a constant of the prompt
    """

    prompt: Index
    phi: Array
    reference: Array
    reward: Array
    law: Array | None = None
    texts: tuple[str, ...] = ()
    theta: Array | None = None

    def __post_init__(self) -> None:
        n = len(self.prompt)
        for name, shape in (("phi", (n, *self.phi.shape[1:])), ("reference", (n,)), ("reward", (n,))):
            value = getattr(self, name)
            if value.shape != shape or value.ndim != len(shape):
                raise ValueError(f"{name} has shape {value.shape}; the pool has {n} candidates")
            bad = ~np.isfinite(value.reshape(n, -1)).all(axis=1)
            if bad.any():
                raise ValueError(f"{name}[{int(bad.argmax())}] is not finite")
        if self.phi.ndim != 2 or not n:
            raise ValueError(f"phi has shape {self.phi.shape}; (n, d) is needed, with at least one candidate")
        steps = np.diff(self.prompt)
        if self.prompt[0] != 0 or ((steps != 0) & (steps != 1)).any():
            raise ValueError("prompt must count 0, 0, ..., 1, 1, ...: sort the candidates by their prompt")
        mass = np.add.reduceat(self.reference, self.starts[:-1])
        if (self.reference < 0).any() or (np.abs(mass - 1) > 1e-9).any():
            x = int(np.abs(mass - 1).argmax())
            raise ValueError(
                f"reference of prompt {x} sums to {mass[x]:.9g}; it is a law on the prompt's candidates"
            )
        law = (
            np.full(self.prompts, 1 / self.prompts)
            if self.law is None
            else np.asarray(self.law, dtype=np.float64)
        )
        if law.shape != (self.prompts,) or (law < 0).any() or abs(law.sum() - 1) > 1e-9:
            raise ValueError(f"law must be {self.prompts} probabilities that sum to 1, one a prompt")
        object.__setattr__(self, "law", law)

    # ---- shape -----------------------------------------------------------------------------------------------------

    @cached_property
    def starts(self) -> Index:
        """(P + 1,): the candidates of prompt x are starts[x], ..., starts[x + 1] - 1."""
        return np.append(np.flatnonzero(np.diff(self.prompt, prepend=-1)), len(self.prompt))

    @property
    def prompts(self) -> int:
        return int(self.prompt[-1]) + 1

    @property
    def dimension(self) -> int:
        return int(self.phi.shape[1])

    @property
    def max_norm(self) -> float:
        """The longest ||phi||; the theory wants at most 1."""
        return float(np.linalg.norm(self.phi, axis=1).max())

    def rows(self, x: int) -> slice:
        return slice(int(self.starts[x]), int(self.starts[x + 1]))

    def of_prompts(self, prompts: Sequence[int]) -> Pool:
        """The pool of some prompts, in the order given; their law stays in proportion."""
        at = np.concatenate([np.arange(len(self.prompt))[self.rows(x)] for x in prompts])
        assert self.law is not None
        law = self.law[list(prompts)]
        sizes = [self.starts[x + 1] - self.starts[x] for x in prompts]
        return replace(
            self,
            prompt=np.repeat(np.arange(len(prompts)), sizes),
            phi=self.phi[at],
            reference=self.reference[at],
            reward=self.reward[at],
            law=law / law.sum(),
            texts=tuple(self.texts[i] for i in at) if self.texts else (),
        )

    # ---- policies, and what they are worth ---------------------------------------------------------------------------

    def greedy(self, scores: Array) -> Array:
        """The policy of the best candidate of each prompt (the first of equal ones), (n,); scores (n,)."""
        pi = np.zeros(len(self.prompt))
        pi[[self.starts[x] + scores[self.rows(x)].argmax() for x in range(self.prompts)]] = 1.0
        return pi

    def gibbs(self, scores: Array, beta: float) -> Array:
        """pi(y|x) = ref(y|x) exp(score / beta) / Z(x), (n,): the optimum of the score minus beta KL(pi, ref)."""
        if not (np.isfinite(beta) and beta > 0):
            raise ValueError(f"beta is {beta}; it must be positive and finite")
        best = np.maximum.reduceat(np.where(self.reference > 0, scores, -np.inf), self.starts[:-1])
        with np.errstate(
            over="ignore"
        ):  # candidates without mass may score higher than the best one that has some
            w = np.where(
                self.reference > 0, self.reference * np.exp((scores - best[self.prompt]) / beta), 0.0
            )
        return w / np.add.reduceat(w, self.starts[:-1])[self.prompt]

    def expect(self, policy: Array, x: Array) -> float:
        """sum_x law(x) sum_y pi(y|x) x(y)."""
        assert self.law is not None
        return float((self.law[self.prompt] * policy) @ x)

    def value(self, policy: Array) -> float:
        """The expected reward of a policy, (n,)."""
        return self.expect(policy, self.reward)

    @cached_property
    def optimal_value(self) -> float:
        return self.value(self.greedy(self.reward))

    @cached_property
    def wins(self) -> Array:
        """(n,): P(y beats a response of the reference)."""
        won = np.empty(len(self.prompt))
        for x in range(self.prompts):
            r = self.reward[self.rows(x)]
            won[self.rows(x)] = expit(r[:, None] - r) @ self.reference[self.rows(x)]
        return won

    def win_rate(self, policy: Array) -> float:
        """The probability that a response of the policy is preferred to one of the reference."""
        return self.expect(policy, self.wins)

    # ---- from a world ------------------------------------------------------------------------------------------------

    @classmethod
    def of_world(cls, world: TokenMDP, reference: Layered | None = None) -> Pool:
        """All responses of a token MDP with features and a linear reward. reference: None = the world's own."""
        if world.features is None or world.theta is None:
            raise ValueError(f"{world.name} has no linear reward: give the world features and theta")
        return cls(
            prompt=np.asarray(world.leaf_prompts),
            phi=world.leaf_features,
            reference=world.leaf_probabilities(reference),
            reward=world.leaf_rewards,
            law=np.asarray(world.initial[1:]),
            theta=np.asarray(world.theta, dtype=np.float64),
        )


def linear_fit(pool: Pool) -> tuple[Array, float]:
    """(theta, R^2): the least-squares reward within prompts, under the reference, and the share that it explains."""
    assert pool.law is not None
    w = pool.law[pool.prompt] * pool.reference
    X = within(pool.phi, pool.prompt, w)
    r = within(pool.reward[:, None], pool.prompt, w)[:, 0]
    theta = np.linalg.lstsq(X * np.sqrt(w)[:, None], r * np.sqrt(w), rcond=None)[0]
    return theta, float(1 - w @ (r - X @ theta) ** 2 / (w @ r**2))


def with_linear_reward(pool: Pool) -> Pool:
    """The same pool, paid by its least-squares reward: linear, so that the theory's assumption holds exactly."""
    theta, _ = linear_fit(pool)
    return replace(pool, reward=pool.phi @ theta, theta=theta)


# ---- from a language model -------------------------------------------------------------------------------------------

TextReward = Callable[[Sequence[Tokens], Sequence[Tokens]], Any]


def text_pool(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    reward: Array | TextReward,
    *,
    reference: Array | None = None,
    pooling: Pooling = "mean",
    dimension: int = 16,
    whiten: bool = True,
    head: Any = None,
    texts: Sequence[str] = (),
) -> Pool:
    """Completions with the hidden states of a model as features. Rows with equal prompts must lie side by side.

    policy     the trunk; a reward model with its head may be another model than the one that writes
    reward     (n,), or a function (prompts, completions) -> (n,), such as a judge's `rewards`
    reference  (n,) the law of the completions of each prompt, None = uniform
    """
    rows = [tuple(int(t) for t in x) for x in prompts]
    new = np.array([i == 0 or rows[i] != rows[i - 1] for i in range(len(rows))])
    number = np.cumsum(new) - 1
    if len({rows[i] for i in np.flatnonzero(new)}) < new.sum():
        raise ValueError("a prompt occurs in two places: sort the completions by their prompt")
    deviations = within(
        trunk_features(policy, prompts, completions, pooling=(pooling,), head=head)[pooling], number
    )
    given = reward(prompts, completions) if callable(reward) else reward
    return Pool(
        prompt=number,
        phi=principal_axes(deviations, dimension, whiten=whiten).apply(deviations),
        reference=1.0 / np.bincount(number)[number] if reference is None else np.asarray(reference),
        reward=np.asarray(given, dtype=np.float64),
        texts=tuple(texts),
    )


def draw_responses(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    responses: int,
    horizon: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Tokens], list[list[int]], Array]:
    """(prompts, completions, log-probabilities), `responses` of each prompt, each prompt from its own stream."""
    import torch

    rows: list[Tokens] = []
    completions: list[list[int]] = []
    scores = []
    for i, prompt in enumerate(prompts):
        u = np.random.default_rng([seed, i]).random((responses, horizon))
        drawn = policy.sample([prompt] * responses, horizon, uniforms=torch.from_numpy(u))
        rows += [prompt] * responses
        completions += drawn.completions
        scores.append(drawn.log_probabilities.double().cpu().numpy())
        if progress is not None:
            progress(i + 1, len(prompts))
    return rows, completions, np.concatenate(scores)


def sample_pool(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    reward: TextReward,
    *,
    responses: int = 32,
    horizon: int = 18,
    seed: int = 0,
    trunk: TransformerPolicy | None = None,
    **options: Any,
) -> Pool:
    """Responses that a model writes. trunk: whose hidden states are phi, None = its own; options of `text_pool`."""
    rows, completions, _ = draw_responses(policy, prompts, responses, horizon, seed)
    return text_pool(policy if trunk is None else trunk, rows, completions, reward, **options)


# ---- the shipped pool ------------------------------------------------------------------------------------------------

TASKS = (
    Question("How was the film you saw last night? Answer in one short sentence.", "The film was"),
    Question("How was the hotel? Be honest, good or bad.", "Honestly, the hotel was"),
    Question("How was the food at the new place? Answer in one sentence.", "The food was"),
    Question("Tell me how your first day at work went, good or bad.", "My first day was"),
    Question("Is the new phone worth its price? Say why in one sentence.", "The phone is"),
    Question("How did the concert go? Answer in one sentence.", "The concert was"),
    Question("What do you think of the mayor's plan? Be frank.", "Frankly, the plan is"),
    Question("How was the flight? Answer in one sentence.", "The flight was"),
    Question("Describe your neighbours in one sentence.", "My neighbours are"),
    Question("What was the weather like on your trip?", "The weather was"),
    Question("What did you think of the book's ending?", "I thought the ending was"),
    Question("How do you feel about the exam results?", "I feel"),
    Question("Write the first sentence of a customer review of a vacuum cleaner.", "This vacuum cleaner is"),
    Question("Write the first sentence of a story about a storm.", "The storm was"),
    Question("How was the service in the restaurant?", "The service was"),
    Question("What is your opinion of the new teacher?", "The new teacher is"),
    Question("How did the match end for our team?", "Our team"),
    Question("Was the meeting useful or a waste of time?", "The meeting was"),
    Question("How is your health these days?", "These days I"),
    Question("What did the critics write about the play?", "The critics wrote that the play was"),
    Question("How did the customers like the update of the app?", "Customers said that the update"),
    Question("What was your childhood like?", "My childhood was"),
    Question("How was the party on Saturday?", "The party was"),
    Question("What do people say about the city?", "People say the city is"),
    # the last eight are held out in the experiment
    Question("How was the museum? Answer in one sentence.", "The museum was"),
    Question("Write the first sentence of a review of a pair of running shoes.", "These shoes are"),
    Question("How did the interview go?", "The interview was"),
    Question("What do you think of the new law?", "I think the new law is"),
    Question("How was the train journey?", "The journey was"),
    Question("What is your dog like?", "My dog is"),
    Question("How did the surgery go?", "The surgery"),
    Question("What was the wedding like?", "The wedding was"),
)
TRAINING, HELD_OUT = range(24), range(24, 32)


def build(
    language_model: LanguageModel | None = None,
    tasks: Sequence[Question] = TASKS,
    *,
    responses: int = 32,
    horizon: int = 18,
    seed: int = 0,
    axes: int = AXES,
    training: Sequence[int] = TRAINING,
    judge: Callable[[str], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample, read and judge: the arrays of a pool's file.

    Responses are drawn at temperature 1, without truncation, each prompt from its own stream. Features are the hidden
    states on the principal axes of the training prompts. judge: of the text, opening included; None = VADER in [0, 1].
    """
    if language_model is None:
        language_model = load_smollm2("float32")
    policy = TransformerPolicy.of(language_model)
    judge = vader_judge() if judge is None else judge
    contexts, began = [context(language_model, task) for task in tasks], time.time()
    prompts, completions, scores = draw_responses(policy, contexts, responses, horizon, seed, progress)
    sampled = time.time()
    found = trunk_features(policy, prompts, completions, pooling=("mean", "last"))
    number = np.repeat(np.arange(len(tasks)), responses)
    texts = [
        tasks[int(i)].opening + language_model.tokenizer.decode(y, skip_special_tokens=True)
        for i, y in zip(number, completions, strict=True)
    ]
    train, arrays, explained = np.isin(number, list(training)), {}, {}
    for how, x in found.items():
        deviations = within(x, number)
        fitted = principal_axes(deviations[train], axes)
        arrays[how] = fitted.apply(deviations).astype(np.float32)
        explained[how] = [round(float(share), 6) for share in fitted.explained]
    meta = {
        "tasks": [list(task) for task in tasks],
        "texts": texts,
        "responses": responses,
        "horizon": horizon,
        "seed": seed,
        "training": list(training),
        "explained": explained,
        "model": dict(language_model.provenance),
        "judge": "VADER's compound sentiment of opening and response, mapped from [-1, 1] to [0, 1]",
        "seconds": {"sampling": round(sampled - began), "features": round(time.time() - sampled)},
    }
    return arrays | {
        "format": np.array(FORMAT),
        "meta": np.frombuffer(json.dumps(meta, ensure_ascii=False).encode(), dtype=np.uint8),
        "prompt": number.astype(np.int32),
        "tokens": np.concatenate([np.asarray(y, dtype=np.int32) for y in completions]),
        "lengths": np.array([len(y) for y in completions], dtype=np.int32),
        "log_probability": scores.astype(np.float32),
        "sentiment": np.array([judge(text) for text in texts]),
    }


def save_pool(path: str | os.PathLike[str], arrays: dict[str, Any]) -> None:
    """One .npz without pickles; it appears by rename."""
    replace_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def read_pool(path: str | os.PathLike[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, meta) of a pool's file; None = the shipped one."""
    source = files(__package__).joinpath("data", SHIPPED) if path is None else Path(path)
    name = SHIPPED if path is None else os.fspath(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{name} is not there; `python -m preflab.llm_bridge.active.pool --out FILE` makes one"
        )
    try:
        with np.load(io.BytesIO(source.read_bytes()), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        version = int(arrays.pop("format"))
        meta = dict(json.loads(arrays.pop("meta").tobytes().decode()))
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not a pool, or damaged: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"{name} has format {version}, newer than {FORMAT}, the latest known here: upgrade preflab"
        )
    return arrays, meta


def load_pool(
    path: str | os.PathLike[str] | None = None,
    *,
    pooling: Pooling = "mean",
    dimension: int = 16,
    whiten: bool = True,
    scale: float = 0.25,
    prompts: Sequence[int] | None = None,
) -> Pool:
    """SmolLM2's responses as a pool; the reference draws one of a prompt's responses at random.

    pooling    which hidden state phi is
    dimension  how many principal axes of it; whiten: each of equal variance on the training prompts
    scale      r* = sentiment / scale: P(y > y') = sigma((sentiment - sentiment') / scale)
    prompts    some of them; None = all
    """
    arrays, meta = read_pool(path)
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling is {pooling!r}; the file has 'last' and 'mean'")
    if not 1 <= dimension <= arrays[pooling].shape[1]:
        raise ValueError(f"dimension is {dimension}; the file keeps {arrays[pooling].shape[1]} axes")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    number = arrays["prompt"].astype(np.int64)
    train = np.isin(number, meta["training"])
    x = arrays[pooling][:, :dimension].astype(np.float64)
    # the stored coordinates are principal already; this divides them by their deviations, and makes the longest 1
    phi = principal_axes(x[train], dimension, whiten=whiten).apply(x)
    counts = np.bincount(number)
    pool = Pool(
        prompt=number,
        phi=phi,
        reference=1.0 / counts[number],
        reward=arrays["sentiment"] / scale,
        texts=tuple(meta["texts"]),
    )
    return pool if prompts is None else pool.of_prompts(list(prompts))


@dataclass(frozen=True)
class Difference:
    """What two files of pools disagree in: responses with other tokens, and the largest gaps over the equal ones."""

    other_tokens: int
    log_probability: float
    sentiment: float

    @property
    def equal(self) -> bool:
        return self.other_tokens == 0 and self.log_probability < 1e-2 and self.sentiment < 1e-9


def compare(first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """Are two pools the same texts? Another processor may round a rare draw to another token."""
    a, b = (np.split(x["tokens"], np.cumsum(x["lengths"])[:-1]) for x in (first, second))
    if len(a) != len(b):
        raise ValueError(f"one pool has {len(a)} responses, the other {len(b)}")
    same = np.array([np.array_equal(y, z) for y, z in zip(a, b, strict=True)])

    def gap(name: Literal["log_probability", "sentiment"]) -> float:
        return float(np.abs(first[name][same] - second[name][same]).max(initial=0.0))

    return Difference(int((~same).sum()), gap("log_probability"), gap("sentiment"))


def report(path: str | os.PathLike[str] | None = None, shown: int = 2) -> str:
    """The best and the worst texts of every prompt."""
    arrays, meta = read_pool(path)
    lines = []
    for x, (user, _) in enumerate(meta["tasks"]):
        at = np.flatnonzero(arrays["prompt"] == x)
        order = at[np.argsort(-arrays["sentiment"][at], kind="stable")]
        lines.append(f"{x}. {user}")
        lines += [
            f"    {arrays['sentiment'][i]:.2f} {meta['texts'][i]}" for i in [*order[:shown], *order[-shown:]]
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m preflab.llm_bridge.active.pool", description="The pool of texts."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="FILE", help="make the pool again, into a file")
    what.add_argument("--check", action="store_true", help="make it again and compare with the shipped one")
    what.add_argument("--show", action="store_true", help="the best and worst texts of the shipped one")
    given = parser.parse_args(arguments)
    if given.show:
        print(report())
        return 0
    arrays = build(progress=lambda i, n: print(f"prompt {i} of {n}", file=sys.stderr))
    if given.out:
        save_pool(given.out, arrays)
        return 0
    found = compare(read_pool()[0], arrays)
    print(
        f"other tokens in {found.other_tokens} responses; log-probabilities differ by {found.log_probability:.2g}, "
        f"sentiment by {found.sentiment:.2g}"
    )
    return 0 if found.equal else 1


if __name__ == "__main__":
    sys.exit(main())
