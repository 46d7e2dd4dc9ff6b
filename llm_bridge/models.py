"""A language model by name: weights, tokenizer and end tokens together, as the command line opens it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..envs.language_model import LanguageModel, load_smollm2, pieces, unusable
from .policy import Tokens, TransformerPolicy, load_policy

SMOLLM2 = "smollm2"
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True, eq=False)
class OpenModel:
    """name as it was given; tokenizer None where the folder has none: then prompts are token ids."""

    name: str
    policy: TransformerPolicy
    tokenizer: Any

    @cached_property
    def language_model(self) -> LanguageModel | None:
        if self.tokenizer is None:
            return None
        ends = tuple(int(i) for i in self.policy.end_ids or ())
        return LanguageModel(self.policy.model, self.tokenizer, ends, {"name": self.name})

    @cached_property
    def pieces(self) -> list[str] | None:
        """The string of each token of the vocabulary; empty for those that a padded model has beyond the tokenizer."""
        if self.language_model is None:
            return None
        strings = pieces(self.language_model)
        return strings + [""] * max(0, (self.policy.vocabulary or 0) - len(strings))

    @cached_property
    def banned(self) -> list[int]:
        """Tokens that are no text by themselves, which a lattice leaves out; none without a tokenizer."""
        if self.language_model is None or self.pieces is None:
            return []
        size = self.policy.vocabulary or len(self.pieces)
        return [i for i in unusable(self.language_model, self.pieces) if i < size]

    @property
    def decode(self) -> Callable[[Tokens], str] | None:
        if self.tokenizer is None:
            return None
        tokenizer = self.tokenizer
        return lambda ids: str(tokenizer.decode([int(i) for i in ids]))

    def readable(self, prompt: Tokens) -> str:
        """A prompt as a page shows it: of a conversation the last question, and the opening of the answer on a line of
        its own; ids where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(f"[{int(i)}]" for i in prompt)
        special = set(self.tokenizer.all_special_ids)
        parts: list[list[int]] = [[]]
        for i in prompt:
            if int(i) in special:
                parts.append([])
            else:
                parts[-1].append(int(i))
        texts = [self.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]
        return last_question(texts)


ROLES = ("system", "user", "assistant", "model", "tool")


def last_question(parts: Sequence[str]) -> str:
    """The last thing that a user says and the opening of the answer, from the texts between a template's marks.

    A role is a part of its own, or the first line of a part. Where there are no roles, the parts together.
    """
    said: list[tuple[str, str]] = []
    role = ""
    for part in parts:
        head, line, rest = part.partition("\n")
        if head.strip() in ROLES:
            role, part = head.strip(), rest if line else ""
        if part.strip():
            said.append((role, part.strip("\n")))
    if not any(who for who, _ in said):
        return "".join(parts)
    questions = [text for who, text in said if who == "user"]
    opening = [said[-1][1]] if said[-1][0] in ("assistant", "model") else []
    return "\n".join([*questions[-1:], *opening])


def open_model(
    model: str, *, dtype: str = "float32", device: str = "cpu", micro_batch: int = 16
) -> OpenModel:
    """ "smollm2" from its wheel, or a folder that transformers' save_pretrained wrote."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    _check_device(device)
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed: pip install 'preflab[llm]'")
    with no_progress_bars():
        return _opened(model, dtype, device, micro_batch)


def _opened(model: str, dtype: str, device: str, micro_batch: int) -> OpenModel:
    if model == SMOLLM2:
        found = load_smollm2(dtype)
        found.model.to(device)
        return OpenModel(model, TransformerPolicy.of(found, micro_batch=micro_batch), found.tokenizer)
    path = Path(model)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no model {model!r}: give {SMOLLM2}, or a folder of save_pretrained"
        )
    tokenizer = _tokenizer(path)
    policy = load_policy(
        path, dtype=dtype, device=device, micro_batch=micro_batch, **_own_tokens(path, tokenizer)
    )
    return OpenModel(model, policy, tokenizer)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers loads without bars on stderr, and shows them again afterwards if it did before; warnings stay."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf: Any = modeling_gguf_pytorch_utils
    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)  # tqdm's own, which the switch does not reach
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it is 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and torch finds no GPU here: take --device cpu")


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _own_tokens(path: Path, tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer knows and the model's configuration may lack: the end token, and with it a pad token."""
    import json

    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            config |= {k: v for k, v in json.loads((path / name).read_text("utf-8")).items() if v is not None}
    end = config.get("eos_token_id", None if tokenizer is None else tokenizer.eos_token_id)
    if end is None and config and any(path.glob("*.safetensors")):  # else `load_policy` says what is missing
        raise ValueError(
            f"{path}: neither config.json nor a tokenizer says which token ends a text: write eos_token_id into "
            "config.json"
        )
    found: dict[str, Any] = {}
    if end is not None and "eos_token_id" not in config:
        found["end_ids"] = [end]
    if end is not None and "pad_token_id" not in config:
        found["pad_id"] = end if isinstance(end, int) else end[0]
    return found


def with_lora(policy: TransformerPolicy, rank: int, seed: int = 0) -> TransformerPolicy:
    """The policy with a LoRA adapter on all its linear layers, which starts as zero and alone is trained.

    Its scale is lora_alpha = 2 rank. The weights of the first factors are drawn from the seed.
    """
    if rank < 1:
        raise ValueError(f"lora is {rank}; the rank is at least 1")
    if importlib.util.find_spec("peft") is None:
        raise ImportError("peft is not installed: pip install 'preflab[llm]'")
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A question of peft's to transformers, in words that the latter finds old.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(
                type(m).__name__ == "Conv1D" for m in policy.model.modules()
            ),  # GPT-2's layers
        )
        model: Any = get_peft_model(policy.model, config)
    return replace(policy, model=model)
