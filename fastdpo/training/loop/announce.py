"""What a run says of itself: a line when it starts, and where it goes on from."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fastdpo.integrations.partitioned import whole_shape
from fastdpo.ops.backends import resolve_backend, resolve_divergence_backend
from fastdpo.training.batches.layouts import layout_of
from fastdpo.training.data.stream import known_rows
from fastdpo.training.settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


def announce(trainer: Any, resumed_from: str | None) -> None:
    """Log what is about to run: data, steps, losses, reference, machine, and where it is written."""
    args, state, dataset = trainer.args, trainer.state, trainer.train_dataset
    if resumed_from is not None:
        logger.info("resuming from %s, at step %d of %d", resumed_from, state.global_step, state.max_steps)
    if "output_dir" not in args.given:
        logger.warning("no output_dir is given: what this run writes goes into %s", args.output_dir)
    unit = dataset.report.unit
    logger.info(
        "training on %s: %d steps of %s; %s, reference %s",
        _data(dataset), state.max_steps, _batch(args, unit), _losses(args), trainer.reference.kind,
    )  # fmt: skip
    logger.info(
        "on %s, backend %s, layout %s, %s; into %s",
        _device(trainer), _backend(trainer), layout_of(trainer.data_collator), _precision(trainer),
        args.output_dir,
    )  # fmt: skip


def _data(dataset: Any) -> str:
    """How many rows of what; of a stream, of those that it begins with."""
    rows = known_rows(dataset)
    tokens = f"{int(rows.batch_tokens('packed').sum()):,} tokens"
    unit, source = rows.report.unit, rows.report.source
    if rows is dataset:
        return f"{len(rows)} {unit} of {source}, {tokens}"
    return f"a stream of {unit}, {source}, whose first {len(rows)} have {tokens}"


def _batch(args: PreferenceConfig, unit: str) -> str:
    ranks = f" on {args.world_size} processes" if args.world_size > 1 else ""
    times = args.gradient_accumulation_steps
    accumulated = f" x {times} accumulated" if times > 1 else ""
    if args.max_tokens_per_batch is not None:
        return f"up to {args.max_tokens_per_batch:,} tokens{accumulated}{ranks}"
    return f"{args.train_batch_size} {unit}{accumulated}{ranks}"


def _losses(args: PreferenceConfig) -> str:
    losses, betas = " + ".join(args.loss_type), betas_of(args)
    return f"{losses}, beta {betas}" if betas else losses


def betas_of(args: PreferenceConfig) -> str:
    """The losses' betas, each once; empty where they have none."""
    defaults = [spec.default_beta for spec in args.losses if spec.default_beta is not None]
    betas = [default if args.beta is None else args.beta for default in defaults]
    return ", ".join(f"{beta:g}" for beta in dict.fromkeys(betas))


def _device(trainer: Any) -> str:
    device = trainer.accelerator.device
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _backend(trainer: Any) -> str:
    args, device = trainer.args, trainer.accelerator.device
    resolve = resolve_divergence_backend if args.needs_divergences else resolve_backend
    # Logits are fp32, or fp64 of weights in fp64.
    is_double = next(trainer.model.parameters()).dtype == torch.float64
    return resolve(args.backend, device, torch.float64 if is_double else torch.float32)


def _precision(trainer: Any) -> str:
    model = trainer.model
    trained = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    total = sum(whole_shape(p).numel() for p in model.parameters())
    precision = trainer.accelerator.mixed_precision
    computed = "" if precision == "no" else f", computed in {precision}"
    return f"{trained:,} of {total:,} parameters trained{computed}"
