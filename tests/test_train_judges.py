"""Judges of responses: tables against enumeration, models against one row at a time, and planted faults."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.optimisation import PrefixTree
from preflab.algorithms.planning import evaluate
from preflab.envs import TreeKernel
from preflab.envs.budget import BudgetExhausted
from preflab.envs.judge_scores import length, readability, real_words
from preflab.envs.judges import majority
from preflab.envs.language_model import load_smollm2, vader_judge
from preflab.llm_bridge.lattice import lattice
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.table import table_policy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training.judges import (
    PreferenceJudge,
    RewardJudge,
    budgeted,
    lattice_judge,
    leaves_of,
    majority_judge,
    named_judge,
    penalise_missing_end,
    text_judge,
    text_preference,
)
from preflab.llm_bridge.training.model_judges import (
    LanguageModelJudge,
    PairTemplate,
    retokenised,
    reward_model_judge,
)
from scipy.special import expit


class Words:
    """A tokenizer of whole words, with the end token "<end>" as number 0."""

    def __init__(self, texts):
        self.words = ["<end>", *sorted({w for text in texts for w in text.split(" ")})]

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.words.index(w) for w in text.split(" ") if w]}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert not clean_up_tokenization_spaces
        return " ".join(self.words[i] for i in ids if i or not skip_special_tokens)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(["<user>", *(m["content"] for m in messages), "<judge>"])


def scores(judge, texts):
    return judge.rewards([[1]] * len(texts), texts)


# ---- both orders, messages, budgets --------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20), st.floats(1e-2, 1e2))
def test_a_rewards_preferences_are_bradley_terry_and_sum_to_one_to_the_last_bit(rewards, scale):
    judge = RewardJudge("table", lambda x, y: [rewards[i][j] for i, j in y], scale)
    n = len(rewards)
    first, second = [(i, 0) for i in range(n)], [(i, 1) for i in range(n)]
    forth, back = (judge.preferences([[0]] * n, *pair) for pair in ((first, second), (second, first)))
    assert (forth + back == 1).all()
    a, b = np.array(rewards).T
    np.testing.assert_allclose(forth, expit((a - b) / scale), atol=2e-16, rtol=0)


def test_the_plain_formula_does_not_sum_to_one():
    x = np.linspace(-30, 30, 1001)
    assert (expit(x) + expit(-x) != 1).any()


def favours(place):
    """P(first > second) by length, and `place` more for what is shown first."""
    return lambda x, a, b: [0.5 + place + 0.1 * np.sign(len(y) - len(z)) for y, z in zip(a, b, strict=True)]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=9), st.floats(0, 0.4))
def test_averaging_over_both_orders_cancels_a_favoured_place(lengths, place):
    prompts = [[0]] * len(lengths)
    a, b = ([[1] * n[k] for n in lengths] for k in (0, 1))
    judge = PreferenceJudge("biased", favours(place), "average")
    forth, back = judge.preferences(prompts, a, b), judge.preferences(prompts, b, a)
    assert (forth + back == 1).all()
    np.testing.assert_allclose(forth, favours(0)(prompts, a, b), atol=1e-15)
    trusted = replace(judge, orders="trust")
    assert np.abs(trusted.preferences(prompts, a, b) - favours(place)(prompts, a, b)).max() == 0


def test_a_judge_that_favours_a_place_is_found_out():
    with pytest.raises(ValueError, match=r"'biased', row 0: .* = 0\.7 and .* = 0\.7 do not sum to 1"):
        PreferenceJudge("biased", favours(0.2)).preferences([[0]], [[1]], [[2]])
    fair = PreferenceJudge("fair", favours(0)).preferences([[0]], [[1, 1]], [[2]])
    assert fair == pytest.approx([0.6])
    with pytest.raises(ValueError, match="orders is 'both'"):
        PreferenceJudge("fair", favours(0), "both")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, np.nan], r"'odd' answered nan to row 1; an answer must be a finite number"),
        ([np.inf, 1.0], r"answered inf to row 0"),
        ([1.0], r"answered with shape \(1,\) to 2 rows"),
        ([[1.0], [2.0]], r"answered with shape \(2, 1\) to 2 rows"),
        ([1.0, None], r"answered nan to row 1"),
        (["good", "bad"], "did not answer with numbers"),
    ],
)
def test_odd_answers_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        scores(RewardJudge("odd", lambda x, y: answer), [[1], [2]])


def test_preferences_are_probabilities_and_lengths_agree():
    judge = PreferenceJudge("sure", lambda x, a, b: [2.0])
    with pytest.raises(ValueError, match=r"answered 2\.0 to row 0; an answer must be in \[0, 1\]"):
        judge.preferences([[0]], [[1]], [[2]])
    with pytest.raises(ValueError, match="'sure' has preferences only"):
        judge.rewards([[0]], [[1]])
    with pytest.raises(ValueError, match="about 1 prompts with 2 completions"):
        RewardJudge("one", lambda x, y: [1.0]).rewards([[0]], [[1], [2]])
    with pytest.raises(ValueError, match="scale is 0"):
        RewardJudge("flat", len, scale=0.0)
    for empty in (RewardJudge("none", len), judge):
        assert empty.preferences([], [], []).shape == (0,)


def test_questions_are_counted_and_a_budget_ends_before_anything_is_asked():
    asked = []

    def reward(prompts, completions):
        asked.append(len(prompts))
        return [len(y) for y in completions]

    judge = budgeted(RewardJudge("length", reward), 5)
    scores(judge, [[1], [2]])
    judge.preferences([[0]] * 2, [[1]] * 2, [[2, 2]] * 2)
    assert (judge.questions.count, judge.questions.remaining) == (4, 1)
    before = len(asked)
    with pytest.raises(BudgetExhausted, match="2 answers asked but 1 of the budget of 5"):
        judge.preferences([[0]] * 2, [[1]] * 2, [[2]] * 2)
    assert (len(asked), judge.questions.count) == (before, 4)
    saved = judge.questions.checkpoint()
    again = budgeted(judge, 5)
    assert again.questions.count == 0
    again.questions.restore(saved)
    assert again.questions.remaining == 1
    wrong = RewardJudge("wrong", lambda x, y: [np.nan])
    with pytest.raises(ValueError, match="nan"):
        scores(wrong, [[1]])
    assert wrong.questions.count == 0  # no answer, no question


# ---- lattices ------------------------------------------------------------------------------------------------------

ENDS = [5, 4]


@pytest.fixture(scope="module", params=["transformer", "table"])
def small(request):
    """Two prompts, two of the tokens, at most three of them; by a transformer and by a prefix tree."""
    if request.param == "transformer":
        policy = TransformerPolicy(tiny_model(6), end_ids=ENDS, pad_id=5, vocabulary=6, context=16)
        return lattice(policy, [[0], [1, 2]], 2, 3)
    table = PrefixTree(TreeKernel(2, 3, 3))
    theta = torch.randn(table.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lattice(table_policy(table, theta), [[4], [5]], 2, 3)


def test_completions_are_found_among_the_leaves(small):
    prompts, completions = small.completions()
    every = np.arange(small.world.n_leaves)
    np.testing.assert_array_equal(leaves_of(small, prompts, completions), every)
    order = np.random.default_rng(0).permutation(every)
    found = leaves_of(small, [prompts[i] for i in order], [completions[i] for i in order])
    np.testing.assert_array_equal(found, order)
    ended = [y if y[-1] in small.end_ids else [*y, small.end_ids[-1]] for y in completions]
    np.testing.assert_array_equal(leaves_of(small, prompts, ended), every)  # an end after H tokens, any end


def test_a_lattices_tables_are_read_back(small):
    rng, L = np.random.default_rng(1), small.world.n_leaves // 2
    prompts, completions = small.completions()
    rewards = rng.normal(size=2 * L)
    for table in (rewards, rewards.reshape(2, L)):
        judge = lattice_judge(small, table, scale=0.5)
        np.testing.assert_array_equal(judge.rewards(prompts, completions), rewards)
    half = np.triu(rng.random((2, L, L)), 1)
    P = half + np.tril(1 - half.transpose(0, 2, 1), -1) + 0.5 * np.eye(L)
    pairs = [(x * L + i, x * L + j) for x in range(2) for i, j in itertools.product(range(L), repeat=2)]
    first, second = ([completions[p[k]] for p in pairs] for k in (0, 1))
    asked = lattice_judge(small, P).preferences([prompts[p[0]] for p in pairs], first, second)
    np.testing.assert_array_equal(asked, P.reshape(-1))
    with pytest.raises(ValueError, match="preferences only"):
        lattice_judge(small, P).rewards(prompts, completions)


def test_the_expected_reward_of_a_lattice_is_its_value(small):
    """By the judge, weighted with the law of completions, and by policy evaluation on the world with that reward."""
    rewards = np.random.default_rng(2).normal(size=small.world.n_leaves)
    prompts, completions = small.completions()
    asked = lattice_judge(small, rewards).rewards(prompts, completions)
    world = small.world.with_response_reward(rewards)
    start = world.initial[1:][np.asarray(world.leaf_prompts)]
    value = evaluate(world, world.reference).value
    assert start * world.leaf_probabilities() @ asked == pytest.approx(value, abs=1e-12)
    assert start * world.leaf_probabilities() @ asked[::-1] != pytest.approx(value, abs=1e-3)  # the control


def test_what_is_outside_of_a_lattice_is_named(small):
    judge, (prompts, completions) = lattice_judge(small, np.zeros(small.world.n_leaves)), small.completions()
    x, full = prompts[-1], completions[-1]
    other = next(t for t in range(4) if t not in small.ids[0][1] and t not in small.end_ids)
    for wrong, message in [
        ([other], rf"token ids \[{other}\], has token {other} at place 0.*not among the lattice's 2"),
        (full[:2], "is over after 2 tokens, without an end token: sample with horizon=3"),
        ([*full, other], r"goes on after its end, or after the lattice's 3 tokens"),
        ([small.end_ids[0], full[0]], "goes on after its end"),
        ([], "is over after 0 tokens"),
    ]:
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            judge.rewards([x, x], [full, wrong])
    with pytest.raises(ValueError, match=r"row 0: the prompt \[3\] is none of the lattice's"):
        judge.rewards([[3]], [full])


def test_tables_of_a_wrong_kind_are_refused(small):
    n = small.world.n_leaves
    with pytest.raises(ValueError, match=rf"shape \(3,\); expected rewards \({n},\)"):
        lattice_judge(small, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"prompt 0: P.*must be in"):
        lattice_judge(small, np.zeros((2, n // 2, n // 2)))
    with pytest.raises(ValueError, match="nan to row 0"):
        lattice_judge(small, np.full(n, np.nan))
    with pytest.raises(ValueError, match="two prompts of the lattice are equal"):
        lattice_judge(replace(small, prompts=(small.prompts[0],) * 2), np.zeros(n))


# ---- texts and names -----------------------------------------------------------------------------------------------

TEXTS = [
    "The food was wonderful, and I love it.",
    "The food was awful.",
    "Fxrz blorp glub was terrible terrible",
    "Incomprehensibility characterises institutionalised bureaucracies.",
    "I am happy",
]


def tokens_of(texts):
    words = Words(texts)
    return words, [[*words(text)["input_ids"], 0] for text in texts]


def test_named_judges_are_those_of_the_worlds():
    words, ids = tokens_of(TEXTS)
    made = {"sentiment": vader_judge, "real words": real_words, "readability": readability, "length": length}
    for name, make in made.items():
        score = make()
        np.testing.assert_array_equal(scores(named_judge(name, words), ids), [score(t) for t in TEXTS])
    np.testing.assert_array_equal(scores(named_judge("tokens"), ids), [len(y) for y in ids])


def test_a_majority_of_named_judges_is_the_worlds_majority_and_can_be_intransitive():
    words, ids = tokens_of(TEXTS)
    names = ("sentiment", "real words", "length")
    table = np.column_stack([scores(named_judge(name, words), ids) for name in names])
    pairs = list(itertools.product(range(len(ids)), repeat=2))
    first, second = ([ids[p[k]] for p in pairs] for k in (0, 1))
    for strict in (False, True):
        judge = named_judge(", ".join(names), words, strict=strict)
        asked = judge.preferences([[1]] * len(pairs), first, second)
        np.testing.assert_array_equal(asked.reshape((len(ids),) * 2), majority(table, strict=strict))
    ranks = [RewardJudge(f"ranking {k}", lambda x, y, k=k: [(t[0] + k) % 3 for t in y]) for k in range(3)]
    rock, scissors, paper = [0], [1], [2]
    beats = majority_judge(ranks, strict=True).preferences(
        [[9]] * 3, [scissors, paper, rock], [rock, scissors, paper]
    )
    assert beats.tolist() == [1.0, 1.0, 1.0]


def test_unknown_names_and_missing_tokenizers_are_named():
    with pytest.raises(ValueError, match=r"judge 'sentimant' is not one of .*did you mean 'sentiment'"):
        named_judge("sentimant", Words(TEXTS))
    with pytest.raises(
        ValueError, match="'sentiment' reads texts: give a tokenizer, or take the judge 'tokens'"
    ):
        named_judge("sentiment")
    with pytest.raises(ValueError, match="each at most once"):
        named_judge("tokens, tokens")
    with pytest.raises(ValueError, match="at least one"):
        majority_judge([])


def test_functions_of_texts_see_the_completion_and_the_prompt_where_asked():
    words, (x, y, z) = tokens_of(["what is it", "it is it", "no"])
    assert text_judge("short", lambda t: -len(t), words).rewards([x], [y]).tolist() == [-8]
    seen = []
    text_judge("both", lambda *t: seen.append(t) or 1, words, with_prompt=True).rewards([x], [y])
    longer = text_preference("longer", lambda a, b: float(len(a) > len(b)), words)
    assert longer.preferences([x], [y], [z]).tolist() == [1.0]
    told = text_preference("told", lambda *t: seen.append(t) or 0.5, words, with_prompt=True, orders="trust")
    told.preferences([x], [y], [z])
    assert seen == [("what is it", "it is it"), ("what is it", "it is it", "no")]
    with pytest.raises(ZeroDivisionError) as caught:
        text_judge("broken", lambda t: 1 / 0, words).rewards([x], [y])
    assert caught.value.__notes__ == ["judge 'broken' failed at row 0: 'it is it'"]


# ---- the missing end -----------------------------------------------------------------------------------------------


def test_the_penalty_for_a_missing_end_looks_at_the_completion_alone():
    """Prompts of a chat hold end tokens; a penalty that looks at prompt + response is never applied (field bug 2)."""
    policy = TransformerPolicy(tiny_model(6), end_ids=ENDS, pad_id=5, vocabulary=6, context=16)
    found = lattice(policy, [[0, 5, 1], [1, 2]], 2, 3)
    prompts, completions = found.completions()
    plain = RewardJudge("tokens", lambda x, y: [len(t) for t in y], scale=2.0)
    judge = penalise_missing_end(plain, ENDS, 0.7)
    ended = np.array([y[-1] in ENDS for y in completions])
    rewards = judge.rewards(prompts, completions)
    np.testing.assert_allclose(rewards, [len(y) for y in completions] - 0.7 * ~ended)
    assert judge.scale == 2.0
    planted = [len(y) - 0.7 * (not set(ENDS) & {*x, *y}) for x, y in zip(prompts, completions, strict=True)]
    wrong = np.flatnonzero(np.abs(rewards - planted) > 1e-9)
    assert sorted({prompts[i] for i in wrong}) == [(0, 5, 1)]  # and there it changes the value
    law = found.world.leaf_probabilities()
    assert law @ planted - law @ rewards > 0.05
    for ends, penalty, message in (([], 1.0, "every completion"), ([5], -1.0, "give a number >= 0")):
        with pytest.raises(ValueError, match=message):
            penalise_missing_end(plain, ends, penalty)


# ---- reward models -------------------------------------------------------------------------------------------------

END = 3
CHATS = [([1, END, 2], [2, 1, END]), ([0], [1]), ([END, END], [END]), ([2, 2, 0, 1], [1, END])]


class TinyTrunk(torch.nn.Module):
    """A tiny causal model; its hidden states are the logits of `tiny_model`."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model(4, context=16, dropout=0.3)

    def forward(self, input_ids, attention_mask, position_ids):
        return (self.inner(input_ids, attention_mask, position_ids).logits,)


