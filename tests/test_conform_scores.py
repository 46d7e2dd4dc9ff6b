"""Level 3 of conformance: log-probabilities and rewards by a second route, and the names of what is wrong with them."""

from __future__ import annotations

import importlib.util
from types import MappingProxyType

import numpy as np
import pytest
import torch
from preflab.llm_bridge.conformance import (
    TrainerError,
    assert_trainer_conforms,
    conform_trainer,
    is_whole,
    model_world,
)
from preflab.llm_bridge.conformance.models import LAYOUTS, adapted
from preflab.llm_bridge.conformance.ours_whole import PolicyTrainer
from preflab.llm_bridge.conformance.planted_whole import PLANTED_WHOLE
from preflab.llm_bridge.conformance.whole import grid, variants

SCORES = [name for name, bug in PLANTED_WHOLE.items() if bug.level == 3]
NONE = MappingProxyType({})


class Scores(PolicyTrainer):
    roles = ("policy",)
    options = NONE
    sample = None
    rewards = None

    def log_probabilities(self, prompts, completions, role):
        return super().log_probabilities(prompts, completions, role, "right")


# ---- the world ----------------------------------------------------------------------------------------------------


def test_the_second_route_is_a_bare_call_of_the_model():
    world = model_world("tiny")
    model = world.model("policy").eval()
    i, c = 1, world.completions.index((0, 2, 3))
    text = torch.tensor([[*world.prompts[i], 0, 2, 3]])
    with torch.no_grad():
        logits = model(text, torch.ones_like(text), torch.arange(text.shape[1])[None]).logits[0]
    n = len(world.prompts[i])
    expected = sum(logits[n - 1 + t].log_softmax(-1)[y].item() for t, y in enumerate((0, 2, 3)))
    assert world.law("policy")[i, c] == pytest.approx(expected, abs=1e-12)


def test_every_faulty_layout_reads_a_padded_prompt_otherwise():
    world = model_world("tiny")
    x, y = world.prompts[0], world.completions[-1]
    right = world.row_logits("policy", x, y)
    for layout in LAYOUTS[1:]:
        prompt = world.prompts[1] if layout == "mask_by_id" else x  # the prompt with an end token in it
        plain = world.row_logits("policy", prompt, y) if layout == "mask_by_id" else right
        assert np.abs(world.row_logits("policy", prompt, y, layout, 3) - plain).max() > 1e-3, layout
    np.testing.assert_array_equal(world.row_logits("policy", x, y, "positions", 0), right)
    with pytest.raises(ValueError, match="there is no layout 'diagonal'"):
        world.row_logits("policy", x, y, "diagonal", 1)


def test_texts_are_read_by_the_longest_match():
    world = model_world("tiny")
    assert world.decode([0, 1, 3]) == "ab<end>"
    assert world.encode("ab<end>") == [2, 3]
    assert world.encode("ba") == [1, 0]
    with pytest.raises(ValueError, match="no token begins at 'c'"):
        world.encode("ac")


