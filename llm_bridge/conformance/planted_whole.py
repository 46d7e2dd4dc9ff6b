"""Known bugs of whole trainers, planted in the package's own policies, each with the cause that must be named first.

A bug is a small subclass that does, in the code path of `ours_whole`, what trainers have been seen to do. None uses the
parts that the catalogues of `laws` and `scores` are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..mixture import TokenMixture, sample_sequence_mixture
from ..policy import Batch, TransformerPolicy, _ModelDecoder, adapter_off, encode, inverse_cdf
from .models import ModelWorld
from .ours_whole import PolicyTrainer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PlantedWhole:
    """A faulty trainer: make(world) builds it; at `level` its first cause must be `cause`."""

    name: str
    level: int
    cause: str
    make: Callable[[ModelWorld], Any]
    thread: str


def planter(found: dict[str, PlantedWhole]) -> Callable[..., Callable[[type], type]]:
    """A decorator of trainers, which are put into `found` under their names."""

    def plant(level: int, cause: str, thread: str = "") -> Callable[[type], type]:
        def keep(made: type) -> type:
            words = "".join(f"_{c.lower()}" if c.isupper() else c for c in made.__name__).strip("_")
            found[words] = PlantedWhole(words, level, cause, made, thread)
            return made

        return keep

    return plant


_FOUND: dict[str, PlantedWhole] = {}
_plant = planter(_FOUND)


class _One(PolicyTrainer):
    """One role, and nothing but what is broken."""

    roles: ClassVar[tuple[str, ...]] = ("policy",)
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    rewards: Any = None

    def sample(  # type: ignore[override]
        self, prompts: Any, horizon: int, seed: int, role: str, cached: bool = True
    ) -> Any:
        return super().sample(prompts, horizon, seed, role, cached)

    def log_probabilities(  # type: ignore[override]
        self, prompts: Any, completions: Any, role: str, side: Any = "left"
    ) -> Any:
        return super().log_probabilities(prompts, completions, role, side)


class _Draws(_One):
    log_probabilities: Any = None


class _Scores(_One):
    sample: Any = None

    def tokens(self, prompts: Any, completions: Any, role: str = "policy") -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            return self.law(role).token_log_probabilities(prompts, completions)


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


# ---- sampling: another law of the next token -------------------------------------------------------------------------


@_plant(2, "temperature", "huggingface/trl 4159")
class DrawsColder(_Draws):
    def law(self, role: str) -> Any:
        return replace(self.policy, temperature=0.8)


@_plant(2, "temperature")
class DrawsAtTemperatureTwice(_Draws):
    """The logits are divided by the temperature by the trainer, and by the engine again."""

    temperature = 0.8

    def law(self, role: str) -> Any:
        return replace(self.policy, temperature=0.8 * 0.8)


@_plant(2, "sampling_ignored")
class DrawsWithoutTheTemperature(_Draws):
    temperature = 0.6

    def law(self, role: str) -> Any:
        return replace(self.policy, temperature=1.0)


@_plant(2, "top_k")
class DrawsTopK(_Draws):
    """An engine's default."""

    def law(self, role: str) -> Any:
        return replace(self.policy, top_k=2)


@_plant(2, "top_p", "huggingface/trl 6789")
class DrawsTopP(_Draws):
    def law(self, role: str) -> Any:
        return replace(self.policy, top_p=0.8)


@_plant(2, "greedy")
class DrawsTheLikeliest(_Draws):
    def law(self, role: str) -> Any:
        return replace(self.policy, top_k=1)


# ---- sampling: the wrong model, or mixture ---------------------------------------------------------------------------


class _Mixes(_Draws):
    roles: ClassVar[tuple[str, ...]] = ("mixture",)


@_plant(2, "mixture_swapped")
class DrawsMixtureSwapped(_Mixes):
    def law(self, role: str) -> Any:
        return TokenMixture(self.policy, self.reference, 1 - self.share)


class _Arithmetic(TokenMixture):
    def _mix(self, policy: Tensor, reference: Tensor) -> Tensor:
        return ((1 - self.share) * policy.exp() + self.share * reference.exp()).log()


@_plant(2, "mixture_arithmetic")
class DrawsMixtureArithmetic(_Mixes):
    def law(self, role: str) -> Any:
        return _Arithmetic(self.policy, self.reference, self.share)


