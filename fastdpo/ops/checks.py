"""Every argument check of the ops: a mistake becomes an error with the name, what was got, what is wanted.

Shapes, dtypes and devices: values are read only on a CPU, where that is free, or when a caller asks for it
and accepts that it synchronises.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdpo.ops.shard_check import check_shard
from fastdpo.types import (
    BACKENDS,
    DEFAULT_TOPK,
    MODES,
    TOKEN_STATISTICS,
    TOPK_STATISTICS,
    Execution,
    HeadAdapter,
    LMHead,
    TokenLayout,
)

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOGITS_DTYPES = (None, "fp32", "bf16")


def fail(name: str, got: object, wanted: str) -> ValueError:
    """The one form of an argument error."""
    return ValueError(f"{name}: got {got}, wanted {wanted}")


def as_head(lm_head: object, name: str = "lm_head", *, takes_all: bool = False) -> LMHead:
    """An `LMHead` from one, from a ``(V, H)`` tensor, or from an ``nn.Linear``; validated.

    ``takes_all``: whether what the head is for computes an adapter, and a shard of the vocabulary; refused
    where they would be ignored.
    """
    if isinstance(lm_head, LMHead):
        head = lm_head
    elif isinstance(lm_head, nn.Linear):
        head = LMHead(lm_head.weight, bias=lm_head.bias)
    elif isinstance(lm_head, Tensor):
        head = LMHead(lm_head)
    else:
        raise TypeError(
            f"{name}: got {type(lm_head).__name__}, wanted an LMHead, a (V, H) tensor or an nn.Linear"
        )
    if head.vocab_parallel is not None:
        if not takes_all:
            raise ValueError(f"{name}.vocab_parallel: a shard of the vocabulary is not supported here")
        check_shard(head)  # before what may fail on one rank alone
    if head.adapter is not None:
        if not takes_all:
            raise ValueError(f"{name}.adapter: LoRA on the head is not supported here; merge it first")
        head = replace(head, adapter=_as_adapter(head.adapter, f"{name}.adapter"))
    _check_head(head, name)
    return head


def _as_adapter(adapter: object, name: str) -> HeadAdapter:
    if not isinstance(adapter, tuple) or len(adapter) not in (3, 4):
        raise TypeError(f"{name}: got {type(adapter).__name__}, wanted a HeadAdapter or (A, B, scale)")
    return HeadAdapter(*adapter)


def is_same_head(head: LMHead, other: LMHead) -> bool:
    """Whether two heads are one: the same tensors, the same scalars, and no adapter, which may drop out."""
    return (
        head.adapter is None
        and other.adapter is None
        and head.vocab_parallel is other.vocab_parallel
        and head.weight is other.weight
        and head.bias is other.bias
        and (head.logit_scale, head.softcap, head.temperature)
        == (other.logit_scale, other.softcap, other.temperature)
    )


def _check_head(head: LMHead, name: str) -> None:
    weight = head.weight
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            f"{name}.weight: got a DTensor, wanted a plain tensor; weight.to_local() with a VocabShard as "
            "vocab_parallel is a part of the vocabulary"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise fail(f"{name}.weight", f"shape {tuple(weight.shape)}", "(V, H); gather a sharded weight first")
    if weight.dtype not in COMPUTE_DTYPES:
        raise fail(f"{name}.weight", weight.dtype, "float64, float32, bfloat16 or float16")
    if head.bias is not None:
        _check_like(f"{name}.bias", head.bias, (weight.shape[0],), weight.dtype, weight.device)
    if not math.isfinite(head.logit_scale) or head.logit_scale == 0:
        raise fail(f"{name}.logit_scale", head.logit_scale, "a finite number other than 0")
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        raise fail(f"{name}.softcap", head.softcap, "a positive finite number or None")
    if not (math.isfinite(head.temperature) and head.temperature > 0):
        raise fail(f"{name}.temperature", head.temperature, "a positive finite number")
    if isinstance(head.adapter, HeadAdapter):
        _check_adapter(head.adapter, weight, f"{name}.adapter")


def _check_adapter(adapter: HeadAdapter, weight: Tensor, name: str) -> None:
    for part, value in (("lora_a", adapter.lora_a), ("lora_b", adapter.lora_b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}.{part}: got {type(value).__name__}, wanted a Tensor")
    rank = adapter.lora_a.shape[0] if adapter.lora_a.dim() == 2 else 0
    if rank == 0:
        raise fail(f"{name}.lora_a", f"shape {tuple(adapter.lora_a.shape)}", "(r, H) with r at least 1")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dtype = dtype if adapter.lora_a.dtype == dtype else weight.dtype
    _check_like(f"{name}.lora_a", adapter.lora_a, (rank, weight.shape[1]), dtype, weight.device)
    _check_like(f"{name}.lora_b", adapter.lora_b, (weight.shape[0], rank), dtype, weight.device)
    if not math.isfinite(adapter.scale):
        raise fail(f"{name}.scale", adapter.scale, "a finite number")
    if not 0 <= adapter.dropout < 1:
        raise fail(f"{name}.dropout", adapter.dropout, "a probability in [0, 1)")


def _check_like(
    name: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(got.shape) != shape:
        raise fail(name, f"shape {tuple(got.shape)}", f"{shape}")
    if got.dtype != dtype:
        raise fail(name, got.dtype, f"{dtype}")
    if got.device != device:
        raise fail(name, got.device, f"{device}")


def check_inputs(hidden: Tensor, head: LMHead) -> None:
    """Shape, dtype and device of hidden states for a head."""
    hidden_size = head.weight.shape[1]
    if hidden.dim() < 1 or hidden.shape[-1] != hidden_size:
        raise fail("hidden", f"shape {tuple(hidden.shape)}", f"(..., {hidden_size}) to match lm_head.weight")
    if hidden.dtype not in COMPUTE_DTYPES:
        raise fail("hidden", hidden.dtype, "float64, float32, bfloat16 or float16")
    if head.weight.device != hidden.device:
        raise fail("lm_head.weight", head.weight.device, f"{hidden.device}, the device of hidden")


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """One label for each hidden state, on its device."""
    for name, value in (("hidden", hidden), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
    if tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise fail("labels", f"shape {tuple(labels.shape)}", f"{tuple(hidden.shape[:-1])} to match hidden")
    if labels.dtype not in (torch.int64, torch.int32):
        raise fail("labels", labels.dtype, "int64 or int32")
    if labels.device != hidden.device:
        raise fail("labels", labels.device, f"{hidden.device}, the device of hidden")


def check_token_layout(layout: TokenLayout, hidden: Tensor) -> None:
    """Shapes, dtypes and device of a layout; values only where reading them is free, on a CPU."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden: got {type(hidden).__name__}, wanted a Tensor")
    shape = tuple(layout.token_index.shape)
    for name, dtypes in (
        ("token_index", (torch.int64,)),
        ("target_ids", (torch.int64, torch.int32)),
        ("sequence_ids", (torch.int64,)),
    ):
        value = getattr(layout, name)
        if value.dim() != 1 or tuple(value.shape) != shape:
            raise fail(f"layout.{name}", f"shape {tuple(value.shape)}", f"(N,), here {shape}, as the others")
        if value.dtype not in dtypes:
            raise fail(f"layout.{name}", value.dtype, " or ".join(map(str, dtypes)))
        if value.device != hidden.device:
            raise fail(f"layout.{name}", value.device, f"{hidden.device}, the device of hidden")
    if layout.lengths is not None and (sum(layout.lengths) != shape[0] or min(layout.lengths, default=0) < 0):
        raise fail("layout.lengths", f"{layout.lengths}", f"{shape[0]} tokens in all, none negative")
    if hidden.device.type != "cpu" or torch.compiler.is_compiling() or not shape[0]:
        return
    num_rows = hidden.shape[:-1].numel()
    lowest, highest = (int(bound) for bound in layout.token_index.aminmax())
    if lowest < 0 or highest >= num_rows:
        raise fail(
            "layout.token_index", f"rows {lowest} to {highest}", f"rows of hidden, 0 to {num_rows - 1}"
        )
    counts = layout.sequence_ids.clamp(min=-1).add(1).bincount().tolist()
    if counts[0]:
        raise fail("layout.sequence_ids", "a negative one", "0..2P-1")
    wanted = list(layout.lengths or counts[1:])
    if counts[1:] + [0] * (len(wanted) - len(counts) + 1) != wanted:
        raise fail("layout.lengths", f"{layout.lengths}", f"the tokens of each sequence, {counts[1:]}")


