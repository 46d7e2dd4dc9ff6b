"""Our estimators and losses for verl, against enumerated gradients; in verl itself where it is installed."""

from __future__ import annotations

import subprocess
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.kl_policy_gradient import policy_gradient_loss, reward_to_go_loss
from preflab.algorithms.nash_md_pg import nash_md_pg_loss
from preflab.llm_bridge.conformance import conform
from preflab.llm_bridge.conformance.ours import opponent_wins
from preflab.llm_bridge.engines import verl as engine

BETA = 0.1
EXACT = 1e-10


def rewards(pi, ref, mask, score, beta):
    """verl's rewards of tokens: the score on the last token, the penalty on each."""
    found = -beta * (pi.detach() - ref) * mask
    found[torch.arange(len(mask)), mask.sum(1) - 1] += score
    return found


def plain(estimator, loss_mode, beta, score=lambda b: b.reward, old="policy"):
    """The functions in verl's signatures, called as verl calls them; nothing of verl is needed."""

    def loss(batch):
        mask, pi, ref, drawn = engine._responses(batch.completions, old)
        r = rewards(drawn, ref, mask, score(batch), beta)
        A, returns = engine.ADVANTAGES[estimator](
            token_level_rewards=r, response_mask=mask.long(), index=batch.group.numpy(), config=None
        )
        assert torch.equal(A, returns)
        found, metrics = engine.policy_losses()[loss_mode](
            old_log_prob=drawn,
            log_prob=pi,
            advantages=A,
            response_mask=mask,
            loss_agg_mode="seq-mean-token-sum",
            config=SimpleNamespace(global_batch_info={}),
            rollout_is_weights=None,
        )
        assert set(metrics) == {"actor/ppo_kl"}
        return found

    return loss


@pytest.mark.parametrize("loss_mode", ["preflab_gradient", "preflab_importance"])
@pytest.mark.parametrize("estimator", ["preflab_response", "preflab_to_go", "preflab_leave_one_out"])
def test_reward_with_a_whole_response_kl(estimator, loss_mode):
    report = conform(
        plain(estimator, loss_mode, BETA),
        "kl_policy_gradient",
        beta=BETA,
        tolerance=EXACT,
        variance=False,
    )
    assert report.ok, report
    gradient = next(check for check in report.checks if check.name == "gradient")
    assert gradient.numbers["scale"] == pytest.approx(1, abs=1e-10)


def test_nash_md():
    trainer = plain("preflab_nash_md", "preflab_gradient", BETA, score=lambda b: opponent_wins(b, 0.25))
    assert conform(trainer, "nash_md_pg", tau=BETA, share=0.25, tolerance=EXACT, variance=False).ok
    without_half = plain("preflab_response", "preflab_gradient", BETA, score=lambda b: opponent_wins(b, 0.25))
    report = conform(without_half, "nash_md_pg", tau=BETA, share=0.25, tolerance=EXACT)
    assert report.ok  # the same expected gradient, and more noise
    assert "noisier" in str(report)


def test_sppo():
    trainer = plain("preflab_response", "preflab_sppo", 0.0, score=lambda b: b.wins, old="previous")
    assert conform(trainer, "sppo", eta=1.0, tolerance=EXACT).ok
    wrong = plain("preflab_response", "preflab_sppo", 0.0, score=lambda b: b.wins, old="reference")
    assert not conform(wrong, "sppo", eta=1.0).ok


def test_a_penalty_of_another_weight_is_named():
    report = conform(plain("preflab_response", "preflab_gradient", 0.13), "kl_policy_gradient", beta=BETA)
    assert not report.ok
    assert report.cause_name == "beta"
    assert report.cause.endswith("weight is 0.13")


# ---- the pure functions --------------------------------------------------------------------------------------------


def batch_of(seed, n=6, T=4):
    g = torch.Generator().manual_seed(seed)
    pi, ref, old = (torch.rand(n, T, generator=g, dtype=torch.float64).log() for _ in range(3))
    lengths = torch.randint(1, T + 1, (n,), generator=g)
    mask = torch.arange(T)[None, :] < lengths[:, None]
    score = torch.rand(n, generator=g, dtype=torch.float64)
    return pi, ref, old, mask, score