@_plant(2, "mixture_sequence")
class DrawsMixtureOfSequences(_Mixes):
    share = 0.5

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        return sample_sequence_mixture(
            self.policy, self.reference, self.share, prompts, horizon, _generator(seed), proposals=16
        )[0]


@_plant(2, "mixture_policy")
class DrawsMixtureWithItself(_Mixes):
    """The reference's logits come from the model with its adapter still on."""

    def law(self, role: str) -> Any:
        return TokenMixture(self.policy, self.policy, self.share)


@_plant(2, "mixture_share")
class DrawsMixtureOfAnotherShare(_Mixes):
    def law(self, role: str) -> Any:
        return TokenMixture(self.policy, self.reference, 0.5)


@_plant(2, "reference_is_policy", "huggingface/trl 2423")
class DrawsReferenceWithTheAdapterOn(_Draws):
    roles: ClassVar[tuple[str, ...]] = ("policy", "reference")

    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.reference = self.of(world.adapter())  # nobody disables the adapter


@_plant(2, "policy_is_reference")
class DrawsPolicyWithTheAdapterOff(_Draws):
    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.reference = adapter_off(self.of(world.adapter()))


# ---- sampling: padding, positions, cache, rows -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Misread(TransformerPolicy):
    """Positions and masks that are not those of the text."""

    fault: str = ""

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, **more: Any) -> Any:
        import torch

        n, total = ids.shape[1], mask.shape[1]
        row = torch.arange(total, device=ids.device).expand(len(ids), -1)[:, total - n :]
        if "positions" in self.fault:
            positions = row
        if "mask" in self.fault:
            mask = torch.ones_like(mask)
        if "id" in self.fault and n == total:
            mask = ids.ne(self.pad_id or 0).long()
            mask[:, -1] = 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        return super().logits(ids, mask, positions, **more)


def _misread(policy: TransformerPolicy, fault: str) -> _Misread:
    return _Misread(
        policy.model,
        end_ids=policy.end_ids,
        pad_id=policy.pad_id,
        vocabulary=policy.vocabulary,
        context=policy.context,
        micro_batch=policy.micro_batch,
        fault=fault,
    )


@_plant(2, "positions", "huggingface/trl 469")
class DrawsAtPositionsOfTheRow(_Draws):
    def law(self, role: str) -> Any:
        return _misread(self.policy, "positions")


@_plant(2, "padding_read", "OpenRLHF/OpenRLHF 217")
class DrawsWithoutMask(_Draws):
    def law(self, role: str) -> Any:
        return _misread(self.policy, "mask, positions")


@_plant(2, "right_padding")
class DrawsFromPromptsPaddedRight(_Draws):
    """The first token is drawn from the logits at the row's end, which is padding."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        import torch

        u = torch.rand(len(prompts), horizon, dtype=torch.float64, generator=_generator(seed))
        batch = encode(prompts, [[]] * len(prompts), self.world.pad, "right")
        ids, mask, drawn = batch.ids, batch.mask, []
        with torch.no_grad():
            for t in range(horizon):
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                logits, _ = self.policy.logits(ids, mask, positions, keep=1)
                token = inverse_cdf(self.policy.law(logits[:, 0]), u[:, t])
                drawn.append(token)
                ids = torch.cat([ids, token[:, None]], 1)
                mask = torch.cat([mask, torch.ones_like(token[:, None])], 1)
        return [_until_end(row, self.world.end) for row in torch.stack(drawn, 1).tolist()]


def _until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


class _StaleDecoder(_ModelDecoder):
    """The cache of the prompt serves every token: what was drawn meanwhile is not in it."""

    def advance(self, tokens: Tensor) -> None:
        import copy

        import torch

        first = self.__dict__.setdefault("_of_the_prompt", copy.deepcopy(self._cache))
        self._cache = copy.deepcopy(first)
        n = self.__dict__.setdefault("_width", self._ids.shape[1])
        self._mask = torch.cat([self._mask[:, :n], torch.ones_like(self._mask[:, :1])], 1)
        self._read(tokens[:, None])


class _Stale(TransformerPolicy):
    def decoder(self, prompts: Any, cached: bool | None = None) -> Any:
        return _StaleDecoder(self, prompts, True)


@_plant(2, "cache_stale")
class DrawsFromAStaleCache(_Draws):
    def of(self, model: Any) -> TransformerPolicy:
        policy = super().of(model)
        return _Stale(
            policy.model,
            end_ids=policy.end_ids,
            pad_id=policy.pad_id,
            vocabulary=policy.vocabulary,
            context=policy.context,
            micro_batch=policy.micro_batch,
        )


@_plant(2, "prompts_exchanged")
class DrawsInTheOrderOfLengths(_Draws):
    """Sorted by length to save padding, and never put back."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        found = list(super().sample(prompts, horizon, seed, role))
        P = len(self.world.prompts)
        order = sorted(range(P), key=lambda i: len(self.world.prompts[i]))
        return [found[k - k % P + order[k % P]] for k in range(len(found))]