class TinyReward(torch.nn.Module):
    base_model_prefix, config = "trunk", SimpleNamespace(num_labels=1)

    def __init__(self):
        super().__init__()
        self.trunk, self.score = TinyTrunk(), torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.score.weight.copy_(torch.tensor([[0.3, -0.8, 0.5, 1.1]]))

    def get_input_embeddings(self):
        return self.trunk.inner.tokens


def one_by_one(score):
    """score(ids (1, n)) -> (1, n, 1): the last of each row, without padding."""
    with torch.no_grad():
        return [float(score(torch.tensor([[*x, *y]]))[0, -1, 0]) for x, y in CHATS]


def of_chats(judge):
    return judge.rewards(*(list(column) for column in zip(*CHATS, strict=True)))


def test_a_reward_model_is_read_at_the_last_token_with_pad_equal_to_end():
    model = TinyReward().eval()

    def score(ids):
        return model.score(model.trunk(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])[0])

    expected = one_by_one(score)
    for micro_batch in (1, 3, 16):
        np.testing.assert_allclose(
            of_chats(reward_model_judge(model, micro_batch=micro_batch)), expected, atol=1e-12
        )
    model.train()
    np.testing.assert_allclose(of_chats(reward_model_judge(model)), expected, atol=1e-12)
    assert model.training  # dropout was off in the call, and the mode is what it was
    model.eval()
    faults = {  # where a search by the id of pad = end reads
        "the first end token": lambda row: row.index(END) if END in row else len(row) - 1,
        "the last token that is not an end": lambda row: max(
            i for i, t in enumerate(row) if t != END or not i
        ),
    }
    for place in faults.values():
        with torch.no_grad():
            wrong = [
                float(score(torch.tensor([row]))[0, place(row), 0]) for row in ([*x, *y] for x, y in CHATS)
            ]
        assert np.abs(np.array(wrong) - expected).max() > 1e-3


