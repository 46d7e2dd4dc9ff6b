r"""Geometric mixtures of two language models, pi^{1 - share} mu^{share} / Z; share in [0, 1] is the reference's weight.

There are two, and beyond one token they differ:

  token by token    m(y|x) = prod_h pi(y_h|.)^{1 - share} mu(y_h|.)^share / z_h
                    `TokenMixture`, a policy like any other: sampled with one cache for each model, scored exactly
  over responses    m(y|x) = pi(y|x)^{1 - share} mu(y|x)^share / Z(x)
                    the one of Nash-MD's theory: exact where all responses can be written down, on a lattice
                    (`sequence_mixture`), else by self-normalised importance weights (`importance_weights`,
                    `sample_sequence_mixture`)

z_h depends on the prefix, so that the first is the second times Z / prod_h z_h (`algorithms.nash_md_pg` has both on
tables). Importance weights know Z up to sampling: w_i ∝ pi^{1-share} mu^share / q at y_i ~ q, whose mean estimates Z
without bias; laws and expectations from the normalised weights have a bias of order 1/N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..algorithms.optimisation.losses import check_share
from .policy import Batch, Decoder, Samples, TokenPolicy, Tokens

if TYPE_CHECKING:
    from torch import Generator, Tensor


def mixed(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    """(1 - share) log pi + share log mu, not normalised. At 0 and 1 one of them alone, also where the other is -inf."""
    if share == 0:
        return policy
    if share == 1:
        return reference
    return (1 - share) * policy + share * reference


@dataclass(frozen=True, eq=False)
class TokenMixture(TokenPolicy):
    """The token-wise mixture of two policies over the same tokens. Its scores carry gradients to both."""

    policy: TokenPolicy
    reference: TokenPolicy
    share: float

    def __post_init__(self) -> None:
        check_share(self.share, "share")
        for what in ("end_ids", "vocabulary"):
            ours, theirs = getattr(self.policy, what), getattr(self.reference, what)
            if ours != theirs:
                raise ValueError(
                    f"{what} of the policy is {ours} and of the reference {theirs}: a mixture needs one set of tokens"
                )
        contexts = [c for c in (self.policy.context, self.reference.context) if c is not None]
        shared = {
            "end_ids": self.policy.end_ids,
            "pad_id": self.policy.pad_id,
            "vocabulary": self.policy.vocabulary,
            "context": min(contexts, default=None),
            "micro_batch": min(self.policy.micro_batch, self.reference.micro_batch),
        }
        for name, value in shared.items():
            object.__setattr__(self, name, value)

    @property
    def device(self) -> Any:
        return self.policy.device

    def laws(self, batch: Batch, first_row: int = 0) -> Tensor:
        return self._mix(self.policy.laws(batch, first_row), self.reference.laws(batch, first_row))

    def decoder(self, prompts: Sequence[Tokens], cached: bool | None = None) -> Decoder:
        parts = self.policy.decoder(prompts, cached), self.reference.decoder(prompts, cached)
        return _MixtureDecoder(self, *parts)

    def _mix(self, policy: Tensor, reference: Tensor) -> Tensor:
        return mixed(policy, reference, self.share).log_softmax(-1)


class _MixtureDecoder:
    """Two decoders, each with its own cache, that read the same tokens."""

    def __init__(self, mixture: TokenMixture, policy: Decoder, reference: Decoder) -> None:
        self._mixture, self._parts = mixture, (policy, reference)
        self.laws = mixture._mix(policy.laws, reference.laws)

    def advance(self, tokens: Tensor) -> None:
        for part in self._parts:
            part.advance(tokens)
        self.laws = self._mixture._mix(*(part.laws for part in self._parts))


def sequence_mixture(policy: Tensor, reference: Tensor, share: float, prompts: int = 1) -> Tensor:
    """log m(y|x) of all responses, (prompts * responses,), prompt by prompt, as a `LatticePolicy` gives them."""
    both = mixed(policy, reference, check_share(share, "share"))
    return both.reshape(prompts, -1).log_softmax(1).reshape(-1)


@dataclass(frozen=True, eq=False)
class Importance:
    """Proposals with weights: (..., N) proposals for each prompt.

    weights         (..., N), sum to 1
    effective       (...,) 1 / sum w^2, the number of equally weighted draws they are worth, in [1, N]
    log_normaliser  (...,) log of the estimate of Z, the mean of the weights before they were normalised
    """

    weights: Tensor
    effective: Tensor
    log_normaliser: Tensor


def importance_weights(policy: Tensor, reference: Tensor, proposal: Tensor, share: float) -> Importance:
    """Weights that turn draws from the proposal into the sequence-wise mixture; log-probabilities (..., N) of draws.

    The proposal must reach whatever the mixture reaches: log q is finite at each draw.
    """
    import torch

    if not policy.shape == reference.shape == proposal.shape:
        shapes = [tuple(x.shape) for x in (policy, reference, proposal)]
        raise ValueError(f"policy, reference and proposal have shapes {shapes}; they must be equal, (..., N)")
    if not proposal.isfinite().all():
        raise ValueError(
            "a draw has probability 0 under its proposal: score each draw by the law it was drawn from"
        )
    log_w = (mixed(policy, reference, check_share(share, "share")) - proposal).detach()
    total = log_w.logsumexp(-1, keepdim=True)
    if not total.isfinite().all():
        raise ValueError(
            "no draw of some prompt is possible under the mixture: draw from another proposal, or more"
        )
    weights = (log_w - total).exp()
    count = torch.tensor(float(log_w.shape[-1]), dtype=log_w.dtype).log()
    return Importance(weights, 1 / weights.square().sum(-1), total[..., 0] - count)


def sample_sequence_mixture(
    policy: TokenPolicy,
    reference: TokenPolicy,
    share: float,
    prompts: Sequence[Tokens],
    horizon: int,
    generator: Generator,
    *,
    proposals: int = 64,
    proposal: TokenPolicy | None = None,
) -> tuple[list[list[int]], Importance]:
    """One completion a prompt by importance resampling: `proposals` draws each, of which one is kept by its weight.

    proposal  None = the token-wise mixture. The law of what is kept tends to the sequence-wise mixture as 1/proposals.
    Returns the completions, and the weights (prompts, proposals) that say how far to trust them (`effective`).
    """
    import torch

    if proposals < 1:
        raise ValueError(f"proposals is {proposals}; at least 1 draw a prompt is needed")
    law = TokenMixture(policy, reference, share) if proposal is None else proposal
    many = [x for x in prompts for _ in range(proposals)]
    draws: Samples = law.sample(many, horizon, generator)
    with torch.no_grad():
        scores = [p.log_probabilities(many, draws.completions) for p in (policy, reference)]
    pi, mu, q = (x.reshape(len(prompts), proposals) for x in (*scores, draws.log_probabilities))
    found = importance_weights(pi, mu, q, share)
    kept = torch.multinomial(found.weights.to(generator.device), 1, generator=generator)[:, 0].tolist()
    return [draws.completions[i * proposals + k] for i, k in enumerate(kept)], found
