"""Op bodies on meta tensors, as they run on a GPU: no memory, no values, and every call of torch is seen.

A meta tensor has no values, so whatever would read one (``.item()``, ``bool()``, ``.tolist()``, a size that
hangs on data) raises; and shapes can be those of a real head. Kernels are stubs: a GPU's are not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastdpo.kernels import lean_triton, matmul, scale_triton
from fastdpo.ops import backends, divergence_plan, head_call, lean_backward, lean_merge, library, sequence
from fastdpo.ops.chunked import backward_chunks, forward_chunks
from fastdpo.ops.gradients import TokenGrads
from fastdpo.ops.grouped_chunks import GroupedResults, GroupLoss, grouped_chunks
from fastdpo.ops.head_call import HeadCall
from fastdpo.ops.lean import forward_lean
from fastdpo.ops.lean_backward import backward_lean
from fastdpo.ops.library import CallOptions
from fastdpo.plan.modes import LEAN_STASH
from fastdpo.plan.schedule import RowGroup

Seen = Callable[[str], None]


@contextmanager
def pretended_gpu(
    num_multiprocessors: int = 132, seen: Seen = lambda kernel: None, backend: str | None = None
) -> Iterator[None]:
    """What asks for the device's kind is told: a GPU, whose GEMMs sum 16-bit operands in fp32.

    Args:
        num_multiprocessors: of that GPU.
        seen: called with the name of every kernel of ours that would be launched.
        backend: what ``auto`` is on it; None leaves it at what runs here on meta tensors, ``reference``.
    """

    def kernel(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: seen(name)

    of_sequences = SimpleNamespace(sigmoid_pairs=kernel("sequence"), sequence_sums=kernel("sequence"))
    patches = [
        (head_call, "load_row_kernel", lambda name: kernel("row")),
        (lean_merge, "load_row_kernel", lambda name: kernel("row")),
        (lean_backward, "_load_slab_gradient", lambda call: kernel("slab")),
        (lean_triton, "lean_logprobs", kernel("store-free")),
        (sequence, "load_sequence_kernels", lambda name: of_sequences),
        (scale_triton, "unavailable_reason", lambda device: None),
        (scale_triton, "scale_", kernel("scale")),
        (library, "num_multiprocessors", lambda device: num_multiprocessors),
        (divergence_plan, "num_multiprocessors", lambda device: num_multiprocessors),
        (matmul, "is_gpu", lambda device: True),
    ]
    if backend is not None:
        patches += [(module, "resolve_backend", lambda *args: backend) for module in (backends, library)]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        yield


def make_call(
    mode: str,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    index_kind: str = "tokens",
    weight_dtype: torch.dtype = torch.bfloat16,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    pair_length: int = 512,
    has_reference: bool = False,
    **needs: bool,
) -> HeadCall:
    """A call of bf16 operands and fp32 logits, every row of hidden a labelled token's."""
    hidden = torch.empty(num_tokens, hidden_size, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(vocab_size, hidden_size, device="meta", dtype=weight_dtype)
    tokens = torch.empty(num_tokens, device="meta", dtype=torch.int64)
    options = CallOptions(
        1.0, None, 1.0, mode, "reference", torch.bfloat16, torch.float32, workspace_mib, cache_mib
    )
    loss_rows = [*range(0, num_tokens, pair_length), num_tokens] if mode == "pairs" else [0]
    return library.head_call(
        hidden, weight, None, tokens, tokens, index_kind, options,
        ref_hidden=hidden if has_reference else None, loss_rows=loss_rows, **needs,
    )  # fmt: skip


def no_loss(logps: Tensor, ref_logps: Tensor | None, group: RowGroup) -> tuple[Tensor, Tensor]:
    """The loss of a group, where it does not matter."""
    return logps.new_zeros((), dtype=torch.float64), torch.zeros_like(logps)


def run_forward(call: HeadCall, *, statistics: Any = (), group_loss: GroupLoss = no_loss) -> Any:
    """The forward pass of what the call's mode has gradients of; in ``pairs`` that makes them."""
    if call.plan.mode == "pairs":
        needs = {"needs_hidden": True, "needs_weight": True, "needs_bias": False}
        return grouped_chunks(call, statistics, group_loss, **needs)
    return (forward_lean if call.plan.mode == "lean" else forward_chunks)(call, statistics)


def run_backward(
    call: HeadCall, forward: Any, *, has_lse: bool = False, grad_weight_out: Tensor | None = None
) -> Any:
    """The backward pass from what the forward pass gave; of ``pairs`` nothing is left to do here."""
    if call.plan.mode == "score" or isinstance(forward, GroupedResults):
        return forward
    outputs, _, kept, _ = forward
    upstream = torch.empty_like(outputs.logps)
    grads = TokenGrads(upstream, upstream if has_lse else None)
    needs = {"needs_hidden": True, "needs_weight": not call.plan.keeps_product, "needs_bias": False}
    if call.plan.mode == "lean" and not call.plan.keeps_product:
        return backward_lean(call, outputs, grads, **needs, grad_weight_out=grad_weight_out)
    return backward_chunks(call, kept, outputs, grads, **needs, grad_weight_out=grad_weight_out)


def run_call(
    call: HeadCall, *, has_lse: bool = False, grad_weight_out: Tensor | None = None, statistics: Any = ()
) -> Any:
    """Both passes."""
    forward = run_forward(call, statistics=statistics)
    return run_backward(call, forward, has_lse=has_lse, grad_weight_out=grad_weight_out)


# What runs as each mode: `lean` is two, by who needs a gradient.
MODES = ("score", "stash", "cache", "recompute", "pairs", "lean", LEAN_STASH)