def check_outputs(outputs: object, entropy_requires_grad: bool, *, has_topk: bool = False) -> tuple[str, ...]:
    """The asked-for statistics as a tuple without repeats, in the caller's order.

    ``has_topk``: whether the caller gives those of the k most likely tokens as well.
    """
    known = (*TOKEN_STATISTICS, *(TOPK_STATISTICS if has_topk else ()))
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list)):
        raise fail("outputs", repr(outputs), f"a tuple of names from {known}")
    for name in outputs:
        if name in TOPK_STATISTICS and not has_topk:
            raise ValueError(f"outputs: {name!r} is not supported by this version but in linear_logprob")
        if name not in known:
            raise fail("outputs", repr(name), f"names from {known}")
    if entropy_requires_grad and "entropy" not in outputs:
        raise fail("entropy_requires_grad", "True without 'entropy' in outputs", "outputs to name 'entropy'")
    return tuple(dict.fromkeys(outputs))


def check_topk(topk: object, outputs: tuple[str, ...], vocab_size: int) -> int:
    """k of the top-k statistics, 0 where none is wanted."""
    is_wanted = any(name in TOPK_STATISTICS for name in outputs)
    if topk is None:
        topk = DEFAULT_TOPK
    elif not is_wanted:
        raise fail("topk", repr(topk), f"None, or outputs to name one of {TOPK_STATISTICS}")
    if not is_wanted:
        return 0
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= vocab_size:
        raise fail("topk", repr(topk), f"an integer in 1..{vocab_size}, the size of the vocabulary")
    return topk


