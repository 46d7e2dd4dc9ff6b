r"""Level 3: log-probabilities, and rewards, by a second route: one text at a time, no padding, no cache, float64.

The trainer scores every completion of every prompt, in small batches of unlike lengths, for each role and each option.
What it gives must be the number of the second route to `tolerance` nats. Where it is not, the same second route is read
as a faulty trainer would read it, and the fault that gives the trainer's numbers is named; rounding is told by how many
bits are right. Where truncation rules a completion out it is left out of the comparison.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.kernels import Array
from .laws import LAYOUT_CAUSES, LAYOUT_NAMES, ROLE_CAUSES, Finding
from .models import ModelWorld, Sampling, mix
from .report import Check, Match
from .whole import Declared, grid, rewarded, right_law, scored, variants, words_of

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 0.03  # a relative error that rounding can explain
FORMATS = ((8, "bfloat16"), (11, "float16"), (24, "float32"))


@dataclass(frozen=True, eq=False)
class ScoreCandidate:
    name: str
    cause: str
    values: Array


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that are scored, and the second route to each of their tokens."""

    world: ModelWorld

    @cached_property
    def at(self) -> list[tuple[int, int]]:
        return grid(self.world)

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        return [self.world.prompts[i] for i, _ in self.at]

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        return [self.world.completions[c] for _, c in self.at]

    def flat(self, law: Array) -> Array:
        """(prompts, C) -> a number a row."""
        return np.array([law[i, c] for i, c in self.at])

    @property
    def batches(self) -> list[slice]:
        P = len(self.world.prompts)
        return [slice(k, k + P) for k in range(0, len(self.at), P)]

    def logits(self, role: str, layout: str = "plain", padded: str = "rows") -> list[Array]:
        """(T + 1, V) of each row; padded to the longest of its batch: as one "rows", or "prompts" by themselves."""
        key = f"rows {role} {layout} {padded}"
        if key in self.world._exact:
            return self.world._exact[key]  # type: ignore[no-any-return]
        found: list[Array] = []
        for b in self.batches:
            rows = list(zip(self.prompts[b], self.completions[b], strict=True))
            lengths = [len(x) + len(y) * (padded == "rows") for x, y in rows]
            pads = [max(lengths) - n for n in lengths]
            found += [
                self.world.row_logits(role, x, y, layout, n) for (x, y), n in zip(rows, pads, strict=True)
            ]
        self.world._exact[key] = found
        return found

    def laws(
        self, said: Declared, role: str, sampling: Sampling, layout: str = "plain", padded: str = "rows"
    ) -> list[Array]:
        """log of the next token's law at each token of the completion, and after it, (T + 1, V)."""
        if role != "mixture":
            return [sampling.law(z) for z in self.logits(role, layout, padded)]
        both = (self.laws(said, r, Sampling(), layout, padded) for r in ("policy", "reference"))
        pairs = zip(*both, strict=True)
        return [sampling.law(mix(a, b, said.share)) for a, b in pairs]

    def tokens(self, laws: list[Array]) -> list[Array]:
        return [z[np.arange(len(y)), list(y)] for z, y in zip(laws, self.completions, strict=True)]

    def prompt_tokens(self, said: Declared, role: str) -> list[Array]:
        """log-probabilities of the prompt's tokens but its first, by prompt."""
        found = []
        for x in self.world.prompts:
            laws = []
            for r in ("policy", "reference") if role == "mixture" else (role,):
                laws.append(said.sampling.law(self.world.row_logits(r, x[:1], x[1:])))
            law = mix(laws[0], laws[1], said.share) if role == "mixture" else laws[0]
            found.append(law[np.arange(len(x) - 1), list(x[1:])])
        return found


def _sum(values: list[Array]) -> Array:
    return np.array([v.sum() for v in values])


VIEW_CAUSES = {
    "token_mean": "log-probabilities are averaged over tokens, where they should be summed",
    "no_end": "EOS not scored: the end token is not in the completion's mask (pad == eos masks the real end, too)",
    "no_last": "the last token of every completion is not scored: truncation, or a mask that is one too short",
    "no_first": "the first token of the completion is not scored: the prompt is taken for one token too long",
    "prompt": "prompt tokens are scored: the mask covers the prompt",
    "shift_left": "off by one: the last prompt token is scored and the last completion token is not",
    "unshifted": "off by one: each token is scored by the logits after it, which have seen it",
    "after_end": "the token after the completion is scored: padding is in the mask",
}