@_plant(2, "mask_by_id", "huggingface/trl 6357")
class DrawsWithAMaskOfIds(_Draws):
    """attention_mask = ids != pad, and pad is the end token."""

    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        bare = _misread(self.policy, "id")
        return bare.sample(prompts, horizon, _generator(seed), cached=False).completions


# ---- sampling: ends and shapes ---------------------------------------------------------------------------------------


@_plant(2, "end_never", "huggingface/trl 3091")
class DrawsNoEnd(_Draws):
    """A list of bad words that holds the end token."""

    def of(self, model: Any) -> TransformerPolicy:
        end = self.world.end

        class Banned(TransformerPolicy):
            def law(self, logits: Tensor) -> Tensor:
                import torch

                barred = torch.zeros_like(logits, dtype=torch.bool)
                barred[..., end] = True
                return super().law(logits.masked_fill(barred, -torch.inf))

        policy = super().of(model)
        names = ("end_ids", "pad_id", "vocabulary", "context", "micro_batch")
        return Banned(policy.model, **{name: getattr(policy, name) for name in names})


@_plant(2, "cut_early")
class DrawsWithALengthThatCountsThePrompt(_Draws):
    """max_length where max_new_tokens is meant."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        found = super().sample(prompts, horizon, seed, role)
        most = horizon + min(map(len, prompts))
        return [y[: max(1, most - len(x))] for x, y in zip(prompts, found, strict=True)]


@_plant(2, "end_dropped", "huggingface/trl 6357")
class DrawsAndStripsTheEnd(_Draws):
    """Padding is stripped from the completion, and pad is the end token."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        found = super().sample(prompts, horizon, seed, role)
        return [[t for t in y if t != self.world.pad] for y in found]


