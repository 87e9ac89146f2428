"""One micro-batch whose loss has divergences over the whole vocabulary: from the reference, or a teacher.

The other models are not asked for log-probabilities but for what their heads see; all comes back from the
policy's forward pass, log-probabilities and divergences out of the same logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdpo.functional.kinds import (
    divergence_outputs,
    divergence_settings,
    needs_token_logps,
    teacher_combination,
)
from fastdpo.functional.preference import preference_loss_from_logps
from fastdpo.losses import build_objective
from fastdpo.training.batches.contents import Batch, completion_mask, packed_layout
from fastdpo.training.batches.forward import divergence_logps
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.types import DPOLossOutput, LinearLogprobOutput, PreferenceLossOutput


def divergence_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    num_pairs: Tensor | int,
    args: PreferenceConfig,
    reference: Reference,
) -> DPOLossOutput:
    """The loss of a batch of pairs (TDPO) as its share of the mean over ``num_pairs``; see ``batch_loss``.

    ``metrics`` has ``kl/chosen`` and ``kl/rejected`` in place of what looks at single tokens.
    """
    found = divergence_logps(model, batch, reference.teachers(policy, batch), ("forward_kl",))
    assert found.logps is not None
    per_pair = {"beta": args.beta, **{name: batch[name] for name in COLUMN_FIELDS if name in batch}}
    result = preference_loss_from_logps(
        LinearLogprobOutput(found.logps),
        completion_mask(batch),
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        ref_logps=found.ref_logps,
        forward_kl=found.forward_kl,
        row_weights=per_pair.pop("pair_weights", None),
        num_rows=num_pairs,
        layout=packed_layout(batch),
        **per_pair,
        **args.options,
    )
    assert result.ref_logps is not None and result.rewards is not None
    chosen_logps, rejected_logps = result.logps.chunk(2)
    ref_chosen_logps, ref_rejected_logps = result.ref_logps.chunk(2)
    chosen_rewards, rejected_rewards = result.rewards.chunk(2)
    return DPOLossOutput(
        loss=result.loss,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        metrics=result.metrics,
    )


def distillation_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    num_rows: Tensor | int,
    args: PreferenceConfig,
    reference: Reference,
) -> PreferenceLossOutput:
    """The loss of a batch of answers that distils a teacher, as its share of the mean over ``num_rows``."""
    objective = build_objective(args.loss_type, args.loss_weights, beta=args.beta, **args.options)
    names = divergence_outputs(objective)
    of_tokens = needs_token_logps(objective)
    settings = {"logps_requires_grad": of_tokens, **divergence_settings(objective)}
    teachers = reference.teachers(policy, batch, teacher_combination(objective), **settings)
    found = divergence_logps(model, batch, teachers, names)
    assert found.logps is not None
    return preference_loss_from_logps(
        LinearLogprobOutput(found.logps),
        completion_mask(batch),
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        beta=args.beta,
        ref_logps=found.ref_logps if of_tokens else None,
        row_weights=batch.get("pair_weights"),
        num_rows=num_rows,
        layout=packed_layout(batch),
        **{name: getattr(found, name) for name in names},
        **args.options,
    )
