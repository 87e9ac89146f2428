"""Per-token log-probabilities to sums per sequence, differentiable, and to the DPO loss with its gradient.

``sequence_sums`` is a registered op with autograd. ``sigmoid_pairs`` gives the loss and its gradient with
respect to the tokens in one launch, so it needs no autograd. ``kernels/sequence.py`` has the maths and the
rules. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels.sequence import SigmoidOutputs, SigmoidTerms
from fastdpo.ops.backends import load_sequence_kernels, resolve_backend
from fastdpo.ops.checks import fail
from fastdpo.types import BACKENDS

VALUE_DTYPES = (torch.float32, torch.float64)
WEIGHT_DTYPES = (*VALUE_DTYPES, torch.bfloat16, torch.float16)


@torch.library.custom_op(
    "fastdpo::sequence_sums",
    mutates_args=(),
    schema="(Tensor values, Tensor? weights, Tensor? mask, Tensor offsets, Tensor sequence_ids, str backend) "
    "-> Tensor",
)
def sequence_sums_op(
    values: Tensor,  # (N,)
    weights: Tensor | None,  # (N,) in the dtype of the values
    mask: Tensor | None,  # (N,) bool
    offsets: Tensor,  # (S + 1,) int64
    sequence_ids: Tensor,  # (N,) int64, for the backward pass: anything where there will be none
    backend: str,
) -> Tensor:
    """``(S,)`` in the dtype of the values."""
    kernels = load_sequence_kernels(resolve_backend(backend, values.device, values.dtype))
    out = values.new_empty(offsets.shape[0] - 1)
    weights, mask = _contiguous(weights), _contiguous(mask)
    kernels.sequence_sums(values.contiguous(), offsets.contiguous(), out, weights=weights, mask=mask)
    return out


@sequence_sums_op.register_fake
def _(
    values: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor,
    sequence_ids: Tensor,
    backend: str,
) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weights, mask, _, sequence_ids, _ = inputs
    ctx.save_for_backward(weights, mask, sequence_ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, mask, sequence_ids = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise RuntimeError("weights: fastdpo::sequence_sums has no gradient for them; detach them")
    grad_values = grad.index_select(0, sequence_ids)
    if weights is not None:
        grad_values = grad_values * weights
    if mask is not None:
        grad_values = grad_values.where(mask, 0)
    return grad_values, None, None, None, None, None


sequence_sums_op.register_autograd(_backward, setup_context=_setup_context)


def sequence_sums(
    values: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of every sequence's tokens; differentiable in ``values``, also under torch.compile.

    Args:
        values: ``(N,)`` float32 or float64, the tokens sequence after sequence, as log-probabilities in nats.
        offsets: ``(S + 1,)`` int64 or int32, rising from 0 to N: sequence s has the tokens ``offsets[s]`` to
            ``offsets[s + 1] - 1``, possibly none. Read, to be checked, on the CPU only.
        weights: ``(N,)`` floating point, without a gradient; converted to the dtype of ``values``.
        mask: ``(N,)`` bool: the tokens that count. Values and weights of the others may be NaN.
        sequence_ids: ``(N,)`` int64, each token's sequence, as ``token_sequence_ids`` makes it. None: made
            here, where a gradient is wanted.
        backend: ``auto``, or the name of one that runs on this device.

    Returns:
        ``(S,)`` in the dtype of ``values``; sums in fp64, rounded once; 0 for an empty sequence.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
        TypeError: what should be a tensor is none; float64 on a backend that has none.

    Example:
        >>> sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2, 3]))
        tensor([-3.,  0., -4.])
    """
    _check_tokens(values, offsets, weights, mask, backend)
    if sequence_ids is not None:
        _check_tensor("sequence_ids", sequence_ids, (values.shape[0],), (torch.int64,), values.device)
    elif torch.is_grad_enabled() and values.requires_grad:
        sequence_ids = token_sequence_ids(offsets, values.shape[0])
    else:
        sequence_ids = offsets.new_empty(0, dtype=torch.int64)
    if weights is not None:
        weights = weights.to(values.dtype)
    result: Tensor = sequence_sums_op(values, weights, mask, offsets.long(), sequence_ids, backend)
    return result


