"""A head whose vocabulary is split over ranks: each makes the logits of its own rows of W.

Hidden states and labels are the same on all ranks. With lse_r, and z_y of the rank that has the label,

    lse = logsumexp_r lse_r        logp = sum_r z_y - lse

so one exchange of a few numbers a token joins them. Backward, exp(lse_r - lse) of a gradient of lse reaches
lse_r, and the op's own formula, (g - g_lse) D + g_lse cf_y onehot, gives each rank its dW and its part of
dhidden, which is summed over the ranks. Nothing here computes a logit or its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.ops.checks import fail
from fastdpo.ops.library import raise_on_bad_labels
from fastdpo.ops.shard_rows import all_rows, all_tokens, own_tokens, rank_rows
from fastdpo.types import TOPK_STATISTICS, HeadAdapter, LinearLogprobOutput, LMHead, VocabShard

Logprob = Callable[..., tuple[LinearLogprobOutput, Tensor | None]]


def sharded_logprob(
    local_logprob: Logprob,
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    token_index: Tensor | None,
    index_kind: str,
    *,
    ref_hidden: Tensor | None,
    ignore_index: int,
    wanted: tuple[str, ...],
    entropy_requires_grad: bool,
    check_labels: bool,
    **options: Any,
) -> tuple[LinearLogprobOutput, Tensor | None]:
    """``indexed_logprob`` of a head that is a shard; all ranks of its group call it, and get the same bits.

    Of ranks with rows of their own each gets the results of these.

    Args:
        local_logprob: ``indexed_logprob``, of a head that is whole.

    Raises:
        ValueError: top-k statistics, which no exchange of a few numbers gives; an adapter with dropout; with
            ``check_labels`` other labels on some rank than on another.
    """
    shard = head.vocab_parallel
    assert isinstance(shard, VocabShard)
    if refused := [name for name in wanted if name in TOPK_STATISTICS]:
        raise fail("outputs", ", ".join(refused), "none of the k most likely tokens with vocab_parallel")
    targets, hidden = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if index_kind == "found":
        index = (targets != ignore_index).nonzero().squeeze(1)
    else:
        assert token_index is not None
        index = token_index
    if index_kind in ("found", "given"):
        targets = targets.index_select(0, index)
    local = _own_head(head, shard)
    everyones = _Everyones(targets, index, index_kind, shard) if shard.has_own_rows else None
    if check_labels and everyones is not None:
        raise_on_bad_labels(everyones.targets, everyones.places, shard.vocab_size)
    elif check_labels:
        raise_on_bad_labels(targets, index, shard.vocab_size)
        _check_alike(targets, shard)

    def score(states: Tensor, names: tuple[str, ...], **how: Any) -> LinearLogprobOutput:
        if everyones is not None:
            of_all = (everyones.rows(states), local, everyones.targets, everyones.places, everyones.kind)
            return everyones.own(_joined(local_logprob, *of_all, shard, names, **how))
        rows, places, kind = summed_rows(states, index, index_kind, shard)
        return _joined(local_logprob, rows, local, targets, places, kind, shard, names, **how)

    found = score(hidden, wanted, entropy_requires_grad=entropy_requires_grad, **options)
    ref_logps = None
    if ref_hidden is not None:
        with torch.no_grad():
            how = {**options, "entropy_requires_grad": False, "grad_weight_out": None}
            ref_logps = score(ref_hidden.reshape(-1, ref_hidden.shape[-1]), (), **how).logps

    def full(value: Tensor | None) -> Tensor | None:
        if value is None or index_kind in ("tokens", "repeated"):
            return value
        return value.new_zeros(labels.numel()).index_copy(0, index, value).view(labels.shape)

    return LinearLogprobOutput(*map(full, found)), full(ref_logps)  # type: ignore[arg-type]


class _Everyones:
    """The labelled tokens of all ranks, of which each has its own."""

    def __init__(self, targets: Tensor, index: Tensor, index_kind: str, shard: VocabShard) -> None:
        places = torch.arange(len(index), device=index.device)
        self._index = index
        if index_kind == "repeated":  # a row goes over once
            self._index, places = index.unique(return_inverse=True)
        self.kind = "repeated" if index_kind == "repeated" else "tokens"
        self._of = rank_rows(len(self._index), len(targets), index.device, shard.group)
        first = sum(self._of.rows[: self._of.rank])
        both = all_tokens(torch.stack([targets.long(), places + first], -1), self._of)
        self.targets, self.places = both.unbind(-1)

    def rows(self, states: Tensor) -> Tensor:
        """``(M, H)``: those that labels of any rank are predicted from."""
        return all_rows(states.index_select(0, self._index), self._of)

    def own(self, found: LinearLogprobOutput) -> LinearLogprobOutput:
        """Of results for all ranks' tokens those of this one's."""
        numbers = {n: v for n, v in found._asdict().items() if v is not None and v.dtype != torch.bool}
        mine = own_tokens(torch.stack(list(numbers.values()), -1), self._of).unbind(-1)
        made = {
            name: value if numbers[name].requires_grad else value.detach()
            for name, value in zip(numbers, mine, strict=True)
        }
        if found.is_top1 is not None:
            made["is_top1"] = found.is_top1[self._of.own_tokens]
        return LinearLogprobOutput(**made)


def _joined(
    local_logprob: Logprob,
    rows: Tensor,
    head: LMHead,
    targets: Tensor,
    places: Tensor,
    kind: str,
    shard: VocabShard,
    wanted: tuple[str, ...],
    **how: Any,
) -> LinearLogprobOutput:
    """``(N,)`` results over the whole vocabulary, of what each rank finds in its part of it."""
    size = head.weight.shape[0]
    own = own_labels(targets, size, shard)
    needed = ["lse", *(name for name in wanted if name not in ("lse", "is_top1"))]
    if "is_top1" in wanted:
        needed += ["is_top1", "topk_mass"]
        how["topk"] = 1
    output, _ = local_logprob(rows, head, own, places, kind, outputs=tuple(needed), **how)
    made = whole_results(own_columns(output, own, size), shard.group, shard.vocab_size)
    differentiable = {"logps", "lse", *(["entropy"] if how["entropy_requires_grad"] else [])}
    return LinearLogprobOutput(
        **{
            name: value if name in differentiable else value.detach()
            for name, value in made.items()
            if name in ("logps", *wanted)
        }
    )


def summed_rows(
    states: Tensor, index: Tensor, index_kind: str, shard: VocabShard
) -> tuple[Tensor, Tensor, str]:
    """The rows that labels are predicted from, and an index of them; their gradient is summed over ranks.

    Rows of which none is named twice are all that is summed.
    """
    if index_kind != "repeated":
        states = states.index_select(0, index)
        index, index_kind = torch.arange(len(index), device=states.device), "tokens"
    rows: Tensor = _SumOfGradients.apply(states, shard.group)
    return rows, index, index_kind


def own_labels(targets: Tensor, size: int, shard: VocabShard) -> Tensor:
    """Labels as this rank's ``size`` rows count them; -1, which has no one-hot, for those of other ranks."""
    is_own = (targets >= shard.start) & (targets < shard.start + size)
    return torch.where(is_own, targets - shard.start, -1)


