"""The largest batch is tried first, leaves no trace, and says what to change when it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training.batches.budget import pair_tokens
from fastdpo.training.loop import largest_batch
from fastdpo.training.loop import trainer as trainer_module
from fastdpo.training.loop.largest_batch import BatchTooLargeError
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference import precompute
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.ddp_run import pairs

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


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_a_batch_of_the_run(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch, ranks: int):
    """Of the order that data_seed gives, which is another than the seed's, as the ranks share it."""
    for seed in range(5):
        args = make_args(batch_layout="packed", max_tokens_per_batch=60, data_seed=seed)
        trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=pairs(60, 0))
        with monkeypatch.context() as patched:
            patched.setattr(PreferenceConfig, "world_size", property(lambda self: ranks))
            tried = largest_batch.largest_batch(trainer, trainer.train_dataset)
            sampler = trainer.get_train_dataloader().batch_sampler
        assert tried in list(sampler)
        assert sampler.cost(tried) == max(map(sampler.cost, sampler))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_held_as_in_the_largest_step(
    make_args: MakeArgs, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, accumulate: int
):
    """What the trial's forward pass begins with is what the last micro-batch of a real step begins with."""
    held: dict[str, list[int]] = {"trial": [], "step": []}

    def watched(module: Any, name: str) -> None:
        compute = module.batch_loss

        def batch_loss(model: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
            held[name].append(sum(p.grad.numel() for p in policy.parameters() if p.grad is not None))
            return compute(model, policy, *args, **kwargs)

        monkeypatch.setattr(module, "batch_loss", batch_loss)

    watched(largest_batch, "trial")
    watched(trainer_module, "step")
    args = make_args(longest_batch_first=True, gradient_accumulation_steps=accumulate, max_steps=2)
    trainer = make_trainer(args, tokenizer)
    trainer.train()
    size = sum(p.numel() for p in trainer.model.parameters())
    assert held["step"] == [size * (i % accumulate) for i in range(2 * accumulate)]
    assert held["trial"] == [size * (accumulate - 1)]


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "bf16": True}])
def test_it_is_tried_before_anything_is_scored(
    make_args: MakeArgs,
    tokenizer: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
):
    order: list[str] = []

    def noted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, note)

    noted(largest_batch, "batch_loss")
    noted(precompute, "score_dataset")
    logs = []
    for is_on in (False, True):
        order.clear()
        args = make_args(
            output_dir=str(tmp_path / f"run{is_on}"), longest_batch_first=is_on, reference="precomputed",
            reference_cache_dir=str(tmp_path / f"cache{is_on}"), disable_dropout=False, **changes,
        )  # fmt: skip
        make_trainer(args, tokenizer).train()
        logs.append(read_metrics(args.output_dir))
        assert order == (["batch_loss", "score_dataset", "batch_loss"] if is_on else ["score_dataset"])
    assert logs[0] == logs[1]

    order.clear()
    monkeypatch.setattr(largest_batch, "batch_loss", run_out_of_memory)
    args = make_args(
        longest_batch_first=True, reference="precomputed", reference_cache_dir=str(tmp_path / "new")
    )
    with pytest.raises(BatchTooLargeError):
        make_trainer(args, tokenizer).train()
    assert order == []


def test_the_early_trial_is_of_the_run_s_memory(make_args: MakeArgs, tokenizer: Any):
    """Adam's moments and checkpointing are there, before ``Trainer.train`` has begun."""
    args = make_args(longest_batch_first=True, reference="precomputed", gradient_checkpointing=True)
    trainer = make_trainer(args, tokenizer)
    seen: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        layers = [
            m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing")
        ]
        seen.append((layers, len(largest_batch._adam_state(trainer))))
        raise torch.OutOfMemoryError("here")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(largest_batch, "batch_loss", stop)
        with pytest.raises(BatchTooLargeError, match="here"):
            trainer.train()
    ((layers, moments),) = seen
    assert all(layers) and layers
    assert moments == 2 * len(list(trainer.model.parameters()))


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
