"""Checkpoints: N steps, a kill and M steps are N + M steps, bit for bit; what does not fit is refused with its name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import checkpoints
from preflab.llm_bridge.training.loop import TrainingStopped, train
from preflab.llm_bridge.training.settings import TrainSettings
from safetensors.torch import load_file

END, V = 2, 5
PROMPTS = [[3], [4, 1], [0, 1, 3]]
SETTINGS = TrainSettings(
    steps=10,
    batch=4,
    horizon=3,
    round_batches=3,
    epochs=2,
    learning_rate=1e-2,
    device="cpu",
    checkpoint_every=5,
    sample_prompts=2,
    log_with=None,
)


def policy(seed=0, **options):
    shape = {"vocabulary": V, "context": 16, "width": 8, "layers": 1, **options}
    model = tiny_model(**shape, seed=seed)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=shape["vocabulary"], context=16)


class LengthJudge:
    name = "length"

    def rewards(self, prompts, completions):
        return np.array([float(len(y)) for y in completions])

    def preferences(self, prompts, first, second):
        return 1 / (1 + np.exp(self.rewards(prompts, second) - self.rewards(prompts, first)))


def records(n=7):
    rng = np.random.default_rng(0)
    texts = [tuple(rng.integers(0, V, size=rng.integers(1, 4)).tolist()) for _ in range(3 * n)]
    return [
        SimpleNamespace(prompt=x, chosen=y, rejected=z, p_chosen=0.8, ref_logp=None)
        for x, y, z in zip(texts[:n], texts[n : 2 * n], texts[2 * n :], strict=True)
    ]


def run(method, folder, model=None, settings=SETTINGS, **more):
    data = {"records": records()} if method == "dpo" else {"prompts": PROMPTS, "judge": LengthJudge()}
    return train(
        policy() if model is None else model, method, folder=folder, settings=settings, **{**data, **more}
    )


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def last(folder):
    return checkpoints.last_checkpoint(folder / "checkpoints")


def assert_equal_runs(one, other):
    """All files of both folders, but for the seconds."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(one / name) == lines(other / name)
    assert json.loads((one / "run.json").read_text()) == json.loads((other / "run.json").read_text())
    assert last(one).name == last(other).name
    for name in ("weights", "optimiser"):
        ours, theirs = (load_file(last(folder) / f"{name}.safetensors") for folder in (one, other))
        assert ours.keys() == theirs.keys()
        assert len(ours)
        for key in ours:
            assert torch.equal(ours[key], theirs[key])
    assert (last(one) / "state.json").read_text() == (last(other) / "state.json").read_text()
    rounds = [{p.name: p.read_text() for p in (f / "records").glob("*")} for f in (one, other)]
    assert rounds[0] == rounds[1]


class Killed(Exception):
    pass


def kill_at(step):
    def hook(row):
        if row["step"] == step:
            raise Killed

    return hook


