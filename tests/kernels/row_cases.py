"""What the row-kernel tests share: cases that cover pairs of options, guarded memory, the fp64 truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels.contract import LogitTransform, RowKernel, RowOutputs
from fastdpo.types import TOKEN_STATISTICS

CANARY = 77  # exact in every dtype; stands wherever a kernel must not write
GUARD = 16  # canaries before and after every tensor


@dataclass(frozen=True)
class RowCase:
    """One chunk and how it is asked for; a frozen value, so that a test's id says all of it."""

    vocab: int
    rows: int
    logits_dtype: torch.dtype = torch.float32
    d_dtype: torch.dtype | None = torch.float32  # None: no gradient wanted
    in_place: bool = False
    has_bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    has_target: bool = False
    has_coeffs: bool = False
    statistics: tuple[str, ...] = ()
    row_padding: int = 0  # elements between rows
    offset: int = 0  # elements before the first row; 1 breaks 16-byte alignment

    def __str__(self) -> str:
        names = (f.name for f in self.__dataclass_fields__.values() if getattr(self, f.name) != f.default)
        return ",".join(f"{name}={_short(getattr(self, name))}" for name in names)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "all" if value == TOKEN_STATISTICS else "+".join(value)
    return str(value).removeprefix("torch.").replace("float", "f")


@dataclass(eq=False)
class RowData:
    """The inputs of a case, before they are laid out in memory."""

    logits: Tensor  # (C, V) in the case's dtype
    labels: Tensor  # (C,)
    bias: Tensor | None  # (V,) fp32
    target: Tensor | None  # (C,) fp32
    coeffs: Tensor | None  # (3, C) fp32


@dataclass(eq=False)
class RowResults:
    """What a kernel wrote, on the CPU."""

    statistics: dict[str, Tensor]  # by name, logps among them
    d: Tensor | None


