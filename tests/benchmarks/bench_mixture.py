"""Sampling from a geometric mixture with a cache for each model against reading the whole text at each token.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_mixture.py [--model gpt2|smollm2] [--tokens 128] [--rows 4]

Both draw by the same uniforms in one run, the cached one `--repeats` times before and after the uncached one; CPU
seconds of the one thread, medians. Whether the completions are the same tokens is printed: float32 moves a law by about
1e-6, and with it a draw now and then. Beside the cached time stands its floor, the forward calls that it needs and
nothing else. Wanted: a ratio of at least 8 at 128 tokens, on a GPT-2 of 124 M random weights (where transformers is
installed) and the 16 rows that a policy reads at once unless told otherwise. With few rows a cached step costs what
reading the weights once costs, however few tokens there are, and the ratio falls.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.llm_bridge.mixture import TokenMixture
from preflab.llm_bridge.policy import Samples, TransformerPolicy

SHARE, PROMPT = 0.25, 16


def gpt2(seed: int) -> TransformerPolicy:
    """GPT-2's size with random weights; no end within reach, so that every completion has its full length."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return TransformerPolicy(GPT2LMHeadModel(config).eval())


def smollm2(seed: int) -> TransformerPolicy:
    """The model, and a second one whose weights are moved by one percent."""
    from preflab.llm_bridge.models import open_model

    policy = open_model("smollm2").policy
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1 + 0.01 * torch.randn(p.shape, generator=generator))
    return policy


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    answer = work()
    return time.process_time() - start, answer


@torch.no_grad()
def calls_alone(models: list[Any], rows: int, tokens: int) -> None:
    """As many forward calls as the cached sampler makes, of both models, with nothing drawn."""
    for model in models:
        out = model(input_ids=torch.ones(rows, PROMPT, dtype=torch.long), use_cache=True, logits_to_keep=1)
        for _ in range(tokens - 1):
            new = torch.ones(rows, 1, dtype=torch.long)
            out = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("gpt2", "smollm2"), default="gpt2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed, nothing is measured: pip install 'preflab[llm]'")
        return
    torch.set_num_threads(1)
    policy, reference = ({"gpt2": gpt2, "smollm2": smollm2}[options.model](seed) for seed in (0, 1))
    mixture = TokenMixture(policy, reference, SHARE)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(1, 1000, (options.rows, PROMPT), generator=generator).tolist()
    u = torch.rand(options.rows, options.tokens, dtype=torch.float64, generator=generator)

    def draw(cached: bool) -> Samples:
        return mixture.sample(prompts, options.tokens, uniforms=u, cached=cached)

    fast, bare, models = [], [], [policy.model, reference.model]
    drawn: dict[bool, Samples] = {}
    slow = 0.0
    for k in range(2 * options.repeats):
        spent, drawn[True] = seconds(lambda: draw(True))
        fast.append(spent)
        bare.append(seconds(lambda: calls_alone(models, options.rows, options.tokens))[0])
        if k + 1 == options.repeats:
            slow, drawn[False] = seconds(lambda: draw(False))
    same = [a == b for a, b in zip(drawn[True].completions, drawn[False].completions, strict=True)]
    lengths = [len(y) for y in drawn[True].completions]
    print(
        f"{options.model}, {options.rows} rows of {min(lengths)} to {max(lengths)} tokens after {PROMPT}: cached "
        f"{median(fast):.2f} s, uncached {slow:.2f} s, ratio {slow / median(fast):.1f}; the forward calls of "
        f"the cached one alone {median(bare):.2f} s ({median(fast) / median(bare):.2f} times); "
        f"{sum(same)} of {len(same)} completions equal"
    )


if __name__ == "__main__":
    main()