def check_token_index(token_index: Tensor | None, hidden: Tensor, *, reads_values: bool = False) -> None:
    """Shape, dtype and device; and that rows are rows of hidden, none twice, where reading them is free or
    asked for (``reads_values``, which synchronises)."""
    if token_index is None:
        return
    if token_index.dim() != 1 or token_index.dtype != torch.int64:
        got = f"shape {tuple(token_index.shape)}, {token_index.dtype}"
        raise fail("token_index", got, "(N,) int64 positions into the flattened labels")
    if token_index.device != hidden.device:
        raise fail("token_index", token_index.device, f"{hidden.device}, the device of hidden")
    is_free = token_index.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (is_free or reads_values) or not token_index.numel():
        return
    rows = token_index.sort().values
    num_rows = hidden.shape[:-1].numel()
    lowest, highest = int(rows[0]), int(rows[-1])
    if lowest < 0 or highest >= num_rows:
        raise fail("token_index", f"positions {lowest} to {highest}", f"positions 0 to {num_rows - 1}")
    repeated = rows[1:][rows[1:] == rows[:-1]]
    if repeated.numel():
        wanted = "no position twice; in a TokenLayout a row may predict several tokens"
        raise fail("token_index", f"position {int(repeated[0])} more than once", wanted)


def check_grad_weight_out(grad_weight_out: Tensor | None, weight: Tensor) -> None:
    if grad_weight_out is None:
        return
    if not weight.requires_grad:
        raise fail(
            "grad_weight_out",
            "a tensor for a weight without requires_grad",
            "a weight that requires a gradient",
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "grad_weight_out: is written by the backward pass, which torch.compile cannot trace; leave it out"
        )
    dtype = torch.float32 if grad_weight_out.dtype == torch.float32 else weight.dtype
    _check_like("grad_weight_out", grad_weight_out, tuple(weight.shape), dtype, weight.device)
    if not grad_weight_out.is_contiguous():
        raise fail("grad_weight_out", f"strides {grad_weight_out.stride()}", "a contiguous tensor")


def check_execution(execution: object) -> Execution:
    """The execution options, defaults for None; names and ranges checked."""
    if execution is None:
        return Execution()
    if not isinstance(execution, Execution):
        raise TypeError(f"execution: got {type(execution).__name__}, wanted an Execution or None")
    if execution.mode not in MODES:
        raise fail("execution.mode", repr(execution.mode), f"one of {MODES}")
    if execution.backend not in BACKENDS:
        raise fail("execution.backend", repr(execution.backend), f"one of {BACKENDS}")
    if execution.logits_dtype not in LOGITS_DTYPES:
        raise fail("execution.logits_dtype", repr(execution.logits_dtype), f"one of {LOGITS_DTYPES}")
    if execution.compute_dtype is not None and execution.compute_dtype not in COMPUTE_DTYPES:
        raise fail("execution.compute_dtype", execution.compute_dtype, f"one of {COMPUTE_DTYPES} or None")
    for name, lowest in (("workspace_mib", 1), ("cache_mib", 0)):
        value = getattr(execution, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise fail(f"execution.{name}", repr(value), f"an integer of at least {lowest} MiB")
    return execution


def resolve_dtypes(hidden: Tensor, weight: Tensor, execution: Execution) -> tuple[torch.dtype, torch.dtype]:
    """``(compute, logits)`` dtypes of one call: asked for, else autocast's, else the inputs' own.

    This is the op's autocast rule. The cast happens inside the op, so that an fp32 weight under bf16
    autocast gets a gradient summed and returned in fp32.
    """
    compute = execution.compute_dtype
    device_type = hidden.device.type
    if compute is None and hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        compute = torch.get_autocast_dtype(device_type)
    if compute is None:
        if hidden.dtype != weight.dtype:
            raise fail(
                "lm_head.weight",
                weight.dtype,
                f"{hidden.dtype}, the dtype of hidden (or execution.compute_dtype, or autocast)",
            )
        compute = hidden.dtype
    if execution.logits_dtype == "bf16":
        if compute != torch.bfloat16:
            raise fail(
                "execution.logits_dtype", f"'bf16' with {compute} operands", "bfloat16 operands for it"
            )
        return compute, torch.bfloat16
    if execution.logits_dtype == "fp32" and compute == torch.float64:
        raise fail("execution.logits_dtype", "'fp32' with float64 operands", "None")
    return compute, torch.float64 if compute == torch.float64 else torch.float32


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probabilities and statistics: fp32, or fp64 for fp64 operands."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32
