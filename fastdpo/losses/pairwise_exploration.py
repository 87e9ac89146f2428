"""A pairwise loss that explores: the answer that the reference gave becomes less likely."""

from __future__ import annotations

import torch

from fastdpo.losses.heads import logistic
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import NonNegative
from fastdpo.losses.registry import Example, preference_loss
from fastdpo.losses.terms import exploration_bonus


@preference_loss(
    "xpo",
    paper="arXiv:2405.21046 alg. 1",
    needs=("chosen_is_reference",),
    shift_invariant=True,
    # h = 0.1 (2 - 2) = 0; ln 2 + 0.01 s(y_w)
    example=Example(
        0.5731471805599453,
        chosen=-12.0,
        rejected=-15.0,
        ref_chosen=-14.0,
        ref_rejected=-17.0,
        chosen_tokens=2,
        rejected_tokens=4,
        options={"chosen_is_reference": 1.0, "exploration_weight": 0.01},
    ),
)
def xpo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.1,
    chosen_is_reference: PerPair | None = None,
    exploration_weight: NonNegative = 1e-5,
) -> torch.Tensor:
    """XPO: DPO's loss plus exploration_weight times the log-probability of the reference's own answer.

    ``chosen_is_reference`` is 1 where the chosen answer was sampled from the reference, 0 where the rejected
    one was; the other is the policy's. The paper leaves alpha open; 1e-5 is TRL's.
    """
    if chosen_is_reference is None:
        raise ValueError("chosen_is_reference: got None, wanted which answer the reference gave")
    like = pair.chosen
    is_chosen = torch.as_tensor(chosen_is_reference, dtype=like.dtype, device=like.device).expand_as(like)
    return logistic(beta * pair.delta) + exploration_weight * exploration_bonus(pair, is_chosen > 0.5)