def candidates(rows: _Rows, said: Declared, role: str, got: Array) -> Iterator[ScoreCandidate]:
    world, ys = rows.world, rows.completions
    sequence = role == "mixture" and said.mixture == "sequence"
    if not sequence:
        laws = rows.laws(said, role, said.sampling)
        tokens, prompt = rows.tokens(laws), rows.prompt_tokens(said, role)
        before = [prompt[i] for i, _ in rows.at]
        views: dict[str, list[Array]] = {
            "token_mean": [t / len(t) for t in tokens],
            "no_end": [t[: len(t) - (y[-1] == world.end)] for t, y in zip(tokens, ys, strict=True)],
            "no_last": [t[:-1] for t in tokens],
            "no_first": [t[1:] for t in tokens],
            "prompt": [np.append(x, t) for x, t in zip(before, tokens, strict=True)],
            "shift_left": [np.append(x[-1:], t[:-1]) for x, t in zip(before, tokens, strict=True)],
            "unshifted": [z[np.arange(1, len(y) + 1), list(y)] for z, y in zip(laws, ys, strict=True)],
            "after_end": [
                np.append(t, z[-1, world.pad] if len(t) < world.horizon else 0.0)
                for t, z in zip(tokens, laws, strict=True)
            ],
        }
        for name, values in views.items():
            yield ScoreCandidate(name, VIEW_CAUSES[name], _sum(values))
        yield from _of_other_models(rows, said, role)
        for layout in ("positions", "padding_read", "padding_read_placed", "mask_by_id"):
            values = rows.tokens(rows.laws(said, role, said.sampling, layout))
            name = LAYOUT_NAMES.get(layout, layout)
            yield ScoreCandidate(name, LAYOUT_CAUSES[layout], _sum(values))
        # Prompts padded on the left and completions on the right, as trainers do that draw their own.
        for layout in ("positions", "padding_read"):
            values = rows.tokens(rows.laws(said, role, said.sampling, layout, "prompts"))
            yield ScoreCandidate(LAYOUT_NAMES.get(layout, layout), LAYOUT_CAUSES[layout], _sum(values))
        yield ScoreCandidate("merge", MERGE, _merged(rows, said, role))
        yield from _of_other_samplings(rows, said, role, got)
    else:
        yield from _of_other_models(rows, said, role)


MERGE = "the boundary between prompt and completion is moved by token merges: the text is tokenised again"


def _merged(rows: _Rows, said: Declared, role: str) -> Array:
    """Prompt and completion read as one text; the completion begins where the prompt's own tokens would end."""
    world, found = rows.world, []
    for x, y in zip(rows.prompts, rows.completions, strict=True):
        start = len(world.encode(world.decode(x)))
        ids = world.encode(world.decode([*x, *y]))
        if len(ids) <= start:
            found.append(0.0)
            continue
        laws = [
            said.sampling.law(world.row_logits(r, ids[:start], ids[start:]))
            for r in (("policy", "reference") if role == "mixture" else (role,))
        ]
        law = mix(laws[0], laws[1], said.share) if role == "mixture" else laws[0]
        found.append(float(law[np.arange(len(ids) - start), ids[start:]].sum()))
    return np.array(found)


