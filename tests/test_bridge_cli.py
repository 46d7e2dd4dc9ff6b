"""`preflab bridge`: on tiny models in this process; on SmolLM2 where it is installed (llm)."""

import json
import shutil
import sys

import numpy as np
import pytest
from preflab.algorithms.planning import evaluate, sequence_gibbs
from preflab.envs.language_world import load_language_world
from preflab.llm_bridge import models
from preflab.llm_bridge.lattice import lattice
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training.methods import METHODS
from typer.testing import CliRunner

from preflab import bridge_cli, cli

VOCABULARY = 6


def call(*arguments):
    return CliRunner().invoke(cli.app, ["bridge", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """`--model tiny` is a small transformer without a tokenizer; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)

    def opened(model, *, dtype="float32", device="cpu", micro_batch=16):
        net = tiny_model(VOCABULARY, scale=0.5, seed=0 if model == "tiny" else 1)
        policy = TransformerPolicy(net, end_ids=[0], pad_id=0, vocabulary=VOCABULARY, micro_batch=64)
        return models.OpenModel(model, policy, None)

    monkeypatch.setattr(models, "open_model", opened)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [1, 2]}\n{"prompt": [3]}\n')
    pairs = [
        {"prompt": [1, 2], "chosen": [3, 3], "rejected": [1, 0]},
        {"prompt": [3], "chosen": [3, 0], "rejected": [2, 0]},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where one run is kept for the tests that need a finished one."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def done(tiny, kept):
    """`tiny`, with a finished run of NASH in its folder run."""
    if not kept.exists():
        made = call(*NASH, *QUIET, "--set", "checkpoint_every=2")
        assert made.exit_code == 0, made.output
        shutil.copytree(tiny / "run", kept)
    else:
        shutil.copytree(kept, tiny / "run")
    return tiny


LATTICE = ("lattice", "--model", "tiny", "--prompts", "prompts.jsonl", "-k", 2, "--horizon", 3)
TRAIN = (
    "--model",
    "tiny",
    "--steps",
    6,
    "--batch",
    4,
    "--horizon",
    3,
    "--lattice",
    "2,2",
    "--watch",
    2,
    "--drawn",
    2,
)
NASH = (
    "train",
    "nash_md",
    *TRAIN,
    "--prompts",
    "prompts.jsonl",
    "--judge",
    "tokens",
    "--rate",
    0.01,
    "--out",
    "run",
)
QUIET = ("--set", "log_with=null")


# ---- lattice -----------------------------------------------------------------------------------------------------


def test_a_lattice_is_measured_and_saved(tiny):
    done = call(
        *LATTICE, "--judge", "tokens", "--beta", 0.5, "--out", "world.npz", "--folder", "layers", "--json"
    )
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["prefixes"], data["leaves"]) == (14, 30)
    assert "14 of 14 done" in done.stderr
    world = load_language_world(tiny / "world.npz")
    assert evaluate(world, world.reference).value == pytest.approx(data["reference"]["value"])
    optimum = sequence_gibbs(world, world.reference, 0.5)
    assert data["optimum"]["regularised_value"] == pytest.approx(optimum.value)
    assert 0 < data["reference"]["covered"] < 1
    assert world.provenance["prompt_ids"] == [[1, 2], [3]]
    again = call(*LATTICE, "--judge", "tokens", "--beta", 0.5, "--folder", "layers", "--json")
    assert json.loads(again.stdout)["optimum"] == data["optimum"]


def test_a_lattice_is_shown_with_and_without_a_judge(tiny):
    bare = call(*LATTICE, "--first", 1)
    assert bare.exit_code == 0, bare.output
    assert "1 prompts, k = 2, horizon = 3: 7 prefixes, 15 responses" in bare.stdout
    assert "judged by" not in bare.stdout
    judged = call(*LATTICE, "--judge", "tokens", "--out", "world.npz")
    for text in ("judged by tokens", "optimum at beta = 0.1", "the judge's best", "World: world.npz"):
        assert text in judged.stdout


def test_a_judge_of_preferences_has_no_value(tiny, monkeypatch):
    from preflab.llm_bridge.training import judges

    def longer(prompts, first, second):
        return [0.5 + 0.1 * np.sign(len(a) - len(b)) for a, b in zip(first, second, strict=True)]

    monkeypatch.setattr(judges, "named_judge", lambda *a, **k: judges.PreferenceJudge("longer", longer))
    done = call(*LATTICE, "--judge", "tokens")
    assert done.exit_code == 0, done.output
    assert "judged by longer" in done.stdout
    assert "optimum at" not in done.stdout


# ---- train -------------------------------------------------------------------------------------------------------


def test_methods_are_listed():
    data = json.loads(call("train", "--list", "--json").stdout)
    assert [row["name"] for row in data["methods"]] == list(METHODS)
    shown = call("train", "--list").stdout
    assert "share=0.125" in shown
    assert "preflab bridge train METHOD" in shown


def test_a_run_is_watched_reported_and_kept(tiny):
    done = call(*NASH, *QUIET, "--set", "tau=0.2", "--set", "schedule=cosine")
    assert done.exit_code == 0, done.output
    assert "6 of 6 done" in done.stderr
    assert "6 of 6 steps, exact value on the lattice" in done.stdout
    assert "distance to the optimum" in done.stdout
    folder = tiny / "run"
    about = json.loads((folder / "run.json").read_text())
    assert about["parameters"]["tau"] == 0.2
    assert about["settings"]["schedule"] == "cosine"
    assert about["settings"]["checkpoint_every"] == 10
    assert json.loads((folder / "asked.json").read_text())["model"] == "tiny"
    assert "nash_md on tiny" in (folder / "report.html").read_text()
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    again = CliRunner().invoke(cli.app, ["report", str(folder), "--json", str(tiny / "r.json")])
    assert again.exit_code == 0, again.output
    assert "Report: " in again.stdout
    assert (folder / "report.html").read_text().partition("badge")[0] == page.partition("badge")[0]
    assert json.loads((tiny / "r.json").read_text()) == json.loads((folder / "report.json").read_text())
    shown = CliRunner().invoke(cli.app, ["report", str(folder), "--json", "-"])
    assert json.loads(shown.stdout)["steps"] == 6


def test_the_same_command_goes_on_after_an_interruption(done, kept, monkeypatch):
    shutil.rmtree(done / "run")
    from preflab.llm_bridge.training import loop

    right = loop.update

    def interrupted(setup, rows, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return right(setup, rows, step, *rest)

    monkeypatch.setattr(loop, "update", interrupted)
    part = call(*NASH, *QUIET, "--set", "checkpoint_every=2")
    assert part.exit_code == cli.INTERRUPTED
    assert "The last checkpoint is kept in run; the same command goes on from there." in part.stderr
    monkeypatch.setattr(loop, "update", right)
    found = call(*NASH, *QUIET, "--set", "checkpoint_every=2", "--resume", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["after"] == json.loads((kept / "lattice.json").read_text())["after"]


def test_records_are_learnt_from(tiny):
    given = ("train", "dpo", *TRAIN, "--records", "pairs.jsonl", "--rate", 0.01, "--out", "run", *QUIET)
    done = call(*given, "--judge", "tokens", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["after"]["kl"] > 0
    assert "value" in data["after"]
    assert data["kept"] is None  # a tiny model has no save_pretrained
    assert "rewards" not in data["drawn"]["after"]
    assert call(*given[:-4], "--out", "bare", *QUIET).exit_code == 0


BAD = {
    "no method": (("train",), "no method is given; see: preflab bridge train --list"),
    "method": (("train", "nash_mc"), "there is no method 'nash_mc'; did you mean nash_md"),
    "judge": ((*NASH, "--judge", "sentimant"), "judge 'sentimant'"),
    "text judge": ((*NASH, "--judge", "sentiment"), "reads texts"),
    "own judge": ((*NASH, "--judge", "no_such_module:f"), "the model's folder has no tokenizer"),
    "parameter": ((*NASH, "--set", "taw=1"), "there is no setting 'taw'; did you mean tau"),
    "value": ((*NASH, "--set", "tau=much"), "--set tau=much is not a number"),
    "tau": ((*NASH, "--set", "tau=-1"), "tau"),
    "setting": ((*NASH, "--set", "schedule=up"), "schedule is 'up'; it is one of"),
    "betas": ((*NASH, "--set", "adam_betas=[2, 2]"), "adam_betas are"),
    "lattice": ((*NASH, "--lattice", "3"), "--lattice '3' is not of the form K,H"),
    "large": ((*NASH, "--lattice", "5,30"), "what fits: k = 5 with horizon ="),
    "no prompts": (("train", "nash_md", "--judge", "tokens"), "give --prompts FILE"),
    "no judge": (
        ("train", "nash_md", "--prompts", "prompts.jsonl"),
        "asks a judge for preferences: give --judge",
    ),
    "records": (
        ("train", "nash_md", "--records", "pairs.jsonl"),
        "give --prompts and --judge, not --records",
    ),
    "no records": (("train", "dpo"), "learns from comparisons: give --records FILE"),
    "both": (
        ("train", "dpo", "--records", "pairs.jsonl", "--prompts", "prompts.jsonl"),
        "leave --prompts out",
    ),
    "missing": ((*NASH, "--prompts", "nowhere.jsonl"), "--prompts nowhere.jsonl is not there"),
    "empty": ((*NASH, "--prompts", "empty.jsonl"), "empty.jsonl is empty"),
    "malformed": ((*NASH, "--prompts", "broken.jsonl"), "broken.jsonl, line 2"),
    "shipped": ((*NASH, "--prompts", "questions"), "needs a tokenizer with a chat template"),
    "nothing there": ((*NASH, "--resume"), "run holds no run to go on with"),
    "too large": (
        (*LATTICE, "--memory", 0.001, "-k", 5, "--horizon", 9),
        "what fits: k = 5 with horizon = 5 or k = 2 with horizon = 9",
    ),
    "out": ((*LATTICE, "--out", "."), "--out . is a folder"),
    "k": ((*LATTICE, "-k", 9), "k is 9; 5 tokens are left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_a_sentence(tiny, name):
    arguments, message = BAD[name]
    (tiny / "empty.jsonl").write_text("")
    (tiny / "broken.jsonl").write_text('{"prompt": [1]}\n{"prompt": [2}\n{"prompt": [3]}\n')
    done = call(*arguments)
    assert done.exit_code == cli.USAGE, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "other"), "model: tiny there, other asked"),
        (("--judge", "tokens", "--scale", 2), "scale: 1.0 there, 2.0 asked"),
        (("--lattice", "2,3"), "lattice: 2,2 there, 2,3 asked"),
        (("--batch", 8), "batch = 4"),
        (("--set", "tau=0.3"), "parameters"),
    ],
)
def test_a_folder_of_another_run_is_refused(done, change, message):
    before = {path: path.read_bytes() for path in (done / "run").rglob("*") if path.is_file()}
    found = call(*NASH, *QUIET, "--set", "checkpoint_every=2", *change)
    assert found.exit_code == cli.USAGE
    assert message in found.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_last_checkpoint(done, kept, monkeypatch):
    import torch
    from preflab.llm_bridge.training import loop

    shutil.rmtree(done / "run")
    right = loop.update

    def poisoned(setup, rows, step, *rest):
        if step == 3:
            with torch.no_grad():
                next(iter(setup.weights.values())).fill_(torch.nan)
        return right(setup, rows, step, *rest)

    monkeypatch.setattr(loop, "update", poisoned)
    found = call(*NASH, *QUIET, "--set", "checkpoint_every=2")
    assert found.exit_code == cli.USAGE
    assert "step 4, round 3, rows" in found.stderr
    assert "run keeps the checkpoint step_000002 and all numbers up to step 3" in found.stderr
    assert "take a smaller --rate" in found.stderr
    shown = CliRunner().invoke(cli.app, ["report", "run", "--json", "-"])
    data = json.loads(shown.stdout)
    assert (data["steps"], data["finished"], data["exact_steps"][-1]["step"]) == (3, False, 2)
    bare = call(*NASH[:-1], "bare", *QUIET)
    assert "bare keeps no checkpoint yet (--set checkpoint_every=N)" in bare.stderr
    monkeypatch.setattr(loop, "update", right)  # the checkpoint is a good one: without the poison it goes on
    again = call(*NASH, *QUIET, "--set", "checkpoint_every=2", "--resume", "--json")
    assert json.loads(again.stdout)["after"] == json.loads((kept / "lattice.json").read_text())["after"]


def test_checkpoints_of_another_architecture_and_pickles_are_refused(done, monkeypatch):
    given = (*NASH, *QUIET, "--set", "checkpoint_every=2")
    last = done / "run" / "checkpoints" / "step_000006"

    def opened(model, **options):
        net = tiny_model(VOCABULARY, width=8)
        policy = TransformerPolicy(net, end_ids=[0], pad_id=0, vocabulary=VOCABULARY)
        return models.OpenModel(model, policy, None)

    with monkeypatch.context() as patch:  # under the same name, another network
        patch.setattr(models, "open_model", opened)
        other = call(*NASH[:-1], "other", *QUIET, "--set", "checkpoint_every=2")
        assert other.exit_code == 0, other.output
        wrong = call(*given, "--resume")
        assert wrong.exit_code == cli.USAGE
    shutil.copytree(done / "other" / "checkpoints" / last.name, last, dirs_exist_ok=True)
    found = call(*given, "--resume")
    assert found.exit_code == cli.USAGE
    assert "which is of another architecture or number format" in found.stderr
    (last / "weights.safetensors").rename(last / "weights.bin")
    found = call(*given, "--resume")
    assert found.exit_code == cli.USAGE
    assert "it holds weights.bin, and pickles are never loaded" in found.stderr


def test_a_judge_of_sentiment_has_a_scale_of_its_own():
    assert [bridge_cli._scale(*x) for x in (("sentiment", None), ("sentiment", 1.0), ("length", None))] == [
        0.2, 1.0, 1.0,
    ]  # fmt: skip


def test_a_damaged_question_is_named(done):
    (done / "run" / "asked.json").write_text("{")
    found = call(*NASH, *QUIET)
    assert found.exit_code == cli.USAGE
    assert "asked.json is damaged; choose another folder with --out" in found.stderr


def test_a_report_of_preflab_run_says_where_to_look(tmp_path):
    (tmp_path / "run.json").write_text('{"asked": {"algorithm": "pr_lsvi"}}')
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == cli.USAGE
    assert "episodes.csv" in done.stderr


def test_weights_that_can_save_themselves_are_kept(tmp_path):
    class Model:
        def save_pretrained(self, folder, safe_serialization, save_embedding_layers=True):
            assert not save_embedding_layers
            folder.mkdir()
            (folder / "new").touch()

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    assert bridge_cli._keep(Model(), Model2(), tmp_path, adapter=True) == str(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["new", "words"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


class Model2:
    def save_pretrained(self, folder):
        (folder / "words").touch()


# ---- models by name ------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_opened_is_said(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'; it is one of"):
        models.open_model("smollm2", dtype="int8")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        models.open_model("smollm2", device="tpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'preflab\[llm\]'"):
        models.open_model("smollm2")
    with pytest.raises(ImportError, match="peft is not installed"):
        models.with_lora(None, 4)
    with pytest.raises(ValueError, match="the rank is at least 1"):
        models.with_lora(None, 0)


def test_the_last_question_of_a_conversation():
    smol = [
        "",
        "system\nYou are helpful",
        "\n",
        "user\nFirst?",
        "\n",
        "assistant\nYes",
        "user\nWas it good?",
        "\n",
    ]
    assert models.last_question([*smol, "assistant\n"]) == "Was it good?"
    assert models.last_question([*smol, "assistant\nThe food was"]) == "Was it good?\nThe food was"
    llama = ["", "system", "\n\nBe brief.", "user", "\n\nWas it good?", "assistant", "\n\n"]
    assert models.last_question(llama) == "Was it good?"
    assert models.last_question(["Once upon", " a time"]) == "Once upon a time"


def test_a_model_without_a_tokenizer_shows_ids():
    opened = models.OpenModel(
        "tiny", TransformerPolicy(tiny_model(4), end_ids=[0], pad_id=0, vocabulary=4), None
    )
    assert opened.readable([1, 2]) == "[1] [2]"
    assert (opened.pieces, opened.banned, opened.decode) == (None, [], None)


WORDS = ["<end>", "<?>", "good", "bad", "food", "it", "was", "very"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "bos_token_id": None}  # fmt: skip


def save_words(folder, words, **options):
    """A tokenizer of words, as save_pretrained writes it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<?>"))
    fast.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", unk_token="<?>", **options)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    save_words(folder, WORDS)
    config = LlamaConfig(
        vocab_size=10, eos_token_id=None, pad_token_id=None, max_position_embeddings=32, **SHAPE
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.llm
@pytest.mark.parametrize("words", [WORDS, WORDS[:2] + WORDS[:1:-1]], ids=["same", "other vocabulary"])
def test_a_reward_model_in_a_folder_judges(saved, tmp_path, words):
    """Against the model itself, one text at a time, without padding."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    reader = save_words(tmp_path, words)
    config = LlamaConfig(
        vocab_size=10, eos_token_id=0, pad_token_id=None, num_labels=1, initializer_range=1.0, **SHAPE
    )
    rewarding = LlamaForSequenceClassification(config)
    rewarding.save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("food was\nit was very\n")
    given = (
        "lattice",
        "--model",
        saved,
        "--prompts",
        tmp_path / "prompts.txt",
        "-k",
        3,
        "--horizon",
        2,
        "--json",
    )
    done = call(*given, "--judge", f"reward-model:{tmp_path}")
    assert done.exit_code == 0, done.output
    opened = models.open_model(str(saved))
    prompts = [opened.tokenizer(text)["input_ids"] for text in ("food was", "it was very")]
    found = lattice(opened.policy, prompts, 3, 2, banned=opened.banned)
    rewards = []
    for x, y in zip(*found.completions(), strict=True):
        ids = [*x, *y]
        if words != WORDS:  # then the text is read, which has no end token
            ids = reader(opened.tokenizer.decode(ids, skip_special_tokens=True))["input_ids"]
        with torch.no_grad():
            rewards.append(float(rewarding.eval()(torch.tensor([ids])).logits[0, 0]))
    law = np.exp(found.world.leaf_log_probabilities()).reshape(2, -1)
    value = (law * np.reshape(rewards, law.shape)).sum(1).mean()
    assert json.loads(done.stdout)["reference"]["value"] == pytest.approx(value, abs=1e-5)
    assert np.std(rewards) > 0.1


@pytest.mark.llm
def test_a_language_model_in_a_folder_judges(saved, tmp_path):
    from preflab.llm_bridge.training.model_judges import folder_judge
    from transformers import LlamaConfig, LlamaForCausalLM

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save_words(tmp_path, [*WORDS, "A", "B"], chat_template=template)
    LlamaForCausalLM(LlamaConfig(vocab_size=10, eos_token_id=0, pad_token_id=0, **SHAPE)).save_pretrained(
        tmp_path
    )
    judge = folder_judge("language-model", str(tmp_path), models.open_model(str(saved)).tokenizer)
    asked = [[4, 6]], [[2, 0]], [[7, 3]]
    p, q = judge.preferences(*asked), judge.preferences(asked[0], asked[2], asked[1])
    assert 0 < p[0] < 1
    assert p + q == pytest.approx(1, abs=1e-12)
    (tmp_path / "prompts.txt").write_text("food was\n")
    given = ("train", "nash_md", "--model", saved, "--prompts", tmp_path / "prompts.txt", *QUIET, "--steps", 2,
             "--batch", 2, "--horizon", 2, "--lattice", "2,1", "--drawn", 2, "--out", tmp_path / "run")  # fmt: skip
    done = call(*given, "--judge", f"language-model:{tmp_path}")
    assert done.exit_code == 0, done.output
    done = call(*given[:-1], tmp_path / "headless", "--judge", f"reward-model:{tmp_path}")
    assert done.exit_code == 2
    assert "has no weights for score.weight" in done.output
    done = call(*given[:-1], tmp_path / "other", "--judge", f"language-model:{saved}")
    assert done.exit_code == 2
    assert "has no chat template" in done.output
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "model.bin").write_text("")
    done = call(*given[:-1], tmp_path / "third", "--judge", f"reward-model:{tmp_path / 'pickled'}")
    assert done.exit_code == 2
    assert "weights as pickle" in done.output


@pytest.mark.llm
def test_a_folder_is_opened_trained_by_an_adapter_and_kept(saved, tmp_path):
    opened = models.open_model(str(saved))
    assert opened.policy.end_ids == (0,)  # the tokenizer's, where the model's configuration has none
    assert len(opened.pieces) == 10
    assert {0, 1, 8, 9} <= set(opened.banned)
    assert opened.readable([4, 6, 2]) == "food was good"
    one, two, other = (
        models.with_lora(models.open_model(str(saved)).policy, 2, seed).model.state_dict()
        for seed in (0, 0, 1)
    )
    name = next(name for name in one if "lora_A" in name)
    assert (one[name] == two[name]).all()
    assert (one[name] != other[name]).any()

    (tmp_path / "prompts.txt").write_text("food was\nit was very\n")
    (tmp_path / "taste.py").write_text("def good(text):\n    return text.split().count('good')\n")
    given = ("train", "kl_policy_gradient", "--model", saved, "--prompts", tmp_path / "prompts.txt", *QUIET,
             "--judge", "taste:good", "--lora", 2, "--steps", 8, "--batch", 8, "--horizon", 3, "--rate", 0.05,
             "--lattice", "4,2", "--watch", 0, "--drawn", 4, "--out", tmp_path / "run", "--json")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "path", list(sys.path))
        done = call(*given)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["after"]["value"] > data["before"]["value"]
    kept = tmp_path / "run" / "adapter"
    assert (kept / "adapter_model.safetensors").is_file()
    assert (kept / "tokenizer.json").is_file()
    assert "food was" in (tmp_path / "run" / "report.html").read_text()


LONG = "food was " * 12
BOUNDARY = '{"prompt": "it was go", "chosen": "od food", "rejected": "od bad"}\n'


@pytest.mark.llm
@pytest.mark.parametrize(
    ("method", "text", "options", "message"),
    [
        (
            "nash_md",
            f"food\n{LONG}\n",
            (),
            "prompts.txt, line 2, column prompt: it has 24 tokens; the context has room",
        ),
        ("dpo", BOUNDARY, (), "line 1, column chosen: the prompt's token ids are not the first ones"),
        (
            "dpo",
            '{"prompt": "food was", "chosen": "", "rejected": " bad"}\n',
            (),
            "column chosen: it is empty",
        ),
        (
            "dpo",
            json.dumps({"prompt": "it", "chosen": " " + LONG * 2, "rejected": " bad"}) + "\n",
            (),
            "the context",
        ),
        ("nash_md", "food\n", ("--judge", "sentimental"), "did you mean 'sentiment'"),
    ],
)
def test_texts_that_do_not_fit_are_named(saved, tmp_path, monkeypatch, method, text, options, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ("prompts.txt" if method == "nash_md" else "pairs.jsonl")
    file.write_text(text)
    source = (
        ("--prompts", file.name, "--judge", "readability")
        if method == "nash_md"
        else ("--records", file.name)
    )
    done = call("train", method, "--model", saved, *source, *options, "--horizon", 12, "--steps", 1)
    assert done.exit_code == cli.USAGE, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.llm
def test_a_model_without_an_end_token_says_where_to_write_it(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = shutil.copytree(saved, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [4, 6]}\n')
    given = ("lattice", "--model", "bare", "--prompts", "prompts.jsonl", "-k", 2, "--horizon", 2, "--json")
    done = call(*given)
    assert done.exit_code == cli.USAGE
    assert "which token ends a text: write eos_token_id into config.json" in done.stderr
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(
        json.dumps(config | {"eos_token_id": 0})
    )  # the remedy, without a pad token
    done = call(*given)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["leaves"] == 7


@pytest.mark.llm
def test_pickles_and_folders_without_a_model_are_refused(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("food\n")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for model, message in (
        ("pickled", "weights as pickle (pytorch_model.bin), which can run code when loaded"),
        ("nowhere", "there is no model 'nowhere': give smollm2, or a folder of save_pretrained"),
        (".", "has no config.json"),
    ):
        done = call("lattice", "--model", model, "--prompts", "prompts.txt", "-k", 1, "--horizon", 1)
        assert done.exit_code == cli.USAGE
        assert message in done.stderr


@pytest.mark.llm
def test_smollm2_on_the_shipped_questions(tmp_path):
    given = (
        "lattice",
        "--prompts",
        "questions",
        "--first",
        2,
        "-k",
        2,
        "--horizon",
        2,
        "--judge",
        "sentiment",
    )
    done = call(*given, "--dtype", "float64", "--json", "--out", tmp_path / "world.npz")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["prompts"][0].endswith("\nThe food was")
    mine, shipped = load_language_world(tmp_path / "world.npz"), load_language_world()
    for h in range(2):  # the shipped world's likeliest tokens are the same ones, in the same order of odds
        n = mine.sizes[h] - 1
        rows = [1 + x * 4**h + (i // 2 * 4 + i % 2 if h > 1 else i) for x in range(2) for i in range(n // 2)]
        theirs = shipped.reference[h][rows][:, [0, 1, 4]]
        np.testing.assert_allclose(mine.reference[h][1:], theirs / theirs.sum(1, keepdims=True), rtol=2e-4)