def test_reward_models_of_another_vocabulary_or_with_more_labels_are_refused():
    model = TinyReward()
    with pytest.raises(ValueError, match=r"row 0: the reward model is given token 4; it has 4 tokens"):
        reward_model_judge(model).rewards([[1]], [[4]])
    with pytest.raises(ValueError, match=r"row 0: the reward model is given no tokens"):
        reward_model_judge(model, translate=lambda x, y: []).rewards([[1]], [[2]])
    model.config = SimpleNamespace(num_labels=2)
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        reward_model_judge(model)
    model.config = TinyReward.config
    policy_words, words = Words(["a b c"]), Words(["c b a z"])
    translate = retokenised(policy_words, words)
    assert translate([1, 0], [3]) == words("a c")["input_ids"]
    np.testing.assert_array_equal(
        reward_model_judge(model, translate=translate).rewards([[1, 0]], [[3]]),
        reward_model_judge(model).rewards([words("a c")["input_ids"]], [[]]),
    )


def test_an_encoder_is_asked_as_a_whole():
    class Encoder(torch.nn.Module):
        base_model_prefix, config = "bert", SimpleNamespace(num_labels=1)

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(4, 1, dtype=torch.float64)
            with torch.no_grad():
                self.table.weight.copy_(torch.tensor([[0.4], [-1.3], [0.7], [2.1]]))

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(
                logits=(self.table(input_ids)[..., 0] * attention_mask).sum(1, keepdim=True)
            )

    model = Encoder()
    weights = model.table.weight[:, 0].tolist()
    np.testing.assert_allclose(
        of_chats(reward_model_judge(model)), [sum(weights[t] for t in [*x, *y]) for x, y in CHATS], rtol=1e-12
    )