def _of_other_models(rows: _Rows, said: Declared, role: str) -> Iterator[ScoreCandidate]:
    world = rows.world
    others = {"policy": ("reference", "base"), "reference": ("policy", "base"), "mixture": ()}[role]
    for other in others:
        values = rows.flat(world.law(other, said.sampling))
        yield ScoreCandidate(f"{role}_is_{other}", ROLE_CAUSES[role, other], values)
    if role == "mixture":
        pi, ref, s = world.laws("policy"), world.laws("reference"), said.share
        by_token = {
            "mixture_swapped": (mix(pi, ref, 1 - s), "mixture weights swapped"),
            "mixture_arithmetic": (
                mix(pi, ref, s, "arithmetic"),
                "the mixture is arithmetic (of probabilities), not geometric",
            ),
            "mixture_policy": (pi, "the mixture is the policy alone"),
            "mixture_reference": (ref, "the mixture is the reference alone"),
            "mixture_token": (mix(pi, ref, s), "the mixture is made token by token, not of whole responses"),
        }
        for name, (laws, cause) in by_token.items():
            if said.mixture == "sequence" or name != "mixture_token":
                yield ScoreCandidate(name, cause, rows.flat(world.law_of(laws)))
        whole = world.law("policy"), world.law("reference")
        unnormalised = (1 - s) * whole[0] + s * whole[1]
        yield ScoreCandidate("mixture_unnormalised", "the mixture is not normalised", rows.flat(unnormalised))
        yield ScoreCandidate(
            "mixture_arithmetic",
            "the mixture is arithmetic, of whole responses",
            rows.flat(mix(*whole, s, "arithmetic")),
        )
        if said.mixture == "token":
            yield ScoreCandidate(
                "mixture_sequence",
                "the mixture is that of whole responses, not token by token",
                rows.flat(mix(*whole, s)),
            )


def _of_other_samplings(rows: _Rows, said: Declared, role: str, got: Array) -> Iterator[ScoreCandidate]:
    asked = said.sampling

    def values(sampling: Sampling) -> Array:
        return _sum(rows.tokens(rows.laws(said, role, sampling)))

    if asked.temperature != 1:
        plain = Sampling(1.0, asked.top_k, asked.top_p)
        yield ScoreCandidate(
            "temperature_missing",
            f"the temperature {asked.temperature:g} is applied to the samples and not to the log-probabilities",
            values(plain),
        )
        yield ScoreCandidate(
            "temperature_divided",
            "log-probabilities are divided by the temperature, and not normalised after it",
            values(plain) / asked.temperature,
        )
        twice = Sampling(asked.temperature**2, asked.top_k, asked.top_p)
        yield ScoreCandidate("temperature_twice", "the temperature is applied twice", values(twice))
    if asked.top_k is not None or asked.top_p is not None:
        yield ScoreCandidate(
            "not_renormalised",
            "samples are truncated (top-k, top-p) and the log-probabilities are those before the truncation: not "
            "renormalised",
            values(Sampling(asked.temperature)),
        )
        if asked.temperature != 1:
            yield ScoreCandidate(
                "sampling_ignored",
                "log-probabilities know of no temperature and no truncation",
                values(Sampling()),
            )

    from scipy.optimize import minimize_scalar

    # With one number to fit, so that it comes last.
    def error(t: float) -> float:
        x = values(Sampling(math.exp(t), asked.top_k, asked.top_p))
        finite = np.isfinite(x) & np.isfinite(got)
        return float(np.abs(x - got)[finite].sum()) if finite.any() else math.inf

    starts = np.linspace(-2, 2, 21)
    k = int(np.argmin([error(t) for t in starts]))
    near = (starts[max(k - 1, 0)], starts[min(k + 1, 20)])
    T = math.exp(minimize_scalar(error, bounds=near, method="bounded", options={"xatol": 1e-11}).x)
    yield ScoreCandidate(
        "temperature",
        f"log-probabilities are of temperature {T:.6g}, where {asked.temperature:g} is asked for",
        values(Sampling(T, asked.top_k, asked.top_p)),
    )


# ---- the level -------------------------------------------------------------------------------------------------------


def distance(a: Array, b: Array) -> float:
    """The largest difference, in nats; inf where only one of the two is finite."""
    finite = np.isfinite(a) & np.isfinite(b)
    if (np.isfinite(a) != np.isfinite(b)).any() or not finite.any():
        return math.inf
    return float(np.abs(a - b)[finite].max())


def scoring_level(trainer: Any, world: ModelWorld, said: Declared, tolerance: float) -> list[Finding]:
    rows, found = _Rows(world), []
    for role in said.scored:
        for options in variants(trainer, "log_probabilities"):
            title = f"scores of the {role}" + (f" ({words_of(options)})" if options else "")
            found.append(_scores(trainer, rows, said, role, options, title, tolerance))
    takes = inspect.signature(trainer.log_probabilities).parameters
    if "given" in takes and "reference" in said.scored:
        found.append(_precomputed(trainer, rows, said, tolerance))
    return found


