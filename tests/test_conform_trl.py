"""TRL under conformance: what its losses descend, what its trainers draw and score, as docs/conformance.md says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from preflab.llm_bridge.conformance import conform, trl_online
from preflab.llm_bridge.conformance.models import model_world
from preflab.llm_bridge.conformance.trainers import find_trainer, names, run_trainer
from preflab.llm_bridge.conformance.whole import declared
from preflab.llm_bridge.conformance.world import exact_world

RELEASE = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None


def of_release(wanted):
    def mark(test):
        for each in (
            pytest.mark.llm,
            pytest.mark.skipif(wanted != RELEASE, reason=f"of trl {wanted}; here: {RELEASE}"),
            pytest.mark.filterwarnings("ignore"),  # of trl, transformers and datasets
        ):
            test = each(test)
        return test

    return mark


# ---- without TRL -----------------------------------------------------------------------------------------------------


def test_names_are_listed_and_wrong_ones_are_told_the_right_ones():
    assert {"trl:rloo", "trl:nash_md", "trl:xpo[LOSS_TYPE]"} <= set(names())
    for wrong in ("trl:ppo", "trl:dpo", "trl:grpo", "trl:rloo[a b]"):
        with pytest.raises(ValueError, match="is not a trainer of TRL; there are trl:dpo"):
            find_trainer(wrong)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trl:rloo[clip]", "rloo or rloo.normalize.; got 'clip'"),
        ("trl:nash_md[sigmoid]", "trl:nash_md has no options; got 'sigmoid'"),
        ("trl:online_dpo[sigmoid,none]", "online_dpo takes one loss type and no options"),
        ("trl:online_dpo[hinge]", "OnlineDPOTrainer has no loss type 'hinge'; it has sigmoid and ipo"),
        ("trl:xpo[hinge]", "XPOTrainer has no loss type 'hinge'"),
        ("trl:dpo[cosine]", "no loss type 'cosine'"),
        ("trl:grpo[cosine]", "LOSS_TYPE of grpo, bnpo"),
    ],
)
def test_wrong_options_are_named(name, words):
    with pytest.raises(ValueError, match=words):
        find_trainer(name)


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("trl:dpo[sigmoid]", "1.16.0"),
        ("trl:grpo[dapo]", "1.16.0"),
        ("trl:rloo", "1.16.0"),
        ("trl:online_dpo", "1.16.0"),
        ("trl:nash_md", "1.13.0"),
        ("trl:xpo", "1.13.0"),
    ],
)
def test_without_trl_the_release_to_install_is_named(name, release, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for module in [m for m in sys.modules if m.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match=rf"cannot be imported .*; pip install trl=={release} datasets"):
        find_trainer(name)


def completions():
    world = exact_world(0)
    tokens = world.token_log_probabilities(torch.as_tensor(world.start))
    return world.completions(tokens, np.array([0, 7, 20, 29, 16, 3]))


def test_rows_are_what_they_were_padded_on_both_sides():
    c = completions()
    rows = trl_online.rows_of(c, c)
    n, P = len(c.ids), rows.context
    assert torch.equal(rows.ids[:n], rows.ids[n:])
    for i in range(n):
        first, length = int(c.mask[i].int().argmax()), int(c.mask[i].sum())
        at = slice(first, first + length)
        assert torch.equal(rows.ids[i, P : P + length], c.ids[i, at])
        assert torch.equal(rows.policy[i, P : P + length], c.policy[i, at])
        assert torch.equal(rows.reference[i, P : P + length], c.reference[i, at])
        assert torch.equal(rows.ids[i, P - first : P], c.ids[i, :first])
        assert rows.mask[i].tolist() == [0] * (P - first) + [1] * (first + length) + [0] * (
            rows.ids.shape[1] - P - length
        )
    prompts, answers = rows.lists()
    assert [len(y) for y in answers[:n]] == c.mask.sum(1).tolist()
    assert [len(x) for x in prompts[:n]] == c.mask.int().argmax(1).tolist()


def test_the_model_says_the_given_log_probabilities_and_no_others():
    c = completions()
    rows = trl_online.rows_of(c)
    leaf = rows.policy.clone().requires_grad_(True)
    model = trl_online.model_of(rows.ids, leaf)
    logits = model(rows.ids, attention_mask=rows.mask).logits
    said = logits.log_softmax(-1)[:, :-1].gather(2, rows.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(said, rows.policy[:, 1:], atol=1e-12, rtol=0)
    said.sum().backward()
    torch.testing.assert_close(leaf.grad[:, 1:], torch.ones_like(leaf[:, 1:]), atol=1e-9, rtol=0)
    assert not leaf.grad[:, 0].any()
    with pytest.raises(ValueError, match="asks for other tokens"):
        model(rows.ids.flip(0), attention_mask=rows.mask)


def test_a_world_that_trl_cannot_take_is_refused():
    from preflab.llm_bridge.conformance.trl_whole import TrlRloo

    with pytest.raises(ValueError, match=r"take models of transformers; this world is 'tiny': model_world"):
        TrlRloo(model_world("tiny"))


def test_roles_that_are_drawn_and_scored_are_roles():
    def said(**parts):
        return declared(types.SimpleNamespace(roles=("policy", "reference"), **parts))

    assert said().drawn == said().scored == ("policy", "reference")
    assert said(drawn=("policy",)).drawn == ("policy",)
    with pytest.raises(
        ValueError, match="draws or scores 'mixture', which is none of its roles policy, reference"
    ):
        said(scored=("mixture",))


def test_a_loss_normalised_by_the_deviation_of_its_batch_is_named():
    def loss(b):
        c = b.completions
        reward = b.reward - 0.1 * ((c.policy - c.reference) * c.mask).sum(1).detach()
        A = (reward - reward.mean()) / reward.std()
        return -(A * (c.policy * c.mask).sum(1)).mean()

    report = conform(loss, "kl_policy_gradient", beta=0.1, variance=False)
    assert report.cause_name == "batch_statistic", report
    assert {c.name: c.status for c in report.checks}["gradient"] == "pass"


# ---- losses ----------------------------------------------------------------------------------------------------------

# name -> verdict, cause, cosine of the expected gradient with the exact one
LOSSES_116 = {
    "trl:dpo[sigmoid]": ("conforms", None, 1.0),
    "trl:dpo[ipo]": ("another objective", "token_mean", 0.835),
    "trl:dpo[sigmoid_norm]": ("fails", "token_mean", 0.951),
    "trl:dpo[robust]": ("conforms", None, 1.0),
    "trl:dpo[hinge]": ("another objective", "hinge_sum", 0.945),
    "trl:dpo[exo_pair]": ("another objective", "exo_sum", 0.958),
    "trl:dpo[aot]": ("fails", None, 0.997),
    "trl:dpo[discopop]": ("fails", None, 0.840),
    "trl:dpo[sft]": ("another objective", "sft_batch", 0.561),
    "trl:grpo[grpo]": ("another objective", "std_mean_frozen", 0.577),
    "trl:grpo[grpo,none]": ("another objective", "group_mean_frozen", 0.875),
    "trl:grpo[dr_grpo,none]": ("another objective", "group_sum_frozen", 0.961),
    "trl:grpo[dapo,none]": ("another objective", "group_batch_frozen", 0.961),
    "trl:grpo[dr_grpo,none,k3]": ("another objective", "group_sum_k3_token", 0.957),
    "trl:grpo[dr_grpo,none,sequence]": ("another objective", "group_sum_k3_geometric", 0.962),
    "trl:rloo": ("conforms", None, 1.0),
    "trl:rloo[normalize]": ("fails", "batch_statistic", 1.0),
    "trl:online_dpo": ("conforms", None, 1.0),
    "trl:online_dpo[ipo]": ("conforms", None, 1.0),
}
LOSSES_113 = {
    "trl:nash_md": ("another objective", "kl_frozen", 0.983),
    "trl:xpo": ("conforms", None, 1.0),
    "trl:xpo[ipo]": ("another objective", "ipo_with_bonus", 0.838),
}


def found(name, **parameters):
    report = run_trainer(find_trainer(name, parameters=parameters))
    gradient = next(c for c in report.checks if c.name == "gradient")
    return report, gradient.numbers["cosine"]


def as_written(table, name):
    report, cosine = found(name)
    assert (report.verdict, report.cause_name) == table[name][:2], report
    assert cosine == pytest.approx(table[name][2], abs=6e-4)


@of_release("1.16.0")
@pytest.mark.parametrize("name", LOSSES_116)
def test_losses_of_1_16(name):
    as_written(LOSSES_116, name)


@of_release("1.13.0")
@pytest.mark.parametrize("name", LOSSES_113)
def test_losses_of_1_13(name):
    as_written(LOSSES_113, name)


@of_release("1.16.0")
def test_parameters_reach_the_trainer():
    for name, parameters in (("trl:rloo", {"beta": 0.3}), ("trl:online_dpo", {"beta": 0.3})):
        assert found(name, **parameters)[0].ok
    from preflab.llm_bridge.conformance.trl_online import trl_online_dpo, trl_rloo

    assert conform(trl_online_dpo("sigmoid", 0.3), "dpo", beta=0.1).cause_name == "beta_other"
    assert conform(trl_rloo(0.3), "kl_policy_gradient", beta=0.1).cause_name == "beta"


@of_release("1.16.0")
def test_a_bug_planted_in_trl_is_named(monkeypatch):
    """The control: what is run is TRL's own code, and a change of it is seen."""
    from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    right = OnlineDPOTrainer._forward

    def padded(self, model, ids, mask, ys, where, vision=None):
        return right(self, model, ids, mask, ys, where) * (ys != 2)  # the end token is not scored

    with monkeypatch.context() as m:
        m.setattr(OnlineDPOTrainer, "_forward", padded)
        assert found("trl:online_dpo")[0].cause_name == "no_end"
    penalised = RLOOTrainer._generate_and_score_completions

    def maximised(self, inputs):
        self.beta = -self.beta
        return penalised(self, inputs)

    monkeypatch.setattr(RLOOTrainer, "_generate_and_score_completions", maximised)
    assert found("trl:rloo")[0].cause_name == "kl_maximised"


