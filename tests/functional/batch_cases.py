"""What the tests of `fused_dpo_loss` share: a small batch in both layouts, and the dense oracle for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.functional.pairs import fused_dpo_loss
from fastdpo.types import DPOLossOutput, PackedLayout

PAIRS, LENGTH, HIDDEN, VOCAB = 3, 12, 16, 53
SEQUENCE_LENGTHS = (12, 7, 9, 10, 12, 5)
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Three padded pairs of uneven length; the reference is near enough for margins of either sign."""

    hidden: Tensor  # (2P, T, H)
    weight: Tensor  # (V, H)
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor  # (2P, T), aligned with input ids
    is_real: Tensor  # (2P, T) bool, False on padding

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(torch.tensor([0, *torch.tensor(SEQUENCE_LENGTHS).cumsum(0).tolist()]))

    def packed(self, tensor: Tensor) -> Tensor:
        return tensor[self.is_real]

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()


def make_batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = draw(2 * PAIRS, LENGTH, HIDDEN), draw(VOCAB, HIDDEN) * (3 / HIDDEN**0.5)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    is_real = torch.arange(LENGTH) < torch.tensor(SEQUENCE_LENGTHS)[:, None]
    labels = labels.masked_fill(~is_real, IGNORED)
    labels[:, :2] = IGNORED  # the prompt
    labels[1, 4] = IGNORED  # a hole in an answer
    ref_hidden = hidden + 0.3 * draw(*hidden.shape)
    ref_weight = weight + 0.1 * draw(*weight.shape)
    return Batch(*(x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)), labels, is_real)


def dense_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(2P, T - 1)`` log-probabilities of the following tokens, from all the logits, and their mask."""
    logits = hidden[:, :-1] @ weight.T
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    following = labels[:, 1:]
    mask = following != IGNORED
    return log_probs.gather(-1, following.clamp(min=0)[..., None])[..., 0] * mask, mask


def dense_loss(
    batch: Batch, hidden: Tensor, weight: Tensor, name: str, *, beta: float = 0.3, eps: float = 0.0
) -> Tensor:
    """The loss pair by pair, from the definition, in the dtype of the tensors given."""
    token, mask = dense_token_logps(hidden, weight, batch.labels)
    ref, _ = dense_token_logps(batch.ref_hidden.to(hidden), batch.ref_weight.to(hidden), batch.labels)
    losses = []
    for w in range(PAIRS):
        r = w + PAIRS
        sums = [(token[i].sum(), ref[i].sum(), mask[i].sum().clamp(min=1)) for i in (w, r)]
        (s_w, f_w, n_w), (s_r, f_r, n_r) = sums
        if name in ("sigmoid", "robust"):
            m = beta * ((s_w - f_w) - (s_r - f_r))
        elif name == "simpo":
            m = beta * (s_w / n_w - s_r / n_r) - 0.5
        else:
            m = beta * ((s_w - f_w) / n_w - (s_r - f_r) / n_r)
        good, bad = -torch.nn.functional.logsigmoid(m), -torch.nn.functional.logsigmoid(-m)
        losses.append(
            {
                "robust": ((1 - eps) * good - eps * bad) / (1 - 2 * eps),
                "ipo": (m / beta - 1 / (2 * beta)) ** 2,
                "hinge": (1 - m).relu(),
            }.get(name, (1 - eps) * good + eps * bad)
        )
    if name == "sft":
        return -token[:PAIRS].sum() / mask[:PAIRS].sum()
    return torch.stack(losses).mean()


def run(
    batch: Batch, hidden: Tensor, weight: Tensor, *, packed: bool = False, **kwargs: Any
) -> DPOLossOutput:
    """`fused_dpo_loss` on a batch whose reference is computed from its hidden states."""
    names = kwargs.get("loss_type", "sigmoid")
    if names not in ("simpo", "sft"):
        ref_hidden = batch.packed(batch.ref_hidden) if packed else batch.ref_hidden
        kwargs = {"ref_hidden": ref_hidden, "ref_lm_head": batch.ref_weight} | kwargs
    if not packed:
        return fused_dpo_loss(hidden, weight, batch.labels, **kwargs)
    return fused_dpo_loss(
        batch.packed(hidden), weight, batch.packed(batch.labels), layout=batch.layout, **kwargs
    )
