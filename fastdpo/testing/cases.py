"""Data on which mistakes show, with the truth and today's results for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.testing.checker import assert_close_to_fp64, assert_logps_close
from fastdpo.types import LMHead


class HeadResults(NamedTuple):
    """What a head gives and what flows back: log-probabilities and the three gradients."""

    logps: Tensor  # (B, T)
    dhidden: Tensor  # (B, T, H)
    dweight: Tensor  # (V, H)
    dbias: Tensor | None  # (V,)


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one head and the gradient that comes back to its log-probabilities."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (B, T) int64, aligned with hidden
    upstream: Tensor  # (B, T) fp32: dL/dlogp of every token
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100

    @property
    def lm_head(self) -> LMHead:
        return LMHead(
            self.weight,
            bias=self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=self.temperature,
        )


def make_case(
    *,
    batch: int = 6,
    length: int = 64,
    hidden_size: int = 64,
    vocab: int = 1003,
    dtype: torch.dtype = torch.bfloat16,
    has_bias: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Case:
    """Data on which mistakes show: the same numbers for the same arguments on every device.

    Logits of standard deviation about 3 (before a cap), as trained models have; every third label is
    the argmax, whose gradient is small; 30 % of the tokens are ignored, the first, the last and (from
    three sequences on) one whole sequence among them; every token has its own upstream gradient of
    either sign, every seventh exactly 0.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=generator)
    weight = (weight * (3 * temperature / (abs(logit_scale) * hidden_size**0.5))).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if has_bias else None
    labels = torch.randint(vocab, (batch, length), generator=generator)
    upstream = torch.randn(batch, length, generator=generator)
    upstream.view(-1)[3::7] = 0.0

    logits = hidden.float() @ weight.float().T + (0.0 if bias is None else bias.float())
    best = (logit_scale * logits).argmax(-1)
    labels.view(-1)[::3] = best.view(-1)[::3]
    labels = labels.masked_fill(_ignored_positions(batch, length, generator), -100)

    return Case(
        hidden.to(device),
        weight.to(device),
        None if bias is None else bias.to(device),
        labels.to(device),
        upstream.to(device),
        logit_scale,
        softcap,
        temperature,
    )


def same_sign_case(
    *,
    tokens: int = 4096,
    hidden_size: int = 32,
    vocab: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Case:
    """Data on which a sum in low precision drifts: the terms of every entry of dweight have one sign.

    On ordinary data signs cancel and no rule notices a weight gradient summed in bf16.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = (1 + torch.rand(1, tokens, hidden_size, generator=generator)).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5).to(dtype)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    upstream = torch.ones(1, tokens)
    return Case(hidden.to(device), weight.to(device), None, labels.to(device), upstream.to(device))


def fp64_results(case: Case) -> HeadResults:
    """The truth: the definition in fp64, and autograd through it."""

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_logprob_reference(
            hidden,
            weight,
            case.labels,
            bias=bias,
            logit_scale=case.logit_scale,
            softcap=case.softcap,
            temperature=case.temperature,
            ignore_index=case.ignore_index,
        ).logps

    return _results(case, logps, torch.float64)


def eager_results(case: Case) -> HeadResults:
    """What users have today: logits in the inputs' dtype, their softmax in at least fp32."""

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = case.logit_scale * F.linear(hidden, weight, bias)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        logits = logits / case.temperature
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        ignored = case.labels == case.ignore_index
        picked = log_p.gather(-1, case.labels.masked_fill(ignored, 0)[..., None])[..., 0]
        return picked.masked_fill(ignored, 0.0)

    return _results(case, logps, case.hidden.dtype)


def _results(case: Case, logps_of: Callable[..., Tensor], dtype: torch.dtype) -> HeadResults:
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_()
        for t in (case.hidden, case.weight, case.bias)
    ]
    logps = logps_of(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(logps, wanted, case.upstream.to(logps.dtype))
    return HeadResults(logps.detach(), grads[0], grads[1], grads[2] if len(grads) > 2 else None)


def _ignored_positions(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(B, T)`` bool: 30 % of the positions; none where there are fewer than four."""
    total = batch * length
    ignored = torch.zeros(total, dtype=torch.bool)
    if total < 4:
        return ignored.view(batch, length)
    ignored[0] = ignored[-1] = True
    if batch >= 3:
        ignored.view(batch, length)[batch // 2] = True
    missing = max(0, round(0.3 * total) - int(ignored.sum()))
    free = (~ignored).nonzero()[:, 0]
    ignored[free[torch.randperm(len(free), generator=generator)[:missing]]] = True
    return ignored.view(batch, length)


def assert_results_close(ours: HeadResults, case: Case) -> None:
    """Hold log-probabilities and gradients of ``case`` to the rule; ignored tokens to exactly 0."""
    ref64, eager = fp64_results(case), eager_results(case)
    ignored = case.labels == case.ignore_index
    if ours.logps[ignored].count_nonzero() or ours.dhidden[ignored].count_nonzero():
        raise AssertionError("logps and dhidden: not exactly 0 at ignored tokens")
    assert_logps_close(ours.logps, ref64.logps, case.hidden.dtype, hidden_size=case.hidden.shape[-1])
    for name in ("dhidden", "dweight", "dbias"):
        got, want, plain = getattr(ours, name), getattr(ref64, name), getattr(eager, name)
        if want is None:
            if got is not None:
                raise AssertionError(f"{name}: got a gradient for a head without a bias")
            continue
        if name == "dhidden":
            got, want, plain = got.flatten(0, -2), want.flatten(0, -2), plain.flatten(0, -2)
        assert_close_to_fp64(got, want, plain, name=name)
