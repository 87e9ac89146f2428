"""The one rule by which numbers are held to fp64.

Inputs are rounded to their dtype first; ``ref64`` is the definition in fp64 on those inputs, ``eager``
is plain torch in the inputs' dtype, and ours may be about twice as far from the truth as eager is.
Eager's error is the unit because it is what users have today; fp64 is the truth because two results
in low precision can agree and both be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.testing.accuracy import capability_of, logps_bound

# The share of relative error granted beyond eager's: the rms of one rounding to bf16 is about 2^-9. fp32
# results are held to less: an error of 1e-5 to 1e-4 nats moves a gradient by as much, relatively. Sums that
# the hardware cuts off (`accuracy.gradient_bound`) are within both, and eager's are cut off as well.
_RELATIVE_FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-9, torch.float32: 2**-13, torch.float64: 2**-40}
# Of a single entry, in eps: what the rounding of its own sum may add where eager's was lucky.
_SUM_ROUNDINGS = {torch.float32: 4}


def assert_close_to_fp64(
    ours: Tensor, ref64: Tensor, eager: Tensor, *, block_rows: int = 64, name: str = "tensor"
) -> None:
    """Hold ``ours`` to the truth ``ref64``, in units of the error of ``eager``.

    Both must hold, e(x) being x - ref64:

    * in every block of ``block_rows`` rows ``|e(ours)|_2 <= 2 |e(eager)|_2 + floor |ref64|_2``, which
      finds what is scaled, masked or wrong in one place; the floor is 2^-9 for 16-bit results and
      2^-13 for fp32. A block whose truth is all zero, and zero in eager too, must be exactly zero.
    * ``max |e(ours)| <= 2 (max |e(eager)| + r eps max |ref64|)``, eps of the dtype of ``ours``, which
      finds single wrong entries. r is 1, and 4 for fp32: a 16-bit result is a sum in fp32 rounded once, one
      of fp32 has the roundings of the sum itself, a few eps, and of few entries eager's may all be lucky.

    NaN and infinities must stand where ``ref64`` has them and nowhere else. A row is the last
    dimension; a 1-D tensor (a bias gradient ``(V,)``) is a column of one-entry rows, of which a last
    block shorter than half joins the one before, a relative error over a few entries being mere luck.

    Args:
        ours: any shape, fp16, bf16, fp32 or fp64.
        ref64: the same shape, fp64.
        eager: the same shape and the dtype of ``ours``.
        block_rows: rows per block.
        name: what the message calls the tensor.

    Raises:
        AssertionError: with the worst block, its numbers and what was allowed.
        ValueError: shapes or dtypes that cannot be compared.
    """
    if not ours.shape == ref64.shape == eager.shape:
        raise ValueError(f"{name}: shapes {_shape(ours)}, {_shape(ref64)}, {_shape(eager)}, want equal ones")
    if ref64.dtype != torch.float64 or ours.dtype != eager.dtype or ours.dtype not in _RELATIVE_FLOOR:
        raise ValueError(
            f"{name}: dtypes ours {ours.dtype}, ref64 {ref64.dtype}, eager {eager.dtype}, "
            "want one floating dtype for ours and eager, and torch.float64 for ref64"
        )
    if ours.numel() == 0:
        return
    _assert_same_nonfinite(ours, ref64, name)
    finite = ref64.isfinite()
    truth = ref64.where(finite, 0.0)
    ours_error = (ours.double() - truth).where(finite, 0.0).abs()
    eager_error = (eager.double() - truth).where(finite & eager.isfinite(), 0.0).abs()
    _assert_blocks(ours_error, eager_error, truth, _RELATIVE_FLOOR[ours.dtype], block_rows, name)

    worst = int(ours_error.argmax())
    few_roundings = _SUM_ROUNDINGS.get(ours.dtype, 1) * torch.finfo(ours.dtype).eps
    bound = 2 * (eager_error.max() + few_roundings * truth.abs().max()).item()
    if ours_error.flatten()[worst] > bound:
        raise AssertionError(
            f"{name}: largest error {ours_error.max():.3e} at {_position(worst, ours)} "
            f"(got {ours.flatten()[worst]:.6g}, want {truth.flatten()[worst]:.6g}), allowed {bound:.3e} "
            f"(eager's largest error {eager_error.max():.3e}, largest entry {truth.abs().max():.3e})"
        )


def assert_logps_close(
    ours: Tensor, ref64: Tensor, input_dtype: torch.dtype, *, hidden_size: int = 0, name: str = "logps"
) -> None:
    """Hold log-probabilities to ``accuracy.logps_bound``: 1e-5 nats and what the hardware's sums add.

    Where the spacing of ``ours`` is wider than that (beyond 84 nats in fp32), to one spacing.

    Args:
        ours: any shape, fp32 (fp64 for fp64 inputs), on the device that computed it.
        ref64: the same shape, fp64.
        input_dtype: dtype of the hidden states and the weight.
        hidden_size: terms of the sum behind each logit; 0 where the logits were given.

    Raises:
        AssertionError: with the worst token, its numbers and what was allowed.
        ValueError: shapes or dtypes that cannot be compared.
    """
    want_dtype = torch.promote_types(input_dtype, torch.float32)
    if ours.shape != ref64.shape or ours.dtype != want_dtype or ref64.dtype != torch.float64:
        raise ValueError(
            f"{name}: got {_shape(ours)} {ours.dtype} and {_shape(ref64)} {ref64.dtype}, "
            f"want equal shapes, {want_dtype} and torch.float64"
        )
    if ours.numel() == 0:
        return
    _assert_same_nonfinite(ours, ref64, name)
    truth = ref64.where(ref64.isfinite(), 0.0)
    error = (ours.double() - truth).where(ref64.isfinite(), 0.0).abs()
    bound = logps_bound(hidden_size, input_dtype, capability_of(ours.device))
    allowed = (truth.abs() * torch.finfo(ours.dtype).eps).clamp(min=bound)
    worst = int((error / allowed).argmax())
    if not (error <= allowed).all():
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3e} nats at {_position(worst, ours)} "
            f"(got {ours.flatten()[worst]:.8g}, want {truth.flatten()[worst]:.8g}), "
            f"allowed {allowed.flatten()[worst]:.1e}; "
            f"{int((error > allowed).sum())} of {error.numel()} are out"
        )


def _assert_blocks(
    ours_error: Tensor, eager_error: Tensor, truth: Tensor, floor: float, block_rows: int, name: str
) -> None:
    columns = truth.shape[-1] if truth.dim() > 1 else 1
    rows = truth.numel() // columns
    starts = list(range(0, rows, block_rows))
    if truth.dim() == 1 and len(starts) > 1 and rows - starts[-1] < block_rows // 2:
        starts.pop()
    ends = [*starts[1:], rows]

    def norms(x: Tensor) -> Tensor:
        flat = x.reshape(rows, columns)
        return torch.stack([flat[a:b].norm() for a, b in zip(starts, ends, strict=True)])

    ours, eager, ref = norms(ours_error), norms(eager_error), norms(truth)
    bound = 2 * eager + floor * ref
    if (ours <= bound).all():
        return
    worst = int((ours / bound).nan_to_num(0.0).argmax())  # 0 / 0: an all-zero block, as it must be
    unit = ref[worst].item() or 1.0
    raise AssertionError(
        f"{name}: rows {starts[worst]}:{ends[worst]} have relative L2 error {ours[worst] / unit:.3e}, "
        f"allowed {bound[worst] / unit:.3e} = 2 x eager's {eager[worst] / unit:.3e} + {floor:.1e} "
        f"(norm of the truth {ref[worst]:.3e}); {int((ours > bound).sum())} of {len(starts)} blocks are out"
    )


def _assert_same_nonfinite(ours: Tensor, ref64: Tensor, name: str) -> None:
    for what, wrong in (
        ("NaN", ours.isnan() != ref64.isnan()),
        ("+inf", (ours == torch.inf) != (ref64 == torch.inf)),
        ("-inf", (ours == -torch.inf) != (ref64 == -torch.inf)),
    ):
        if wrong.any():
            at = int(wrong.flatten().nonzero()[0])
            raise AssertionError(
                f"{name}: {what} in other places than the truth, {int(wrong.sum())} times, first at "
                f"{_position(at, ours)}: got {ours.flatten()[at]:.6g}, want {ref64.flatten()[at]:.6g}"
            )


def _position(index: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