def _ask(
    trainer: Any, rows: _Rows, role: str, options: Mapping[str, Any], given: Array | None = None
) -> Array:
    parts = []
    for b in rows.batches:
        more = dict(options) if given is None else {**options, "given": given[b]}
        x, y = ([list(t) for t in texts[b]] for texts in (rows.prompts, rows.completions))
        parts.append(scored(trainer, x, y, role, **more))
    return np.concatenate(parts)


def _scores(
    trainer: Any,
    rows: _Rows,
    said: Declared,
    role: str,
    options: Mapping[str, Any],
    title: str,
    tolerance: float,
) -> Finding:
    got, again = (_ask(trainer, rows, role, options) for _ in range(2))
    right = rows.flat(right_law(rows.world, said, role))
    inside = np.isfinite(right)
    gap = distance(got[inside], again[inside])
    if gap > tolerance:
        text = f"two calls differ by {gap:.2g} nats"
        cause = "dropout on: call eval(), or set the dropout of both models to 0"
        return Finding(Check(title, 3, "fail", text, {"gap": gap}), "dropout", cause)
    error = distance(got[inside], right[inside])
    numbers = {"error": error}
    if error <= tolerance:
        text = f"{inside.sum()} completions agree with the second route to {error:.1e} nats"
        return Finding(Check(title, 3, "pass", text, numbers))
    text = f"up to {error:.3g} nats from the second route"
    return _named(title, text, numbers, candidates(rows, said, role, got), got, right, inside, tolerance)


def _named(
    title: str,
    text: str,
    numbers: Mapping[str, float],
    others: Iterator[ScoreCandidate],
    got: Array,
    right: Array,
    inside: Array,
    tolerance: float,
) -> Finding:
    check = Check(title, 3, "fail", text, numbers)
    near: dict[str, float] = {}
    for c in others:
        far = distance(c.values[inside], got[inside])
        if far <= tolerance:
            return Finding(check, c.name, c.cause, (Match(c.name, far, 1.0),))
        near[c.name] = min(far, near.get(c.name, math.inf))
    matches = tuple(Match(name, far, 1.0) for name, far in sorted(near.items(), key=lambda item: item[1])[:4])
    off = np.sqrt(np.mean((got - right)[inside] ** 2) / np.mean(right[inside] ** 2))
    if np.isfinite(off) and off < ROUNDING:
        bits = -math.log2(off)
        like = min(FORMATS, key=lambda f: abs(f[0] - bits))
        cause = f"low precision: right to {bits:.0f} bits, as {like[1]} ({like[0]} bits) would be"
        return Finding(check, "low_precision", cause, matches)
    cause = "none of the catalogue's: another law, or two faults at once"
    return Finding(check, None, cause, matches)


def _precomputed(trainer: Any, rows: _Rows, said: Declared, tolerance: float) -> Finding:
    """Numbers that no model gives are handed over as the reference's: they must come back."""
    title = "scores of the reference (precomputed)"
    options = variants(trainer, "log_probabilities")[0]
    given = np.random.default_rng(11).uniform(-9, -1, size=len(rows.at))
    got = _ask(trainer, rows, "reference", options, given)
    error = distance(got, given)
    if error <= tolerance:
        return Finding(
            Check(title, 3, "pass", "the numbers that were computed beforehand are used", {"error": error})
        )

    def others() -> Iterator[ScoreCandidate]:
        live = rows.flat(right_law(rows.world, said, "reference"))
        yield ScoreCandidate(
            "precomputed_ignored",
            "precomputed reference log-probabilities are ignored: the model is asked again",
            live,
        )
        own = rows.flat(right_law(rows.world, said, "policy"))
        yield ScoreCandidate(
            "reference_is_policy",
            "precomputed reference log-probabilities are replaced by those of the trained policy",
            own,
        )

    text = f"up to {error:.3g} nats from the numbers that were given"
    everywhere = np.isfinite(rows.flat(right_law(rows.world, said, "reference")))
    return _named(title, text, {"error": error}, others(), got, given, everywhere, tolerance)


# ---- rewards ---------------------------------------------------------------------------------------------------------

