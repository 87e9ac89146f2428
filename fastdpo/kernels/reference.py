"""The row kernel in plain torch: the backend ``reference``, which runs anywhere and takes fp64 logits too.

One chunk of x, with the gradient written out by hand. Not written for speed or memory: it holds the logits it
is given several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.definitions.logprob import by_row, log_softmax, p_log_p, token_statistics
from fastdpo.kernels.contract import LogitTransform, RowOutputs


def row_kernel(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    *,
    target_logits: Tensor | None = None,
    d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """The row kernel of ``kernels/contract.py`` in plain torch; also takes fp64 logits.

    Everything is computed before anything is written, so ``d_out`` may lie over ``logits``.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (C, V)
    in_range = (labels >= 0) & (labels < x.shape[1])
    if target_logits is not None:
        index = labels.where(in_range, 0)[:, None]
        target = target_logits.to(x.dtype)[:, None].where(in_range[:, None], x.gather(1, index))
        x = x.scatter(1, index, target)

    if transform.bias is not None:
        x = x + transform.bias
    z = transform.scale * x
    cap_factor = None  # d softcap(u) / du; 1 without a cap
    if transform.softcap is not None:
        tanh = torch.tanh(z / transform.softcap)
        z = transform.softcap * tanh
        cap_factor = 1 - tanh * tanh
    z = z / transform.temperature

    wanted = [name for name, out in outputs._asdict().items() if out is not None]
    results = token_statistics(z, labels, wanted)
    d = None if d_out is None else _logit_gradient(z, labels, in_range, grad_coeffs)
    for name in wanted:
        getattr(outputs, name).copy_(results[name])
    if d_out is not None and d is not None:
        d_out.copy_(d if cap_factor is None else d * cap_factor)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run on ``device``, or None where it can: always None."""
    return None


def _logit_gradient(z: Tensor, labels: Tensor, in_range: Tensor, grad_coeffs: Tensor | None) -> Tensor:
    """``onehot - p``, or its combination with the gradients of lse and entropy, with respect to z.

    1 - p of the label is the sum of the other p, which has all its digits where p rounds to 1.
    """
    log_p = log_softmax(z)
    p = log_p.exp()
    index = labels.where(in_range, 0)[:, None]
    others = by_row(torch.sum, p.scatter(1, index, 0.0))[:, None]
    d = (-p).scatter(1, index, others.where(in_range[:, None], -p.gather(1, index)))
    if grad_coeffs is None:
        return d
    a, b, c = grad_coeffs.to(p.dtype)[:, :, None]  # each (C, 1)
    terms = p_log_p(log_p)
    entropy = -by_row(torch.sum, terms)[:, None]
    return a * d + b * p - c * (terms + p * entropy)
