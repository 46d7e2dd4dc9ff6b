r"""What a trainer may really descend: a catalogue of objectives and faults, each with a maintainer's sentence.

A candidate is a loss in the form of the adapter protocol, so that its expected gradient is found on the very batches
that the trainer saw. `PairRecipe` and `SampleRecipe` are such losses made of parts; a candidate of a target is the
target's recipe with one part exchanged, or another known objective. Where the literature itself disagrees (IPO by sum
or by mean, the KL of sequences or of tokens) the candidate is an "objective", else a "fault".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .batch import Completions, PairBatch, SampleBatch, TrainerLoss

if TYPE_CHECKING:
    from torch import Tensor

EPS_OF_GRPO, EPS_OF_LOO = 1e-4, 1e-6


@dataclass(frozen=True)
class Candidate:
    """terms: losses whose gradients are added with unknown weights; one term, and only the scale is unknown."""

    name: str
    cause: str
    kind: Literal["right", "fault", "objective"]
    terms: tuple[TrainerLoss, ...]


# ---- which tokens count --------------------------------------------------------------------------------------------

VIEWS = {
    "no_end": "EOS not scored: the end token is missing from the completion's mask (pad == eos masks the real "
    "end, too)",
    "no_last": "the last token of every completion is not scored: truncation, or a mask that is one too short",
    "no_first": "the first token of the completion is not scored: the prompt is taken for one token too long",
    "shift_left": "off by one: mask and log-probabilities are shifted, the last prompt token is scored and the last "
    "completion token is not",
    "shift_right": "off by one: mask and log-probabilities are shifted, the first completion token is not scored and a "
    "padding token is",
    "prompt": "prompt tokens are scored: the mask covers the prompt",
    "padding": "padding is scored: the mask does not end with the completion",
    "everything": "prompt and padding are scored: no mask is applied",
}


# Chosen and rejected share the prompt and what follows the end, so that tokens scored there cancel in their difference.
PAIR_VIEWS = {
    "no_end": VIEWS["no_end"],
    "shift_left": "the last token of every completion is not scored: off by one (mask and log-probabilities are "
    "shifted), or "
    "truncation",
    "shift_right": "the first token of every completion is not scored: off by one (mask and log-probabilities "
    "are shifted), "
    "or the prompt is taken for one token too long",
    "padding": VIEWS["padding"],
}


def view(c: Completions, which: str) -> Tensor:
    """The mask (B, T) that a trainer uses who sees the completion so."""
    import torch

    m = c.mask
    place = torch.arange(m.shape[1]).expand_as(m)
    first = m.long().argmax(1, keepdim=True)
    last = first + m.sum(1, keepdim=True) - 1
    masks: dict[str, Callable[[], Tensor]] = {
        "completion": lambda: m,
        "no_end": lambda: m & (c.ids != c.end),
        "no_last": lambda: m & (place != last),
        "no_first": lambda: m & (place != first),
        "shift_left": lambda: m.roll(-1, dims=1),
        "shift_right": lambda: m.roll(1, dims=1),
        "prompt": lambda: place <= last,
        "padding": lambda: place >= first,
        "everything": lambda: torch.ones_like(m),
    }
    return masks[which]()


def _norm(mask: Tensor, which: str) -> Tensor:
    """What a sum over tokens is divided by, (B,) or a number."""
    import torch

    lengths = mask.sum(1).clamp(min=1).to(torch.float64)
    return {
        "sum": torch.ones_like(lengths),
        "mean": lengths,
        "batch": lengths.mean().expand_as(lengths),
        "constant": torch.full_like(lengths, mask.shape[1]),
    }[which]


# ---- comparisons ---------------------------------------------------------------------------------------------------

SHAPES = {
    "dpo": "DPO's logistic loss",
    "cdpo": "cDPO's logistic loss with label smoothing 0.1",
    "ipo": "IPO's square loss with target 1/(2 tau)",
    "hinge": "the hinge loss of SLiC",
    "robust": "the noise-corrected logistic loss (robust DPO, label smoothing 0.1)",
    "exo": "EXO's reverse KL over the pair (label smoothing 0.001)",
    "sppo_hard": "SPPO's square loss on single responses with hard labels, target +-1/(2 beta)",
    "nca": "NCA's loss of a pair",
    "bco": "BCO's two logistic losses of single responses",
    "apo_zero": "APO-zero (anchored)",
    "apo_down": "APO-down (anchored)",
    "sft": "likelihood of the chosen response alone (SFT)",
}


@dataclass(frozen=True)
class PairRecipe:
    """A loss of comparisons.

    shape      of `SHAPES`, or "square" with its own target
    scale      beta in logistic shapes; target: of "square"
    tokens, norm, reference, labels   which tokens, divided by what, minus what, which response is called the better
    imitation  weight of -log pi(chosen); calibration: weight of log pi(calibration), sums over tokens
    share      the reference's weight in the anchor of INPO; 1 = the reference alone
    """

    shape: str
    scale: float = 0.1
    target: float = 0.0
    tokens: str = "completion"
    norm: str = "sum"
    reference: Literal["given", "none", "policy", "previous", "exchanged"] = "given"
    labels: Literal["right", "exchanged"] = "right"
    imitation: float = 0.0
    calibration: float = 0.0
    share: float = 1.0

    def __call__(self, batch: PairBatch) -> Tensor:
        pi, anchor = zip(*(self._scores(c) for c in (batch.chosen, batch.rejected)), strict=True)
        if self.reference == "exchanged":
            anchor = anchor[::-1]
        w, l = (p - a for p, a in zip(pi, anchor, strict=True))  # noqa: E741
        if self.labels == "exchanged":
            w, l = l, w  # noqa: E741
        value = self._shape(w, l, pi[0])
        if self.imitation:
            value = value - self.imitation * pi[0]
        loss = value.mean()
        if self.calibration:
            loss = loss + self.calibration * self._scores(batch.calibration)[0].mean()
        return loss

    def _scores(self, c: Completions) -> tuple[Tensor, Tensor]:
        mask = view(c, self.tokens)
        norm = _norm(mask, self.norm)
        anchor = {
            "given": c.reference,
            "exchanged": c.reference,
            "none": c.reference * 0,
            "policy": c.policy.detach(),
            "previous": c.previous,
        }[self.reference]
        anchor = self.share * anchor + (1 - self.share) * c.previous
        pi, ref = ((x * mask).sum(1) / norm for x in (c.policy, anchor))
        return pi, ref

    def _shape(self, w: Tensor, l: Tensor, chosen: Tensor) -> Tensor:  # noqa: E741
        from torch.nn.functional import logsigmoid

        b, h = self.scale, w - l
        x = b * h
        shapes: dict[str, Callable[[], Tensor]] = {
            "dpo": lambda: -logsigmoid(x),
            "cdpo": lambda: -0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x),
            "square": lambda: (h - self.target) ** 2,
            "ipo": lambda: (h - 1 / (2 * b)) ** 2,
            "hinge": lambda: (1 - x).relu(),
            "robust": lambda: (-0.9 * logsigmoid(x) + 0.1 * logsigmoid(-x)) / 0.8,
            "exo": lambda: (
                x.sigmoid() * (logsigmoid(x) + 0.0010005003335835335)
                + (-x).sigmoid() * (logsigmoid(-x) + 6.907755278982137)
            ),
            "sppo_hard": lambda: (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2,
            "nca": lambda: -logsigmoid(b * w) - 0.5 * logsigmoid(-b * w) - 0.5 * logsigmoid(-b * l),
            "bco": lambda: -logsigmoid(b * w) - logsigmoid(-b * l),
            "apo_zero": lambda: 1 - (b * w).sigmoid() + (b * l).sigmoid(),
            "apo_down": lambda: (b * w).sigmoid() + 1 - x.sigmoid(),
            "sft": lambda: -chosen,
        }
        return shapes[self.shape]()


def _pair_target(name: str, p: Mapping[str, float]) -> PairRecipe:
    if name == "ipo":
        return PairRecipe("square", scale=p["tau"], target=1 / (2 * p["tau"]))
    if name == "inpo":
        return PairRecipe("square", scale=p["tau"], target=p["eta"] / 2, share=p["eta"] * p["tau"])
    if name == "rpo":
        return PairRecipe("dpo", scale=p["beta"], imitation=p["eta"] * p["beta"])
    if name == "vpo":
        return PairRecipe("dpo", scale=p["beta"], calibration=p["sign"] * p["alpha"] * p["beta"])
    if name == "xpo":
        return PairRecipe("dpo", scale=p["beta"], calibration=p["alpha"])
    return PairRecipe("dpo", scale=p["beta"])


def _smoothed(recipe: PairRecipe, eps: float) -> TrainerLoss:
    """(1 - eps) of the loss and eps of it with exchanged labels, which is what label smoothing does."""
    if not eps:
        return recipe
    other = replace(recipe, labels="exchanged" if recipe.labels == "right" else "right")
    return lambda batch: (1 - eps) * recipe(batch) + eps * other(batch)


def pair_candidates(name: str, p: Mapping[str, float]) -> Iterator[Candidate]:
    base, eps = _pair_target(name, p), p.get("label_smoothing", 0.0)

    def fault(
        label: str, cause: str, kind: Literal["fault", "objective"] = "fault", **parts: object
    ) -> Candidate:
        return Candidate(label, cause, kind, (_smoothed(replace(base, **parts), eps),))  # type: ignore[arg-type]

    yield Candidate("right", "none: this is the named objective", "right", (_smoothed(base, eps),))
    mean = "log-probabilities are averaged over tokens, where the objective sums them"
    averaged: Literal["fault", "objective"] = "objective" if name == "ipo" else "fault"
    if name == "ipo":
        mean += (
            " (IPO by token mean is chosen on purpose by some trainers; the paper's derivation needs the sum)"
        )
    elif name == "dpo":
        mean += " (or length-normalised DPO, if that is what was asked for)"
    yield fault("token_mean", mean, averaged, norm="mean")
    yield fault(
        "batch_tokens",
        "log-probabilities are divided by the mean number of tokens in the batch, so that the loss "
        "depends on what else is in it",
        norm="batch",
    )
    yield fault(
        "constant_length",
        "log-probabilities are divided by a constant length: beta is in effect beta over it",
        norm="constant",
    )
    for tokens, cause in (VIEWS if base.imitation or base.calibration else PAIR_VIEWS).items():
        yield fault(tokens, cause, tokens=tokens)
    yield fault(
        "mean_everything",
        "log-probabilities are averaged over the whole row: prompt and padding are scored",
        tokens="everything",
        norm="mean",
    )
    yield fault(
        "mean_prompt",
        "log-probabilities are averaged over prompt and completion: prompt tokens are scored",
        tokens="prompt",
        norm="mean",
    )
    yield fault(
        "no_reference",
        "reference missing: the loss sees the policy's log-probabilities alone (CPO)",
        reference="none",
    )
    yield fault(
        "reference_is_policy",
        "reference equals policy: adapter still on, or the reference's log-probabilities were "
        "taken from the trained model",
        reference="policy",
    )
    yield fault(
        "reference_is_previous",
        "the reference is the policy of the last round, not the reference",
        reference="previous",
        share=1.0,
    )
    yield fault(
        "reference_exchanged",
        "reference log-probabilities of chosen and rejected are exchanged",
        reference="exchanged",
    )
    yield fault(
        "labels_exchanged", "labels exchanged: the rejected response is pushed up", labels="exchanged"
    )
    if base.shape == "square":
        tau, target = base.scale, base.target
        for label, value, cause in (
            ("target_doubled", 2 * target, "the target of the margin is twice what it should be: 1/(2 tau) "
            "became 1/tau"),
            ("target_halved", target / 2, "the target of the margin is half of what it should be"),
            ("beta_twice", target / tau, "beta applied twice: the target is divided by tau once more"),
            ("beta_missing", target * tau, "beta missing: the target is not divided by tau"),
            ("beta_inverse", base.scale / 2, "beta inverted: the target is tau/2"),
        ):  # fmt: skip
            yield fault(label, cause, target=value)
    else:
        for label, b, cause in (
            ("beta_twice", base.scale**2, "beta applied twice: the margin is multiplied by beta squared"),
            ("beta_missing", 1.0, "beta missing: the margin is not multiplied by it"),
            ("beta_inverse", 1 / base.scale, "beta inverted: the margin is divided by it"),
        ):
            yield fault(label, cause, scale=b)
    if name == "inpo":
        share = base.share
        yield fault(
            "mixture_swapped",
            "mixture weights swapped: the reference has the weight of pi_t in the anchor and pi_t "
            "that of the reference",
            share=1 - share,
        )
        yield fault(
            "previous_missing",
            "pi_t missing: the anchor is the reference alone (this is IPO with tau = 1/eta)",
            share=1.0,
        )
    if base.imitation:
        plain = replace(base, imitation=0.0)
        sft = PairRecipe("sft")
        yield fault(
            "sft_sign",
            "sign of the SFT term: log pi(chosen) is subtracted from the objective, where it should be "
            "added (the loss falls as the chosen response becomes less likely)",
            imitation=-base.imitation,
        )
        yield fault("sft_missing", "the SFT term is missing: this is DPO", imitation=0.0)
        yield fault(
            "sft_without_beta",
            "the SFT term has the weight eta, where it is eta beta",
            imitation=base.imitation / base.scale,
        )
        yield fault(
            "sft_beta_twice",
            "the SFT term is multiplied by beta twice",
            imitation=base.imitation * base.scale,
        )
        yield Candidate(
            "sft_token_mean",
            "the SFT term is averaged over tokens, DPO's part is not: its weight falls with the length",
            "objective",
            (_sum(plain, PairRecipe("sft", norm="mean"), base.imitation),),
        )
        yield Candidate(
            "sft_batch_tokens",
            "the SFT term is averaged over the tokens of the batch, DPO's part is not",
            "fault",
            (_sum(plain, PairRecipe("sft", norm="batch"), base.imitation),),
        )
        yield Candidate("sft_weight", "DPO plus SFT with another weight", "fault", (plain, sft))
    if base.calibration:
        plain, rest = replace(base, calibration=0.0), _calibration
        yield fault(
            "bonus_sign",
            "sign of the calibration term: optimism adds log pi, pessimism (an SFT term) subtracts it",
            calibration=-base.calibration,
        )
        yield fault("bonus_missing", "the calibration term is missing: this is DPO", calibration=0.0)
        if name == "xpo":
            yield fault(
                "ipo_with_bonus",
                "it is IPO's square loss with XPO's bonus",
                "objective",
                shape="ipo",
            )
            yield fault(
                "bonus_beta",
                "the bonus has the weight alpha beta, as in VPO, where XPO's is alpha",
                calibration=base.calibration * base.scale,
            )
            yield Candidate(
                "bonus_on_policy",
                "the bonus is taken over the policy's own responses, where it is over the reference's",
                "fault",
                (lambda batch: plain(batch) + base.calibration * _own(batch),),
            )
        else:
            yield fault(
                "bonus_without_beta",
                "the calibration term has the weight alpha, where it is alpha beta",
                calibration=base.calibration / base.scale,
            )
        yield Candidate(
            "bonus_weight", "DPO plus the calibration term with another weight", "fault", (plain, rest)
        )
    # What stands above under its own name.
    seen = {
        "ipo": {("ipo", "sum"), ("ipo", "mean")},
        "dpo": {("dpo", "sum"), ("dpo", "mean")},
        "inpo": set(),
    }.get(name, {("dpo", "sum")})
    for shape, title in SHAPES.items():
        for norm in ("sum", "mean"):
            if (shape, norm) in seen:
                continue
            b = p.get("beta", p.get("tau", 0.1))
            recipe = PairRecipe(shape, scale=b, norm=norm)
            by = "" if norm == "sum" else ", log-probabilities averaged over tokens"
            yield Candidate(f"{shape}_{norm}", f"it is {title}{by}", "objective", (recipe,))
    yield Candidate(
        "simpo",
        "it is DPO's loss of token means without a reference (SimPO with gamma = 0)",
        "objective",
        (PairRecipe("dpo", scale=p.get("beta", 0.1), norm="mean", reference="none"),),
    )
    yield Candidate(
        "sft_batch",
        "it is likelihood of the chosen response alone (SFT), averaged over the tokens of the batch",
        "objective",
        (PairRecipe("sft", norm="batch"),),
    )
    if name == "dpo":
        flipped = replace(base, labels="exchanged")
        yield Candidate(
            "label_smoothing", "label smoothing of another strength than asked for", "fault", (base, flipped)
        )


def _sum(first: TrainerLoss, second: TrainerLoss, weight: float) -> TrainerLoss:
    return lambda batch: first(batch) + weight * second(batch)


def _calibration(batch: PairBatch) -> Tensor:
    return _mean_total(batch.calibration)


def _own(batch: PairBatch) -> Tensor:
    """log pi of XPO's other response, the one that pi_t drew: the pair without the reference's."""
    return _mean_total(batch.chosen) + _mean_total(batch.rejected) - _mean_total(batch.calibration)


def _mean_total(c: Completions) -> Tensor:
    return (c.policy * c.mask).sum(1).mean()


# ---- single responses ----------------------------------------------------------------------------------------------

KL_FORMS = {
    "none": "KL penalty missing",
    "k1_loss": "k1 as a loss: the log-ratio is differentiated where it stands, and the expectation of its "
    "gradient is zero, so "
    "that there is no KL penalty",
    "frozen": "KL has the state-frozen gradient: of each token's KL with the prefixes held fixed (k2 of tokens "
    "as a loss, k1 of a token paid by this token alone, corrected k3), not of the KL of whole responses",
    "k3_token": "KL has the gradient of the state-frozen FORWARD KL(ref, pi): k3 of tokens as a loss (GRPO's penalty)",
    "k3_response": "KL has the gradient of the forward KL(ref, pi): k3 of whole responses as a loss",
    "joint": "the log-ratio in the KL penalty is not detached: sum_t logratio_t log pi_t has the gradient of "
    "frozen KL minus frozen entropy",
    "k3_geometric": "k3 of tokens is multiplied by a sequence-level ratio (the geometric mean of the tokens' "
    "ratios): its gradient is no KL's",
    "maximised": "sign of the KL penalty: the KL is maximised",
    "k2_reward": "k2 is subtracted from the reward: its gradient is not that of the KL",
    "k3_reward": "k3 is subtracted from the reward: its gradient is that of KL(pi, ref) minus that of the forward KL",
}
DISPUTED = {"frozen", "k3_token", "k3_response"}


@dataclass(frozen=True)
class SampleRecipe:
    """A policy-gradient loss of single responses of the policy.

    signal     "reward", or "wins" against the opponent
    kl         "response", which is right, or one of `KL_FORMS`; weight: beta or tau
    baseline   "none", "loo" (of the others), "group" (with one's own), "std" (group, over its deviation), "loo_std"
    opponent   the reference's share in the geometric mixture, or "arithmetic"; half: subtracted from the wins
    """

    signal: str
    weight: float
    kl: str = "response"
    tokens: str = "completion"
    norm: str = "sum"
    baseline: str = "none"
    opponent: float | str = 0.25
    share: float = 0.25
    half: float = 0.0
    sign: float = 1.0
    paid: Literal["all", "cut", "last"] = "all"

    def __call__(self, batch: SampleBatch) -> Tensor:
        c = batch.completions
        mask = view(c, self.tokens)
        log_pi, log_ratio = c.policy * mask, (c.policy - c.reference) * mask
        advantage = self.sign * _advantage(self._signal(batch), batch.group_size, self.baseline)
        whole = log_ratio.sum(1).detach()
        at = {
            "response": whole,
            "maximised": -whole,
            "k2_reward": whole**2 / 2,
            "k3_reward": (-whole).expm1() + whole,
        }
        if self.kl in at:
            advantage = advantage - self.weight * at[self.kl]
        rows = -advantage * log_pi.sum(1)
        if self.paid == "last":  # the penalty is spread over all tokens, the reward is not
            before = log_pi.sum(1) - (log_pi * (mask & ~view(c, "no_last"))).sum(1)
            rows = rows + self.sign * self._signal(batch) * before
        token_terms: dict[str, Callable[[], Tensor]] = {
            "k1_loss": lambda: log_ratio.sum(1),
            "frozen": lambda: (log_ratio**2 / 2).sum(1),
            "k3_token": lambda: ((-log_ratio).expm1() + log_ratio).sum(1),
            "k3_response": lambda: (-log_ratio.sum(1)).expm1() + log_ratio.sum(1),
            "joint": lambda: (log_ratio * log_pi).sum(1),
            "k3_geometric": lambda: (
                (log_pi - log_pi.detach()).sum(1).div(mask.sum(1).clamp(min=1)).exp()
                * ((-log_ratio).expm1() + log_ratio).sum(1)
            ),
        }
        if self.kl in token_terms:
            rows = rows + self.weight * token_terms[self.kl]()
        return (rows / _norm(mask, self.norm)).mean()

    def _signal(self, batch: SampleBatch) -> Tensor:
        if self.signal == "reward":
            cut = batch.completions.mask.sum(1) == view(batch.completions, "no_end").sum(1)
            return batch.reward * cut if self.paid == "cut" else batch.reward
        pi, ref = batch.opponent_policy, batch.opponent_reference
        if self.opponent == "arithmetic":
            law = (1 - self.share) * pi.exp() + self.share * ref.exp()
        else:
            law = ((1 - float(self.opponent)) * pi + float(self.opponent) * ref).softmax(1)
        return (law * batch.preference).sum(1) - self.half


def _advantage(reward: Tensor, size: int, baseline: str) -> Tensor:
    if baseline == "none":
        return reward
    r = reward.reshape(-1, size)
    mean, others = r.mean(1, keepdim=True), (r.sum(1, keepdim=True) - r) / (size - 1)
    if baseline == "loo":
        return (r - others).reshape(-1)
    if baseline == "group":
        return (r - mean).reshape(-1)
    if baseline == "std":
        return ((r - mean) / (r.std(1, keepdim=True) + EPS_OF_GRPO)).reshape(-1)
    apart = (r[:, None, :] - others[:, :, None]) ** 2  # [., k, j]: reward j from the mean of those but k
    spread = ((apart.sum(2) - apart.diagonal(dim1=1, dim2=2)) / (size - 1)).sqrt()
    return ((r - others) / (spread + EPS_OF_LOO)).reshape(-1)


def sample_candidates(name: str, p: Mapping[str, float]) -> Iterator[Candidate]:
    if name == "kl_policy_gradient":
        base = SampleRecipe("reward", p["beta"])
    else:
        base = SampleRecipe("wins", p["tau"], opponent=p["share"], share=p["share"], half=0.5)

    def fault(
        label: str, cause: str, kind: Literal["fault", "objective"] = "fault", **parts: object
    ) -> Candidate:
        return Candidate(label, cause, kind, (replace(base, **parts),))  # type: ignore[arg-type]

    yield Candidate("right", "none: this is the named objective", "right", (base,))
    for form, cause in KL_FORMS.items():
        yield fault(f"kl_{form}", cause, "objective" if form in DISPUTED else "fault", kl=form)
    weight = "beta" if base.signal == "reward" else "tau"
    yield fault("beta_twice", f"{weight} applied twice to the KL penalty", weight=base.weight**2)
    yield fault("beta_missing", f"{weight} missing: the KL penalty has weight 1", weight=1.0)
    yield fault(
        "kl_twice", "the KL penalty counts twice: in the reward and again as a loss", weight=2 * base.weight
    )
    yield fault(
        "sign",
        "labels exchanged, or the sign of the advantage: what is preferred is pushed down",
        sign=-1.0,
        half=base.half,
    )
    yield fault(
        "token_mean",
        "each response is averaged over its tokens: the gradient of a response is divided by its length "
        "(GRPO's normalisation)",
        "objective",
        norm="mean",
    )
    yield fault(
        "batch_tokens",
        "the sum over tokens is divided by the number of tokens in the batch, so that a response's "
        "weight depends on what else is in it",
        "objective",
        norm="batch",
    )
    for tokens, cause in VIEWS.items():
        yield fault(tokens, cause, tokens=tokens)
    if base.signal == "wins":
        share = base.share
        yield fault(
            "mixture_swapped",
            "mixture weights swapped: the opponent is pi^share ref^(1 - share)",
            opponent=1 - share,
        )
        yield fault(
            "opponent_policy", "the opponent is the policy itself, not the mixture", "objective", opponent=0.0
        )
        yield fault(
            "opponent_reference", "the opponent is the reference, not the mixture", "objective", opponent=1.0
        )
        yield fault(
            "mixture_arithmetic",
            "the opponent is the arithmetic mixture, not the geometric one",
            opponent="arithmetic",
        )
        return
    yield fault(
        "group_baseline",
        "the baseline contains the response's own reward: the reward counts (K - 1)/K, the KL penalty "
        "in full",
        baseline="group",
    )
    yield fault(
        "std",
        "advantages are divided by the deviation of their group (GRPO): prompts are reweighted",
        "objective",
        baseline="std",
    )
    yield fault(
        "loo_std",
        "leave-one-out baseline with std-normalised rewards: where the others have equal rewards the "
        "deviation is 0 and the advantage explodes",
        baseline="loo_std",
    )
    yield fault(
        "paid_after_end",
        "the reward is put on the token after EOS, where the mask drops it: only responses that were "
        "cut are paid",
        paid="cut",
    )
    yield fault(
        "paid_last",
        "the reward pays the last token alone: it is not carried back to the tokens before",
        paid="last",
    )
    forms = {
        "k3_token": "k3 of tokens as a loss",
        "frozen": "a KL of tokens with the prefixes held fixed (k2 or corrected k3)",
        "k3_geometric": "k3 of tokens times a sequence-level ratio",
        "none": "no KL penalty",
    }
    norms = {"mean": "mean over its tokens", "sum": "sum", "batch": "mean over the batch's tokens"}
    for baseline, family in (
        ("std", "GRPO: deviation-normalised groups"),
        ("group", "Dr. GRPO: the group's mean"),
    ):
        for norm, title in norms.items():
            for kl, what in forms.items():
                if (baseline, norm, kl) == ("group", "sum", "none"):
                    continue  # the reward alone, up to a factor: "kl_none"
                words = f"it is {family}, {what}, each response's {title}"
                yield fault(
                    f"{baseline}_{norm}_{kl}", words, "objective", baseline=baseline, kl=kl, norm=norm
                )
    for norm, title in (
        ("mean", "averaged over its tokens"),
        ("batch", "divided by the tokens of the batch"),
    ):
        words = f"k3 of tokens as a loss, and each response {title}"
        yield fault(f"k3_{norm}", words, "objective", kl="k3_token", norm=norm)
    yield Candidate(
        "beta",
        "reward and KL with another weight than asked for",
        "fault",
        (replace(base, kl="none", baseline="none"), _kl_alone()),
    )


def _kl_alone(**parts: object) -> TrainerLoss:
    recipe = replace(SampleRecipe("reward", 1.0), **parts)  # type: ignore[arg-type]
    bare = replace(recipe, kl="none")
    return lambda batch: recipe(batch) - bare(batch)


def kl_candidates() -> Iterator[Candidate]:
    yield Candidate("right", "none: this is the named objective", "right", (_kl_alone(),))
    for form, cause in KL_FORMS.items():
        if form != "none":
            kind: Literal["fault", "objective"] = "objective" if form in DISPUTED else "fault"
            yield Candidate(f"kl_{form}", cause, kind, (_kl_alone(kl=form),))
    yield Candidate(
        "token_mean",
        "each response is averaged over its tokens: its gradient is divided by its length",
        "objective",
        (_kl_alone(norm="mean"),),
    )
    for tokens, cause in VIEWS.items():
        yield Candidate(tokens, cause, "fault", (_kl_alone(tokens=tokens),))


# ---- responses of pi_t ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquareRecipe:
    """SPPO: the mean of (log pi/anchor - eta (wins - half))^2."""

    eta: float
    half: float = 0.5
    tokens: str = "completion"
    norm: str = "sum"
    reference: Literal["previous", "given", "none", "policy"] = "previous"
    sign: float = 1.0

    def __call__(self, batch: SampleBatch) -> Tensor:
        c = batch.completions
        mask = view(c, self.tokens)
        anchor = {
            "previous": c.previous,
            "given": c.reference,
            "none": c.reference * 0,
            "policy": c.policy.detach(),
        }[self.reference]
        ratio = ((c.policy - anchor) * mask).sum(1) / _norm(mask, self.norm)
        return ((ratio - self.sign * self.eta * (batch.wins - self.half)) ** 2).mean()


def sppo_candidates(p: Mapping[str, float]) -> Iterator[Candidate]:
    base = SquareRecipe(p["eta"])

    def fault(label: str, cause: str, **parts: object) -> Candidate:
        return Candidate(label, cause, "fault", (replace(base, **parts),))  # type: ignore[arg-type]

    yield Candidate("right", "none: this is the named objective", "right", (base,))
    yield fault(
        "half_missing",
        "1/2 is missing: the target is eta P(y > pi_t), which no normalised policy can meet",
        half=0.0,
    )
    yield fault(
        "token_mean", "log-probabilities are averaged over tokens, where the objective sums them", norm="mean"
    )
    yield fault(
        "batch_tokens",
        "log-probabilities are divided by the mean number of tokens in the batch",
        norm="batch",
    )
    yield fault("constant_length", "log-probabilities are divided by a constant length", norm="constant")
    for tokens, cause in VIEWS.items():
        yield fault(tokens, cause, tokens=tokens)
    yield fault(
        "reference_is_base", "the anchor is the reference, where it is pi_t of this round", reference="given"
    )
    yield fault(
        "no_reference",
        "reference missing: the loss sees the policy's log-probabilities alone",
        reference="none",
    )
    yield fault("reference_is_policy", "reference equals policy: adapter still on", reference="policy")
    yield fault("labels_exchanged", "labels exchanged: the winner is pushed down", sign=-1.0)
    yield fault("target_doubled", "the target is twice what it should be", eta=2 * base.eta)
    yield fault("target_halved", "the target is half of what it should be", eta=base.eta / 2)


def candidates(name: str, parameters: Mapping[str, float]) -> list[Candidate]:
    """All that a trainer held to the target may be found to descend; the right objective first."""
    if name in ("kl_policy_gradient", "nash_md_pg"):
        return list(sample_candidates(name, parameters))
    if name == "kl":
        return list(kl_candidates())
    if name == "sppo":
        return list(sppo_candidates(parameters))
    return list(pair_candidates(name, parameters))


# ---- another strength than asked for -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Losses with one number left open, `asked` in the target: what is said where another one agrees."""

    name: str
    cause: str
    asked: float
    member: Callable[[float], TrainerLoss]


def families(name: str, p: Mapping[str, float]) -> Iterator[Family]:
    """For comparisons and SPPO; the weight of a KL penalty is found by a candidate of two terms."""
    if name == "sppo":
        yield Family("eta_other", "eta is in effect", p["eta"], lambda x: SquareRecipe(x))
    if name not in ("dpo", "ipo", "inpo", "rpo", "vpo", "xpo"):
        return
    base, eps = _pair_target(name, p), p.get("label_smoothing", 0.0)
    asked = base.target if base.shape == "square" else base.scale
    what = "the margin's target is in effect" if base.shape == "square" else "beta is in effect"

    def member(x: float, norm: str) -> TrainerLoss:
        if base.shape == "square":
            return replace(base, target=x, norm=norm)
        strength = x / base.scale
        return _smoothed(
            replace(
                base,
                scale=x,
                norm=norm,
                imitation=base.imitation * strength,
                calibration=base.calibration * strength,
            ),
            eps,
        )

    yield Family("beta_other", what, asked, lambda x: member(x, "sum"))
    averaged = f"log-probabilities are averaged over tokens, and {what}"
    yield Family("token_mean_beta_other", averaged, asked, lambda x: member(x, "mean"))
