r"""Judges that are models: a reward model, and a language model that is shown both answers.

    reward_model_judge     r = the score at the last token of prompt + completion
    LanguageModelJudge     P(first > second) = the probability of one answer token against the other, over both orders
    folder_judge           either of them from a folder, as the command line asks for it

A reward model reads a sequence at its end. Where that is, is known from the lengths of the rows, and not looked for by
the id of a token: with pad token = end token such a search finds an end token in the prompt, or the token before the
response's own end. transformers searches so (`modeling_layers.GenericForSequenceClassification`, 5.23: the last token
that is not the pad token), which is why the head is called here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.kernels import Array
from ..models import no_progress_bars, open_model
from ..policy import Tokens, TransformerPolicy, accepted_inputs, check_weights, encode
from .judges import (
    Questions,
    RewardJudge,
    Texts,
    averaged,
    check_lengths,
    checked,
    decode,
    no_rewards,
    sigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor

Translate = Callable[[Tokens, Tokens], Sequence[int]]


# ---- a reward model ------------------------------------------------------------------------------------------------


def reward_model_judge(
    model: Any,
    *,
    name: str = "reward model",
    translate: Translate | None = None,
    micro_batch: int = 16,
    scale: float = 1.0,
) -> RewardJudge:
    """A transformers model for sequence classification with one label.

    translate    (prompt, completion) -> the ids that the model reads, where its vocabulary is another one than the
                 policy's (`retokenised`); None = prompt + completion as they are
    micro_batch  rows in one call
    """
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels != 1:
        raise ValueError(f"{type(model).__name__} has {labels} labels; a reward model has one (num_labels=1)")

    def reward(prompts: Texts, completions: Texts) -> Array:
        both = zip(prompts, completions, strict=True)
        rows = [[*x, *y] if translate is None else [int(t) for t in translate(x, y)] for x, y in both]
        _check_rows(name, rows, model)
        parts = [
            _scores(model, rows[first : first + micro_batch]) for first in range(0, len(rows), micro_batch)
        ]
        return np.concatenate(parts)

    return RewardJudge(name, reward, scale)


def _check_rows(name: str, rows: Sequence[Sequence[int]], model: Any) -> None:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    for i, row in enumerate(rows):
        if not len(row) or max(row) >= vocabulary:
            what = f"token {max(row)}; it has {vocabulary} tokens" if len(row) else "no tokens"
            raise ValueError(
                f"judge {name!r}, row {i}: the reward model is given {what}; its tokens are another vocabulary's than "
                "the policy's: give translate=retokenised(...)"
            )


def _scores(model: Any, rows: Sequence[Sequence[int]]) -> Array:
    """(n,): one call of the model on rows that are padded on the right."""
    import torch

    device = next(model.parameters()).device
    batch = encode([()] * len(rows), rows, 0, "right", device)
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = _at_last_tokens(model, inputs, batch.positions, batch.mask)
    finally:
        model.train(training)
    return np.asarray(scores.double().cpu().numpy())


def _at_last_tokens(model: Any, inputs: dict[str, Any], positions: Tensor, mask: Tensor) -> Tensor:
    import torch

    head, trunk = getattr(model, "score", None), getattr(model, model.base_model_prefix, None)
    if head is None or trunk is None:  # an encoder, which reads at its first token: the mask is all it needs
        logits: Tensor = model(**inputs).logits
        return logits[:, 0]
    if "position_ids" in accepted_inputs(trunk):
        inputs["position_ids"] = positions
    hidden = trunk(**inputs)[0]
    last = mask.sum(1) - 1
    found: Tensor = head(hidden[torch.arange(len(last), device=last.device), last])
    return found[:, 0]


def retokenised(tokenizer: Any, reward_tokenizer: Any) -> Translate:
    """The text that a policy's tokenizer spells, without special tokens, in the ids of the reward model's tokenizer."""

    def translate(prompt: Tokens, completion: Tokens) -> Sequence[int]:
        (text,) = decode(tokenizer, [[*prompt, *completion]])
        ids: Sequence[int] = reward_tokenizer(text)["input_ids"]
        return ids

    return translate


# ---- a language model as a judge of pairs --------------------------------------------------------------------------

PLACES = ("prompt", "first", "second")


@dataclass(frozen=True)
class PairTemplate:
    """What the judge reads: a text with {prompt}, {first} and {second}, and the answers that say which is better.

    chat     the text is what a user says, in the tokenizer's chat template
    opening  how the judge's answer begins, which is continued by one of `answers`, one token each
    Placeholders are filled in at once: what stands inside an answer is never read as one, and nothing is executed.
    """

    text: str
    answers: tuple[str, str] = ("A", "B")
    opening: str = ""
    chat: bool = True

    def __post_init__(self) -> None:
        for place in PLACES:
            if self.text.count(f"{{{place}}}") != 1:
                raise ValueError(f"the template must have {{{place}}} once: {self.text!r}")
        if len(self.answers) != 2 or self.answers[0] == self.answers[1]:
            raise ValueError(f"answers are {self.answers}; two different ones are needed")

    def fill(self, prompt: str, first: str, second: str) -> str:
        texts = {"prompt": prompt, "first": first, "second": second}
        return re.sub(r"\{(prompt|first|second)\}", lambda found: texts[found.group(1)], self.text)


DEFAULT_TEMPLATE = PairTemplate(
    "Which of two answers is better?\n\nQuestion: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Reply with A or B only."
)


@dataclass(frozen=True, eq=False)
class LanguageModelJudge:
    """A language model that is asked which of two answers is better.

    model        the judge, as a policy; its tokenizer
    policy_tokenizer  of the texts that are judged; None = the same
    asked in one order it answers p = softmax of the log-probabilities of the two answer tokens; the preference is the
    average over both orders, so that favouring a place cancels: P(a > b) + P(b > a) = 1. How much it favours the place
    that is shown first: `position_bias`.
    """

    model: TransformerPolicy
    tokenizer: Any
    template: PairTemplate = DEFAULT_TEMPLATE
    policy_tokenizer: Any = None
    name: str = "language model"
    questions: Questions = field(default_factory=Questions, repr=False)

    def __post_init__(self) -> None:
        for answer in self.template.answers:
            if len(self._ids(answer)) != 1:
                raise ValueError(
                    f"the answer {answer!r} is the judge's tokens {self._ids(answer)}; take answers of one token each"
                )

    def rewards(self, prompts: Texts, completions: Texts) -> Array:
        raise no_rewards(self.name)

    def preferences(self, prompts: Texts, first: Texts, second: Texts) -> Array:
        check_lengths(self.name, prompts, first, second)
        return self.questions.answered(
            len(prompts), lambda: averaged(*self._both_orders(prompts, first, second))
        )

    def position_bias(self, prompts: Texts, first: Texts, second: Texts) -> Array:
        """(n,): by how much the answer that is shown first gains, 0 without bias, 1/2 where it always wins.

        As many questions as `preferences` of the same pairs.
        """
        check_lengths(self.name, prompts, first, second)

        def ask() -> Array:
            forth, back = self._both_orders(prompts, first, second)
            return np.asarray((forth + back - 1) / 2)

        return self.questions.answered(len(prompts), ask)

    def _both_orders(self, prompts: Texts, first: Texts, second: Texts) -> tuple[Array, Array]:
        """P(shown first > shown second) as it is asked, and with the answers in the other order."""
        n, own = len(prompts), self.policy_tokenizer or self.tokenizer
        if not n:
            return np.empty(0), np.empty(0)
        x, a, b = (decode(own, texts) for texts in (prompts, first, second))
        asked = [self._question(*row) for row in (*zip(x, a, b, strict=True), *zip(x, b, a, strict=True))]
        p = self._prefers_first(asked)
        return p[:n], p[n:]

    def _prefers_first(self, asked: Texts) -> Array:
        """(n,): the probability of the first answer token among the two, after each question."""
        import torch

        a, b = (self._ids(answer)[0] for answer in self.template.answers)
        self.model.check(asked, horizon=1)
        found = []
        with torch.no_grad():
            for first in range(0, len(asked), self.model.micro_batch):
                laws = self.model.decoder(asked[first : first + self.model.micro_batch], False).laws.double()
                found.append((laws[:, a] - laws[:, b]).cpu().numpy())
        return checked(self.name, sigmoid(np.concatenate(found)), len(asked), 0.0, 1.0)

    def _question(self, prompt: str, first: str, second: str) -> list[int]:
        text = self.template.fill(prompt, first, second)
        if self.template.chat:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            return self._ids(text + self.template.opening)
        return [int(t) for t in self.tokenizer(text + self.template.opening)["input_ids"]]

    def _ids(self, text: str) -> list[int]:
        return [int(t) for t in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


# ---- from a folder -------------------------------------------------------------------------------------------------

FOLDER_JUDGES = ("reward-model", "language-model")


def folder_judge(
    kind: str, folder: str, policy_tokenizer: Any, *, scale: float = 1.0, device: str = "cpu"
) -> RewardJudge | LanguageModelJudge:
    """kind "reward-model": a folder of a classifier with one label and its tokenizer; "language-model": a folder of a
    causal language model with a chat template, or "smollm2", asked by `DEFAULT_TEMPLATE`.

    policy_tokenizer  of the texts that are judged
    ValueError where the folder holds no safetensors, no head of one label, or no chat template.
    """
    name = f"{kind}:{folder}"
    if kind == "language-model":
        opened = open_model(folder, device=device)
        if opened.tokenizer is None or getattr(opened.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{name} has no chat template: a judge is asked in conversation; take a chat model, or build a "
                "LanguageModelJudge with a PairTemplate(chat=False)"
            )
        return LanguageModelJudge(
            opened.policy, opened.tokenizer, policy_tokenizer=policy_tokenizer, name=name
        )
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_weights(Path(folder))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with no_progress_bars():
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    if loaded["missing_keys"]:  # transformers would draw them at random
        raise ValueError(
            f"{name} has no weights for {', '.join(sorted(loaded['missing_keys']))}: it is no trained reward model; "
            "give a folder of a sequence classifier with one label"
        )
    reader = AutoTokenizer.from_pretrained(folder, **options)
    translate = (
        None if reader.get_vocab() == policy_tokenizer.get_vocab() else retokenised(policy_tokenizer, reader)
    )
    return reward_model_judge(model.to(device).eval(), name=name, translate=translate, scale=scale)