def pairwise_cases(factors: dict[str, Sequence[Any]], seed: int = 0) -> list[RowCase]:
    """Few cases in which every pair of values of two factors occurs (greedy, deterministic).

    Combinations the contract knows nothing of are turned into their neighbours first: an exact target
    comes with 16-bit logits only, coefficients with a gradient only, and D lies over logits only in
    their dtype or, 16-bit, over fp32.
    """
    generator = random.Random(seed)
    names = list(factors)

    def pairs(chosen: dict[str, Any]) -> set[tuple]:
        return {(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)}

    missing = {(a, x, b, y) for a, b in combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases = []
    while missing:
        first = min(missing, key=repr)
        candidates = []
        for _ in range(30):
            chosen = {name: generator.choice(factors[name]) for name in names}
            chosen |= {first[0]: first[1], first[2]: first[3]}
            candidates.append(chosen)
        best = max(candidates, key=lambda chosen: len(pairs(chosen) & missing))
        missing -= pairs(best)
        cases.append(_legal(best))
    return list(dict.fromkeys(cases))


def _legal(chosen: dict[str, Any]) -> RowCase:
    chosen = dict(chosen)
    d_dtype, in_place = chosen.pop("d")
    logits_dtype = chosen["logits_dtype"]
    if in_place and logits_dtype != torch.float32:
        d_dtype = logits_dtype
    chosen["has_target"] &= logits_dtype != torch.float32
    chosen["has_coeffs"] &= d_dtype is not None
    return RowCase(d_dtype=d_dtype, in_place=in_place, **chosen)


def make_data(case: RowCase, seed: int = 0) -> RowData:
    """Final logits of standard deviation about 3; every third label the argmax, the first the argmin."""
    generator = torch.Generator().manual_seed(seed + 1000 * case.vocab + case.rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = case.temperature / abs(case.scale)
    logits = (3 * spread * randn(case.rows, case.vocab)).to(case.logits_dtype)
    bias = spread * randn(case.vocab) if case.has_bias else None
    signed = case.scale * (logits.float() + (0.0 if bias is None else bias))
    labels = torch.randint(case.vocab, (case.rows,), generator=generator)
    labels[1::3] = signed.argmax(1)[1::3]
    labels[:1] = signed.argmin(1)[:1]  # keeps the norm of D near 1, so that relative errors mean something
    target = None
    if case.has_target:  # what the product was before it was rounded
        ulp = 2.0**-8
        picked = logits.float().gather(1, labels[:, None])[:, 0]
        target = picked * (1 + ulp * (torch.rand(case.rows, generator=generator) - 0.5))
    coeffs = randn(3, case.rows) if case.has_coeffs else None
    return RowData(logits, labels, bias, target, coeffs)


MARGINS = (5.0, 17.0, 20.0, 25.0, 32.0, 40.0)  # nats; from 16.6 on 1 - p rounds to 0 in fp32


def set_margins(logits: Tensor, labels: Tensor, spread: float = 1.0) -> Tensor:
    """Raise the label's logit of row i ``MARGINS[i]`` nats above the others' logsumexp; 1 - p of it, in fp64.

    ``spread``: logits over final logits.
    """
    margins = torch.tensor(MARGINS, dtype=torch.float64)
    index = labels[:, None]
    others = (logits.double() / spread).scatter(1, index, -torch.inf).logsumexp(1)
    logits.scatter_(1, index, (spread * (others + margins))[:, None].to(logits.dtype))
    apart = others - logits.double().gather(1, index)[:, 0] / spread  # as it was rounded
    return apart.exp() / (1 + apart.exp())


def run(
    kernel: RowKernel, case: RowCase, data: RowData, device: str = "cpu", poison: float = float("nan")
) -> RowResults:
    """Call ``kernel`` on guarded memory full of ``poison`` and check that the guards still stand."""
    vector, matrix = (case.rows,), (case.rows, case.vocab)
    pitch = case.vocab + case.row_padding

    def place(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    guarded = {
        "logits": Guarded(matrix, case.logits_dtype, device, case.offset, pitch),
        "labels": Guarded(vector, torch.int64, device, case.offset),
        **{
            name: Guarded(vector, torch.float32, device, case.offset)
            for name in ("logps", "lse", *case.statistics)
        },
    }
    if case.d_dtype is not None and not case.in_place:
        guarded["d"] = Guarded(matrix, case.d_dtype, device, case.offset, pitch)
    if "is_top1" in case.statistics:
        guarded["is_top1"] = Guarded(vector, torch.bool, device, case.offset)
    views = {name: memory.view for name, memory in guarded.items()}
    if case.in_place:
        views["d"] = overlay(views["logits"], case.d_dtype)
    outputs = {name: views[name] for name in RowOutputs._fields if name in views}
    for name in outputs.keys() | ({"d"} & views.keys()):
        views[name].fill_(poison)
    views["logits"].copy_(data.logits)
    views["labels"].copy_(data.labels)

    kernel(
        views["logits"],
        views["labels"],
        LogitTransform(place(data.bias), case.scale, case.softcap, case.temperature),
        RowOutputs(**outputs),
        target_logits=place(data.target),
        d_out=views.get("d"),
        grad_coeffs=place(data.coeffs),
    )
    results = RowResults(
        {name: output.clone().cpu() for name, output in outputs.items()},
        views["d"].clone().cpu() if "d" in views else None,
    )
    assert torch.equal(views["labels"].cpu(), data.labels), "the kernel wrote to the labels"
    for name, memory in guarded.items():
        assert memory.is_intact(), f"the kernel wrote outside of {name}"
    return results


class Guarded:
    """A tensor inside a buffer of canaries, which also fill the space between its rows."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: int, pitch: int | None = None
    ) -> None:
        stride = (1,) if pitch is None else (pitch, 1)
        numel = GUARD + offset + shape[0] * stride[0] + GUARD
        stored = torch.uint8 if dtype == torch.bool else dtype
        self._buffer = torch.full((numel,), CANARY, dtype=stored, device=device)
        self._inside = self._buffer.as_strided(shape, stride, GUARD + offset)
        self.view = self._inside.view(dtype)

    def is_intact(self) -> bool:
        """Whether all canaries stand; the tensor itself is lost."""
        self._inside.fill_(CANARY)
        return bool((self._buffer == CANARY).all())


def overlay(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """As many elements of ``dtype`` from the front of each of ``rows``, in the same memory."""
    ratio = rows.element_size() // dtype.itemsize
    empty = torch.empty(0, dtype=dtype, device=rows.device)
    return empty.set_(
        rows.untyped_storage(), ratio * rows.storage_offset(), rows.shape, (ratio * rows.stride(0), 1)
    )


def dense_rows(case: RowCase, data: RowData, dtype: torch.dtype) -> RowResults:
    """The contract by plain torch and autograd in ``dtype``: in fp64 the truth, in fp32 eager's result."""
    in_range = (data.labels >= 0) & (data.labels < case.vocab)
    index = data.labels.where(in_range, 0)[:, None]
    x = data.logits.to(dtype)
    if data.target is not None:
        x = x.scatter(1, index, data.target.to(dtype)[:, None].where(in_range[:, None], x.gather(1, index)))
    z = x.requires_grad_()
    if data.bias is not None:
        z = z + data.bias.to(dtype)
    z = case.scale * z
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    z = z / case.temperature

    log_p = z.log_softmax(1)
    lse = z.logsumexp(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    logps = log_p.gather(1, index)[:, 0].where(in_range, float("nan"))
    statistics = {
        "logps": logps,
        "lse": lse,
        "entropy": entropy,
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logit": z.mean(1),
        "mean_abs_logit": z.abs().mean(1),
        "is_top1": (z.gather(1, index)[:, 0] == z.amax(1)) & in_range,
    }
    d = None
    if case.d_dtype is not None:
        onehot = torch.zeros_like(z).scatter(1, index, in_range[:, None].to(dtype))
        # An unknown label has no logit of its own: what is left of its logp is -lse.
        value = (log_p.masked_fill(onehot == 0, 0.0)).sum(1) - lse.where(~in_range, 0.0)
        if data.coeffs is not None:
            a, b, c = data.coeffs.to(dtype)
            value = a * value + b * lse + c * entropy
        (dx,) = torch.autograd.grad(value.sum(), x)
        d = dx * (case.temperature / case.scale)
    return RowResults({name: value.detach() for name, value in statistics.items()}, d)