@_plant(2, "after_end")
class DrawsBeyondTheEnd(_Draws):
    """Rows are returned at the width of the batch, with what was drawn after the end."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        found = super().sample(prompts, horizon, seed, role)
        return [[*y, *[self.world.pad] * (horizon - len(y))] for y in found]


@_plant(2, "another_end")
class DrawsUntilAnotherToken(_Draws):
    """The end token of another tokenizer."""

    def of(self, model: Any) -> TransformerPolicy:
        return replace(super().of(model), end_ids=[self.world.end, 0])


# ---- sampling: random numbers ----------------------------------------------------------------------------------------


@_plant(2, "shared_noise")
class DrawsNeighboursFromOneNoise(_Draws):
    """A generator that is seeded anew for each few rows."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        import torch

        P = len(self.world.prompts)
        u = torch.rand(len(prompts) // P, horizon, dtype=torch.float64, generator=_generator(seed))
        return self.policy.sample(prompts, horizon, uniforms=u.repeat_interleave(P, 0)).completions


@_plant(2, "shared_noise")
class DrawsTheSecondHalfLikeTheFirst(_Draws):
    """Two data-parallel workers with one seed."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        half = len(prompts) // 2
        first = super().sample(prompts[:half], horizon, seed, role)
        return [*first, *super().sample(prompts[half:], horizon, seed, role)]


@_plant(2, "seed_ignored")
class DrawsFromAFixedSeed(_Draws):
    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        return super().sample(prompts, horizon, 42, role)


# ---- scores ----------------------------------------------------------------------------------------------------------


@_plant(3, "token_mean", "huggingface/trl 1677")
class ScoresByTheMean(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        values, mask = self.tokens(prompts, completions)
        return values.sum(1) / mask.sum(1)


@_plant(3, "no_end", "huggingface/trl 6357")
class ScoresWithAMaskOfIds(_Scores):
    """Loss mask = ids != pad, and pad is the end token."""

    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        import torch

        values, mask = self.tokens(prompts, completions)
        ids = torch.full(mask.shape, self.world.pad)
        for i, y in enumerate(completions):
            ids[i, : len(y)] = torch.tensor(y)
        return (values * (ids != self.world.pad)).sum(1)


class _Whole(_Scores):
    """Scores from the logits of whole rows, padded on the right, as many trainers make them."""

    def rows(self, prompts: Any, completions: Any) -> tuple[Tensor, Batch]:
        import torch

        batch = encode(prompts, completions, self.world.pad)
        with torch.no_grad():
            logits, _ = self.policy.logits(batch.ids, batch.mask, batch.positions)
        return logits.log_softmax(-1), batch


@_plant(3, "prompt")
class ScoresThePrompt(_Whole):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        logps, batch = self.rows(prompts, completions)
        tokens = logps[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
        return (tokens * batch.mask[:, 1:]).sum(1)


@_plant(3, "unshifted")
class ScoresByTheLogitsOfTheTokenItself(_Whole):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        logps, batch = self.rows(prompts, completions)
        return (logps.gather(2, batch.ids[..., None])[..., 0] * batch.scored).sum(1)


@_plant(3, "no_first")
class ScoresAllButTheFirst(_Whole):
    """The mask is shifted once more than the labels."""

    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        logps, batch = self.rows(prompts, completions)
        tokens = logps[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
        return (tokens * batch.scored[:, :-1] * batch.scored[:, 1:]).sum(1)


@_plant(3, "temperature_missing", "huggingface/trl 4159")
class ScoresWithoutTheTemperature(_Scores):
    temperature = 0.7

    def law(self, role: str) -> Any:
        return replace(self.policy, temperature=1.0)


@_plant(3, "temperature_divided", "PrimeIntellect-ai/prime-rl 697")
class ScoresDividedByTheTemperature(_Scores):
    temperature = 0.7

    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        plain = replace(self.policy, temperature=1.0)
        return plain.log_probabilities(prompts, completions).detach() / self.temperature


@_plant(3, "not_renormalised", "huggingface/trl 6789")
class ScoresBeforeTheTruncation(_Scores):
    top_k = 2

    def law(self, role: str) -> Any:
        return replace(self.policy, top_k=None)


@_plant(3, "positions", "NVIDIA/NeMo-Aligner 68")
class ScoresAtPositionsOfTheRow(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        return _misread(self.policy, "positions").log_probabilities(prompts, completions, "left").detach()


@_plant(3, "padding_read", "huggingface/trl 469")
class ScoresWithoutMask(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        return _misread(self.policy, "mask").log_probabilities(prompts, completions, "left").detach()


@_plant(3, "mask_by_id")
class ScoresWithEndsHidden(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        return _misread(self.policy, "id").log_probabilities(prompts, completions, "right").detach()


@_plant(3, "dropout", "huggingface/trl 3234")
class ScoresWithDropoutOn(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        batch = encode(prompts, completions, self.world.pad)
        logits = self.policy.model(batch.ids, batch.mask, batch.positions).logits.detach()
        tokens = logits.log_softmax(-1)[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
        return (tokens * batch.scored[:, 1:]).sum(1)


@_plant(3, "low_precision", "NVIDIA/NeMo-Aligner 227")
class ScoresInBfloat16(_Scores):
    def __init__(self, world: ModelWorld) -> None:
        import torch

        self.world = world
        self.policy = self.of(world.model("policy").to(torch.bfloat16))


class _Referred(_Scores):
    roles: ClassVar[tuple[str, ...]] = ("reference",)


@_plant(3, "reference_is_policy", "huggingface/trl 2423")
class ScoresReferenceWithTheAdapterOn(_Referred):
    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.reference = self.of(world.adapter())


@_plant(3, "reference_is_base", "huggingface/trl 4723")
class ScoresReferenceWithoutTheTrainedAdapter(_Referred):
    """Training goes on from an adapter, and the reference is the model without any."""

    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.of(world.adapter("base"))
        self.reference = adapter_off(self.policy)


@_plant(3, "precomputed_ignored", "huggingface/trl 1962")
class ScoresReferenceLiveAllTheSame(_Referred):
    def log_probabilities(  # type: ignore[override]
        self, prompts: Any, completions: Any, role: str, given: Any = None
    ) -> Any:
        return super().log_probabilities(prompts, completions, role)


@_plant(3, "merge", "huggingface/trl 2209")
class ScoresTheTextTokenisedAgain(_Scores):
    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        world, found = self.world, []
        for x, y in zip(prompts, completions, strict=True):
            start = len(world.encode(world.decode(x)))
            ids = world.encode(world.decode(x) + world.decode(y))
            rest = ids[start:]
            found.append(self.policy.log_probabilities([ids[:start]], [rest]).item() if rest else 0.0)
        return found


@_plant(3, "mixture_unnormalised")
class ScoresMixtureBySums(_Scores):
    """(1 - share) log pi + share log ref, without its normaliser."""

    roles: ClassVar[tuple[str, ...]] = ("mixture",)

    def log_probabilities(self, prompts: Any, completions: Any, role: str) -> Any:  # type: ignore[override]
        pi, ref = (p.log_probabilities(prompts, completions).detach() for p in (self.policy, self.reference))
        return (1 - self.share) * pi + self.share * ref


# ---- rewards ---------------------------------------------------------------------------------------------------------


class _Rewards:
    def __init__(self, world: ModelWorld) -> None:
        self.world = world

    def read(self, prompts: Any, completions: Any, scores: Any) -> tuple[Tensor, Batch]:
        batch = encode(prompts, completions, self.world.pad)
        return scores(batch.ids, batch.mask), batch

    def unended(self, completions: Any) -> Tensor:
        import torch

        return torch.tensor([self.world.end not in y for y in completions])


@_plant(3, "penalty_of_the_row", "huggingface/trl 6802")
class RewardsPenaltyOfTheRow(_Rewards):
    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        values, batch = self.read(prompts, completions, scores)
        last = values.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
        missing = ~((batch.ids == self.world.end) & batch.mask.bool()).any(1)
        return last - penalty * missing


@_plant(3, "first_end", "huggingface/trl 6952")
class RewardsAtTheFirstEnd(_Rewards):
    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        values, batch = self.read(prompts, completions, scores)
        end = batch.ids == self.world.pad
        length = end.int().argmax(1).where(end.any(1), batch.ids.new_tensor(batch.ids.shape[1] - 1))
        return values.gather(1, length[:, None])[:, 0] - penalty * self.unended(completions)


@_plant(3, "after_end", "huggingface/trl 3750")
class RewardsAfterTheEnd(_Rewards):
    """The reward stands on the token after the end; the sum over the mask does not see it."""

    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        import torch

        values, batch = self.read(prompts, completions, scores)
        last = batch.mask.sum(1) - 1
        paid = torch.zeros(len(values), values.shape[1] + 1, dtype=values.dtype)
        at = torch.where(self.unended(completions), last, last + 1)
        paid.scatter_(1, at[:, None], values.gather(1, last[:, None]))
        inside = torch.nn.functional.pad(batch.mask, (0, 1)).bool()
        return (paid * inside).sum(1) - penalty * self.unended(completions)


@_plant(3, "token_sum", "CarperAI/trlx 308")
class RewardsOfEveryToken(_Rewards):
    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        values, batch = self.read(prompts, completions, scores)
        return (values * batch.scored).sum(1) - penalty * self.unended(completions)


@_plant(3, "last_position", "deepspeedai/DeepSpeedExamples 316")
class RewardsAtTheLastPosition(_Rewards):
    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        values, _ = self.read(prompts, completions, scores)
        return values[:, -1] - penalty * self.unended(completions)


@_plant(3, "penalty_missing", "huggingface/trl 6805")
class RewardsWithoutPenalty(_Rewards):
    """The end token is looked for in a row whose padding is the end token."""

    def rewards(self, prompts: Any, completions: Any, scores: Any, penalty: float) -> Any:
        import torch

        values, batch = self.read(prompts, completions, scores)
        last = values.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
        padded = torch.nn.functional.pad(batch.ids, (0, 1), value=self.world.pad)
        return last - penalty * ~(padded == self.world.end).any(1)


PLANTED_WHOLE: Mapping[str, PlantedWhole] = MappingProxyType(_FOUND)
