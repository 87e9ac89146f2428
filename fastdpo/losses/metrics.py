"""What a training loop logs, under TRL's names and with its meaning, as detached device tensors.

Every value is ``()``. Means over pairs leave out pairs without a token, means over tokens take the
completion's tokens only; an empty mean is 0, but for ``unpaired_metrics``, where one side may be absent from
a batch that has the other: NaN there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdpo.losses.batches import DivergencePairLogps, ListLogps, UnpairedLogps
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.stable import masked_mean
from fastdpo.losses.token_batches import TokenDivergences


@torch.no_grad()
def pair_metrics(
    pair: PairLogps, rewards: tuple[Tensor, Tensor], logps: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """``rewards/*`` and ``logps/*``: means over the pairs.

    Args:
        pair: for the pairs that count.
        rewards, logps: of the chosen and of the rejected answers, ``(P,)`` each (``Objective.rewards`` and
            ``logged_logps``: sums per answer in nats, or per-token means where the loss compares these).
    """
    chosen_rewards, rejected_rewards = rewards
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return {name: masked_mean(value, pair.is_scored) for name, value in values.items()}


@torch.no_grad()
def divergence_metrics(pair: DivergencePairLogps) -> dict[str, Tensor]:
    """``kl/chosen``, ``kl/rejected``: the answer's sum of KL(reference || policy), a mean over the pairs."""
    kls = {"kl/chosen": pair.chosen_kl, "kl/rejected": pair.rejected_kl}
    return {name: masked_mean(kl, pair.is_scored) for name, kl in kls.items() if kl is not None}


@torch.no_grad()
def unpaired_metrics(answers: UnpairedLogps, rewards: Tensor) -> dict[str, Tensor]:
    """TRL's KTO metrics: means over the desirable (``chosen``) and the undesirable (``rejected``) answers.

    ``rewards/*`` and ``logps/*``; ``rewards/margins`` is the difference of the two means.

    A side without an answer has NaN for its ``rewards`` and ``logps``, and ``rewards/margins`` is NaN too: 0
    would look like a policy equal to its reference. Whoever averages over batches weighs each side's means by
    its number of answers, where none counts nothing, and takes the margins of the averages (the loop does).
    """
    scored = answers.is_scored
    sides = {"chosen": scored & answers.is_desirable, "rejected": scored & ~answers.is_desirable}
    metrics = {}
    for name, values in (("rewards", rewards), ("logps", answers.logps)):
        for side, mask in sides.items():
            metrics[f"{name}/{side}"] = masked_mean(values, mask).where(mask.any(), torch.nan)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


@torch.no_grad()
def distillation_metrics(tokens: TokenDivergences) -> dict[str, Tensor]:
    """``kl/teacher``: the answers' mean of their tokens' sums of KL(policy || teacher), in nats.

    Of a teacher made of two, ``teachers/l1_distance`` too: the tokens' mean of what sets them apart.
    """
    metrics = {"kl/teacher": masked_mean(tokens.sums(tokens.divergences), tokens.is_scored)}
    if tokens.l1_distance is not None:
        metrics["teachers/l1_distance"] = masked_mean(tokens.l1_distance, tokens.mask)
    return metrics


@torch.no_grad()
def list_metrics(lists: ListLogps, rewards: Tensor) -> dict[str, Tensor]:
    """Means over the groups: ``rewards/`` ``best``, ``others``, ``margins`` and ``accuracies``.

    The best candidate is the one with the highest score, the first of equals; without scores the first.
    ``accuracies``: its reward is above every other's; groups of one count nowhere.
    """
    mask = lists.mask
    dense = lists.dense(rewards)
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if lists.scores is None:
        best = (place == 0) & mask
    else:
        scores = lists.dense_scores
        lowest = torch.finfo(scores.dtype).min
        is_highest = mask & (scores == scores.where(mask, lowest).amax(-1, keepdim=True))
        best = is_highest & (is_highest.cumsum(-1) == 1)
    others = mask & ~best
    counts = others.sum(-1)
    reward = dense.where(best, 0).sum(-1)
    mean = dense.where(others, 0).sum(-1) / counts.clamp(min=1)
    lower = ((reward.unsqueeze(-1) > dense) | ~others).all(-1).to(dense.dtype)
    counted = lists.is_scored & (counts > 0)
    values = {"best": reward, "others": mean, "margins": reward - mean, "accuracies": lower}
    return {f"rewards/{name}": masked_mean(value, counted) for name, value in values.items()}


@torch.no_grad()
def token_metrics(
    pair: PairLogps,
    sums: Callable[[Tensor], Tensor],
    *,
    entropy: Tensor | None = None,
    mean_logit: Tensor | None = None,
    is_top1: Tensor | None = None,
) -> dict[str, Tensor]:
    """``num_tokens``, and a mean over tokens for each statistic given.

    Args:
        pair: for the token counts.
        sums: per-token values -> ``(2, P)`` sums over each answer's tokens, chosen first.
        entropy, mean_logit, is_top1: per token; None leaves the metric out.

    Returns:
        ``num_tokens``: completion tokens of this batch, chosen and rejected; ``entropy``: nats, over both;
        ``logits/chosen``, ``logits/rejected``: the vocabulary's mean logit; ``mean_token_accuracy``: the
        share of chosen tokens that are the model's first choice.
    """
    chosen_tokens, rejected_tokens = pair.chosen_tokens.sum(), pair.rejected_tokens.sum()
    metrics = {"num_tokens": chosen_tokens + rejected_tokens}

    def mean(values: Tensor, count: Tensor) -> Tensor:
        return values.sum() / count.clamp(min=1)

    if entropy is not None:
        metrics["entropy"] = mean(sums(entropy), metrics["num_tokens"])
    if mean_logit is not None:
        chosen, rejected = sums(mean_logit)
        metrics["logits/chosen"] = mean(chosen, chosen_tokens)
        metrics["logits/rejected"] = mean(rejected, rejected_tokens)
    if is_top1 is not None:
        chosen, _ = sums(is_top1.to(pair.chosen.dtype))
        metrics["mean_token_accuracy"] = mean(chosen, chosen_tokens)
    return metrics
