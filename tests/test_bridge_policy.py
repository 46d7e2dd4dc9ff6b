"""Language models as policies: scores and samples against enumeration, plain forward passes and transformers itself."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.llm_bridge import models
from preflab.llm_bridge import policy as policy_module
from preflab.llm_bridge.mixture import TokenMixture
from preflab.llm_bridge.policy import (
    Precomputed,
    TransformerPolicy,
    adapter_off,
    encode,
    frozen_copy,
    inverse_cdf,
    load_policy,
    precompute,
)
from preflab.llm_bridge.tiny import tiny_model
from scipy.stats import chi2

V, END, H = 4, 3, 3
PROMPTS = [[0], [1, 2, 0, 1], [2, 2]]


def tiny(**options):
    shape = {"vocabulary": V, "context": 16, **options}
    return TransformerPolicy(tiny_model(**shape), end_ids=[END], pad_id=END, vocabulary=V, context=16)


KINDS = ["llama", "gpt2", "mistral", "opt"]  # mistral with a window of three tokens


def transformers_model(kind, dtype="float64", **more):
    transformers = pytest.importorskip("transformers")
    ids = {"vocab_size": V, "eos_token_id": END, "pad_token_id": END, "bos_token_id": 0}
    wide = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }
    llama = {**ids, **wide, "intermediate_size": 32, "num_key_value_heads": 2, "initializer_range": 1.0}
    make, settings = {
        "llama": ("Llama", llama),
        "gpt2": (
            "GPT2",
            {**ids, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 1.0},
        ),
        "mistral": ("Mistral", {**llama, "sliding_window": 3}),
        "opt": (
            "OPT",
            {**ids, **wide, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 1.0, "pad_token_id": 1},
        ),
        "gemma2": ("Gemma2", {**llama, "head_dim": 4, "sliding_window": 16}),
    }[kind]
    model_class = getattr(transformers, f"{make}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(getattr(transformers, f"{make}Config")(**settings, **more))
    return model.to(getattr(torch, dtype)).eval()


@pytest.fixture(
    scope="module", params=["tiny", *(pytest.param(kind, marks=pytest.mark.llm) for kind in KINDS)]
)
def policy(request):
    return tiny() if request.param == "tiny" else TransformerPolicy(transformers_model(request.param))


def all_completions(horizon=H, end=END, vocabulary=V):
    """Every completion: ended by the end token, or cut at the horizon."""
    other = [t for t in range(vocabulary) if t != end]
    words = [list(w) for n in range(horizon) for w in itertools.product(other, repeat=n)]
    return [[*w, end] for w in words] + [list(w) for w in itertools.product(other, repeat=horizon)]


def plain(policy, prompt, completion):
    """log pi(y|x) by one forward pass of one unpadded row, without any of the code under test."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        output = policy.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None]
        )
    laws = output.logits[0].double().log_softmax(-1).numpy()
    return sum(laws[len(prompt) - 1 + t, token] for t, token in enumerate(completion))


def law(policy, prompt, horizon=H):
    every = all_completions(horizon)
    with torch.no_grad():
        return every, policy.log_probabilities([prompt] * len(every), every).exp().numpy()


def rejected(counts, law):
    """The chi-square test at one in a million; cells that expect fewer than 5 are pooled."""
    expected = counts.sum() * law
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return ((counts - expected) ** 2 / expected).sum() > chi2.ppf(1 - 1e-6, len(counts) - 1)


# ---- scores --------------------------------------------------------------------------------------------------------

texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
TINY = tiny()


@settings(max_examples=25)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.integers(1, 3))
def test_padding_batches_and_order_do_not_matter(pairs, micro_batch):
    prompts, completions = (list(x) for x in zip(*pairs, strict=True))
    expected = [plain(TINY, x, y) for x, y in pairs]
    few = replace(TINY, micro_batch=micro_batch, pad_id=0)
    for policy in (TINY, few):
        for side in ("left", "right"):
            scores = policy.log_probabilities(prompts, completions, side).detach().numpy()
            np.testing.assert_allclose(scores, expected, atol=1e-10)
    flipped = TINY.log_probabilities(prompts[::-1], completions[::-1]).detach().numpy()
    np.testing.assert_allclose(flipped[::-1], expected, atol=1e-10)


