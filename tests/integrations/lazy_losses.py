"""Loss functions in the shapes that trainers have them, written anew, and what runs one on lazy logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo import patch_model
from fastdpo.integrations import lazy_values
from fastdpo.integrations.lazy import LazyLogits
from fastdpo.testing import assert_close_to_fp64
from tests.integrations.tiny import Batch, make_batch

LARGE = make_batch(4, 24, seed=3)
Loss = Callable[[Tensor, Tensor], Tensor]


def dpo_repository(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax, gather, a mask that multiplies; labels written to in between."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    mask = labels != -100
    labels[labels == -100] = 0
    picked = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (picked * mask).sum(-1)


def average_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The mask by its complement, in place, and an average."""
    mask = labels[:, 1:] == -100
    targets = labels[:, 1:].masked_fill(mask, 0)
    per_token = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, targets[..., None])[..., 0]
    per_token[mask] = 0
    return per_token.sum(-1) / (~mask).sum(-1)


def selective_by_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """gather minus logsumexp, of one sequence after the other."""
    targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    logits = logits[:, :-1]
    picked = torch.gather(logits, dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)
    lse = torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
    return torch.where(mask, picked - lse, 0.0).sum(-1)


def selective_in_16_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """A log-softmax of each sequence on its own, rolled labels, a division by the temperature."""
    targets = labels.roll(shifts=-1, dims=1)
    mask = targets != -100
    mask[:, -1] = False
    logits = (logits / 0.7).to(torch.float32)
    found = []
    for row, row_targets in zip(logits, targets.where(mask, 0), strict=True):
        row_logps = F.log_softmax(row, dim=-1)
        found.append(row_logps.gather(dim=-1, index=row_targets.unsqueeze(-1)).squeeze(-1))
    return torch.stack(found).masked_fill(~mask, 0.0).sum(-1)


def tempered_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """The temperature divides the logits in place, flat rows, a float mask and a mean over it."""
    logits.div_(0.9)
    rows = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
    targets = labels[..., 1:].contiguous().view(-1)
    weight = (targets != -100).float()
    lse = rows.logsumexp(-1, keepdim=True)
    picked = (rows.gather(-1, targets.clamp(min=0)[:, None]) - lse).squeeze(-1)
    return (picked * weight).sum() / weight.sum()


