"""Bandwidth of the row kernels against a device copy in the same run.

Bytes are those that must move: every logit read once, every element of D written once. A kernel that
reads a row twice from memory therefore shows as slower, not as busier.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Contender, summarise, time_interleaved
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.ops.backends import load_row_kernel
from fastdpo.plan import leading_dim

VOCABULARIES = (32000, 128256, 152064, 262208)


def row_key(vocab: int, rows: int, logits_dtype: torch.dtype) -> str:
    return f"row/V={vocab}/rows={rows}/{str(logits_dtype).removeprefix('torch.')}"


def bench_rows(
    device: torch.device,
    backends: list[str],
    *,
    vocab: int,
    logits_dtype: torch.dtype,
    rows: int,
    repeats: int,
    seconds: float | None = None,
) -> dict[str, Any]:
    """One chunk through every backend, with D written in place in bf16."""
    source = torch.randn(rows, leading_dim(vocab), device=device).mul_(3).to(logits_dtype)
    logits = source.clone()
    labels = torch.randint(vocab, (rows,), device=device)
    logps, lse = torch.empty(2, rows, device=device)
    stride = source.shape[1] * logits_dtype.itemsize // 2
    d = logits.view(-1).view(torch.bfloat16).as_strided((rows, vocab), (stride, 1))
    target = source.gather(1, labels[:, None])[:, 0].float() if logits_dtype == torch.bfloat16 else None
    truth = source[:16, :vocab].double().log_softmax(-1).gather(1, labels[:16, None])[:, 0]

    def run(backend: str) -> None:
        kernel = load_row_kernel(backend)
        kernel(
            logits[:, :vocab], labels, LogitTransform(), RowOutputs(logps, lse), target_logits=target, d_out=d
        )

    contenders = [Contender("copy", lambda: logits.copy_(source))]
    failed = {}
    for backend in backends:
        logits.copy_(source)
        run(backend)
        error = (logps[:16].double() - truth).abs().max().item()
        if not error <= 1e-5:
            failed[backend] = f"log-probabilities are off by {error:.3e} nats; not timed"
            continue
        # D overwrites the logits, so each run gets them anew.
        contenders.append(
            Contender(
                backend,
                lambda backend=backend: run(backend),  # type: ignore[misc]
                prepare=lambda: logits.copy_(source),
            )
        )
    samples = time_interleaved(contenders, device, repeats=repeats, seconds=seconds)
    copied = 2 * source.numel() * logits_dtype.itemsize
    moved = rows * vocab * (logits_dtype.itemsize + 2)
    bandwidth = {
        name: (copied if name == "copy" else moved) / (summarise(values)["median_ms"] * 1e6)
        for name, values in samples.items()
    }
    return {
        "suite": "row",
        "key": row_key(vocab, rows, logits_dtype),
        "vocab": vocab,
        "rows": rows,
        "logits_dtype": str(logits_dtype).removeprefix("torch."),
        "failed": failed,
        "not_run": {},
        "contenders": {
            name: {**summarise(values), "gb_per_s": bandwidth[name], "samples_ms": values}
            for name, values in samples.items()
        },
    }
