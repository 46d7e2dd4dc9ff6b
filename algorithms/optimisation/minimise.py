r"""Minimise a differentiable function of a flat vector until its gradient says so.

L-BFGS (scipy) brings the gradient down as far as differences of the function's values can be seen, which is about the
root of the rounding error. From there Newton's method goes on with gradients alone: each step solves H s = -g by MINRES
on Hessian-vector products, which needs no regular H (softmax tables have flat directions, along which g is 0), and is
halved until |g| falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...envs.comparison_graph import check_connected
from ...envs.kernels import Array
from .pairs import Pairs, gather
from .tables import SoftmaxTable, Table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Minimum:
    """theta (n,); value = f(theta); gradient = max |df/dtheta|, the certificate; iterations of both methods."""

    theta: Tensor
    value: float
    gradient: float
    iterations: int


def minimise(
    f: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
    newton_steps: int = 40,
) -> Minimum:
    """A stationary point of f near `start`, with max |gradient| <= tolerance; ArithmeticError where it is not reached.

    For convex f, and for a convex f of the log-probabilities of a softmax table or a prefix tree (which reach every
    law), a stationary point is a global minimiser. Where the infimum is not attained (a preference that is certain),
    the point is where the gradient fell below the tolerance.
    """
    import torch
    from scipy.optimize import minimize

    def value_and_gradient(x: Array) -> tuple[float, Array]:
        theta = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = f(theta)
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy()

    x = start.detach().numpy().astype(np.float64)
    options = {
        "maxiter": max_iterations,
        "maxfun": 2 * max_iterations,
        "maxcor": 30,
        "ftol": 0.0,
        "gtol": tolerance,
    }
    found = minimize(value_and_gradient, x, jac=True, method="L-BFGS-B", options=options)
    x, value, g = found.x, float(found.fun), np.asarray(found.jac)
    iterations = int(found.nit)
    for _ in range(newton_steps):
        if not np.abs(g).max() > tolerance:
            break
        step = _newton_direction(f, x, g)
        length = 1.0
        while True:
            trial, new = value_and_gradient(x + length * step)
            if np.linalg.norm(new) < (1 - 1e-4 * length) * np.linalg.norm(g) or length < 1e-3:
                break
            length /= 2
        x, value, g = x + length * step, trial, new
        iterations += 1
    largest = float(np.abs(g).max())
    if not largest <= tolerance:
        raise ArithmeticError(
            f"the gradient is {largest:.3g} after {iterations} iterations, above the tolerance {tolerance:.3g}: "
            "raise max_iterations or the tolerance"
        )
    return Minimum(torch.tensor(x), value, largest, iterations)


def fit(
    loss: Callable[[Tensor], Tensor],
    table: Table,
    log_start: Array | None = None,
    *,
    importance: Array | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
) -> Minimum:
    """The parameters of `table` that minimise a loss of the log-probabilities of all its responses.

    loss       log-probabilities (prompts * responses,) -> scalar
    log_start  log-probabilities to start from; None = uniform. Where the loss leaves something free, it stays there
    importance (prompts * responses,), positive: how much each response weighs in the loss, such as its probability to
               be in a pair. The optimiser's variables are the logits times its root, which makes rare responses as
               quick to learn as frequent ones; the tolerance is on the gradient in these variables

    A loss of whole responses sees only their law, and every law is a softmax table and a prefix tree alike. So it is
    minimised on the softmax table of the responses, where the losses of comparisons are well conditioned (on a tree a
    logit moves everything below it), and read back by the chain rule. The certificate is the gradient in the table's
    own parameters.
    """
    import torch

    responses = SoftmaxTable(table.responses, table.prompts)
    root = torch.ones(responses.size, dtype=torch.float64)
    if importance is not None:
        weights = np.asarray(importance, dtype=np.float64)
        if weights.shape != (responses.size,) or not (weights > 0).all():
            raise ValueError(
                f"importance has shape {weights.shape}; expected ({responses.size},), all positive"
            )
        root = torch.tensor(np.sqrt(weights / weights.mean()))
    found = minimise(
        lambda x: loss(responses.log_probabilities(x / root)),
        responses.start(log_start) * root,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    theta = table.start(responses.log_probabilities(found.theta / root).numpy()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(table.log_probabilities(theta)), theta)
    return Minimum(theta.detach(), found.value, float(gradient.abs().max()), found.iterations)


def fit_pairs(
    loss: Callable[..., Tensor],
    pairs: Pairs,
    log_reference: Array,
    table: Table | None = None,
    *,
    others: Mapping[str, Array] | None = None,
    log_start: Array | None = None,
    unidentified: bool = False,
    names: Sequence[str] | None = None,
    tolerance: float = 1e-10,
    **parameters: float,
) -> tuple[Array, Minimum]:
    """log pi of all responses, (n,), at the minimum of a loss of comparisons, and the minimum itself.

    loss           loss(policy, reference, preferred, weight, **others, **parameters) on (m, 2), such as `dpo_loss`
    log_reference  (n,) log ref; every response that is compared needs mass
    table          None = a softmax table of one prompt
    others         further log-probabilities of all responses (n,), by the loss's names for them, such as `previous`
    log_start      None = the reference, which also decides what the comparisons leave open
    unidentified   True lets comparisons pass that leave a part of the responses open; else they are a ValueError that
                   says which (for one prompt), by `names`
    """
    import torch

    log_reference = np.asarray(log_reference, dtype=np.float64).reshape(-1)
    n = len(log_reference)
    if not np.isfinite(log_reference[pairs.index]).all():
        i, side = np.argwhere(~np.isfinite(log_reference[pairs.index]))[0]
        lost = int(pairs.index[i, side])
        raise ValueError(
            f"comparison {i} is of response {lost if names is None else repr(names[lost])}, which the reference "
            f"gives no mass (log ref = {log_reference[lost]}): leave it out, or take a reference that covers the data"
        )
    table = SoftmaxTable(n) if table is None else table
    if not unidentified and table.prompts == 1:
        check_connected(pairs.index[:, 0], pairs.index[:, 1], n, names)
    p, w = pairs.tensors()
    anchor = gather(torch.tensor(log_reference), pairs)
    more = {name: gather(torch.tensor(np.asarray(x)), pairs) for name, x in (others or {}).items()}
    found = fit(
        lambda lp: loss(gather(lp, pairs), anchor, preferred=p, weight=w, **more, **parameters),
        table,
        log_reference if log_start is None else log_start,
        importance=pairs.importance(n),
        tolerance=tolerance,
    )
    return table.log_probabilities(found.theta).numpy(), found


def _newton_direction(f: Callable[[Tensor], Tensor], x: Array, g: Array) -> Array:
    """-H^{-1} g on the range of H, by MINRES."""
    import torch
    from scipy.sparse.linalg import LinearOperator, minres

    theta = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    if not gradient.requires_grad:  # f is linear here
        return np.zeros_like(g)

    def product(v: Array) -> Array:
        (hv,) = torch.autograd.grad(gradient, theta, torch.as_tensor(v.reshape(-1)), retain_graph=True)
        return hv.numpy()

    H = LinearOperator((len(x), len(x)), matvec=product, dtype=np.float64)
    step, _ = minres(H, -g, rtol=1e-8, maxiter=400)
    return step
