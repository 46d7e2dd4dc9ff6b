"""A step of the training loop against a bare PyTorch loop on the same model and tokens, alternating, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py

The bare loops are what one would write by hand for one batch: no records, no metrics but the loss, no checks, no
checkpoints. CPU seconds of the one thread, medians over steps; model and optimiser are the same. Wanted: a ratio of at
most 1.05, for DPO and for Nash-MD, on a GPT-2 of 6 M weights (where transformers is installed) and on models of 4 M and
0.1 M without it; and an import of preflab.llm_bridge.training no dearer than that of transformers. The bare loops
normalise the logits of all positions, as hand-written ones do; the loop does so for the completions' alone.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import TrainSettings, train
from preflab.llm_bridge.training.records import Record

VOCABULARY, END, BATCH, STEPS, ROUNDS = 4000, 0, 8, 6, 4
BETA, TAU, SHARE, HORIZON, RATE = 0.1, 0.1, 0.25, 32, 1e-4
SETTINGS = TrainSettings(
    steps=STEPS, batch=BATCH, horizon=HORIZON, learning_rate=RATE, device="cpu", log_with=None
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, VOCABULARY, size=RNG.integers(8, 17)).tolist() for _ in range(BATCH)]


class Judge:
    """P(first > second) by the share of even tokens: costs nothing."""

    name = "even"

    def preferences(self, prompts: Any, first: Any, second: Any) -> np.ndarray:
        score = [[np.mean([t % 2 == 0 for t in y]) for y in column] for column in (first, second)]
        return 1 / (1 + np.exp(np.subtract(score[1], score[0])))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=6, n_head=4, n_positions=128, bos_token_id=END, eos_token_id=END,
        pad_token_id=END, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def tiny(width: int) -> Any:
    return tiny_model(VOCABULARY, width=width, layers=4, context=128, dtype="float32")


def policy_of(model: Any) -> TransformerPolicy:
    return TransformerPolicy(
        model, end_ids=[END], pad_id=END, vocabulary=VOCABULARY, context=128, micro_batch=2 * BATCH
    )


# ---- the bare loops ------------------------------------------------------------------------------------------------


def padded(prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """ids, mask, positions and the mask of the completions, padded on the right."""
    rows = [torch.tensor(x + y) for x, y in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)
    lengths = torch.tensor([len(r) for r in rows])[:, None]
    before = torch.tensor([len(x) for x in prompts])[:, None]
    place = torch.arange(ids.shape[1])[None]
    mask = (place < lengths).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0), (place >= before) & (place < lengths)


def scores(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    ids, mask, positions, scored = padded(prompts, completions)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return (tokens * scored[:, 1:]).sum(1)


def bare_dpo(model: Any, reference: Any, optimiser: Any, records: list[Record]) -> float:
    prompts = [list(r.prompt) for r in records] * 2
    completions = [list(r.chosen) for r in records] + [list(r.rejected) for r in records]
    log_pi = scores(model, prompts, completions)
    with torch.no_grad():
        log_ref = scores(reference, prompts, completions)
    h = (log_pi - log_ref).reshape(2, -1)
    loss = -logsigmoid(BETA * (h[0] - h[1])).mean()
    return step(loss, optimiser)


def step(loss: torch.Tensor, optimiser: Any) -> float:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def generate(models: list[Any], shares: list[float], prompts: list[list[int]]) -> list[list[int]]:
    """One completion a prompt from the mixture of the models, with a cache each; padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(x)) + x for x in prompts])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
    new, caches, columns = ids, [None] * len(models), []
    live = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(HORIZON):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        mixed = 0.0
        for k, (model, share) in enumerate(zip(models, shares, strict=True)):
            out = model(
                input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=caches[k], use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            caches[k] = out.past_key_values
            mixed = mixed + share * out.logits[:, -1].log_softmax(-1)
        token = torch.multinomial(mixed.softmax(-1), 1)
        columns.append(token)
        live &= token[:, 0] != END
        if not live.any():
            break
        new, mask = token, torch.cat([mask, torch.ones_like(token)], 1)
    rows = torch.cat(columns, 1).tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def bare_nash_md(model: Any, reference: Any, optimiser: Any, prompts: list[list[int]]) -> float:
    first = generate([model], [1.0], prompts)
    second = generate([model, reference], [1 - SHARE, SHARE], prompts)
    wins = torch.tensor(Judge().preferences(prompts, first, second), dtype=torch.float32)
    log_pi = scores(model, prompts, first)
    with torch.no_grad():
        log_ref = scores(reference, prompts, first)
    advantage = wins - 0.5 - TAU * (log_pi.detach() - log_ref)
    return step(-(advantage * log_pi).mean(), optimiser)


# ---- measurement -----------------------------------------------------------------------------------------------------


def bare_seconds(one_step: Callable[[], float]) -> list[float]:
    found = []
    for _ in range(STEPS):
        start = time.process_time()
        one_step()
        found.append(time.process_time() - start)
    return found[1:]


def our_seconds(policy: TransformerPolicy, method: str, **data: Any) -> list[float]:
    """From the end of one step to the end of the next, with everything that the loop does in between."""
    ends = []
    with TemporaryDirectory() as folder:
        train(
            policy,
            method,
            settings=replace(SETTINGS, optimiser="adamw"),
            folder=Path(folder) / "run",
            on_step=lambda row: ends.append(time.process_time()),
            **data,
        )
    return [b - a for a, b in pairwise(ends)]


def compare(name: str, make: Callable[[], Any]) -> None:
    start = make()
    size = sum(p.numel() for p in start.parameters())
    records = [
        Record(
            tuple(x),
            *(tuple(RNG.integers(1, VOCABULARY, size=RNG.integers(20, 41)).tolist()) for _ in range(2)),
        )
        for x in PROMPTS
    ]
    runs: dict[str, tuple[Callable[..., list[float]], dict[str, Any], Callable[..., float], Any]] = {
        "dpo": (our_seconds, {"records": records, "parameters": {"beta": BETA}}, bare_dpo, records),
        "nash_md": (
            our_seconds,
            {"prompts": PROMPTS, "judge": Judge(), "parameters": {"tau": TAU, "share": SHARE}},
            bare_nash_md,
            PROMPTS,
        ),
    }
    for method, (ours, data, bare, batch) in runs.items():
        pairs = []
        for _ in range(ROUNDS):
            model, reference = copy.deepcopy(start), copy.deepcopy(start).requires_grad_(False)
            optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
            hand = median(bare_seconds(lambda: bare(model, reference, optimiser, batch)))  # noqa: B023
            loop = median(ours(policy_of(copy.deepcopy(start)), method, **data))
            pairs.append((loop, hand))
        ratios = sorted(a / b for a, b in pairs)
        loop, hand = (median(x) for x in zip(*pairs, strict=True))
        print(
            f"{name} ({size / 1e6:.1f} M weights), {method}: loop {1e3 * loop:.0f} ms, bare {1e3 * hand:.0f} ms; ratio "
            f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def import_seconds(statement: str, repetitions: int = 5) -> float:
    import resource

    found = []
    for _ in range(repetitions):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", statement], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    have = importlib.util.find_spec("transformers") is not None
    source = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'src')!r}); "
    floor = import_seconds("pass")
    statements = ["import preflab.llm_bridge.training", *(["import transformers"] if have else [])]
    for statement in statements:
        print(f"{statement}: {import_seconds(source + statement) - floor:.2f} CPU s")
    if have:
        compare("GPT-2", gpt2)
    compare("tiny model", lambda: tiny(256))
    compare("tiny model", lambda: tiny(16))
