"""The contract of a row kernel: what every backend implements, and nothing else.

A chunk of raw products ``x = W h`` of C tokens becomes, row by row, z = softcap(s (x + b)) / tau and

    logp = z_y - lse,    lse = logsumexp(z),    p = exp(z - lse),
    D    = (onehot(y) - p) * cf,                cf = 1 - (softcap(..) / cap)^2, 1 without a cap

D is the gradient of logp with respect to x up to the factor s / tau, which the caller folds into
its per-row coefficient. Each logit is read from memory once where the row fits on chip.

Rules that hold for every backend:

* A label outside 0..V-1 gives logp = NaN and a D row without a one-hot; no memory outside the row is
  touched. (Ignored tokens never get here.)
* -inf logits are legal (a masked vocabulary): their p is 0. A row that is all -inf gives NaN, as
  log_softmax does. NaN stays in its row.
* All sums are in fp32 (fp64 for fp64 logits), in an order that depends on V and the backend alone.
* The logits chunk is scratch: a backend may overwrite it.
* Rows are addressed with 64-bit offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LogitTransform:
    """z = softcap(scale * (x + bias)) / temperature."""

    bias: Tensor | None = None  # (V,) in the accumulation dtype, contiguous
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def grad_scale(self) -> float:
        """The part of dz/dx that is the same for every logit: s / tau."""
        return self.scale / self.temperature


class RowOutputs(NamedTuple):
    """Per-row results, each ``(C,)`` contiguous, written by the kernel; None where not wanted."""

    logps: Tensor  # fp32 (fp64 for fp64 logits)
    lse: Tensor  # the same
    entropy: Tensor | None = None  # lse - sum p z
    log_sum_sq_probs: Tensor | None = None  # log sum p^2
    mean_logit: Tensor | None = None  # sum z / V
    is_top1: Tensor | None = None  # bool: z_y equals the row's maximum


class RowKernel(Protocol):
    """Process one chunk; see the module's docstring for the maths and the rules."""

    def __call__(
        self,
        logits: Tensor,  # (C, V) fp32, bf16 (or fp64: reference only); rows contiguous, any row stride >= V
        labels: Tensor,  # (C,) int64, contiguous
        transform: LogitTransform,
        outputs: RowOutputs,
        *,
        # (C,) fp32: the raw product x_y of the label, unrounded. Given only with bf16 logits; the kernel
        # puts it in the place of the label's logit, which makes logp and lse exact in the target's share.
        target_logits: Tensor | None = None,
        # (C, V) fp32, bf16, fp16 (fp64): receives D; rows contiguous, any row stride. It may start at the
        # address of `logits` (16-bit D in the front of each fp32 row, or the same dtype in place) and
        # then has the byte stride of `logits` rows exactly; otherwise it does not overlap.
        d_out: Tensor | None = None,
        # (3, C) fp32 contiguous: a, b, c. With them d_out receives, instead of D,
        #   cf * (a (onehot - p) + b p - c p (log p + entropy)),
        # the gradient of a * logp + b * lse + c * entropy. p log p is 0 where p is 0.
        grad_coeffs: Tensor | None = None,
    ) -> None: ...