def own_columns(output: LinearLogprobOutput, own: Tensor, size: int) -> dict[str, Tensor]:
    """What a rank tells the others of what it found in its part: ``(N,)`` each.

    Args:
        own: what `own_labels` made.
        size: rows of the part.
    """
    lse, is_own = output.lse, own >= 0
    assert lse is not None
    columns = {"lse": lse, "label": torch.where(is_own, output.logps + lse, 0), "own": is_own.to(lse.dtype)}
    for name in ("entropy", "log_sum_sq_probs"):
        if (value := getattr(output, name)) is not None:
            columns[name] = value
    if output.mean_logit is not None:
        columns["sum"] = output.mean_logit * size
    if output.topk_mass is not None and output.is_top1 is not None:
        # Of an owner whose label is its largest logit the label's own logit, to the bit.
        largest = lse + output.topk_mass.log()
        columns["largest"] = torch.where(is_own & output.is_top1, columns["label"], largest).detach()
    return columns


def whole_results(columns: dict[str, Tensor], group: Any, vocab_size: int) -> dict[str, Tensor]:
    """``(N,)`` results over the whole vocabulary, by name, of every rank's `own_columns`: one all-gather.

    ``weight`` among them is the share of the probability that this rank's part has.
    """
    parts = _GatheredParts.apply(torch.stack(list(columns.values()), -1), group)  # (R, N, k)
    of = dict(zip(columns, parts.unbind(-1), strict=True))
    whole = torch.logsumexp(of["lse"], 0)
    weight = (of["lse"] - whole).exp()
    logps = of["label"].sum(0) - whole
    made: dict[str, Tensor] = {
        # A label that no rank has is outside the vocabulary.
        "logps": torch.where(of["own"].sum(0) == 1, logps, torch.full_like(logps, float("nan"))),
        "lse": whole,
        "weight": weight[dist.get_rank(group)],
    }
    if "entropy" in of:
        made["entropy"] = whole - (weight * (of["lse"] - of["entropy"])).sum(0)
    if "log_sum_sq_probs" in of:
        made["log_sum_sq_probs"] = torch.logsumexp(of["log_sum_sq_probs"] + 2 * (of["lse"] - whole), 0)
    if "sum" in of:
        made["mean_logit"] = of["sum"].sum(0) / vocab_size
    if "largest" in of:
        made["is_top1"] = of["label"].sum(0) >= of["largest"].amax(0)
    if "ref_lse" in of:
        made["ref_logps"] = of["ref_label"].sum(0) - torch.logsumexp(of["ref_lse"], 0)
    return made


