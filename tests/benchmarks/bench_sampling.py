"""Many responses to a prompt: equal prompts of a micro-batch read once against row by row, on SmolLM2.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_sampling.py [--repeats 3] [--micro-batch 16]

The eight chat prompts of `envs.language_model` with 3 responses each, and the first of them with 16, of 6 and of 32
tokens; the end of a text is out of reach, so that every response is of this length. Both ways draw by the same uniforms
and take turns in one run; CPU seconds of the one thread, medians, and how many responses are the same tokens (float32
moves a law by about 1e-6, and with it a draw now and then).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.envs.language_model import QUESTIONS, context
from preflab.llm_bridge.policy import Samples, Tokens, TransformerPolicy, _ModelDecoder, encode

END = 0  # <|endoftext|>, of next to no probability within an answer


class RowByRow(_ModelDecoder):
    """Every row's prompt is read, whatever the other rows are."""

    def __init__(self, policy: TransformerPolicy, prompts: Sequence[Tokens], cached: bool) -> None:
        assert policy.pad_id is not None
        batch = encode(prompts, [[]] * len(prompts), policy.pad_id, "left", policy.device)
        self._policy, self._cached, self._cache = policy, cached, "new" if cached else None
        self._ids, self._mask = batch.ids, batch.mask
        self._read(batch.ids)


class RowByRowPolicy(TransformerPolicy):
    def decoder(self, prompts: Sequence[Tokens], cached: bool | None = None) -> RowByRow:
        return RowByRow(self, prompts, bool(self.cached if cached is None else cached))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=16)
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed, nothing is measured: pip install 'preflab[llm]'")
        return
    from preflab.llm_bridge.models import open_model

    torch.set_num_threads(1)
    opened = open_model("smollm2")
    assert opened.language_model is not None
    once = replace(opened.policy, end_ids=[END], micro_batch=options.micro_batch)
    rows = RowByRowPolicy(once.model, end_ids=[END], pad_id=once.pad_id, micro_batch=options.micro_batch)
    chats = [context(opened.language_model, question) for question in QUESTIONS]
    lengths = [len(x) for x in chats]
    print(
        f"SmolLM2, prompts of {min(lengths)} to {max(lengths)} tokens, micro-batches of {options.micro_batch}"
    )
    for what, prompts in (
        ("8 prompts x 3", [x for x in chats for _ in range(3)]),
        ("1 prompt x 16", chats[:1] * 16),
    ):
        for tokens in (6, 32):
            generator = torch.Generator().manual_seed(0)
            u = torch.rand(len(prompts), tokens, dtype=torch.float64, generator=generator)
            spent: dict[str, list[float]] = {"once": [], "rows": []}
            drawn: dict[str, Samples] = {}
            for _ in range(options.repeats):
                for name, policy in (("rows", rows), ("once", once)):
                    start = time.process_time()
                    drawn[name] = policy.sample(prompts, tokens, uniforms=u)
                    spent[name].append(time.process_time() - start)
            same = sum(
                a == b for a, b in zip(drawn["once"].completions, drawn["rows"].completions, strict=True)
            )
            before, after = median(spent["rows"]), median(spent["once"])
            print(
                f"{what}, {tokens:2} tokens: row by row {before:.2f} s, once {after:.2f} s, ratio "
                f"{before / after:.2f}; {same} of {len(prompts)} responses equal"
            )


if __name__ == "__main__":
    main()
