"""The same on a GPU: each test runs on the CPU always, and on cuda where there is one."""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preflab.llm_bridge.engines.vllm import cross_check
from preflab.llm_bridge.mixture import TokenMixture
from preflab.llm_bridge.policy import TransformerPolicy, frozen_copy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import TrainSettings, train

END, V, H = 0, 11, 6
PROMPTS = [[1 + i % 10, 1 + i // 10] for i in range(40)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def policy(seed=0, device="cpu", dtype="float64"):
    model = tiny_model(V, context=32, seed=seed, scale=1.2, dtype=dtype).to(device)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=V, context=32)


class Even:
    name = "even"

    def preferences(self, prompts, first, second):
        a, b = ([np.mean([t % 2 == 0 for t in y]) for y in column] for column in (first, second))
        return 1 / (1 + np.exp(np.subtract(b, a)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [True, False])
def test_draws_and_scores_are_those_of_the_cpu(device, cached):
    u = torch.rand(len(PROMPTS), H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    laws = [TokenMixture(policy(0, where), policy(1, where), 0.3) for where in ("cpu", device)]
    here, there = (law.sample(PROMPTS, H, uniforms=u, cached=cached) for law in laws)
    assert there.completions == here.completions
    assert there.token_log_probabilities.device.type == device
    for law in laws:
        scores = law.log_probabilities(PROMPTS, here.completions).detach().cpu()
        torch.testing.assert_close(scores, here.log_probabilities, atol=1e-10, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["nash_md", "inpo", "nash_ema"])
def test_a_run_gives_the_numbers_of_the_cpu(device, method):
    settings = TrainSettings(
        steps=3, batch=8, round_batches=2, horizon=H, learning_rate=0.05, optimiser="sgd", log_with=None
    )
    trained = []
    for where in ("cpu", device):
        mine, own = policy(3, where), replace(settings, device="cpu" if where == "cpu" else None)
        done = train(mine, method, prompts=PROMPTS, judge=Even(), settings=own)
        assert done.step == 3
        trained.append({name: p.detach().cpu() for name, p in mine.model.named_parameters()})
    start = dict(policy(3).model.named_parameters())
    for name, x in trained[0].items():
        torch.testing.assert_close(trained[1][name], x, atol=1e-10, rtol=0)
    assert max(float((x - start[name].detach()).abs().max()) for name, x in trained[0].items()) > 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_draws_are_within_its_rounding_of_the_exact_law(device):
    exact = policy(2)
    coarse = replace(exact, model=copy.deepcopy(exact.model).to(device, torch.bfloat16))
    drawn = coarse.sample(PROMPTS * 10, H, torch.Generator().manual_seed(0))
    drawn = replace(
        drawn,
        token_log_probabilities=drawn.token_log_probabilities.cpu(),
        mask=drawn.mask.cpu(),
        ended=drawn.ended.cpu(),
    )
    assert cross_check(exact, drawn, dtype="bfloat16").problem is None
    assert cross_check(exact, drawn, dtype="float32").problem is not None
    other = policy(5)  # control: another model is out of any rounding
    assert cross_check(other, drawn, dtype="bfloat16").problem is not None


@pytest.mark.parametrize("device", DEVICES)
def test_the_reference_is_moved_to_the_device(device):
    mine, reference = policy(0, device), frozen_copy(policy(1))
    settings = TrainSettings(
        steps=1, batch=4, horizon=H, log_with=None, device="cpu" if device == "cpu" else None
    )
    train(mine, "nash_md", prompts=PROMPTS, judge=Even(), reference=reference, settings=settings)
    assert reference.device.type == device


def benchmark():
    path = Path(__file__).parent / "benchmarks" / "bench_gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    module = importlib.util.module_from_spec(spec)
    kept = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = kept
    return module


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_of_a_gpu_writes_its_table(device, tmp_path, capsys):
    out = tmp_path / "table.md"
    small = [
        "--model",
        "tiny",
        "--dtype",
        "float32",
        "--rows",
        "2",
        "--horizon",
        "4",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    benchmark().main(["--device", device, *small, "--skip-conformance", "--out", str(out)])
    table = out.read_text()
    assert table == capsys.readouterr().out
    assert table.startswith("## CPU" if device == "cpu" else f"## {torch.cuda.get_device_name()}")
    figures = [line.split("|")[2:5] for line in table.splitlines() if line.startswith(("| dpo", "| nash_md"))]
    for ours, bare, ratio in figures:
        assert float(ratio) == pytest.approx(float(bare) / float(ours), rel=0.05)
    assert len(figures) == 2


@pytest.mark.parametrize("device", DEVICES[1:])  # the CPU's are the tests of conformance themselves
def test_conformance_on_the_device(device):
    found = list(benchmark().conformance(device))
    assert len(found) > 15
    assert all(passed for _, _, passed, _ in found)


def test_without_a_gpu_the_benchmark_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark().main([])
    assert "nothing is measured" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="at least 2 steps"):
        benchmark().main(["--device", "cpu", "--steps", "1"])
