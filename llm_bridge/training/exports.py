"""Rounds of a run for other trainers: OpenRLHF and open-instruct.

Their loaders take labels, so the response that is likelier to be preferred is written as `chosen`; p_chosen is written
beside it, and is not read there. Ties, p_chosen = 1/2 or equal responses, have no label and are left out. The token ids
that their loaders make of each row are computed in the same way (the sources are named at each function), and compared
with those of the record: `Exported` says how many rows they would read otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..policy import Tokens
from .chat import Encoder, Ids, Messages
from .records import Record, placed, read_records
from .row_files import write_rows


@dataclass(frozen=True)
class Exported:
    """rows written; ties left out; and of the rows written:

    cut          those with a response that was cut at the horizon: the other trainer gives it an end token
    moved        those that the other trainer reads as other token ids, most cut ones among them
    first_moved  the first of these, in words
    """

    rows: int
    ties: int
    cut: int
    moved: int
    first_moved: str | None = None


def read_rounds(folder: str | os.PathLike[str]) -> list[Record]:
    """All records of a run folder, round by round; equal pairs are kept."""
    files = sorted((Path(folder) / "records").glob("round_*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{Path(folder) / 'records'} has no round_*.jsonl: it is no folder of a run with rounds"
        )
    return [record for file in files for record in read_records(file, equal="keep")]


def export_openrlhf(records: Iterable[Record], path: str | os.PathLike[str], tokenizer: Any) -> Exported:
    """{"prompt": text, "chosen": text, "rejected": text}, special tokens as they are spelt (.jsonl, .json, .parquet).

    For `--data.prompt_key prompt`, and without `--data.apply_chat_template`: `prompt` has the template in it. From
    OpenRLHF 0.11.0 (commit 3c3be62), openrlhf/datasets/reward_dataset.py: prompt + response is tokenised as a whole,
    without special tokens added, after line breaks at its end are taken off; where it does not end by the end token's
    text, a blank and the end token are appended; the last token is made the end token.
    """
    encoder = Encoder(tokenizer)
    end = encoder.spell(encoder.ends[:1])

    def row(record: Record) -> dict[str, Any]:
        return {
            "prompt": encoder.spell(record.prompt),
            "chosen": encoder.spell(record.chosen),
            "rejected": encoder.spell(record.rejected),
        }

    def read(row: Mapping[str, Any], name: str) -> Ids:
        text = (row["prompt"] + row[name]).rstrip("\n")
        ids = encoder.plain(text if text.endswith(end) else f"{text} {end}")
        return (*ids[:-1], encoder.ends[0])

    return _export(records, path, encoder, row, read)


def export_open_instruct(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    tokenizer: Any,
    messages: Callable[[Ids], Messages] | None = None,
) -> Exported:
    """{"chosen": messages, "rejected": messages}, each the conversation with its answer (.jsonl, .json, .parquet).

    messages  the conversation of a prompt's token ids (`conversations` makes such a function); None = one message of
              the user's, the prompt's text. ValueError where the chat template does not give the prompt's ids back

    From open-instruct's main branch (commit e6c3044), open_instruct/dataset_transformation.py, whose default keys are
    `chosen` and `rejected` (preference_tulu_tokenize_and_truncate_v1, preference_tokenize_v1): lists of messages that
    differ in the last one, tokenised by the chat template as a whole.
    """
    encoder = Encoder(tokenizer)

    def row(record: Record) -> dict[str, Any]:
        known = messages is not None
        asked = messages(record.prompt) if messages is not None else _as_user(encoder, record.prompt)
        asked = [dict(message) for message in asked]
        if encoder.prompt(asked) != record.prompt:
            raise ValueError(
                f"the chat template makes other token ids of {asked} than the prompt's: "
                + (
                    "give the conversation that it was made of"
                    if known
                    else "give messages=conversations(...)"
                )
            )
        return {
            name: [*asked, {"role": "assistant", "content": encoder.spell(_without_end(ids, encoder.ends))}]
            for name, ids in (("chosen", record.chosen), ("rejected", record.rejected))
        }

    def read(row: Mapping[str, Any], name: str) -> Ids:
        return encoder.conversation(row[name])

    return _export(records, path, encoder, row, read)


def conversations(known: Iterable[Messages], tokenizer: Any) -> Callable[[Ids], Messages]:
    """From the token ids of a prompt back to the conversation, one of those given."""
    encoder = Encoder(tokenizer)
    table = {encoder.prompt(messages): messages for messages in known}

    def find(prompt: Ids) -> Messages:
        if prompt not in table:
            raise ValueError(
                f"the prompt {encoder.spell(prompt)!r} is none of the {len(table)} conversations given"
            )
        return table[prompt]

    return find


def _as_user(encoder: Encoder, prompt: Ids) -> Messages:
    return [{"role": "user", "content": encoder.spell(prompt)}]


def _without_end(ids: Tokens, ends: Sequence[int]) -> list[int]:
    return [int(t) for t in (ids[:-1] if len(ids) and ids[-1] in ends else ids)]


def _export(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    encoder: Encoder,
    row: Callable[[Record], dict[str, Any]],
    read: Callable[[Mapping[str, Any], str], Ids],
) -> Exported:
    rows: list[dict[str, Any]] = []
    ties = cut = moved = 0
    first_moved = None
    for i, record in enumerate(records):
        if record.chosen == record.rejected or record.p_chosen == 0.5:
            ties += 1
            continue
        if record.p_chosen < 0.5:
            record = replace(
                record, chosen=record.rejected, rejected=record.chosen, p_chosen=1 - record.p_chosen
            )
        with placed(f"record {i}"):
            written = row(record)
            cut += any(y[-1] not in encoder.ends for y in (record.chosen, record.rejected))
            for name in ("chosen", "rejected"):
                ids, whole = read(written, name), (*record.prompt, *getattr(record, name))
                if not _same(ids, whole, encoder):
                    moved += 1
                    first_moved = first_moved or f"record {i}, {name}: {list(whole)} is read as {list(ids)}"
                    break
        extra = {"p_chosen": record.p_chosen, "round": record.round}
        rows.append(written | extra | ({} if record.query_id is None else {"query_id": record.query_id}))
    if not rows:
        raise ValueError(f"{path}: there is no comparison to write ({ties} ties were left out)")
    write_rows(path, rows)
    return Exported(len(rows), ties, cut, moved, first_moved)


def _same(read: Ids, whole: Ids, encoder: Encoder) -> bool:
    """Equal up to blank text that a template writes after the end."""
    behind = read[len(whole) :]
    return read[: len(whole)] == whole and not (behind and encoder.spell(behind).strip())