def slope(loss, pi):
    x = pi.clone().requires_grad_(True)
    loss(x).backward()
    return x.grad


@given(st.integers(0, 10**6), st.floats(0.01, 2))
def test_they_are_the_package_own_losses(seed, beta):
    """On every batch, not only on average: the gradient in each log-probability is that of the pure loss."""
    pi, ref, _, mask, score = batch_of(seed)
    weight = engine.response_weights(mask, {})
    r = rewards(pi, ref, mask, score, beta)
    kept = pi.masked_fill(~mask, 0), ref.masked_fill(~mask, 0)

    def sums(x):
        return x.masked_fill(~mask, 0).sum(1)

    cases = [
        (
            engine.response_advantage(r, mask),
            lambda x: policy_gradient_loss(sums(x), kept[1].sum(1), score, beta=beta),
        ),
        (
            engine.to_go_advantage(r, mask),
            lambda x: reward_to_go_loss(x.masked_fill(~mask, 0), kept[1], score, beta=beta),
        ),
        (
            engine.nash_md_advantage(r, mask),
            lambda x: nash_md_pg_loss(sums(x), kept[1].sum(1), score, tau=beta),
        ),
    ]
    for A, ours in cases:
        assert (A.masked_select(~mask) == 0).all()
        theirs = slope(lambda x, A=A: engine.gradient_loss(x, A, mask, weight), pi)
        torch.testing.assert_close(theirs, slope(ours, pi), atol=1e-12, rtol=1e-12)
        on_policy = slope(lambda x, A=A: engine.importance_loss(pi, x, A, mask, weight), pi)
        torch.testing.assert_close(on_policy, theirs, atol=1e-12, rtol=1e-12)


def test_importance_makes_old_samples_count_as_new_ones():
    """All responses listed with pi_old's probabilities: the gradient is the expectation under pi, not under pi_old."""
    g = torch.Generator().manual_seed(3)
    logits, old_logits = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    reward = torch.randn(5, generator=g, dtype=torch.float64)
    mask = torch.ones(5, 1, dtype=torch.bool)
    old = old_logits.log_softmax(0)

    def found(loss):
        x = logits.clone().requires_grad_(True)
        loss(x.log_softmax(0)[:, None]).backward()
        return x.grad

    by_importance = found(
        lambda lp: engine.importance_loss(old[:, None], lp, reward[:, None], mask, old.exp())
    )
    exact = found(lambda lp: -(lp[:, 0].exp() * reward).sum())
    torch.testing.assert_close(by_importance, exact, atol=1e-12, rtol=0)
    stale = found(lambda lp: engine.gradient_loss(lp, reward[:, None], mask, old.exp()))
    assert (stale - exact).abs().max() > 0.01


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
def test_micro_batches_and_ranks_add_up(seed, ranks, padded):
    """Every rank's micro-batches with verl's global numbers, averaged over ranks as DDP does, are the whole batch."""
    pi, _, old, mask, score = batch_of(seed)
    if padded:
        mask = mask.clone()
        mask[-1] = False  # verl fills batches with rows that have no token
    A = engine.response_advantage(score[:, None] * mask, mask)
    whole = engine.gradient_loss(pi, A, mask, engine.response_weights(mask, {}))
    real = int(mask.any(1).sum())
    info = {"dp_size": ranks, "global_batch_size": real, "batch_num_tokens": 7, "loss_scale_factor": None}
    config = SimpleNamespace(global_batch_info=info)
    parts = [
        engine.policy_losses()["preflab_gradient"](
            old[i], pi[i], A[i], mask[i], "seq-mean-token-sum", config
        )[0]
        for i in torch.arange(6).split([1, 2, 3])
    ]
    torch.testing.assert_close(torch.stack(parts).sum() / ranks, whole, atol=1e-12, rtol=1e-12)


