"""The largest batch is tried first, leaves no trace, and says what to change when it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training import largest_batch
from fastdpo.training.config import PreferenceConfig
from fastdpo.training.largest_batch import BatchTooLargeError
from fastdpo.training.token_budget import pair_tokens
from fastdpo.training.trainer import PreferenceTrainer
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
BUDGET = {"max_tokens_per_batch": 260}


def make_trainer(args: PreferenceConfig, tokenizer: Any, **options: Any) -> PreferenceTrainer:
    model = tiny_llama(attention_dropout=0.2)
    return PreferenceTrainer(model, args, train_dataset=make_rows(16), processing_class=tokenizer, **options)


@pytest.mark.parametrize("changes", [{}, {"batch_layout": "packed", **BUDGET}], ids=["pairs", "tokens"])
def test_it_leaves_no_trace(make_args: MakeArgs, tokenizer: Any, tmp_path: Any, changes: dict[str, Any]):
    """With dropout, so that a random number drawn too many would show."""
    logs = []
    for is_on in (False, True):
        args = make_args(
            output_dir=str(tmp_path / str(is_on)), longest_batch_first=is_on, disable_dropout=False, **changes
        )
        make_trainer(args, tokenizer).train()
        logs.append(read_metrics(args.output_dir))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
def test_it_is_the_largest(make_args: MakeArgs, tokenizer: Any, layout: str):
    args = make_args(batch_layout=layout, longest_batch_first=True)
    trainer = make_trainer(args, tokenizer)
    sizes = pair_tokens(trainer.train_dataset, layout)
    pairs = largest_batch.largest_batch(trainer, trainer.train_dataset)
    assert sorted(sizes[pairs].tolist()) == sizes.sort().values[-4:].tolist()

    args = make_args(batch_layout=layout, longest_batch_first=True, max_tokens_per_batch=300)
    trainer = make_trainer(args, tokenizer)
    sampler = trainer.get_train_dataloader().batch_sampler
    pairs = largest_batch.largest_batch(trainer, trainer.train_dataset)
    assert sampler.cost(pairs) == max(map(sampler.cost, sampler))


def run_out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("Tried to allocate 80.00 GiB.\nMore text.")


def test_what_does_not_fit_says_what_to_lower(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(largest_batch, "batch_loss", run_out_of_memory)
    trainer = make_trainer(make_args(longest_batch_first=True), tokenizer)
    with pytest.raises(BatchTooLargeError) as raised:
        trainer.train()
    message = str(raised.value)
    for part in (
        "4 pairs", "rows ", "(padded)", "Tried to allocate 80.00 GiB.", "per_device_train_batch_size (now 4",
        "max_length (now 1024", "activation_checkpointing=True", "batch_layout='shared_prompt'",
    ):  # fmt: skip
        assert part in message, part
    assert "More text" not in message and "\n" not in message
    assert trainer.state.global_step == 0

    args = make_args(
        output_dir=str(tmp_path / "budget"), longest_batch_first=True, batch_layout="shared_prompt", **BUDGET,
        gradient_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(BatchTooLargeError, match=r"lower max_tokens_per_batch \(now 260\)") as raised:
        make_trainer(args, tokenizer).train()
    assert "activation_checkpointing" not in str(raised.value)


def test_it_is_off_on_a_cpu_unless_asked_for(make_args: MakeArgs):
    assert make_args().longest_batch_first is False
    assert make_args(longest_batch_first=True).longest_batch_first is True


def test_room_is_kept_for_adam(make_args: MakeArgs, tokenizer: Any):
    trainer = make_trainer(make_args(), tokenizer)
    trainer.create_optimizer()
    reserved = largest_batch._adam_state(trainer)
    assert sum(x.numel() for x in reserved) == 2 * sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    assert largest_batch._adam_state(trainer) == []
