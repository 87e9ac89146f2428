"""The loop on every kind of data but pairs: real rows, the function's loss, TRL's loss, exact means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdpo import LMHead, fused_preference_loss
from fastdpo.integrations.model import unpatch_model
from fastdpo.losses import UnpairedLogps, find_loss
from fastdpo.losses.metrics import unpaired_metrics
from fastdpo.training.batches.batch import Padded, PaddedBatch
from fastdpo.training.loop.loss_state import StepValues
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.loop.step import BatchCounts, batch_loss, record
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.kinds import KINDS, kind_of
from fastdpo.types import PreferenceLossOutput
from tests.losses.test_trl_parity import needs_trl
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.accumulation import assert_accumulation_changes_nothing
from tests.training.loop.kinds_data import LOSS_OF_KIND, rows_of
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]
NAMES = list(LOSS_OF_KIND)
LAYOUTS = ["packed", "shared_prompt"]


def made_trainer(args: PreferenceConfig, rows: Any, tokenizer: Any, **options: Any) -> PreferenceTrainer:
    options = {"train_dataset": rows, "processing_class": tokenizer, **options}
    return PreferenceTrainer(tiny_llama(1), args, **options)


@pytest.mark.parametrize("kind", NAMES)
def test_the_loss_falls_on_real_rows(make_args: MakeArgs, tokenizer: Any, kind: str):
    args = make_args(
        loss_type=LOSS_OF_KIND[kind], max_steps=12, learning_rate=2e-3, per_device_train_batch_size=8
    )
    # Nash-MD's is a policy gradient's, whose value may rise as well: here it falls on longer answers.
    rows = rows_of(kind, 8, characters=200 if kind == "samples" else 80)
    trainer = made_trainer(args, rows, tokenizer, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert [entry["step"] for entry in read_metrics(args.output_dir)][-1] == 12


@pytest.mark.parametrize("layout", ["padded", *LAYOUTS])
@pytest.mark.parametrize("kind", NAMES)
def test_the_loss_is_the_functions(make_args: MakeArgs, tokenizer: Any, kind: str, layout: str):
    """Of one batch, against ``fused_preference_loss`` on the hidden states of plain padded calls."""
    name = LOSS_OF_KIND[kind]
    args = make_args(loss_type=name, batch_layout=layout)
    trainer = made_trainer(args, rows_of(kind, 4), tokenizer, ref_model=tiny_llama(2))
    data = trainer.train_dataset
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    # A padded batch of the same rows, for the truth.
    padded = made_trainer(make_args(loss_type=name), data, tokenizer).data_collator(
        [data[i] for i in range(len(data))]
    )
    given = {"kl": torch.tensor(0.3)} if kind == "unpaired" else {}
    count = data.num_loss_rows
    got = batch_loss(
        trainer.model, trainer.model, batch, BatchCounts(count, 1), args, trainer.reference,
        lambda *_: StepValues(given),
    )  # fmt: skip

    policy, reference = unpatch_model(trainer.model), unpatch_model(trainer.reference.model)
    inputs = padded.sequences.model_inputs()
    hidden = policy.model(**inputs).last_hidden_state
    ref_hidden = reference.model(**inputs).last_hidden_state
    names = ("is_desirable", "group_ids", "scores", "num_groups", "max_candidates", "segment_ids")
    names += ("num_segments", "advantages", "win_rates")
    found = {**padded.numbers, "segment_ids": padded.segment_ids}
    extras = {key: found[key] for key in names if found.get(key) is not None}
    if kind not in ("ranking", "steps"):
        extras.pop("num_segments", None)
    wanted = fused_preference_loss(
        hidden, LMHead.from_model(policy), padded.sequences.labels, loss_type=name, ref_hidden=ref_hidden,
        ref_lm_head=LMHead.from_model(reference), **extras, **given,
    )  # fmt: skip
    # Sums of some hundred log-probabilities in fp32, each from other products' order: 1e-6 of their size.
    size = float(wanted.logps.abs().max())
    torch.testing.assert_close(got.logps, wanted.logps, rtol=0, atol=1e-6 * size)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-4)
    if wanted.rewards is not None:
        torch.testing.assert_close(got.rewards, wanted.rewards, rtol=0, atol=2e-6 * size)


def data_kind(name: str) -> str:
    return kind_of([find_loss(name)]).name


@pytest.mark.parametrize("label", [True, False], ids=["desirable", "undesirable"])
def test_answers_of_one_side_only(make_args: MakeArgs, tokenizer: Any, label: bool):
    """The other side's means, and the margins, are left out of the log: not 0, and not NaN."""
    rows = [{**row, "label": label} for row in rows_of("unpaired", 4)]
    args = make_args(loss_type="apo_zero_unpaired", max_steps=2, logging_steps=1)
    trainer = made_trainer(args, rows, tokenizer, eval_dataset=rows, ref_model=tiny_llama(2))
    trainer.train()
    here, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    evaluated = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    for log in (read_metrics(args.output_dir)[0], evaluated):
        assert log[f"rewards/{here}"] != 0 and math.isfinite(log[f"logps/{here}"])
        assert not {f"rewards/{absent}", f"logps/{absent}", "rewards/margins"} & log.keys()