def shifted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def cross_entropy_of_chosen(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the batch, rows by a bool index, another ignored index, weights of the classes, a sum."""
    half = len(labels) // 2
    labels, logits = labels[:half, 1:], logits[:half][:, :-1]
    chosen = labels != -100
    weight = torch.linspace(0.5, 1.5, logits.shape[-1], dtype=logits.dtype)
    ignored = int(labels[chosen][0])
    return F.cross_entropy(logits[chosen], labels[chosen], weight, ignore_index=ignored, reduction="sum")


def nll_of_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax(logits[:, :-1].flatten(0, 1), 1)
    return F.nll_loss(logps, labels[:, 1:].flatten(), reduction="none").mean()


def classes_second(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over (B, V, T)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(-1)


def picked_by_index(logits: Tensor, labels: Tensor) -> Tensor:
    """``x[rows, labels]``, a negated log-probability, an index of rows that count."""
    targets = labels[:, 1:].reshape(-1)
    counts = (targets != -100).nonzero().squeeze(-1)
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])[counts]
    return -rows.log_softmax(-1)[torch.arange(len(counts)), targets[counts]].mean()


LOSSES: list[Loss] = [
    *(dpo_repository, average_logps, selective_by_rows, selective_in_16_bits, tempered_in_place),
    *(shifted_cross_entropy, cross_entropy_of_chosen, nll_of_log_softmax, classes_second, picked_by_index),
]


def entropy_of_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    logps = F.log_softmax(logits, dim=-1)
    entropy = -(torch.exp(logps) * logps).sum(-1)
    return (entropy * (labels != -100)).sum() / (labels != -100).sum()


def entropy_of_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    probs = torch.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)
    return entropy[labels != -100].mean()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, labels[:, 1:].reshape(-1), label_smoothing=0.1)


def label_smoother(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers' trainer smooths labels, by the sum of all log-probabilities."""
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    negative = -F.log_softmax(logits, dim=-1)
    mask = labels.unsqueeze(-1).eq(-100)
    labels = labels.unsqueeze(-1).clamp(min=0)
    nll = negative.gather(dim=-1, index=labels)
    smoothed = negative.sum(dim=-1, keepdim=True, dtype=torch.promote_types(logits.dtype, torch.float32))
    nll.masked_fill_(mask, 0.0)
    smoothed.masked_fill_(mask, 0.0)
    count = (~mask).sum()
    return 0.9 * nll.sum() / count + 0.1 * smoothed.sum() / (count * logits.shape[-1])


def concatenated_forward(logits: Tensor, labels: Tensor) -> Tensor:
    """A step around its log-probabilities: a metric, weights without a gradient, a loss of the chosen."""
    half = len(labels) // 2
    targets = torch.roll(labels, shifts=-1, dims=1)
    mask = targets != -100
    mask[:, -1] = False
    targets[~mask] = 0
    picked = torch.gather(logits, dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)
    per_token = picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    per_token[~mask] = 0
    per_token = torch.roll(per_token, shifts=1, dims=1)
    with torch.no_grad():
        logprobs = F.log_softmax(logits, dim=-1)
        lowered = torch.roll(per_token, -1, 1) - torch.logsumexp(2 * logprobs, dim=-1)
        weights = torch.exp((lowered * mask).sum(-1) / mask.sum(-1)).clamp(max=1)
    chosen = F.cross_entropy(
        torch.flatten(logits[:half], end_dim=1), torch.flatten(targets[:half], end_dim=1), ignore_index=0
    )
    metric = logits[:half][mask[:half]].mean().detach()
    return per_token[:, 1:].sum(-1) * weights + 0.1 * chosen + metric


def mean_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[labels != -100].mean() + logits.mean(-1).sum()


def largest_logit(logits: Tensor, labels: Tensor) -> Tensor:
    values, places = logits.max(dim=-1)
    return values[labels != -100].sum() + (places != labels).sum() + (logits.argmax(-1) == labels).sum()


STATISTICS: list[Loss] = [
    *(
        entropy_of_log_softmax,
        entropy_of_softmax,
        smoothed_cross_entropy,
        label_smoother,
        mean_logit,
        largest_logit,
    ),
]


class Result(NamedTuple):
    value: Tensor
    grads: dict[str, Tensor]


def run_loss(
    model: Any, loss: Loss, batch: Batch = LARGE, call: Callable[..., Any] | None = None, **inputs: Any
) -> Result:
    """A loss of the logits of a model and its gradients, whatever the model gives for logits."""
    model.zero_grad(set_to_none=True)
    output = (call or model)(**{**batch.inputs, **inputs})
    value = loss(output.logits, batch.labels)
    assert type(value) is Tensor
    value.sum().backward()
    return Result(
        value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    )


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that something but fastdpo's own ops makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result) if func.namespace != "fastdpo" else []:
            if isinstance(leaf, Tensor) and not isinstance(leaf, LazyLogits) and not leaf.is_meta:
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


class Rows:
    """Counts the rows that the fused op is given for lazy tensors."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        own = lazy_values.linear_logprob

        def counted(hidden: Tensor, head: Any, layout: Any, **options: Any) -> Any:
            self.count += layout.token_index.numel()
            return own(hidden, head, layout, **options)

        patch.setattr(lazy_values, "linear_logprob", counted)


def lazy_model(model: Any, **options: Any) -> Any:
    return patch_model(copy.deepcopy(model), **{"logits": "lazy", "on_materialize": "error", **options})


def assert_like_real(ours: Result, real: Result, truth: Result) -> None:
    """By the rule; values of one sequence each."""
    values = ours.value.reshape(-1), truth.value.reshape(-1).double(), real.value.reshape(-1)
    assert_close_to_fp64(*values)
    assert ours.grads.keys() == real.grads.keys()
    for name, own in real.grads.items():
        assert_close_to_fp64(ours.grads[name], truth.grads[name].double(), own, name=name)
