"""The argument checks of ``fused_dpo_loss`` and ``dpo_loss_from_logps``, all before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.aggregate import check_cu_seqlens
from fastdpo.losses.reference_combination import COMBINATIONS, ReferenceCombination
from fastdpo.ops.checks import as_head, check_token_layout, fail
from fastdpo.types import LMHead, PackedLayout, TokenLayout

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int64, torch.int32)


def check_batch(name: str, value: object, layout: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor that sets the batch's shape, its layout, and an even number of sequences."""
    tokens = check_tensor(name, value)
    check_like(name, tokens, tokens, dtypes)
    if layout is None:
        if tokens.dim() != 2 or len(tokens) % 2:
            raise fail(name, f"shape {tuple(tokens.shape)}", "(2P, T), chosen rows first, or a layout")
        return tokens
    if not isinstance(layout, PackedLayout):
        raise fail("layout", type(layout).__name__, "None, a PackedLayout or a TokenLayout")
    if tokens.dim() != 1:
        raise fail(name, f"shape {tuple(tokens.shape)}", "(N_all,) with a PackedLayout")
    check_tensor("layout.cu_seqlens", layout.cu_seqlens)
    check_cu_seqlens(layout.cu_seqlens, layout.lengths, tokens)
    if len(layout.cu_seqlens) % 2 == 0:
        raise fail("layout.cu_seqlens", f"{len(layout.cu_seqlens)} bounds", "2P + 1 of them")
    return tokens


def reference_head(
    head: LMHead, ref_hidden: Tensor | None, ref_lm_head: object, name: str = "ref_lm_head"
) -> LMHead:
    """The reference's head: the one given, else the policy's. Of one with an adapter the caller has to say
    which is meant: the reference of such a policy is nearly always the plain head."""
    if ref_lm_head is not None:
        return as_head(ref_lm_head, name, takes_adapter=True)
    if ref_hidden is not None and head.adapter is not None:
        raise fail(name, "None with an adapter on lm_head", "the reference's head (without it, say)")
    return head


def check_layout_call(layout: TokenLayout, hidden: Tensor, labels: object, nll_labels: object) -> None:
    """A ``TokenLayout`` of pairs, and nothing beside it that it has itself."""
    for name, value in (("labels", labels), ("nll_labels", nll_labels)):
        if value is not None:
            raise fail(name, "a value together with a TokenLayout", "None: the layout has the tokens")
    check_token_layout(layout, hidden)
    if layout.lengths is not None and len(layout.lengths) % 2:
        raise fail("layout.lengths", f"{len(layout.lengths)} sequences", "2P of them")


def check_layout_logps(layout: TokenLayout, logps: Tensor, nll_mask: object) -> None:
    """Log-probabilities ``(N,)`` of the tokens of a ``TokenLayout`` of pairs."""
    if nll_mask is not None:
        raise fail("nll_mask", "a value together with a TokenLayout", "None")
    check_like("token.logps", logps, layout.target_ids, FLOAT_DTYPES)
    if layout.lengths is not None and len(layout.lengths) % 2:
        raise fail("layout.lengths", f"{len(layout.lengths)} sequences", "2P of them")


def check_reference(
    tokens: Tensor,
    num_pairs: int,
    hidden_shape: tuple[int, ...],
    ref_hidden: Tensor | None,
    ref_lm_head: object,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    combination: ReferenceCombination | None = None,
) -> None:
    """At most one source of reference log-probabilities, in a shape that fits.

    ``tokens`` sets the shape of per-token tensors, ``hidden_shape`` is ``hidden``'s without H.
    """
    if combination is not None and ref_logps is None:
        raise fail("ref_combination", "a value without ref_logps", "ref_logps of K references")
    if ref_lm_head is not None and ref_hidden is None:
        raise fail("ref_lm_head", "a head without ref_hidden", "ref_hidden as well")
    if ref_hidden is not None:
        check_tensor("ref_hidden", ref_hidden)
        if ref_logps is not None:
            raise fail("ref_logps", "a value together with ref_hidden", "one of the two")
        if tuple(ref_hidden.shape[:-1]) != tuple(hidden_shape):
            wanted = f"(*{tuple(hidden_shape)}, H), as hidden"
            raise fail("ref_hidden", f"shape {tuple(ref_hidden.shape)}", wanted)
    name = "ref_logps" if token_weights is None else "ref_logps (with token_weights)"
    sums: tuple[int, ...] | None = None if token_weights is not None else (2 * num_pairs,)
    if isinstance(ref_logps, Tensor):
        shape = tuple(ref_logps.shape)
        shapes = [one for one in (sums, tuple(tokens.shape)) if one is not None]
        if combination is not None:
            if shape[1:] not in shapes or shape[0] == 0:
                wanted = " or ".join(f"(K, {', '.join(map(str, one))})" for one in shapes)
                raise fail(f"{name}, with ref_combination", f"shape {shape}", f"{wanted} of K references")
            sums = shape
        elif shape not in shapes and shape[1:] in shapes:
            ways = f"ref_combination to say how {shape[0]} references become one: {', '.join(COMBINATIONS)}"
            raise fail(name, f"shape {shape}", f"{' or '.join(map(str, shapes))}, or {ways}")
    check_like(name, ref_logps, tokens, FLOAT_DTYPES, sums)


def check_like(
    name: str,
    value: Tensor | None,
    tokens: Tensor,
    dtypes: tuple[torch.dtype, ...],
    other_shape: tuple[int, ...] | None = None,
) -> None:
    """Unless None, ``value`` has the shape of ``tokens`` (or the other), its device, and a listed dtype."""
    if value is None:
        return
    check_tensor(name, value)
    shapes = [tuple(tokens.shape)] if other_shape is None else [other_shape, tuple(tokens.shape)]
    if tuple(value.shape) not in shapes:
        raise fail(name, f"shape {tuple(value.shape)}", " or ".join(map(str, shapes)))
    if value.dtype not in dtypes:
        raise fail(name, value.dtype, " or ".join(map(str, dtypes)))
    if value.device != tokens.device:
        raise fail(name, value.device, f"{tokens.device}, the device of the batch")


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
    return value