METHODS = [
    "dpo",
    "nash_md",
    "kl_policy_gradient",
    "inpo",
    "nash_ema",
    "vpo",
]  # inpo: step 5 is in the middle of a round


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_the_same_run_bit_for_bit(method, tmp_path):
    whole = run(method, tmp_path / "whole")
    with pytest.raises(Killed):
        run(method, tmp_path / "parts", on_step=kill_at(7))
    assert last(tmp_path / "parts").name == "step_000005"
    assert len(lines(tmp_path / "parts" / "metrics.jsonl")) == 7
    resumed = run(method, tmp_path / "parts", resume=True)
    assert [row["step"] for row in resumed.metrics] == [6, 7, 8, 9, 10]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(whole.policy.model.parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.step == resumed.step == 10


@pytest.mark.parametrize("method", ["dpo", "inpo", "nash_ema"])
def test_more_steps_later_are_one_run(method, tmp_path):
    run(method, tmp_path / "whole")
    run(method, tmp_path / "parts", settings=replace(SETTINGS, steps=4))
    run(method, tmp_path / "parts", resume=True)
    run(method, tmp_path / "parts", resume=True)  # nothing is left to do
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_another_seed_would_not_be_the_same_run(tmp_path):
    run("nash_md", tmp_path / "one")
    run("nash_md", tmp_path / "two", settings=replace(SETTINGS, seed=1))
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["save_file", "write_json"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(name, tmp_path, monkeypatch):
    """After the weights and before the optimiser; and after the folder's rename, before last.json."""
    run("nash_ema", tmp_path / "whole")
    with monkeypatch.context() as patch:
        if name == "write_json":
            plain = checkpoints.write_json

            def write(path, data):
                if path.name == "last.json" and data["step"] == 10:
                    raise Killed
                plain(path, data)

            patch.setattr(checkpoints, "write_json", write)
        else:
            import safetensors.torch as st

            calls = []

            def save(tensors, path):
                calls.append(path)
                if len(calls) == 4:
                    raise Killed
                saved(tensors, path)

            saved = st.save_file
            patch.setattr(st, "save_file", save)
        with pytest.raises(Killed):
            run("nash_ema", tmp_path / "parts")
    assert last(tmp_path / "parts").name == "step_000005"
    run("nash_ema", tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


def test_a_process_that_is_killed_by_the_system_is_resumed(tmp_path):
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parents[1] / "src")!r}, {str(Path(__file__).parent)!r}]
import test_train_resume as t
def hook(row):
    if row["step"] == 8:
        os.kill(os.getpid(), signal.SIGKILL)
