"""Levels 5 and 6 of conformance: exact runs, sampled runs against them, invariances; bugs of loops are named."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.inpo import inpo_loss
from preflab.algorithms.ipo import ipo_loss
from preflab.llm_bridge.conformance import OBJECTIVES, TrainerError, conform_trainer, model_world
from preflab.llm_bridge.conformance import whole_names as names
from preflab.llm_bridge.conformance.invariance import Bench
from preflab.llm_bridge.conformance.models import mix
from preflab.llm_bridge.conformance.ours_loop import LoopTrainer, loop_trainer
from preflab.llm_bridge.conformance.planted_loop import PLANTED_LOOP
from preflab.llm_bridge.conformance.runs import (
    Deviations,
    Expected,
    Fault,
    Problem,
    Task,
    deviations,
    directions,
    divergence,
    exact_laws,
    exact_run,
    fault_names,
    faults,
    make_task,
    nearest_on,
    policy_law,
    problem_of,
    token_laws,
)
from preflab.llm_bridge.conformance.whole import declared
from typer.testing import CliRunner

from preflab import cli

LEVEL = {level: [n for n, bug in PLANTED_LOOP.items() if bug.level == level] for level in (2, 5, 6)}
QUICK = {"learns_from_the_losers", "minimises_the_reward", "trains_a_copy"}
DEFAULT = {  # the others with the slow tests
    "averages_micro_batches",
    "steps_after_every_micro_batch",
    "reference_of_the_next_row",
    "trains_with_dropout_on",
    "precomputes_the_policy",
    "reference_shares_the_weights",
    "loses_the_optimiser",
    "repeats_the_data_on_resume",
}
TRANSFORMER = {"trains_with_dropout_on"}  # tables have no dropout


def problem(name, kind="table", **parameters):
    objective = OBJECTIVES[name]
    return Problem(model_world(kind), objective, {**objective.parameters, **parameters})


# ---- exact runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "table"])
def test_laws_of_prefixes_are_the_second_route(kind):
    world = model_world(kind)
    with torch.no_grad():
        laws = exact_laws(world, world.model("policy").eval())
    np.testing.assert_allclose(laws.numpy(), world.laws("policy"), atol=1e-12)
    np.testing.assert_allclose(token_laws(world, world.law("policy")), world.laws("policy"), atol=1e-10)


def free(p, law):
    """An `Expected` over a free law of whole responses, whose logits take gradients; one token stands for all."""
    z = torch.tensor(law, requires_grad=True)
    lp, ref = z.log_softmax(1), torch.as_tensor(p.reference)
    now = lp.detach()

    def opponent(share):
        own = token_laws(p.world, now.numpy())
        return torch.as_tensor(p.world.law_of(mix(own, p.world.laws("reference"), share)))

    parts = lp[:, :, None], ref[:, :, None]
    return z, Expected(p, lp, ref, now, now, now, *parts, opponent)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_optimum_is_a_fixed_point_and_only_of_its_own_objective(name):
    p = problem(name)
    best = p.optimum()
    np.testing.assert_allclose(np.exp(best).sum(1), 1, atol=1e-9)

    def slope(loss, law, **changes):
        z, e = free(p, law)
        loss(e, **{**p.parameters, **changes}).backward()
        return float(z.grad.norm())

    start = slope(p.objective.loss, p.world.law("policy"))
    assert slope(p.objective.loss, best) < 1e-8 * start
    for fault in faults(p.objective, p.parameters):  # the control: faulty objectives have other fixed points
        if fault.loss is not None and fault.name != "kl_frozen":  # one token: nothing is frozen
            assert slope(fault.loss, best) > 1e-4 * start, fault.name
        if fault.changes:
            assert slope(p.objective.loss, best, **fault.changes) > 1e-5 * start, fault.cause


@pytest.mark.parametrize(
    ("name", "loss"), [("dpo", dpo_loss), ("ipo", ipo_loss), ("inpo", inpo_loss), ("online_dpo", dpo_loss)]
)
def test_expected_losses_of_comparisons_are_those_of_the_package(name, loss):
    """A second implementation: every ordered pair as a row of the package's loss."""
    p = problem(name)
    z, e = free(p, p.world.law("policy"))
    mine = p.objective.loss(e, **p.parameters)
    weight = (e.data() if p.objective.kind == "comparisons" else e.drawn(e.law)).reshape(-1)
    P, C = e.score.shape

    def rows(x):
        return torch.stack([x[:, :, None].expand(P, C, C), x[:, None, :].expand(P, C, C)], -1).reshape(-1, 2)

    given = [rows(e.score), rows(e.reference)] + ([rows(e.previous)] if name == "inpo" else [])
    theirs = loss(*given, torch.ones(P * C * C, dtype=torch.float64), weight, **p.parameters)
    a, b = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (mine, theirs))
    assert float((a - b).norm()) < 1e-12 * float(a.norm())


