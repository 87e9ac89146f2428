"""What ``fastdpo train --help`` shows: what most runs take, and the losses; ``--help-all``: all settings."""

from __future__ import annotations

import contextlib
import re
import textwrap

from transformers import TrainingArguments

from fastdpo.losses import LOSSES
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.data_fields import DataSettings
from fastdpo.training.settings.kinds import KINDS, kind_of
from fastdpo.training.settings.losses import all_loss_options

# By what they are about; a test counts them.
COMMON = {
    "What is trained": (
        "model", "tokenizer", "ref_model", "reference", "dtype", "attn_implementation", "output_dir",
    ),
    "On what": ("dataset", "eval_dataset", "held_out", "max_length", "truncation_mode", "on_bad_row"),
    "The loss": ("loss_type", "beta", "label_smoothing"),
    "An adapter": (
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit",
    ),
    "The steps": (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "num_train_epochs",
        "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    ),
    "Memory and time": ("bf16", "gradient_checkpointing", "batch_layout", "engine"),
    "On the way": ("logging_steps", "eval_strategy", "save_steps", "resume_from_checkpoint"),
}  # fmt: skip


def section_of(kind: type | None, name: str, shows_all: bool) -> str | None:
    """The section of a setting's line, or None where the page does not show it.

    Args:
        kind: the dataclass that has it; None for an option of a loss.
    """
    if not shows_all:
        return next((title for title, names in COMMON.items() if name in names), None)
    if kind is None or name in all_loss_options():
        return "Options of the losses"
    if name in TrainingArguments.__dataclass_fields__ and issubclass(kind, TrainingArguments):
        return "Of transformers' TrainingArguments"
    if name in DataSettings.__dataclass_fields__ and issubclass(kind, DataSettings):
        return _first_line(DataSettings)
    return "Losses, batches, reference and kernels" if kind is PreferenceConfig else _first_line(kind)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").split("\n", 1)[0].rstrip(".")


def first_sentence(text: str) -> str:
    """A setting's text up to its first full stop."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def loss_listing() -> str:
    """The losses that the loop trains with, by the rows that they take."""
    lines = ["Losses, by the rows that they take:"]
    by_kind: dict[str, list[str]] = {}
    for name, spec in sorted(LOSSES.items()):
        with contextlib.suppress(ValueError):  # of rows that the loop has none of
            by_kind.setdefault(kind_of([spec]).name, []).append(name)
    for kind in KINDS.values():
        text = f"{kind.name} ({', '.join(kind.columns)}): {', '.join(by_kind[kind.name])}"
        lines.append(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(
        [*lines, "", "`fastdpo train --help-all` shows all settings, docs/methods.md the methods."]
    )
