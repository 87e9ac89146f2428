"""Rows to tokens: formats, chat templates, special tokens, truncation, and rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import make_rows

GOOD = {"prompt": "green river", "chosen": " quiet stone", "rejected": " fast"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = {
    "prompt": [user("seed"), assistant("lamp"), user("cloud")],
    "chosen": [assistant("ocean")],
    "rejected": [assistant("winter")],
}


def encode(rows: list[Any], tokenizer: Any, **options: Any) -> RowDataset:
    return encode_rows(read_rows(rows), tokenizer, EncodingOptions(**options))


def texts(dataset: RowDataset, tokenizer: Any, index: int = 0) -> tuple[str, str, str]:
    pair = dataset[index]
    return tuple(map(tokenizer.decode, (pair.prompt, *(answer.ids for answer in pair.answers))))


def test_strings(tokenizer: Any):
    assert texts(encode([GOOD], tokenizer), tokenizer) == ("green river", " quiet stone<eos>", " fast<eos>")


def test_eos_is_not_doubled(tokenizer: Any):
    row = {**GOOD, "chosen": " quiet stone<eos>"}
    assert texts(encode([row], tokenizer), tokenizer)[1] == " quiet stone<eos>"


def test_a_shared_start_is_the_prompt(tokenizer: Any):
    row = {"chosen": "green river quiet stone", "rejected": "green river fast"}
    assert encode([row], tokenizer).report.found == {"prompt_shared": [1]}  # or a chance: it is said
    assert texts(encode([row], tokenizer), tokenizer) == ("green river", " quiet stone<eos>", " fast<eos>")


def test_messages(tokenizer: Any):
    prompt = "<|user|>\nseed<eos>\n<|assistant|>\nlamp<eos>\n<|user|>\ncloud<eos>\n<|assistant|>\n"
    wanted = (prompt, "ocean<eos>\n", "winter<eos>\n")
    assert texts(encode([CHAT], tokenizer), tokenizer) == wanted
    conversation = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert texts(encode([conversation], tokenizer), tokenizer) == wanted


def test_strings_and_messages_may_be_mixed(tokenizer: Any):
    dataset = encode([GOOD, CHAT, GOOD], tokenizer)
    assert texts(dataset, tokenizer, 0) == texts(dataset, tokenizer, 2)
    assert texts(dataset, tokenizer, 1)[1] == "ocean<eos>\n"


def test_template_arguments_of_a_row(make_tokenizer: Callable[..., Any]):
    template = (
        "{% for m in messages %}{{ tone }}{{ m['content'] }}#{% endfor %}{% if tools %}never{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    row = {**CHAT, "chat_template_kwargs": {"tone": "!"}}
    assert texts(encode([row], tokenizer), tokenizer) == ("!seed#!lamp#!cloud#", "!ocean#", "!winter#")


def test_batches_do_not_change_the_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    rows = make_rows(7)
    whole = encode(rows, tokenizer)
    monkeypatch.setattr("fastdpo.training.data.processes.BATCH_ROWS", 2)
    assert encode(rows, tokenizer).fingerprint() == whole.fingerprint()


def test_bos_and_eos_of_the_tokenizer_are_not_doubled(make_tokenizer: Callable[..., Any]):
    tokenizer = make_tokenizer(bos_token="<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    wanted = ("<bos>green river", " quiet stone<eos>", " fast<eos>")
    assert texts(encode([GOOD], tokenizer), tokenizer) == wanted
    spelled_out = {**GOOD, "prompt": "<bos>green river"}
    dataset = encode([spelled_out], tokenizer)
    assert texts(dataset, tokenizer) == wanted
    assert not dataset.report.merged
    assert texts(encode([{**GOOD, "prompt": ""}], tokenizer), tokenizer)[0] == "<bos>"


def test_a_prompt_may_end_in_eos(tokenizer: Any):
    row = {**GOOD, "prompt": "green river<eos>"}
    assert texts(encode([row], tokenizer), tokenizer)[0] == "green river<eos>"


def test_a_token_across_the_boundary_belongs_to_the_answer(tokenizer: Any):
    """ "green ri" + "ver": the BPE has one token for " river"."""
    row = {"prompt": "green ri", "chosen": "ver", "rejected": "ver stone"}
    dataset = encode([row, GOOD], tokenizer)
    assert texts(dataset, tokenizer) == ("green", " river<eos>", " river stone<eos>")
    assert dataset.report.merged == [1]


def test_a_template_that_opens_an_unwritten_answer_otherwise(make_tokenizer: Callable[..., Any]):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}#{% endfor %}"
        "{% if add_generation_prompt %}<assistant>think:{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    dataset = encode([CHAT], tokenizer)
    assert texts(dataset, tokenizer) == (
        "<user>seed#<assistant>lamp#<user>cloud#<assistant>",
        "ocean#",
        "winter#",
    )
    assert dataset.report.merged == [1]


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer: Callable[..., Any]):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="row 1: the chat template renders the prompt differently"):
        encode([CHAT], make_tokenizer(chat_template=template))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"no column 'rejected'; got \['chosen', 'prompt'\]"),
        ({"prompt": "a", "completion": "b", "label": True}, "no column 'chosen'"),
        (
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "leave the prompt column out",
        ),
        ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, "wanted strings throughout or lists"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "wanted strings throughout or lists"),
        ({"chosen": ["b"], "rejected": ["c"]}, "wanted a message with role and content"),
        ({"chosen": [{"role": "user"}], "rejected": [user("c")]}, "wanted a message with role and content"),
    ],
)
def test_rows_of_the_wrong_shape_name_their_number(tokenizer: Any, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        encode([GOOD, row], tokenizer)


def test_messages_without_a_template_name_the_remedy(make_tokenizer: Callable[..., Any]):
    with pytest.raises(ValueError, match="row 2: .*--chat_template"):
        encode([GOOD, CHAT], make_tokenizer(chat_template=None))


def test_a_template_that_refuses_names_the_row(make_tokenizer: Callable[..., Any]):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match="row 1: the chat template refused the messages: roles must alternate"
    ):
        encode([CHAT], tokenizer)


def test_strings_need_an_eos_token(make_tokenizer: Callable[..., Any]):
    with pytest.raises(ValueError, match="no EOS token"):
        encode([GOOD], make_tokenizer(eos_token=None))
    assert len(encode([CHAT], make_tokenizer(eos_token=None))) == 1  # the template ends its turns


LONG = {"prompt": "river " * 9 + "river", "chosen": " stone", "rejected": " lamp"}


@pytest.mark.promise(55)
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "prompt": ""}, "an empty prompt"),
        ({**GOOD, "prompt": None}, "a text that is missing"),
        ({**GOOD, "rejected": None}, "a text that is missing"),
        ({**CHAT, "chosen": None}, "a text that is missing"),
        ({"chosen": "green river stone", "rejected": "green river fast"}, "a text that is missing"),
        ({**GOOD, "chosen": ""}, "an empty completion"),
        ({**GOOD, "rejected": ""}, "an empty completion"),
        ({**CHAT, "chosen": [assistant("")]}, "an empty completion"),
        ({**CHAT, "rejected": []}, "an empty completion"),
        ({**GOOD, "rejected": GOOD["chosen"]}, "identical answers"),
        (LONG, "a prompt that fills max_length"),
    ],
)
def test_rows_nothing_can_be_learnt_from(tokenizer: Any, row: dict[str, Any], reason: str):
    dataset = encode([GOOD, row, GOOD], tokenizer, max_length=40 if "role" in str(row) else 10)
    assert dataset.report.skipped == {reason: [2]}
    assert dataset.rows.tolist() == [1, 3]
    assert f"skipped 1 with {reason} (row 2" in str(dataset.report)
    with pytest.raises(ValueError, match=f"{reason} .row 2"):
        encode([GOOD, row], tokenizer, max_length=40 if "role" in str(row) else 10, on_bad_row="error")


def test_nothing_left_is_an_error(tokenizer: Any):
    with pytest.raises(ValueError, match="no pair left"):
        encode([{**GOOD, "chosen": ""}], tokenizer)
    with pytest.raises(ValueError, match="0 of 0 pairs"):
        encode([], tokenizer)


@pytest.mark.promise(55)
def test_repeats_are_kept_and_counted(tokenizer: Any):
    report = encode([GOOD, CHAT, GOOD], tokenizer).report
    assert (report.kept, report.duplicates) == (3, 1)


# Ten tokens of prompt; answers of 5 and 2 words and an EOS.
LENGTHY = {"prompt": LONG["prompt"], "chosen": " stone lamp stone lamp stone", "rejected": " lamp lamp"}


@pytest.mark.parametrize(
    ("mode", "max_length", "sizes"),
    [
        ("keep_start", 16, (10, 6, 3)),
        ("keep_start", 12, (10, 2, 2)),
        ("keep_start", 11, (10, 1, 1)),
        ("keep_end", 12, (6, 6, 3)),
        ("keep_end", 7, (1, 6, 3)),
        ("keep_end", 5, (1, 4, 3)),
        ("skip", 16, (10, 6, 3)),
    ],
)
def test_truncation(tokenizer: Any, mode: str, max_length: int, sizes: tuple[int, int, int]):
    dataset = encode([LENGTHY], tokenizer, max_length=max_length, truncation_mode=mode)
    pair = dataset[0]
    assert (len(pair.prompt), *(len(answer.ids) for answer in pair.answers)) == sizes
    assert dataset.report.truncated == (max_length < 16)
    untouched = encode([LENGTHY], tokenizer, max_length=None)[0]
    assert pair.prompt.tolist() == untouched.prompt[-sizes[0] :].tolist()
    assert pair.answers[0].ids.tolist() == untouched.answers[0].ids[: sizes[1]].tolist()


@pytest.mark.promise(55)
@pytest.mark.parametrize(
    ("mode", "max_length", "reason"),
    [
        ("skip", 15, "more tokens than max_length"),
        ("keep_start", 10, "a prompt that fills max_length"),
    ],
)
def test_rows_too_long_are_counted(tokenizer: Any, mode: str, max_length: int, reason: str):
    report = encode([GOOD, LENGTHY], tokenizer, max_length=max_length, truncation_mode=mode).report
    assert report.skipped == {reason: [2]}


def test_answers_that_truncation_makes_equal_are_counted(tokenizer: Any):
    rows = [{**GOOD, "prompt": "river"}, {"prompt": "river", "chosen": " stone lamp", "rejected": " stone"}]
    size = len(encode(rows, tokenizer)[0].prompt)
    report = encode(rows, tokenizer, max_length=size + 1).report
    assert report.skipped == {"answers identical once truncated": [2]}


def test_numbers_of_a_pair(tokenizer: Any):
    rows = [{**GOOD, "gap": 1.5}, {**GOOD, "gap": float("nan")}, {**GOOD, "gap": 2}]
    rows += [{**GOOD, "gap": value} for value in (None, 10**400, 1e300)]  # of which fp32 makes infinity
    dataset = encode(rows, tokenizer, columns={"margin": "gap"})
    assert dataset.numbers["margin"].tolist() == [1.5, 2.0]
    assert dataset.report.skipped == {"a number that is missing or not finite": [2, 4, 5, 6]}
    assert "(rows 2, 4, 5, 6; the first: column 'gap')" in str(dataset.report)


@pytest.mark.promise(55)
@pytest.mark.parametrize("value", ["much", True])
def test_a_column_without_a_number_names_the_row(tokenizer: Any, value: Any):
    with pytest.raises(ValueError, match=r"row 1: column 'gap': got .*, wanted a number"):
        encode([{**GOOD, "gap": value}], tokenizer, columns={"margin": "gap"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("soft_labels", 1.2), ("soft_labels", -0.1), ("pair_weights", -1), ("chosen_win_rate", 1.2)],
)
def test_a_number_out_of_range_names_the_row(tokenizer: Any, name: str, value: float):
    with pytest.raises(ValueError, match=rf"row 1: column 'x': got {value}, wanted"):
        encode([{**GOOD, "x": value}], tokenizer, columns={name: "x"})
