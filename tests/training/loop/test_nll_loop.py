"""The loop on NLL terms with tokens of their own: data, accumulation, evaluation, settings, real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.cli import main
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.encoding import EncodingOptions
from tests.cli_cases import model_dir  # noqa: F401  (a fixture)
from tests.training.conftest import make_rows, read_metrics, tiny_llama, write_jsonl
from tests.training.loop.kinds_data import real_rows
from tests.training.loop.pair_formulas import LAYOUTS
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]


def gold_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    others = make_rows(count, seed + 50)
    return [
        {**row, "reference": other["chosen"]}
        for row, other in zip(make_rows(count, seed), others, strict=True)
    ]


def made_trainer(args: PreferenceConfig, tokenizer: Any, rows: Any, *callbacks: Any, **options: Any) -> Any:
    return PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **options,
    )


SETTINGS = [
    {"loss_type": "orpo"},
    {"loss_type": "tpo"},
    {"loss_type": ["simpo", "sft"], "nll_on_prompt": True},
]
IDS = ["ORPO", "TPO", "SimPO and SFT"]


def rows_for(settings: Any, count: int, seed: int = 1) -> list[dict[str, Any]]:
    return gold_rows(count, seed) if settings["loss_type"] == "tpo" else make_rows(count, seed)


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_step_however_it_is_cut(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: Any) -> None:
    results = []
    cuts = (
        (8, 1, "padded"),
        (2, 4, "padded"),
        (4, 2, "packed"),
        (2, 4, "shared_prompt"),
    )
    for batch, accumulate, layout in cuts:
        kept = KeepGradients()
        args = make_args(
            output_dir=str(tmp_path / f"{batch}-{layout}"), per_device_train_batch_size=batch, max_steps=1,
            batch_layout=layout, gradient_accumulation_steps=accumulate, max_grad_norm=0.0,
            per_device_eval_batch_size=3, **settings,
        )  # fmt: skip
        trainer = made_trainer(
            args, tokenizer, rows_for(settings, 8), kept, eval_dataset=rows_for(settings, 7, 2)
        )
        evaluated = trainer.evaluate()
        trainer.train()
        first = read_metrics(args.output_dir)[1]
        # The NLL is a mean over all its tokens, however they lie in batches; the rest are means over pairs.
        names = [name for name in ("loss", "nll_loss", "log_odds_ratio", "logps/chosen") if name in first]
        logged = [evaluated[f"eval_{name}"] for name in names]
        results.append((kept.steps[0], *(first[name] for name in names), *logged))
        assert "nll_loss" in names and ("log_odds_ratio" in names) == (settings["loss_type"] == "orpo")
    (grads, *losses), *others = results
    largest = max(gradient.abs().max().item() for gradient in grads.values())
    for other_grads, *other_losses in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, gradient in grads.items():
            torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=2e-6 * max(largest, 1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_an_evaluation_is_the_loss_of_all_its_pairs(
    make_args: MakeArgs, tokenizer: Any, layout: str, settings: Any
) -> None:
    found = []
    for size in (2, 7):
        args = make_args(per_device_eval_batch_size=size, batch_layout=layout, **settings)
        trainer = made_trainer(args, tokenizer, rows_for(settings, 4), eval_dataset=rows_for(settings, 7, 2))
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# Steps of each setting in each layout are compared above.
@pytest.mark.parametrize(("settings", "layout"), zip(SETTINGS, LAYOUTS, strict=True), ids=IDS)
def test_the_loss_falls_on_real_data(make_args: MakeArgs, tokenizer: Any, settings: Any, layout: str) -> None:
    rows = real_rows("preference_en.jsonl", 8)
    if settings["loss_type"] == "tpo":
        rows = [{**row, "reference": row["chosen"][:1]} for row in rows]
    args = make_args(
        max_steps=12,
        learning_rate=3e-3,
        max_length=256,
        batch_layout=layout,
        max_tokens_per_batch=2500,
        **settings,
    )
    made_trainer(args, tokenizer, rows).train()
    losses = [entry["loss"] for entry in read_metrics(args.output_dir)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_tpo_with_the_chosen_answer_as_gold_is_cpo(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path
) -> None:
    logs = []
    for loss_type, rows in (
        ("cpo", make_rows(8)),
        ("tpo", [{**row, "best": row["chosen"]} for row in make_rows(8)]),
    ):
        gold = {"gold_column": "best"} if loss_type == "tpo" else {}
        args = make_args(loss_type=loss_type, beta=0.1, output_dir=str(tmp_path / loss_type), **gold)
        made_trainer(args, tokenizer, rows).train()
        logs.append([entry["loss"] for entry in read_metrics(args.output_dir)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_gold_answers_are_tokenised_like_the_others(tokenizer: Any) -> None:
    rows = gold_rows(5)
    data = encode_rows(read_rows(rows), tokenizer, EncodingOptions(), Wanted(gold_column="reference"))
    plain = encode_rows(read_rows(make_rows(5)), tokenizer, EncodingOptions())
    for pair, other, row in zip(data, plain, rows, strict=True):
        assert torch.equal(pair.answers[0].ids, other.answers[0].ids)
        assert tokenizer.decode(pair.answers[2].ids) == row["reference"] + "<eos>"
    assert data.has_gold and not plain.has_gold and data.fingerprint() != plain.fingerprint()
    assert data.num_sequences.tolist() == [3] * 5 and data.sizes(torch.tensor([0]))[0][3] == len(
        data[0].answers[2].ids
    )
    whole = [len(data[0].prompt), *(len(answer.ids) for answer in data[0].answers)]
    assert data.lengths[0] == whole[0] + max(whole[1:])
    assert data.batch_tokens("packed")[0] == sum(whole) + 2 * whole[0]
    cut = encode_rows(
        read_rows(rows), tokenizer, EncodingOptions(max_length=12), Wanted(gold_column="reference")
    )
    assert int(cut.lengths.max()) <= 12
    # Without a column `prompt` the gold answer begins with what the others share, as in TRL.
    whole_rows = [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected", "reference")} for row in rows
    ]
    implicit = encode_rows(
        read_rows(whole_rows), tokenizer, EncodingOptions(), Wanted(gold_column="reference")
    )
    assert tokenizer.decode(implicit[0].answers[2].ids).endswith(rows[0]["reference"].strip() + "<eos>")


def test_bad_gold_answers_are_named(tokenizer: Any) -> None:
    options = EncodingOptions(), Wanted(gold_column="reference")
    good = gold_rows(2)
    with pytest.raises(ValueError, match="row 2: no column 'reference'"):
        encode_rows(read_rows([good[0], make_rows(1)[0]]), tokenizer, *options)
    with pytest.raises(ValueError, match="row 1: got .*list.*wanted strings throughout"):
        encode_rows(
            read_rows([{**good[0], "reference": [{"role": "user", "content": "a"}]}]), tokenizer, *options
        )
    with pytest.raises(ValueError, match="row 1: 'reference' does not begin with what chosen and rejected"):
        row = {"chosen": "one two", "rejected": "one three", "reference": "four"}
        encode_rows(read_rows([row]), tokenizer, *options)
    report = encode_rows(read_rows([*good, {**good[0], "reference": ""}]), tokenizer, *options).report
    assert report.skipped == {"an empty completion": [3]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nll_on_prompt": True}, "nll_on_prompt: got True with sigmoid"),
        ({"nll_on_prompt": True, "loss_type": "tpo"}, "nll_on_prompt: got True with tpo"),
        ({"nll_on_prompt": True, "loss_type": "kto"}, "nll_on_prompt: got True with kto"),
        (
            {"nll_on_prompt": True, "loss_type": "orpo", "loss_options": {"nll_weight": 0}},
            "nll_on_prompt: got True with orpo",
        ),
        ({"gold_column": "best"}, "gold_column: got 'best' with sigmoid"),
        (
            {"gold_column": "best", "loss_type": "tpo", "loss_options": {"nll_weight": 0}},
            "gold_column: got 'best' with tpo",
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(make_args: MakeArgs, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_gold_answers_without_a_use_are_refused(make_args: MakeArgs, tokenizer: Any) -> None:
    rows = gold_rows(4)
    with pytest.raises(
        ValueError, match="loss_type: got tpo, sft with gold answers in the column 'reference'"
    ):
        made_trainer(make_args(loss_type=["tpo", "sft"]), tokenizer, rows)
    scored = made_trainer(make_args(loss_type="tpo"), tokenizer, rows).train_dataset
    with pytest.raises(ValueError, match="tokenised pairs with gold answers, which cpo has no use for"):
        made_trainer(make_args(loss_type="cpo"), tokenizer, scored)
    plain = made_trainer(make_args(loss_type="cpo"), tokenizer, rows).train_dataset
    with pytest.raises(ValueError, match="gold_column: got 'best' with tokenised pairs that have no gold"):
        made_trainer(make_args(loss_type="tpo", gold_column="best"), tokenizer, plain)
    with pytest.raises(ValueError, match="row 1: no column 'best'"):
        made_trainer(make_args(loss_type="tpo", gold_column="best"), tokenizer, rows)


def test_a_gold_answer_that_pairs_lack_is_no_secret(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for settings, is_missed in (
        ({"loss_type": "cpo"}, False),
        ({"loss_type": "tpo", "loss_options": {"nll_weight": 0.0}}, False),
        ({"loss_type": "tpo-l"}, True),
    ):
        caplog.clear()
        made_trainer(make_args(**settings), tokenizer, make_rows(4))
        assert ("tpo-l: pairs have no third, gold answer" in caplog.text) == is_missed


def test_the_flags(model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    assert parse_train([*words, "--loss_type", "cpo", "--nll_on_prompt"]).config.nll_on_prompt is True
    assert (
        parse_train([*words, "--loss_type", "orpo", "--nll_on_prompt", "false"]).config.nll_on_prompt is False
    )
    data = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "best": row["reference"]} for row in gold_rows(4)])
    run = f"--model {model_dir} --output_dir {tmp_path / 'out'} --use_cpu --dataset {data}".split()
    assert (
        main(
            [
                "train",
                *run,
                "--max_steps",
                "1",
                "--loss_type",
                "tpo",
                "--gold_column",
                "best",
                "--disable_tqdm",
                "true",
            ]
        )
        == 0
    )