def token_sequence_ids(offsets: Tensor, num_tokens: int) -> Tensor:
    """The sequence of each token: ``(N,)`` int64 from the ``(S + 1,)`` offsets, without a synchronisation.

    Example:
        >>> token_sequence_ids(torch.tensor([0, 2, 2, 3]), 3)
        tensor([0, 0, 2])
    """
    position = torch.arange(num_tokens, device=offsets.device, dtype=offsets.dtype)
    # As many ends lie at or before a token as there are sequences before its own.
    return torch.searchsorted(offsets[1:].contiguous(), position, right=True)


def sigmoid_pairs(
    values: Tensor,
    offsets: Tensor,
    *,
    divisor: float | Tensor,
    beta: float | Tensor = 0.1,
    margin: float | Tensor | None = None,
    soft_labels: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    pair_weights: float | Tensor | None = None,
    ref_sums: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> SigmoidOutputs:
    """The DPO loss of P pairs with its gradient with respect to every token, in one launch; detached.

    The loss named ``sigmoid`` of ``fastdpo.LOSSES``, of the same meaning and with the same arguments: with
    h = beta * (log-ratio of chosen - log-ratio of rejected) - margin, the sum over pairs of
    pair_weight * (q softplus(-h) + (1 - q) softplus(h)) / divisor, where q is ``soft_labels`` or
    1 - ``label_smoothing``. A pair without a token that counts adds nothing.

    Args:
        values: ``(N,)`` float32 or float64 log-probabilities, in nats, in pair order: pair 0's chosen tokens,
            pair 0's rejected tokens, pair 1's chosen ones, and so on.
        offsets: ``(2P + 1,)`` int64 or int32, rising from 0 to N; answers may be empty. Read, to be checked,
            on the CPU only.
        divisor: what the sum is divided by, a positive number or a 0-d tensor; for a mean their number.
        beta: positive. It, ``margin``, ``soft_labels`` in [0, 1] and ``pair_weights`` of at least 0 are each
            a number or a ``(P,)`` or 0-d floating-point tensor; what is in a tensor is not checked.
        label_smoothing: the probability in [0, 0.5) that a label is wrong; not together with ``soft_labels``.
        ref_sums: ``(2P,)`` sums of the reference's log-probabilities, in pair order; None for zeros.
        weights, mask: as in ``sequence_sums``.
        backend: ``auto``, or the name of one that runs on this device.

    Returns:
        ``SigmoidOutputs``: sums ``(2P,)`` in the dtype of ``values``, loss ``()`` in float64, and g ``(N,)``,
        the gradient of the loss with respect to ``values``, 0 where masked. Tensors of another dtype are
        converted to that of ``values`` first, 0-d ones made ``(P,)``: one more launch each.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
        TypeError: what should be a tensor is none; float64 on a backend that has none.

    Source: Rafailov et al., arXiv:2305.18290 eq. 7; label smoothing: E. Mitchell, "A note on DPO with noisy
    preferences", eq. 3.
    """
    _check_tokens(values, offsets, weights, mask, backend)
    num_sequences = offsets.shape[0] - 1
    if num_sequences % 2:
        raise fail("offsets", f"{num_sequences + 1} bounds", "2P + 1 of them")
    if soft_labels is not None and label_smoothing != 0:
        raise fail("label_smoothing", f"{label_smoothing} together with soft_labels", "one of the two")
    if ref_sums is not None:
        _check_tensor("ref_sums", ref_sums, (num_sequences,), VALUE_DTYPES, values.device)

    def number(name: str, value: float | Tensor) -> float | Tensor:
        return _number(name, value, num_sequences // 2, values)

    smoothed = 1.0 - _check_number("label_smoothing", label_smoothing)
    terms = SigmoidTerms(
        beta=number("beta", beta),
        margin=0.0 if margin is None else number("margin", margin),
        preferred=smoothed if soft_labels is None else number("soft_labels", soft_labels),
        pair_weights=1.0 if pair_weights is None else number("pair_weights", pair_weights),
        divisor=number("divisor", divisor),
        ref_sums=None if ref_sums is None else ref_sums.detach().to(values.dtype).contiguous(),
    )
    sums, g = values.new_empty(num_sequences), values.new_empty(values.shape[0])
    outputs = SigmoidOutputs(sums, values.new_empty((), dtype=torch.float64), g)
    kernels = load_sequence_kernels(resolve_backend(backend, values.device, values.dtype))
    kernels.sigmoid_pairs(
        values.detach().contiguous(),
        offsets.long().contiguous(),
        terms,
        outputs,
        weights=None if weights is None else weights.to(values.dtype).contiguous(),
        mask=_contiguous(mask),
    )
    return outputs


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: x > 0, "a positive number"),
    "margin": (lambda x: True, "a finite number"),
    "soft_labels": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "a number in [0, 0.5)"),
    "pair_weights": (lambda x: x >= 0, "a number of at least 0"),
    "divisor": (lambda x: x > 0, "a positive number"),
}


