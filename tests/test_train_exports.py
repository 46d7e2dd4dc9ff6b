"""Rounds for OpenRLHF and open-instruct: labels, and what their loaders read, by loaders written again here."""

import json
from dataclasses import replace

import pytest
from preflab.llm_bridge.training.exports import (
    conversations,
    export_open_instruct,
    export_openrlhf,
    read_rounds,
)
from preflab.llm_bridge.training.records import Record, write_records

PIECES = ("<e>", "<u>", "<a>", *"abcdefghijklmnopqrstuvwxyz .\n", "blue")
END = 0


class Toy:
    """The longest piece first. Templates: "<u>question<e>\\n<a>answer<e>\\n"; "system" puts one more message first."""

    eos_token_id = END

    def __init__(self, chat_template="plain"):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        ids, at = [], 0
        while at < len(text):
            ids.append(max((p for p in PIECES if text.startswith(p, at)), key=len))
            at += len(ids[-1])
        return {"input_ids": [PIECES.index(p) for p in ids]}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        return "".join(PIECES[i] for i in ids)

    def apply_chat_template(
        self, messages, tokenize, add_generation_prompt=False, continue_final_message=False
    ):
        text = "<u>be nice<e>\n" if self.chat_template == "system" else ""
        for m in messages:
            text += f"{'<u>' if m['role'] == 'user' else '<a>'}{m['content']}<e>\n"
        return text + "<a>" * add_generation_prompt


def ids(text):
    return tuple(Toy()(text)["input_ids"])


