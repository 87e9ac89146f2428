"""What the sequence-kernel tests share: cases, guarded memory, and the truth in fp64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels.sequence import SequenceKernels, SigmoidOutputs, SigmoidTerms
from fastdpo.losses import PairLogps, build_objective

FP32, FP64 = torch.float32, torch.float64
CANARY = 77.0  # stands wherever a kernel must not write
GUARD = 16  # canaries before and after every output

LENGTHS: dict[str, tuple[int, ...]] = {
    "no pairs": (),
    "no tokens": (0, 0, 0, 0),
    "one token": (1, 0),
    "empty answers": (0, 5, 7, 0, 0, 0, 3, 2),
    "around warps": (31, 32, 33, 1, 2, 63, 64, 65),
    "around tiles": (255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049),
    "ordinary": (120, 340, 77, 502, 610, 9, 250, 251, 18, 444, 333, 12),
    "long and short": (5000, 1, 2, 3001),
}


@dataclass(frozen=True)
class PairCase:
    """One batch of pairs and how it is asked for; a frozen value, so that a test's id says all of it."""

    lengths: str
    scale: float = 1.0  # of the log-probabilities
    has_weights: bool = False
    has_mask: bool = False
    has_ref: bool = False
    beta: str = "number"  # or tensor, as the next three, which may be none
    margin: str = "none"
    preference: str = "none"  # or smoothing
    pair_weights: str = "none"
    divisor: str = "number"

    def __str__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved = [f"{n}={v}" for n, v in fields.items() if v != self.__dataclass_fields__[n].default]
        return ",".join(moved)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "scale": (1.0, 1.0, 1e4),
    "has_weights": (False, True),
    "has_mask": (False, True),
    "has_ref": (False, True),
    "beta": ("number", "tensor"),
    "margin": ("none", "number", "tensor"),
    "preference": ("none", "smoothing", "number", "tensor"),
    "pair_weights": ("none", "number", "tensor"),
    "divisor": ("number", "tensor"),
}


def mixed_cases(per_lengths: int, seed: int = 0) -> list[PairCase]:
    """So many cases of each of LENGTHS; all values of an option occur equally often, thrown together."""
    dice = random.Random(seed)
    lengths = [name for name in LENGTHS for _ in range(per_lengths)]
    columns = {}
    for name, values in OPTIONS.items():
        column = [values[i % len(values)] for i in range(len(lengths))]
        dice.shuffle(column)
        columns[name] = column
    return [
        PairCase(where, **{name: column[i] for name, column in columns.items()})
        for i, where in enumerate(lengths)
    ]


@dataclass(eq=False)
class Tokens:
    """N tokens in S sequences, on the CPU; what does not count is NaN."""

    values: Tensor  # (N,)
    offsets: Tensor  # (S + 1,)
    weights: Tensor | None
    mask: Tensor | None

    @property
    def counts(self) -> Tensor:
        return torch.ones(len(self.values), dtype=torch.bool) if self.mask is None else self.mask

    def spans(self) -> list[slice]:
        bounds = self.offsets.tolist()
        return [slice(*bound) for bound in zip(bounds, bounds[1:], strict=False)]


def make_tokens(
    lengths: tuple[int, ...], *, scale: float = 1.0, has_weights: bool = False, has_mask: bool = False
) -> Tokens:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = -scale * torch.rand(int(offsets[-1]))
    weights = 2 * torch.rand(len(values)) - 0.5 if has_weights else None
    mask = None
    if has_mask:
        mask = torch.rand(len(values)) < 0.7
        if len(lengths) > 3:  # a whole answer, and a whole pair
            mask[: lengths[0]] = False
            mask[offsets[2] : offsets[4]] = False
        for tensor in (values, weights):
            if tensor is not None:
                tensor[~mask] = float("nan")
    return Tokens(values, offsets, weights, mask)


@dataclass(eq=False)
class PairData:
    tokens: Tokens
    terms: SigmoidTerms
    smoothing: float  # what terms.preferred was made of, if it was


def make_pairs(case: PairCase) -> PairData:
    lengths = LENGTHS[case.lengths]
    num_pairs = len(lengths) // 2
    tokens = make_tokens(lengths, scale=case.scale, has_weights=case.has_weights, has_mask=case.has_mask)

    def pick(kind: str, number: float, low: float, high: float, none: float) -> float | Tensor:
        if kind == "tensor":
            return low + (high - low) * torch.rand(num_pairs)
        return number if kind == "number" else none

    smoothing = 0.1 if case.preference == "smoothing" else 0.0
    ref_sums = None
    if case.has_ref:  # near the policy, where the loss is not saturated
        ref_sums = torch.tensor(exact_sums(tokens)).float() + case.scale * torch.randn(2 * num_pairs)
    terms = SigmoidTerms(
        beta=pick(case.beta, 0.1, 0.01, 0.5, math.nan),
        margin=pick(case.margin, 0.7, -1.0, 2.0, 0.0),
        preferred=pick(case.preference, 0.8, 0.0, 1.0, 1 - smoothing),
        pair_weights=pick(case.pair_weights, 1.7, 0.0, 2.0, 1.0),
        divisor=torch.tensor(7.0) if case.divisor == "tensor" else 7.0,
        ref_sums=ref_sums,
    )
    return PairData(tokens, terms, smoothing)


def exact_sums(tokens: Tokens) -> list[float]:
    """Each sequence's sum to the last bit of fp64: the product of two fp32 numbers is exact there."""
    return [math.fsum(_summands(tokens)[span].tolist()) for span in tokens.spans()]


