r"""Nash-MD-PG and Nash-EMA-PG: policy gradients for the regularised Nash equilibrium of a preference game.

R. Munos, M. Valko, D. Calandriello, et al., "Nash Learning from Human Feedback", ICML 2024 (arXiv 2312.00886), the deep
variants of Nash-MD (`nash_md`). With temperature tau, reference mu, y ~ pi_theta and an opponent's y' ~ m,

  gradient = E[(P(y > y') - 1/2 - tau log pi_theta(y)/mu(y)) grad log pi_theta(y)]                  `nash_md_pg_loss`
           = grad [P(pi_theta > sg[m]) - tau KL(pi_theta, mu)],   sg[.] held constant                     `objective`

  Nash-MD-PG   m = pi_theta^{1 - beta} mu^beta / Z, the geometric mixture; beta = 0 is self-play, beta = 1 the best
               response to mu. Over whole responses (`sequence_mixture`), or token by token, as a language model can
               sample it (`token_mixture`): each prefix has its own normaliser z_h, so that
               m_token(y) = m_sequence(y) Z / prod_h z_h. They agree for one token, and at beta = 0 and 1
  Nash-EMA-PG  m = pi_{theta_bar}, theta_bar a moving average of the parameters                                `ema`

beta is called `share` here, as in `self_play.mixture`: the weight of mu. The -1/2 does not change the expected
gradient; the constant of least variance is b* = E[c |s|^2] / E[|s|^2], with c = P(y > y') - tau log pi/mu and
s = grad log pi, and the variance is that at b* plus (b - b*)^2 E|s|^2 (`moments`). At the equilibrium against itself
b* = 1/2 - tau KL(pi*, mu). So 1/2 beats 0 where b* > 1/4: between mu and the equilibrium in
all games measured, but not everywhere.

Where they end (measured by the claims; small steps). Nash-MD-PG: at the best response to its own mixture,
pi ∝ mu exp(P(. > m) / tau), the limit of Nash-MD with the constant step share / tau, and not at the regularised
equilibrium unless share = 0; its KL to it is of order share^2. Nash-EMA-PG: at the regularised equilibrium, since
theta_bar = theta at rest. A step of the natural gradient on a table of responses with share = eta tau is Nash-MD's
mirror step.

Departures: expectations over y and y' are sums over all responses (one prompt); the preference model is the game's P.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game, PreferenceGame, check_law
from .optimisation import PrefixTree, Table
from .optimisation.losses import average, check_positive, check_share
from .planning.games import check_tau
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor

# ---- the loss --------------------------------------------------------------------------------------------------------


def nash_md_pg_loss(
    policy: Tensor,
    reference: Tensor,
    wins: Tensor,
    weight: Tensor | None = None,
    *,
    tau: float,
    baseline: float = 0.5,
) -> Tensor:
    """-E[sg[P(y > y') - baseline - tau log pi/mu] log pi(y)], single responses (...,) drawn from the policy.

    policy, reference  log pi(y) and log mu(y), sums over tokens
    wins               P(y > y') against a drawn opponent, its label, or its mean over the opponents P(y > m)
    """
    ratio = policy.detach() - reference.detach()
    advantage = wins.detach() - baseline - check_positive(tau, "tau") * ratio
    return -average(advantage * policy, weight)


def objective(policy: Tensor, reference: Tensor, wins: Tensor, *, tau: float) -> Tensor:
    """P(pi > m) - tau KL(pi, mu) from the log-probabilities of all responses (n,); wins (n,) = P(. > m), a constant."""
    return (policy.exp() * (wins.detach() - check_positive(tau, "tau") * (policy - reference.detach()))).sum()


# ---- opponents -------------------------------------------------------------------------------------------------------


def sequence_mixture(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    """log of pi^{1 - share} mu^share / Z over whole responses, (n,) each; share in [0, 1] is mu's."""
    share = check_share(share, "share")
    return ((1 - share) * policy + share * reference).log_softmax(0)


def token_mixture(table: PrefixTree, theta: Tensor, reference: Tensor, share: float) -> Tensor:
    """log m (n,) of the responses when every token is drawn from pi_h^{1 - share} mu_h^share / z_h at its prefix.

    theta and reference are parameters of the tree, (table.size,): log-linear in the logits, up to normalisers.
    """
    share = check_share(share, "share")
    return table.log_probabilities(
        (1 - share) * _normalised(table, theta) + share * _normalised(table, reference)
    )


def _normalised(table: PrefixTree, theta: Tensor) -> Tensor:
    import torch

    return torch.cat([x.reshape(-1) for x in table.conditionals(theta)])


def ema(average: Tensor, theta: Tensor, decay: float) -> Tensor:
    """decay average + (1 - decay) theta, of parameters; decay in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
    return decay * average + (1 - decay) * theta


# ---- runs with exact gradients ---------------------------------------------------------------------------------------


class NashMDPG:
    """Ascent on a table's parameters with exact gradients: theta + eta times the expected gradient.

    table    of one prompt, with the game's responses: a `SoftmaxTable`, or a `PrefixTree` (its numbering)
    eta      the learning rate, constant
    share    mu's weight in the mixture, in [0, 1]
    mixture  "sequence", or "token" on a tree
    start    log-probabilities (n,), None = the reference
    theta, gradient (max |.| of the last expected gradient), t
    A run: advance(N) then advance(M) equals advance(N + M), bit for bit.
    """

    def __init__(
        self,
        table: Table,
        game: Game,
        tau: float,
        *,
        eta: float,
        share: float,
        mixture: Literal["sequence", "token"] = "sequence",
        start: ArrayLike | None = None,
    ) -> None:
        import torch

        if table.prompts != 1 or table.responses != len(game):
            shape = f"{table.prompts} prompts of {table.responses} responses"
            raise ValueError(
                f"the table has {shape}; the game has {len(game)}: one prompt, as many responses"
            )
        if mixture not in ("sequence", "token"):
            raise ValueError(f"mixture is {mixture!r}; it is 'sequence' or 'token'")
        if mixture == "token" and not isinstance(table, PrefixTree):
            raise ValueError("mixture 'token' needs a PrefixTree; a table of responses has no tokens")
        self.table, self.game, self.tau = table, game, check_tau(tau)
        self.eta, self.share, self.mixture = check_positive(eta, "eta"), check_share(share, "share"), mixture
        self.log_reference = torch.as_tensor(game.log_reference)
        log_start = game.log_reference if start is None else np.asarray(start, dtype=np.float64)
        self.theta = table.start(log_start)
        self.gradient, self.t = float("inf"), 0

    @property
    def log_policy(self) -> Array:
        return self.table.log_probabilities(self.theta).numpy()

    def opponent(self) -> Array:
        """The law m (n,) that y' is drawn from."""
        if self.mixture == "token":
            assert isinstance(self.table, PrefixTree)
            reference = self.table.start(self.game.log_reference)
            log_m = token_mixture(self.table, self.theta, reference, self.share)
        else:
            log_policy = self.table.log_probabilities(self.theta)
            log_m = sequence_mixture(log_policy, self.log_reference, self.share)
        return log_m.exp().numpy()

    def advance(self, steps: int) -> Self:
        import torch

        for _ in range(steps):
            wins = torch.as_tensor(self.game.wins(self.opponent()))
            theta = self.theta.requires_grad_(True)
            log_pi = self.table.log_probabilities(theta)
            weight = log_pi.detach().exp()
            loss = nash_md_pg_loss(log_pi, self.log_reference, wins, weight, tau=self.tau)
            (slope,) = torch.autograd.grad(loss, theta)
            self.gradient = float(slope.abs().max())
            self.theta = theta.detach() - self.eta * slope
            self._follow()
            self.t += 1
        return self

    def settle(self, tolerance: float = 1e-12, max_steps: int = 20_000, every: int = 50) -> Self:
        """Advance until max |expected gradient| <= tolerance; ArithmeticError after max_steps."""
        for _ in range(0, max_steps, every):
            self.advance(every)
            if self._at_rest(tolerance):
                return self
        raise ArithmeticError(
            f"the gradient is {self.gradient:.3g} after {self.t} steps, above {tolerance:.3g}: "
            "take more steps, or a smaller eta if it does not fall"
        )

    def _follow(self) -> None:
        """What an opponent with a memory does after a step."""

    def _at_rest(self, tolerance: float) -> bool:
        return self.gradient <= tolerance


class NashEMAPG(NashMDPG):
    """The opponent is pi of `average`, the moving average of the parameters with weight `decay` on its past."""

    def __init__(
        self,
        table: Table,
        game: Game,
        tau: float,
        *,
        eta: float,
        decay: float,
        start: ArrayLike | None = None,
    ) -> None:
        super().__init__(table, game, tau, eta=eta, share=0.0, start=start)
        self.decay, self.average = decay, self.theta.clone()
        ema(self.average, self.theta, decay)  # checks it

    def opponent(self) -> Array:
        return self.table.log_probabilities(self.average).exp().numpy()

    def _follow(self) -> None:
        self.average = ema(self.average, self.theta, self.decay)

    def _at_rest(self, tolerance: float) -> bool:
        return self.gradient <= tolerance and float((self.average - self.theta).abs().max()) <= tolerance


# ---- one drawn pair --------------------------------------------------------------------------------------------------


def moments(
    table: Table,
    theta: ArrayLike,
    game: PreferenceGame,
    opponent: ArrayLike,
    tau: float,
    baseline: float = 0.5,
) -> tuple[Array, float, float]:
    """Of the gradient from one pair, y ~ pi and y' ~ opponent: its mean (d,), the trace of its covariance, and b*."""
    import torch

    tau, m = check_tau(tau), check_law(opponent, len(game), "opponent")
    x = torch.tensor(np.asarray(theta, dtype=np.float64))
    scores = torch.autograd.functional.jacobian(table.log_probabilities, x).numpy()
    log_pi = table.log_probabilities(x).numpy()
    law, squares = np.exp(log_pi), (scores**2).sum(1)
    c = game.P - (tau * (log_pi - game.log_reference))[:, None]
    mean = (law * ((c - baseline) @ m)) @ scores
    second = float(law @ (squares * ((c - baseline) ** 2 @ m)))
    best = float(law @ (squares * (c @ m)) / (law @ squares))
    return mean, second - float(mean @ mean), best


LOSS = LossSpec(
    name="nash_md_pg",
    title="Nash-MD-PG and Nash-EMA-PG",
    paper="Munos et al., ICML 2024 (arXiv 2312.00886)",
    loss=nash_md_pg_loss,
)
