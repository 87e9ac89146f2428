"""Reference log-probabilities in the columns of rows that are no pairs: written, read back, and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training.data.references import mismatched_digests, scores_by_row
from fastdpo.training.data.row import REF_MISMATCHED, REFERENCE
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference import precompute
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.kinds_data import LOSS_OF_KIND, rows_of

MakeArgs = Callable[..., PreferenceConfig]
KINDS = list(LOSS_OF_KIND)


def made_trainer(args: PreferenceConfig, rows: Any, tokenizer: Any, **options: Any) -> PreferenceTrainer:
    options = {"train_dataset": rows, "processing_class": tokenizer, **options}
    return PreferenceTrainer(tiny_llama(1), args, **options)


def scored(args: PreferenceConfig, rows: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows with their columns, by way of JSON, as ``fastdpo score`` writes them."""
    trainer = made_trainer(args, rows, tokenizer, ref_model=tiny_llama(2))
    data = trainer._with_reference(trainer.train_dataset)
    columns: dict[int, dict[str, Any]] = {}
    for number, values in scores_by_row(data):
        known = columns.get(number, {})
        columns[number] = {name: known.get(name, []) + value for name, value in values.items()}
    lines = [json.dumps({**row, **columns[i]}) for i, row in enumerate(rows, 1) if i in columns]
    return [json.loads(line) for line in lines]


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(precompute, "score_dataset", unexpected)


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_scored_rows_are_read_back_and_used(
    make_args: MakeArgs, tokenizer: Any, kind: str, layout: str, request: pytest.FixtureRequest
):
    """The same run as with the model that scored them, which the reader does not have."""
    settings: dict[str, Any] = {"loss_type": LOSS_OF_KIND[kind], "max_steps": 2, "learning_rate": 1e-4}
    args = make_args(**settings, reference="precomputed")
    rows = rows_of(kind, 6)
    written = scored(args, rows, tokenizer)
    wanted = made_trainer(
        make_args(**settings), rows, tokenizer, ref_model=tiny_llama(2), eval_dataset=rows[:4]
    )
    wanted.train()
    wanted_log = [*read_metrics(wanted.args.output_dir)]

    request.getfixturevalue("no_scoring")
    args = make_args(**settings, batch_layout=layout, overwrite_output_dir=True)
    trainer = made_trainer(args, written, tokenizer)
    assert trainer.reference.kind == "precomputed" and trainer.train_dataset.has_reference
    trainer.train()
    for ours, want in zip(read_metrics(args.output_dir), wanted_log, strict=True):
        for name in ours.keys() & want.keys():
            # Of sums of hundreds of nats in fp32, each layout's in products of other shapes.
            assert ours[name] == pytest.approx(want[name], rel=1e-4, abs=2e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_come_back_to_the_bit(make_args: MakeArgs, tokenizer: Any, kind: str):
    args = make_args(loss_type=LOSS_OF_KIND[kind], reference="precomputed")
    rows = rows_of(kind, 5)
    trainer = made_trainer(args, rows, tokenizer, ref_model=tiny_llama(2))
    wanted = trainer._with_reference(trainer.train_dataset).numbers
    got = made_trainer(args, scored(args, rows, tokenizer), tokenizer).train_dataset.numbers
    assert torch.equal(got[REFERENCE].values, wanted[REFERENCE].values)
    assert torch.equal(got[REFERENCE].offsets, wanted[REFERENCE].offsets)
    assert (REF_MISMATCHED in got) == (kind == "unpaired")
    if kind == "unpaired":
        assert torch.equal(got[REF_MISMATCHED], wanted[REF_MISMATCHED])


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_pair_taken_apart_has_two_numbers(make_args: MakeArgs, tokenizer: Any, name: str, no_scoring: None):
    """Each answer gets its own; of a pair whose other answer is empty there is one."""
    rows = [{**row} for row in make_rows(4)]
    rows[1]["rejected"], rows[2]["chosen"] = "", ""
    args = make_args(loss_type=name, truncation_mode="skip", reference="precomputed", max_bad_rows=0.5)
    values = [[-1.0, -2.0], [-3.0], [-4.0], [-5.0, -6.0]]
    given: list[dict[str, Any]] = [{**row, REFERENCE: v} for row, v in zip(rows, values, strict=True)]
    if name == "kto":
        plain = made_trainer(
            make_args(loss_type=name, reference="copy", max_bad_rows=1), rows, tokenizer
        ).train_dataset
        digests = iter(mismatched_digests(plain))
        for row in given:
            row["ref_mismatched_of"] = [next(digests) for _ in row[REFERENCE]]
            row[REF_MISMATCHED] = [x - 0.5 for x in row[REFERENCE]]
    data = made_trainer(args, given, tokenizer).train_dataset
    assert data.has_reference and data.rows.tolist() == [1, 1, 2, 3, 4, 4]
    assert data.numbers[REFERENCE].values.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert data.numbers["is_desirable"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    if name == "kto":
        assert data.numbers[REF_MISMATCHED].tolist() == [-1.5, -2.5, -3.5, -4.5, -5.5, -6.5]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("listwise", [-1.0], r"row 2: column 'ref_logps': got 1 numbers \(left\), wanted 3"),
        ("listwise", [-1.0] * 4, r"row 2: column 'ref_logps': got 1 numbers too many"),
        ("samples", [-1.0] * 3, r"row 2: column 'ref_logps': got 3 numbers .*another tokenizer"),
        ("steps", -1.0, r"row 2: column 'ref_logps': got -1.0, wanted a list of numbers"),
        ("steps", ["-1.0"], r"row 2: column 'ref_logps': got .*wanted a list of numbers"),
        ("ranking", [True, False], r"wanted a list of numbers"),
    ],
)
def test_columns_that_do_not_fit(make_args: MakeArgs, tokenizer: Any, kind: str, value: Any, message: str):
    args = make_args(loss_type=LOSS_OF_KIND[kind], reference="precomputed")
    rows = scored(args, rows_of(kind, 3), tokenizer)
    rows[1][REFERENCE] = value
    with pytest.raises(ValueError, match=message):
        made_trainer(args, rows, tokenizer)
    # Whoever brings a reference does not read them.
    assert not made_trainer(
        make_args(loss_type=LOSS_OF_KIND[kind], reference="copy"), rows, tokenizer
    ).train_dataset.has_reference


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_a_number_that_is_not_finite_skips_the_row(make_args: MakeArgs, tokenizer: Any, missing: Any):
    args = make_args(loss_type="sdpo", reference="precomputed", max_bad_rows=1)
    rows = scored(args, rows_of("listwise", 3), tokenizer)
    rows[1][REFERENCE] = missing and [missing, *rows[1][REFERENCE][1:]]
    data = made_trainer(args, rows, tokenizer).train_dataset
    assert data.rows.tolist() == [1, 3] and data.has_reference
    assert "a number that is missing or not finite (row 2: column 'ref_logps')" in str(data.report)
    assert data.numbers[REFERENCE].values.tolist() == [*rows[0][REFERENCE], *rows[2][REFERENCE]]


