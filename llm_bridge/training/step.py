"""The second half of a round: one gradient step on a batch of rows.

The loss of a batch is sum_i weight_i loss_i with the weights of the whole batch, so that micro-batches and processes
add up to it, whatever they hold. Before the weights move, the loss and the gradient are seen to be finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.nash_md_pg import ema
from ...envs.kernels import Array
from .collect import score
from .methods import Columns
from .rows import Rows
from .setup import Setup, full

if TYPE_CHECKING:
    from torch import Tensor


class TrainingStopped(ArithmeticError):
    """Something was not finite. The weights are those of the last step that was; a folder holds the last checkpoint."""


@dataclass(frozen=True)
class Gradient:
    """loss of the whole batch; norm of its gradient, before it was shortened. The gradient lies in the parameters."""

    loss: float
    norm: float


def micro_batches(setup: Setup, rows: Rows, weight: Array) -> Iterator[tuple[Rows, Array]]:
    """This process's share of a batch in pieces. All processes have equally many; what is missing has weight 0."""
    own = np.asarray(setup.block(len(rows)), dtype=np.int64)
    share = -(-len(rows) // setup.accelerator.num_processes)
    size = min(setup.settings.micro_batch or share, share)
    for first in range(0, share, size):
        at = own[first : first + size]
        yield (rows.take(at), weight[at]) if len(at) else (rows.take(np.array([0])), np.zeros(1))


def columns_of(setup: Setup, rows: Rows, weight: Array) -> Columns:
    """One forward pass over the scored responses of the rows."""
    import torch

    R, n = setup.method.scored, len(rows)
    scored = rows.responses[:R]
    policy = replace(setup.trained, micro_batch=R * n)
    log_pi = policy.log_probabilities([*rows.prompts] * R, [y for column in scored for y in column])
    log_pi = log_pi.reshape(R, n).T
    numbers = rows.numbers
    if "reference" in numbers:
        reference = numbers["reference"]
    else:
        with setup.accelerator.autocast():
            reference = score(_sized(setup.reference, R * n), rows.prompts, scored)

    def given(values: Any) -> Tensor:
        return torch.as_tensor(values, device=log_pi.device).to(log_pi)

    none = np.zeros(n)
    return Columns(
        policy=log_pi,
        reference=given(reference),
        previous=given(numbers.get("previous", reference)),
        wins=given(numbers.get("wins", none)),
        reward=given(numbers.get("advantage", none)),
        weight=given(weight),
    )


def _sized(policy: Any, rows: int) -> Any:
    return (
        replace(policy, micro_batch=rows)
        if hasattr(policy, "pad_id") and hasattr(policy, "model")
        else policy
    )


def gradient(setup: Setup, rows: Rows, weight: Array | None = None, place: str = "the batch") -> Gradient:
    """Of the batch's loss in the parameters; TrainingStopped, which names `place`, where it is not finite.

    weight  (n,) of the rows; None = 1/n each, the mean
    """
    import torch

    n, accelerator, model = len(rows), setup.accelerator, setup.trained.model
    weight = np.full(n, 1 / n) if weight is None else weight
    setup.optimiser.zero_grad()
    pieces = list(micro_batches(setup, rows, weight))
    losses: list[Tensor] = []
    seen: list[tuple[Rows, Tensor]] = []
    for k, (piece, own_weight) in enumerate(pieces):
        with nullcontext() if k + 1 == len(pieces) else accelerator.no_sync(model):
            try:
                columns = columns_of(setup, piece, own_weight)
            except ValueError as error:  # logits that are not numbers; nothing has been changed
                raise TrainingStopped(f"{place}, micro-batch {k}: {error}") from error
            loss = setup.method.value(columns, setup.parameters)
            # Data-parallel training averages gradients over processes; here they add up.
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
        seen.append((piece, columns.policy.detach()))
    total = accelerator.reduce(torch.stack(losses).sum(), reduction="sum")
    gradients = [p.grad for p in setup.weights.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    found = Gradient(float(total), float(full(norm)))
    if not np.isfinite([found.loss, found.norm]).all():
        raise TrainingStopped(f"{place}: {_what(setup, found, seen)}")
    longest = setup.settings.max_grad_norm
    if longest is not None:
        torch.nn.utils.clip_grads_with_norm_(setup.weights.values(), longest, norm)
    return found


def _what(setup: Setup, found: Gradient, seen: list[tuple[Rows, Tensor]]) -> str:
    """What was not finite, in words."""
    said = f"the loss is {found.loss} and the norm of its gradient {found.norm}"
    first = 0
    for piece, log_pi in seen:
        bad = ~log_pi.isfinite().all(1)
        if bad.any():
            i = int(bad.int().argmax())
            return (
                f"{said}; row {first + i} of this process has the log-probabilities {log_pi[i].tolist()} "
                f"(prompt {[int(t) for t in piece.prompts[i]]})"
            )
        first += len(piece)
    names = [
        n for n, p in setup.weights.items() if p.grad is not None and not bool(full(p.grad).isfinite().all())
    ]
    where = f"; the gradient of {names[0]} is not finite, the log-probabilities are" if names else ""
    rows = [[int(t) for t in x] for piece, _ in seen for x in piece.prompts[:2]][:2]
    return f"{said}{where}. The batch begins with the prompts {rows}"


def update(setup: Setup, rows: Rows, step: int, place: str, average: Mapping[str, Tensor] | None) -> Gradient:
    """One step of the optimiser, and of the average of the weights where there is one."""
    import torch

    found = gradient(setup, rows, place=place)
    for group in setup.bare_optimiser.param_groups:
        group["lr"] = setup.settings.rate(step)
    setup.optimiser.step()
    if average is not None:
        with torch.no_grad():
            for name, p in setup.weights.items():
                average[name].copy_(ema(average[name], p.detach(), setup.parameters["decay"]))
    return found
