"""What the divergence-kernel tests share: cases, guarded memory, the fp64 truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdpo.kernels import divergence
from fastdpo.kernels.contract import LogitTransform
from fastdpo.kernels.divergence import DIFFERENTIABLE, DivergenceKernel, DivergenceOutputs
from tests.kernels.row_cases import Guarded, overlay

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EVERYTHING = ("forward_kl", "reverse_kl", "jsd", "logps", "ref_logps")
PLAIN = LogitTransform()
# Which transform each head has; a bias is drawn where there is one.
HEADS: dict[str, tuple[LogitTransform, ...]] = {
    "plain": (PLAIN, PLAIN, PLAIN),
    "scaled": (LogitTransform(scale=-0.7), LogitTransform(scale=2.5, temperature=0.7), PLAIN),
    "capped": (LogitTransform(scale=0.5, softcap=5.0), LogitTransform(softcap=30.0, temperature=1.4), PLAIN),
    "biased": (
        LogitTransform(torch.zeros(0), softcap=20.0),
        LogitTransform(torch.zeros(0), scale=-1.5),
        LogitTransform(torch.zeros(0), softcap=9.0, temperature=2.0),
    ),
}


@dataclass(frozen=True)
class DivergenceCase:
    """One chunk and how it is asked for."""

    vocab: int
    outputs: tuple[str, ...] = ("forward_kl",)
    rows: int = 3
    heads: str = "plain"
    num_teachers: int = 1
    d_dtype: torch.dtype | None = FP32  # None: no gradient wanted
    in_place: bool = False
    has_logps_d: bool = False  # the D of logps apart
    has_coeffs: bool = False
    has_slopes: bool = True  # of two teachers
    row_padding: int = 0
    offset: int = 0

    def __str__(self) -> str:
        names = (f.name for f in self.__dataclass_fields__.values() if getattr(self, f.name) != f.default)
        return ",".join(f"{name}={_short(getattr(self, name))}" for name in names)


def _short(value: object) -> str:
    text = "+".join(value) if isinstance(value, tuple) else str(value)
    return text.removeprefix("torch.").replace("float", "f")


@dataclass(eq=False)
class DivergenceData:
    """The inputs of a case; fp32."""

    products: tuple[Tensor, ...]  # (C, V) of every head
    transforms: tuple[LogitTransform, ...]
    labels: Tensor  # (C,)
    coefficients: Tensor | None  # (2, C)
    slopes: tuple[float, float]
    grad_coeffs: Tensor | None  # (4, C)

    def rows(self, part: slice) -> DivergenceData:
        return replace(
            self,
            products=tuple(rows[part] for rows in self.products),
            labels=self.labels[part],
            coefficients=None if self.coefficients is None else self.coefficients[:, part].contiguous(),
            grad_coeffs=None if self.grad_coeffs is None else self.grad_coeffs[:, part].contiguous(),
        )


@dataclass(eq=False)
class DivergenceResults:
    """What a kernel wrote, on the CPU."""

    values: dict[str, Tensor]
    d: Tensor | None
    logps_d: Tensor | None


def make_data(case: DivergenceCase, seed: int = 0) -> DivergenceData:
    """Final logits of standard deviation about 3; teachers near the policy, and near each other."""
    generator = torch.Generator().manual_seed(seed + 1000 * case.vocab + case.rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    transforms, products = [], []
    common = 3 * randn(case.rows, case.vocab)
    for transform in HEADS[case.heads][: 1 + case.num_teachers]:
        spread = transform.temperature / transform.scale  # keeps the order of tokens whatever the sign
        products.append(spread * (common + randn(case.rows, case.vocab)))
        bias = None if transform.bias is None else abs(spread) * randn(case.vocab)
        transforms.append(replace(transform, bias=bias))
    coefficients = grad_coeffs = None
    if case.num_teachers == 2:
        coefficients = torch.stack([1.0 + randn(case.rows).abs(), -0.5 * randn(case.rows).abs()])
    if case.has_coeffs:
        grad_coeffs = randn(4, case.rows)
        for i, name in enumerate(DIFFERENTIABLE):
            grad_coeffs[i] *= name in case.outputs
    return DivergenceData(
        tuple(products),
        tuple(transforms),
        torch.randint(case.vocab, (case.rows,), generator=generator),
        coefficients,
        (0.8, -0.8) if case.num_teachers == 2 and case.has_slopes else (0.0, 0.0),
        grad_coeffs,
    )


def run(
    kernel: DivergenceKernel,
    case: DivergenceCase,
    data: DivergenceData,
    device: str = "cpu",
    poison: float = float("nan"),
) -> DivergenceResults:
    """Call ``kernel`` on guarded memory full of ``poison`` and check that the guards still stand."""
    vector, matrix = (case.rows,), (case.rows, case.vocab)
    pitch = case.vocab + case.row_padding
    guarded = {
        f"products {i}": Guarded(matrix, FP32, device, case.offset, pitch) for i in range(len(data.products))
    }
    guarded["labels"] = Guarded(vector, torch.int64, device, case.offset)
    guarded |= {name: Guarded(vector, FP32, device, case.offset) for name in case.outputs}
    names = [] if case.d_dtype is None else ["d", *(["logps_d"] if case.has_logps_d else [])]
    if not case.in_place and case.d_dtype is not None:
        guarded |= {name: Guarded(matrix, case.d_dtype, device, case.offset, pitch) for name in names}
    views = {name: memory.view for name, memory in guarded.items()}
    if case.in_place and case.d_dtype is not None:
        # Of two the second lies over the policy's logits, and the first over the teacher's.
        for name, place in zip(names[::-1], ("products 0", "products 1"), strict=False):
            views[name] = overlay(views[place], case.d_dtype)
    for name in (*case.outputs, *names):
        views[name].fill_(poison)
    for i, products in enumerate(data.products):
        views[f"products {i}"].copy_(products)
    views["labels"].copy_(data.labels)

    def place(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    logits, *teachers = (views[f"products {i}"] for i in range(len(data.products)))
    kernel(
        logits,
        tuple(teachers),
        views["labels"],
        tuple(replace(transform, bias=place(transform.bias)) for transform in data.transforms),
        DivergenceOutputs(**{name: views[name] for name in case.outputs}),
        coefficients=place(data.coefficients),
        slopes=data.slopes,
        jsd_beta=0.3,
        d_out=views.get("d"),
        logps_d_out=views.get("logps_d"),
        grad_coeffs=place(data.grad_coeffs),
    )
    results = DivergenceResults(
        {name: views[name].clone().cpu() for name in case.outputs},
        views["d"].clone().cpu() if "d" in names else None,
        views["logps_d"].clone().cpu() if "logps_d" in names else None,
    )
    assert torch.equal(views["labels"].cpu(), data.labels), "the kernel wrote to the labels"
    for name, memory in guarded.items():
        assert memory.is_intact(), f"the kernel wrote outside of {name}"
    return results


def in_dtype(case: DivergenceCase, data: DivergenceData, dtype: torch.dtype) -> DivergenceResults:
    """Plain torch's kernel, D in the same dtype: in fp64 the truth, in fp32 eager's result."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    logits, *teachers = (products.to(dtype, copy=True) for products in data.products)
    outputs = DivergenceOutputs(**{name: torch.empty(case.rows, dtype=dtype) for name in case.outputs})
    d = None if case.d_dtype is None else torch.empty_like(logits)
    logps_d = torch.empty_like(logits) if case.has_logps_d else None
    divergence.divergence_kernel(
        logits,
        tuple(teachers),
        data.labels,
        tuple(replace(transform, bias=wide(transform.bias)) for transform in data.transforms),
        outputs,
        coefficients=wide(data.coefficients),
        slopes=data.slopes,
        jsd_beta=0.3,
        d_out=d,
        logps_d_out=logps_d,
        grad_coeffs=wide(data.grad_coeffs),
    )
    return DivergenceResults({name: getattr(outputs, name) for name in case.outputs}, d, logps_d)


def pick(cases: Sequence[DivergenceCase], *, largest: int) -> list[DivergenceCase]:
    """Those for a slow kernel."""
    return [case for case in cases if case.vocab <= largest]
