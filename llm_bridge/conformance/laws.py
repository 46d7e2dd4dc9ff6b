r"""Level 2: are the completions that a trainer draws those of the law that it means? Enumeration against draws.

For each role and each option the trainer is called with batches in which the prompts take turns, and the counts of all
completions are held to their exact probabilities by two tests, of which the smaller p-value counts twice:

  chi-square, cells that expect fewer than 10 draws pooled; and total variation, by a bound that holds for every n:
  P(TV > sum_y sqrt(p_y (1 - p_y) / n) / 2 + t) <= exp(-2 n t^2), since one draw moves TV by at most 1/n.

Rows of one batch, and of two batches with different seeds, must be independent: pairs of rows to one prompt must agree
as often as their law says, and the first tokens of neighbouring rows must not know of each other.

All p-values of a report are judged together by Holm's method, so that an honest trainer fails some check with
probability `alpha` at most. A law that fails is compared with a catalogue of faults, of which one is named only if the
draws do not reject it; with a number to be fitted (a temperature), where its likelihood is largest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...envs.kernels import Array, Index
from .models import ModelWorld, Sampling, mix
from .report import Check, Match
from .whole import Declared, right_law, sampled, variants, words_of

CALLS = 4
EXPECTED = 10.0
NAMED = 1e-3  # a fault is named if the draws do not reject it at this level


# ---- tests of counts -------------------------------------------------------------------------------------------------


def chi_square(counts: Index, p: Array) -> float:
    """p-value; cells that expect fewer than `EXPECTED` are pooled. 0 where something impossible was drawn."""
    from scipy.stats import chi2

    if counts[p <= 0].any():
        return 0.0
    n = counts.sum()
    order = np.argsort(p)
    expected, seen = n * p[order], counts[order].astype(float)
    # The smallest cells together, until they expect enough; what is left of them joins the next cell.
    small = int(np.searchsorted(np.cumsum(expected), EXPECTED)) + 1
    small = max(small, int((expected < EXPECTED).sum()))
    expected = np.append(expected[:small].sum(), expected[small:])
    seen = np.append(seen[:small].sum(), seen[small:])
    if len(expected) < 2:
        return 1.0
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), len(expected) - 1))


def total_variation(counts: Index, p: Array) -> float:
    return float(0.5 * np.abs(counts / counts.sum() - p).sum())


def noise_floor(n: int, p: Array, alpha: float) -> float:
    """What the total variation of n honest draws exceeds with probability at most alpha."""
    mean = 0.5 * np.sqrt(p * (1 - p) / n).sum()
    return float(mean + math.sqrt(math.log(1 / alpha) / (2 * n)))


def tv_p_value(counts: Index, p: Array) -> float:
    n = int(counts.sum())
    excess = total_variation(counts, p) - 0.5 * np.sqrt(p * (1 - p) / n).sum()
    return float(np.exp(-2 * n * max(excess, 0.0) ** 2))


def law_p_value(counts: Index, p: Array) -> float:
    return min(1.0, 2 * min(chi_square(counts, p), tv_p_value(counts, p)))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which are rejected, so that with probability 1 - alpha none is that should not be."""
    rejected, m = [False] * len(p_values), len(p_values)
    for rank, i in enumerate(np.argsort(p_values)):
        if p_values[i] > alpha / (m - rank):
            break
        rejected[i] = True
    return rejected


# ---- draws -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Draws:
    """counts (prompts, C) of completions; calls (calls, rows, prompts) numbers of completions; odd: what is none."""

    counts: Index
    calls: Index
    odd: tuple[tuple[int, tuple[int, ...]], ...]
    all: int