def test_mismatched_answers_have_to_be_the_same(make_args: MakeArgs, tokenizer: Any):
    """KTO: with a row left out, another prompt's answer stands in, which nobody has scored."""
    rows = scored(make_args(loss_type="kto", reference="precomputed"), rows_of("unpaired", 6), tokenizer)
    made_trainer(make_args(loss_type="kto"), rows, tokenizer)
    with pytest.raises(ValueError, match="column 'ref_mismatched_logps': .*got scores of other answers"):
        made_trainer(make_args(loss_type="kto"), [*rows[:2], *rows[3:]], tokenizer)
    copied = made_trainer(make_args(loss_type="kto", reference="copy"), rows[2:], tokenizer)
    assert copied.reference.kind == "copy"
    # Without their columns nothing is read: the reference is a copy, as of rows that have none.
    bare = [{k: v for k, v in row.items() if "mismatched" not in k} for row in rows]
    assert made_trainer(make_args(loss_type="kto"), bare, tokenizer).reference.kind == "copy"


def test_a_part_of_scored_rows_is_not_taken_for_unscored(make_args: MakeArgs, tokenizer: Any):
    """KTO: its mismatched answers are others, so the reference is not guessed."""
    args = make_args(loss_type="kto", reference="precomputed")
    rows = scored(args, rows_of("unpaired", 6), tokenizer)
    part = made_trainer(args, rows, tokenizer).train_dataset.subset([0, 1, 2, 3])
    with pytest.raises(ValueError, match="but not of the answers that their prompts are mismatched with"):
        made_trainer(make_args(loss_type="kto"), part, tokenizer)
    assert (
        made_trainer(make_args(loss_type="kto", reference="copy"), part, tokenizer).reference.kind == "copy"
    )


def test_losses_without_a_reference_do_not_read_them(make_args: MakeArgs, tokenizer: Any):
    rows = [{**row, REFERENCE: "no numbers"} for row in rows_of("listwise", 3)]
    trainer = made_trainer(make_args(loss_type="rrhf"), rows, tokenizer)
    assert trainer.reference.kind == "none" and not trainer.train_dataset.has_reference
