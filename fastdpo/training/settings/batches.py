"""Settings of how batches are made and handed out, held to each other."""

from __future__ import annotations

from typing import Any

from fastdpo.training.settings.checkpointing import recomputes_activations
from fastdpo.training.settings.fields import SettingFields


def check_batches(args: SettingFields) -> None:
    """Raise ValueError for settings of batches that exclude each other."""
    if args.batch_layout == "padded" and args.row_arrangement != "auto":
        raise ValueError(
            f"row_arrangement: got {args.row_arrangement!r} with batch_layout='padded', wanted 'auto' or "
            "another layout"
        )
    if args.batch_layout == "shared_prompt" and args.row_arrangement == "bucketed":
        raise ValueError(
            "row_arrangement: got 'bucketed' with batch_layout='shared_prompt', wanted 'auto', 'separate' or "
            "'one_row': what shares a beginning is not padded"
        )
    _check_context(args)
    if args.max_tokens_per_batch is not None and args.reference_batch_size is not None:
        raise ValueError("reference_batch_size: got a value and max_tokens_per_batch, wanted one of the two")
    if args.offload_activations and (args.torch_compile or args.torch_compile_backend):
        raise ValueError(
            "offload_activations: got True with torch_compile, wanted one of the two: what compiled code "
            "saves is not ours to move"
        )


def _check_context(args: SettingFields) -> None:
    """Raise ValueError for what a carried context cannot do, or does without."""
    if args.context_chunk is None:
        for name in ("context_device_mib", "context_host_mib", "context_directory"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}: got {getattr(args, name)!r} without context_chunk, wanted both")
        return
    try:
        args.context()
    except ValueError as error:
        raise ValueError(f"context_{error}") from None
    got = f"context_chunk: got {args.context_chunk}"
    if args.batch_layout == "padded":
        raise ValueError(f"{got} with batch_layout='padded', wanted 'packed', 'shared_prompt' or 'auto'")
    if args.row_arrangement == "bucketed":
        raise ValueError(f"{got} with row_arrangement='bucketed', wanted 'auto', 'separate' or 'one_row'")
    if recomputes_activations(args) or args.offload_activations:
        name = "offload_activations" if args.offload_activations else "activation checkpointing"
        raise ValueError(f"{got} with {name}, wanted one of the two: chunks are run again anyway")
    if args.torch_compile or args.torch_compile_backend:
        raise ValueError(f"{got} with torch_compile, wanted one of the two")


def check_own_collator(args: SettingFields) -> None:
    """Raise ValueError for settings that the caller's own ``data_collator`` does not know of."""
    if args.batch_layout != "padded":
        raise ValueError(f"data_collator: got one with batch_layout={args.batch_layout!r}, wanted 'padded'")
    if args.ld_alpha is not None:
        raise ValueError(
            f"data_collator: got one with ld_alpha={args.ld_alpha!r}, wanted None: ours makes weights"
        )


def check_own_masks(data_collator: Any, dataset: Any) -> None:
    """Raise ValueError for answers that are scored in part, with a collator that does not know of it."""
    is_ours = type(data_collator).__module__.startswith("fastdpo.")
    if getattr(dataset, "scored", None) is not None and data_collator is not None and not is_ours:
        raise ValueError(
            "data_collator: got one with answers of several turns, of which only the assistant's are "
            "scored, wanted None: ours knows which (an item's `scored`); or assistant_only=False, and all "
            "turns are"
        )


def check_loader(args: SettingFields) -> None:
    """Raise ValueError for ways to hand out batches that cut tensors by their first dimension.

    It is no pair's here. Called when ``TrainingArguments`` have settled what accelerate is told.
    """
    is_free = args.batch_layout == "padded" and args.max_tokens_per_batch is None and args.data_kind.is_paired
    for name in ("split_batches", "dispatch_batches"):
        if not is_free and getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config.{name}: got True, wanted False: batches of batch_layout="
                f"{args.batch_layout!r}, with max_tokens_per_batch or of no pairs cannot be cut up"
            )
    if args.max_tokens_per_batch is not None and args.dataloader_drop_last:
        raise ValueError(
            "dataloader_drop_last: got True with max_tokens_per_batch, wanted False: batches of so many "
            "tokens are filled alike, and no last one is short"
        )