@pytest.mark.parametrize("name", ["kl_policy_gradient", "nash_md"])
def test_expected_gradients_of_draws_are_those_of_the_objective(name):
    p = problem(name)
    z, e = free(p, p.world.law("policy"))
    p.objective.loss(e, **p.parameters).backward()
    u = z.detach().clone().requires_grad_()
    lp = u.log_softmax(1)
    gain = e.reward if name == "kl_policy_gradient" else e.wins(e.opponent(p.parameters["share"]))
    weight = p.parameters[p.objective.temperature]
    (-(lp.exp() * (gain - weight * (lp - e.reference))).sum() / len(lp)).backward()
    assert float((u.grad - z.grad).norm()) < 1e-12 * float(u.grad.norm())


def test_comparisons_have_the_frequencies_that_the_expectation_has():
    p = problem("dpo")
    rows = p.comparisons(20000, 1)
    assert all(row.chosen != row.rejected for row in rows)
    weight = p.pairs(p.reference, equal=False)
    assert weight.sum() == pytest.approx(1)
    seen = np.zeros_like(weight)
    for row in rows:
        seen[p.place[row.prompt], p.number[row.chosen], p.number[row.rejected]] += 1 / len(rows)
    floor = 0.5 * np.sqrt(weight * (1 - weight) / len(rows)).sum()
    assert 0.5 * np.abs(seen - weight).sum() < floor + np.sqrt(np.log(1e4) / 2 / len(rows))
    exchanged = weight.transpose(0, 2, 1)  # the control
    assert 0.5 * np.abs(seen - exchanged).sum() > 5 * floor
    assert p.comparisons(5, 1) == rows[:5]


def test_an_exact_run_follows_its_objective_to_the_optimum():
    p = problem("dpo")
    task = make_task(p, 0, steps=70, batch=1, stride=0.3)
    far = [divergence(p.optimum(), law) for law in exact_run(p, task)]
    assert far[-1] < 0.05 * far[0]
    assert all(b < a for a, b in pairwise(far))
    wrong = exact_run(p, task, Fault("x", "", changes={"beta": 2.0}))[-1]  # the control
    assert divergence(p.optimum(), wrong) > 3 * far[-1]


def test_the_judge_of_a_task_answers_about_its_completions_alone():
    p = problem("nash_md")
    task = make_task(p, 0)
    x, (a, b) = p.world.prompts[0], p.world.completions[:2]
    answers = task.preference([x, x], [a, b], [b, a])
    assert answers.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="asked about the tokens"):
        task.preference([x], [(*a, 9)], [b])
    assert make_task(problem("kl_policy_gradient"), 0).reward([x], [a]).shape == (1,)
    assert task.comparisons == ()
    assert make_task(problem("dpo"), 0).prompts == ()


def test_the_learning_rate_is_a_stride_in_log_probabilities():
    for kind in ("table", "tiny"):
        p = problem("ipo", kind)
        for optimiser in ("sgd", "adamw"):
            before, after = exact_run(p, make_task(p, 0, optimiser=optimiser, stride=0.01), steps=1)
            assert np.sqrt(np.mean((after - before) ** 2)) == pytest.approx(0.01, rel=0.1)


