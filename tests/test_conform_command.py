"""`preflab conform`, the names of trainers, TRL's method on a stand-in, and the pytest fixture."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from preflab.llm_bridge.conformance import TARGETS, conform
from preflab.llm_bridge.conformance.conform_trainer import conform_trainer
from preflab.llm_bridge.conformance.models import model_world
from preflab.llm_bridge.conformance.ours_whole import PolicyTrainer
from preflab.llm_bridge.conformance.planted import PLANTED
from preflab.llm_bridge.conformance.trainers import find_trainer, names, run_trainer
from preflab.llm_bridge.conformance.trl import LOSS_TYPES, trl_dpo
from typer.testing import CliRunner

import preflab
from preflab import cli

ROOT = Path(preflab.__file__).resolve().parents[2]
MINE = """
from torch.nn.functional import logsigmoid

def score(c, log_probabilities):
    return (log_probabilities * c.mask).sum(1)

def loss(batch, beta=0.2):
    w, l = batch.chosen, batch.rejected
    h = score(w, w.policy - w.reference) - score(l, l.policy - l.reference)
    return -logsigmoid(beta * h).mean()

def broken(batch):
    return loss(batch, 0.04)

number = 3
"""


def call(*arguments):
    return CliRunner().invoke(cli.app, ["conform", *map(str, arguments)])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_trainer.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("my_trainer", None)


def test_ours_exits_0():
    done = call("dpo")
    assert done.exit_code == cli.OK, done.output
    assert "dpo against dpo (beta=0.1, label_smoothing=0): conforms" in done.stdout
    assert "likely cause" not in done.stdout


def test_a_planted_bug_exits_1_and_is_named():
    done = call("planted:dpo_token_mean")
    assert done.exit_code == cli.FAILED
    assert "likely cause: log-probabilities are averaged over tokens" in done.stdout
    done = call("planted:ipo_token_mean", "--json")
    assert done.exit_code == cli.FAILED
    data = json.loads(done.stdout)
    assert data["verdict"] == "another objective"
    assert data["cause_name"] == "token_mean"


def test_a_trainer_of_ones_own_is_imported_by_name(mine):
    assert call("my_trainer:loss", "--set", "beta=0.2").exit_code == cli.OK
    done = call(
        "my_trainer:broken", "--against", "dpo", "--set", "beta=0.2", "--seed", 1, "--tolerance", 1e-6
    )
    assert done.exit_code == cli.FAILED
    assert "beta applied twice" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no trainer is given"),
        (["dpp"], "did you mean dpo"),
        (["dpo", "--against", "ppo"], "there is no target 'ppo'"),
        (["dpo", "--set", "beta"], "--set 'beta' is not KEY=NUMBER"),
        (["dpo", "--set", "beta=x"], "--set 'beta=x' is not KEY=NUMBER"),
        (["dpo", "--set", "gamma=1"], "dpo has no parameter 'gamma'"),
        (["dpo", "--tolerance", "2"], "tolerance is 2.0"),
        (["cpl", "--set", "label_smoothing=0.1"], "cpl has no label smoothing"),
        (["planted:dpo_token_men"], "did you mean dpo_token_mean"),
        (["trl:ppo"], "is not a trainer of TRL"),
        (["trl:dpo[sigmoidal]"], "no loss type 'sigmoidal'"),
        (["trl:dpo[sigmoid,none]"], "takes one loss type and no options"),
        (["trl:grpo[grpo,some]"], "then any of none, k3, sequence; got grpo, some"),
        (["no_such_module:loss"], "module 'no_such_module' cannot be imported"),
        (["my_trainer:nothing"], "module 'my_trainer' has no 'nothing'"),
        (["my_trainer:number"], "module 'my_trainer' holds no callable 'number'"),
        (["my_trainer:score"], "the trainer's loss raised TypeError"),
    ],
)
def test_wrong_usage_exits_2_with_what_would_be_right(mine, arguments, message):
    done = call(*arguments)
    assert done.exit_code == cli.USAGE, done.output
    assert message in done.stderr


def test_the_list_has_every_target_and_trainer():
    data = json.loads(call("--list", "--json").stdout)
    assert set(data["targets"]) == set(TARGETS)
    assert data["targets"]["ipo"] == {"title": "IPO", "kind": "pairs", "parameters": {"tau": 0.1}}
    assert data["trainers"] == names()
    shown = call("--list").stdout
    for name in ("planted:k3_as_a_loss", "inpo", "trl:dpo[LOSS_TYPE]", "tau=0.1, share=0.25"):
        assert name in shown


def test_a_trainer_may_be_held_to_another_target():
    report = run_trainer(find_trainer("dpo", "ipo", {"tau": 0.1}))
    assert report.against == "ipo"
    assert report.verdict == "another objective"
    assert report.cause_name == "dpo_sum"
    bug = find_trainer("planted:dpo_smoothing_ignored", parameters={"label_smoothing": 0})
    assert run_trainer(bug).ok  # which is right where no smoothing is asked for
    assert find_trainer("planted:dpo_smoothing_ignored").parameters == PLANTED[
        "dpo_smoothing_ignored"
    ].parameters | {"beta": 0.1}


def test_models_of_float32_are_held_to_what_float32_can_do():
    asked = ("preflab:policy", "--levels", 3, "--dtype", "float32")
    done = call(*asked, "--json")
    assert done.exit_code == cli.OK, done.output
    assert not call("preflab:policy", "--levels", 3, "--tolerance", 1e-12, "--dtype", "float64").exit_code
    done = call(
        *asked, "--tolerance", 1e-8
    )  # the control: they are of float32, and the tolerance went with them
    assert done.exit_code == cli.FAILED
    assert "likely cause: low precision" in done.stdout
    done = call("preflab:policy", "--dtype", "float16")
    assert done.exit_code == cli.USAGE
    assert "dtype is 'float16'; it is one of float64, float32" in done.stderr
    done = call("dpo", "--dtype", "float32")
    assert done.exit_code == cli.USAGE
    assert "--dtype is for whole trainers, and dpo is a loss" in done.stderr
    with pytest.raises(ValueError, match="the world that is given has models of float64: leave dtype out"):
        conform_trainer(PolicyTrainer, world=model_world("tiny"), dtype="float32")


# ---- TRL ---------------------------------------------------------------------------------------------------------


class StandInForTRL:
    """What TRL 1.16.0's DPOTrainer does with its inputs up to the loss, for "sigmoid" and "ipo"."""

    def _compute_loss(self, model, inputs, return_outputs):
        import torch

        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        kwargs = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "use_cache": False,
        }
        logps = model(**kwargs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        with torch.no_grad():
            ref = self.ref_model(**kwargs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        (w, l), (mask_w, mask_l) = (logps - ref).chunk(2), mask.chunk(2)  # noqa: E741
        if self.loss_types == ["ipo"]:
            delta = w / mask_w.sum(1).clamp(min=1) - l / mask_l.sum(1).clamp(min=1)
            return ((delta - 1 / (2 * self.beta)) ** 2).mean()
        return -torch.nn.functional.logsigmoid(self.beta * (w - l)).mean()


class StandInForGRPO:
    """The same of its GRPOTrainer, for "grpo" and "dapo"."""

    def _compute_loss(self, model, inputs):
        mask, advantages = inputs["completion_mask"], inputs["advantages"].unsqueeze(1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, inputs["completion_ids"])
        ratio = (logps - logps.detach()).exp()
        kl = (inputs["ref_per_token_logps"] - logps).exp() - (inputs["ref_per_token_logps"] - logps) - 1
        if self.importance_sampling_level == "sequence":
            ratio = (((logps - logps.detach()) * mask).sum(1) / mask.sum(1)).exp().unsqueeze(1)
        loss = -ratio * advantages + self.beta * (kl * ratio if self.args.use_bias_correction_kl else kl)
        if self.loss_type == "dapo":
            return (loss * mask).sum() / inputs["num_items_in_batch"].clamp(min=1)
        return ((loss * mask).sum(1) / mask.sum(1)).mean()


GRPO_FOUND = {
    "grpo": "std_mean_frozen",
    "grpo,k3": "std_mean_k3_token",
    "grpo,none,sequence": "group_mean_k3_geometric",
    "dapo,none": "group_batch_frozen",
}


@pytest.fixture
def fake_trl(monkeypatch):
    for name in ("trl", "trl.trainer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, trainer in (("DPOTrainer", StandInForTRL), ("GRPOTrainer", StandInForGRPO)):
        module = types.ModuleType(f"trl.trainer.{name[:-7].lower()}_trainer")
        setattr(module, name, trainer)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_trl")
@pytest.mark.parametrize("options", GRPO_FOUND)
def test_the_adapter_of_grpo_hands_on_advantages_and_options(options):
    report = run_trainer(find_trainer(f"trl:grpo[{options}]"))
    assert report.verdict == "another objective" or "geometric" in report.cause_name
    assert report.cause_name == GRPO_FOUND[options]


@pytest.mark.usefixtures("fake_trl")
def test_the_adapter_hands_tokens_masks_and_reference_to_the_trainers_own_method():
    assert run_trainer(find_trainer("trl:dpo[sigmoid]")).ok
    report = run_trainer(find_trainer("trl:dpo[ipo]"))
    assert report.verdict == "another objective"
    assert report.cause_name == "token_mean"
    assert run_trainer(find_trainer("trl:dpo[exo_pair]")).against == "dpo"


def test_trl_itself_where_it_is_installed():
    trl = pytest.importorskip("trl")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"the adapter is written for trl 1.16.0, this is {trl.__version__}")
    assert conform(trl_dpo("sigmoid", 0.1), "dpo").ok
    found = {t: run_trainer(find_trainer(f"trl:dpo[{t}]")).cause_name for t in LOSS_TYPES if t != "sigmoid"}
    assert found["ipo"] == "token_mean"
    assert found["hinge"] == "hinge_sum"
    assert {o: run_trainer(find_trainer(f"trl:grpo[{o}]")).cause_name for o in GRPO_FOUND} == GRPO_FOUND


def test_without_trl_the_remedy_is_named(monkeypatch):
    for name in ("trl", "trl.trainer", "trl.trainer.dpo_trainer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install trl==1\.16\.0"):
        trl_dpo("sigmoid", 0.1)


# ---- the fixture ---------------------------------------------------------------------------------------------------


def test_the_fixture_serves_other_projects(mine):
    (mine / "test_mine.py").write_text(
        "import my_trainer\n"
        "def test_right(conforms):\n    conforms(my_trainer.loss, against='dpo', beta=0.2)\n"
        "def test_wrong(conforms):\n    conforms(my_trainer.broken, against='dpo', beta=0.2)\n"
    )
    path = [str(ROOT / "src"), "."]
    code = f"import sys; sys.path[:0] = {path!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "-q",
        "-p",
        "preflab.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "test_mine.py",
    ]
    done = subprocess.run(command, cwd=mine, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "beta applied twice" in done.stdout
