"""Whole trainers: what a maintainer writes so that a trainer's own sampling, scoring and training can be looked at.

An adapter is a class (or a function) that is given a `ModelWorld` and has any of the methods below, all in token ids. A
method is asked for an option only if its signature names it; `options` has each one's values, the usual one first.

    class Mine:
        roles = ("policy", "reference")
        options = {"cached": (True, False), "side": ("left", "right")}

        def __init__(self, world):
            self.trainer = MyTrainer(world.model("policy"), world.model("reference"), pad=world.pad, end=world.end)

        def sample(self, prompts, horizon, seed, role, cached):
            return self.trainer.generate(prompts, max_new_tokens=horizon, seed=seed, model=role, use_cache=cached)

        def log_probabilities(self, prompts, completions, role, side):
            return self.trainer.score(prompts, completions, model=role, padding_side=side)

`conform_trainer(Mine)` says what is checked.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ...envs.kernels import Array
from ..policy import Tokens
from .conform import TrainerError
from .models import ModelWorld, Sampling, mix

if TYPE_CHECKING:
    from .runs import Task

METHODS = ("log_probabilities", "sample", "rewards", "train")


class WholeTrainer(Protocol):
    """Every attribute and method may be left out; without any method there is nothing to check.

    roles        of "policy", "reference", "mixture": whose laws the trainer has
    drawn, scored   which of them it samples, and of which it has log-probabilities; all, where nothing is said
    share        of the reference in the mixture;  mixture  "token" or "sequence": how it mixes
    temperature, top_k, top_p   of the law that it means to sample, and to score
    options      name -> values, the usual one first
    against      the objective that `train` descends, one of `runs.OBJECTIVES`;  parameters  of it
    exact        names of options that must not change a bit of the outcome of `train`

    log_probabilities   log pi(y|x): (n,), or (n, T) by token with zeros after the last. With `given` in its signature,
                        (n,) numbers for the reference that were computed beforehand and must be used
    sample              one completion a prompt, a list of token ids: ended by the end token, which it contains, or cut
                        after `horizon` tokens. What is drawn depends on the seed
    rewards             (n,) what a trainer makes of a reward model `scores(ids, mask) -> (n, L)`: the score at the last
                        token of the completion, less `penalty` where there is no end token
    train               from the world's policy, on a task; afterwards `log_probabilities` is of the trained policy
    """

    def log_probabilities(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str
    ) -> Any: ...

    def sample(self, prompts: Sequence[Tokens], horizon: int, seed: int, role: str) -> Sequence[Tokens]: ...

    def rewards(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        scores: Callable[..., Any],
        penalty: float,
    ) -> Any: ...

    def train(self, task: Task, seed: int) -> None: ...


@dataclass(frozen=True)
class Declared:
    """What an adapter says of itself."""

    roles: tuple[str, ...]
    sampling: Sampling
    share: float
    mixture: Literal["token", "sequence"]
    options: Mapping[str, tuple[Any, ...]]
    drawn: tuple[str, ...]
    scored: tuple[str, ...]


def declared(trainer: Any) -> Declared:
    roles = tuple(getattr(trainer, "roles", ("policy",)))
    unknown = [r for r in roles if r not in ("policy", "reference", "mixture")]
    if unknown:
        raise ValueError(f"the trainer has the role {unknown[0]!r}; roles are policy, reference and mixture")
    share, how = getattr(trainer, "share", None), str(getattr(trainer, "mixture", "token"))
    if "mixture" in roles and (share is None or not 0 < share < 1):
        raise ValueError(f"the trainer's share is {share}; a mixture needs the reference's weight, in (0, 1)")
    if how not in ("token", "sequence"):
        raise ValueError(f"the trainer's mixture is {how!r}; it is 'token' or 'sequence'")
    sampling = Sampling(
        float(getattr(trainer, "temperature", 1.0)),
        getattr(trainer, "top_k", None),
        getattr(trainer, "top_p", None),
    )
    options = {name: tuple(values) for name, values in getattr(trainer, "options", {}).items()}
    empty = [name for name, values in options.items() if not values]
    if empty:
        raise ValueError(f"the trainer's option {empty[0]!r} has no values")
    mixes: Literal["token", "sequence"] = "sequence" if how == "sequence" else "token"
    drawn, scored = (tuple(getattr(trainer, name, roles)) for name in ("drawn", "scored"))
    beyond = sorted({*drawn, *scored} - set(roles))
    if beyond:
        raise ValueError(
            f"the trainer draws or scores {beyond[0]!r}, which is none of its roles {', '.join(roles)}"
        )
    return Declared(roles, sampling, float(share or 0.0), mixes, options, drawn, scored)


def methods(trainer: Any) -> list[str]:
    return [name for name in METHODS if callable(getattr(trainer, name, None))]


def is_whole(found: Any) -> bool:
    """Whether an object is an adapter of a whole trainer, rather than a loss."""
    if inspect.isclass(found) or not callable(found):
        return bool(methods(found))
    try:
        names = list(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return False
    return names[:1] == ["world"]


def variants(trainer: Any, method: str, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Options to call a method with: the usual ones, then each other value of each option alone."""
    takes = inspect.signature(getattr(trainer, method)).parameters
    options = {n: v for n, v in declared(trainer).options.items() if n in takes}
    usual = {name: values[0] for name, values in options.items()}
    others = [
        {**usual, name: value}
        for name, values in options.items()
        if names is None or name in names
        for value in values[1:]
    ]
    return [usual, *others]


