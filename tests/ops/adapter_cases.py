"""A head with LoRA: its operands as leaves, and the definition with the merged weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import LMHead
from fastdpo.definitions.logprob import linear_logprob_reference
from fastdpo.testing import Case
from fastdpo.types import HeadAdapter

RANK, SCALE = 5, 0.7


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor  # (r, H)
    lora_b: Tensor  # (V, r)

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in self))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]


def operands(case: Case, adapter_dtype: torch.dtype | None = None) -> Operands:
    """Leaves that require gradients; the adapter's logits are about as large as the head's."""
    generator = torch.Generator().manual_seed(7)
    vocab, hidden_size = case.weight.shape
    lora_a = torch.randn(RANK, hidden_size, generator=generator, dtype=torch.float64) * hidden_size**-0.5
    lora_b = torch.randn(vocab, RANK, generator=generator, dtype=torch.float64)
    made = (case.hidden, case.weight, case.bias, lora_a, lora_b)
    dtypes = (case.hidden.dtype,) * 3 + (adapter_dtype or case.hidden.dtype,) * 2
    return Operands(
        *(
            None if t is None else t.detach().clone().to(d).requires_grad_()
            for t, d in zip(made, dtypes, strict=True)
        )
    )


def head_of(case: Case, tensors: Operands, dropout: float = 0.0) -> LMHead:
    adapter = HeadAdapter(tensors.lora_a, tensors.lora_b, SCALE, dropout)
    return replace(case.lm_head, weight=tensors.weight, bias=tensors.bias, adapter=adapter)


def dense(case: Case, tensors: Operands, outputs: tuple[str, ...] = ()) -> Any:
    """The definition with the merged weight, in the dtype of ``tensors``."""
    return linear_logprob_reference(
        tensors.hidden,
        tensors.weight + SCALE * tensors.lora_b @ tensors.lora_a,
        case.labels,
        bias=tensors.bias,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        temperature=case.temperature,
        ignore_index=case.ignore_index,
        outputs=outputs,
    )
