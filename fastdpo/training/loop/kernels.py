"""Others' kernels for the backbone: Liger's, and what `fastdpo doctor` says of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdpo.training.settings.config import PreferenceConfig


def use_liger(args: PreferenceConfig, *models: nn.Module | None) -> None:
    """Put Liger's kernels into backbones where the settings ask for them; heads and losses stay ours.

    Into all models of a run, or policy and reference would not be equal where their weights are. Before they
    are patched: Liger looks at classes.
    """
    if not args.use_liger_kernel:
        return
    from transformers.integrations.liger import apply_liger_kernel

    config: Any = args.liger_kernel_config
    for model in models:
        if model is not None:
            apply_liger_kernel(model, config)