def test_an_adapter_is_one_model_or_the_other():
    module = adapted(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    x = torch.ones(1, 1)
    on = module(x)
    with module.disable_adapter():
        assert module(x) != on
    assert module(x) == on
    assert not any(p.requires_grad for p in module.off.parameters())


def test_the_grid_has_every_row_once_in_batches_of_all_prompts():
    world = model_world("tiny")
    rows = grid(world)
    assert len(set(rows)) == len(rows) == 3 * 40
    for k in range(0, len(rows), 3):
        assert [i for i, _ in rows[k : k + 3]] == [0, 1, 2]
    lengths = {tuple(len(world.completions[c]) for _, c in rows[k : k + 3]) for k in range(0, len(rows), 3)}
    assert any(len(set(x)) > 1 for x in lengths)


# ---- trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_a_planted_bug_of_scores_or_rewards_is_named(name):
    bug = PLANTED_WHOLE[name]
    report = conform_trainer(bug.make, name=name, levels=(3,))
    assert not report.ok
    assert report.cause_name == bug.cause, str(report)
    assert report.cause in str(report)
    failed = [c for c in report.checks if c.status == "fail"]
    assert len(failed) == 1


def test_two_thirds_of_the_planted_bugs_do_not_share_a_cause():
    causes = [(bug.level, bug.cause) for bug in PLANTED_WHOLE.values()]
    assert len(PLANTED_WHOLE) >= 50
    assert len(set(causes)) >= 2 / 3 * len(causes)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tolerance_follows_the_number_format(dtype):
    world = model_world("tiny", dtype=dtype)
    assert conform_trainer(Scores, world=world).ok
    report = conform_trainer(Scores, world=world, tolerance=1e-10)
    assert report.cause_name == "low_precision"
    assert dtype in report.cause


def test_a_fault_at_the_tolerance_is_the_limit():
    def off(by):
        class Off(Scores):
            def log_probabilities(self, prompts, completions, role):
                return super().log_probabilities(prompts, completions, role) + by

        return Off

    assert conform_trainer(off(0.9e-8)).ok
    report = conform_trainer(off(1.1e-8))
    assert not report.ok
    assert report.cause_name == "low_precision"
    report = conform_trainer(off(1.0))
    assert report.cause_name is None
    assert "none of the catalogue's" in report.cause


def test_token_log_probabilities_are_summed():
    class Tokens(Scores):
        def log_probabilities(self, prompts, completions, role):
            with torch.no_grad():
                return self.policy.token_log_probabilities(prompts, completions)[0]

    assert conform_trainer(Tokens).ok


def test_a_trainer_may_have_many_faults_and_the_first_is_named():
    class Two(PolicyTrainer):
        options = NONE
        sample = None

        def log_probabilities(self, prompts, completions, role):
            values = super().log_probabilities(prompts, completions, role, "right")
            return values / torch.tensor([len(y) for y in completions]) if role == "reference" else values

        def rewards(self, prompts, completions, scores, penalty):
            return super().rewards(prompts, completions, scores, 0.0)

    report = conform_trainer(Two)
    assert [c.status for c in report.checks] == ["pass", "fail", "pass", "fail"]
    assert report.cause_name == "token_mean"


def test_assert_trainer_conforms_fails_with_the_report():
    assert assert_trainer_conforms(Scores).ok
    with pytest.raises(AssertionError, match="averaged over tokens"):
        assert_trainer_conforms(PLANTED_WHOLE["scores_by_the_mean"].make)


# ---- bad input ------------------------------------------------------------------------------------------------------


def with_attributes(**attributes):
    return type("Mine", (Scores,), attributes)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Scores, {"levels": (4,)}, "there is no level 4 for a whole trainer"),
        (Scores, {"levels": (2,)}, "level 2 needs the method sample"),
        (Scores, {"levels": (5,)}, "level 5 needs the method train and log_probabilities"),
        (Scores, {"alpha": 0.7}, "alpha is 0.7"),
        (Scores, {"draws": 10}, "draws is 10"),
        (Scores, {"runs": 1}, "there are 1 runs"),
        (Scores, {"world": "moon"}, "there is no world 'moon'"),
        (with_attributes(roles=("teacher",)), {}, "the trainer has the role 'teacher'"),
        (with_attributes(roles=("mixture",), share=None), {}, "the trainer's share is None"),
        (with_attributes(mixture="words"), {}, "the trainer's mixture is 'words'"),
        (with_attributes(options={"side": ()}), {}, "the trainer's option 'side' has no values"),
    ],
)
def test_wrong_use_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        conform_trainer(make, **options)


def raising(method, function):
    return type("Mine", (Scores,), {method: function})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda world: object(), "the adapter has none of the methods log_probabilities, sample"),
        (lambda world: 1 / 0, "the trainer's constructor raised ZeroDivisionError"),
        (
            raising("log_probabilities", lambda self, x, y, role: x.wrong),
            "log_probabilities raised AttributeError",
        ),
        (
            raising("log_probabilities", lambda self, x, y, role: [0.0]),
            r"log_probabilities gave \(1,\) for 2",
        ),
        (
            raising("rewards", lambda self, x, y, scores, penalty: [0.0]),
            r"rewards gave \(1,\) for 2 completions",
        ),
        (raising("sample", lambda self, x, horizon, seed, role: [3]), "sample must give a list of token ids"),
        (
            raising("sample", lambda self, x, horizon, seed, role: [[3]]),
            r"sample gave 1 completions for \d+ prompts",
        ),
    ],
)
def test_a_trainer_that_breaks_says_where(make, message):
    with pytest.raises(TrainerError, match=message):
        conform_trainer(make, world="table", draws=100)


def test_what_is_a_whole_trainer():
    assert is_whole(PolicyTrainer)
    assert is_whole(lambda world: PolicyTrainer(world))
    assert not is_whole(lambda batch: 0.0)
    assert not is_whole(print)
    assert not is_whole(type("Nothing", (), {}))


def test_options_are_tried_one_at_a_time_and_only_where_the_method_takes_them():
    trainer = PolicyTrainer(model_world("table"))
    assert variants(trainer, "log_probabilities") == [{"side": "right"}, {"side": "left"}]
    assert variants(trainer, "sample") == [{"cached": True}, {"cached": False}]
    assert variants(trainer, "sample", names=["side"]) == [{"cached": True}]


@pytest.mark.llm
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["scores_at_positions_of_the_row", "scores_with_a_mask_of_ids"])
def test_a_planted_bug_is_named_on_a_model_of_transformers(name):
    report = conform_trainer(PLANTED_WHOLE[name].make, levels=(3,), world="gpt2")
    assert report.cause_name == PLANTED_WHOLE[name].cause, str(report)
