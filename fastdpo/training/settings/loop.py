"""Settings of the run as a whole: choices, ranges, packages, what transformers has and we have not."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

from fastdpo.training.settings.choices import ARRANGEMENTS, BAD_ROW_POLICIES, TRAINING_MODES, TRUNCATION_MODES
from fastdpo.training.settings.fields import SettingFields
from fastdpo.types import BACKENDS

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "truncation_mode": TRUNCATION_MODES,
    "on_bad_row": BAD_ROW_POLICIES,
    "batch_layout": ("padded", "packed", "shared_prompt", "auto"),
    "row_arrangement": ("auto", *ARRANGEMENTS),
    "engine": (None, "fsdp2", "zero2", "zero3"),
    "reference": ("auto", "copy", "adapter", "precomputed", "none"),
    "mode": TRAINING_MODES,
    "backend": BACKENDS,
    "logits_dtype": (None, "fp32", "bf16"),
    "on_nonfinite_loss": ("stop", "skip"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "pad_to_multiple_of": 1,
    "max_tokens_per_batch": 1,
    "reference_batch_size": 1,
    "ref_model_sync_steps": 1,
    "save_total_limit": 1,
    "dataset_num_proc": 1,
    "tp_size": 1,
    "sp_size": 1,
    "dp_replicate_size": 1,
    "shuffle_buffer_size": 0,
    "workspace_mib": 1,
    "cache_mib": 0,
    "dataloader_num_workers": 0,
}
# Settings of TrainingArguments that this trainer cannot honour: the value each needs, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the collator decides what reaches the model"),
    "label_smoothing_factor": (0, "use the loss option label_smoothing"),
    "label_names": (None, "the collator makes the labels"),
    "average_tokens_across_devices": (True, "the loss is the mean over all ranks' rows"),
    "auto_find_batch_size": (False, "not supported by this version"),
    "length_column_name": ("length", "lengths are counted in the tokenised rows, not read from a column"),
    "do_predict": (False, "there is nothing to predict; evaluations have the rewards"),
}


# Liger's kernels that make the head's product, or take its logits.
LIGER_OFF = ("cross_entropy", "fused_linear_cross_entropy")


def check_loop(args: SettingFields) -> None:
    """Raise ValueError for a value out of range, or that this trainer cannot honour."""
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name}: got {getattr(args, name)!r}, wanted one of {choices}")
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: got {value!r}, wanted a whole number from {least}")
    rate = args.learning_rate
    if rate is not None and not 0 <= rate < math.inf:
        raise ValueError(f"learning_rate: got {rate!r}, wanted a number from 0")
    weight = args.router_aux_loss_coef
    if weight is not None and not 0 <= weight < math.inf:
        raise ValueError(f"router_aux_loss_coef: got {weight!r}, wanted a number from 0")
    for name, (needed, reason) in FIXED.items():
        if getattr(args, name, needed) != needed:
            raise ValueError(f"{name}: got {getattr(args, name)!r}, wanted {needed}: {reason}")
    _check_liger(args)
    if args.push_to_hub and _is_offline():
        raise ValueError(
            "push_to_hub: got True with HF_HUB_OFFLINE=1 in the environment, wanted one of the two"
        )


def _check_liger(args: Any) -> None:
    """Liger's kernels are for the backbone: its cross entropies, which have the head in them, stay off."""
    given = dict(args.liger_kernel_config or {})
    if not args.use_liger_kernel:
        if given:
            raise ValueError(f"liger_kernel_config: got {given} without use_liger_kernel, wanted both")
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel: got True, which needs liger-kernel: pip install liger-kernel")
    for name in LIGER_OFF:
        if given.get(name):
            raise ValueError(
                f"liger_kernel_config: got {name}, wanted it off: no logits are made, and it would "
                "replace the forward pass that the fused head is in"
            )
    args.liger_kernel_config = {**given, **dict.fromkeys(LIGER_OFF, False)}


def check_installed(args: SettingFields) -> None:
    """Raise ValueError for a tracker or an optimiser that is not known or not installed.

    Called when ``TrainingArguments`` have settled what ``report_to`` and ``optim`` mean.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to: got {name!r}, wanted none, all, or some of {known}")
        if name != "flyte" and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: got {name!r}, which is not installed: pip install {name}, or none")
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        from transformers import Trainer

        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
        except ImportError as error:
            name = getattr(args.optim, "value", args.optim)
            raise ValueError(f"optim: got {name!r}, which is not installed: {error}") from None
        except ValueError:
            pass  # some want the model too, which is not there yet


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