@of_release("1.13.0")
def test_xpo_and_nash_md_take_their_parameters():
    assert found("trl:xpo", beta=0.3, alpha=0.002)[0].ok
    from preflab.llm_bridge.conformance.trl_online import trl_nash_md, trl_xpo

    assert conform(trl_xpo("sigmoid", 0.1, 0.0001), "xpo").cause_name == "bonus_beta"
    assert conform(trl_nash_md(0.1, 0.75), "nash_md_pg").cause_name is None  # two faults: share and the KL


# ---- whole trainers --------------------------------------------------------------------------------------------------


def llama():
    return model_world("llama", dtype="float32")


def held(name, world, level, draws=2000, **parts):
    from preflab.llm_bridge.conformance import trl_whole
    from preflab.llm_bridge.conformance.conform_trainer import conform_trainer

    made = type(name, (getattr(trl_whole, name),), parts)
    return conform_trainer(made, world=world, levels=[level], draws=draws)


def with_lora(world):
    from preflab.llm_bridge.conformance.trl_whole import with_lora as wrap

    return wrap(world)


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlRloo", "TrlGrpo", "TrlOnlineDpo", "TrlDpo"])
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_scores_of_1_16_on_relative_positions(name, kind):
    world = llama() if kind == "llama" else with_lora(llama())
    report = held(name, world, 3)
    assert report.ok, report


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlRloo", "TrlGrpo", "TrlOnlineDpo"])
def test_scores_of_left_padded_prompts_on_absolute_positions(name):
    report = held(name, model_world("gpt2", dtype="float32"), 3)
    assert report.cause_name == "positions", report


