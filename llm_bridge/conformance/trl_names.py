"""TRL's losses by the names of the command line, and what each is held to.

trl:dpo[LOSS_TYPE]                  DPOTrainer            against dpo, ipo
trl:grpo[LOSS_TYPE,...]             GRPOTrainer           against kl_policy_gradient
trl:rloo, trl:rloo[normalize]       RLOOTrainer           against kl_policy_gradient
trl:online_dpo[sigmoid], ...[ipo]   OnlineDPOTrainer      against dpo, ipo
trl:nash_md                         NashMDTrainer         against nash_md_pg (TRL 1.13.0)
trl:xpo[sigmoid], ...[ipo]          XPOTrainer            against xpo (TRL 1.13.0)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .batch import TrainerLoss
from .targets import TARGETS

NAMES = (
    "trl:dpo[LOSS_TYPE]",
    "trl:grpo[LOSS_TYPE]",
    "trl:rloo",
    "trl:online_dpo[LOSS_TYPE]",
    "trl:nash_md",
    "trl:xpo[LOSS_TYPE]",
)


def trl_trainer(
    name: str, against: str | None, given: Mapping[str, float]
) -> tuple[TrainerLoss, str, dict[str, float]]:
    """What stands after `trl:` -> the loss, the target it is held to, and the target's parameters.

    Parameters go to the trainer too: beta (of IPO: tau), label_smoothing, alpha, share, where it has them.
    """
    found = re.fullmatch(r"(dpo|grpo|rloo|online_dpo|nash_md|xpo)(?:\[(\w+)((?:,\w+)*)\])?", name)
    if found is None or (found[1] in ("dpo", "grpo") and found[2] is None):
        raise ValueError(f"'trl:{name}' is not a trainer of TRL; there are {', '.join(NAMES)}")
    from . import trl, trl_online

    method, options = found[1], [x for x in (found[2], *found[3].split(",")) if x] if found[2] else []
    target = against or _default(method, options)
    made = TARGETS[target].checked(given)
    beta = made.get("beta", made.get("tau", 0.1))
    if method == "grpo":
        return trl.trl_grpo(options[0], beta, *options[1:]), target, made
    if method == "rloo":
        return trl_online.trl_rloo(beta, *options), target, made
    if method == "nash_md":
        if options:
            raise ValueError(f"trl:nash_md has no options; got {options[0]!r}")
        return trl_online.trl_nash_md(beta, made.get("share", 0.25)), target, made
    if len(options) > 1:
        raise ValueError(f"'trl:{name}': {method} takes one loss type and no options")
    loss_type = options[0] if options else "sigmoid"
    if method == "online_dpo":
        return trl_online.trl_online_dpo(loss_type, beta), target, made
    if method == "xpo":
        return trl_online.trl_xpo(loss_type, beta, made.get("alpha", 0.0)), target, made
    smoothing = made.get("label_smoothing", 0.0)
    if loss_type == "exo_pair" and not smoothing:
        smoothing = 1e-3  # TRL refuses 0; this is its recommendation
    return trl.trl_dpo(loss_type, beta, smoothing), target, made


def _default(method: str, options: list[str]) -> str:
    if method in ("dpo", "online_dpo"):
        return "ipo" if options[:1] == ["ipo"] else "dpo"
    return {"nash_md": "nash_md_pg", "xpo": "xpo"}.get(method, "kl_policy_gradient")
