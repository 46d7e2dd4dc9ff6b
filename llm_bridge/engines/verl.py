r"""verl: our advantage estimators and policy losses in its plug points, and its losses as a trainer of conformance.

verl (https://github.com/volcengine/verl) makes a policy-gradient step of three parts that its configuration names:

  the reward of a token    the score of the response on its last token, and with `algorithm.use_kl_in_reward` and
                           `kl_penalty=kl` the penalty -beta log pi/ref(y_t) on each: verl's own
  the advantage of a token `algorithm.adv_estimator`, registered by `register_adv_est`
  the loss                 `actor.policy_loss.loss_mode`, registered by `register_policy_loss`, and `loss_agg_mode`

`register()` adds, with r_t the rewards of tokens, R = sum_t r_t and A_t the advantages,

  preflab_response        A_t = R                               E = grad of E[r] - beta KL(pi, ref), the KL of whole
                                                                responses: `kl_policy_gradient.policy_gradient_loss`
  preflab_to_go           A_t = sum_{s >= t} r_s                the same gradient: `reward_to_go_loss`
  preflab_leave_one_out   A_t = R - mean of the group's others  the same gradient, with less noise
  preflab_nash_md         A_t = R - 1/2                         `nash_md_pg_loss`, where the score is P(y > y')

  preflab_gradient        - mean over responses of sum_t A_t log pi(y_t)
  preflab_importance      - mean of sg[pi(y)/pi_old(y)] sum_t A_t log pi(y_t): for mini-batches after the first, when
                          the policy is no longer the one that drew. The penalty in A is that of pi_old, so that with
                          A from E[r] - beta KL(pi, ref) it descends that plus beta KL(pi, pi_old)
  preflab_sppo            `sppo_loss` with pi_t = pi_old, and the advantages (preflab_response) as P(y > pi_t)

They are asked for by

  algorithm.adv_estimator=preflab_response  algorithm.use_kl_in_reward=True  algorithm.kl_penalty=kl
  algorithm.kl_ctrl.kl_coef=BETA            actor_rollout_ref.actor.policy_loss.loss_mode=preflab_gradient
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum

and are there in every process with VERL_USE_EXTERNAL_MODULES=preflab.llm_bridge.engines.verl_plugin. Where the opponent
of a game comes from is the business of the reward function that verl calls: it has the judge.

Written for the signatures of verl 0.7.1, 0.8.0 and 0.9.1, which agree; another version says so by a TypeError.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...algorithms.optimisation.losses import average, check_positive
from ...algorithms.sppo import sppo_loss
from ..conformance.batch import Completions, SampleBatch, TrainerLoss, total

if TYPE_CHECKING:
    from torch import Tensor

MODE = "seq-mean-token-sum"
Gradient = tuple["Tensor", dict[str, Any]]


# ---- advantages: (B, T) rewards of tokens and the mask of the response -> (B, T) advantages --------------------------


def response_advantage(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """The reward of the whole response, its penalties among it, at each of its tokens."""
    mask = response_mask.bool()
    return total(token_level_rewards, mask)[:, None].expand_as(token_level_rewards).masked_fill(~mask, 0.0)


def to_go_advantage(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """What is still to come, this token's reward among it."""
    mask = response_mask.bool()
    rewards = token_level_rewards.masked_fill(~mask, 0.0)
    return rewards.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)


def leave_one_out_advantage(token_level_rewards: Tensor, response_mask: Tensor, index: Any) -> Tensor:
    """The response's reward less the mean of the others that answer the same prompt; `index` (B,) names the prompt."""
    import numpy as np
    import torch

    mask = response_mask.bool()
    R = total(token_level_rewards, mask)
    number = torch.as_tensor(np.unique(np.asarray(index), return_inverse=True)[1], device=R.device).reshape(
        -1
    )
    size = torch.bincount(number)
    if (size == 1).any():
        alone = np.asarray(index)[int((size[number] == 1).int().argmax())]
        raise ValueError(
            f"prompt {alone!r} has one response; leave-one-out compares it with others: set rollout.n to 2 or more"
        )
    sums = R.new_zeros(len(size)).index_add(0, number, R)
    others = (sums[number] - R) / (size[number] - 1)
    return (R - others)[:, None].expand_as(token_level_rewards).masked_fill(~mask, 0.0)