def test_rollout_weights_multiply_advantages():
    pi, _, old, mask, _ = batch_of(1)
    A, w = torch.randn(2, *pi.shape, dtype=torch.float64)
    for name in ("preflab_gradient", "preflab_importance"):
        loss = engine.policy_losses()[name]
        with_weights = loss(old, pi, A, mask, engine.MODE, None, w)[0]
        torch.testing.assert_close(with_weights, loss(old, pi, A * w, mask, engine.MODE)[0])
    with pytest.raises(ValueError, match="turn rollout_is off"):
        engine.policy_losses()["preflab_sppo"](old, pi, A, mask, engine.MODE, None, w)


@pytest.mark.parametrize("name", list(engine.policy_losses()))
def test_another_mode_of_aggregation_is_refused(name):
    pi, _, old, mask, _ = batch_of(0)
    with pytest.raises(ValueError, match="loss_agg_mode is 'token-mean': set actor_rollout_ref"):
        engine.policy_losses()[name](old, pi, pi, mask)


def test_what_cannot_be_known_is_refused():
    mask = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="global_batch_size is not known"):
        engine.response_weights(mask, {"dp_size": 2})
    with pytest.raises(ValueError, match="prompt 'b' has one response"):
        engine.leave_one_out_advantage(mask.double(), mask, np.array(["a", "b", "a"], dtype=object))
    with pytest.raises(ValueError, match="no uid"):
        engine.adv_leave_one_out(mask.double(), mask)
    with pytest.raises(ValueError, match="sppo_eta"):
        engine.policy_losses(sppo_eta=0)


# ---- verl's side ---------------------------------------------------------------------------------------------------


class StandInForVerl:
    """As much of verl 0.9.1 as our adapter touches: its registries, k1, and an actor loss on shifted rows."""

    def __init__(self):
        self.estimators, self.losses = {}, {}

    def register_adv_est(self, name):
        return lambda f: self.estimators.setdefault(name, f)

    def register_policy_loss(self, name):
        return lambda f: self.losses.setdefault(name, f)

    def get_adv_estimator_fn(self, name):
        return self.estimators[name]

    def get_policy_loss_fn(self, name):
        return self.losses[name]

    @staticmethod
    def kl_penalty(log_prob, ref_log_prob, kl_penalty):
        assert kl_penalty == "kl"
        return log_prob - ref_log_prob

    def ppo_loss(self, config, output, data):
        lengths = data["attention_mask"].sum(1)
        rows = output["log_probs"].split(lengths.tolist())
        mask = data["response_mask"].bool()
        log_prob = torch.zeros(mask.shape, dtype=torch.float64)
        log_prob = log_prob.masked_scatter(mask, torch.cat([row[:-1] for row in rows]))
        return self.losses[config.policy_loss.loss_mode](
            data["old_log_probs"], log_prob, data["advantages"], mask, config.loss_agg_mode, config
        )


class DictOfTensors(dict):
    def __init__(self, items, batch_size):
        super().__init__(items)
        assert all(len(x) == batch_size for x in items.values())

    def set_non_tensor(self, name, value):
        self[name] = value