def test_means_of_a_side_are_over_the_answers_it_has(make_args: MakeArgs, tokenizer: Any):
    """In batches of one row every batch lacks a side; the log is that of one batch of all rows."""
    rows = [{**row, "label": place in (0, 3, 4)} for place, row in enumerate(rows_of("unpaired", 5))]
    found = []
    for size in (1, 5):
        args = make_args(loss_type="apo_zero_unpaired", per_device_eval_batch_size=size)
        trainer = made_trainer(args, rows, tokenizer, ref_model=tiny_llama(2))
        found.append(trainer.evaluate(rows))
    names = [f"eval_{group}/{side}" for group in ("rewards", "logps") for side in ("chosen", "rejected")]
    for name in (*names, "eval_rewards/margins"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name
    rewards = found[1]["eval_rewards/chosen"], found[1]["eval_rewards/rejected"]
    assert found[1]["eval_rewards/margins"] == pytest.approx(rewards[0] - rewards[1], rel=1e-6)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_nan_of_answers_there_are_is_not_hidden(side: str):
    is_desirable = torch.tensor([side == "chosen"] * 2)
    ones = torch.ones(2, 3, dtype=torch.int64)
    batch = PaddedBatch(
        kind=KINDS["unpaired"],
        rows=torch.arange(2),
        num_answers=(1, 1),
        numbers={"is_desirable": is_desirable},
        sequences=Padded(ones, ones, ones),
    )
    answers = UnpairedLogps(torch.tensor([torch.nan, -1.0]), is_desirable, torch.ones(2))
    metrics = unpaired_metrics(answers, torch.tensor([torch.nan, 0.5]))
    sums = MetricSums()
    record(sums, batch, PreferenceLossOutput(torch.zeros(()), answers.logps, None, None, metrics))
    means = sums.means(lambda table: table)
    assert means.keys() == {f"rewards/{side}", f"logps/{side}"}
    assert all(math.isnan(mean) for mean in means.values())


def test_a_filler_is_in_no_mean():
    """The batch of a rank that has no rows: a copy of another's, which counts nowhere."""
    ones, sums = torch.ones(2, 3, dtype=torch.int64), MetricSums()
    batch = PaddedBatch(
        kind=KINDS["samples"], rows=torch.arange(2), num_answers=(1, 1), numbers={},
        sequences=Padded(ones, ones, ones),
    )  # fmt: skip
    for is_filler, value in ((False, 3.0), (True, 5.0)):
        metrics = {"rewards": torch.tensor(value), "entropy": torch.tensor(value)}
        result = PreferenceLossOutput(torch.zeros(()), torch.zeros(2), None, None, metrics)
        record(sums, replace(batch, is_filler=is_filler), result)
    assert sums.means(lambda table: table) == {"rewards": 3.0, "entropy": 3.0}


# BCO's and KTO's numbers of a step come from all of it.
ACCUMULATED = ["kto", "bco", "sdpo", "ddo_rm", "in_context_ranking", "direct_advantage", "nash_md"]


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulation_changes_nothing(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, name: str):
    kind = {"bco": "unpaired", "ddo_rm": "listwise"}.get(name) or next(
        k for k in NAMES if LOSS_OF_KIND[k] == name
    )
    rows = rows_of(kind, 7)
    options = {} if name == "ddo_rm" else {"ref_model": tiny_llama(2)}

    def make(args: PreferenceConfig, kept: KeepGradients) -> PreferenceTrainer:
        return made_trainer(args, rows, tokenizer, callbacks=[kept], **options)

    assert_accumulation_changes_nothing(make_args, make, tmp_path, loss_type=name, seed=3)


@pytest.mark.parametrize("kind", NAMES)
def test_references_agree(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, kind: str):
    """A copy, the adapter switched off, and scores computed before: the same run."""
    rows, logs = rows_of(kind, 6), []
    for reference, layout in (("copy", "padded"), ("adapter", "padded"), ("precomputed", "packed")):
        args = make_args(
            output_dir=str(tmp_path / reference),
            loss_type=LOSS_OF_KIND[kind],
            reference=reference,
            batch_layout=layout,
            max_steps=2,
            per_device_train_batch_size=3,
        )
        peft = LoraConfig(r=4, target_modules="all-linear")
        torch.manual_seed(0)
        trainer = made_trainer(args, rows, tokenizer, peft_config=peft, eval_dataset=rows[:5])
        trainer.train()
        logs.append([*read_metrics(args.output_dir), trainer.evaluate()])
    first, *others = logs
    for other in others:
        for wanted, got in zip(first, other, strict=True):
            for name in wanted.keys() & got.keys():
                if not name.endswith(("runtime", "second")):
                    assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), name