REWARD_CAUSES = {
    "penalty_missing": "the penalty for a missing end token is never given",
    "penalty_of_the_row": "the penalty for a missing end token looks at prompt and completion together, so that an end "
    "token in the prompt keeps it away",
    "first_end": "the reward is read at the first end token of the row, which lies inside the prompt when pad == eos",
    "after_end": "the reward is put on the token after the end, where the mask drops it",
    "last_position": "the reward is read at the last position of the padded row",
    "token_sum": "token rewards are summed over the completion, where one score of the whole response is asked for",
    "token_mean": "token rewards are averaged over the completion, where one score of the whole response is asked for",
    "before_end": "the reward is read one token early: at the last token before the end",
}


def reward_level(trainer: Any, world: ModelWorld, tolerance: float, penalty: float = 1.5) -> list[Finding]:
    rows, title = _Rows(world), "rewards"
    parts = []
    for b in rows.batches:
        x, y = ([list(t) for t in texts[b]] for texts in (rows.prompts, rows.completions))
        parts.append(rewarded(trainer, x, y, world.scores, penalty))
    got = np.concatenate(parts)
    right = _reward(rows, penalty, lambda s, n, y: s[-1])
    error = distance(got, right)
    if error <= tolerance:
        text = f"{len(got)} rewards are the score at the completion's last token, less the penalty without an end"
        return [Finding(Check(title, 3, "pass", text, {"error": error}))]
    everywhere = np.ones(len(got), dtype=bool)
    text = f"up to {error:.3g} from the second route"
    return [
        _named(
            title,
            text,
            {"error": error},
            _reward_candidates(rows, penalty),
            got,
            right,
            everywhere,
            tolerance,
        )
    ]


def _scored_text(world: ModelWorld, text: list[int]) -> Array:
    import torch

    ids = torch.tensor([text])
    scores: Tensor = world.scores(ids, torch.ones_like(ids))
    return np.asarray(scores[0].numpy())


def _reward(rows: _Rows, penalty: float, read: Callable[[Array, int, tuple[int, ...]], float]) -> Array:
    """read(scores of the row, where the completion begins, the completion), less the penalty where it has no end."""
    found = []
    for x, y in zip(rows.prompts, rows.completions, strict=True):
        s = _scored_text(rows.world, [*x, *y])
        found.append(float(read(s, len(x), y)) - penalty * (y[-1] != rows.world.end))
    return np.array(found)


def _reward_candidates(rows: _Rows, penalty: float) -> Iterator[ScoreCandidate]:
    world = rows.world
    plain = _reward(rows, 0.0, lambda s, n, y: s[-1])
    of_row = np.array(
        [world.end not in (*x, *y) for x, y in zip(rows.prompts, rows.completions, strict=True)]
    )
    found = {"penalty_missing": plain, "penalty_of_the_row": plain - penalty * of_row}
    first, last = [], []
    for b in rows.batches:
        texts = [[*x, *y] for x, y in zip(rows.prompts[b], rows.completions[b], strict=True)]
        width = max(map(len, texts))
        for text in texts:
            s, padded = _padded_scores(world, text, width)
            first.append(s[padded.index(world.end) if world.end in padded else width - 1])
            last.append(s[-1])
    cut = penalty * np.array([y[-1] != world.end for y in rows.completions])
    found["first_end"] = np.array(first) - cut
    found["last_position"] = np.array(last) - cut
    found["after_end"] = _reward(rows, penalty, lambda s, n, y: s[-1] if y[-1] != world.end else 0.0)
    found["token_sum"] = _reward(rows, penalty, lambda s, n, y: s[n:].sum())
    found["token_mean"] = _reward(rows, penalty, lambda s, n, y: s[n:].mean())
    found["before_end"] = _reward(rows, penalty, lambda s, n, y: s[-2] if y[-1] == world.end else s[-1])
    for name, values in found.items():
        yield ScoreCandidate(name, REWARD_CAUSES[name], values)


def _padded_scores(world: ModelWorld, text: list[int], width: int) -> tuple[Array, list[int]]:
    import torch

    pads = width - len(text)
    ids, mask = text + [world.pad] * pads, [1] * len(text) + [0] * pads
    return np.asarray(world.scores(torch.tensor([ids]), torch.tensor([mask]))[0].numpy()), ids