def nash_md_advantage(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """P(y > y') - 1/2 less the penalties, where the score of a response is P(y > y')."""
    mask = response_mask.bool()
    return (response_advantage(token_level_rewards, response_mask) - 0.5).masked_fill(~mask, 0.0)


# ---- losses: token log-probabilities (B, T), weights (B,) of responses -----------------------------------------------


def gradient_loss(log_prob: Tensor, advantages: Tensor, response_mask: Tensor, weight: Tensor) -> Tensor:
    """-sum_i weight_i sum_t A_t log pi(y_t)."""
    return -average(total(advantages.detach() * log_prob, response_mask.bool()), weight)


def importance_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, weight: Tensor
) -> Tensor:
    """The same with each response weighted by sg[pi(y)/pi_old(y)]."""
    ratio = total(log_prob.detach() - old_log_prob.detach(), response_mask.bool()).exp()
    return gradient_loss(log_prob, advantages, response_mask, weight * ratio)


def response_weights(response_mask: Tensor, info: Mapping[str, Any]) -> Tensor:
    """(B,) weights that make sums over this micro-batch parts of the mean over all responses, as verl's agg_loss does.

    info  verl's `config.global_batch_info`: global_batch_size and dp_size, where it has them. Responses without a token
          (verl pads batches with them) weigh nothing.
    """
    real = response_mask.bool().any(-1)
    parallel, rows = info.get("dp_size") or 1, info.get("global_batch_size")
    if rows is None:
        if parallel > 1:
            raise ValueError("global_batch_size is not known on several ranks: verl's own actor passes it on")
        rows = real.sum()
    return real.double() / rows * parallel


# ---- in verl's plug points -------------------------------------------------------------------------------------------