# ---- the test of runs ------------------------------------------------------------------------------------------------


def test_t_intervals_are_calibrated_and_a_fault_just_above_them_is_found():
    n = 20000
    noise = Deviations(("a",) * n, np.random.default_rng(0).normal(size=(10, n)))
    for level in (0.001, 0.01, 0.05, 0.5):
        assert abs((noise.p_values <= level).mean() - level) < 4 * np.sqrt(level / n)
    limit = noise.half_width(0.001 * n)  # of each alone
    above = Deviations(noise.names, noise.coordinates + 2 * limit)
    assert (above.p_values < 0.001).mean() > 0.99
    below = Deviations(noise.names, noise.coordinates + limit / 10)  # the control
    assert (below.p_values < 0.001).mean() < 0.01


def test_deviations_are_coordinates_along_the_faults():
    p = problem("dpo")
    task = make_task(p, 0)
    along = directions(p, task)
    assert next(iter(along)) == "pace"
    centre = exact_run(p, task)[-1]
    key = next(name for name in along if "labels" in name)
    rows = np.stack([centre + along[key] * s for s in (0.9, 1.0, 1.1)])
    found = deviations(rows, centre, along)
    k = list(along).index(key)
    np.testing.assert_allclose(found.coordinates[:, k], [0.9, 1.0, 1.1])
    assert set(fault_names("nash_md")) >= {"pace", "mixture_swapped", "kl_joint", "tau_other"}


def test_the_nearest_point_of_a_run_lies_between_its_steps():
    run = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    steps, point = nearest_on(run, np.array([1.5, 0.5]))
    assert steps == pytest.approx(1.25)
    np.testing.assert_allclose(point, [1.0, 0.5])
    assert nearest_on(run, np.array([-1.0, 0.0]))[0] == 0


# ---- trainers --------------------------------------------------------------------------------------------------------


def test_our_loop_passes_every_level():
    report = conform_trainer(loop_trainer("dpo"), world="table", draws=200, runs=5, steps=8)
    assert report.ok, str(report)
    assert {c.level for c in report.checks} == {2, 3, 5, 6}
    (run,) = [c for c in report.checks if c.level == 5]
    assert run.numbers["kl_runs"] < 0.8 * run.numbers["kl_start"]
    resumed = [c for c in report.checks if c.name == "resume=True"]
    assert "bit for bit" in resumed[0].text
    assert "samples of the policy after training" in {c.name for c in report.checks}


@pytest.mark.parametrize("name", ["inpo"])
def test_our_loop_passes_invariances_on_a_transformer(name):
    report = conform_trainer(loop_trainer(name), levels=(6,))
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["tiny", "table"])
def test_our_loop_passes_with_every_objective(name, kind):
    for seed in range(2):
        report = conform_trainer(loop_trainer(name), world=kind, levels=(5, 6), seed=seed)
        assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "table"])
def test_our_loop_passes_with_the_adapter_off_as_its_reference(kind):
    report = conform_trainer(loop_trainer("dpo", adapter=True), world=kind)
    assert report.ok, str(report)


@pytest.mark.llm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_our_loop_passes_on_models_of_transformers(kind):
    report = conform_trainer(loop_trainer("dpo"), world=kind, draws=500, runs=6)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DEFAULT)) for n in LEVEL[6]]
)
def test_a_planted_bug_that_changes_what_is_learnt_is_named(name):
    bug = PLANTED_LOOP[name]
    report = conform_trainer(
        bug.make, name=name, levels=(3, 6), world="tiny" if name in TRANSFORMER else "table"
    )
    assert not report.ok
    assert report.cause_name == bug.cause, str(report)
    assert report.cause in str(report)
    assert {c.level for c in report.checks if c.status == "fail"} == {6}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in LEVEL[5]]
)
def test_a_planted_bug_of_a_run_is_named(name):
    bug = PLANTED_LOOP[name]
    size = {"runs": 5, "steps": 8} if name in QUICK else {}
    report = conform_trainer(bug.make, name=name, levels=(5,), world="table", **size)
    assert not report.ok
    assert report.cause_name == bug.cause, str(report)
    assert report.cause in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVEL[5])
