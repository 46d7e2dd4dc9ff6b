r"""vLLM behind the protocol of policies: it draws, the model beside it scores, and laws that differ are refused.

    llm = open_llm("folder", dtype="bfloat16")                 # or any vllm.LLM
    fast = vllm_policy(policy, llm, refresh=load_weights(llm))
    drawn = fast.sample(prompts, 128, generator)               # Samples, as of any policy
    train(fast, "nash_md", ...)                                # the loop asks nothing else of it

vLLM (https://github.com/vllm-project/vllm) gets token ids and gives token ids; each prompt has a seed of its own, so
that it is answered alike in whatever batch. Its sampling parameters are the policy's own: temperature 1 and nothing
truncated, unless asked for. Ends are the policy's `end_ids` and no others. Whatever is drawn is looked at twice.

  reported   q_t, vLLM's log-probability of the token that it drew, against p_t, the policy's: d_t = q_t - p_t.
             In exact arithmetic d = 0. In a format of unit roundoff u, and logits of size a_t, a logit is off by some
             u a_t. Refused where the root mean square of d_t / (u a_t) exceeds `LIMIT`, or a single one 8 times it
  drawn      the tokens, by the policy's own law, whatever vLLM says of them. r_t in [0, 1] is where the token stands
             when the law is laid out from its likeliest token on, by a uniform number within the token. If the law is
             that of the draws, r_1, r_2, ..., row after row, are independent and uniform. Refused where

               |sum_t (log p_t + H_t)| > SIGMAS (sum_t Var_t)^{1/2}, with H_t the entropy and Var_t the variance of
               log p at t: the score of the temperature, which it estimates as 1 / (1 + sum(log p + H) / sum Var)
               the distribution function of r is further from x than n draws leave it (Kolmogorov-Smirnov) by `RARE`
               max_t r_t, or the largest rank of a token, would be as small with a chance below `RARE`: a cut tail

Both are needed. By default vLLM reports the model's log-probabilities before temperature and truncation
(`logprobs_mode` raw_logprobs): then d = 0 and the draws are another law's. And draws cannot tell weights of one step
ago, where d can. Rounding moves laws too. What it does to draws is of second order, since it does not know which token
is likely: the mean of d^2, where d is rounding, is allowed for. A difference below all this is not seen:
`CrossCheck.resolution` is the change of temperature that would have been.

Written by vLLM's documentation of its releases 0.10 to 0.22 (LLM, SamplingParams, RequestOutput), and tested with a
stand-in for what is used of it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policy import Batch, Samples, Tokens, TransformerPolicy, check_logits, encode

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Of d / (u a). Half formats are rounded once a layer, their sums are kept in float32; float32's sums lose digits too.
LIMIT = {"float64": 16.0, "float32": 16.0, "float16": 4.0, "bfloat16": 4.0}
RANKS = 1024  # the largest top_k that is looked for
SIGMAS, RARE = 6.0, 1e-9  # about the same: how often an honest engine is refused
UNIT = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
# vLLM normalises logits in float32, so that float64 weights do not make its numbers better than that.

Refresh = Callable[[Any], None]


class LawsDiffer(ValueError):
    """What the engine draws, or says that it draws, is not the policy's law."""


