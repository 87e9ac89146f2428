"""Activation checkpointing, which transformers 5.23 gave another name."""

from __future__ import annotations

from fastdpo.training.settings.fields import SettingFields


def recomputes_activations(args: SettingFields) -> bool:
    """Whether layers run again in the backward pass."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
