"""On a GPU: conformance at levels 1 to 4, and steps of DPO and of Nash-MD on SmolLM2 against a bare loop there.

    python tests/benchmarks/bench_gpu.py                                  # SmolLM2 in bf16 on cuda
    python tests/benchmarks/bench_gpu.py --device cpu --model tiny --dtype float32 --steps 3    # that every part runs

Levels 1 and 4 hold every loss of the package, computed on the device in float64, to enumerated gradients and fixed
points; levels 2 and 3 hold policy, reference and mixture, cached or not and padded on either side, to enumerated laws.
The ratio is of tokens a second, of the bare loop to ours: what one would write by hand for one batch against the loop
with its records and checks, alternating, medians over steps and rounds, the device synchronised before each reading.
The table goes to standard output, and with --out to a file, with the device's name, for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.llm_bridge.conformance import conform
from preflab.llm_bridge.conformance.conform_trainer import conform_trainer
from preflab.llm_bridge.conformance.ours import trainers
from preflab.llm_bridge.conformance.ours_whole import PolicyTrainer
from preflab.llm_bridge.conformance.targets import TARGETS
from preflab.llm_bridge.mixture import TokenMixture
from preflab.llm_bridge.policy import TransformerPolicy, encode, frozen_copy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import TrainSettings, train
from preflab.llm_bridge.training.records import Record

BETA, TAU, SHARE, RATE = 0.1, 0.1, 0.25, 1e-6


def name_of(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"CPU, one thread, torch {torch.__version__}"


# ---- conformance -----------------------------------------------------------------------------------------------------


def moved(x: Any, device: str) -> Any:
    """A batch with its tensors on the device; gradients pass."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


def on_device(loss: Callable[[Any], torch.Tensor], device: str) -> Callable[[Any], torch.Tensor]:
    return lambda batch: loss(moved(batch, device)).cpu()


def conformance(device: str) -> Iterator[tuple[str, str, bool, str]]:
    """(levels, what, passed, figure)."""
    for name, ours in trainers().items():
        loss = ours.build(**TARGETS[ours.against].checked({}))
        report = conform(on_device(loss, device), ours.against, name=name, variance=False)
        gradient = next(c for c in report.checks if c.name == "gradient")
        error = gradient.numbers.get("error", float("nan"))
        yield "1, 4", name, report.ok, f"gradient off by {error:.0e}"

    class OnDevice(PolicyTrainer):
        def of(self, model: Any) -> TransformerPolicy:
            return super().of(model.to(device))

        def log_probabilities(self, prompts: Any, completions: Any, role: str, side: Any) -> Any:
            return super().log_probabilities(prompts, completions, role, side).cpu()

    kinds = ["tiny", *(["llama"] if importlib.util.find_spec("transformers") else [])]
    for kind in kinds:
        report = conform_trainer(OnDevice, levels=(2, 3), world=kind, name=f"policies on {kind}")
        failed = [c.name for c in report.checks if c.status == "fail"]
        yield (
            "2, 3",
            f"policies on {kind}",
            report.ok,
            f"{len(report.checks)} checks, failed: {failed or 'none'}",
        )


# ---- throughput ------------------------------------------------------------------------------------------------------


def open_policy(model: str, dtype: str, device: str) -> TransformerPolicy:
    if model == "tiny":
        made = tiny_model(500, width=64, layers=2, context=160, dtype=dtype).to(device)
        return TransformerPolicy(made, end_ids=[0], pad_id=0, vocabulary=500, context=160)
    from preflab.llm_bridge.models import open_model

    return open_model(model, dtype=dtype, device=device).policy


class Even:
    """P(first > second) by the share of even tokens: costs nothing."""

    name = "even"

    def preferences(self, prompts: Any, first: Any, second: Any) -> np.ndarray:
        score = [[np.mean([t % 2 == 0 for t in y]) for y in column] for column in (first, second)]
        return 1 / (1 + np.exp(np.subtract(score[1], score[0])))