def test_nothing_but_the_run_shows_it(name):
    report = conform_trainer(PLANTED_LOOP[name].make, name=name, levels=(3, 6), world="table")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", LEVEL[2])
def test_a_planted_bug_of_samples_after_training_is_named(name):
    bug = PLANTED_LOOP[name]
    report = conform_trainer(bug.make, name=name, levels=(2, 3), world="table")
    assert report.cause_name == bug.cause, str(report)
    assert [c.name for c in report.checks if c.status == "fail"] == ["samples of the policy after training"]


@pytest.mark.slow
def test_an_objective_that_the_catalogue_does_not_have_gets_no_name():
    class Ranked(LoopTrainer):
        """Rows of one prompt alone."""

        def records(self, task, reference):
            first = task.comparisons[0].prompt
            rows = [r for r in task.comparisons if r.prompt == first]
            return super().records(replace(task, comparisons=tuple(rows)), reference)

    report = conform_trainer(Ranked, levels=(5,), world="table", runs=6)
    assert not report.ok
    assert report.cause_name is None
    assert report.nearest


class Plain:
    """No torch, no loop: a table's gradient steps written out, which knows adamw by no name."""

    against = "dpo"
    optimisers = ("sgd",)
    schedules = ("constant",)
    options = {"fancy": (False, True)}  # noqa: RUF012

    def __init__(self, world):
        self.inner = loop_trainer("dpo")(world)

    def train(self, task, seed, fancy):
        task = replace(task, learning_rate=task.learning_rate * (1.5 if fancy else 1))
        self.inner.train(task, seed, None, "live", False)

    def log_probabilities(self, prompts, completions, role):
        return self.inner.log_probabilities(prompts, completions, role, "right")


def test_an_option_of_the_adapters_own_is_compared_too():
    report = conform_trainer(Plain, levels=(6,), world="table")
    assert report.cause_name == "option"
    assert report.cause == "the option fancy=True changes what is learnt"
    bench = Bench(Plain, problem("dpo"), declared(Plain(model_world("table"))), 1e-7, 0)
    assert bench.offered("optimisers", "adamw") == "sgd"
    assert bench.offered("schedules", "linear") == "constant"


def test_a_run_that_diverges_says_so():
    class Diverges(Plain):
        def log_probabilities(self, prompts, completions, role):
            return np.full(len(prompts), np.nan)

    report = conform_trainer(Diverges, levels=(5,), world="table", runs=3, steps=2)
    assert report.cause_name == "not_finite"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"against": "ppo"}, "the trainer is against 'ppo'; objectives of runs are dpo, ipo"),
        ({"parameters": {"gamma": 1.0}}, "dpo has no parameter 'gamma'; it takes beta"),
    ],
)
def test_what_a_trainer_says_of_itself_is_checked(attributes, message):
    with pytest.raises(ValueError, match=message):
        problem_of(model_world("table"), type("Mine", (Plain,), attributes)(model_world("table")))


def test_an_object_cannot_be_trained_afresh():
    with pytest.raises(ValueError, match="give the adapter's class"):
        conform_trainer(Plain(model_world("table")), levels=(6,), world="table")


def test_what_a_trainer_raises_is_said_with_its_method():
    class Raises(Plain):
        def train(self, task, seed):
            raise RuntimeError("out of memory")

    with pytest.raises(TrainerError, match="the trainer's train raised RuntimeError: out of memory"):
        conform_trainer(Raises, levels=(6,), world="table")


