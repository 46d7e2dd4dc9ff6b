"""The door of the loop, its settings and methods, what a run folder holds, adapters and number formats."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preflab.llm_bridge.policy import TransformerPolicy, frozen_copy, precompute
from preflab.llm_bridge.table import table_policy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import checkpoints
from preflab.llm_bridge.training.collect import ask_preferences, round_prompts
from preflab.llm_bridge.training.loop import train
from preflab.llm_bridge.training.methods import METHODS, describe, find_method
from preflab.llm_bridge.training.rows import batch_of, batches_in_pass, rows_of_records, shuffled
from preflab.llm_bridge.training.settings import TrainSettings
from preflab.llm_bridge.training.setup import default_reference, make_accelerator, make_setup

END, V = 2, 5
PROMPTS = [[3], [4, 1], [0, 1, 3]]
SETTINGS = TrainSettings(
    steps=4, batch=4, horizon=3, round_batches=2, learning_rate=1e-2, device="cpu", log_with=None
)


def policy(seed=0, **options):
    shape = {"vocabulary": V, "context": 16, "width": 8, "layers": 1, **options}
    model = tiny_model(**shape, seed=seed)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=V, context=shape["context"])


class LengthJudge:
    name = "length"

    def rewards(self, prompts, completions):
        return np.array([float(len(y)) for y in completions])

    def preferences(self, prompts, first, second):
        return 1 / (1 + np.exp(self.rewards(prompts, second) - self.rewards(prompts, first)))


def record(prompt=(3,), chosen=(1, END), rejected=(0, END), p_chosen=1.0, ref_logp=None):
    return SimpleNamespace(
        prompt=prompt, chosen=chosen, rejected=rejected, p_chosen=p_chosen, ref_logp=ref_logp
    )


RECORDS = [record(), record((4, 1), (0, 1, 0), (END,), 0.7), record((0,), (1,), (0, 0, END))]


def run(method="nash_md", model=None, settings=SETTINGS, **more):
    offline = not METHODS[method].samples if isinstance(method, str) and method in METHODS else False
    data = {"records": RECORDS} if offline else {"prompts": PROMPTS, "judge": LengthJudge()}
    return train(policy() if model is None else model, method, settings=settings, **{**data, **more})


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "nash-md"}, "there is no method 'nash-md'; did you mean nash_md"),
        ({"method": "zzz"}, "there is no method 'zzz'; there are dpo, ipo"),
        ({"judge": None}, r"nash_md asks a judge for preferences: give judge="),
        ({"prompts": None}, "there are none: give prompts="),
        ({"prompts": []}, "there are none: give prompts="),
        ({"records": RECORDS}, "draws its own responses and takes no records"),
        ({"prompts": [[3], []]}, "prompt 1 is empty"),
        ({"prompts": [[3], [9]]}, "prompt 1, token 0 is 9"),
        ({"prompts": [[0] * 14]}, "prompt 0 has 14 tokens and its horizon 3; together they exceed"),
        ({"parameters": {"beta": 1.0}}, "nash_md has no parameter 'beta'; it has tau, baseline, share"),
        ({"parameters": {"shar": 1.0}}, "did you mean share"),
        ({"parameters": {"share": 1.5}}, r"share is 1.5; it must lie in \[0, 1\]"),
        ({"parameters": {"tau": 0.0}}, "tau is 0.0; it must be positive"),
        ({"method": "nash_ema", "parameters": {"decay": 1.0}}, r"decay is 1.0; it must lie in \[0, 1\)"),
        ({"method": "inpo", "parameters": {"tau": 1.0, "eta": 2.0}}, "eta tau is 2.0"),
        ({"method": "dpo", "records": None}, "dpo learns from records of comparisons: give records="),
        ({"method": "dpo", "records": []}, "there are no records to train on"),
        ({"method": "dpo", "judge": LengthJudge()}, "asks no judge: leave the judge out"),
        (
            {"method": "dpo", "records": [record(), record(chosen=())]},
            "records, chosen: completion 1 is empty",
        ),
        (
            {"method": "dpo", "records": [record(rejected=(8,))]},
            "records, rejected: completion 0, token 0 is 8",
        ),
        ({"method": "dpo", "records": [record(p_chosen=1.2)]}, "record 0 has p_chosen = 1.2"),
        (
            {"method": "dpo", "records": [record(ref_logp=(-1.0, -2.0)), record()]},
            "record 1 has no ref_logp and others have",
        ),
        (
            {"method": "dpo", "records": [record(ref_logp=(-1.0, -np.inf))]},
            r"record 0 has ref_logp = \(-1.0, -inf\); both must be finite",
        ),
        ({"method": "dpo", "records": [record((1,) * 15)]}, "records, chosen: prompt 0 has 15 tokens"),
    ],
)
def test_bad_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        run(**call)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0; it is a whole number of at least 1"),
        ({"batch": 2.0}, "batch is 2.0"),
        ({"seed": True}, "seed is True"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"batch": 6, "group": 4}, "a batch holds whole groups"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas are"),
        ({"labels": "hard"}, "labels is 'hard'; it is one of None, 'draw', 'soft', 'argmax'"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"optimiser": "lion"}, "optimiser is 'lion'"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
    ],
)
def test_settings_are_checked_when_they_are_made(changed, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changed)


def test_a_model_without_trainable_weights_is_refused():
    theta = torch.zeros(6, dtype=torch.float64)
    from preflab.algorithms.optimisation import PrefixTree
    from preflab.envs.kernels import TreeKernel

    plain = table_policy(PrefixTree(TreeKernel(1, 1, 1)), theta[:2])
    with pytest.raises(ValueError, match="TableModel is no torch module"):
        train(plain, "dpo", records=[record((2,), (0,), (1,))])
    with pytest.raises(ValueError, match="no weight of TinyModel takes gradients"):
        run("dpo", frozen_copy(policy()))


def test_a_reference_of_numbers_alone_cannot_draw():
    numbers = precompute(policy(), [[3]], [[1, END]])
    with pytest.raises(ValueError, match="nash_md draws from the reference, so Precomputed will not do"):
        run("nash_md", reference=numbers)


def test_judges_are_checked():
    def judge(answer):
        return SimpleNamespace(name="odd", preferences=lambda *texts: answer)

    texts = [[1]], [[1]], [[2]]
    with pytest.raises(ValueError, match=r"judge odd answered \(2,\) to 1 rows"):
        ask_preferences(judge([0.5, 0.5]), *texts)
    with pytest.raises(ValueError, match=r"judge odd answered 1.5 to row 0; an answer is in \[0, 1\]"):
        ask_preferences(judge([1.5]), *texts)


# ---- methods and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_a_transformer_and_moves_it(name):
    model = policy()
    before = {k: p.detach().clone() for k, p in model.model.named_parameters()}
    seen = []
    result = run(name, model, on_step=seen.append)
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4]
    assert seen == list(result.metrics)
    moved = [not torch.equal(before[k], p) for k, p in model.model.named_parameters()]
    assert all(moved)
    assert result.policy is model
    method = METHODS[name]
    first = result.metrics[0]
    assert {"loss", "gradient_norm", "tokens", "seconds", "learning_rate"} <= first.keys()
    assert ("kl" in first) == method.samples
    assert ("reward" in first) == (method.asks == "rewards")
    assert ("win_rate" in first) == (method.samples and len(set(method.draws[:2])) == 2)
    rounds = [row["round"] for row in result.metrics]
    assert rounds == {"offline": [0, 0, 0, 0], "online": [0, 1, 2, 3], "iterative": [0, 0, 1, 1]}[
        method.rounds
    ] or (method.keep and rounds == [0, 0, 1, 1])


def test_methods_describe_themselves():
    shown = describe(find_method("nash_md"))
    assert shown["draws"] == ["policy", "mixture"]
    assert shown["parameters"] == {"tau": 0.1, "baseline": 0.5, "share": 0.125}
    assert describe(METHODS["dpo"])["asks"] is None
    assert all(name == method.name for name, method in METHODS.items())


def test_the_learning_rate_follows_its_schedule():
    make = {"steps": 10, "learning_rate": 1.0, "warmup": 2}
    linear = [TrainSettings(schedule="linear", **make).rate(t) for t in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, *(1 - k / 8 for k in range(8))])
    cosine = [TrainSettings(schedule="cosine", **make).rate(t) for t in range(10)]
    assert cosine == pytest.approx([1 / 3, 2 / 3, *((1 + np.cos(np.pi * k / 8)) / 2 for k in range(8))])
    assert [TrainSettings(**make).rate(t) for t in (1, 2, 9)] == pytest.approx([2 / 3, 1, 1])
    rates = [
        row["learning_rate"] for row in run("dpo", settings=replace(SETTINGS, schedule="linear")).metrics
    ]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_long_gradients_are_shortened_and_their_length_is_told():
    settings = replace(SETTINGS, steps=1, optimiser="sgd", learning_rate=1.0, max_grad_norm=1e-3)
    model, before = policy(), policy()
    norm = run("dpo", model, settings).metrics[0]["gradient_norm"]
    step = sum(
        float((p - q).detach().square().sum())
        for p, q in zip(model.model.parameters(), before.model.parameters(), strict=True)
    )
    assert norm > 1e-2
    assert step**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_every_row_is_seen_once_in_a_pass():
    for number in (0, 1):
        one = [batch_of(10, 4, 0, number, position) for position in range(3)]
        assert sorted(np.concatenate(one).tolist()) == list(range(10))
        assert [len(b) for b in one] == [4, 4, 2]
    again = np.concatenate([batch_of(10, 4, 0, 0, position) for position in range(3, 6)])
    assert sorted(again.tolist()) == list(range(10))
    assert again.tolist() != np.concatenate([batch_of(10, 4, 0, 0, p) for p in range(3)]).tolist()
    assert batches_in_pass(10, 4) == 3
    line = shuffled(0, "prompts", 5, 0, 25)
    assert all(sorted(line[i : i + 5].tolist()) == list(range(5)) for i in range(0, 25, 5))
    assert shuffled(0, "prompts", 5, 7, 9).tolist() == line[7:16].tolist()


def test_rounds_go_through_the_prompts():
    setup = make_setup(
        policy(), METHODS["nash_md"], METHODS["nash_md"].checked({}), SETTINGS, reference=None,
        prompts=PROMPTS, judge=LengthJudge(), folder=None,
    )  # fmt: skip
    drawn = [tuple(x) for number in range(3) for x in round_prompts(setup, number)]
    assert {drawn.count(tuple(x)) for x in PROMPTS} == {4}


def test_records_of_losers_first_are_the_same_data():
    rows = rows_of_records([record(p_chosen=0.3)])
    assert rows.numbers["wins"].tolist() == [0.3]
    flipped = [record(r.prompt, r.rejected, r.chosen, 1 - r.p_chosen) for r in RECORDS]
    for name in ("dpo", "ipo", "rpo", "vpo_offline"):
        settings = replace(SETTINGS, optimiser="sgd", learning_rate=1e-3)  # Adam would blow up roundings of 0
        one, other = run(name, settings=settings), run(name, settings=settings, records=flipped)
        for p, q in zip(one.policy.model.parameters(), other.policy.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=0)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_a_report_reads(tmp_path):
    settings = replace(SETTINGS, sample_prompts=2)
    result = run(
        "kl_policy_gradient", settings=settings, folder=tmp_path / "a" / "b", decode=lambda y: str(len(y))
    )
    folder = result.folder
    about = json.loads((folder / "run.json").read_text())
    assert about["method"] == "kl_policy_gradient"
    assert about["judge"] == "length"
    assert about["parameters"] == {"beta": 0.1}
    assert TrainSettings(**about["settings"]) == settings
    assert (
        about["weights"]["trainable"]
        == about["weights"]["total"]
        == sum(p.numel() for p in result.policy.model.parameters())
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [dict(row) for row in result.metrics]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(t, x) for t in (0, 4) for x in PROMPTS[:2]]
    assert all(
        s["text"] == str(len(s["completion"])) and s["reward"] == len(s["completion"]) for s in samples
    )
    assert not (folder / "records").exists()


def test_comparisons_of_a_round_are_kept_as_records(tmp_path):
    records = pytest.importorskip("preflab.llm_bridge.training.records")
    run("inpo", folder=tmp_path, settings=replace(SETTINGS, labels="soft"))
    files = sorted((tmp_path / "records").glob("*"))
    assert [f.name for f in files] == ["round_0000.jsonl", "round_0001.jsonl"]
    for number, file in enumerate(files):
        found = records.read_records(file)
        assert len(found) == 8
        for r in found:
            assert r.round == number
            p = LengthJudge().preferences(None, [r.chosen], [r.rejected])[0]
            assert r.p_chosen == pytest.approx(p)
            assert r.p_chosen >= 0.5
        scores = policy().log_probabilities([r.prompt for r in found], [r.chosen for r in found])
        assert [r.ref_logp[0] for r in found] == pytest.approx(scores.tolist())


# ---- number formats and accelerate -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16_trains_and_gives_the_model_back_as_it_was():
    settings = replace(SETTINGS, mixed_precision="bf16", steps=3)
    model = policy(dtype="float32", scale=2.0)
    result = run("nash_md", model, settings)
    assert all(p.dtype == torch.float32 for p in model.model.parameters())
    assert all(np.isfinite(row["loss"]) for row in result.metrics)
    assert abs(result.metrics[0]["kl"]) < 1e-6  # both sides are scored in the same format
    assert (
        model.logits(torch.tensor([[3]]), torch.ones(1, 1).long(), torch.zeros(1, 1).long())[0].dtype
        == torch.float32
    )
    with pytest.raises(ValueError, match="already runs with mixed_precision 'bf16' in this process"):
        make_accelerator(SETTINGS, None)


def test_bfloat16_weights_train(tmp_path):
    model = policy(dtype="bfloat16")
    run("dpo", model, replace(SETTINGS, learning_rate=0.1), folder=tmp_path)
    assert all(p.isfinite().all() for p in model.model.parameters())
    saved = checkpoints.load_checkpoint(
        checkpoints.last_checkpoint(tmp_path / "checkpoints"), dict(model.model.named_parameters())
    )
    assert all(torch.equal(saved.weights[k], p) for k, p in model.model.named_parameters())


def test_an_accelerator_can_be_given():
    accelerator = make_accelerator(SETTINGS, None)
    one, other = run("dpo", accelerator=accelerator), run("dpo")
    assert [r["loss"] for r in one.metrics] == [r["loss"] for r in other.metrics]


# ---- transformers and adapters ---------------------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=END, pad_token_id=END,
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).double().eval()


def with_lora(seed=1, **options):
    peft = pytest.importorskip("peft")
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.1,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TransformerPolicy(peft.get_peft_model(llama(), peft.LoraConfig(**settings)))


OLD_QUESTION = pytest.mark.filterwarnings(  # of peft's to transformers
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)


@pytest.mark.llm
@OLD_QUESTION
@pytest.mark.parametrize("name", ["dpo", "nash_md", "inpo", "nash_ema"])
def test_an_adapter_trains_alone_against_the_model_below_it(name, tmp_path):
    model = with_lora()
    base = {k: p.detach().clone() for k, p in model.model.named_parameters() if not p.requires_grad}
    plain = TransformerPolicy(llama())
    result = run(name, model, replace(SETTINGS, checkpoint_every=2), folder=tmp_path / "whole")
    assert type(result.reference.model).__name__ == "_AdapterOff"
    texts = [r.prompt for r in RECORDS], [r.chosen for r in RECORDS]
    torch.testing.assert_close(
        result.reference.log_probabilities(*texts), plain.log_probabilities(*texts), atol=1e-10, rtol=0
    )
    assert (model.log_probabilities(*texts) - plain.log_probabilities(*texts)).abs().max() > 1e-4
    now = dict(model.model.named_parameters())
    assert all(torch.equal(now[k], p) for k, p in base.items())
    saved = checkpoints.last_checkpoint(tmp_path / "whole" / "checkpoints") / "weights.safetensors"
    assert saved.stat().st_size < 30_000
    about = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert about["weights"]["trainable"] < about["weights"]["total"] / 5

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run(name, with_lora(), replace(SETTINGS, checkpoint_every=2), folder=tmp_path / "parts", on_step=kill)
    again = with_lora()
    run(name, again, replace(SETTINGS, checkpoint_every=2), folder=tmp_path / "parts", resume=True)
    for k, p in again.model.named_parameters():
        assert torch.equal(p, now[k])


@pytest.mark.llm
@OLD_QUESTION
def test_a_trained_adapter_gets_a_frozen_copy_as_reference():
    model = with_lora()
    assert type(default_reference(model).model).__name__ == "_AdapterOff"
    run("dpo", model)
    reference = default_reference(model)
    texts = [r.prompt for r in RECORDS], [r.chosen for r in RECORDS]
    torch.testing.assert_close(reference.log_probabilities(*texts), model.log_probabilities(*texts))
    assert not any(p.requires_grad for p in reference.model.parameters())
    other = with_lora(modules_to_save=["lm_head"])  # its saved module will move with the adapter off, too
    assert type(default_reference(other).model).__name__ != "_AdapterOff"


@pytest.mark.llm
def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    run("dpo", settings=replace(SETTINGS, log_with="auto"), folder=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.llm
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_do_not_change_a_transformer(micro_batch):
    whole, split = TransformerPolicy(llama()), TransformerPolicy(llama())
    settings = replace(SETTINGS, optimiser="sgd")
    run("dpo", whole, settings)
    run("dpo", split, replace(settings, micro_batch=micro_batch))
    for p, q in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=0)