@pytest.fixture
def stand_in(monkeypatch):
    verl = StandInForVerl()
    configs = SimpleNamespace(
        ActorConfig=lambda **fields: SimpleNamespace(global_batch_info={}, **fields),
        PolicyLossConfig=SimpleNamespace,
    )
    modules = {
        "verl": types.ModuleType("verl"),
        "verl.trainer": types.ModuleType("verl.trainer"),
        "verl.trainer.ppo": types.ModuleType("verl.trainer.ppo"),
        "verl.trainer.ppo.core_algos": verl,
        "verl.workers.utils.losses": verl,
        "verl.workers.config": configs,
        "tensordict": SimpleNamespace(TensorDict=DictOfTensors),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return verl


def test_the_adapter_hands_verl_what_it_expects(stand_in, monkeypatch):
    monkeypatch.delitem(sys.modules, "preflab.llm_bridge.engines.verl_plugin", raising=False)
    from preflab.llm_bridge.engines.verl_plugin import NAMES

    assert set(NAMES) == {*stand_in.estimators, *stand_in.losses}
    assert engine.register() == NAMES  # again, harmlessly
    trainer = engine.verl_trainer("preflab_to_go", "preflab_gradient", beta=BETA)
    assert conform(trainer, "kl_policy_gradient", beta=BETA, tolerance=EXACT, variance=False).ok
    with pytest.raises(ValueError, match="kl is 'both'"):
        engine.verl_trainer("preflab_to_go", "preflab_gradient", kl="both")


def test_without_verl_the_remedy_is_named(monkeypatch):
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install verl==0\.9\.1"):
        engine.register()


OURS = [
    *(
        (estimator, loss, "kl_policy_gradient", {"beta": BETA})
        for estimator in ("preflab_response", "preflab_to_go", "preflab_leave_one_out")
        for loss in ("preflab_gradient", "preflab_importance")
    ),
    ("preflab_nash_md", "preflab_gradient", "nash_md_pg", {"tau": BETA, "share": 0.25}),
    ("preflab_response", "preflab_sppo", "sppo", {"eta": 1.0}),
]

# estimator, loss, loss_agg_mode, where the penalty goes, which -> what it is; conformance's own words.
THEIRS = [
    ("preflab_response", "vanilla", "token-mean", "reward", "kl", "batch_tokens"),  # verl's default mode
    ("preflab_response", "vanilla", "token-mean", "loss", "low_var_kl", "k3_batch"),  # ... and its penalty
    ("preflab_response", "vanilla", "seq-mean-token-mean", "reward", "kl", "token_mean"),
    ("rloo", "vanilla", "seq-mean-token-sum", "loss", "low_var_kl", "kl_k3_token"),
    ("rloo", "vanilla", "seq-mean-token-sum", "loss", "k2", "kl_frozen"),
    ("rloo", "vanilla", "seq-mean-token-sum", "loss", "k3+", "kl_frozen"),
    ("preflab_response", "gpg", "seq-mean-token-sum", "loss", "kl", "kl_k1_loss"),
]


@pytest.mark.filterwarnings("ignore")  # of verl and Ray, when they are imported
def test_verl_itself_where_it_is_installed():
    verl = pytest.importorskip("verl", exc_type=ImportError)
    if verl.__version__ != "0.9.1":
        pytest.skip(f"the adapter is written for verl 0.9.1, this is {verl.__version__}")
    engine.register()
    for estimator, loss, target, parameters in OURS:
        score = {"nash_md_pg": lambda b: opponent_wins(b, 0.25), "sppo": lambda b: b.wins}
        trainer = engine.verl_trainer(
            estimator,
            loss,
            beta=0.0 if target == "sppo" else BETA,
            score=score.get(target, lambda b: b.reward),
            old="previous" if target == "sppo" else "policy",
        )
        report = conform(trainer, target, tolerance=EXACT, variance=False, **parameters)
        assert report.ok, report
    for estimator, loss, mode, where, penalty, cause in THEIRS:
        trainer = engine.verl_trainer(
            estimator, loss, beta=BETA, loss_agg_mode=mode, kl=where, kl_penalty=penalty
        )
        report = conform(trainer, "kl_policy_gradient", beta=BETA, variance=False)
        assert not report.ok
        assert report.cause_name == cause, report
    right = engine.verl_trainer("rloo", "vanilla", beta=BETA)  # verl's own, in the right mode
    assert conform(right, "kl_policy_gradient", beta=BETA, tolerance=EXACT, variance=False).ok


def test_the_plugin_is_there_when_verl_is_imported(monkeypatch):
    pytest.importorskip("verl", exc_type=ImportError)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "preflab.llm_bridge.engines.verl_plugin")
    code = (
        "import verl\nfrom verl.trainer.ppo import core_algos as c\n"
        "assert c.get_policy_loss_fn('preflab_gradient')\nassert c.get_adv_estimator_fn('preflab_to_go')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