class Bare:
    """The loops that one would write by hand, for one batch."""

    def __init__(self, policy: TransformerPolicy, rows: int, horizon: int) -> None:
        self.policy = replace(policy, model=copy.deepcopy(policy.model), micro_batch=2 * rows)
        self.reference = replace(frozen_copy(policy), micro_batch=2 * rows)
        self.optimiser = torch.optim.AdamW(self.policy.model.parameters(), lr=RATE, weight_decay=0.0)
        self.horizon = horizon

    def scores(
        self, policy: TransformerPolicy, prompts: Sequence[Any], completions: Sequence[Any]
    ) -> torch.Tensor:
        batch = encode(prompts, completions, policy.pad_id, "right", policy.device)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        laws = policy.model(**inputs).logits[:, :-1].float().log_softmax(-1)
        tokens = laws.gather(2, batch.ids[:, 1:, None])[:, :, 0]
        return (tokens * batch.scored[:, 1:]).sum(1)

    def step(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        loss.item()

    def dpo(self, records: Sequence[Record]) -> int:
        prompts = [r.prompt for r in records] * 2
        completions = [r.chosen for r in records] + [r.rejected for r in records]
        log_pi = self.scores(self.policy, prompts, completions)
        with torch.no_grad():
            log_ref = self.scores(self.reference, prompts, completions)
        h = (log_pi - log_ref).reshape(2, -1)
        self.step(-logsigmoid(BETA * (h[0] - h[1])).mean())
        return sum(map(len, completions))

    @torch.no_grad()
    def generate(self, models: Sequence[tuple[Any, float]], prompts: Sequence[Any]) -> list[list[int]]:
        ends, device = torch.tensor(self.policy.end_ids, device=self.policy.device), self.policy.device
        start = encode(prompts, [[]] * len(prompts), self.policy.pad_id, "left", device)
        mask, new = start.mask, start.ids
        caches: list[Any] = [None] * len(models)
        columns: list[torch.Tensor] = []
        live = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for _ in range(self.horizon):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            mixed: Any = 0.0
            for k, (model, share) in enumerate(models):
                out = model(
                    input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=caches[k],
                    use_cache=True, logits_to_keep=1,
                )  # fmt: skip
                caches[k] = out.past_key_values
                mixed = mixed + share * out.logits[:, -1].float().log_softmax(-1)
            new = torch.multinomial(mixed.softmax(-1), 1)
            columns.append(new)
            live &= ~torch.isin(new[:, 0], ends)
            if not live.any():
                break
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        rows = torch.cat(columns, 1)
        stop = torch.isin(rows, ends)
        length = torch.where(stop.any(1), stop.int().argmax(1) + 1, rows.shape[1]).tolist()
        return [row[:n] for row, n in zip(rows.tolist(), length, strict=True)]

    def nash_md(self, prompts: Sequence[Any]) -> int:
        model, reference = self.policy.model, self.reference.model
        first = self.generate([(model, 1.0)], prompts)
        second = self.generate([(model, 1 - SHARE), (reference, SHARE)], prompts)
        wins = torch.tensor(Even().preferences(prompts, first, second), device=self.policy.device).float()
        log_pi = self.scores(self.policy, prompts, first)
        with torch.no_grad():
            log_ref = self.scores(self.reference, prompts, first)
        self.step(-((wins - 0.5 - TAU * (log_pi.detach() - log_ref)) * log_pi).mean())
        return sum(map(len, [*first, *second]))  # as the loop counts them


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def throughput(
    policy: TransformerPolicy, device: str, options: Any
) -> Iterator[tuple[str, float, float, float]]:
    """(method, our tokens a second, the bare loop's, the ratio of the latter to ours)."""
    rng = np.random.default_rng(0)
    most = policy.vocabulary or 500

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, min(most, 400), size=rng.integers(low, high)).tolist())

    rows, horizon = options.rows, options.horizon
    records = [
        Record(text(8, 17), text(horizon // 2, horizon), text(horizon // 2, horizon)) for _ in range(rows)
    ]
    prompts = [list(r.prompt) for r in records]
    settings = TrainSettings(
        steps=options.steps, batch=rows, horizon=horizon, learning_rate=RATE, log_with=None,
        device="cpu" if device == "cpu" else None,
    )  # fmt: skip
    jobs: dict[str, tuple[dict[str, Any], Any]] = {
        "dpo": ({"records": records, "parameters": {"beta": BETA}}, records),
        "nash_md": (
            {"prompts": prompts, "judge": Even(), "parameters": {"tau": TAU, "share": SHARE}},
            prompts,
        ),
    }
    for method, (data, batch) in jobs.items():
        ours, hand, ratios = [], [], []
        for _ in range(options.rounds):
            bare, rates = Bare(policy, rows, horizon), []
            for _ in range(options.steps):
                start = now(device)
                tokens = getattr(bare, method)(batch)
                rates.append(tokens / (now(device) - start))
            hand.append(median(rates[1:]))
            ends: list[tuple[float, int]] = []
            mine = replace(policy, model=copy.deepcopy(policy.model), micro_batch=2 * rows)
            train(
                mine, method, settings=settings, on_step=lambda row: ends.append((now(device), row["tokens"])),  # noqa: B023
                **data,
            )  # fmt: skip
            ours.append(median(b[1] / (b[0] - a[0]) for a, b in pairwise(ends)))
            ratios.append(hand[-1] / ours[-1])
        yield method, median(ours), median(hand), median(ratios)


def mixture_ratio(policy: TransformerPolicy, device: str, options: Any) -> tuple[float, float]:
    """Seconds of cached and of uncached sampling from a mixture."""
    mixture = TokenMixture(policy, frozen_copy(policy), SHARE)
    prompts = [[1, 2, 3, 4]] * min(options.rows, policy.micro_batch)
    u = torch.rand(
        len(prompts), options.horizon, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    found = []
    for cached in (True, False):
        mixture.sample(prompts, 2, uniforms=u[:, :2], cached=cached)
        start = now(device)
        mixture.sample(prompts, options.horizon, uniforms=u, cached=cached)
        found.append(now(device) - start)
    return found[0], found[1]


def lines_of(options: Any) -> Iterator[str]:
    device = options.device
    yield f"## {name_of(device)}"
    yield ""
    if not options.skip_conformance:
        yield "| level | what | outcome | figure |"
        yield "|---|---|---|---|"
        for level, what, passed, figure in conformance(device):
            yield f"| {level} | {what} | {'pass' if passed else 'FAIL'} | {figure} |"
        yield ""
    policy = open_policy(options.model, options.dtype, device)
    yield (
        f"{options.model} in {options.dtype}, {options.rows} rows of at most {options.horizon} tokens, {options.steps} "
        f"steps, median of {options.rounds} rounds"
    )
    yield ""
    yield "| method | tokens a second | bare loop | ratio, bare to ours |"
    yield "|---|---|---|---|"
    for method, ours, hand, ratio in throughput(policy, device, options):
        yield f"| {method} | {ours:.0f} | {hand:.0f} | {ratio:.3f} |"
    fast, slow = mixture_ratio(policy, device, options)
    yield f"| mixture, uncached against cached | {fast:.2f} s | {slow:.2f} s | {slow / fast:.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a folder of save_pretrained")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, value in (("rows", 16), ("horizon", 128), ("steps", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--skip-conformance", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no GPU, nothing is measured: take a machine with one, or --device cpu --model tiny"
        )
        return
    if options.steps < 2 or options.rounds < 1:
        raise SystemExit("at least 2 steps of 1 round are needed: the first step warms up")
    if options.device == "cpu":
        torch.set_num_threads(1)
    found = []
    for line in lines_of(options):
        print(line, flush=True)
        found.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
