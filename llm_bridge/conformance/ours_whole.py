"""The package's own policies as whole trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ..mixture import TokenMixture
from ..policy import (
    Precomputed,
    Side,
    TokenPolicy,
    Tokens,
    TransformerPolicy,
    adapter_off,
    frozen_copy,
    precompute,
)
from .models import ModelWorld

SHARE = 0.3


class PolicyTrainer:
    """`TransformerPolicy` and `TokenMixture`, with a frozen copy of a second model as the reference."""

    roles: ClassVar[tuple[str, ...]] = ("policy", "reference", "mixture")
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "cached": (True, False),
        "side": ("right", "left"),
    }
    share = SHARE
    temperature = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.of(world.model("policy"))
        self.reference: TransformerPolicy = frozen_copy(self.of(world.model("reference")))

    def of(self, model: Any) -> TransformerPolicy:
        world = self.world
        return TransformerPolicy(
            model,
            end_ids=[world.end],
            pad_id=world.pad,
            vocabulary=world.vocabulary,
            context=world.context,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            micro_batch=1000,
        )

    def law(self, role: str) -> TokenPolicy:
        if role == "mixture":
            return TokenMixture(self.policy, self.reference, self.share)
        return self.policy if role == "policy" else self.reference

    def sample(
        self, prompts: Sequence[Tokens], horizon: int, seed: int, role: str, cached: bool
    ) -> Sequence[Tokens]:
        import torch

        law, generator = self.law(role), torch.Generator().manual_seed(seed)
        return law.sample(prompts, horizon, generator, cached and self.world.kind != "table").completions

    def log_probabilities(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        role: str,
        side: Side,
        given: Any = None,
    ) -> Any:
        import torch

        if given is not None and role == "reference":
            keys = [(tuple(x), tuple(y)) for x, y in zip(prompts, completions, strict=True)]
            known = Precomputed({key: float(value) for key, value in zip(keys, given, strict=True)})
            return known.log_probabilities(prompts, completions)
        with torch.no_grad():
            return self.law(role).log_probabilities(prompts, completions, side)

    def rewards(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        scores: Callable[..., Any],
        penalty: float,
    ) -> Any:
        import torch

        from ..policy import encode

        batch = encode(prompts, completions, self.world.pad)
        last = batch.mask.sum(1) - 1
        read = scores(batch.ids, batch.mask).gather(1, last[:, None])[:, 0]
        ended = torch.tensor([y[-1] == self.world.end for y in completions])
        return read - penalty * ~ended


class AdapterTrainer(PolicyTrainer):
    """One model: the reference is the policy with its adapter off."""

    def __init__(self, world: ModelWorld) -> None:
        self.world = world
        self.policy = self.of(world.adapter())
        self.reference = adapter_off(self.policy)


class PrecomputedTrainer(PolicyTrainer):
    """The reference is a table of numbers: it scores, and draws nothing."""

    roles: ClassVar[tuple[str, ...]] = ("reference",)
    sample: Any = None
    rewards: Any = None

    def __init__(self, world: ModelWorld) -> None:
        super().__init__(world)
        every = [(x, y) for x in world.prompts for y in world.completions]
        self.table = precompute(self.reference, [x for x, _ in every], [y for _, y in every])

    def log_probabilities(  # type: ignore[override]
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str
    ) -> Any:
        return self.table.log_probabilities(prompts, completions)


class SampledLaw(PolicyTrainer):
    """Temperature and truncation, declared: samples and scores are of one law."""

    roles: ClassVar[tuple[str, ...]] = ("policy",)
    temperature = 0.7
    top_k = 3
    top_p = 0.9


WHOLE: Mapping[str, type] = {
    "policy": PolicyTrainer,
    "adapter": AdapterTrainer,
    "precomputed": PrecomputedTrainer,
    "truncated": SampledLaw,
}