@pytest.mark.llm
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_transformers_reward_models_row_by_row(kind):
    """transformers by itself, one unpadded row at a time, told of no pad token; and in a batch, where it errs."""
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=4, eos_token_id=END, bos_token_id=0, num_labels=1, initializer_range=1.0, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        expected = [float(model(torch.tensor([[*x, *y]])).logits[0, 0]) for x, y in CHATS]
    model.config.pad_token_id = END
    np.testing.assert_allclose(of_chats(reward_model_judge(model, micro_batch=3)), expected, atol=1e-10)
    longest = max(len(x) + len(y) for x, y in CHATS)
    rows = [[*x, *y] + [END] * (longest - len(x) - len(y)) for x, y in CHATS]
    mask = [[int(i < len(x) + len(y)) for i in range(longest)] for x, y in CHATS]
    with torch.no_grad():
        theirs = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()
    assert np.abs(theirs - expected).max() > 1e-3


# ---- language models as judges -------------------------------------------------------------------------------------

TEMPLATE = PairTemplate("ask {prompt} is A {first} or B {second}", answers=("A", "B"), opening=" so")


def pair_judge(**options):
    words = Words(["ask is A or B so <user> <judge> yes no {second} maybe"])
    V = len(words.words)
    model = TransformerPolicy(tiny_model(V, context=32), end_ids=[0], pad_id=0, vocabulary=V, context=32)
    return LanguageModelJudge(model, words, **{"template": TEMPLATE, **options})