def record(chosen, rejected, p_chosen=1.0, prompt="<u>sky<e>\n<a>", **more):
    return Record(
        ids(prompt), *(ids(t) if isinstance(t, str) else t for t in (chosen, rejected)), p_chosen, **more
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PAIRS = [
    record("blue<e>", "red<e>", 0.9, query_id="q1", round=2),
    record("no<e>", "yes<e>", 0.2),
    record("a<e>", "b<e>", 0.5),
    record("same<e>", "same<e>"),
]


# ---- labels --------------------------------------------------------------------------------------------------------


def test_the_likelier_one_is_chosen_and_ties_are_left_out(tmp_path):
    done = export_openrlhf(PAIRS, tmp_path / "a.jsonl", Toy())
    assert (done.rows, done.ties, done.cut, done.moved, done.first_moved) == (2, 2, 0, 0, None)
    first, second = rows_of(tmp_path / "a.jsonl")
    assert first == {
        "prompt": "<u>sky<e>\n<a>",
        "chosen": "blue<e>",
        "rejected": "red<e>",
        "p_chosen": 0.9,
        "round": 2,
        "query_id": "q1",
    }
    assert (second["chosen"], second["rejected"], second["p_chosen"]) == ("yes<e>", "no<e>", 0.8)
    assert "query_id" not in second
    with pytest.raises(ValueError, match=r"b\.jsonl: there is no comparison to write \(2 ties were left out"):
        export_openrlhf(PAIRS[2:], tmp_path / "b.jsonl", Toy())
    assert not (tmp_path / "b.jsonl").exists()


def test_the_rounds_of_a_run_are_read_in_order(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no round_\*\.jsonl: it is no folder of a run with rounds"
    ):
        read_rounds(tmp_path)
    (tmp_path / "records").mkdir()
    for number, part in enumerate((PAIRS[:1], PAIRS[1:])):
        write_records(tmp_path / "records" / f"round_{number:04d}.jsonl", part)
    assert read_rounds(tmp_path) == PAIRS  # the equal pair too


# ---- what the other loaders read -----------------------------------------------------------------------------------


def openrlhf_reads(row, name):
    """OpenRLHF's reward dataset: text, line breaks off, an end token where there is none, and the last id is it."""
    text = (row["prompt"] + row[name]).rstrip("\n")
    if not text.endswith("<e>"):
        text += " <e>"
    found = list(ids(text))
    found[-1] = END
    return tuple(found)


AWKWARD = [
    record("blue<e>", "red<e>"),
    record("blue", "red<e>"),  # cut at the horizon
    record((*ids("b"), *ids("lue"), END), "red<e>"),  # a policy may write this, no tokenizer does
    record("red<e>", (*ids("b"), *ids("lue"), END), 0.1),
    record("blue\n", "red<e>"),  # line breaks at the end are taken off
    record("lue<e>", "red<e>", prompt="<u>b"),  # a token reaches over the boundary
]


def test_rows_that_openrlhf_reads_otherwise_are_counted(tmp_path):
    done = export_openrlhf(AWKWARD, tmp_path / "a.jsonl", Toy())
    rows = rows_of(tmp_path / "a.jsonl")
    moved = []
    for i, (row, r) in enumerate(zip(rows, AWKWARD, strict=True)):
        pair = (r.chosen, r.rejected) if r.p_chosen > 0.5 else (r.rejected, r.chosen)
        read = [openrlhf_reads(row, name) for name in ("chosen", "rejected")]
        if read != [r.prompt + y for y in pair]:
            moved.append(i)
    assert moved == [1, 2, 3, 4, 5]
    assert (done.rows, done.cut, done.moved) == (6, 2, len(moved))
    assert done.first_moved.startswith("record 1, chosen: [")
    assert f"is read as {list(openrlhf_reads(rows[1], 'chosen'))}" in done.first_moved


SKY = [{"role": "user", "content": "sky"}]


def test_rows_that_open_instruct_reads_otherwise_are_counted(tmp_path):
    known = conversations([SKY, [{"role": "user", "content": "sea"}]], Toy())
    done = export_open_instruct(AWKWARD[:5], tmp_path / "a.jsonl", Toy(), known)
    rows = rows_of(tmp_path / "a.jsonl")
    assert rows[0]["chosen"] == [*SKY, {"role": "assistant", "content": "blue"}]
    assert rows[3]["rejected"] == [*SKY, {"role": "assistant", "content": "red"}]
    moved = []
    for i, (row, r) in enumerate(zip(rows, AWKWARD[:5], strict=True)):
        pair = (r.chosen, r.rejected) if r.p_chosen > 0.5 else (r.rejected, r.chosen)
        read = [ids(Toy().apply_chat_template(row[name], False)) for name in ("chosen", "rejected")]
        if read != [
            (*r.prompt, *y, *ids("\n")) for y in pair
        ]:  # this template writes a line break behind its end
            moved.append(i)
    assert moved == [1, 2, 3, 4]
    assert (done.rows, done.cut, done.moved) == (5, 2, len(moved))
    assert done.first_moved.startswith("record 1, chosen: ")


def test_a_prompt_that_no_conversation_gives_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(
        ValueError, match=r"record 0: the chat template makes other .*messages=conversations\("
    ):
        export_open_instruct(PAIRS, path, Toy())
    known = conversations([SKY], Toy())
    other = replace(PAIRS[0], prompt=ids("<u>sea<e>\n<a>"))
    with pytest.raises(ValueError, match=r"record 1: the prompt .* is none of the 1 conversations given"):
        export_open_instruct([PAIRS[0], other], path, Toy(), known)
    with pytest.raises(ValueError, match=r"record 0: .* give the conversation that it was made of"):
        export_open_instruct(PAIRS, path, Toy("system"), known)
    assert not path.exists()


def test_a_bare_template_takes_the_prompts_text_as_the_users(tmp_path):
    class Bare(Toy):
        def apply_chat_template(
            self, messages, tokenize, add_generation_prompt=False, continue_final_message=False
        ):
            return "".join(m["content"] + "<e>" * (m["role"] == "assistant") for m in messages)

    done = export_open_instruct(
        [record("blue<e>", "red<e>", prompt="the sky is ")], tmp_path / "a.json", Bare()
    )
    assert (done.rows, done.moved) == (1, 0)
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["rejected"] == [
        {"role": "user", "content": "the sky is "},
        {"role": "assistant", "content": "red"},
    ]