# ---- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VllmPolicy(TransformerPolicy):
    """A `TransformerPolicy` whose samples are vLLM's. Scores, mixtures and decoders are those of `model`.

    llm      a vllm.LLM that holds the same weights
    refresh  called with the model before each call of `sample`, to bring its weights into the engine; None = they stay
             as they are (and once they do not, the next sample is refused)
    dtype    the engine's number format; None = what the engine says
    rows     so many rows of each sample are scored again for the cross-check; None = all
    options  further arguments of llm.generate, such as lora_request
    """

    llm: Any = None
    refresh: Refresh | None = None
    dtype: str | None = None
    rows: int | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.llm, "generate"):
            raise ValueError(f"llm is {type(self.llm).__name__}; give a vllm.LLM, such as open_llm's")
        config = getattr(
            getattr(getattr(self.llm, "llm_engine", None), "vllm_config", None), "model_config", None
        )
        dtype = self.dtype or str(getattr(config, "dtype", None)).removeprefix("torch.")
        if dtype not in UNIT:
            raise ValueError(f"the engine's dtype is {dtype!r}: give dtype, one of {', '.join(UNIT)}")
        object.__setattr__(self, "dtype", dtype)
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; at least 1 row is cross-checked")
        mode = str(getattr(config, "logprobs_mode", "processed_logprobs")).rpartition(".")[2]
        plain = self.temperature == 1 and self.top_k is None and self.top_p in (None, 1)
        if mode != "processed_logprobs" and not (mode == "raw_logprobs" and plain):
            raise ValueError(
                f"the engine's logprobs_mode is {mode!r}, which is not the law that is sampled: make it with "
                "logprobs_mode='processed_logprobs'"
            )

    def sample(
        self,
        prompts: Sequence[Tokens],
        horizon: int,
        generator: Generator | None = None,
        cached: bool | None = None,
        *,
        uniforms: Tensor | None = None,
    ) -> Samples:
        """As `TokenPolicy.sample`, drawn by vLLM; `cached` is nothing to it, of uniforms it takes the first column.

        The log-probabilities are those that vLLM reports. LawsDiffer where they, or the draws, are not the policy's.
        """
        import torch

        self.check(prompts, horizon=horizon)
        if (generator is None) == (uniforms is None):
            raise ValueError("give either a generator or uniforms: what the completions are drawn from")
        if generator is not None:
            u = torch.rand(len(prompts), dtype=torch.float64, generator=generator, device=generator.device)
        else:
            assert uniforms is not None
            if uniforms.shape != (len(prompts), horizon):
                raise ValueError(
                    f"uniforms are {tuple(uniforms.shape)}; expected ({len(prompts)}, {horizon})"
                )
            u = uniforms[:, 0].double()
        seeds = [int(x) for x in (u * 2.0**53).tolist()]
        if self.refresh is not None:
            self.refresh(self.model)
        drawn = self._generate(prompts, horizon, seeds)
        found = cross_check(self, drawn, dtype=str(self.dtype), rows=self.rows)
        if found.problem is not None:
            raise LawsDiffer(found.problem)
        return drawn

    def _generate(self, prompts: Sequence[Tokens], horizon: int, seeds: Sequence[int]) -> Samples:
        vllm = _vllm()
        parameters = [
            vllm.SamplingParams(
                n=1,
                temperature=self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=0 if self.top_k is None else self.top_k,
                min_p=0.0,
                seed=seed,
                max_tokens=horizon,
                ignore_eos=True,  # the engine's own; ours are the stop tokens
                stop_token_ids=self._ends,
                logprobs=0,  # of the token drawn alone
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": [int(t) for t in x]} for x in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False, **(self.options or {}))
        return samples_of(prompts, outputs, self._ends, horizon, self.device)


def vllm_policy(policy: TransformerPolicy, llm: Any, **options: Any) -> VllmPolicy:
    """The policy with vLLM as its sampler; `options` are those of `VllmPolicy`."""
    own = {f.name: getattr(policy, f.name) for f in fields(TransformerPolicy)}
    return VllmPolicy(**own, llm=llm, **options)


def samples_of(
    prompts: Sequence[Tokens], outputs: Sequence[Any], ends: Sequence[int], horizon: int, device: Any = None
) -> Samples:
    """vLLM's RequestOutputs as samples; ValueError that names the row where they are not what was asked for."""
    import torch

    if len(outputs) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts were given to vLLM and {len(outputs)} answers came back")
    completions, scores = [], []
    for i, (x, output) in enumerate(zip(prompts, outputs, strict=True)):
        given, read = [int(t) for t in x], output.prompt_token_ids
        if read is not None and list(read) != given:
            raise ValueError(
                f"row {i}: vLLM read {len(read)} tokens of a prompt of {len(given)}, or others: a begin token was put "
                "in front, or the prompt was truncated (truncate_prompt_tokens, max_model_len)"
            )
        answer = output.outputs[0]
        y = [int(t) for t in answer.token_ids]
        _check_answer(i, y, answer.finish_reason, set(ends), horizon)
        if answer.logprobs is None or len(answer.logprobs) != len(y):
            raise ValueError(
                f"row {i}: vLLM gave no log-probability for each token: it was asked for logprobs=0"
            )
        completions.append(y)
        scores += [float(at[t].logprob) for t, at in zip(y, answer.logprobs, strict=True)]
    lengths = torch.tensor([len(y) for y in completions], device=device)
    mask = torch.arange(int(lengths.max()), device=device)[None, :] < lengths[:, None]
    table = torch.zeros(mask.shape, dtype=torch.float64, device=device)
    return Samples(
        prompts=[[int(t) for t in x] for x in prompts],
        completions=completions,
        token_log_probabilities=table.masked_scatter(
            mask, torch.tensor(scores, dtype=torch.float64, device=device)
        ),
        mask=mask,
        ended=torch.tensor([y[-1] in ends for y in completions], device=device),
    )


def _check_answer(i: int, y: Sequence[int], reason: str, ends: set[int], horizon: int) -> None:
    inside = [t for t in y[:-1] if t in ends]
    if inside:
        raise ValueError(
            f"row {i}: vLLM went on after the end token {inside[0]}: stop_token_ids did not reach it"
        )
    if reason == "stop" and not (y and y[-1] in ends):
        raise ValueError(
            f"row {i}: vLLM stopped, and the last token, {y[-1] if y else None}, is none of the end tokens "
            f"{sorted(ends)}: the end token was stripped, or the engine has ends of its own (stop strings, "
            "generation_config)"
        )
    if reason != "stop" and not (reason == "length" and len(y) == horizon):
        raise ValueError(
            f"row {i}: vLLM finished for the reason {reason!r} after {len(y)} of {horizon} tokens: raise max_model_len"
        )


# ---- the cross-check -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossCheck:
    """What `cross_check` found; problem None = go on.

    tokens       n, and the completions that they are of, rows
    rms, worst   of d_t / (u a_t), and `place`, (row, token), of the worst
    difference   d_t there
    kl           mean of d_t, an estimate of KL(engine, policy) a token
    sigmas       of the temperature's score, and `temperature`, its estimate
    distance     sup |F(r) - x|, and `chance`, the probability of one as large by chance
    top          max r_t; `rank`, the largest rank of a token, from 0; `chance_of_rank`, of none beyond it
    resolution   the change of temperature that these tokens would have shown, SIGMAS standard errors
    """

    tokens: int
    rows: int
    rms: float
    worst: float
    place: tuple[int, int]
    difference: float
    kl: float
    sigmas: float
    temperature: float
    distance: float
    chance: float
    top: float
    rank: int
    chance_of_rank: float
    resolution: float
    problem: str | None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Arrays (n,) over the tokens, row after row, but for the first."""

    cut: Any  # (RANKS,) not over tokens: the log-probability that no token has a rank beyond 0, 1, ...
    log_p: Any
    size: Any  # a_t, the largest |logit|
    entropy: Any
    variance: Any
    before: Any  # the probability of all likelier tokens
    block: Any  # of those as likely as this one, itself among them
    rank: Any


def cross_check(
    policy: TransformerPolicy,
    drawn: Samples,
    *,
    dtype: str = "float32",
    rows: int | None = None,
    seed: int = 0,
) -> CrossCheck:
    """Whether `drawn`, with its log-probabilities, is of the policy's law.

    dtype  the number format in which it was drawn; the coarser of it and the model's own sets the limit
    rows   the first so many completions alone; seed of the uniforms within tokens
    """
    import torch

    count = len(drawn.completions) if rows is None else min(rows, len(drawn.completions))
    mask = drawn.mask[:count]
    q = drawn.token_log_probabilities[:count][mask].double().cpu().numpy()
    with torch.no_grad():
        seen = _of_tokens(policy, drawn.prompts[:count], drawn.completions[:count])
    coarser = max(dtype, _dtype(policy), key=lambda name: UNIT[name])
    unit, limit = UNIT[coarser], LIMIT[coarser]
    with np.errstate(invalid="ignore"):
        d = q - seen.log_p
    ratio = np.abs(d) / (unit * seen.size)
    ratio[~np.isfinite(d)] = np.inf
    worst = int(ratio.argmax())
    place = tuple(int(x) for x in mask.nonzero()[worst].tolist())
    n = len(q)
    score, information = (seen.log_p + seen.entropy).sum(), seen.variance.sum()
    r = seen.before + np.random.default_rng(seed).random(n) * seen.block
    slack = min(float(np.mean(d**2)), (limit * unit) ** 2 * float(np.mean(seen.size**2)))
    distance, chance = _uniform(r, slack)
    tilt = score / information if information > 0 else 0.0
    found: dict[str, Any] = {
        "tokens": n,
        "rows": count,
        "rms": float(np.sqrt(np.mean(ratio**2))),
        "worst": float(ratio[worst]),
        "place": place,
        "difference": float(d[worst]),
        "kl": float(d.mean()),
        "sigmas": _beyond(score, slack * information) / math.sqrt(information) if information > 0 else 0.0,
        "temperature": float(1 / max(1 + tilt, 1e-3)),
        "distance": distance,
        "chance": chance,
        "top": float(r.max()),
        "rank": int(seen.rank.max()),
        "chance_of_rank": _cut(seen),
        "resolution": SIGMAS / math.sqrt(information) + slack if information > 0 else math.inf,
    }
    return CrossCheck(**found, problem=_problem(found, d, seen, coarser))


def _problem(found: Mapping[str, Any], d: Any, seen: _Tokens, dtype: str) -> str | None:
    row, token = found["place"]
    if not np.isfinite(d).all():
        return (
            f"completion {row}, token {token}: vLLM drew a token that the policy rules out. Likely cause: the policy "
            "has a truncation (top_k, top_p) and the engine none"
        )
    law, limit = _law_of_draws(found), LIMIT[dtype]
    if found["rms"] > limit or found["worst"] > 8 * limit:
        said = (
            f"completion {row}, token {token}: vLLM reports a log-probability that is {found['difference']:+.3g} off "
            f"the policy's; over {found['tokens']} tokens the difference is {found['rms']:.3g} times the rounding of "
            f"{dtype} (at most {limit:g}), at that token {found['worst']:.3g} times (at most {8 * limit:g})"
        )
        return f"{said}. Likely cause: {law or _cause_of(d, dtype, seen)}"
    if law is not None:
        return (
            f"vLLM reports the policy's log-probabilities and draws from another law, over {found['tokens']} tokens of "
            f"{found['rows']} completions. Likely cause: {law}; the reported numbers are of the law before that "
            "(logprobs_mode is raw_logprobs)"
        )
    return None


def _law_of_draws(found: Mapping[str, Any]) -> str | None:
    """What the draws themselves say."""
    top = found["top"]
    if found["chance_of_rank"] < RARE or found["tokens"] * math.log(max(top, 1e-300)) < math.log(RARE):
        return (
            f"truncation: no token beyond the likeliest {found['rank'] + 1}, nor beyond the first {top:.3g} of the "
            "law, was ever drawn: top_k, top_p or min_p in the sampling parameters"
        )
    if abs(found["sigmas"]) > SIGMAS:
        return (
            f"the draws are those of temperature about {found['temperature']:.2g} times the policy's "
            f"({found['sigmas']:+.1f} standard errors), or of other weights"
        )
    if found["chance"] < RARE:
        return (
            f"the draws are not spread as the law is (distance {found['distance']:.3g}, chance {found['chance']:.1g}): "
            "penalties, a logit bias or other weights"
        )
    return None


def _cause_of(d: Any, dtype: str, seen: _Tokens) -> str:
    """Of numbers that differ where the draws do not say why."""
    if (d > -8 * LIMIT[dtype] * UNIT[dtype] * seen.size).all() and (d > 0).mean() > 0.9:
        return "reported log-probabilities are larger everywhere, as after truncation (top_k, top_p, min_p)"
    for name in ("float16", "bfloat16"):
        coarse = np.abs(d) / (UNIT[name] * seen.size) / LIMIT[name]
        if UNIT[name] > UNIT[dtype] and np.sqrt(np.mean(coarse**2)) <= 1 and coarse.max() <= 8:
            return (
                f"the engine computes in {name} (then give dtype={name!r}), or its weights are not the policy's but "
                "near: a step behind, not refreshed"
            )
    return (
        "the engine has other weights: load the policy's into it (refresh=load_weights(llm)), its prefix cache "
        "emptied, the adapter with them"
    )


def _cut(seen: _Tokens) -> float:
    """The chance that no token has a rank beyond the largest that was drawn; 1 where that is not looked for."""
    rank = int(seen.rank.max())
    return float(np.exp(seen.cut[rank])) if rank < len(seen.cut) else 1.0


def _uniform(r: Any, slack: float) -> tuple[float, float]:
    """sup |F(r) - x|, and the chance that it exceeds `slack` by as much for uniforms."""
    from scipy.stats import kstwo

    n, ordered = len(r), np.sort(r)
    steps = np.arange(n + 1) / n
    distance = float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))
    return distance, float(kstwo.sf(max(distance - slack, 0.0), n))


def _beyond(x: float, slack: float) -> float:
    return float(np.sign(x) * max(abs(x) - slack, 0.0))


def _dtype(policy: TransformerPolicy) -> str:
    parameters = getattr(policy.model, "parameters", None)
    return "float64" if parameters is None else str(next(parameters()).dtype).removeprefix("torch.")


def _of_tokens(
    policy: TransformerPolicy, prompts: Sequence[Tokens], completions: Sequence[Tokens]
) -> _Tokens:
    import torch

    policy.check(prompts, completions)
    parts = list(_columns(policy, prompts, completions))
    cut = torch.stack([part[0] for part in parts]).sum(0)
    columns = (torch.cat([part[k] for part in parts]) for k in range(1, len(parts[0])))
    return _Tokens(*(x.cpu().numpy() for x in (cut, *columns)))


def _columns(
    policy: TransformerPolicy, prompts: Sequence[Tokens], completions: Sequence[Tokens]
) -> Iterator[list[Tensor]]:
    """The fields of `_Tokens` for one micro-batch after the other."""
    assert policy.pad_id is not None
    for first in range(0, len(prompts), policy.micro_batch):
        rows = slice(first, first + policy.micro_batch)
        batch = encode(prompts[rows], completions[rows], policy.pad_id, "right", policy.device)
        logits = _logits(policy, batch)
        law = policy.law(logits).double()
        p, at = law.exp(), batch.ids[batch.scored][:, None]
        own = law.gather(1, at)
        mean = (p * law.masked_fill(p == 0, 0.0)).sum(1)
        square = (p * law.masked_fill(p == 0, 0.0).square()).sum(1)
        likeliest = p.topk(min(RANKS, p.shape[1]), dim=1).values.cumsum(1)
        yield [
            likeliest.clamp(max=1).log().sum(0),
            own[:, 0],
            logits.double().masked_fill(logits.isinf(), 0.0).abs().amax(1).clamp(min=1.0),
            -mean,
            (square - mean.square()).clamp(min=0),
            p.masked_fill(law <= own, 0.0).sum(1),
            p.masked_fill(law != own, 0.0).sum(1),
            (law > own).sum(1),
        ]


def _logits(policy: TransformerPolicy, batch: Batch) -> Tensor:
    """The logits before each scored token, (m, V)."""
    before = batch.scored.roll(-1, 1)
    keep = before.shape[1] - int(before.any(0).int().argmax())
    logits, _ = policy.logits(batch.ids, batch.mask, batch.positions, keep=keep)
    chosen = logits[before[:, -keep:]]
    check_logits(chosen, lambda i: f"scored token {i} of a sample of vLLM's")
    return chosen


# ---- an engine, and its weights --------------------------------------------------------------------------------------


def open_llm(folder: str | Path, *, dtype: str = "bfloat16", seed: int = 0, **options: Any) -> Any:
    """A vllm.LLM of a folder of safetensors weights, that reports the law it samples; `options` are vllm.LLM's."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no config.json with safetensors weights: give a folder of save_pretrained"
        )
    settings = {
        "model": str(path),
        "dtype": dtype,
        "seed": seed,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "generation_config": "vllm",  # not the folder's, which may have a temperature
        "logprobs_mode": "processed_logprobs",
    }
    return _vllm().LLM(**(settings | options))


def load_weights(llm: Any) -> Refresh:
    """A `refresh` that loads the model's weights into an engine, adapters added in, and empties its prefix cache.

    By LLM.apply_model; an engine whose workers are other processes refuses it unless VLLM_ENABLE_V1_MULTIPROCESSING=0
    (one GPU, in this process) or vLLM is told to serialise functions.
    """

    def refresh(model: Any) -> None:
        pairs = list(merged_weights(model))
        llm.apply_model(lambda engine: engine.load_weights(iter(pairs)) and None)
        llm.reset_prefix_cache()

    return refresh


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under the names of a bare transformers model; a peft adapter is added to what it adapts."""
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    for name, x in model.state_dict().items():
        if "lora_" in name:
            continue
        value = x.detach()
        if name in adapted:
            for adapter in adapted[name].active_adapters:
                value = value + adapted[name].get_delta_weight(adapter).detach().to(value)
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), value


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"vLLM cannot be imported ({error}): pip install vllm, on a machine with a GPU"
        ) from error