def draw(
    trainer: Any, world: ModelWorld, role: str, options: Mapping[str, Any], draws: int, seed: int
) -> Draws:
    P, C = len(world.prompts), len(world.completions)
    number = {y: c for c, y in enumerate(world.completions)}
    rows = -(-draws // CALLS)
    rows += rows % 2
    counts, calls, odd = np.zeros((P, C), dtype=np.int64), [], []
    for call in range(CALLS):
        prompts = [list(x) for _ in range(rows) for x in world.prompts]
        found = sampled(trainer, prompts, world.horizon, seed + call, role, **options)
        at = np.array([number.get(y, -1) for y in found]).reshape(rows, P)
        odd += [(i % P, y) for i, y in enumerate(found) if y not in number]
        for i in range(P):
            counts[i] += np.bincount(at[at[:, i] >= 0, i], minlength=C)
        calls.append(at)
    return Draws(counts, np.stack(calls), tuple(odd), CALLS * rows * P)


SHAPES = {
    "end_dropped": "the end token is missing from the completion: it was drawn, and stripped or masked, so that it is "
    "never scored and the model never learns to stop",
    "after_end": "text goes on after the end token: rows that have ended are not cut there",
    "too_long": "completions are longer than the horizon",
    "cut_early": "completions are cut too early: the largest length counts the prompt, or is one too short",
    "another_end": "another token is taken for an end token",
    "unknown_token": "completions hold tokens that the model does not have, or padding",
}


def odd_shape(world: ModelWorld, draws: Draws) -> str | None:
    """Why some completions are neither ended by the end token nor cut at the horizon."""
    H, end, texts = world.horizon, world.end, [y for _, y in draws.odd]
    if not texts:
        return None
    if any(end in y[:-1] for y in texts):
        return "after_end"
    if any(len(y) > H for y in texts):
        return "too_long"
    if any(t not in world.spoken and t != end for y in texts for t in y):
        return "unknown_token"
    ended = [c for c, y in enumerate(world.completions) if y[-1] == end]
    if not draws.counts[:, ended].any():
        return "end_dropped"
    if len({y[-1] for y in texts if y}) == 1 and all(texts) and len({len(y) for y in texts}) > 1:
        return "another_end"
    return "cut_early"


# ---- independence ----------------------------------------------------------------------------------------------------


def agreement(first: Index, second: Index) -> float:
    """p-value that rows agree no oftener than two independent rows with these frequencies."""
    from scipy.stats import binom

    n = len(first)
    values = np.unique(np.concatenate([first, second]))
    rate = sum((first == v).mean() * (second == v).mean() for v in values)
    return float(binom.sf((first == second).sum() - 1, n, min(rate, 1.0)))


def independence(world: ModelWorld, draws: Draws) -> dict[str, float]:
    """p-values: pairs of neighbours, of the two halves of a batch, of two batches; and of neighbours' first tokens."""
    calls, found = draws.calls, {}
    half = calls.shape[1] // 2
    first_token = np.array([y[0] for y in world.completions] + [-1])
    for i in range(calls.shape[2]):
        column = calls[:, :, i]
        found[f"rows {i}"] = agreement(column[:, ::2].ravel(), column[:, 1::2].ravel())
        found[f"halves {i}"] = agreement(column[:, :half].ravel(), column[:, half:].ravel())
        found[f"batches {i}"] = agreement(column[0::2].ravel(), column[1::2].ravel())
        if i:
            pair = first_token[calls[:, :, i - 1].ravel()], first_token[calls[:, :, i].ravel()]
            found[f"prompts {i}"] = _unrelated(*pair)
    return found


def _unrelated(first: Index, second: Index) -> float:
    from scipy.stats import chi2_contingency

    a, b = (np.unique(x, return_inverse=True) for x in (first, second))
    table = np.zeros((len(a[0]), len(b[0])))
    np.add.at(table, (a[1], b[1]), 1)
    keep = [np.flatnonzero(table.sum(axis) >= 40) for axis in (1, 0)]
    table = table[np.ix_(*keep)]
    if min(table.shape) < 2 or (table.sum(0) == 0).any() or (table.sum(1) == 0).any():
        return 1.0
    return float(chi2_contingency(table, correction=False).pvalue)


SHARED = {
    "rows": "two rows of a batch share their random numbers: a seed or noise is repeated",
    "halves": "two rows of a batch share their random numbers: one half of the batch is drawn like the other",
    "batches": "the seed is ignored: two batches with different seeds are drawn from the same random numbers",
    "prompts": "rows of different prompts share their random numbers: one draw of noise serves the whole batch",
}


# ---- what else it could be -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LawCandidate:
    """law() gives log-probabilities (prompts, C). Those with fewer numbers to fit come first where several will do."""

    name: str
    cause: str
    law: Array
    fitted: int = 0


LAYOUT_CAUSES = {
    "positions": "position ids are not from the mask: they count the padding on the left",
    "padding_read": "padding is read: the attention mask does not hide the padding on the left",
    "padding_read_placed": "padding is read: the attention mask does not hide the padding on the left",
    "mask_by_id": "the attention mask is made from ids != pad, and pad is the end token: an end token in the prompt is "
    "hidden",
    "right": "prompts are padded on the right: the first token is drawn at the padding",
    "right_row": "prompts are padded on the right: the first token is drawn at the padding, and positions count it",
    "cache_stale": "the cache is stale: it is not extended by the tokens drawn",
    "cache_stale_placed": "the cache is stale: it is not extended by the tokens drawn",
}
LAYOUT_NAMES = {
    "padding_read_placed": "padding_read",
    "right": "right_padding",
    "right_row": "right_padding",
    "cache_stale_placed": "cache_stale",
}


def laws_of(
    world: ModelWorld, said: Declared, role: str, sampling: Sampling | None = None, layout: str = "plain"
) -> Array:
    """Next-token laws of a role with another sampling or layout than it says."""
    how = said.sampling if sampling is None else sampling
    if role != "mixture":
        return world.laws(role, how, layout)
    return how.law(
        mix(world.laws("policy", layout=layout), world.laws("reference", layout=layout), said.share)
    )


def candidates(world: ModelWorld, said: Declared, role: str, counts: Index) -> Iterator[LawCandidate]:
    right = right_law(world, said, role)
    others = {"policy": ("reference", "base"), "reference": ("policy", "base"), "mixture": ()}[role]
    for other in others:
        yield LawCandidate(f"{role}_is_{other}", ROLE_CAUSES[role, other], world.law(other, said.sampling))
    if role == "mixture":
        yield from _mixtures(world, said, counts)
    for order in itertools.permutations(range(len(right))):
        if list(order) != sorted(order):
            yield LawCandidate(
                "prompts_exchanged",
                "prompt rows are exchanged: the batch is sorted, and not put back",
                right[list(order)],
            )
    for i in range(len(right)):
        yield LawCandidate(
            "one_prompt",
            f"all rows are drawn to prompt {i} of the batch",
            np.broadcast_to(right[i], right.shape),
        )
    if role != "mixture" or said.mixture == "token":
        yield from _endings(world, laws_of(world, said, role))
        for layout, cause in LAYOUT_CAUSES.items():
            name = LAYOUT_NAMES.get(layout, layout)
            yield LawCandidate(name, cause, world.law_of(laws_of(world, said, role, layout=layout)))
        yield from _samplings(world, said, role, counts)


ROLE_CAUSES = {
    ("policy", "reference"): "policy equals reference: adapter off, or the wrong model",
    ("policy", "base"): "policy equals the base model: adapter off, or never loaded",
    ("reference", "policy"): "reference equals policy: adapter still on, or one model serves as both",
    (
        "reference",
        "base",
    ): "the reference is the base model without its adapter, although training goes on from a trained "
    "adapter",
}


def _endings(world: ModelWorld, laws: Array) -> Iterator[LawCandidate]:
    from scipy.special import log_softmax

    banned = laws.copy()
    banned[:, :, world.end] = -np.inf
    never = np.asarray(log_softmax(banned, axis=-1))
    yield LawCandidate(
        "end_never", "the end token is never drawn (banned, or not known as the end)", world.law_of(never)
    )
    late = laws.copy()
    late[:, 0] = never[:, 0]
    yield LawCandidate(
        "end_late",
        "the end token is not drawn as the first token (a minimum length is set)",
        world.law_of(late),
    )


def _mixtures(world: ModelWorld, said: Declared, counts: Index) -> Iterator[LawCandidate]:
    pi, ref, s = world.laws("policy"), world.laws("reference"), said.share
    whole_pi, whole_ref = world.law("policy"), world.law("reference")
    yield LawCandidate("mixture_swapped", "mixture weights swapped", world.law_of(mix(pi, ref, 1 - s)))
    yield LawCandidate(
        "mixture_arithmetic",
        "the mixture is arithmetic (of probabilities), not geometric",
        world.law_of(mix(pi, ref, s, "arithmetic")),
    )
    yield LawCandidate(
        "mixture_arithmetic",
        "the mixture is arithmetic, of whole responses: each is drawn from one of the two",
        mix(whole_pi, whole_ref, s, "arithmetic"),
    )
    sequence = mix(whole_pi, whole_ref, s)
    if said.mixture == "token":
        yield LawCandidate(
            "mixture_sequence", "the mixture is that of whole responses, not token by token", sequence
        )
    else:
        yield LawCandidate(
            "mixture_token",
            "the mixture is made token by token, not of whole responses",
            world.law_of(mix(pi, ref, s)),
        )
    yield LawCandidate("mixture_policy", "the mixture is the policy alone", whole_pi)
    yield LawCandidate("mixture_reference", "the mixture is the reference alone", whole_ref)

    def member(x: float) -> Array:
        return mix(whole_pi, whole_ref, x) if said.mixture == "sequence" else world.law_of(mix(pi, ref, x))

    x = _fitted(member, counts, np.linspace(0.02, 0.98, 25))
    yield LawCandidate(
        "mixture_share", f"the reference's share is {x:.3g}, where {s:g} is asked for", member(x), 1
    )


def _samplings(world: ModelWorld, said: Declared, role: str, counts: Index) -> Iterator[LawCandidate]:
    asked = said.sampling

    def member(sampling: Sampling) -> Array:
        return world.law_of(laws_of(world, said, role, sampling))

    if not asked.plain:
        yield LawCandidate(
            "sampling_ignored", "temperature and truncation are ignored while sampling", member(Sampling())
        )
    most = len(world.spoken)
    yield LawCandidate("greedy", "the likeliest token is taken: greedy decoding", member(Sampling(top_k=1)))
    for k in range(2, most + 1):
        if k != asked.top_k:
            cause = f"top-{k} truncation, which is not asked for, and renormalises"
            yield LawCandidate("top_k", cause, member(Sampling(asked.temperature, k, asked.top_p)), 1)
    T = math.exp(
        _fitted(
            lambda t: member(Sampling(math.exp(t), asked.top_k, asked.top_p)), counts, np.linspace(-3, 3, 31)
        )
    )
    cause = f"the temperature is {T:.3g}, where {asked.temperature:g} is asked for"
    yield LawCandidate("temperature", cause, member(Sampling(T, asked.top_k, asked.top_p)), 1)
    shares = np.linspace(0.05, 0.99, 95)
    p = shares[
        int(
            np.argmax(
                [likelihood(member(Sampling(asked.temperature, asked.top_k, x)), counts) for x in shares]
            )
        )
    ]
    cause = f"top-p truncation at about {p:.2g}, which is not asked for, and renormalises"
    yield LawCandidate("top_p", cause, member(Sampling(asked.temperature, asked.top_k, float(p))), 1)


def likelihood(law: Array, counts: Index) -> float:
    seen = counts > 0
    if np.isneginf(law[seen]).any():
        return -math.inf
    return float((counts[seen] * law[seen]).sum())


def _fitted(member: Callable[[float], Array], counts: Index, starts: Array) -> float:
    from scipy.optimize import minimize_scalar

    values = [likelihood(member(x), counts) for x in starts]
    k = int(np.argmax(values))
    if not math.isfinite(values[k]):
        return float(starts[k])
    bounds = (starts[max(k - 1, 0)], starts[min(k + 1, len(starts) - 1)])
    found = minimize_scalar(lambda x: -likelihood(member(x), counts), bounds=bounds, method="bounded")
    return float(found.x)


def explain_law(found: Iterator[LawCandidate], counts: Index) -> tuple[LawCandidate | None, list[Match]]:
    """The candidate that the draws do not reject, by likelihood less its price of fitting; and the nearest ones."""
    P, ranked = len(counts), []
    for c in found:
        p = np.exp(c.law)
        tv = float(np.mean([total_variation(k, q) for k, q in zip(counts, p, strict=True)]))
        level = P * min(law_p_value(k, q) for k, q in zip(counts, p, strict=True))
        price = 0.5 * c.fitted * math.log(counts.sum())
        ranked.append((level < NAMED, -(likelihood(c.law, counts) - price), tv, c))
    ranked.sort(key=lambda row: row[:3])
    nearest = sorted({row[3].name: row[2] for row in reversed(ranked)}.items(), key=lambda item: item[1])
    best = ranked[0][3] if ranked and not ranked[0][0] else None
    matches = [Match(name, tv, 1.0) for name, tv in nearest[:4]]
    if best is not None:
        matches = [m for m in matches if m.name == best.name] + [m for m in matches if m.name != best.name]
    return best, matches


# ---- the level -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Finding:
    """A check that failed, what it is called, and what else was near."""

    check: Check
    cause_name: str | None = None
    cause: str | None = None
    nearest: tuple[Match, ...] = ()


@dataclass(frozen=True, eq=False)
class _Case:
    title: str
    law: Array
    draws: Draws
    others: Callable[[Index], Iterator[LawCandidate]]

    def p_values(self, world: ModelWorld) -> tuple[list[float], dict[str, float]]:
        laws = [law_p_value(k, np.exp(q)) for k, q in zip(self.draws.counts, self.law, strict=True)]
        return laws, independence(world, self.draws)


def sampling_level(
    trainer: Any,
    world: ModelWorld,
    said: Declared,
    *,
    draws: int,
    seed: int,
    alpha: float,
    after: tuple[Any, Array, Array] | None = None,
) -> list[Finding]:
    """after  a trainer that has been trained, its policy's log-probabilities (prompts, C) after it, and before"""
    cases: list[_Case] = []
    for role in said.drawn:
        for options in variants(trainer, "sample"):
            title = f"samples of the {role}" + (f" ({words_of(options)})" if options else "")
            drawn = draw(trainer, world, role, options, draws, seed + 1000 * len(cases))

            def others(counts: Index, role: str = role) -> Iterator[LawCandidate]:
                return candidates(world, said, role, counts)

            cases.append(_Case(title, right_law(world, said, role), drawn, others))
    if after is not None:
        trained_trainer, now, before = after
        options = variants(trained_trainer, "sample")[0]
        drawn = draw(trained_trainer, world, "policy", options, draws, seed + 1000 * len(cases))
        stale = LawCandidate(
            "stale_weights",
            "samples are of the policy before the step: the sampler's weights are stale",
            before,
        )
        cases.append(_Case("samples of the policy after training", now, drawn, lambda _: iter([stale])))
    return _judged(world, cases, alpha)


def _judged(world: ModelWorld, cases: Sequence[_Case], alpha: float) -> list[Finding]:
    tested = [case.p_values(world) if not case.draws.odd else ([], {}) for case in cases]
    flat = [p for laws, pairs in tested for p in (*laws, *pairs.values())]
    rejected = iter(holm(flat, alpha))
    found = []
    for case, (laws, pairs) in zip(cases, tested, strict=True):
        bad_laws = [next(rejected) for _ in laws]
        bad_pairs = [name for name in pairs if next(rejected)]
        found.append(_finding(world, case, laws, bad_laws, bad_pairs, pairs, alpha / max(1, len(flat))))
    return found


def _finding(
    world: ModelWorld,
    case: _Case,
    laws: Sequence[float],
    bad_laws: Sequence[bool],
    bad_pairs: Sequence[str],
    pairs: Mapping[str, float],
    alpha: float,
) -> Finding:
    odd = odd_shape(world, case.draws)
    if odd is not None:
        (prompt, example), share = case.draws.odd[0], len(case.draws.odd) / case.draws.all
        said = f"{share:.0%} of the draws are no completions of at most {world.horizon} tokens: "
        said += f"{list(example)} to prompt {prompt}"
        return Finding(Check(case.title, 2, "fail", said, {"share": share}), odd, SHAPES[odd])
    counts, n = case.draws.counts, int(case.draws.counts.sum(1).max())
    p = np.exp(case.law)
    tv = [total_variation(k, q) for k, q in zip(counts, p, strict=True)]
    floor = [noise_floor(n, q, alpha) for q in p]
    worst = int(np.argmin(laws))
    numbers = {"tv": max(tv), "floor": max(floor), "p": min(laws), "p_independent": min(pairs.values())}
    words = f"{n} draws a prompt, total variation {tv[worst]:.3f} (noise floor {floor[worst]:.3f}), p = {min(laws):.2g}"
    if bad_pairs and not _one_text(counts):
        same = bool((case.draws.calls == case.draws.calls[:1]).all())
        kind = "batches" if same else min(bad_pairs, key=lambda name: pairs[name]).split()[0]
        text = f"rows are not independent (p = {min(pairs[name] for name in bad_pairs):.1g}); {words}"
        return Finding(
            Check(case.title, 2, "fail", text, numbers),
            "seed_ignored" if same else "shared_noise",
            SHARED[kind],
        )
    if not any(bad_laws):
        return Finding(Check(case.title, 2, "pass", words, numbers))
    best, nearest = explain_law(case.others(counts), counts)
    check = Check(case.title, 2, "fail", f"another law: {words}", numbers)
    if best is None:
        cause = "none of the catalogue's: the draws have another law, or two faults at once"
        return Finding(check, None, cause, tuple(nearest))
    return Finding(check, best.name, best.cause, tuple(nearest))


def _one_text(counts: Index) -> bool:
    return bool((counts.max(1) == counts.sum(1)).all())