def test_a_policy_may_start_as_the_reference():
    world = model_world("table").at_reference()
    np.testing.assert_array_equal(world.law("policy"), world.law("reference"))
    trainer = loop_trainer("dpo")(world)
    np.testing.assert_allclose(policy_law(trainer, world), world.law("reference"), atol=1e-12)
    p = problem_of(world, trainer)
    trainer.train(make_task(p, 0, steps=2, batch=6), 0, None, "live", False)
    assert np.abs(policy_law(trainer, world) - world.law("reference")).max() > 1e-3
    np.testing.assert_allclose(policy_law(trainer, world, "reference"), world.law("reference"), atol=1e-12)


def test_a_linear_schedule_reaches_zero_after_the_last_step():
    p = problem("dpo")
    task = make_task(p, 0, steps=3, schedule="linear")
    trainer = loop_trainer("dpo")(p.world)
    rows = replace(task, batch=len(task.comparisons))
    trainer.train(rows, 0, None, "live", False)
    settings = trainer.settings(task, 0, None)
    assert [settings.rate(s) / task.learning_rate for s in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert isinstance(task, Task)


# ---- names and the command -------------------------------------------------------------------------------------------


def test_names_of_whole_trainers():
    assert names.find_whole("dpo") is None
    assert names.find_whole("trl:dpo[ipo]") is None
    assert names.find_whole("planted:dpo_token_mean") is None
    assert names.find_whole("planted:draws_colder") is names.PLANTED_TRAINERS["draws_colder"].make
    assert names.find_whole("preflab:loop[ipo]").against == "ipo"
    with pytest.raises(ValueError, match="did you mean draws_colder"):
        names.find_whole("planted:draws_coldr")
    with pytest.raises(ValueError, match="did you mean policy"):
        names.find_whole("preflab:polic")
    with pytest.raises(ValueError, match="there are policy, adapter"):
        names.find_whole("preflab:xyz")
    assert names.read_levels(None) is None
    assert names.read_levels("2, 3") == (2, 3)
    with pytest.raises(ValueError, match="--levels 'two' is no list of numbers"):
        names.read_levels("two")


def call(*arguments):
    return CliRunner().invoke(cli.app, ["conform", *map(str, arguments)])


def test_the_command_takes_whole_trainers(tmp_path, monkeypatch):
    (tmp_path / "my_whole.py").write_text(
        "from preflab.llm_bridge.conformance.planted_whole import PLANTED_WHOLE\n"
        "Adapter = PLANTED_WHOLE['scores_the_prompt'].make\n"
    )
    monkeypatch.chdir(tmp_path)
    done = call("my_whole:Adapter", "--levels", "3", "--json")
    assert done.exit_code == cli.FAILED, done.output
    assert json.loads(done.stdout)["cause_name"] == "prompt"
    done = call("preflab:precomputed", "--world", "table", "--seed", 1)
    assert done.exit_code == cli.OK, done.output
    assert "preflab:precomputed against enumeration on the table world: conforms" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preflab:policy", "--against", "dpo"], "is a whole trainer, which says itself what it is against"),
        (["preflab:policy", "--levels", "7"], "there is no level 7"),
        (["preflab:policy", "--levels", "x"], "is no list of numbers"),
        (["preflab:policy", "--draws", "3"], "draws is 3"),
        (["preflab:policy", "--world", "sun"], "there is no world 'sun'"),
        (["dpo", "--levels", "2"], "--levels is for whole trainers, and dpo is a loss"),
        (["dpo", "--runs", "2"], "--runs is for whole trainers"),
    ],
)
def test_wrong_usage_exits_2(arguments, message):
    done = call(*arguments)
    assert done.exit_code == cli.USAGE, done.output
    assert message in done.stderr


def test_the_list_has_whole_trainers():
    listed = json.loads(call("--list", "--json").stdout)["whole"]
    assert listed == names.whole_names()
    assert {"preflab:loop[nash_md]", "planted:draws_colder", "planted:loses_the_optimiser"} <= set(listed)
