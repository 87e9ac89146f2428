"""Try the largest batch before the first step: what does not fit fails in the first minute, with numbers."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.training.batches import is_pairs, num_rows, sequence_tokens
from fastdpo.training.data import row_list
from fastdpo.training.dataset import RowDataset
from fastdpo.training.layouts import layout_of, token_budget
from fastdpo.training.step import BatchCounts, batch_loss
from fastdpo.training.token_budget import pair_tokens

if TYPE_CHECKING:
    from fastdpo.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)
_GIB = 2**30


class BatchTooLargeError(RuntimeError):
    """The largest batch does not fit into the device's memory."""


def try_largest_batch(trainer: PreferenceTrainer) -> None:
    """One forward and backward pass over the largest batch; gradients and random numbers are as before.

    Room is kept for the state that Adam makes in the first step.

    Raises:
        BatchTooLargeError: on every rank, when it does not fit on one; says what to lower.
    """
    dataset: Any = trainer.train_dataset
    pairs = largest_batch(trainer, dataset)
    inputs = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in pairs]))
    device = trainer.accelerator.device
    devices = [device] if device.type == "cuda" else []
    message = None
    with torch.random.fork_rng(devices=devices):
        try:
            _forward_and_backward(trainer, inputs)
        except torch.OutOfMemoryError as error:
            message = _explain(trainer, dataset, pairs, inputs, error)
    trainer.model.zero_grad(set_to_none=True)
    failed = trainer._over_ranks(torch.tensor(int(message is not None), device=device))
    if failed > 0:
        raise BatchTooLargeError(message or "another rank could not hold the largest batch")
    logger.info("the largest batch fits: %s%s", _size(trainer, inputs), _memory(device))


def largest_batch(trainer: PreferenceTrainer, dataset: RowDataset) -> list[int]:
    """The pairs of a batch than which none is larger."""
    budget = token_budget(trainer.args, trainer.data_collator)
    if budget is not None:
        return budget.sampler(
            dataset, strategy=trainer.args.train_sampling_strategy, seed=trainer.args.seed
        ).most_expensive()
    sizes = pair_tokens(dataset, layout_of(trainer.data_collator))
    if layout_of(trainer.data_collator) == "padded":
        sizes = sizes * dataset.num_sequences
    count = min(trainer.args.train_batch_size, len(dataset))
    return sizes.topk(count).indices.tolist()


def _forward_and_backward(trainer: PreferenceTrainer, inputs: Any) -> None:
    model = trainer.model_wrapped
    model.train()
    reserved = _adam_state(trainer)
    counts = BatchCounts(max(num_rows(inputs), 1), max(int(sequence_tokens(inputs)), 1))
    # Not reduced over the ranks: these gradients are thrown away.
    unsynchronised = getattr(model, "no_sync", contextlib.nullcontext)
    with unsynchronised(), trainer.compute_loss_context_manager():
        policy = trainer.accelerator.unwrap_model(model)
        frozen = trainer.loss_state.frozen
        result = batch_loss(model, policy, inputs, counts, trainer.args, trainer.reference, frozen)
        trainer.accelerator.backward(result.loss)
    del reserved


def _adam_state(trainer: PreferenceTrainer) -> list[torch.Tensor]:
    """Memory of the size of Adam's two moments, where the optimiser will make them and has not yet."""
    optimizer = trainer.optimizer
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if name not in ("Adam", "AdamW") or optimizer.state:
        return []
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return [torch.empty_like(p) for p in trained for _ in range(2)]


def _explain(
    trainer: PreferenceTrainer, dataset: RowDataset, pairs: list[int], inputs: Any, error: Exception
) -> str:
    args = trainer.args
    longest = int(dataset.lengths[torch.tensor(pairs)].max())
    if args.max_tokens_per_batch is not None:
        limit = f"max_tokens_per_batch (now {args.max_tokens_per_batch})"
    else:
        limit = f"per_device_train_batch_size (now {args.per_device_train_batch_size}; raise "
        limit += f"gradient_accumulation_steps, now {args.gradient_accumulation_steps}, to make up for it)"
    hints = [f"lower {limit}", f"lower max_length (now {args.max_length}; here {longest} tokens)"]
    if not (getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing):
        hints.append("set activation_checkpointing=True")
    if layout_of(trainer.data_collator) != "shared_prompt":
        hints.append("try batch_layout='shared_prompt'")
    rows, memory = row_list(dataset.rows[torch.tensor(pairs)].tolist()), _memory(trainer.accelerator.device)
    return (
        f"the largest batch does not fit: {_size(trainer, inputs)}, {rows}{memory} "
        f"({(str(error).splitlines() or [''])[0]}). Wanted a smaller one: " + ", or ".join(hints)
    )


def _size(trainer: PreferenceTrainer, inputs: Any) -> str:
    calls = inputs.get("calls", [inputs])
    positions = sum(call["input_ids"].numel() for call in calls)
    unit = "pairs" if is_pairs(inputs) else "rows"
    return (
        f"{num_rows(inputs)} {unit}, {int(sequence_tokens(inputs))} tokens, {positions} positions of the "
        f"backbone in {len(calls)} calls ({layout_of(trainer.data_collator)})"
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device) / _GIB
    total = torch.cuda.get_device_properties(device).total_memory / _GIB
    return f"; {peak:.1f} GiB at the peak of {total:.1f} GiB"
