"""Rows of the kinds beside pairs: formats, what is refused, what is left out, and how tokens are held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdpo.losses import LOSSES
from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.data.dataset import RowDataset, split_rows
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import KINDS, kind_of

CHAT = [{"role": "user", "content": "seven"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def encode(
    kind: str, rows: list[Any], tokenizer: Any, wanted: dict[str, Any] | None = None, **options: Any
) -> RowDataset:
    return encode_rows(
        read_rows(rows), tokenizer, EncodingOptions(**options), Wanted(KINDS[kind], **(wanted or {}))
    )


def texts(dataset: RowDataset, tokenizer: Any, index: int = 0) -> list[str]:
    item = dataset[index]
    return [tokenizer.decode(ids) for ids in (item.prompt, *(answer.ids for answer in item.answers))]


GOOD: dict[str, list[dict[str, Any]]] = {
    "unpaired": [
        {"prompt": "river:", "completion": " stone", "label": True},
        {"prompt": CHAT, "completion": answer("walk"), "label": False},
    ],
    "listwise": [
        {"prompt": "river:", "completions": [" stone", " walk", " lamp"], "scores": [1, 0.5, -2]},
        {"prompt": CHAT, "completions": [answer("walk"), answer("seed")], "ranks": [2, 1]},
    ],
    "ranking": [{"prompt": "river:", "completion": [" stone", " walk", " lamp"], "scores": [0, 2, 1]}],
    "steps": [
        {"prompt": "river:", "completion": [" stone walk.", " lamp"], "advantages": [0.5, -1]},
        {"prompt": CHAT, "completion": ["stone walk.", " lamp"], "advantages": [0, 1]},
    ],
    "samples": [{"prompt": "river:", "completion": " stone", "win_rate": 0.25}],
}


@pytest.mark.parametrize("kind", GOOD)
def test_texts_come_through(tokenizer: Any, kind: str):
    dataset = encode(kind, GOOD[kind], tokenizer)
    assert len(dataset) == len(GOOD[kind]) and not dataset.report.skipped
    first = texts(dataset, tokenizer)
    given = GOOD[kind][0]
    answers = given.get("completions", ["".join(given.get("completion", ""))])
    assert first == ["river:", *(text + "<eos>" for text in answers)]
    if len(dataset) > 1:
        prompt, *_, last = texts(dataset, tokenizer, 1)
        assert prompt == "<|user|>\nseven<eos>\n<|assistant|>\n" and last.endswith("<eos>\n")


def test_numbers_come_through(tokenizer: Any):
    def numbers(kind: str, name: str) -> list[Any]:
        dataset = encode(kind, GOOD[kind], tokenizer)
        return [
            value.tolist() if isinstance(value := dataset[i].numbers[name], torch.Tensor) else value
            for i in range(len(dataset))
        ]

    assert numbers("unpaired", "is_desirable") == [1.0, 0.0]
    assert numbers("listwise", "scores") == [[1.0, 0.5, -2.0], [0.0, 1.0]]  # the first rank is the best
    assert numbers("steps", "advantages") == [[0.5, -1.0], [0.0, 1.0]]
    assert numbers("samples", "win_rates") == [0.25]


@pytest.mark.parametrize(("label", "wanted"), [("True", 1.0), ("false", 0.0)])
def test_labels_may_be_text_as_csv_has_them(tokenizer: Any, label: str, wanted: float):
    dataset = encode("unpaired", [{**GOOD["unpaired"][0], "label": label}], tokenizer)
    assert dataset[0].numbers["is_desirable"] == wanted
    with pytest.raises(ValueError, match="row 1: column 'label': got 'yes', wanted true or false"):
        encode("unpaired", [{**GOOD["unpaired"][0], "label": "yes"}], tokenizer)


def test_pieces_are_the_answers_tokens(tokenizer: Any):
    dataset = encode("steps", GOOD["steps"], tokenizer)
    for i, wanted in enumerate([[" stone walk.", " lamp<eos>"], ["stone walk.", " lamp<eos>\n"]]):
        item = dataset[i]
        pieces = item.answers[0].ids.split(item.pieces)
        assert [tokenizer.decode(piece) for piece in pieces] == wanted


def test_pieces_behind_a_cut_go(tokenizer: Any):
    row = {"prompt": "river:", "completion": [" stone", " walk", " lamp"], "scores": [0, 2, 1]}
    whole = encode("ranking", [row], tokenizer)[0]
    prompt, (one, two, _) = len(whole.prompt), whole.pieces
    cut = encode("ranking", [row], tokenizer, max_length=prompt + one + two)[0]
    assert cut.pieces == (one, two) and cut.numbers["scores"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="one candidate once truncated"):
        encode("ranking", [row], tokenizer, max_length=prompt + one)


def test_a_pair_makes_two_rows(tokenizer: Any):
    dataset = encode("unpaired", [{"prompt": "river:", "chosen": " stone", "rejected": " walk"}], tokenizer)
    assert [texts(dataset, tokenizer, i)[1] for i in (0, 1)] == [" stone<eos>", " walk<eos>"]
    assert [dataset[i].numbers["is_desirable"] for i in (0, 1)] == [1.0, 0.0] and dataset.rows.tolist() == [
        1,
        1,
    ]


def test_a_report_counts_rows_not_answers(tokenizer: Any):
    """Two answers a row: 24 rows are 24 rows, of which a part may be left out."""
    pairs = [{"prompt": f"river {i}:", "chosen": " stone", "rejected": " walk"} for i in range(24)]
    report = encode("unpaired", pairs, tokenizer).report
    assert (report.rows, report.kept) == (24, 24)
    assert str(report) == "dataset: 24 of 24 rows kept, which make 48"
    pairs[3]["rejected"], pairs[5] = "", {**pairs[5], "chosen": "", "rejected": None}
    report = encode("unpaired", pairs, tokenizer).report
    assert report.kept == 23 and report.skipped == {
        "an empty completion": [4, 6],
        "a text that is missing": [6],
    }
    assert "23 of 24 rows kept, which make 45" in str(report) and "column 'rejected' is null" in str(report)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("kind", ["unpaired", "prompt-completion"])
def test_a_pair_without_a_prompt_makes_rows_too(tokenizer: Any, kind: str, is_chat: bool):
    """As TRL has it: what both answers share at their start is the prompt."""
    answers = [answer("stone"), answer("walk")] if is_chat else [" stone", " walk"]
    prompt: Any = CHAT if is_chat else "river:"
    whole = {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
    split = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    assert encode(kind, [whole], tokenizer).fingerprint() == encode(kind, [split], tokenizer).fingerprint()
    assert not encode(kind, [whole], tokenizer).report.unused
    # A row that lacks what others have says so, in the file's own words.
    mixed = encode(kind, [split, whole], tokenizer).report if is_chat else None
    assert mixed is None or not mixed.skipped
    if not is_chat:
        assert encode(kind, [split, whole], tokenizer).report.skipped == {"a text that is missing": [2]}
    with pytest.raises(
        ValueError, match=r"row 1: no column 'prompt': got \['completion'\]|no column 'label'"
    ):
        encode(kind, [{"completion": answers[0]}], tokenizer)


MISMATCHED = {"has_mismatched": True}
LIST = {"prompt": "river:", "completions": [" stone", " walk"], "scores": [1, 0]}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("listwise", {"completions": " stone"}, "row 2: column 'completions': got str, wanted a list"),
        ("listwise", {"completions": [" stone", answer("walk")], "scores": [1, 2]}, "wanted strings thr"),
        ("listwise", {"scores": [1]}, "row 2: column 'scores': got 1 numbers, wanted 3"),
        ("listwise", {"scores": [1, "good", 2]}, "row 2: column 'scores': got 'good', wanted a number"),
        ("listwise", {"prompt": CHAT}, "wanted strings throughout or lists of messages"),
        ("unpaired", {"label": 1}, "row 2: column 'label': got 1, wanted true or false"),
        (
            "steps",
            {"completion": " stone", "advantages": [1]},
            "column 'completion': got str, wanted a list",
        ),
        ("steps", {"completion": [" stone"], "advantages": [1, 2]}, "got 2 numbers, wanted 1"),
        ("samples", {"win_rate": 1.5}, "row 2: column 'win_rate': got 1.5, wanted a number in .0, 1."),
    ],
)
def test_rows_of_the_wrong_shape_are_refused(tokenizer: Any, kind: str, changes: Any, message: str):
    row = {**GOOD[kind][0], **changes}
    with pytest.raises(ValueError, match=message):
        encode(kind, [GOOD[kind][0], row], tokenizer)


@pytest.mark.parametrize("kind", GOOD)
def test_a_missing_column_is_named(tokenizer: Any, kind: str):
    for column in KINDS[kind].columns:
        row = {name: value for name, value in GOOD[kind][0].items() if name != column}
        with pytest.raises(ValueError, match=f"row 1: no column '{column}': got .*{kind} data"):
            encode(kind, [row], tokenizer)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("unpaired", {"label": None}, "a number that is missing or not finite"),
        ("unpaired", {"completion": ""}, "an empty completion"),
        ("unpaired", {"completion": None}, "a text that is missing"),
        ("samples", {"prompt": None}, "a text that is missing"),
        ("listwise", {"completions": None}, "a text that is missing"),
        ("listwise", {"completions": [" stone", None, " walk"]}, "a text that is missing"),
        ("ranking", {"completion": None}, "a text that is missing"),
        ("unpaired", {"prompt": ""}, "an empty prompt"),
        ("listwise", {"scores": None}, "a number that is missing or not finite"),
        ("listwise", {"scores": [1, None, 2]}, "a number that is missing or not finite"),
        ("listwise", {"scores": [1, float("nan"), 2]}, "a number that is missing or not finite"),
        ("listwise", {"completions": [" stone"], "scores": [1]}, "one candidate"),
        ("listwise", {"completions": [], "scores": []}, "an empty completion"),
        ("listwise", {"completions": [" stone"] * 3}, "identical answers"),
        ("listwise", {"completions": [" stone", "", " walk"]}, "an empty completion"),
        ("ranking", {"completion": [" stone"], "scores": [1]}, "one candidate"),
        ("ranking", {"completion": [" stone", "", " walk"]}, "an empty piece"),
        ("steps", {"advantages": [1, float("inf")]}, "a number that is missing or not finite"),
        ("samples", {"win_rate": None}, "a number that is missing or not finite"),
    ],
)
def test_rows_with_nothing_to_learn_are_left_out(tokenizer: Any, kind: str, changes: Any, reason: str):
    rows = [GOOD[kind][0], {**GOOD[kind][0], **changes}]
    dataset = encode(kind, rows, tokenizer)
    assert dataset.report.skipped == {reason: [2]} and len(dataset) == 1
    if reason.startswith("a number"):
        assert f"(row 2: column '{next(iter(changes))}')" in str(dataset.report)
    with pytest.raises(ValueError, match=rf"{reason} \(row 2"):
        encode(kind, rows, tokenizer, on_bad_row="error")


def test_lists_of_a_size(tokenizer: Any):
    with pytest.raises(ValueError, match="row 1: column 'completions': got 2, wanted 3"):
        encode("listwise", [LIST], tokenizer, {"list_size": 3, "scores": None})


def test_mismatched_answers_are_the_last_of_another_prompt(tokenizer: Any):
    prompts = ["river:", "river:", "lamp:", "seed:", "seed:"]
    rows = [{"prompt": p, "completion": f" stone{'!' * i}", "label": True} for i, p in enumerate(prompts)]
    dataset = encode("unpaired", rows, tokenizer, MISMATCHED)
    assert dataset.mismatched.tolist() == [4, 4, 1, 2, 2]
    assert tokenizer.decode(dataset[3].mismatched.ids) == " stone!!<eos>"
    half = dataset.subset([0, 2])
    assert half.mismatched.tolist() == [1, 0]
    short = encode("unpaired", rows, tokenizer, MISMATCHED, max_length=len(dataset[0].prompt) + 2)
    assert len(short[0].mismatched.ids) == 2
    with pytest.raises(ValueError, match="kto: got one row"):
        dataset.subset([1])


@pytest.mark.parametrize("kind", GOOD)
def test_a_subset_and_the_beginning_of_a_batch(tokenizer: Any, kind: str):
    rows = GOOD[kind] * 2
    dataset = encode(kind, rows, tokenizer)
    dataset = dataset.with_reference(torch.arange(dataset.score_shape[0]).float())
    last = dataset.subset(torch.tensor([len(rows) - 1, 0]))
    assert str(last[0]) == str(dataset[len(rows) - 1]) and str(last[1]) == str(dataset[0])
    assert dataset.subset([0]).fingerprint() != dataset.fingerprint()
    collate = PaddedCollator(0, kind=KINDS[kind])
    whole, alone = collate([dataset[i] for i in range(len(rows))]).first(1), collate([dataset[0]])
    named = [{**vars(batch.sequences), **vars(batch), **batch.numbers} for batch in (whole, alone)]
    for name, value in named[1].items():
        other = named[0][name]
        if name in ("input_ids", "attention_mask", "labels", "segment_ids") and value is not None:
            assert torch.equal(other[:, : value.shape[1]], value), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif name not in ("max_candidates", "sequences", "numbers"):
            assert other == value, name


def test_held_out_rows(tokenizer: Any):
    dataset = encode("listwise", [LIST] * 5, tokenizer)
    train, held_out = split_rows(dataset, 2, seed=0)
    assert (len(train), len(held_out)) == (3, 2) and isinstance(train, RowDataset)


def test_ragged_rows():
    ragged = Ragged.of_lists([[1, 2], [], [3]], torch.int64)
    assert ragged.sums().tolist() == [3, 0, 3] and ragged.largest().tolist() == [2, 0, 3]
    assert [row.tolist() for row in map(ragged.subset(torch.tensor([2, 0, 1])).__getitem__, range(3))] == [
        [3],
        [1, 2],
        [],
    ]


def test_every_loss_has_a_kind():
    for spec in LOSSES.values():
        kind = kind_of([spec])
        assert kind.is_paired == (spec.kind == "paired" or spec.name in ("tdpo1", "tdpo2"))
    odd = replace(LOSSES["kto"], name="odd", inputs=int)
    with pytest.raises(ValueError, match="got 'odd', which takes int, wanted another: the loop has no data"):
        kind_of([odd])