def adv_response(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    A = response_advantage(token_level_rewards, response_mask)
    return A, A


def adv_to_go(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    A = to_go_advantage(token_level_rewards, response_mask)
    return A, A


def adv_leave_one_out(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    if index is None:
        raise ValueError(
            "leave-one-out needs to know which responses answer one prompt: verl's batch has no uid"
        )
    A = leave_one_out_advantage(token_level_rewards, response_mask, index)
    return A, A


def adv_nash_md(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    A = nash_md_advantage(token_level_rewards, response_mask)
    return A, A


ADVANTAGES: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "preflab_response": adv_response,
    "preflab_to_go": adv_to_go,
    "preflab_leave_one_out": adv_leave_one_out,
    "preflab_nash_md": adv_nash_md,
}


def policy_losses(sppo_eta: float = 1.0) -> dict[str, Callable[..., Gradient]]:
    """verl's policy losses by name, in the signature that it calls them with."""
    eta = check_positive(sppo_eta, "sppo_eta")

    def gradient(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> Gradient:
        weight = _prepared("preflab_gradient", response_mask, loss_agg_mode, config)
        A = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        return gradient_loss(log_prob, A, response_mask, weight), _moved(
            old_log_prob, log_prob, response_mask
        )

    def importance(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> Gradient:
        weight = _prepared("preflab_importance", response_mask, loss_agg_mode, config)
        A = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        loss = importance_loss(old_log_prob, log_prob, A, response_mask, weight)
        return loss, _moved(old_log_prob, log_prob, response_mask)

    def sppo(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> Gradient:
        weight = _prepared("preflab_sppo", response_mask, loss_agg_mode, config)
        if rollout_is_weights is not None:
            raise ValueError(
                "preflab_sppo is a regression and takes no rollout_is_weights: turn rollout_is off"
            )
        mask = response_mask.bool()
        wins = advantages.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
        loss = sppo_loss(total(log_prob, mask), total(old_log_prob, mask), wins, weight, eta=eta)
        return loss, _moved(old_log_prob, log_prob, response_mask)

    return {"preflab_gradient": gradient, "preflab_importance": importance, "preflab_sppo": sppo}


def _prepared(name: str, response_mask: Tensor, mode: str, config: Any) -> Tensor:
    if mode != MODE:
        raise ValueError(
            f"{name} is a sum over tokens and a mean over responses; loss_agg_mode is {mode!r}: set "
            f"actor_rollout_ref.actor.loss_agg_mode={MODE}, since verl's entropy and KL terms go by it as well"
        )
    return response_weights(response_mask, getattr(config, "global_batch_info", None) or {})


def _moved(old_log_prob: Tensor, log_prob: Tensor, response_mask: Tensor) -> dict[str, Any]:
    """The mean of log pi_old/pi over responses, an estimate of KL(pi_old, pi); 0 while pi is the one that drew."""
    mask = response_mask.bool()
    return {"actor/ppo_kl": total((old_log_prob - log_prob).detach(), mask).mean().item()}


def register(sppo_eta: float = 1.0) -> list[str]:
    """Put all of them into verl's registries, in this process; the names. Harmless when repeated."""
    core = _core()
    for name, estimator in ADVANTAGES.items():
        core.register_adv_est(name)(estimator)
    losses = policy_losses(sppo_eta)
    for name, loss in losses.items():
        core.register_policy_loss(name)(loss)
    return [*ADVANTAGES, *losses]


def _core() -> Any:
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise ValueError(f"verl cannot be imported ({error}); pip install verl==0.9.1") from error


# ---- verl as a trainer of conformance --------------------------------------------------------------------------------


def verl_trainer(
    adv_estimator: str,
    loss_mode: str,
    *,
    beta: float = 0.0,
    kl: str = "reward",
    kl_penalty: str = "kl",
    loss_agg_mode: str = MODE,
    score: Callable[[SampleBatch], Tensor] = lambda batch: batch.reward,
    old: str = "policy",
) -> TrainerLoss:
    """What verl's actor descends on samples of the current policy, by the names of its configuration.

    kl     where the penalty of weight beta goes: into the "reward" (use_kl_in_reward) or the "loss" (use_kl_loss)
    score  of a response, on its last token
    old    which log-probabilities the response was drawn with: "policy", or "previous" for SPPO

    verl's own `kl_penalty`, registered advantage estimator and `ppo_loss` run; its rollout, its model and its
    optimiser do not.
    """
    core = _core()
    losses = importlib.import_module("verl.workers.utils.losses")
    configs = importlib.import_module("verl.workers.config")
    advantage = core.get_adv_estimator_fn(adv_estimator)
    core.get_policy_loss_fn(loss_mode)
    if kl not in ("reward", "loss"):
        raise ValueError(f"kl is {kl!r}; the penalty goes into the 'reward' or into the 'loss'")
    config = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=loss_agg_mode,
        policy_loss=configs.PolicyLossConfig(loss_mode=loss_mode),
        use_kl_loss=kl == "loss",
        kl_loss_coef=beta,
        kl_loss_type=kl_penalty,
    )

    def loss(batch: SampleBatch) -> Tensor:
        import numpy as np
        import torch
        from tensordict import TensorDict

        mask, pi, ref, drawn = _responses(batch.completions, old)
        scores = torch.zeros_like(pi.detach())
        scores[torch.arange(len(mask)), mask.sum(1) - 1] = score(batch).to(scores)
        if kl == "reward":
            scores = scores - beta * core.kl_penalty(drawn, ref, kl_penalty=kl_penalty) * mask
        groups = np.array([f"prompt {i}" for i in batch.group.tolist()], dtype=object)
        A, _ = advantage(token_level_rewards=scores, response_mask=mask.long(), index=groups, config=None)
        data = TensorDict(
            {
                "prompts": torch.zeros(len(mask), 1, dtype=torch.long),
                "responses": torch.zeros_like(mask, dtype=torch.long),
                "attention_mask": torch.cat([torch.ones_like(mask[:, :1]), mask], 1).long(),
                "response_mask": mask.long(),
                "old_log_probs": drawn,
                "ref_log_prob": ref,
                "advantages": A,
            },
            batch_size=len(mask),
        )
        for name, value in (("dp_size", 1), ("batch_num_tokens", None), ("global_batch_size", None)):
            data.set_non_tensor(name, value)
        # verl keeps the log-probability of a token at the place before it, all rows one after another.
        ahead = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)
        ahead[torch.arange(len(mask)), mask.sum(1)] = True
        flat = torch.cat([pi, pi[:, :1] * 0], 1)[ahead]
        return losses.ppo_loss(config, {"log_probs": flat}, data)[0]  # type: ignore[no-any-return]

    loss.__name__ = f"verl[{adv_estimator},{loss_mode},{loss_agg_mode},{kl_penalty} in the {kl}]"
    return loss


def _responses(c: Completions, old: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Completions moved to the left, as verl keeps them: mask, log pi, log ref, log pi_old, (B, longest) each."""
    import torch

    lengths = c.mask.sum(1)
    first = c.mask.int().argmax(1)
    place = torch.arange(int(lengths.max()))
    mask = place[None, :] < lengths[:, None]
    at = (first[:, None] + place).clamp(max=c.mask.shape[1] - 1)
    pi, ref, drawn = (x.gather(1, at) for x in (c.policy, c.reference, getattr(c, old).detach()))
    return mask, pi, ref, drawn
