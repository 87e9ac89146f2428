"""Pairwise losses that hold each answer to a point of its own, not only to the other answer.

u is an answer's log-ratio to the reference, which is therefore no longer free up to a constant.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.heads import logistic, rank_hinge, regress, unlikelihood
from fastdpo.losses.inputs import PairLogps, PerPair
from fastdpo.losses.ranges import NonNegative
from fastdpo.losses.registry import Example, preference_loss
from fastdpo.losses.stable import token_mean
from fastdpo.losses.terms import anchor

# u_w = 1 and u_l = -1, over 2 and 4 tokens: beta u is 0.1 and -0.1 at beta 0.1.
_PAIR = Example(
    0.0,
    chosen=-12.0,
    rejected=-15.0,
    ref_chosen=-13.0,
    ref_rejected=-14.0,
    chosen_tokens=2,
    rejected_tokens=4,
)


@preference_loss(
    "nca_pair",
    paper="arXiv:2402.05369",
    # log(1 + e^-0.1) + log(1 + e^0.1) / 2 + log(1 + e^-0.1) / 2
    example=replace(_PAIR, loss=1.3387933201),
)
def nca_pair_loss(pair: PairLogps, *, beta: PerPair = 0.1) -> Tensor:
    """NCA with two answers: raises the chosen's own likelihood ratio, to sigmoid(beta u_w) = 2/3.

    -ls(beta u_w) - ls(-beta u_w) / 2 - ls(-beta u_l) / 2. The paper uses beta 0.01.
    """
    chosen, rejected = beta * pair.chosen_logratios, beta * pair.rejected_logratios
    return logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)


@preference_loss(
    "bco_pair",
    paper="arXiv:2404.04656 (TRL's and Liger's form, without the reward shift)",
    example=replace(_PAIR, loss=1.2887933201),  # 2 log(1 + e^-0.1)
)
def bco_pair_loss(pair: PairLogps, *, beta: PerPair = 0.1) -> Tensor:
    """BCO on pairs: both answers classified, -ls(beta u_w) - ls(-beta u_l); an upper bound of DPO's loss.

    The paper uses beta 0.01. With the running reward shift it is the unpaired ``bco``.
    """
    return logistic(beta * pair.chosen_logratios) + logistic(-beta * pair.rejected_logratios)


@preference_loss(
    "sppo_hard",
    paper="arXiv:2405.00675 eq. 4.7",
    example=replace(_PAIR, loss=32.0, options={"beta": 0.1}),  # (1 - 5)^2 + (-1 + 5)^2
)
def sppo_hard_loss(pair: PairLogps, *, beta: PerPair = 0.001) -> Tensor:
    """SPPO with hard labels: u_w regressed on 1 / (2 beta), u_l on -1 / (2 beta); sum of the squares.

    beta is the paper's 1 / eta, about 1e-3. TRL's default of 0.1 is its DPO's.
    """
    return regress(pair.chosen_logratios, 0.5 / beta) + regress(pair.rejected_logratios, -0.5 / beta)


@preference_loss(
    "sppo",
    paper="arXiv:2405.00675 alg. 1",
    # q = 0.8: ((1 - 3)^2 + (-1 + 3)^2) / 2
    example=replace(_PAIR, loss=4.0, options={"beta": 0.1, "soft_labels": 0.8}),
)
def sppo_loss(
    pair: PairLogps,
    *,
    beta: PerPair = 0.001,
    soft_labels: PerPair | None = None,
    chosen_win_rate: PerPair | None = None,
    rejected_win_rate: PerPair | None = None,
) -> Tensor:
    """SPPO with win rates: u regressed on (P - 1/2) / beta for each answer; mean of the squares.

    P is ``chosen_win_rate`` and ``rejected_win_rate``, each answer against samples of the policy (or the
    fields of ``PairLogps`` of these names). Without them q and 1 - q of ``soft_labels`` (the authors'
    ``sppo_single``), without these 1 and 0, which is half of ``sppo_hard``.

    Raises:
        ValueError: one win rate without the other, given twice, or both beside ``soft_labels``.
    """
    chosen: PerPair | None = pair.chosen_win_rate
    rejected: PerPair | None = pair.rejected_win_rate
    if chosen_win_rate is not None or rejected_win_rate is not None:
        if chosen is not None or rejected is not None:
            raise ValueError("chosen_win_rate: got a value beside the PairLogps' own, wanted one of the two")
        chosen, rejected = chosen_win_rate, rejected_win_rate
    if (chosen is None) != (rejected is None):
        raise ValueError("rejected_win_rate and chosen_win_rate: got one of the two, wanted both or neither")
    if chosen is not None and soft_labels is not None:
        raise ValueError("soft_labels: got a value together with win rates, wanted one of the two")
    preferred = 1.0 if soft_labels is None else soft_labels
    win: PerPair = preferred if chosen is None else chosen
    lose: PerPair = 1.0 - preferred if rejected is None else rejected
    return regress(pair.chosen_logratios, (win - 0.5) / beta, 0.5) + regress(
        pair.rejected_logratios, (lose - 0.5) / beta, 0.5
    )


@preference_loss(
    "cal_dpo",
    paper="arXiv:2412.14516 (the authors' code)",
    # D = 2, targets 2 and -2: log(1 + e^-2) + (1 + 1) / 2
    example=replace(_PAIR, loss=1.1269280110, options={"beta": 0.25}),
)
def cal_dpo_loss(pair: PairLogps, *, beta: PerPair = 0.001, calibration_weight: NonNegative = 0.5) -> Tensor:
    """Calibrated DPO (Cal-DPO): DPO, and each log-ratio regressed on 1 / (2 beta) or minus that.

    -log sigmoid(u_w - u_l) + calibration_weight ((u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2). There is
    no beta in the first part, and the authors' code halves the second, in their script with beta 0.001.
    """
    squares = regress(pair.chosen_logratios, 0.5 / beta) + regress(pair.rejected_logratios, -0.5 / beta)
    return logistic(pair.delta) + calibration_weight * squares


@preference_loss(
    "apo_zero",
    paper="arXiv:2408.06266 eq. 7",
    example=replace(_PAIR, loss=0.9500416250),  # 2 sigmoid(-0.1)
)
def apo_zero_loss(pair: PairLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Anchored preference optimisation, zero: chosen up, rejected down; for chosen better than the model's.

    (1 - sigmoid(beta u_w)) + sigmoid(beta u_l).
    """
    return unlikelihood(beta * pair.chosen_logratios) + unlikelihood(-beta * pair.rejected_logratios)


@preference_loss(
    "apo_down",
    paper="arXiv:2408.06266 eq. 8",
    example=replace(_PAIR, loss=0.9751451902),  # sigmoid(0.1) + sigmoid(-0.2)
)
def apo_down_loss(pair: PairLogps, *, beta: PerPair = 0.1) -> Tensor:
    """Anchored preference optimisation, down: both down, rejected more; for chosen worse than the model's.

    sigmoid(beta u_w) + (1 - sigmoid(beta (u_w - u_l))).
    """
    return torch.sigmoid(beta * pair.chosen_logratios) + unlikelihood(beta * pair.delta)


@preference_loss(
    "mdpo_anchor",
    paper="arXiv:2406.11839 sec. 3",
    example=replace(_PAIR, loss=0.6443966600),  # -log sigmoid(0.1)
)
def mdpo_anchor_loss(pair: PairLogps, *, beta: PerPair = 0.1, delta: float = 0.0) -> Tensor:
    """mDPO's anchor, beside another loss: the chosen answer's reward is held above delta.

    -log sigmoid(beta u_w - delta). mDPO's three terms are ``sigmoid`` with weight 2 and this with weight 1,
    as means over each row's text pair and its image-conditional one, which have the same chosen answer.
    """
    return anchor(pair.chosen_logratios, beta=beta, delta=delta)


@preference_loss(
    "slic_smooth_ref",
    paper="arXiv:2410.11677 sec. 3.1",
    length_normalized=True,
    # means -6 and -3.75, mean u_w = 0.5: relu(1 + 2.25) + 0.1 log(1 + e^0.5)
    example=replace(_PAIR, loss=3.3474076984),
)
def slic_smooth_ref_loss(
    pair: PairLogps,
    *,
    margin: PerPair | None = None,
    delta: NonNegative = 1.0,
    regularizer: NonNegative = 0.1,
) -> Tensor:
    """SLiC on per-token means, with a soft floor under the chosen answer's log-ratio as regulariser.

    relu(delta - (mean_w - mean_l)) + regularizer * softplus(1 - u_w / |y_w|). ``margin`` adds to ``delta``.
    """
    chosen, rejected = (
        token_mean(pair.chosen, pair.chosen_tokens),
        token_mean(pair.rejected, pair.rejected_tokens),
    )
    floor = F.softplus(1 - token_mean(pair.chosen_logratios, pair.chosen_tokens))
    return rank_hinge(chosen, rejected, delta if margin is None else delta + margin) + regularizer * floor
