"""Answers of several turns: only the assistant's are scored, in every kind of data, layout and count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training.batches.batch import IGNORE_INDEX, Batch, Padded, RowBatch
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.batches.plan import RowCosts
from tests.training.data.data_cases import (
    KINDS_OF_MESSAGES,
    assistant,
    encode,
    row_of,
    scored_text,
    texts_of,
    user,
)
from tests.training.data.templates import MARKED, PLAIN, THINKING

MakeTokenizer = Callable[..., Any]
TURNS = [assistant("lamp"), user("cloud river"), assistant("ocean")]
OTHER = [assistant("winter"), {"role": "tool", "content": "stone"}, assistant("fast"), user("go on")]
COSTS = RowCosts(1.0, 1.0, False)
ROW = ([user("seed"), assistant("walk"), user("green")], TURNS, OTHER)
SCORED = {
    PLAIN: ("lamp<eos>\nocean<eos>\n", "winter<eos>\nfast<eos>\n"),
    MARKED: ("lamp<eos>ocean<eos>", "winter<eos>fast<eos>"),
    THINKING: ("lamp<|im_end|><think>\n\n</think>\n\nocean<|im_end|>\n", "winter<|im_end|>fast<|im_end|>"),
}


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize("template", SCORED)
def test_only_the_assistant_is_scored(make_tokenizer: MakeTokenizer, kind: str, template: str):
    tokenizer = make_tokenizer(chat_template=template)
    dataset = encode(kind, [row_of(kind, *ROW)], tokenizer)
    assert scored_text(dataset, tokenizer) == SCORED[template][0]
    has_other = kind in ("pairs", "listwise", "pair taken apart")
    if has_other:
        place = (1, 0) if kind != "pair taken apart" else (0, 1)
        assert scored_text(dataset, tokenizer, *place) == SCORED[template][1]
    whole = encode(kind, [row_of(kind, *ROW)], tokenizer, assistant_only=False)
    assert texts_of(whole, tokenizer) == texts_of(dataset, tokenizer)
    assert scored_text(whole, tokenizer) == texts_of(whole, tokenizer)[1][0]
    assert whole.fingerprint() != dataset.fingerprint()
    # The count, in the report and of the tokens that losses are divided by.
    report = dataset.report
    assert report.found == {"others_turns": [1]} and whole.report.found == {}
    assert report.unscored == int(whole.num_labelled.sum() - dataset.num_labelled.sum()) > 0
    assert f"{report.unscored} tokens of answers not scored" in str(report)


def test_turns_may_be_opened_with_what_they_do_not_show(make_tokenizer: MakeTokenizer):
    """A thought is asked for, and the turns of a conversation have none."""
    template = PLAIN.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
    tokenizer = make_tokenizer(chat_template=template)
    dataset = encode("pairs", [row_of("pairs", *ROW)], tokenizer)
    assert scored_text(dataset, tokenizer) == SCORED[PLAIN][0]


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING])
def test_answers_of_the_assistant_alone_are_scored_whole(make_tokenizer: MakeTokenizer, template: str):
    tokenizer = make_tokenizer(chat_template=template)
    dataset = encode(
        "pairs", [row_of("pairs", [user("seed")], [assistant("lamp")], [assistant("walk")])], tokenizer
    )
    assert dataset.scored is None and not dataset.report.found


def test_turns_that_are_rewritten_are_one_bad_row(make_tokenizer: MakeTokenizer):
    # A user's turn is numbered from the last one, so no beginning of an answer is one of the whole.
    template = (
        "{% for m in messages %}{{ loop.revindex if m.role == 'user' and not loop.first }}<|{{ m.role }}|>"
        "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    rows = [row_of("pairs", [user("seed")], *answers) for answers in ([TURNS[:1], OTHER[:1]], [TURNS, OTHER])]
    report = encode("pairs", rows, tokenizer).report
    assert report.skipped == {"an answer of several turns of which it is not known where they end": [2]}
    assert encode("pairs", rows, tokenizer, assistant_only=False).report.kept == 2


def test_roles_of_answers(tokenizer: Any):
    """An answer that nobody of the assistant's gives: named, or scored where that is allowed."""
    rows = [
        row_of("pairs", *ROW),
        row_of("pairs", [user("seed")], [user("lamp")], [assistant("walk")]),
        row_of("pairs", [user("seed")], [{"role": "gpt", "content": "lamp"}], [assistant("walk")]),
    ]
    report = encode("pairs", rows, tokenizer).report
    assert report.skipped == {"an answer without a turn of the assistant": [2, 3]}
    assert "chosen has user" in str(report)
    dataset = encode("pairs", rows, tokenizer, allow_bad_rows=["no_assistant"])
    assert dataset.rows.tolist() == [1, 2, 3] and scored_text(dataset, tokenizer, place=1).endswith(
        "lamp<eos>\n"
    )