def test_batches_of_so_many_tokens(make_args: MakeArgs, tokenizer: Any):
    """Lists of two and three candidates: every batch within the budget, and no row left out."""
    args = make_args(loss_type="sdpo", max_tokens_per_batch=1200, max_steps=-1, num_train_epochs=1.0)
    trainer = made_trainer(args, rows_of("listwise", 12), tokenizer)
    batches = list(trainer.get_train_dataloader())
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(1, 13))
    assert max(batch.sequences.input_ids.numel() for batch in batches) <= 1200 and len(batches) > 2
    trainer.train()


def test_rewards_come_row_by_row(make_args: MakeArgs, tokenizer: Any):
    rows = rows_of("listwise", 5)
    args = make_args(loss_type="sdpo", per_device_eval_batch_size=2, beta=0.5)
    trainer = made_trainer(args, None, tokenizer, ref_model=tiny_llama(2), eval_dataset=rows)
    rewards = torch.as_tensor(trainer.predict(rows).predictions)
    assert rewards.shape == (5, 3)
    assert rewards.isnan().sum(1).tolist() == [3 - len(row["completions"]) for row in rows]
    data = trainer.eval_dataset
    for i in range(5):
        batch = trainer.data_collator([data[i]])
        wanted = batch_loss(
            trainer.model, trainer.model, batch, BatchCounts(1, 1), args, trainer.reference
        ).rewards
        torch.testing.assert_close(rewards[i, : len(wanted)], wanted, rtol=1e-5, atol=1e-4)


def test_pair_weights_weigh_rows(make_args: MakeArgs, tokenizer: Any):
    """A row of weight 0 is as if it were not there, but for what the loss is divided by."""
    rows = [{**row, "w": float(i > 0)} for i, row in enumerate(rows_of("steps", 3))]
    losses = []
    for given, column in ((rows, "w"), (rows[1:], None)):
        args = make_args(loss_type="direct_advantage", pair_weight_column=column)
        trainer = made_trainer(args, given, tokenizer, ref_model=tiny_llama(2))
        data = trainer.train_dataset
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        losses.append(
            batch_loss(trainer.model, trainer.model, batch, BatchCounts(1, 1), args, trainer.reference).loss
        )
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_data_of_another_kind_is_refused(make_args: MakeArgs, tokenizer: Any):
    pairs = made_trainer(make_args(), make_rows(4), tokenizer).train_dataset
    with pytest.raises(ValueError, match="dataset: got tokenised pairs, wanted unpaired data for kto"):
        made_trainer(make_args(loss_type="kto"), pairs, tokenizer)
    with pytest.raises(ValueError, match="no column 'completions': got .*listwise data"):
        made_trainer(make_args(loss_type="sdpo"), make_rows(4), tokenizer)
    rows = made_trainer(make_args(loss_type="bco"), make_rows(4), tokenizer).train_dataset
    with pytest.raises(ValueError, match="got rows without mismatched answers, wanted them with"):
        made_trainer(make_args(loss_type="kto"), rows, tokenizer)
    with pytest.raises(ValueError, match="got tokenised unpaired data, wanted pairs for sigmoid"):
        made_trainer(make_args(), rows, tokenizer)


def test_a_loss_that_is_not_finite_names_its_rows(make_args: MakeArgs, tokenizer: Any):
    rows = made_trainer(make_args(loss_type="sdpo"), rows_of("listwise", 4), tokenizer).train_dataset
    rows = rows.with_reference(torch.zeros(rows.score_shape))
    rows.numbers["ref_logps"].values[rows.answers.offsets[2]] = torch.nan
    args = make_args(loss_type="sdpo", train_sampling_strategy="sequential")
    with pytest.raises(RuntimeError, match="of row 3 of the training data"):
        made_trainer(args, rows, tokenizer).train()


@needs_trl
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_three_steps_as_trl_trains(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, loss_type: str):
    """TRL's own ``KTOTrainer``: loss, rewards and KL, where a batch has all rows: mismatches agree."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = rows_of("unpaired", 6)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 6,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "beta": 0.1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    tiny_llama(1).save_pretrained(tmp_path / "model")  # from where it loads the reference as well
    config = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type=loss_type,
        model_init_kwargs={"dtype": "float32"},
        **shared,
    )
    theirs = KTOTrainer(
        str(tmp_path / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs.train()
    args = make_args(loss_type=loss_type, **shared)
    ours = made_trainer(args, rows, tokenizer)
    ours.train()
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }
    names |= {"kl"} if loss_type == "kto" else set()
    logs = [[e for e in trainer.state.log_history if "loss" in e] for trainer in (theirs, ours)]
    assert len(logs[0]) == len(logs[1]) == 3
    for wanted, got in zip(*logs, strict=True):
        for name in names:
            # TRL's logps are rounded otherwise, and three steps of Adam make more of it.
            assert got[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-3), name
