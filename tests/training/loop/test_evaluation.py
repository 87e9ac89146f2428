"""What an evaluation is a mean over: the rows that batches are made of, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from fastdpo.training.loop.step import BatchCounts, batch_loss, local_counts
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, tiny_llama
from tests.training.loop.kinds_data import LOSS_OF_KIND, rows_of

MakeArgs = Callable[..., PreferenceConfig]
# KTO's reference point is of the whole data set, whatever is dropped: not this loss of unpaired data.
LOSSES = {**LOSS_OF_KIND, "unpaired": "bco"}


def made_trainer(args: PreferenceConfig, rows: Any, tokenizer: Any) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_llama(1), args, eval_dataset=rows, processing_class=tokenizer, ref_model=tiny_llama(2)
    )


def assert_same_metrics(got: dict[str, float], wanted: dict[str, float]) -> None:
    """But for those of the clock, and the input tokens, which are all that were ever seen."""
    names = [n for n in wanted if not n.endswith(("runtime", "per_second", "time", "num_tokens"))]
    assert "eval_loss" in names and len(names) > 1
    for name in names:
        assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid", "sft"]], ids=str)
def test_a_dropped_batch_of_pairs_counts_nowhere(make_args: MakeArgs, tokenizer: Any, loss_type: Any):
    """Also where a term is divided by the tokens of chosen answers."""
    rows = make_rows(11)
    settings = {"loss_type": loss_type, "per_device_eval_batch_size": 4}
    dropping = made_trainer(make_args(dataloader_drop_last=True, **settings), rows, tokenizer)
    plain = made_trainer(make_args(**settings), rows[:8], tokenizer)
    assert_same_metrics(dropping.evaluate(), plain.evaluate())


@pytest.mark.parametrize("kind", list(LOSSES))
def test_dropped_rows_of_other_kinds_count_nowhere(make_args: MakeArgs, tokenizer: Any, kind: str):
    rows = rows_of(kind, 7)
    settings = {"loss_type": LOSSES[kind], "per_device_eval_batch_size": 3}
    dropping = made_trainer(make_args(dataloader_drop_last=True, **settings), rows, tokenizer)
    plain = made_trainer(make_args(**settings), rows[:6], tokenizer)
    assert_same_metrics(dropping.evaluate(), plain.evaluate())


@pytest.mark.parametrize("kind", list(LOSSES))
def test_the_loss_of_batches_is_that_of_one(make_args: MakeArgs, tokenizer: Any, kind: str):
    """Of steps, too, of which rows have different numbers."""
    args = make_args(loss_type=LOSSES[kind], per_device_eval_batch_size=2)
    trainer = made_trainer(args, rows_of(kind, 5), tokenizer)
    data = trainer.eval_dataset
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    pairs, tokens = local_counts([batch], torch.device("cpu"))
    model = trainer.model
    values = trainer.loss_state.frozen
    with torch.no_grad():
        wanted = batch_loss(model, model, batch, BatchCounts(pairs, tokens), args, trainer.reference, values)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted.loss), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [3, 4, 11, 12, 25])
def test_ranks_share_whole_rounds_of_the_first_rows(
    make_args: MakeArgs, tokenizer: Any, num_rows: int, ranks: int
):
    """accelerate hands batches out in turn: what all ranks get is what the trainer counts."""
    trainer = made_trainer(make_args(dataloader_drop_last=True), make_rows(num_rows), tokenizer)
    batches = BatchSampler(range(num_rows), 2, drop_last=True)
    shards = [BatchSamplerShard(batches, ranks, rank) for rank in range(ranks)]
    seen = sorted(row for shard in shards for batch in shard for row in batch)

    class Loader:
        total_batch_size = 2 * ranks

        def __len__(self) -> int:
            return len(shards[0])

    evaluated = trainer._evaluated(trainer.eval_dataset, Loader())
    assert evaluated.rows.tolist() == [trainer.eval_dataset.rows[i] for i in seen]