def sharded_mean_logit(rows: Tensor, head: LMHead) -> Tensor:
    """``(N,)``: the mean of ``rows W^T + b`` over the whole vocabulary, for which no row is projected.

    Args:
        rows: ``(N, H)`` of fp32 or fp64, the same on all ranks.
    """
    shard = head.vocab_parallel
    assert isinstance(shard, VocabShard)
    part = _SumOfGradients.apply(rows, shard.group) @ head.weight.sum(0, dtype=rows.dtype)
    if head.bias is not None:
        part = part + head.bias.sum(dtype=rows.dtype)
    parts: Tensor = _GatheredParts.apply(part, shard.group)
    return parts.sum(0) / shard.vocab_size


def _own_head(head: LMHead, shard: VocabShard) -> LMHead:
    """The shard as a head of its own; of LoRA on it A, the same on all ranks, gets all of its gradient."""
    adapter = head.adapter
    if isinstance(adapter, HeadAdapter):
        if adapter.dropout:
            wanted = "0 with vocab_parallel: each rank would drop other entries"
            raise fail("lm_head.adapter.dropout", adapter.dropout, wanted)
        adapter = adapter._replace(lora_a=_SumOfGradients.apply(adapter.lora_a, shard.group))
    return replace(head, vocab_parallel=None, adapter=adapter)


def _check_alike(targets: Tensor, shard: VocabShard) -> None:
    places = torch.arange(1, len(targets) + 1, device=targets.device)
    mine = torch.stack([places.new_tensor(len(targets)), (targets * places).sum()])
    said = mine.new_empty(2 * dist.get_world_size(shard.group))
    dist.all_gather_into_tensor(said, mine, group=shard.group)
    if (said.view(-1, 2) != mine).any():
        counts = said.view(-1, 2)[:, 0].tolist()
        raise fail(
            "labels", f"others on some ranks ({counts} scored)", "the same on all ranks of vocab_parallel"
        )


class _SumOfGradients(torch.autograd.Function):
    """What is the same on all ranks of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _GatheredParts(torch.autograd.Function):
    """``(N, k)`` of every rank, ``(R, N, k)``; each rank differentiates by its own, in the same loss."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        ranks = dist.get_world_size(group)
        whole = part.new_empty((ranks * part.shape[0], *part.shape[1:]))  # the one form that gloo takes
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole.view(ranks, *part.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None