def _check_number(name: str, value: object) -> float:
    is_in_range, wanted = _RANGES[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and is_in_range(value)):  # type: ignore[arg-type]
        raise fail(name, repr(value), wanted)
    return float(value)  # type: ignore[arg-type]


def _number(name: str, value: float | Tensor, num_pairs: int, values: Tensor) -> float | Tensor:
    """A number as it is; a tensor as the kernels take it: ``()`` for the divisor, else ``(P,)``."""
    if not isinstance(value, Tensor):
        return _check_number(name, value)
    is_divisor = name == "divisor"
    if value.dim() > 0 and (is_divisor or tuple(value.shape) != (num_pairs,)):
        wanted = "a number or a 0-d tensor" if is_divisor else f"a number or ({num_pairs},)"
        raise fail(name, f"shape {tuple(value.shape)}", wanted)
    if not (value.is_floating_point() or (is_divisor and not value.is_complex())):
        raise fail(name, value.dtype, "a floating-point tensor")
    if value.device != values.device:
        raise fail(name, value.device, f"{values.device}, the device of values")
    value = value.detach().to(values.dtype)
    return value if is_divisor else value.expand(num_pairs).contiguous()


def _check_tokens(
    values: Tensor, offsets: Tensor, weights: Tensor | None, mask: Tensor | None, backend: str
) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values: got {type(values).__name__}, wanted a Tensor")
    if values.dim() != 1:
        raise fail("values", f"shape {tuple(values.shape)}", "(N,)")
    shape, device = tuple(values.shape), values.device
    _check_tensor("values", values, shape, VALUE_DTYPES, device)
    _check_tensor("offsets", offsets, None, (torch.int64, torch.int32), device)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise fail("offsets", f"shape {tuple(offsets.shape)}", "(S + 1,)")
    if weights is not None:
        _check_tensor("weights", weights, shape, WEIGHT_DTYPES, device)
        if weights.requires_grad:
            raise fail("weights", "a tensor that requires a gradient", "a detached one: they get none")
    if mask is not None:
        _check_tensor("mask", mask, shape, (torch.bool,), device)
    if backend not in BACKENDS:
        raise fail("backend", repr(backend), f"one of {BACKENDS}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        is_rising = bool((offsets[1:] >= offsets[:-1]).all())
        if not (is_rising and offsets[0] == 0 and offsets[-1] == len(values)):
            raise fail("offsets", offsets, f"offsets that rise from 0 to {len(values)}")


def _check_tensor(
    name: str,
    value: object,
    shape: tuple[int, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
    if shape is not None and tuple(value.shape) != shape:
        raise fail(name, f"shape {tuple(value.shape)}", f"{shape}")
    if value.dtype not in dtypes:
        raise fail(name, value.dtype, " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if value.device != device:
        raise fail(name, value.device, f"{device}, the device of values")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