t.run("inpo", {str(tmp_path / "parts")!r}, on_step=hook)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr.decode()
    run("inpo", tmp_path / "whole")
    run("inpo", tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run("kl_policy_gradient", tmp_path, settings=replace(SETTINGS, checkpoint_every=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "last.json",
        "step_000008",
        "step_000010",
    ]


def test_half_a_line_is_cut_off_when_a_run_goes_on(tmp_path):
    run("dpo", tmp_path / "whole")
    with pytest.raises(Killed):
        run("dpo", tmp_path / "parts", on_step=kill_at(6))
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    run("dpo", tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    run("nash_md", tmp_path / "whole")
    with pytest.raises(Killed):
        run("nash_md", tmp_path / "parts", on_step=kill_at(3))
    run("nash_md", tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "nash_md"
    run("nash_md", folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "kl_policy_gradient"}, "method = 'nash_md', and now it is 'kl_policy_gradient'"),
        ({"parameters": {"tau": 0.3}}, r"parameters = .*'tau': 0.1"),
        ({"prompts": PROMPTS[:2]}, "prompts or records are not those"),
        ({"model": policy(seed=1)}, "weights are not those that the run began with"),
        ({"model": policy(width=16)}, r"weights = \{'trainable'"),
        ({"settings": replace(SETTINGS, learning_rate=0.5)}, "learning_rate = 0.01, and now it is 0.5"),
        ({"settings": replace(SETTINGS, seed=3)}, "seed = 0, and now it is 3"),
        ({"resume": False}, "holds a run already"),
    ],
)
def test_another_run_is_not_continued(finished, changed, message):
    call = {"method": "nash_md", "resume": True, **changed}
    with pytest.raises(ValueError, match=message):
        run(call.pop("method"), finished, **call)


def test_a_schedule_to_the_end_fixes_the_number_of_steps(tmp_path):
    fixed = replace(SETTINGS, schedule="cosine", steps=3)
    run("dpo", tmp_path, settings=fixed)
    with pytest.raises(ValueError, match="steps = 3, and now it is 10"):
        run("dpo", tmp_path, resume=True, settings=replace(fixed, steps=10))


def model_tensors(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (policy(width=16), r"tokens.weight is \(5, 16\) torch.float64 in the model and \(5, 8\)"),
        (policy(layers=2), "the model has a weight 'blocks.1.inward.weight' and the checkpoint has none"),
        (policy(dtype="float32"), "tokens.weight is .* torch.float32 in the model"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(finished, other, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.load_checkpoint(last(finished), model_tensors(other.model))


def test_a_checkpoint_with_more_weights_is_refused(finished):
    few = model_tensors(policy().model)
    del few["head.bias"]
    with pytest.raises(ValueError, match=r"the checkpoint has a weight 'head.bias' and the model has none"):
        checkpoints.load_checkpoint(last(finished), few)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    run("dpo", tmp_path / "run")
    folder = last(tmp_path / "run")
    expected = model_tensors(policy().model)
    (folder / "optimiser.safetensors").rename(folder / "optimiser.pt")
    with pytest.raises(FileNotFoundError, match=r"holds optimiser.pt, and pickles are never loaded"):
        checkpoints.load_checkpoint(folder, expected)
    (folder / "optimiser.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load_checkpoint(folder, expected)
    (tmp_path / "run" / "checkpoints" / "last.json").write_text('{"folder": "../../elsewhere"}')
    with pytest.raises(ValueError, match="expected step_NUMBER"):
        last(tmp_path / "run")
    for text, message in (("{", "is damaged"), ("[]", "expected an object")):
        (tmp_path / "run" / "checkpoints" / "last.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            last(tmp_path / "run")


# ---- what is not finite ----------------------------------------------------------------------------------------------


class Spoilt(LengthJudge):
    """Its rewards are so large, from some call on, that the loss overflows; or no numbers."""

    def __init__(self, value, call):
        self.value, self.call, self.calls = value, call, 0

    def rewards(self, prompts, completions):
        self.calls += 1
        found = super().rewards(prompts, completions)
        if self.calls == self.call:
            found[1] = self.value
        return found


def spoilt_settings():
    return replace(SETTINGS, sample_prompts=0, checkpoint_every=1, baseline="none")


def test_a_loss_that_overflows_stops_before_the_step_and_can_be_resumed(tmp_path):
    settings = spoilt_settings()
    run("kl_policy_gradient", tmp_path / "whole", settings=settings)
    model = policy(dtype="float64")
    with pytest.raises(TrainingStopped, match=r"step 7, round 6, rows \[?.*the loss is .*inf"):
        run("kl_policy_gradient", tmp_path / "parts", model, settings, judge=Spoilt(1.7e308, 7))
    at = load_file(last(tmp_path / "parts") / "weights.safetensors")
    assert last(tmp_path / "parts").name == "step_000006"
    for name, p in model.model.named_parameters():
        assert torch.equal(p.detach(), at[name])  # the step was not made
    run("kl_policy_gradient", tmp_path / "parts", settings=settings, resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_judge_that_answers_no_numbers_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"round 2, while it was collected: judge length answered nan to row 1"
    ):
        run("kl_policy_gradient", tmp_path, settings=spoilt_settings(), judge=Spoilt(float("nan"), 3))


def test_a_gradient_that_is_not_finite_names_its_weight(tmp_path):
    model, calls = policy(), []

    def hook(g):
        calls.append(0)
        return g * float("nan") if len(calls) == 3 else g

    model.model.head.weight.register_hook(hook)
    with pytest.raises(TrainingStopped, match=r"step 3, round 0.*the gradient of head.weight is not finite"):
        run("dpo", tmp_path, model, spoilt_settings())
    assert last(tmp_path).name == "step_000002"
    assert all(p.isfinite().all() for p in model.model.parameters())


def test_logits_that_are_not_numbers_name_the_step(tmp_path):
    model = policy()

    def spoil(row):
        if row["step"] == 2:
            with torch.no_grad():
                model.model.head.bias[1] = float("nan")

    with pytest.raises(
        TrainingStopped, match=r"step 3, round 0, rows .* of it, micro-batch 0: the model's logits"
    ):
        run("dpo", tmp_path, model, spoilt_settings(), on_step=spoil)
    assert last(tmp_path).name == "step_000002"


def test_a_row_outside_the_policys_support_is_named():
    """top_k leaves the completion no mass: its log-probability is -inf."""
    narrow = replace(policy(), top_k=1)
    with pytest.raises(TrainingStopped, match=r"row \d of this process has the log-probabilities \["):
        run("dpo", None, narrow)