def test_every_kind_of_model_is_scored_alike(policy):
    prompts = PROMPTS * 2
    completions = [[1, END], [END], [2, 0, 1], [0], [END], [1, 1, END]]
    expected = [plain(policy, x, y) for x, y in zip(prompts, completions, strict=True)]
    for side in ("left", "right"):
        scores = policy.log_probabilities(prompts, completions, side).detach().numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-10)
    tokens, mask = policy.token_log_probabilities(prompts, completions)
    assert mask.sum(1).tolist() == [len(y) for y in completions]
    assert not tokens[~mask].any()
    first = policy.log_probabilities(prompts, [y[:1] for y in completions])
    torch.testing.assert_close(tokens[:, 0], first, atol=1e-10, rtol=0)


def test_positions_that_ignore_the_mask_would_be_seen():
    batch = encode(PROMPTS, [[END]] * 3, END, "left")
    assert batch.positions.tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    planted = replace(batch, positions=torch.arange(5).expand(3, -1))
    with torch.no_grad():
        gap = (TINY.laws(planted) - TINY.laws(batch)).abs().amax(1)
    assert gap[0] > 1e-3
    assert gap[1] == 0
    assert gap[2] > 1e-3


def test_the_completions_of_a_prompt_have_mass_one_with_their_ends(policy):
    for prompt in PROMPTS:
        every, probabilities = law(policy, prompt)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        unended = [[t for t in y if t != END] or [0] for y in every]
        with torch.no_grad():
            wrong = policy.log_probabilities([prompt] * len(every), unended).exp().sum()
        assert abs(wrong - 1) > 0.01  # without the end token it is no law


def test_gradients_pass_and_do_not_depend_on_the_micro_batch():
    policy = tiny(seed=1)
    prompts, completions = PROMPTS * 2, [[1, END], [END], [2, 0, 1], [0], [1, END], [2]]
    weights = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(policy.model.parameters())

    def value(p):
        return (weights * p.log_probabilities(prompts, completions)).sum()

    gradient = torch.autograd.grad(value(policy), parameters)
    again = torch.autograd.grad(value(replace(policy, micro_batch=1)), parameters)
    for g, other in zip(gradient, again, strict=True):
        torch.testing.assert_close(g, other, atol=1e-12, rtol=0)
    directions = [torch.randn(p.shape, dtype=p.dtype) for p in parameters]
    slope, ends = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True)), []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
            ends.append(value(policy).item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope.item(), rel=1e-6)


def test_dropout_is_off_and_the_mode_of_the_model_stays():
    policy = tiny(dropout=0.5)
    completions = [[1, END]] * 3
    calm = policy.log_probabilities(PROMPTS, completions)
    policy.model.train()
    policy.model.head.eval()
    torch.testing.assert_close(policy.log_probabilities(PROMPTS, completions), calm, atol=0, rtol=0)
    policy.sample(PROMPTS, 2, torch.Generator().manual_seed(0))
    assert policy.model.training
    assert policy.model.blocks[0].drop.training
    assert not policy.model.head.training


