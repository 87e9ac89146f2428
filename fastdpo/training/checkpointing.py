"""Activation checkpointing, which transformers 5.23 gave another name."""

from __future__ import annotations

from fastdpo.training.config import PreferenceConfig


def recomputes_activations(args: PreferenceConfig) -> bool:
    """Whether layers run again in the backward pass."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