@pytest.mark.parametrize("kind", ["unpaired", "listwise", "samples", "pair taken apart"])
def test_roles_of_other_kinds(tokenizer: Any, kind: str):
    rows = [row_of(kind, *ROW), row_of(kind, [user("seed")], [user("lamp")], [assistant("walk")])]
    assert encode(kind, rows, tokenizer).report.skipped == {"an answer without a turn of the assistant": [2]}


def test_a_cut_leaves_a_scored_token(tokenizer: Any):
    """Where max_length leaves nothing but another's turn, the row is left out."""
    answers = [[user(10 * word), assistant("lamp")] for word in ("river ", "stone ")]
    rows = [row_of("pairs", [user("seed")], [assistant(x)], [assistant("fast")]) for x in ("lamp", "walk")]
    rows[1] = row_of("pairs", [user("seed")], *answers)
    whole = encode("pairs", rows, tokenizer)
    ((prompt, chosen, _),) = whole.sizes(torch.tensor([1]))
    assert scored_text(whole, tokenizer, place=1) == "lamp<eos>\n"
    limit = prompt + chosen - len(tokenizer("lamp<eos>\n")["input_ids"])
    report = encode("pairs", rows, tokenizer, max_length=limit).report
    assert report.skipped.get("an answer without a scored token within max_length") == [2]


def labelled(batch: Batch | Padded) -> list[list[int]]:
    """The labels of each sequence."""
    if not isinstance(batch, RowBatch):
        labels = batch.label_inputs()["labels"]
        return [[x for x in row.tolist() if x != IGNORE_INDEX] for row in labels]
    return [part.tolist() for part in batch.tokens.target_ids.split(list(batch.tokens.lengths))]


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
def test_batches_label_what_is_scored(tokenizer: Any, kind: str, layout: str):
    """The same labels in every layout, each predicted from the position before it."""
    plain = row_of(kind, [user("seed")], [assistant("lamp")], [assistant("walk")])
    dataset = encode(kind, [row_of(kind, *ROW), plain], tokenizer)
    items = [dataset[i] for i in range(len(dataset))]
    padded = PaddedCollator(0, kind=dataset.kind)(items)
    rows = RowCollator(0, layout, COSTS, kind=dataset.kind)(items)
    assert labelled(padded) == labelled(rows)
    assert sum(map(len, labelled(padded))) == int(dataset.num_labelled.sum())
    inputs = torch.cat([call["input_ids"].flatten() for call in rows.calls])
    positions = torch.cat([call["position_ids"].flatten() for call in rows.calls])
    for index, token in zip(rows.tokens.token_index.tolist(), rows.tokens.target_ids.tolist(), strict=True):
        # A token stands behind its predecessor, or is an answer's first.
        follows = inputs[index + 1] == token and positions[index + 1] == positions[index] + 1
        assert follows or token in inputs[(positions == positions[index] + 1)]


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_nll_on_prompts_has_the_others_turns_too(tokenizer: Any, layout: str):
    dataset = encode("pairs", [row_of("pairs", *ROW)] * 2, tokenizer)
    items = [dataset[i] for i in range(2)]
    rows = RowCollator(0, layout, COSTS, nll_on_prompt=True)(items)
    chosen = sum(rows.tokens.lengths[:2])
    assert sum(rows.more.lengths) + chosen == dataset.num_nll_tokens(on_prompt=True)
    assert dataset.num_nll_tokens(on_prompt=True) == 2 * (sum(dataset.sizes(torch.tensor([0]))[0][:2]) - 1)
    assert dataset.num_nll_tokens(on_prompt=False) == chosen


def test_mismatched_answers_are_scored_alike(tokenizer: Any):
    rows = [row_of("unpaired", [user(text)], TURNS, None) for text in ("seed", "green")]
    dataset = encode("unpaired", rows, tokenizer, mismatched=True)
    item = dataset[0]
    assert item.mismatched.ids.tolist() == item.answers[0].ids.tolist()
    batch = PaddedCollator(0, kind=dataset.kind)([dataset[0], dataset[1]])
    assert labelled(batch.mismatched) == labelled(batch)[::-1] and len(labelled(batch)[0]) < len(
        item.mismatched.ids
    )