@pytest.mark.parametrize(("dtype", "far"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_number_formats(dtype, far):
    exact = tiny(scale=0.7)
    narrow = replace(exact, model=frozen_copy(exact).model.to(getattr(torch, dtype)))
    completions = [[1, END], [END], [2, 0, 1]]
    scores = narrow.log_probabilities(PROMPTS, completions)
    assert scores.dtype == torch.float32  # what is below is raised before it is normalised
    np.testing.assert_allclose(
        scores.detach().numpy(), exact.log_probabilities(PROMPTS, completions).detach().numpy(), atol=far
    )
    drawn = narrow.sample(PROMPTS * 3, H, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(
        drawn.log_probabilities, narrow.log_probabilities(PROMPTS * 3, drawn.completions).detach(), atol=far
    )


def test_a_bare_callable_is_enough():
    class Owner:
        model = tiny_model(V, context=16)

    def logits(input_ids, attention_mask, position_ids):
        return Owner.model(input_ids, attention_mask, position_ids).logits

    bare = TransformerPolicy(logits, end_ids=[END], pad_id=0)
    torch.testing.assert_close(
        bare.log_probabilities(PROMPTS, [[1, END]] * 3), TINY.log_probabilities(PROMPTS, [[1, END]] * 3)
    )
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert bare.sample(PROMPTS, 4, seeds[0]).completions == TINY.sample(PROMPTS, 4, seeds[1]).completions
    assert frozen_copy(bare).log_probabilities([[0]], [[1]]) == TINY.log_probabilities([[0]], [[1]])
    with pytest.raises(ValueError, match="keeps no cache"):
        bare.sample(PROMPTS, 2, seeds[0], cached=True)


class Wrapped(torch.nn.Module):
    """As DDP holds a model (`module`), or torch.compile (`_orig_mod`)."""

    def __init__(self, model, name):
        super().__init__()
        setattr(self, name, model)
        self.name = name

    def forward(self, *inputs, **named):
        return getattr(self, self.name)(*inputs, **named)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_wrapped_model_keeps_its_cache(name):
    policy = replace(TINY, model=Wrapped(TINY.model, name), cached=None)
    assert policy.cached
    drawn = policy.sample(PROMPTS, 4, torch.Generator().manual_seed(5))
    assert drawn.completions == TINY.sample(PROMPTS, 4, torch.Generator().manual_seed(5)).completions


# ---- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_the_law_of_each_step_is_the_enumerated_one(policy, cached):
    """Rows of three prompt lengths in one batch read every word; each step's law against ratios of scores."""
    words = [list(w) for w in itertools.product(range(V), repeat=H - 1)]
    rows = [(x, w) for x in PROMPTS for w in words]
    with torch.no_grad():
        decoder = policy.decoder([x for x, _ in rows], cached)
        for step in range(H):
            for token in range(V):
                longer = policy.log_probabilities([x for x, _ in rows], [[*w[:step], token] for _, w in rows])
                if step:
                    longer = longer - policy.log_probabilities(
                        [x for x, _ in rows], [w[:step] for _, w in rows]
                    )
                torch.testing.assert_close(decoder.laws[:, token], longer, atol=1e-10, rtol=0)
            if step + 1 < H:
                decoder.advance(torch.tensor([w[step] for _, w in rows]))


def test_the_response_scored_is_the_response_sampled(policy):
    prompts = PROMPTS * 10
    drawn = policy.sample(prompts, H, torch.Generator().manual_seed(3))
    assert drawn.prompts == prompts
    torch.testing.assert_close(
        drawn.log_probabilities,
        policy.log_probabilities(prompts, drawn.completions).detach(),
        atol=1e-10,
        rtol=0,
    )
    for y, ended in zip(drawn.completions, drawn.ended.tolist(), strict=True):
        assert END not in y[:-1]
        assert ended == (y[-1] == END)
        assert ended or len(y) == H  # cut, and then no end is scored
    assert 0 < drawn.ended.sum() < len(prompts)
    assert drawn.mask.sum(1).tolist() == [len(y) for y in drawn.completions]


def test_draws_do_not_depend_on_the_route(policy):
    prompts = PROMPTS * 4
    expected = policy.sample(prompts, 5, torch.Generator().manual_seed(7)).completions
    for other, cached in ((policy, False), (replace(policy, micro_batch=2), True)):
        assert other.sample(prompts, 5, torch.Generator().manual_seed(7), cached).completions == expected
    assert policy.sample(prompts, 5, torch.Generator().manual_seed(8)).completions != expected


def test_nothing_is_read_that_no_draw_needs():
    read = []

    def logits(ids, mask, positions):
        read.append(ids.shape[1])
        return TINY.model(ids, mask, positions).logits

    bare = TransformerPolicy(logits, end_ids=[END], pad_id=0, micro_batch=64)
    drawn = bare.sample(PROMPTS[2:] * 64, 4, torch.Generator().manual_seed(0))
    assert max(len(y) for y in drawn.completions) == 4
    assert read == [2, 3, 4, 5]  # the last token is drawn and not read
    read.clear()
    replace(bare, end_ids=range(V)).sample([[0]] * 8, 4, torch.Generator().manual_seed(0))
    assert read == [1]  # all have ended


@pytest.mark.parametrize("cached", [True, False])
def test_draws_follow_the_enumerated_law(cached):
    policy = replace(tiny(seed=2, scale=0.7), micro_batch=4000)
    every, probabilities = law(policy, PROMPTS[1])
    prompts = [x for x in PROMPTS for _ in range(4000)]
    order = np.random.default_rng(0).permutation(len(prompts))  # lengths mixed in every batch
    drawn = policy.sample([prompts[i] for i in order], H, torch.Generator().manual_seed(0), cached)
    number = {tuple(y): i for i, y in enumerate(every)}
    mine = [number[tuple(y)] for y, i in zip(drawn.completions, order, strict=True) if 4000 <= i < 8000]
    counts = np.bincount(mine, minlength=len(every))
    assert not rejected(counts, probabilities)
    assert rejected(counts, law(policy, PROMPTS[0])[1])  # the test can tell one prompt from another
    assert rejected(counts, law(replace(policy, temperature=0.8), PROMPTS[1])[1])


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_inverse_of_the_distribution_function(seed, n):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(n, 0.3)) * rng.integers(0, 2, n)
    p[rng.integers(n)] += 0.1
    p /= p.sum()
    u = np.concatenate([rng.random(20), [0.0, 1 - 2**-53]])
    with np.errstate(divide="ignore"):
        found = inverse_cdf(torch.tensor(np.log(p)).expand(len(u), -1), torch.tensor(u)).numpy()
    assert (p[found] > 0).all()
    np.testing.assert_array_equal(found[:20], np.searchsorted(p.cumsum() / p.sum(), u[:20], side="right"))


# ---- prompts of several rows ---------------------------------------------------------------------------------------

ROWS = [PROMPTS[i] for i in (0, 1, 1, 2, 0, 1, 2, 2)]  # three lengths, in no order


def apart(policy, cached=True):
    """Every law of every row where equal prompts are read together, against the row alone, over H drawn tokens."""
    words = torch.randint(0, V, (len(ROWS), H), generator=torch.Generator().manual_seed(0))
    gap = 0.0
    with torch.no_grad():
        together = policy.decoder(ROWS, cached)
        alone = [policy.decoder([x], cached) for x in ROWS]
        for step in range(H + 1):
            gap = max(gap, (together.laws - torch.cat([d.laws for d in alone])).abs().max().item())
            if step < H:
                together.advance(words[:, step])
                for d, token in zip(alone, words[:, step], strict=True):
                    d.advance(token[None])
    return gap


def drawn_by(policy, horizon=5):
    u = torch.rand(len(ROWS), horizon, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return policy.sample(ROWS, horizon, uniforms=u)


def one_by_one(policy):
    """The same draws where each row is a micro-batch, so that nothing is shared."""
    if isinstance(policy, TokenMixture):
        parts = (replace(p, micro_batch=1) for p in (policy.policy, policy.reference))
        return TokenMixture(*parts, policy.share)
    return replace(policy, micro_batch=1)


def assert_read_together(policy, monkeypatch):
    assert apart(policy) < 1e-12
    assert apart(policy, cached=False) < 1e-12
    mine, theirs = drawn_by(policy), drawn_by(one_by_one(policy))
    assert mine.completions == theirs.completions
    torch.testing.assert_close(mine.log_probabilities, theirs.log_probabilities, atol=1e-12, rtol=0)

    def exchanged(cache, rows):
        cache.batch_select_indices(rows.flip(0))
        return True

    with monkeypatch.context() as patch:  # control: a cache of other rows is seen
        patch.setattr(policy_module, "spread", exchanged)
        assert apart(policy) > 1e-3
        assert drawn_by(policy).completions != theirs.completions
    with monkeypatch.context() as patch:  # a cache that cannot be spread
        patch.setattr(policy_module, "CACHES", ())
        assert apart(policy) < 1e-12
        assert drawn_by(policy).completions == theirs.completions


def test_equal_prompts_are_read_once(policy, monkeypatch):
    assert_read_together(policy, monkeypatch)
    shapes, logits = [], TransformerPolicy.logits

    def watched(self, ids, *more, **options):
        shapes.append(tuple(ids.shape))
        return logits(self, ids, *more, **options)

    monkeypatch.setattr(TransformerPolicy, "logits", watched)
    policy.decoder(ROWS).advance(torch.zeros(8, dtype=torch.long))
    assert shapes == [(3, 4), (8, 1)]
    monkeypatch.setattr(policy_module, "LAYERS", ())
    policy.decoder(ROWS)
    policy.decoder(PROMPTS)
    assert shapes[2:] == [(3, 4), (8, 4), (3, 4)]


def test_a_mixture_reads_equal_prompts_once_by_each_model(policy, monkeypatch):
    assert_read_together(TokenMixture(policy, tiny(seed=5), 0.4), monkeypatch)


@pytest.mark.llm
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equal_prompts_are_read_once_with_the_adapter_on_and_off(kind, monkeypatch):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is missing")
    policy = trained_lora(kind)
    off = adapter_off(policy)
    for p in (policy, off, TokenMixture(policy, off, 0.4)):
        assert_read_together(p, monkeypatch)
    assert drawn_by(policy).completions != drawn_by(off).completions


def trained_lora(kind):
    """An adapter that has left its start."""
    policy = models.with_lora(TransformerPolicy(transformers_model(kind)), 2)
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator) / 4
    return policy


def test_a_cache_of_more_than_keys_and_values_is_left_alone():
    class LinearAttentionAndFullAttentionLayer:  # transformers': its states stay behind where rows are chosen
        keys = torch.zeros(3, 1)

    class DynamicCache:
        layers = (LinearAttentionAndFullAttentionLayer(),)

    assert not policy_module.spread(DynamicCache(), torch.tensor([0, 0]))
    assert not policy_module.spread((torch.zeros(3, 1),), torch.tensor([0, 0]))  # of old models
    with pytest.raises(
        ValueError, match=r"LinearAttentionAndFullAttentionLayer, which keeps more .* cached=False"
    ):
        policy_module.copy_of(DynamicCache(), torch.tensor([0, 0]))


def test_an_error_names_the_first_row_of_a_prompt():
    def broken(ids, mask, positions):
        logits = TINY.model(ids, mask, positions).logits.clone()
        logits[ids == 2] = torch.nan
        return logits

    with pytest.raises(ValueError, match="row 2, after 2 tokens"):
        TransformerPolicy(broken, [END], END).decoder([[0], [0], [2, 2], [1], [2, 2]])


# ---- temperature and truncation ------------------------------------------------------------------------------------

WARPED = [
    {"temperature": 0.6},
    {"top_k": 2},
    {"top_p": 0.7},
    {"temperature": 1.7, "top_k": 3, "top_p": 0.8},
    {"top_k": 100},
    {"top_p": 1.0},
]


@pytest.mark.parametrize("options", WARPED)
def test_scores_are_of_the_law_that_is_sampled(options):
    policy = replace(tiny(seed=3), micro_batch=300, **options)
    every, probabilities = law(policy, PROMPTS[1])
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (probabilities == 0).any() == bool(options.get("top_k", 9) < V or options.get("top_p", 1) < 1)
    drawn = policy.sample([PROMPTS[1]] * 300, H, torch.Generator().manual_seed(0))
    number = {tuple(y): i for i, y in enumerate(every)}
    index = [number[tuple(y)] for y in drawn.completions]
    np.testing.assert_allclose(drawn.log_probabilities.exp(), probabilities[index], atol=1e-12)
    assert not rejected(np.bincount(index, minlength=len(every)), probabilities)


def test_truncation_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    for options, expected in (
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 2, "top_p": 0.58}, [0, 4 / 7, 0, 3 / 7]),  # shares of what top-k leaves
        ({"top_k": 2, "top_p": 0.57}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ):
        np.testing.assert_allclose(replace(TINY, **options).law(logits).exp()[0], expected, atol=1e-12)


@pytest.mark.llm
@pytest.mark.parametrize("options", WARPED[:4])
def test_truncation_is_that_of_transformers(options):
    generation = pytest.importorskip("transformers").generation
    logits = torch.randn(200, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    warpers = {
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
    }
    x = logits
    for name, value in options.items():
        x = warpers[name](value)(None, x)
    torch.testing.assert_close(replace(TINY, **options).law(logits), x.log_softmax(-1))


# ---- references ----------------------------------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """A tiny model with an additive adapter on its head, as peft wraps one."""

    def __init__(self, model, size):
        super().__init__()
        self.base, self.adapter, self.on = model, torch.nn.Parameter(torch.full((V,), size).double()), True

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=False):
        output = self.base(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        if self.on:
            output = output._replace(logits=output.logits + self.adapter * torch.arange(V))
        return output

    @contextmanager
    def disable_adapter(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True


def references(policy, prompts, completions):
    return frozen_copy(policy), precompute(policy, prompts, completions)


def test_all_references_are_equal_and_stay_as_they_were():
    policy = TransformerPolicy(Adapted(tiny_model(V, context=16), 0.0), [END], END, V, 16)
    completions = [[1, END], [END], [2, 0, 1]]
    before = policy.log_probabilities(PROMPTS, completions).detach()
    kinds = [*references(policy, PROMPTS, completions), adapter_off(policy)]
    optimiser = torch.optim.SGD([policy.model.adapter], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        policy.log_probabilities(PROMPTS, completions).sum().backward()
        optimiser.step()
    assert (policy.log_probabilities(PROMPTS, completions) - before).abs().max() > 0.1
    for reference in kinds:
        scores = reference.log_probabilities(PROMPTS, completions)
        torch.testing.assert_close(scores, before, atol=1e-10, rtol=0)
        assert not scores.requires_grad
    assert policy.model.on
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [kind.sample(PROMPTS, H, seed) for kind, seed in zip((kinds[0], kinds[2]), seeds, strict=True)]
    assert drawn[0].completions == drawn[1].completions
    frozen_copy(kinds[2])  # a copy of the wrapper is one of the model


def test_precomputed_numbers_are_kept_in_a_file(tmp_path):
    completions = [[1, END], [END], [2, 0, 1]]
    numbers = precompute(TINY, PROMPTS, completions)
    path = tmp_path / "reference.safetensors"
    numbers.save(path)
    found = Precomputed.load(path)
    assert found.numbers == numbers.numbers  # bit for bit
    exact = frozen_copy(TINY).log_probabilities(PROMPTS, completions)
    torch.testing.assert_close(found.log_probabilities(PROMPTS, completions), exact, atol=1e-12, rtol=0)
    Precomputed({}).save(path)
    assert Precomputed.load(path).numbers == {}
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no precomputed log-probabilities"):
        Precomputed.load(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is damaged, or no safetensors"):
        Precomputed.load(path)


def test_precomputed_numbers_come_from_records():
    record = SimpleNamespace(prompt=(0,), chosen=(1, END), rejected=(END,), ref_logp=(-1.5, -0.25))
    found = Precomputed.of_records([record, record])
    assert found.log_probabilities([[0], [0]], [[END], [1, END]]).tolist() == [-0.25, -1.5]
    other = SimpleNamespace(prompt=(0,), chosen=(END,), rejected=(1,), ref_logp=(-0.3, -2.0))
    with pytest.raises(ValueError, match=r"record 1 has ref_logp -0\.3 for a completion that has -0\.25"):
        Precomputed.of_records([record, other])
    with pytest.raises(ValueError, match="record 0 has no ref_logp"):
        Precomputed.of_records([SimpleNamespace(prompt=(0,), chosen=(1,), rejected=(2,), ref_logp=None)])


def test_a_disabled_adapter_is_not_the_start_of_a_run_that_goes_on_from_a_trained_one():
    policy = TransformerPolicy(Adapted(tiny_model(V, context=16), 0.5), [END], END, V, 16)
    copy, numbers = references(policy, PROMPTS, [[1, 2]] * 3)
    frozen, base = (r.log_probabilities(PROMPTS, [[1, 2]] * 3) for r in (copy, adapter_off(policy)))
    torch.testing.assert_close(numbers.log_probabilities(PROMPTS, [[1, 2]] * 3), frozen)
    assert (frozen - base).abs().min() > 0.01


@pytest.mark.llm
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers an old question
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_peft_adapter_switched_off_is_the_frozen_copy(kind):
    peft = pytest.importorskip("peft")
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
    config = peft.LoraConfig(
        r=2, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.3, fan_in_fan_out=kind == "gpt2"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy = TransformerPolicy(peft.get_peft_model(transformers_model(kind), config))
    assert (policy.vocabulary, policy.context, policy.cached, policy.end_ids) == (V, 16, True, (END,))
    completions = [[1, END], [END], [2, 0, 1]]
    before = policy.log_probabilities(PROMPTS, completions).detach()
    kinds = [*references(policy, PROMPTS, completions), adapter_off(policy)]
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    policy.model.train()
    optimiser = torch.optim.Adam(trained, lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        policy.log_probabilities(PROMPTS, completions).sum().backward()
        optimiser.step()
    assert (policy.log_probabilities(PROMPTS, completions) - before).abs().max() > 0.01
    for reference in kinds:
        scores = reference.log_probabilities(PROMPTS, completions)
        torch.testing.assert_close(scores, before, atol=1e-10, rtol=0)
    drawn = policy.sample(PROMPTS, H, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        drawn.log_probabilities,
        policy.log_probabilities(PROMPTS, drawn.completions).detach(),
        atol=1e-10,
        rtol=0,
    )


@pytest.mark.llm
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_comes_without_a_warning(kind):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is missing")
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = models.with_lora(TransformerPolicy(transformers_model(kind)), 2)
    scores = policy.log_probabilities(PROMPTS, [[1, END]] * 3)
    base = TransformerPolicy(transformers_model(kind)).log_probabilities(PROMPTS, [[1, END]] * 3)
    torch.testing.assert_close(scores, base, atol=1e-12, rtol=0)  # it starts as zero
    other = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=kind == "llama")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # control: the other way round peft warns
        peft.get_peft_model(transformers_model(kind), other)


@pytest.mark.llm
def test_a_model_is_opened_without_progress_bars(tmp_path, capfd):
    transformers_model("llama").save_pretrained(tmp_path)
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    before, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.enable_progress_bar()
    try:
        capfd.readouterr()
        models.open_model(str(tmp_path))
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled()
        assert gguf.tqdm is bar
        load_policy(tmp_path)
        assert "Loading weights" in capfd.readouterr().err  # control
        logging.disable_progress_bar()
        models.open_model(str(tmp_path))
        assert not logging.is_progress_bar_enabled()  # what was off stays off
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_named():
    model = TINY.model
    with pytest.raises(ValueError, match=r"TinyModel has no end token: give end_ids"):
        TransformerPolicy(model, pad_id=0)
    with pytest.raises(ValueError, match=r"TinyModel has no pad token: give pad_id=.*the end token 3"):
        TransformerPolicy(model, end_ids=[END])
    with pytest.raises(ValueError, match="end_ids is empty"):
        TransformerPolicy(model, end_ids=[], pad_id=0)
    for options, said in (
        ({"end_ids": [9]}, "end_ids holds 9; the model has 4 tokens"),
        ({"pad_id": -1}, "pad_id holds -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, **options)
    with pytest.raises(ValueError, match="side is 'top'"):
        TINY.log_probabilities([[0]], [[1]], side="top")
    with pytest.raises(ValueError, match="TinyModel has no adapter"):
        adapter_off(TINY)


@pytest.mark.parametrize(
    ("prompts", "completions", "said"),
    [
        ([], [], "there are no prompts"),
        ([[0], [1]], [[1]], "2 prompts and 1 completions"),
        ([[0], []], [[1], [1]], "prompt 1 is empty"),
        ([[0], [1]], [[1], []], "completion 1 is empty; a response has at least its end token"),
        ([[0, 4]], [[1]], "prompt 0, token 1 is 4; the model's token ids are 0 to 3"),
        ([[0]], [[1, -1]], "completion 0, token 1 is -1"),
        (["text"], [[1]], "prompt 0 is not a list of token ids"),
        ([[0.5]], [[1]], "prompt 0 is not a list of token ids"),
        ([[0] * 15], [[1] * 2], r"prompt 0 has 15 tokens and its completion 2; together .* context of 16"),
    ],
)
def test_texts_that_cannot_be_are_named(prompts, completions, said):
    with pytest.raises(ValueError, match=said):
        TINY.log_probabilities(prompts, completions)


def test_samples_that_cannot_be_are_named():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="horizon is 0"):
        TINY.sample([[0]], 0, generator)
    with pytest.raises(ValueError, match="prompt 1 has 10 tokens and its horizon 7"):
        TINY.sample([[0], [0] * 10], 7, generator)
    with pytest.raises(ValueError, match="completion 0 was not precomputed"):
        precompute(TINY, [[0]], [[1]]).log_probabilities([[1]], [[1]])
    unknown = TransformerPolicy(lambda ids, mask, positions: None, [3], 3)
    with pytest.raises(ValueError, match="token ids are 0 or more"):
        unknown.log_probabilities([[-5]], [[1]])


def test_logits_that_are_not_numbers_are_placed():
    def broken(ids, mask, positions):
        logits = TINY.model(ids, mask, positions).logits.clone()
        logits[ids == 2] = torch.nan
        return logits

    policy = TransformerPolicy(broken, [END], END, micro_batch=2)
    policy.log_probabilities([[0], [1], [1]], [[1, 0], [0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"logits at completion 2, token 1 are not numbers"):
        policy.log_probabilities([[0], [1], [1]], [[1, 0], [0, 1], [2, 1]])
    with pytest.raises(ValueError, match="row 1, after 2 tokens"):
        policy.sample([[0], [0, 2]], 3, torch.Generator().manual_seed(0))


@pytest.mark.llm
def test_attention_that_fails_on_padding_is_named_and_has_a_remedy():
    completions = [[1, END]] * 3
    eager = TransformerPolicy(transformers_model("gemma2"))
    plainly = eager.log_probabilities(PROMPTS, completions)
    with pytest.raises(ValueError, match=r"eager attention met padding \(load it with attn_implementation"):
        eager.log_probabilities(PROMPTS, completions, side="left")
    narrow = TransformerPolicy(transformers_model("gemma2", dtype="float32"))
    np.testing.assert_allclose(
        narrow.log_probabilities(PROMPTS, completions, side="left").detach(), plainly.detach(), atol=1e-3
    )


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        load_policy(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights as pickle \(pytorch_model\.bin\)"):
        load_policy(tmp_path)


@pytest.mark.llm
def test_a_saved_model_comes_back(tmp_path):
    model = transformers_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"not even a pickle"
    )  # beside safetensors it is never opened
    loaded = load_policy(tmp_path, dtype="float64", micro_batch=2)
    assert (loaded.end_ids, loaded.pad_id, loaded.vocabulary, loaded.context) == ((END,), END, V, 16)
    torch.testing.assert_close(
        loaded.log_probabilities(PROMPTS, [[1, END]] * 3),
        TransformerPolicy(model).log_probabilities(PROMPTS, [[1, END]] * 3),
        atol=1e-10,
        rtol=0,
    )


def test_uniforms_stand_in_for_the_generator_row_by_row():
    prompts = PROMPTS * 4
    u = torch.rand(12, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    drawn = TINY.sample(prompts, H, torch.Generator().manual_seed(5)).completions
    assert TINY.sample(prompts, H, uniforms=u).completions == drawn
    one_by_one = [TINY.sample([x], H, uniforms=u[[i]]).completions[0] for i, x in enumerate(prompts)]
    assert one_by_one == drawn
    assert (
        TINY.sample(prompts, H, uniforms=u.roll(3, 0)).completions != drawn
    )  # control: other rows, other draws
    with pytest.raises(ValueError, match="either a generator or uniforms"):
        TINY.sample(prompts, H)
    with pytest.raises(ValueError, match=r"uniforms are \(12, 2\); expected \(12, 3\)"):
        TINY.sample(prompts, H, uniforms=u[:, :2])
