"""The argument checks on the way from hidden states, or log-probabilities, to a loss: before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.functional.kinds import DIVERGENT, loss_names, needs_token_logps
from fastdpo.losses.aggregate import check_cu_seqlens
from fastdpo.losses.batches import DivergencePairLogps
from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.objective import Objective
from fastdpo.losses.reference_combination import COMBINATIONS, ReferenceCombination
from fastdpo.losses.token_batches import TokenDivergences, TokenLogps
from fastdpo.ops.checks import as_head, fail
from fastdpo.types import LMHead, PackedLayout, TokenLayout

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int64, torch.int32)
# What is one number per segment, and its dtype where only one will do.
PER_SEGMENT = {
    "is_desirable": torch.bool, "group_ids": torch.int64, "scores": None, "advantages": None,
    "win_rates": None,
}  # fmt: skip


def check_batch(
    name: str, value: object, layout: object, dtypes: tuple[torch.dtype, ...], *, in_pairs: bool
) -> Tensor:
    """The tensor that sets the batch's shape, its layout, and of pairs an even number of sequences.

    ``value`` is it, but for the labels of a ``TokenLayout``, which has them itself.
    """
    if isinstance(layout, TokenLayout):
        check_like(name, value, layout.target_ids, dtypes)  # type: ignore[arg-type]
        if in_pairs and layout.lengths is not None and len(layout.lengths) % 2:
            raise fail("layout.lengths", f"{len(layout.lengths)} sequences", "2P of them")
        return layout.target_ids
    tokens = check_tensor(name, value)
    check_like(name, tokens, tokens, dtypes)
    if layout is None:
        if tokens.dim() != 2 or (in_pairs and len(tokens) % 2):
            wanted = "(2P, T), chosen rows first, or a layout" if in_pairs else "(B, T), or a layout"
            raise fail(name, f"shape {tuple(tokens.shape)}", wanted)
        return tokens
    if not isinstance(layout, PackedLayout):
        raise fail("layout", type(layout).__name__, "None, a PackedLayout or a TokenLayout")
    if tokens.dim() != 1:
        raise fail(name, f"shape {tuple(tokens.shape)}", "(N_all,) with a PackedLayout")
    check_tensor("layout.cu_seqlens", layout.cu_seqlens)
    check_cu_seqlens(layout.cu_seqlens, layout.lengths, tokens)
    if in_pairs and len(layout.cu_seqlens) % 2 == 0:
        raise fail("layout.cu_seqlens", f"{len(layout.cu_seqlens)} bounds", "2P + 1 of them")
    return tokens


def check_not_in_layout(layout: object, **values: object) -> None:
    """None of what a ``TokenLayout`` has itself, or has no place for."""
    for name, value in values.items():
        if value is not None and isinstance(layout, TokenLayout):
            raise fail(name, "a value together with a TokenLayout", "None: the layout has the tokens")


def check_segments(
    num_segments: int, segment_ids: Tensor | None, extras: Mapping[str, Any], device: torch.device
) -> None:
    """One number per segment in what is per segment; ids that are too large, where reading them is free."""
    for name, dtype in PER_SEGMENT.items():
        if (value := extras.get(name)) is None:
            continue
        if tuple(check_tensor(name, value).shape) != (num_segments,):
            raise fail(name, f"shape {tuple(value.shape)}", f"({num_segments},)")
        if value.device != device:
            raise fail(name, value.device, f"{device}, the device of the batch")
        if dtype is not None and value.dtype != dtype:
            raise fail(name, value.dtype, str(dtype))
    is_free = segment_ids is not None and segment_ids.device.type == "cpu" and segment_ids.numel() > 0
    if is_free and not torch.compiler.is_compiling():
        assert segment_ids is not None
        if (largest := int(segment_ids.max())) >= num_segments:
            raise fail("segment_ids", largest, f"less than {num_segments}")


def reference_head(
    head: LMHead, ref_hidden: Tensor | None, ref_lm_head: object, name: str = "ref_lm_head"
) -> LMHead:
    """The reference's head: the one given, else the policy's. Of one with an adapter the caller has to say
    which is meant: the reference of such a policy is nearly always the plain head."""
    if ref_lm_head is not None:
        return as_head(ref_lm_head, name, takes_all=True)
    if ref_hidden is not None and head.adapter is not None:
        raise fail(name, "None with an adapter on lm_head", "the reference's head (without it, say)")
    return head


def check_states(
    hidden: Tensor, ref_hidden: Tensor | None, ref_lm_head: object, ref_logps: Tensor | None
) -> None:
    """At most one source of reference log-probabilities, and hidden states that fit ``hidden``."""
    if ref_lm_head is not None and ref_hidden is None:
        raise fail("ref_lm_head", "a head without ref_hidden", "ref_hidden as well")
    if ref_hidden is not None:
        check_tensor("ref_hidden", ref_hidden)
        if ref_logps is not None:
            raise fail("ref_logps", "a value together with ref_hidden", "one of the two")
        check_positions("ref_hidden", ref_hidden, hidden)


def check_positions(name: str, states: object, hidden: Tensor) -> None:
    """Hidden states, of any width, for the positions of ``hidden``."""
    shape = check_tensor(name, states).shape
    if shape[:-1] != hidden.shape[:-1]:
        raise fail(name, f"shape {tuple(shape)}", f"(*{tuple(hidden.shape[:-1])}, H), as hidden")


def check_reference(
    objective: Objective,
    like: Tensor,
    num_segments: int,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    combination: ReferenceCombination | None,
) -> None:
    """Reference log-probabilities in a shape that fits: per segment, or per token as ``like``."""
    if objective.inputs in DIVERGENT:
        # Without pairs nothing is a ratio to the reference.
        unused = {} if needs_token_logps(objective) else {"ref_logps": ref_logps}
        for name, value in ({"token_weights": token_weights} | unused).items():
            if value is not None:
                raise fail(name, f"a value that {loss_names(objective)} does not use", "None")
    if combination is not None and ref_logps is None:
        raise fail("ref_combination", "a value without ref_logps", "ref_logps of K references")
    name = "ref_logps" if token_weights is None else "ref_logps (with token_weights)"
    needs_tokens = token_weights is not None or objective.inputs in (TokenLogps, TokenDivergences)
    sums: tuple[int, ...] | None = None if needs_tokens else (num_segments,)
    if isinstance(ref_logps, Tensor):
        shape = tuple(ref_logps.shape)
        shapes = [one for one in (sums, tuple(like.shape)) if one is not None]
        if combination is not None:
            if shape[1:] not in shapes or shape[0] == 0:
                wanted = " or ".join(f"(K, {', '.join(map(str, one))})" for one in shapes)
                raise fail(f"{name}, with ref_combination", f"shape {shape}", f"{wanted} of K references")
            sums = shape
        elif objective.inputs is PairLogps and shape not in shapes and shape[1:] in shapes:
            ways = f"ref_combination to say how {shape[0]} references become one: {', '.join(COMBINATIONS)}"
            raise fail(name, f"shape {shape}", f"{' or '.join(map(str, shapes))}, or {ways}")
    check_like(name, ref_logps, like, FLOAT_DTYPES, sums)


def check_teachers(
    objective: Objective,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_lm_head: object,
    vocab_size: int | None,
    ref_logps: Tensor | None,
) -> None:
    """The hidden states that divergences need are there, and none that nothing uses."""
    names, distils = loss_names(objective), objective.inputs is TokenDivergences
    is_divergent, unused = objective.inputs in DIVERGENT, f"a value that {names} does not use"
    if teacher_lm_head is not None and teacher_hidden is None:
        raise fail("teacher_lm_head", "a head without teacher_hidden", "teacher_hidden as well")
    if vocab_size is not None and not is_divergent:
        raise fail("vocab_size", unused, "None")
    if teacher_hidden is None and distils:
        raise fail("teacher_hidden", "None", f"the hidden states of the model that {names} distils")
    if teacher_hidden is not None:
        if not distils:
            raise fail("teacher_hidden", unused, "None")
        check_positions("teacher_hidden", teacher_hidden, hidden)
    if is_divergent and objective.uses_reference and ref_hidden is None:
        wanted = f"the reference's hidden states for {names}: it needs whole distributions"
        raise fail("ref_hidden", "None", wanted)
    for name, value in (
        ("ref_hidden", None if objective.uses_reference else ref_hidden),
        ("ref_logps", ref_logps),
    ):
        if distils and value is not None:
            raise fail(name, unused, "None")


def check_like(
    name: str,
    value: Tensor | None,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
    other_shape: tuple[int, ...] | None = None,
) -> None:
    """Unless None, ``value`` has the shape of ``like`` (or the other), its device, and a listed dtype."""
    if value is None:
        return
    check_tensor(name, value)
    shapes = [tuple(like.shape)] if other_shape is None else [other_shape, tuple(like.shape)]
    if tuple(value.shape) not in shapes:
        raise fail(name, f"shape {tuple(value.shape)}", " or ".join(map(str, shapes)))
    if value.dtype not in dtypes:
        raise fail(name, value.dtype, " or ".join(map(str, dtypes)))
    if value.device != like.device:
        raise fail(name, value.device, f"{like.device}, the device of the batch")


def check_tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a tensor. Raises TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
    return value


def check_sequence_group(
    group: Any, objective: Objective, layout: PackedLayout | TokenLayout | None, extras: Mapping[str, Any]
) -> None:
    """Raise ValueError or TypeError for sequences split over ranks where their sums alone would not do."""
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"sequence_group: got {type(group).__name__}, wanted a process group")
    if objective.inputs in (TokenLogps, TokenDivergences, DivergencePairLogps):
        raise fail("sequence_group", "one with losses that look into an answer", "None, or losses of its sum")
    # How many segments there are must not hang on which of them this rank has tokens of.
    if isinstance(layout, TokenLayout) and layout.lengths is None:
        raise fail("layout.lengths", "None with sequence_group", "the tokens of every sequence on this rank")
    if extras.get("segment_ids") is not None and extras.get("num_segments") is None:
        raise fail("num_segments", "None with segment_ids and sequence_group", "the number on all ranks")