@of_release("1.16.0")
def test_dpo_pads_on_the_right_and_has_no_such_trouble():
    assert held("TrlDpo", model_world("gpt2", dtype="float32"), 3).ok


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlRloo", "TrlGrpo"])
def test_dropout_is_on_by_default_where_a_model_has_it(name):
    report = held(name, model_world("gpt2", dtype="float32"), 3, settings={"disable_dropout": False})
    assert report.cause_name == "dropout"


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlRloo", "TrlGrpo", "TrlOnlineDpo"])
def test_draws_of_1_16(name):
    for world in (llama(), with_lora(llama())):
        report = held(name, world, 2)
        assert report.ok, report
        assert "samples of the policy after training" in {c.name for c in report.checks}
    gpt2 = model_world(
        "gpt2", dtype="float32"
    )  # after training they are held to its own scores, which are others
    assert held(name, gpt2, 2, train=None).ok
    assert not held(name, gpt2, 2).ok


@of_release("1.16.0")
def test_another_temperature_than_declared_is_seen():
    """The control of the draws, and that RLOO scores the law that it samples."""
    report = held("TrlRloo", llama(), 2, draws=4000, settings={"temperature": 0.8})
    assert report.cause_name == "temperature", report
    assert held("TrlRloo", llama(), 3, temperature=0.8).ok
    assert held("TrlRloo", llama(), 3, settings={"temperature": 0.8}).cause_name is not None


@of_release("1.13.0")
def test_nash_md_draws_its_mixture_by_default_and_not_without_checkpointing():
    assert held("TrlNashMd", llama(), 2).ok
    report = held("TrlNashMd", llama(), 2, settings={"gradient_checkpointing": False})
    states = {c.name: c.status for c in report.checks}
    assert states == {"samples of the policy": "pass", "samples of the mixture": "fail"}
    assert next(c for c in report.checks if c.status == "fail").numbers["tv"] > 0.3


@of_release("1.13.0")
def test_nash_md_draws_its_mixture_at_positions_that_count_the_padding():
    report = held("TrlNashMd", model_world("gpt2", dtype="float32"), 2)
    states = {c.name: c.status for c in report.checks}
    assert states == {"samples of the policy": "pass", "samples of the mixture": "fail"}
    assert report.cause_name == "positions", report


@of_release("1.13.0")
@pytest.mark.parametrize("name", ["TrlNashMd", "TrlXpo"])
def test_scores_of_1_13_on_absolute_positions(name):
    report = held(name, model_world("gpt2", dtype="float32"), 3, rewards=None)
    assert report.cause_name == "positions", report


@of_release("1.13.0")
def test_one_cache_serves_both_models_of_the_mixture():
    """Why: after a step of n tokens the cache holds 2 n of them."""
    import transformers
    from trl.experimental.nash_md.nash_md_trainer import GeometricMixtureWrapper

    lengths = []

    class Seen(GeometricMixtureWrapper):
        def forward(self, *args, **named):
            out = super().forward(*args, **named)
            cache = named.get("past_key_values")
            lengths.append(None if cache is None else cache.get_seq_length())
            return out

    world = llama()
    for use_cache, wanted in ((True, [6, 8]), (False, [None, None])):
        lengths.clear()
        config = transformers.GenerationConfig(
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=True,
            eos_token_id=3,
            pad_token_id=3,
            use_cache=use_cache,
        )
        both = world.model("policy").eval(), world.model("reference").eval()
        Seen(*both, config, 0.3, torch.device("cpu")).generate(
            input_ids=torch.tensor([[1, 0, 2]]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            generation_config=config,
        )
        assert lengths == wanted


@of_release("1.13.0")
def test_with_an_adapter_the_reference_is_the_policy():
    world = with_lora(llama())
    report = held("TrlNashMd", world, 2)
    assert report.cause_name == "mixture_policy", report
    report = held("TrlXpo", world, 2)
    assert report.cause_name == "reference_is_policy", report
    for name in ("TrlNashMd", "TrlXpo"):  # scored with the adapter off, as it should be
        assert held(name, world, 3, rewards=None).ok


@of_release("1.13.0")
@pytest.mark.parametrize("name", ["TrlNashMd", "TrlXpo"])
def test_rewards_of_1_13(name):
    report = held(name, llama(), 3, own_pad=True)
    assert report.cause_name == "penalty_of_the_row", report
    shared = held(name, llama(), 3)
    assert Counter(c.status for c in shared.checks) == {"pass": 2, "fail": 1}


@of_release("1.13.0")
def test_nash_md_scores_another_law_than_it_draws_at_its_default_temperature():
    from trl.experimental.nash_md import NashMDConfig

    assert NashMDConfig(output_dir="unused", use_cpu=True, bf16=False).temperature == 0.9
    report = held("TrlNashMd", llama(), 3, temperature=0.9, rewards=None)
    assert report.cause_name == "temperature_missing", report
    assert held("TrlNashMd", llama(), 2, temperature=0.9).ok


# ---- training --------------------------------------------------------------------------------------------------------


def trained(name, level, world=None, runs=4, steps=8, **parts):
    from preflab.llm_bridge.conformance import trl_whole
    from preflab.llm_bridge.conformance.conform_trainer import conform_trainer

    made = type(name, (getattr(trl_whole, name),), parts)
    return conform_trainer(made, world=world or llama(), levels=[level], runs=runs, steps=steps)


def statuses(report):
    return {check.name: check.status for check in report.checks}


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlDpo", "TrlRloo", "TrlOnlineDpo"])
def test_runs_of_1_16_go_where_their_objective_leads(name):
    report = trained(name, 5)
    assert report.ok, report


@of_release("1.16.0")
def test_runs_of_other_objectives_do_not():
    assert trained("TrlDpo", 5, against="ipo").cause_name == "token_mean"
    assert not trained("TrlGrpo", 5).ok


@of_release("1.16.0")
@pytest.mark.parametrize("name", ["TrlDpo", "TrlGrpo", "TrlRloo", "TrlOnlineDpo"])
def test_what_must_not_change_a_run_of_1_16_does_not(name):
    report = trained(name, 6)
    assert report.ok, report
    assert statuses(report)["resume=True"] == "pass"  # bit for bit
    assert name == "TrlOnlineDpo" or statuses(report)["micro_batch=4"] == "pass"


@of_release("1.16.0")
def test_dpo_with_an_adapter_and_with_shuffled_rows():
    assert trained("TrlDpo", 6, with_lora(llama())).ok
    assert trained("TrlDpo", 6, settings={"train_sampling_strategy": "random"}).ok


@of_release("1.16.0")
def test_bnpo_depends_on_the_micro_batch():
    report = trained("TrlGrpo", 6, settings={"loss_type": "bnpo"})
    assert report.cause_name == "micro_batch", report
    assert statuses(report)["resume=True"] == "pass"


def bench_of(name, **parts):
    from preflab.llm_bridge.conformance import trl_whole
    from preflab.llm_bridge.conformance.invariance import Bench
    from preflab.llm_bridge.conformance.runs import problem_of

    made, world = type(name, (getattr(trl_whole, name),), parts), llama()
    trainer = made(world)
    return Bench(made, problem_of(world, trainer), declared(trainer), 1e-3, 0)


@of_release("1.16.0")
def test_the_last_micro_batch_of_an_epoch_counts_as_much_as_the_others():
    bench = bench_of("TrlDpo")
    task = bench.task(steps=1, batch=12, rows=12)
    seen = bench.run(task, {**bench.usual, "micro_batch": 5})  # 5, 5 and 2 rows
    assert not bench.same(seen, bench.run(task, bench.usual))
    rows = task.comparisons[:10] * 2 + task.comparisons[10:] * 5
    assert bench.same(seen, bench.run(replace(task, comparisons=rows, batch=30), bench.usual))


@of_release("1.16.0")
def test_a_split_that_the_trainer_cannot_make_is_refused():
    with pytest.raises(ValueError, match=r"steps of 12 rows cannot be made in micro-batches of 5: .* not 48"):
        trained(
            "TrlDpo",
            6,
            options={"micro_batch": (None, 5), "pad_to": (None,), "reference": ("live",)}
            | {"resume": (False,)},
        )


@of_release("1.16.0")
def test_bugs_planted_in_the_training_of_trl_are_named(monkeypatch):
    """The control: what trains is TRL's own trainer, and a change of it is seen and named."""
    from trl import DPOTrainer

    def planted(method, change, cause, seed=0):
        right = getattr(DPOTrainer, method)
        with monkeypatch.context() as m:
            m.setattr(DPOTrainer, method, lambda self, *a, **k: change(right, self, *a, **k))
            report = trained("TrlDpo", 6, model_world("llama", dtype="float32", seed=seed))
        assert report.cause_name == cause, report
        return {name for name, status in statuses(report).items() if status == "fail"}

    def added(right, self, *a, **k):
        self.current_gradient_accumulation_steps = 1
        return right(self, *a, **k)

    def forgotten(right, self, checkpoint):
        right(self, checkpoint)
        self.optimizer.state.clear()

    def of_the_policy(right, self, *a):
        kept, self.ref_model = self.ref_model, None
        found = right(self, *a)
        self.ref_model = kept
        return found

    # Each micro-batch has its own mean, in the right one, too (see the test of an epoch's last one): all are added.
    assert planted("training_step", added, "micro_means_added") == {"micro_batch=4"}
    assert planted("_load_optimizer_and_scheduler", forgotten, "resume_optimiser") == {"resume=True"}
    # Another world: what it computes it keeps, by the rows and the reference.
    failed = planted("_precompute_ref_logps", of_the_policy, "precomputed_is_policy", seed=3)
    assert failed == {"reference=precomputed"}


def step_gradient(name, steps):
    """The gradient that one micro-batch of `steps` leaves behind, and the loss that is told."""
    from preflab.llm_bridge.conformance import trl_whole

    made = type(name, (getattr(trl_whole, name),), {"settings": {"gradient_accumulation_steps": steps}})
    trainer = made(llama()).trainer
    trainer.current_gradient_accumulation_steps = steps  # as Trainer's loop says before each step
    if name in ("TrlNashMd", "TrlXpo"):  # whose rewards are a model's
        trainer._compute_rewards = lambda *_: (torch.zeros(3), torch.ones(3))
    torch.manual_seed(0)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(0)
    loss = trainer.training_step(trainer.model, batch)
    grads = [p.grad.ravel() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat(grads), float(loss)


def added_up(name):
    """Whether four micro-batches add what they should average; what is told is averaged in any case."""
    (one, loss), (quarter, told) = step_gradient(name, 1), step_gradient(name, 4)
    assert told == pytest.approx(loss / 4, rel=1e-5)
    ratio = float(quarter.norm() / one.norm())
    assert ratio == pytest.approx(1, rel=1e-5) or ratio == pytest.approx(0.25, rel=1e-5)
    return ratio > 0.5


@of_release("1.16.0")
def test_online_dpo_adds_the_gradients_of_micro_batches():
    assert not added_up("TrlDpo")
    assert added_up("TrlOnlineDpo")
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 120}
    report = trained("TrlOnlineDpo", 5, runs=5, settings=halves)
    assert report.cause_name == "pace", report


@of_release("1.13.0")
@pytest.mark.parametrize("name", ["TrlNashMd", "TrlXpo"])
def test_nash_md_and_xpo_add_the_gradients_of_micro_batches(name):
    assert added_up(name)


@pytest.mark.llm
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_done_to_a_model_of_a_world_does_not_change_the_next_one(kind, tmp_path):
    world = model_world(kind)
    first = world.model("reference")
    first.save_pretrained(tmp_path)  # writes its dtype into the configuration, as TRL's trainers do
    first.config.use_cache = False
    again = world.model("reference")
    assert again.config.use_cache
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
