"""Padded pairs with a reference, their loss in any mode, and the same from all the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LMHead, fused_dpo_loss
from fastdpo.functional.pairs import dpo_loss_from_logps, shift_labels
from fastdpo.losses import LOSSES
from fastdpo.plan import call as plan
from fastdpo.plan import schedule
from fastdpo.testing import assert_close_to_fp64
from fastdpo.types import DPOLossOutput, LinearLogprobOutput

IGNORED = -100
VOCAB, HIDDEN = 257, 24
SMALL = Execution(workspace_mib=1, cache_mib=1)
# (chosen, rejected) labelled tokens: pairs shorter and longer than a group, an empty answer, an empty pair.
LENGTHS = ((2, 3), (1, 1), (5, 6), (0, 4), (0, 0), (2, 1), (9, 12), (1, 2))


@dataclass(frozen=True, eq=False)
class Pairs:
    hidden: Tensor  # (2P, T, H)
    head: LMHead
    ref_hidden: Tensor
    labels: Tensor  # (2P, T), aligned with the input ids
    num_tokens: int

    def leaves(self) -> tuple[Tensor, LMHead]:
        bias = self.head.bias
        head = LMHead(
            self.head.weight.clone().requires_grad_(),
            bias=None if bias is None else bias.clone().requires_grad_(),
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
        )
        return self.hidden.clone().requires_grad_(), head


def make_pairs(
    dtype: torch.dtype = torch.float32,
    lengths: tuple[tuple[int, int], ...] = LENGTHS,
    *,
    vocab: int = VOCAB,
    **head: Any,
) -> Pairs:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    longest = max(map(max, lengths)) + 3
    num_pairs = len(lengths)
    labels = torch.randint(vocab, (2 * num_pairs, longest), generator=generator)
    for pair, (chosen, rejected) in enumerate(lengths):
        for row, length in ((pair, chosen), (pair + num_pairs, rejected)):
            labels[row, : 1 + pair % 2] = IGNORED  # a prompt
            labels[row, 1 + pair % 2 + length :] = IGNORED
    hidden = draw(2 * num_pairs, longest, HIDDEN).to(dtype)
    weight = (draw(vocab, HIDDEN) * (3 / HIDDEN**0.5)).to(dtype)
    if head.pop("has_bias", False):
        head["bias"] = draw(vocab).to(dtype)
    ref_hidden = (hidden + 0.3 * draw(*hidden.shape)).to(dtype)
    tokens = sum(map(sum, lengths))
    return Pairs(hidden, LMHead(weight, **head), ref_hidden, labels, tokens)


def run(pairs: Pairs, hidden: Tensor, head: LMHead, execution: Execution, **kwargs: Any) -> DPOLossOutput:
    names = kwargs.get("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else names
    if any(LOSSES[name].uses_reference for name in names) and "ref_logps" not in kwargs:
        kwargs.setdefault("ref_hidden", pairs.ref_hidden)
    return fused_dpo_loss(hidden, head, pairs.labels, execution=execution, **kwargs)


def gradients(pairs: Pairs, execution: Execution, **kwargs: Any) -> tuple[DPOLossOutput, list[Tensor]]:
    hidden, head = pairs.leaves()
    out = run(pairs, hidden, head, execution, **kwargs)
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    return out, list(torch.autograd.grad(out.loss, leaves))


def mode(name: str, base: Execution = SMALL) -> Execution:
    return Execution(mode=name, workspace_mib=base.workspace_mib, cache_mib=base.cache_mib)


def dense(pairs: Pairs, dtype: torch.dtype, **kwargs: Any) -> tuple[DPOLossOutput, list[Tensor]]:
    """The same from all the logits, by plain torch in ``dtype``: the truth, or eager's error."""
    head = pairs.head
    hidden = pairs.hidden.to(dtype, copy=True).requires_grad_()
    weight = head.weight.to(dtype, copy=True).requires_grad_()
    bias = None if head.bias is None else head.bias.to(dtype, copy=True).requires_grad_()
    targets = shift_labels(pairs.labels)
    mask = targets != IGNORED

    def token_logps(states: Tensor) -> Tensor:
        logits = states @ weight.T if bias is None else states @ weight.T + bias
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * (logits / head.softcap).tanh()
        log_probs = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
        return log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask

    names = kwargs.get("loss_type", "sigmoid")
    if LOSSES[names].uses_reference:
        with torch.no_grad():
            kwargs["ref_logps"] = token_logps(pairs.ref_hidden.to(dtype))
    out = dpo_loss_from_logps(LinearLogprobOutput(token_logps(hidden)), mask, **kwargs)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return out, list(torch.autograd.grad(out.loss, leaves))


def assert_gradients(pairs: Pairs, got: list[Tensor], factor: float = 1.0, **kwargs: Any) -> None:
    """The tolerance rule for each gradient, against dense fp64 and in units of dense eager's error."""
    _, want = dense(pairs, torch.float64, **kwargs)
    _, eager = dense(pairs, pairs.hidden.dtype, **kwargs)
    for ours, fp64, plain in zip(got, want, eager, strict=True):
        shape = (-1, ours.shape[-1]) if ours.dim() > 1 else (-1,)
        assert_close_to_fp64(*(value.reshape(shape) for value in (ours, factor * fp64, factor * plain)))


TINY_MIB = 8 * 320 * 4  # bytes: with budgets of one such "MiB" a chunk holds 8 rows of logits, a group of D 9


@pytest.fixture
def tiny_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and groups of a small vocabulary, whose sums fp32 products get right to the last bits."""
    for module in (schedule, plan):
        monkeypatch.setattr(module, "MIB", TINY_MIB)
