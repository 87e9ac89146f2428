"""What losses with divergences need of the models beside the policy: a teacher, and one vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastdpo.integrations.engines import weight_shape
from fastdpo.integrations.lm_head import find_linear, unwrap
from fastdpo.integrations.model import ensure_patched
from fastdpo.training.settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


def prepare_teacher(args: PreferenceConfig, policy: nn.Module, given: nn.Module | None) -> nn.Module | None:
    """The model that the losses distil, frozen and patched; None where they distil none.

    Raises:
        ValueError: the losses distil a model and none is given, or the other way round, or it is the policy.
    """
    names = ", ".join(args.loss_type)
    if not args.needs_teacher:
        if given is not None:
            raise ValueError(f"teacher_model: got a model, but {names} distils none: wanted None")
        return None
    if given is None:
        raise ValueError(
            f"teacher_model: got None, wanted the model that {names} distils: one trained with DPO"
        )
    if given is policy:
        raise ValueError("teacher_model: got the model that is trained, wanted another")
    return ensure_patched(given.requires_grad_(False).eval(), args.execution())


def common_vocabulary(models: Sequence[nn.Module], tokenizer: Any) -> int | None:
    """How many rows of the models' heads count; None where all have as many.

    Checkpoints of one tokenizer are padded to different sizes; what lies behind its own tokens is padding.

    Raises:
        ValueError: the smallest head has fewer rows than the tokenizer has tokens, or there is no tokenizer.
    """
    sizes = [weight_shape(find_linear(unwrap(model)))[0] for model in models]
    if len(set(sizes)) == 1:
        return None
    known = None if tokenizer is None else len(tokenizer)
    if known is None or known > min(sizes):
        got = "no tokenizer" if known is None else f"a tokenizer of {known} tokens"
        raise ValueError(
            f"vocabulary: got heads of {', '.join(map(str, sizes))} rows and {got}, wanted one size, "
            "or such as have a row for each token at least: divergences are over one vocabulary"
        )
    logger.warning(
        "the models' heads have %s rows: divergences are over the first %d, which hold the tokenizer's %d",
        ", ".join(map(str, sizes)),
        min(sizes),
        known,
    )
    return min(sizes)
