"""From texts and conversations to token ids, with the boundary between prompt and completion in view.

A policy continues the ids of a prompt. So what is trained on must be the ids of the prompt, followed by ids that the
policy could have written itself. That is not what a tokenizer gives for the whole text where a token reaches across the
boundary ("The sky is b" + "lue."), nor where a chat template writes something else in front of the answer when it asks
for one than when it shows one. Such a text is refused, with both tokenisations; `boundary="prompt"` keeps the ids of
the prompt, and gives the completion ids of its own.

A completion ends at its end token, which it holds once: what a template writes after it (a line break, say) is not a
part of the response, since no policy writes on after its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Ids = tuple[int, ...]
Messages = Sequence[Mapping[str, Any]]
Text = str | Messages
Boundary = Literal["refuse", "prompt"]
SHOWN = 6  # tokens on each side of a place in a message


@dataclass(frozen=True, eq=False)
class Encoder:
    """How texts become token ids.

    tokenizer   a transformers tokenizer; conversations also need its chat template
    end_ids     the tokens that end a completion, the first one is appended; None = the tokenizer's own
    append_end  a completion without an end token is given one
    boundary    "refuse" a completion whose ids do not follow those of its prompt, or "prompt": keep the prompt's ids,
                and tokenise the completion by itself
    """

    tokenizer: Any
    end_ids: Sequence[int] | None = None
    append_end: bool = True
    boundary: Boundary = "refuse"

    def __post_init__(self) -> None:
        if self.boundary not in ("refuse", "prompt"):
            raise ValueError(f"boundary is {self.boundary!r}; it is 'refuse' or 'prompt'")

    @cached_property
    def ends(self) -> Ids:
        own = getattr(self.tokenizer, "eos_token_id", None)
        ends: list[Any] = [own] if self.end_ids is None else list(self.end_ids)
        if not ends or ends[0] is None:
            raise ValueError(
                "the tokenizer has no end token: give end_ids=[...], the tokens that end a completion"
            )
        return tuple(int(i) for i in ends)

    @cached_property
    def _behind(self) -> int:
        """How many special tokens the tokenizer puts behind every text."""
        with_special, plain = self._tokens("a", True), self._tokens("a", False)
        return next(
            (
                len(with_special) - i - len(plain)
                for i in range(len(with_special))
                if with_special[i : i + len(plain)] == plain
            ),
            0,
        )

    def _tokens(self, text: str, special: bool) -> Ids:
        return tuple(int(i) for i in self.tokenizer(text, add_special_tokens=special)["input_ids"])

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def prompt(self, prompt: Text) -> Ids:
        """A text as it is, with what the tokenizer puts in front of a text; a conversation up to where it is answered.

        A conversation whose last message is the assistant's is the opening of its answer, which is to be continued.
        """
        if isinstance(prompt, str):
            return self.text(prompt)
        if not prompt:
            raise ValueError("it has no messages")
        opened = prompt[-1].get("role") == "assistant"
        return self._tokens(
            self._rendered(prompt, add_generation_prompt=not opened, continue_final_message=opened), False
        )

    def text(self, text: str) -> Ids:
        ids = self._tokens(text, True)
        return ids[: len(ids) - self._behind]

    def _rendered(self, messages: Messages, **options: Any) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "it is a conversation, and the tokenizer has no chat template: set tokenizer.chat_template"
            )
        return str(self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))

    def plain(self, text: str) -> Ids:
        """The text alone, without what the tokenizer puts around a text."""
        return self._tokens(text, False)

    def conversation(self, messages: Messages) -> Ids:
        """A whole conversation, with all that the template writes."""
        return self._tokens(self._rendered(messages), False)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens as they are spelt."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    # ---- completions -----------------------------------------------------------------------------------------------

    def completion(self, prompt: Text, completion: Text) -> Ids:
        """The ids that follow `self.prompt(prompt)`; ValueError where the boundary does not hold."""
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("one of prompt and completion is a text and the other a conversation")
        if not len(completion) or self._content(completion) == "":
            raise ValueError(
                "it is empty; a response has at least its end token: remove the row, or spell the end token"
            )
        before = self.prompt(prompt)
        if isinstance(completion, str):
            assert isinstance(prompt, str)
            whole = self.text(prompt + completion)
        else:
            whole = self.conversation([*prompt, *completion])  # type: ignore[list-item]
        if whole[: len(before)] != before:
            if self.boundary == "refuse":
                raise ValueError(self._moved(before, whole))
            return self._alone(completion)
        ids = self._ended(whole[len(before) :])
        content = self._content(completion)
        if not isinstance(completion, str) and content is not None and not self._shows(ids, content):
            if self.boundary == "refuse":
                raise ValueError(
                    f"the chat template writes {self.spell(ids)!r} after the prompt where the answer is "
                    f"{content!r}: what it adds is not in its generation prompt, so no policy is asked for the answer "
                    "alone; correct the template, or take boundary='prompt'"
                )
            return self._alone(completion)
        return ids

    def _content(self, completion: Text) -> str | None:
        """The text of an answer of one message; None where there is no such thing."""
        if isinstance(completion, str):
            return completion
        content = completion[0].get("content") if len(completion) == 1 else None
        return content if isinstance(content, str) else None

    def _shows(self, ids: Ids, content: str) -> bool:
        return self.spell([i for i in ids if i not in self.ends]).strip() == content.strip()

    def _alone(self, completion: Text) -> Ids:
        content = self._content(completion)
        if content is None:
            raise ValueError("an answer of several messages, or without content, has no tokens of its own")
        return self._ended(self.plain(content))

    def _ended(self, ids: Ids) -> Ids:
        """Up to its end token; with one where it has none and `append_end` is set."""
        at = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if at is None:
            return (*ids, self.ends[0]) if self.append_end else ids
        rest = self.spell(ids[at + 1 :])
        if rest.strip():
            raise ValueError(
                f"it goes on after its end token, by {rest!r}; a response ends at its first end token: remove "
                "the rest, or make what is before it a part of the prompt"
            )
        return ids[: at + 1]

    def shared(self, first: Text, second: Text) -> tuple[Ids, Ids, Ids]:
        """Prompt and two completions from texts that share their beginning.

        The prompt is what they have in common: of conversations the messages, of texts the tokens of the whole texts
        (TRL 1.13.0 takes the characters, which can cut a token in two; 1.16.0 goes back to the whole token, as here).
        """
        if isinstance(first, str) != isinstance(second, str):
            raise ValueError("one of chosen and rejected is a text and the other a conversation")
        least = min(len(first), len(second))
        if not isinstance(first, str) and not isinstance(second, str):
            n = _common(first[: least - 1], second[: least - 1]) if least else 0
            if not n:
                raise ValueError("chosen and rejected share no first message: give a column prompt")
            return (
                self.prompt(first[:n]),
                self.completion(first[:n], first[n:]),
                self.completion(first[:n], second[n:]),
            )
        a, b = self.text(str(first)), self.text(str(second))
        n = _common(a, b)
        if not n:
            raise ValueError("chosen and rejected share no beginning: give a column prompt")
        if n in (len(a), len(b)) and not self.append_end:
            raise ValueError("one of chosen and rejected is the beginning of the other: give a column prompt")
        return a[:n], self._ended(a[n:]), self._ended(b[n:])

    # ---- messages --------------------------------------------------------------------------------------------------

    def _moved(self, before: Ids, whole: Ids) -> str:
        at = _common(before, whole)
        return (
            "the prompt's token ids are not the first ones of the whole text's: from token "
            f"{max(at - SHOWN, 0)} on, the prompt alone is {self._shown(before, at)} and with its completion "
            f"{self._shown(whole, at)}: move the boundary to where no token crosses it (a blank belongs "
            "to the completion), or take boundary='prompt', which keeps the prompt's ids and gives the completion its "
            "own ones"
        )

    def _shown(self, ids: Ids, at: int) -> str:
        part = list(ids[max(at - SHOWN, 0) : at + SHOWN])
        return f"{part} {[self.spell([i]) for i in part]}"


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