def test_a_language_model_judges_by_its_answer_tokens_over_both_orders():
    judge = pair_judge()
    words = judge.tokenizer
    x, a, b = (words(t)["input_ids"] for t in ("is", "yes maybe", "no"))

    def shown(first, second):
        text = f"<user> ask is is A {first} or B {second} <judge> so"
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            logits = judge.model.model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]).logits[
                0, -1
            ]
        pair = [words(t)["input_ids"][0] for t in ("A", "B")]
        return float(logits[pair].softmax(0)[0])

    forth, back = shown("yes maybe", "no"), shown("no", "yes maybe")
    (p,), (q,) = judge.preferences([x], [a], [b]), judge.preferences([x], [b], [a])
    assert p == pytest.approx((forth + 1 - back) / 2, abs=1e-12)
    assert p + q == 1
    assert abs(forth + back - 1) > 1e-2  # asked in one order it is no preference
    assert judge.position_bias([x], [a], [b]) == pytest.approx([(forth + back - 1) / 2], abs=1e-12)
    assert judge.questions.count == 3
    several = judge.preferences([x] * 20, [a] * 20, [b] * 20)  # more than a micro-batch
    np.testing.assert_allclose(several, p, atol=1e-12)
    assert judge.preferences([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="'language model' has preferences only"):
        judge.rewards([x], [a])


def test_an_answer_cannot_pull_the_other_one_into_its_place():
    judge = pair_judge(template=replace(TEMPLATE, chat=False))
    words = judge.tokenizer
    read = judge._question("is", "yes {second}", "no")
    assert words.decode(read, clean_up_tokenization_spaces=False) == "ask is is A yes {second} or B no so"
    planted = TEMPLATE.text.replace("{first}", "yes {second}").replace("{second}", "no")
    assert "yes no" in planted


def test_templates_are_checked():
    for text in ("{prompt} {first}", "{prompt} {first} {second} {second}"):
        with pytest.raises(ValueError, match=r"must have \{second\} once"):
            PairTemplate(text)
    with pytest.raises(ValueError, match="two different ones"):
        PairTemplate("{prompt} {first} {second}", answers=("A", "A"))
    with pytest.raises(
        ValueError, match=r"answer 'A B' is the judge's tokens \[\d+, \d+\]; take answers of one token"
    ):
        pair_judge(template=replace(TEMPLATE, answers=("A B", "B")))
    judge = pair_judge()
    long = judge.tokenizer("is " * 40)["input_ids"]
    with pytest.raises(ValueError, match="context of 32: shorten the prompt"):
        judge.preferences([long], [[1]], [[2]])


@pytest.mark.llm
def test_smollm2_as_a_judge_offline():
    loaded = load_smollm2("float32")
    judge = LanguageModelJudge(TransformerPolicy.of(loaded), loaded.tokenizer)
    asked = [
        ("Was the food good?", " Yes, it was delicious.", " Was."),
        ("Name a colour.", " Red.", " Blue."),
    ]
    x, a, b = ([loaded.tokenizer(row[k])["input_ids"] for row in asked] for k in range(3))
    forth, back = judge.preferences(x, a, b), judge.preferences(x, b, a)
    assert (forth + back == 1).all()
    assert ((forth > 0) & (forth < 1)).all()
    bias = judge.position_bias(x, a, b)
    np.testing.assert_allclose(judge.position_bias(x, b, a), bias, atol=1e-5)
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": judge.template.fill(*asked[0])}],
        add_generation_prompt=True,
        return_dict=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = loaded.model(ids).logits[0, -1]
    answers = [loaded.tokenizer.encode(t, add_special_tokens=False)[0] for t in "AB"]
    shown_first = float(logits[answers].softmax(0)[0])
    assert forth[0] + bias[0] == pytest.approx(shown_first, abs=1e-4)