def words_of(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


# ---- calls -----------------------------------------------------------------------------------------------------------


def make_trainer(make: Callable[[ModelWorld], Any], world: ModelWorld) -> Any:
    trainer = _called("constructor", make, world) if callable(make) else make
    if not methods(trainer):
        raise TrainerError(
            f"the adapter has none of the methods {', '.join(METHODS)}: there is nothing that could be looked at"
        )
    return trainer


def _called(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except Exception as error:
        raise TrainerError(f"the trainer's {what} raised {type(error).__name__}: {error}") from error


def scored(
    trainer: Any, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str, **options: Any
) -> Array:
    """log pi(y|x), (n,) float64, by the trainer."""
    found = _called(
        "log_probabilities", trainer.log_probabilities, prompts, completions, role=role, **options
    )
    values = _numbers(found)
    if values.ndim == 2 and len(values) == len(prompts):
        values = values.sum(1)
    if values.shape != (len(prompts),):
        raise TrainerError(
            f"the trainer's log_probabilities gave {values.shape} for {len(prompts)} completions; "
            "expected (n,) or (n, T)"
        )
    return values


def rewarded(trainer: Any, prompts: Any, completions: Any, scores: Any, penalty: float) -> Array:
    values = _numbers(
        _called("rewards", trainer.rewards, prompts, completions, scores=scores, penalty=penalty)
    )
    if values.shape != (len(prompts),):
        raise TrainerError(
            f"the trainer's rewards gave {values.shape} for {len(prompts)} completions; expected (n,)"
        )
    return values


def sampled(
    trainer: Any, prompts: Sequence[Tokens], horizon: int, seed: int, role: str, **options: Any
) -> list[tuple[int, ...]]:
    found = _called("sample", trainer.sample, prompts, horizon=horizon, seed=seed, role=role, **options)
    try:
        drawn = [tuple(int(t) for t in y) for y in found]
    except (TypeError, ValueError) as error:
        raise TrainerError("the trainer's sample must give a list of token ids for each prompt") from error
    if len(drawn) != len(prompts):
        raise TrainerError(f"the trainer's sample gave {len(drawn)} completions for {len(prompts)} prompts")
    return drawn


def trained(trainer: Any, task: Task, seed: int, **options: Any) -> None:
    _called("train", trainer.train, task, seed=seed, **options)


def _numbers(found: Any) -> Array:
    values = found.detach().cpu().double().numpy() if hasattr(found, "detach") else found
    return np.asarray(values, dtype=np.float64)


# ---- what is right ---------------------------------------------------------------------------------------------------


def right_laws(world: ModelWorld, said: Declared, role: str) -> Array:
    """log of the next token's law (prompts, prefixes, V); of a mixture of sequences there is none, see `right_law`."""
    if role != "mixture":
        return world.laws(role, said.sampling)
    return said.sampling.law(mix(world.laws("policy"), world.laws("reference"), said.share))


def right_law(world: ModelWorld, said: Declared, role: str) -> Array:
    """log pi(y|x) of all completions, (prompts, C)."""
    if role == "mixture" and said.mixture == "sequence":
        return mix(world.law("policy"), world.law("reference"), said.share)
    return world.law_of(right_laws(world, said, role))


def grid(world: ModelWorld) -> list[tuple[int, int]]:
    """Every (prompt, completion), in batches of one row a prompt with completions of unlike length."""
    P, C = len(world.prompts), len(world.completions)
    step = next(s for s in itertools.count(C // P + 1) if np.gcd(s, C) == 1)
    return [(i, (j + i * step) % C) for j in range(C) for i in range(P)]