def sum_tolerances(tokens: Tokens) -> Tensor:
    """How far a rounded fp64 sum may be from the exact one, ``(S,)``.

    Half an ulp of fp32 for the rounding, or half its smallest number; and for n additions in fp64, in any
    order, n eps64 times the sum of the absolute values.
    """
    exact = torch.tensor(exact_sums(tokens), dtype=FP64).abs()
    summands = _summands(tokens).abs()
    added = torch.tensor([summands[s].sum() * (s.stop - s.start) for s in tokens.spans()], dtype=FP64)
    return exact * torch.finfo(FP32).eps / 2 + 2.0**-150 + added * torch.finfo(FP64).eps


def _summands(tokens: Tokens) -> Tensor:
    values = tokens.values.double()
    products = values if tokens.weights is None else values * tokens.weights.double()
    return products.where(tokens.counts, 0)


def loss_and_gradient(data: PairData, sums: Tensor) -> tuple[Tensor, Tensor]:
    """``fastdpo.losses`` with autograd in fp64: the loss of these sums, and d loss / d values.

    Rounding the sums to fp32 is part of the contract, so the loss is taken of the rounded ones; the gradient
    goes through to the values as if nothing had been rounded.
    """
    tokens, terms = data.tokens, data.terms
    values = tokens.values.double().nan_to_num(0.0).requires_grad_()
    weights = 1.0 if tokens.weights is None else tokens.weights.double()
    weighted = (values * weights).where(tokens.counts, 0)

    def per_sequence(tensor: Tensor) -> Tensor:  # (2, P)
        parts = [tensor[span].sum() for span in tokens.spans()]
        return (torch.stack(parts) if parts else tensor[:0]).view(-1, 2).T

    exact = per_sequence(weighted)
    rounded = exact + (sums.double().view(-1, 2).T - exact).detach()
    reference = None if terms.ref_sums is None else terms.ref_sums.double().view(-1, 2).T
    pair = PairLogps(
        *rounded,
        *per_sequence(tokens.counts.double()),
        **({} if reference is None else {"ref_chosen": reference[0], "ref_rejected": reference[1]}),
    )
    preference: dict[str, Any] = {"soft_labels": _double(terms.preferred)}
    if not isinstance(terms.preferred, Tensor) and terms.preferred == 1 - data.smoothing:
        preference = {"label_smoothing": data.smoothing}
    loss = build_objective(
        "sigmoid",
        beta=_double(terms.beta),
        margin=_double(terms.margin),
        pair_weights=_double(terms.pair_weights),
        num_pairs=_double(terms.divisor),
        **preference,
    ).loss(pair)
    (gradient,) = torch.autograd.grad(loss, values)
    return loss.detach(), gradient.where(tokens.counts, 0)  # 0 * a weight of NaN is NaN


def _double(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else value


def assert_rounded_once(ours: Tensor, truth: Tensor, name: str) -> None:
    """``ours`` in fp32 is the fp64 ``truth`` rounded once.

    Half an ulp is at most eps / 2 of the truth; as much again leaves room for fp64 arithmetic that differs
    from the truth's, which exp(h) makes |h| times as large: 1e-16 |h|, with |h| up to 745. Below the normal
    numbers one spacing of fp32.
    """
    assert ours.dtype == FP32 and truth.dtype == FP64 and ours.shape == truth.shape
    error, allowed = (ours.double() - truth).abs(), truth.abs() * torch.finfo(FP32).eps + 2.0**-149
    assert (error <= allowed).all(), (name, (error / allowed).max(), ours, truth)


class Guarded:
    """An output between canaries."""

    def __init__(self, shape: tuple[int, ...], device: str, fill: float, dtype: torch.dtype = FP32) -> None:
        size = math.prod(shape)
        self._all = torch.full((size + 2 * GUARD,), CANARY, device=device, dtype=dtype)
        self.tensor = self._all[GUARD : GUARD + size].view(shape).fill_(fill)

    def result(self) -> Tensor:
        """On the CPU, after a look at the canaries."""
        size = self.tensor.numel()
        edges = torch.cat([self._all[:GUARD], self._all[GUARD + size :]])
        assert (edges == CANARY).all(), "written outside the output"
        return self.tensor.cpu()


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def run_sums(kernels: SequenceKernels, tokens: Tokens, device: str, fill: float = math.nan) -> Tensor:
    out = Guarded((len(tokens.offsets) - 1,), device, fill)
    weights, mask = _to(tokens.weights, device), _to(tokens.mask, device)
    kernels.sequence_sums(
        _to(tokens.values, device), _to(tokens.offsets, device), out.tensor, weights=weights, mask=mask
    )
    return out.result()


def run_pairs(
    kernels: SequenceKernels, tokens: Tokens, terms: SigmoidTerms, device: str, fill: float = math.nan
) -> SigmoidOutputs:
    shapes = ((len(tokens.offsets) - 1,), (), (len(tokens.values),))
    outputs = [
        Guarded(shape, device, fill, dtype) for shape, dtype in zip(shapes, (FP32, FP64, FP32), strict=True)
    ]
    moved = replace(terms, **{name: _to(value, device) for name, value in vars(terms).items()})
    kernels.sigmoid_pairs(
        _to(tokens.values, device),
        _to(tokens.offsets, device),
        moved,
        SigmoidOutputs(*(output.tensor for output in outputs)),
        weights=_to(tokens.weights, device),
        mask=_to(tokens.mask, device),
    )
    return SigmoidOutputs(*(output.result() for output in outputs))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
