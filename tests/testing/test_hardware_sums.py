"""The simulated sums against examples worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo.testing.hardware_sums import (
    AMPERE,
    HOPPER,
    TensorCore,
    multiply_add_chain,
    tensor_core,
    tensor_core_sums,
    truncated_to_tf32,
)

BOTH = (AMPERE, HOPPER)


def terms(*steps: list[float], core: TensorCore) -> Tensor:
    """``(1, K)``: each step filled up with zeros, so that it is one of the tensor core's."""
    return torch.tensor([[x for step in steps for x in step + [0.0] * (core.products - len(step))]])


def summed(*steps: list[float], core: TensorCore) -> float:
    row = terms(*steps, core=core)
    return tensor_core_sums(row, torch.ones_like(row), core).item()


@pytest.mark.parametrize("core", BOTH, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_is_cut_off_towards_zero(core: TensorCore, sign: float) -> None:
    """1 and then three halves of its last place: one place is kept, where rounding to nearest gives two."""
    assert summed([sign], [sign * 2**-24] * 3, core=core) == sign * (1 + 2**-23)
    assert summed([sign * 1.5], [-sign * 2**-24], core=core) == sign * (1.5 - 2**-23)  # half a place less


def test_products_are_cut_off_below_the_largest_exponent() -> None:
    """Eight times 2^-25 are two places of 1: Hopper's 25 bits hold each of them, Ampere's 24 none."""
    assert summed([1.0], [2**-25] * 8, core=HOPPER) == 1 + 2**-22
    assert summed([1.0], [2**-25] * 8, core=AMPERE) == 1.0
    assert summed([1.0], [2**-24] * 8, core=AMPERE) == 1 + 2**-21
    assert summed([1.0], [2**-26] * 16, core=HOPPER) == 1.0


def test_a_products_exponent_is_the_sum_of_its_factors() -> None:
    """1.5 x 1.5 counts as exponent 0 though it is above 2, so 2^-25 beside it survives."""
    a = torch.tensor([[1.5, 2**-25, 1.5]])
    b = torch.tensor([[1.5, 1.0, -1.5]])
    assert tensor_core_sums(a, b, HOPPER).item() == 2**-25
    assert tensor_core_sums(a, b, AMPERE).item() == 0.0


def test_how_many_products_a_step_takes() -> None:
    """Half a place a step is lost every time; all of them in one step are kept: 8 on Ampere, 16 on Hopper."""
    row = torch.cat((torch.ones(1), torch.zeros(15), torch.full((16,), 2**-24)))[None]
    ones = torch.ones_like(row)
    assert tensor_core_sums(row, ones, HOPPER).item() == 1 + 2**-20
    alternating = row.clone()
    alternating[0, 17:24] = alternating[0, 25:] = 0  # one half place in each eight
    assert tensor_core_sums(alternating, ones, AMPERE).item() == 1.0
    assert tensor_core_sums(alternating, ones, HOPPER).item() == 1 + 2**-23
    assert HOPPER.of_tf32.products == 8 and AMPERE.of_tf32.products == 4


def test_a_chain_rounds_to_nearest() -> None:
    row = torch.tensor([[1.0, 2**-24, 2**-24, 2**-24]])
    assert multiply_add_chain(row, torch.ones_like(row)).item() == 1.0  # ties go to even, each time
    row[0, 1] = 3 * 2**-25
    assert multiply_add_chain(row, torch.ones_like(row)).item() == 1 + 2**-22  # up, and the tie to even: up
    factors = torch.tensor([[1.0, 1 + 2**-23]])
    assert multiply_add_chain(-factors, factors).item() == -2 - 2**-22  # the product is not rounded before


def test_tf32_cuts_operands_off() -> None:
    x = torch.tensor([1 + 2**-10 + 2**-11, -1 - 2**-11, 0.0, 3.0])
    assert truncated_to_tf32(x).tolist() == [1 + 2**-10, -1.0, 0.0, 3.0]


def test_shapes_and_what_is_exact() -> None:
    """Small integers are exact in every way; the last step may be short; results broadcast."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (5, 1, 37), generator=generator).bfloat16()
    b = torch.randint(-8, 9, (7, 37), generator=generator).bfloat16()
    want = a[:, 0].float() @ b.float().T
    for got in (tensor_core_sums(a, b, AMPERE), tensor_core_sums(a, b, HOPPER), multiply_add_chain(a, b)):
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize(
    ("capability", "core"),
    [((8, 0), AMPERE), ((8, 9), AMPERE), ((9, 0), HOPPER), ((10, 0), HOPPER), ((12, 0), HOPPER)],
)
def test_which_core_an_architecture_has(capability: tuple[int, int], core: TensorCore) -> None:
    assert tensor_core(capability) == core
