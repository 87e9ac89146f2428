"""How far from fp64 a right result may be: every promise of accuracy, as a function of what does the sums.

A logit is a sum over H products, and its error is the hardware's (``hardware_sums``). The promise is for
logits like those of trained models, of standard deviation 3, and grows with them: at a label four standard
deviations down, where z = -12, beside a softmax whose mean logit is 9 (standard deviation 3 as well, for any
large vocabulary), a log-probability is off by what both sums are off by.

**Tensor cores** cut off at every step. The sum of K = ``products`` products and the accumulator keeps F =
``fraction_bits``, fp32 keeps 23: the accumulator loses (1 - 2^(23 - F)) / 2 of its last place a step on
average, H / K times. A last place is 2^-23 of the power of two below, which is 0.72 of the accumulator on
average, and that grows to z evenly: half of z. So a log-probability drifts by 0.36 (12 + 9) = 7.6 such units
of H / K (1 - 2^(23 - F)) / 2 2^-23. Around this drift single labels spread by 0.75 + 12.5 / sqrt(H) units
(simulated: the paths, and products that are cut off too); four and a half times that is granted::

    (11 + 56 / sqrt(H)) H / K (1 - 2^(23 - F)) / 2 2^-23

**A chain of fused multiply-adds** (fp32 operands, and CPUs, which take 16-bit operands as fp32) rounds to
nearest: H roundings of random sign, each with a standard deviation of 12^(-1/2) of a last place, whose mean
square is 2^-46 0.54 z^2 / 3 on the way to z: 1.6 2^-23 sqrt(H) at |z| = 13. Five standard deviations are
granted, which none of the labels of a batch passes: 8 2^-23 sqrt(H). Chains cut into pieces, as by most
libraries, err by less.

**TF32**, if torch allows it, is a tensor core for fp32 operands, with half as many products a step. It cuts
both factors off at 10 bits, which shrinks every logit by 2^-11 0.72 of each: 1.5e-2 nats by the same count,
and 1e-3 of spread. 2.2e-2 is granted, about as much as for logits rounded to bf16.

Whatever is made of the logits (softmax, logarithm, the result itself) is granted 84 2^-23, 1e-5 nats.
"""

from __future__ import annotations

import torch

from fastdpo.testing.hardware_sums import TensorCore, summed_by

# Of a softmax's logarithm over logits that are given: its sum, exp and log, the result's own rounding.
RESULT_EPS = 84
_TF32 = 2.2e-2
_DRIFT, _SPREAD = 11.0, 56.0
_CHAIN_EPS = 8
Capability = tuple[int, int]


def capability_of(device: torch.device | str) -> Capability | None:
    """Compute capability of a CUDA device; None of a CPU."""
    device = torch.device(device)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def truncated(num_terms: int, core: TensorCore) -> float:
    """What a tensor core cuts off a sum whose accumulator stays at 1, on average: the unit of this module."""
    return num_terms / core.products * (1 - 2.0 ** (23 - core.fraction_bits)) / 2 * 2**-23


def sum_error(
    hidden_size: int, dtype: torch.dtype, capability: Capability | None = None, *, tf32: bool = False
) -> float:
    """What the sum behind a logit may add to the error of a log-probability, in nats.

    Args:
        hidden_size: terms of the sum; 0 where the logits are given.
        dtype: of the operands.
        capability: of the GPU; None for a CPU.
        tf32: whether torch lets fp32 operands take TF32.
    """
    core = summed_by(dtype, capability, tf32=tf32)
    if core is None:
        return _CHAIN_EPS * _eps(dtype) * float(hidden_size) ** 0.5
    if hidden_size == 0:
        return 0.0
    of_operands = _TF32 if dtype.itemsize == 4 else 0.0
    return of_operands + (_DRIFT + _SPREAD / float(hidden_size) ** 0.5) * truncated(hidden_size, core)


def logps_bound(
    hidden_size: int, dtype: torch.dtype, capability: Capability | None = None, *, tf32: bool = False
) -> float:
    """By how much a log-probability may differ from fp64, in nats; arguments as in :func:`sum_error`.

    bf16 and fp16 on Hopper and Blackwell: 8e-5 at H = 2048, 1.5e-4 at 4096, 2.8e-4 at 8192; on Ampere and Ada
    1.0e-4, 1.9e-4 and 3.7e-4. fp32, and everything on a CPU: 4e-5 at 1024, 7e-5 at 4096. In proportion more
    where logits are wider than a standard deviation of 3. For fp64 twice its own: the truth is fp64 as well.
    """
    bound = RESULT_EPS * _eps(dtype) + sum_error(hidden_size, dtype, capability, tf32=tf32)
    return 2 * bound if dtype == torch.float64 else bound


def total_bound(bound: float, num_tokens: int) -> float:
    """By how much a sum over tokens may be off whose log-probabilities are each within ``bound``, in nats.

    What tensor cores add has one sign for the logsumexp and either sign for the labels' own logits, so no
    mean is off by more than 9 / 21 of what a single token may be, half of it; the rest is random: the root of
    their number.
    """
    return bound * (num_tokens + num_tokens**0.5) / 2


def gradient_bound(
    dtype: torch.dtype,
    *,
    hidden_size: int,
    vocab_size: int,
    num_tokens: int,
    capability: Capability | None = None,
    tf32: bool = False,
) -> float:
    """By how much a gradient of hidden states or weight may differ from fp64, relative to its norm.

    Three summands: D, the product and the result are rounded to ``dtype`` once each, together within its eps;
    every probability is off by as much as its log-probability; and the products D W (V terms) and D^T X (N
    terms) are sums of the hardware's as well. D W keeps its size from the label's row on, so a tensor core
    cuts off at most one unit of V terms. The terms of D^T X may all have one sign: then products are cut off
    as the accumulator is, four units of N terms. A chain's roundings are random.
    """
    core = summed_by(dtype, capability, tf32=tf32)
    if core is None:
        of_products = _eps(dtype) / 4 * max(vocab_size, num_tokens) ** 0.5
    else:
        of_products = max(truncated(vocab_size, core), truncated(4 * num_tokens, core))
    return torch.finfo(dtype).eps + logps_bound(hidden_size, dtype, capability, tf32=tf32) + of_products


def _eps(dtype: torch.dtype) -> float:
    """Of what sums of ``dtype`` are kept in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps
