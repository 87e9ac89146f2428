"""Try the largest batch before the first step: what does not fit fails in the first minute, with numbers.

Where the data set's references are still to be scored, which may take hours, it is tried before that too.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.budget import pair_tokens, training_sampler
from fastdpo.training.batches.layouts import layout_of, token_budget
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.row_numbers import row_list
from fastdpo.training.loop.base import BaseTrainer
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.settings.checkpointing import recomputes_activations

logger = logging.getLogger(__name__)
_GIB = 2**30


class BatchTooLargeError(RuntimeError):
    """The largest batch does not fit into the device's memory."""


def try_before_scoring(trainer: BaseTrainer) -> None:
    """`try_largest_batch` before the data set has its references, and so before ``Trainer.train`` begins.

    The optimiser is made and checkpointing switched on, as ``Trainer.train`` would. What that wraps the model
    in is not there yet, so the batch is tried once more, with it, before the first step.
    """
    if trainer.optimizer is None:
        trainer.create_optimizer()
    _enable_checkpointing(trainer)
    try_largest_batch(trainer)


def try_largest_batch(trainer: BaseTrainer) -> None:
    """One forward and backward pass over the largest batch; gradients and random numbers are as before.

    Room is kept for the state that Adam makes in the first step, and for the gradients of the micro-batches
    before it where there are any. References that are not known yet are taken for 0, which costs as much.

    Raises:
        BatchTooLargeError: on every rank, when it does not fit on one; says what to lower.
    """
    dataset: Any = trainer.train_dataset
    if trainer.reference.kind == "precomputed" and not dataset.has_reference:
        dataset = dataset.with_reference(torch.zeros(dataset.score_shape))
    pairs = largest_batch(trainer, dataset)
    inputs: Batch = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in pairs]))
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


def largest_batch(trainer: BaseTrainer, dataset: RowDataset) -> list[int]:
    """The pairs of a batch than which none is larger; under a token budget, none of the first epoch.

    Later epochs draw batches anew. None is beyond the budget, which the largest of an epoch all but fills.
    """
    budget = token_budget(trainer.args, trainer.data_collator)
    if budget is not None:
        return training_sampler(dataset, budget, trainer.args).most_expensive()
    sizes = pair_tokens(dataset, layout_of(trainer.data_collator))
    if layout_of(trainer.data_collator) == "padded":
        sizes = sizes * dataset.num_sequences
    count = min(trainer.args.train_batch_size, len(dataset))
    return sizes.topk(count).indices.tolist()


def _forward_and_backward(trainer: BaseTrainer, inputs: Batch) -> None:
    model = trainer.model_wrapped
    model.train()
    _hold_gradients(trainer)
    reserved = _adam_state(trainer) + _buckets(trainer)
    counts = BatchCounts(max(inputs.num_rows, 1), max(int(inputs.sequence_tokens), 1))
    # Not reduced over the ranks: these gradients are thrown away.
    unsynchronised = getattr(model, "no_sync", contextlib.nullcontext)
    # Autocast is part of the wrapped model's forward pass, and not of the bare one's.
    with unsynchronised(), trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        policy = trainer.accelerator.unwrap_model(model)
        frozen = trainer.loss_state.frozen
        given = (model, policy, inputs, counts, trainer.args, trainer.reference, frozen)
        result = batch_loss(*given, router=trainer.router)
        trainer.accelerator.backward(result.loss)
    del reserved


def _enable_checkpointing(trainer: BaseTrainer) -> None:
    """What ``Trainer.train`` does at its beginning, by the names of transformers since 5.23 and before."""
    args, model = trainer.args, trainer.model
    if getattr(args, "activation_checkpointing", None):
        given: Any = args.activation_checkpointing_kwargs
        options = dict(given or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
    elif args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)


def _hold_gradients(trainer: BaseTrainer) -> None:
    """From the second micro-batch of a step on, a backward pass adds to gradients that are there."""
    if trainer.args.gradient_accumulation_steps > 1:
        for parameter in _trained(trainer):
            parameter.grad = torch.zeros_like(parameter)


def _trained(trainer: BaseTrainer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def _buckets(trainer: BaseTrainer) -> list[torch.Tensor]:
    """Memory of the size of DDP's buckets, where the ranks' gradients will meet and DDP is not there yet."""
    if trainer.accelerator.num_processes == 1 or trainer.model_wrapped is not trainer.model:
        return []
    return [torch.empty_like(parameter) for parameter in _trained(trainer)]


def _adam_state(trainer: BaseTrainer) -> list[torch.Tensor]:
    """Memory of the size of Adam's two moments, where the optimiser will make them and has not yet."""
    optimizer = trainer.optimizer
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if name not in ("Adam", "AdamW") or optimizer.state:
        return []
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return [torch.empty_like(p) for p in trained for _ in range(2)]


def _explain(
    trainer: BaseTrainer, dataset: RowDataset, pairs: list[int], inputs: Batch, error: Exception
) -> str:
    args = trainer.args
    longest = int(dataset.lengths[torch.tensor(pairs)].max())
    if args.max_tokens_per_batch is not None:
        limit = f"max_tokens_per_batch (now {args.max_tokens_per_batch})"
    else:
        limit = f"per_device_train_batch_size (now {args.per_device_train_batch_size}; raise "
        limit += f"gradient_accumulation_steps, now {args.gradient_accumulation_steps}, to make up for it)"
    hints = [f"lower {limit}", f"lower max_length (now {args.max_length}; here {longest} tokens)"]
    if not recomputes_activations(args):
        hints.append("set activation_checkpointing=True")
    if not args.offload_activations:
        hints.append("set offload_activations=True")
    if layout_of(trainer.data_collator) != "shared_prompt":
        hints.append("try batch_layout='shared_prompt'")
    rows, memory = row_list(dataset.rows[torch.tensor(pairs)].tolist()), _memory(trainer.accelerator.device)
    return (
        f"the largest batch does not fit: {_size(trainer, inputs)}, {rows}{memory} "
        f"({(str(error).splitlines() or [''])[0]}). Wanted a smaller one: " + ", or ".join(hints)
    )


def _size(trainer: BaseTrainer, inputs: Batch) -> str:
    return (
        f"{inputs.num_rows} {inputs.kind.unit}, {int(inputs.sequence_tokens)} tokens, {inputs.positions} "
        f"positions of the backbone in {len(inputs.calls)} calls ({layout_of(trainer.data_collator)})"
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device) / _GIB
    total = torch.cuda.get_device_properties(device).total_memory / _GIB
    return f"; {peak:.1f} GiB at the peak of {total:.1f} GiB"
