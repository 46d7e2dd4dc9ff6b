"""Our losses in TRL's DPOTrainer: against enumeration, against TRL's own loss, and in real runs on a tiny model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch
from preflab.algorithms.dpo import dpo_loss
from preflab.llm_bridge.conformance import conform
from preflab.llm_bridge.engines import trl as engine


def release():
    return importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None


LLM = [
    pytest.mark.llm,
    pytest.mark.skipif(
        release() != engine.RELEASE, reason=f"written for trl {engine.RELEASE}; here: {release()}"
    ),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # of trl, transformers and datasets, when they are imported and set up
]


def llm(test):
    for mark in LLM:
        test = mark(test)
    return test


# ---- without TRL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("kto", {}, "there is no method 'kto'; there are dpo, ipo"),
        ("rpo", {"beta": 0.1}, "rpo needs the parameter 'eta'; it takes beta, eta"),
        ("ipo", {"beta": 0.1}, "ipo has no parameter 'beta'; it takes tau"),
        ("inpo", {"tau": 0.1, "eta": 1.0}, "previous is the model pi_t of inpo"),
    ],
)
def test_wrong_usage_is_named(method, parameters, words):
    with pytest.raises(ValueError, match=words):
        engine.dpo_trainer(method, **parameters)


def test_a_previous_model_is_inpos_alone():
    with pytest.raises(ValueError, match="the other methods have none"):
        engine.dpo_trainer("dpo", beta=0.1, previous=object())


def test_without_trl_the_remedy_is_named(monkeypatch):
    for name in ("trl", "trl.trainer", "trl.trainer.dpo_trainer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=r"DPOTrainer cannot be imported .*; pip install trl==1\.16\.0 datasets"
    ):
        engine.dpo_trainer("dpo", beta=0.1)


class StandInForTrl:
    """As much of DPOTrainer 1.16.0 as the subclass touches."""

    loss_types: list[str] = ["sigmoid"]  # noqa: RUF012
    use_weighting = aux_loss_enabled = False
    ld_alpha = None
    f_divergence_type = "reverse_kl"

    def __init__(self, **settings):
        self.__dict__.update(settings)
        self.accelerator = types.SimpleNamespace(prepare_model=lambda model, evaluation_mode: model)

    def compute_ref_log_probs(self, model, inputs):
        return engine._sums(model, inputs).unbind(1)


@pytest.fixture
def stand_in(monkeypatch):
    module = types.SimpleNamespace(DPOTrainer=StandInForTrl)
    patched = []
    utils = types.SimpleNamespace(add_fused_lm_head=patched.append)
    for name, found in (
        ("trl", types.ModuleType("trl")),
        ("trl.trainer", types.ModuleType("trl.trainer")),
        ("trl.trainer.dpo_trainer", module),
        ("trl.trainer.utils", utils),
    ):
        monkeypatch.setitem(sys.modules, name, found)
    return patched


METHODS = [
    ("dpo", "dpo", {"beta": 0.1, "label_smoothing": 0.1}),
    ("apo", "dpo", {"beta": 0.1}),
    ("ipo", "ipo", {"tau": 0.1}),
    ("rpo", "rpo", {"beta": 0.1, "eta": 0.5}),
    ("inpo", "inpo", {"tau": 0.1, "eta": 2.0}),
]


def held(method, target, parameters):
    report = conform(engine.engine_loss(method, **parameters), target, **parameters)
    assert report.ok, report
    gradient = next(c for c in report.checks if c.name == "gradient").numbers
    assert gradient["error"] < 1e-10
    assert gradient["scale"] == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("method", "target", "parameters"), [METHODS[2], METHODS[4]])
def test_the_method_descends_its_objective(stand_in, method, target, parameters):
    held(method, target, parameters)


def test_another_parameter_and_a_planted_bug_are_found(stand_in, monkeypatch):
    report = conform(engine.engine_loss("dpo", beta=0.3), "dpo", beta=0.1)
    assert report.cause_name == "beta_other"
    monkeypatch.setitem(
        engine.LOSSES, "dpo", lambda pi, ref, p, *, beta: dpo_loss(pi, pi.detach(), p, beta=beta)
    )
    report = conform(engine.engine_loss("dpo", beta=0.1), "dpo")
    assert report.cause_name == "reference_is_policy"


def test_sppo_with_certain_labels(stand_in):
    report = conform(engine.engine_loss("sppo", eta=10.0), "dpo", beta=0.1)
    assert report.verdict == "another objective"
    assert report.cause_name == "sppo_hard_sum"
    assert report.nearest[0].scale == pytest.approx(0.5, abs=1e-9)  # the mean over responses, not over pairs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_types", ["ipo"]),
        ("use_weighting", True),
        ("ld_alpha", 0.5),
        ("f_divergence_type", "js_divergence"),
        ("aux_loss_enabled", True),
    ],
)
def test_what_the_losses_do_not_read_is_refused(stand_in, name, value):
    kind = engine.dpo_trainer("dpo", beta=0.1)
    kind()
    with pytest.raises(ValueError, match="changes TRL's own loss, and is not read by dpo"):
        kind(**{name: value})


def test_the_previous_model_is_frozen_and_gets_a_fused_head(stand_in):
    previous = torch.nn.Linear(2, 2)
    trainer = engine.dpo_trainer("inpo", tau=0.1, eta=1.0, previous=previous)()
    assert trainer.previous_model is previous
    assert stand_in == [previous]
    assert not previous.training
    assert not any(p.requires_grad for p in previous.parameters())


# ---- with TRL --------------------------------------------------------------------------------------------------------


@llm
@pytest.mark.parametrize(("method", "target", "parameters"), METHODS)
def test_in_trl_itself(method, target, parameters):
    held(method, target, parameters)


@pytest.fixture
def world():
    from preflab.llm_bridge.conformance.models import model_world

    return model_world("llama", dtype="float32")


def run(kind, world, folder, *, steps=6, model="policy", wrap=None, **settings):
    """A run of real training; the trainer."""
    import datasets
    from preflab.llm_bridge.conformance.trl_whole import text_of, tokenizer_of
    from trl import DPOConfig

    args = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "beta": 0.1,
        **settings,
    }
    ys = world.completions
    rows = [
        {
            "prompt": text_of(world, world.prompts[0]),
            "chosen": " " + text_of(world, ys[i]),
            "rejected": " " + text_of(world, ys[-1 - i]),
        }
        for i in range(6)
    ]
    policy = world.model(model)
    reference = {} if wrap else {"ref_model": world.model("reference")}
    trainer = kind(
        model=policy,
        **reference,
        **({"peft_config": wrap} if wrap else {}),
        args=DPOConfig(**args),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(world),
    )
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().double().reshape(-1) for p in trainer.model.parameters()])


def moved(a, b):
    return float((weights(a) - weights(b)).norm())


@llm
def test_the_subclass_trains_as_trl_does_and_ipo_by_sums_does_not(world, tmp_path):
    import trl

    theirs = run(trl.DPOTrainer, world, tmp_path / "a")
    ours = run(engine.dpo_trainer("dpo", beta=0.1), world, tmp_path / "b")
    start = run(engine.dpo_trainer("dpo", beta=0.1), world, tmp_path / "c", steps=1, learning_rate=0.0)
    assert moved(theirs, start) > 0.05
    assert moved(theirs, ours) < 1e-4 * moved(theirs, start)
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        mine, other = ([row[key] for row in t.state.log_history if key in row] for t in (ours, theirs))
        assert len(mine) == 6
        assert mine == pytest.approx(other, abs=1e-4)
    averaged = run(trl.DPOTrainer, world, tmp_path / "d", loss_type="ipo")
    summed = run(engine.dpo_trainer("ipo", tau=0.1), world, tmp_path / "e")
    assert moved(averaged, summed) > 0.05 * moved(summed, start)  # the control: IPO by sums is another loss


@llm
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dpo", {"beta": 0.1}),
        ("ipo", {"tau": 0.1}),
        ("rpo", {"beta": 0.1, "eta": 0.5}),
        ("sppo", {"eta": 1.0}),
    ],
)
def test_it_learns_the_comparisons(world, tmp_path, method, parameters):
    kind = engine.dpo_trainer(method, **parameters)
    start = run(kind, world, tmp_path / "a", steps=1, learning_rate=0.0)
    trainer = run(kind, world, tmp_path / "b", steps=40, learning_rate=1e-3)
    assert loss_of(trainer) < 0.7 * loss_of(start)


def loss_of(trainer):
    """On all comparisons."""
    with torch.no_grad():
        found = [float(trainer.compute_loss(trainer.model, b)) for b in trainer.get_train_dataloader()]
    return sum(found) / len(found)


@llm
def test_inpo_from_the_reference_is_ipo_with_tau_of_the_step(world, tmp_path):
    """With pi_t = ref the anchor is the reference whatever tau is, and the target eta/2."""
    inpo = engine.dpo_trainer("inpo", tau=0.1, eta=2.0, previous=world.model("reference"))
    ipo = engine.dpo_trainer("ipo", tau=0.5)
    other = engine.dpo_trainer("inpo", tau=0.1, eta=2.0, previous=world.model("base"))
    # Not Adam, which divides rounding by rounding where a gradient is small.
    plain = {"optim": "sgd", "learning_rate": 0.01}
    a, b, c = (run(kind, world, tmp_path / n, **plain) for kind, n in ((inpo, "a"), (ipo, "b"), (other, "c")))
    assert moved(a, b) < 1e-3 * moved(b, c)
    assert moved(b, c) > 0.01


@llm
def test_precomputed_references_and_adapters(world, tmp_path):
    from peft import LoraConfig

    kind = engine.dpo_trainer("rpo", beta=0.1, eta=0.5)
    live = run(kind, world, tmp_path / "a")
    before = run(kind, world, tmp_path / "b", precompute_ref_log_probs=True)
    assert moved(live, before) < 1e-4
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = run(kind, world, tmp_path / "c", model="reference", wrap=lora, steps=10, learning_rate=0.03)
    assert trainer.ref_model is None
    first = next(row for row in trainer.state.log_history if "rewards/margins" in row)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # an adapter at its start is the reference
    frozen = dict(world.model("reference").named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = dict(trainer.model.named_parameters())[
        "base_model.model." + name.replace(".weight", ".base_layer.weight")
    ]
    assert torch.equal(kept, frozen[name])
    assert [r["rewards/margins"] for r in trainer.state.log_history if "rewards/margins" in r][-1] > 0


@llm
def test_evaluation_gives_outputs_where_they_are_asked_for(world, tmp_path):
    trainer = run(engine.dpo_trainer("dpo", beta=0.1), world, tmp_path, steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert float(loss) == pytest.approx(float(trainer.compute_loss(trainer.model, batch)), abs=1e-6)
