"""Heads and rows for the store-free forward pass, and its definition in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.definitions.logprob import token_statistics
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.testing import assert_logps_close
from tests.kernels.row_cases import CANARY, GUARD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = tuple(RowOutputs._fields)


class Head:
    """Inputs of ``lean_logprobs``: N of M rows by index, and logits of standard deviation 3."""

    def __init__(
        self,
        num_tokens: int = 20,
        hidden_size: int = 64,
        vocab: int = 300,
        dtype: torch.dtype = torch.float32,
        has_index: bool = True,
        heavy: bool = False,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(vocab + num_tokens)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows = 2 * num_tokens if has_index else num_tokens
        self.compute_dtype = dtype
        self.transform = LogitTransform()
        spread = 3 / hidden_size**0.5
        if heavy:
            bias = (6 * randn(vocab)).to(DEVICE)
            self.transform = LogitTransform(bias, scale=-0.5, softcap=20.0, temperature=0.7)
        self.hidden = randn(rows, hidden_size).to(dtype).to(DEVICE)
        self.weight = (spread * randn(vocab, hidden_size)).to(weight_dtype or dtype).to(DEVICE)
        self.index = torch.randperm(rows, generator=generator)[:num_tokens].to(DEVICE) if has_index else None
        self.labels = torch.randint(vocab, (num_tokens,), generator=generator).to(DEVICE)
        best = self.logits().argmax(1)
        self.labels[::3] = best[::3]

    def rows(self) -> Tensor:
        return self.hidden if self.index is None else self.hidden[self.index]

    def logits(self) -> Tensor:
        """Final logits ``(N, V)`` in fp64, from operands rounded to the compute dtype."""
        x = self.rows().to(self.compute_dtype).double() @ self.weight.to(self.compute_dtype).double().T
        t = self.transform
        z = t.scale * (x if t.bias is None else x + t.bias.double())
        z = z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)
        return z / t.temperature

    def run(self, statistics: tuple[str, ...] = (), rows: slice = slice(None)) -> dict[str, Tensor]:
        from fastdpo.kernels.lean_triton import lean_logprobs

        labels, num_tokens = self.labels[rows], len(self.labels[rows])
        hidden, index = self.hidden, None if self.index is None else self.index[rows]
        if index is None:
            hidden = hidden[rows]
        buffers = {}
        for name in ("logps", "lse", *statistics):
            dtype = torch.uint8 if name == "is_top1" else torch.float32
            buffers[name] = torch.full((num_tokens + 2 * GUARD,), CANARY, dtype=dtype, device=DEVICE)
        views = {name: buffer[GUARD:-GUARD] for name, buffer in buffers.items()}
        if "is_top1" in views:
            views["is_top1"] = views["is_top1"].view(torch.bool)
        outputs = RowOutputs(*(views.get(name) for name in NAMES))
        lean_logprobs(hidden, self.weight, index, labels, self.transform, outputs, self.compute_dtype)
        for name, buffer in buffers.items():
            assert (buffer[:GUARD] == CANARY).all() and (buffer[-GUARD:] == CANARY).all(), name
        return {name: view.clone() for name, view in views.items()}

    def check(self, results: dict[str, Tensor]) -> None:
        truth = token_statistics(self.logits(), self.labels, tuple(results))
        for name, got in results.items():
            if name == "is_top1":
                assert torch.equal(got, truth[name] & (self.labels >= 0) & (self.labels < len(self.weight)))
            else:
                assert_logps_close(
                    got, truth[name], self.compute_dtype, hidden_size=self.hidden.shape[-1], name=name
                )


def assert_equal_bits(one: dict[str, Tensor], two: dict[str, Tensor], rows: Any = slice(None)) -> None:
    for name in one.keys() & two.keys():
        a, b = one[name][rows], two[name][rows]
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no index": {"has_index": False},
    "one of everything": {"num_tokens": 1, "hidden_size": 1, "vocab": 1},
    "one row, heavy": {"num_tokens": 1, "vocab": 257, "heavy": True},
    "one tile wide": {"num_tokens": 130, "vocab": 256},
    "ragged, heavy": {"num_tokens": 67, "hidden_size": 45, "vocab": 131, "heavy": True},
    "three splits, heavy": {"num_tokens": 5, "hidden_size": 33, "vocab": 523, "heavy": True},
    "two splits": {"num_tokens": 140, "hidden_size": 16, "vocab": 257},
    "long rows": {"num_tokens": 3, "hidden_size": 1100, "vocab": 70},
}
