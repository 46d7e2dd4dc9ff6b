"""vLLM as a sampler: a stand-in for what is used of it, honest and broken in the ways that engines are."""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preflab.llm_bridge.engines import vllm as engine
from preflab.llm_bridge.engines.vllm import LawsDiffer, cross_check, load_weights, open_llm, vllm_policy
from preflab.llm_bridge.policy import TransformerPolicy, adapter_off, frozen_copy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import TrainSettings, train
from scipy.stats import chi2

V, END, H = 12, 0, 12
PROMPTS = [[1 + i % 11, 1 + i // 11 % 11] for i in range(121)]
MANY = PROMPTS * 6


def model_of(seed=0, dtype="float32"):
    return tiny_model(V, context=40, seed=seed, scale=1.2, dtype=dtype)


def policy_of(model, **options):
    return TransformerPolicy(
        model, end_ids=[END], pad_id=END, vocabulary=V, context=40, micro_batch=256, **options
    )


# ---- a stand-in for vLLM ---------------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """Those that we set, with vLLM's defaults for the others; a name that vLLM does not know is a TypeError."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    detokenize: bool = True


class StandIn:
    """vllm.LLM on a tiny model: each request is drawn by its seed alone, by the law of its parameters.

    reports  "processed_logprobs" or "raw_logprobs"; `force` overrides sampling parameters; the others break it
    """

    def __init__(
        self,
        model,
        *,
        reports="processed_logprobs",
        force=None,
        strip_end=False,
        begin=(),
        ends=(),
        dtype=None,
    ):
        dtype = dtype or next(model.parameters()).dtype
        config = SimpleNamespace(dtype=dtype, logprobs_mode=reports)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=config))
        self.model, self.reports, self.force = copy.deepcopy(model).to(dtype), reports, force or {}
        self.strip_end, self.begin, self.own_ends, self.calls, self.resets = (
            strip_end,
            list(begin),
            list(ends),
            0,
            0,
        )

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None):
        self.calls += 1
        parameters = [replace(s, **self.force) for s in sampling_params]
        first = parameters[0]
        ends = [*(first.stop_token_ids or []), *self.own_ends]
        law = policy_of(
            self.model, temperature=first.temperature, top_k=first.top_k or None, top_p=first.top_p
        )
        law = replace(law, end_ids=ends)
        asked = [[*self.begin, *p["prompt_token_ids"]] for p in prompts]
        u = [torch.rand(s.max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s.seed))
             for s in parameters]  # fmt: skip
        drawn = law.sample(asked, first.max_tokens, uniforms=torch.stack(u))
        raw = policy_of(self.model).token_log_probabilities(drawn.prompts, drawn.completions)[0].detach()
        scores = drawn.token_log_probabilities if self.reports == "processed_logprobs" else raw
        return [
            self._output(*row)
            for row in zip(asked, drawn.completions, drawn.ended.tolist(), scores, strict=True)
        ]

    def _output(self, prompt, y, ended, scores):
        if self.strip_end and ended:
            y = y[:-1]
        logprobs = [{t: SimpleNamespace(logprob=float(v), rank=1)} for t, v in zip(y, scores, strict=False)]
        answer = SimpleNamespace(token_ids=y, logprobs=logprobs, finish_reason="stop" if ended else "length")
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])

    def apply_model(self, function):
        return [function(self)]

    def load_weights(self, weights):
        names = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, x in weights:
                names[name].copy_(x)

    def reset_prefix_cache(self):
        self.resets += 1


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    made = []
    module = SimpleNamespace(
        SamplingParams=SamplingParams, LLM=lambda **options: made.append(options) or made
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def draws(policy, llm, seed=0, prompts=MANY, **options):
    return vllm_policy(policy, llm, **options).sample(prompts, H, torch.Generator().manual_seed(seed))


# ---- an honest engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reports", ["processed_logprobs", "raw_logprobs"])
def test_an_honest_engine_is_a_policy_like_any_other(reports):
    model = model_of()
    policy = policy_of(model)
    drawn = draws(policy, StandIn(model, reports=reports))
    own = policy.log_probabilities(drawn.prompts, drawn.completions).detach().double()
    torch.testing.assert_close(drawn.log_probabilities, own, atol=1e-4, rtol=0)
    assert drawn.prompts == MANY
    ended = [y[-1] == END for y in drawn.completions]
    assert drawn.ended.tolist() == ended
    assert 0 < sum(ended) < len(ended)
    assert all(e or len(y) == H for e, y in zip(ended, drawn.completions, strict=True))
    assert drawn.mask.sum(1).tolist() == [len(y) for y in drawn.completions]


def test_the_draws_follow_the_law_by_enumeration():
    """A look that shares nothing with the cross-check: counts of whole completions against their probabilities."""
    model = model_of(dtype="float64")
    policy, n = policy_of(model), 6000
    fast = vllm_policy(replace(policy, micro_batch=2000), StandIn(model))
    drawn = fast.sample([[3, 4]] * n, 2, torch.Generator().manual_seed(1))
    every = [[END]] + [[a, b] for a in range(V) for b in range(V) if a != END]
    law = policy.log_probabilities([[3, 4]] * len(every), every).detach().exp().numpy()
    assert law.sum() == pytest.approx(1)
    number = {tuple(y): i for i, y in enumerate(every)}
    counts = np.bincount([number[tuple(y)] for y in drawn.completions], minlength=len(every))
    small = n * law < 5
    seen, expected = (np.append(x[~small], x[small].sum()) for x in (counts, n * law))
    assert ((seen - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, len(seen) - 1)


def test_each_prompt_is_answered_by_its_own_seed():
    """In whatever order and company; by uniforms as the training loop gives them."""
    policy = vllm_policy(policy_of(model_of()), StandIn(model_of()))
    u = torch.rand(len(PROMPTS), H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together = policy.sample(PROMPTS, H, uniforms=u).completions
    order = torch.arange(len(PROMPTS) - 1, -1, -2)
    apart = policy.sample([PROMPTS[i] for i in order], H, uniforms=u[order]).completions
    assert apart == [together[i] for i in order]
    assert policy.sample(PROMPTS, H, uniforms=u.roll(1, 0)).completions != together


def test_the_statistics_of_honest_draws_are_those_that_theory_gives():
    """Over 40 samples the score of the temperature has mean 0 and variance 1, and the distance its distribution."""
    model = model_of(dtype="float64")
    policy = policy_of(model)
    sigmas, chances = [], []
    for seed in range(40):
        drawn = policy.sample(PROMPTS, H, torch.Generator().manual_seed(seed))
        found = cross_check(policy, drawn, dtype="float64", seed=seed)
        assert found.problem is None
        assert found.rms < 1
        sigmas.append(found.sigmas)
        chances.append(found.chance)
    assert abs(np.mean(sigmas)) < 5 / 40**0.5
    assert 0.3 < np.var(sigmas) < 2.1  # chi-square of 39: beyond either end once in 10^4
    assert 0.25 < np.mean(chances) < 0.75


def test_bfloat16_is_accepted_as_bfloat16_and_refused_as_float32():
    model = model_of()
    policy = policy_of(model)
    coarse = StandIn(model, dtype=torch.bfloat16)
    drawn = draws(policy, coarse)
    own = policy.log_probabilities(drawn.prompts, drawn.completions).detach().double()
    gap = (drawn.log_probabilities - own).abs().max()
    assert gap > 1e-3  # so that there was something to accept
    with pytest.raises(
        LawsDiffer, match=r"the engine computes in bfloat16.*or its weights are not the policy's but near"
    ):
        draws(policy, coarse, dtype="float32")


def test_a_policy_with_a_temperature_has_it_in_the_engine():
    model = model_of()
    warm = policy_of(model, temperature=1.4, top_k=7)
    drawn = draws(warm, StandIn(model))
    assert cross_check(warm, drawn).problem is None
    with pytest.raises(
        ValueError, match="logprobs_mode is 'raw_logprobs', which is not the law that is sampled"
    ):
        vllm_policy(warm, StandIn(model, reports="raw_logprobs"))
    with pytest.raises(LawsDiffer, match="temperature"):
        draws(policy_of(model, temperature=1.4), StandIn(model, force={"temperature": 1.0}))


# ---- broken ones -----------------------------------------------------------------------------------------------------

BROKEN = [
    # what is wrong with the engine; what the error says
    ({"force": {"temperature": 0.9}}, r"off the policy's.*temperature about 0\.[89]\d? times"),
    ({"force": {"temperature": 1.1}}, r"off the policy's.*temperature about 1\.\d times"),
    ({"force": {"temperature": 0.9}, "reports": "raw_logprobs"}, r"draws from another law.*temperature about 0\.[89]"),
    ({"force": {"top_k": 8}}, "off the policy's.*no token beyond the likeliest 8"),
    ({"force": {"top_k": 8}, "reports": "raw_logprobs"}, "draws from another law.*no token beyond the likeliest 8"),
    ({"force": {"top_p": 0.9}, "reports": "raw_logprobs"}, "draws from another law.*Likely cause: truncation"),
]  # fmt: skip


NOT_IN_STEP = "has other weights|its weights are not the policy's but near"


@pytest.mark.parametrize(("broken", "words"), BROKEN)
def test_another_law_is_refused_and_named(broken, words):
    model = model_of()
    with pytest.raises(LawsDiffer, match=words) as caught:
        draws(policy_of(model), StandIn(model, **broken))
    assert ("raw_logprobs" in str(caught.value)) == (broken.get("reports") == "raw_logprobs")


def test_stale_weights_are_refused_and_the_worst_token_is_named():
    model = model_of()
    llm = StandIn(model)
    before = policy_of(model)
    drawn = draws(before, llm)  # in step
    with torch.no_grad():
        model.head.weight[5] += 0.05  # one token of the vocabulary
    with pytest.raises(LawsDiffer, match=NOT_IN_STEP) as caught:
        draws(before, llm, prompts=PROMPTS)
    fresh = StandIn(model)
    assert cross_check(before, draws(before, fresh)).problem is None
    found = cross_check(before, drawn)
    own, mask = before.token_log_probabilities(drawn.prompts, drawn.completions)
    gap = (drawn.token_log_probabilities - own.detach()).abs()
    size = torch.zeros_like(gap)
    for i, (x, y) in enumerate(zip(drawn.prompts, drawn.completions, strict=True)):  # row by row, no padding
        ids = torch.tensor([[*x, *y]])
        logits = model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]).logits.detach()
        size[i, : len(y)] = logits[0, len(x) - 1 : -1].abs().amax(1).clamp(min=1)
    ratio = torch.where(mask, gap / size.clamp(min=1), 0.0)
    assert found.place == divmod(int(ratio.argmax()), ratio.shape[1])
    assert found.worst == pytest.approx(float(ratio.max()) * 2**24, rel=1e-4)
    assert abs(found.difference) == pytest.approx(float(gap[found.place]))
    assert f"completion {found.place[0]}, token {found.place[1]}" in found.problem
    assert "completion" in str(caught.value)


def test_reported_numbers_of_a_truncated_law_without_draws_to_tell():
    """Few tokens: the draws say nothing yet, the reported numbers do."""
    model = model_of()
    with pytest.raises(LawsDiffer, match="larger everywhere, as after truncation"):
        draws(policy_of(model), StandIn(model, force={"top_k": 8}), prompts=PROMPTS[:2])
    with pytest.raises(LawsDiffer, match="vLLM drew a token that the policy rules out"):
        draws(policy_of(model, top_k=3), StandIn(model, force={"top_k": 0}), prompts=PROMPTS)


def test_draws_of_other_weights_with_the_policy_own_numbers_are_seen_by_their_spread():
    """Numbers that agree and draws that do not: the mean of log p may agree, the distribution does not."""
    policy, other = (policy_of(model_of(seed, "float64")) for seed in (0, 5))
    drawn = other.sample(MANY, H, torch.Generator().manual_seed(0))
    agreeing = policy.token_log_probabilities(drawn.prompts, drawn.completions)[0].detach()
    found = cross_check(policy, replace(drawn, token_log_probabilities=agreeing))
    assert found.rms < 1e-6
    assert "draws from another law" in found.problem


def test_a_bias_on_likely_tokens_that_leaves_the_temperature_is_seen():
    """Draws whose places in the law move and the mean of log p does not: Kolmogorov-Smirnov alone sees it."""
    found = {"tokens": 5000, "rows": 9, "top": 0.9999, "rank": 11, "sigmas": 0.3, "temperature": 1.0,
             "distance": 0.09, "chance": 1e-12, "chance_of_rank": 1.0}  # fmt: skip
    assert "not spread as the law is" in engine._law_of_draws(found)
    assert engine._law_of_draws(found | {"chance": 0.01}) is None
    r = np.random.default_rng(0).random(5000)
    assert engine._uniform(r, 0.0)[1] > 1e-3
    assert engine._uniform(0.1 + 0.8 * r, 0.0)[1] < 1e-12
    assert engine._uniform(0.1 + 0.8 * r, 0.2)[1] > 0.5  # within what rounding may do


def test_what_comes_back_is_looked_at():
    model = model_of()
    policy = policy_of(model)
    with pytest.raises(ValueError, match="the end token was stripped, or the engine has ends of its own"):
        draws(policy, StandIn(model, strip_end=True))
    with pytest.raises(
        ValueError, match=r"vLLM stopped, and the last token, 7, is none of the end tokens \[0\]"
    ):
        draws(policy, StandIn(model, ends=[7]))
    with pytest.raises(ValueError, match=r"row 0: vLLM read 3 tokens of a prompt of 2.*begin token"):
        draws(policy, StandIn(model, begin=[1]))
    with pytest.raises(ValueError, match="row 0: vLLM gave no log-probability"):
        engine.samples_of([[1]], [answer([2, END], "stop", logprobs=None)], [END], H)
    with pytest.raises(ValueError, match="went on after the end token 0"):
        engine.samples_of([[1]], [answer([END, 2], "length")], [END], 2)
    with pytest.raises(ValueError, match="for the reason 'abort' after 1 of 12 tokens"):
        engine.samples_of([[1]], [answer([3], "abort")], [END], H)
    with pytest.raises(ValueError, match="none of the end tokens"):
        engine.samples_of([[1]], [answer([], "stop")], [END], H)
    with pytest.raises(ValueError, match="2 prompts were given to vLLM and 1 answers"):
        engine.samples_of([[1], [2]], [answer([END], "stop")], [END], H)
    unread = answer([2, END], "stop")
    unread.prompt_token_ids = None  # some outputs leave it out
    assert engine.samples_of([[1]], [unread], [END], H).completions == [[2, END]]


def answer(y, reason, **other):
    logprobs = [{t: SimpleNamespace(logprob=-1.0)} for t in y]
    one = SimpleNamespace(**{"token_ids": y, "finish_reason": reason, "logprobs": logprobs} | other)
    return SimpleNamespace(prompt_token_ids=[1], outputs=[one])


def test_bad_input_is_named():
    model = model_of()
    policy = policy_of(model)
    with pytest.raises(ValueError, match="llm is NoneType; give"):
        vllm_policy(policy, None)
    bare = SimpleNamespace(generate=None)
    with pytest.raises(ValueError, match="the engine's dtype is 'None': give dtype"):
        vllm_policy(policy, bare)
    with pytest.raises(ValueError, match="rows is 0"):
        vllm_policy(policy, StandIn(model), rows=0)
    with pytest.raises(ValueError, match="logprobs_mode is 'raw_logits'"):
        vllm_policy(policy, StandIn(model, reports="raw_logits"))
    fast = vllm_policy(policy, StandIn(model), rows=3)
    with pytest.raises(ValueError, match="either a generator or uniforms"):
        fast.sample(PROMPTS, H)
    with pytest.raises(ValueError, match=r"uniforms are \(1, 1\)"):
        fast.sample(PROMPTS, H, uniforms=torch.rand(1, 1))
    with pytest.raises(ValueError, match="exceed the model's context"):
        fast.sample(PROMPTS, 100, torch.Generator())
    assert fast.sample(PROMPTS, H, torch.Generator()).prompts == PROMPTS
    assert cross_check(policy, fast.sample(PROMPTS, H, torch.Generator()), rows=3).rows == 3


# ---- weights ---------------------------------------------------------------------------------------------------------


class Even:
    name = "even"

    def preferences(self, prompts, first, second):
        a, b = ([np.mean([t % 2 == 0 for t in y]) for y in column] for column in (first, second))
        return 1 / (1 + np.exp(np.subtract(b, a)))

    def rewards(self, prompts, completions):
        return np.array([np.mean([t % 2 == 0 for t in y]) for y in completions])


SETTINGS = TrainSettings(
    steps=4,
    batch=16,
    round_batches=2,
    horizon=H,
    learning_rate=0.05,
    optimiser="sgd",
    device="cpu",
    log_with=None,
)


@pytest.mark.parametrize("method", ["nash_md", "nash_ema", "online_dpo"])
def test_a_run_that_samples_through_the_engine(method):
    """The engine follows the weights (and the averaged ones, and the reference stays itself), or the run stops."""
    from preflab.llm_bridge.training.methods import METHODS

    if method not in METHODS:
        pytest.skip(f"there is no {method}")
    model = model_of(dtype="float64")
    llm = StandIn(model)
    fast = vllm_policy(policy_of(model), llm, refresh=load_weights(llm))
    start = copy.deepcopy(model.state_dict())
    done = train(fast, method, prompts=PROMPTS, judge=Even(), settings=SETTINGS)
    assert done.step == 4
    assert llm.calls >= 2
    assert llm.resets == llm.calls
    assert any((start[k] != x).any() for k, x in model.state_dict().items())
    stale = StandIn(model)
    with pytest.raises(ValueError, match=f"round 1, while it was collected: completion.*{NOT_IN_STEP}"):
        train(
            vllm_policy(policy_of(model), stale), "nash_md", prompts=PROMPTS, judge=Even(), settings=SETTINGS
        )


def test_a_reference_has_no_engine():
    model = model_of()
    fast = vllm_policy(policy_of(model), StandIn(model))
    assert type(frozen_copy(fast)) is TransformerPolicy
    model.disable_adapter = None
    assert type(adapter_off(fast)) is TransformerPolicy


def test_an_engine_is_opened_on_safetensors_and_reports_what_it_samples(tmp_path, stand_in, monkeypatch):
    with pytest.raises(FileNotFoundError, match="with safetensors weights"):
        open_llm(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    open_llm(tmp_path, max_model_len=64)
    (made,) = stand_in
    assert made["logprobs_mode"] == "processed_logprobs"
    assert made["generation_config"] == "vllm"
    assert made["load_format"] == "safetensors"
    assert made["trust_remote_code"] is False
    assert made["max_model_len"] == 64
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"vLLM cannot be imported.*pip install vllm"):
        open_llm(tmp_path)


class Adapted(torch.nn.Module):
    """A linear layer with two adapters of rank 1, of which one is active, laid out as peft lays them out."""

    active_adapters = ("mine",)

    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(3, 2)
        self.lora_A = torch.nn.ParameterDict({name: torch.randn(1, 3) for name in ("mine", "other")})
        self.lora_B = torch.nn.ParameterDict({name: torch.randn(2, 1) for name in ("mine", "other")})

    def get_delta_weight(self, adapter):
        return 2 * self.lora_B[adapter] @ self.lora_A[adapter]

    def forward(self, x):
        return self.base_layer(x) + 2 * x @ self.lora_A["mine"].T @ self.lora_B["mine"].T


def test_an_adapter_is_added_to_what_it_adapts():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"base_model": torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"up": Adapted()})})}
    )
    found = dict(engine.merged_weights(model))
    assert found.keys() == {"up.weight", "up.bias"}
    x = torch.randn(5, 3)
    layer = model["base_model"]["model"]["up"]
    torch.testing.assert_close(x @ found["up.weight"].T + found["up.bias"], layer(x))
    assert (found["up.weight"] - layer.base_layer.weight).abs().max() > 0.1
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.llm
def test_merged_weights_are_those_of_the_adapted_model():
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")):
        pytest.skip("transformers or peft is missing")
    from preflab.llm_bridge.models import with_lora
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = LlamaConfig(**sizes, **heads, bos_token_id=END, eos_token_id=END, pad_token_id=END)
    torch.manual_seed(0)
    bare = LlamaForCausalLM(config).double().eval()
    policy = with_lora(TransformerPolicy(copy.deepcopy(bare)), rank=2)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    x, y = [[1, 2], [3]], [[4, 5], [6, END]]
    wanted = policy.log_probabilities(x, y).detach()
    assert (wanted - TransformerPolicy(bare).log_probabilities(x, y).detach()).abs().max() > 1e-3
    bare.load_state_dict(dict(engine.merged_weights(policy.model)))
    torch.testing.assert_close(
        TransformerPolicy(bare).log_probabilities(x, y).detach(), wanted, atol=1e-12, rtol=0
    )
