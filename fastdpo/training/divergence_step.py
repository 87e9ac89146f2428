"""One micro-batch of pairs whose loss has divergences from the reference over the whole vocabulary (TDPO).

The reference is not asked for log-probabilities but for what its head sees; both models' come back from the
policy's forward pass, together with the divergence, out of the same logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdpo.preference_loss import preference_loss_from_logps
from fastdpo.training.batches import Batch, completion_mask, packed_layout
from fastdpo.training.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.training.reference import Reference
from fastdpo.training.scoring import divergence_logps
from fastdpo.types import DPOLossOutput, LinearLogprobOutput


def divergence_loss(
    model: nn.Module,
    policy: nn.Module,
    batch: Batch,
    num_pairs: Tensor | int,
    args: PreferenceConfig,
    reference: Reference,
) -> DPOLossOutput:
    """The loss of a batch as its share of the mean over ``num_pairs``; the rest as of ``pair_loss``.

    ``metrics`` has ``kl/chosen`` and ``kl/rejected`` in place of what looks at single tokens.
    """
    states = reference.states(policy, batch)
    found = divergence_logps(model, batch, states)
    assert found.logps is not None
    per_pair = {name: batch[name] for name in COLUMN_FIELDS if name in batch}
    result = preference_loss_from_logps(
        LinearLogprobOutput(found.logps),
        completion_mask(batch),
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        ref_logps=found.ref_logps,
        forward_kl=found.forward_kl,
        beta=args.beta,
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
