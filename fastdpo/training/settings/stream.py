"""Settings of a run on a stream: what needs all rows, or a number of them, is refused by name."""

from __future__ import annotations

from typing import Any

from fastdpo.training.settings.fields import SettingFields

# What cannot be had without all rows: the value each needs, and what to do instead.
_WANTED: dict[str, tuple[Any, str]] = {
    "train_sampling_strategy": (
        "group_by_length",
        "lengths are known of rows at hand only: wanted 'random' or 'sequential'; max_tokens_per_batch puts "
        "rows of like length together",
    ),
    "longest_batch_first": (True, "the longest row is not known: wanted False, or max_tokens_per_batch"),
    "logging_strategy": ("epoch", "where a pass ends is not known: wanted 'steps' or 'no'"),
    "save_strategy": ("epoch", "where a pass ends is not known: wanted 'steps' or 'no'"),
    "eval_strategy": ("epoch", "where a pass ends is not known: wanted 'steps' or 'no'"),
}


def check_stream_settings(args: SettingFields) -> None:
    """Hold settings to a stream as ``train_dataset``.

    Raises:
        ValueError: a setting that a stream cannot honour; says which, and what to do instead.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps: got {args.max_steps} with a stream, wanted the number of steps: how many rows a "
            "stream has is not known"
        )
    given: dict[str, Any] = getattr(args, "given", {})
    if "num_train_epochs" in given:
        raise ValueError(
            f"num_train_epochs: got {args.num_train_epochs:g} with a stream, wanted max_steps alone, which "
            "says how long the run is: a stream that ends begins again"
        )
    if args.longest_batch_first and "longest_batch_first" not in given:
        args.longest_batch_first = False  # the default on a GPU
    for name, (refused, reason) in _WANTED.items():
        value = getattr(args, name)
        value = getattr(value, "value", value)
        if value == refused:
            raise ValueError(f"{name}: got {value!r} with a stream: {reason}")
    if "shuffle_buffer_size" in given and args.train_sampling_strategy == "sequential":
        raise ValueError(
            f"shuffle_buffer_size: got {args.shuffle_buffer_size} with train_sampling_strategy 'sequential', "
            "wanted one of the two"
        )
    if args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers: got {args.dataloader_num_workers} with a stream, wanted 0: rows are "
            "read and tokenised by the process that trains, which knows where the stream is"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"accelerator_config.{name}: got True with a stream, wanted False: each rank reads the "
                "stream and takes its own share"
            )


def check_no_stream_settings(args: SettingFields) -> None:
    """Raise ValueError for a setting of streams with rows at hand."""
    given: dict[str, Any] = getattr(args, "given", {})
    if "shuffle_buffer_size" in given:
        raise ValueError(
            f"shuffle_buffer_size: got {args.shuffle_buffer_size} with rows at hand, which are shuffled "
            "whole: wanted a stream (dataset_streaming), or no value"
        )
