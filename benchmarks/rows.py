"""Suite ``row``: bandwidth of the row kernels against a device copy in the same run.

Bytes are those that must move: every logit read once, every element of D written once. A kernel that
reads a row twice from memory therefore shows as slower, not as busier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.harness import Contender, recover, smi, summarise, why
from benchmarks.problem import Wrong
from benchmarks.timing import of_host, time_interleaved
from fastdpo.kernels.contract import LogitTransform, RowOutputs
from fastdpo.ops.backends import load_row_kernel
from fastdpo.plan.call import leading_dim
from fastdpo.testing.accuracy import logps_bound

VOCABULARIES = (32000, 128256, 152064, 262208)
CHECKED = 16


def row_key(vocab: int, rows: int, logits_dtype: torch.dtype) -> str:
    return f"row/V={vocab}/rows={rows}/{str(logits_dtype).removeprefix('torch.')}"


class RowProblem:
    """One chunk of logits ``(rows, V)``, with D written over it in bf16."""

    def __init__(self, device: torch.device, vocab: int, logits_dtype: torch.dtype, rows: int) -> None:
        self.vocab, self.rows, self.dtype = vocab, rows, logits_dtype
        self.source = torch.randn(rows, leading_dim(vocab), device=device).mul_(3).to(logits_dtype)
        self.logits = self.source.clone()
        self.labels = torch.randint(vocab, (rows,), device=device)
        self.logps, self.lse = torch.empty(2, rows, device=device)
        stride = self.source.shape[1] * logits_dtype.itemsize // 2
        self.d = self.logits.view(-1).view(torch.bfloat16).as_strided((rows, vocab), (stride, 1))
        is_rounded = logits_dtype == torch.bfloat16
        self.target = self.source.gather(1, self.labels[:, None])[:, 0].float() if is_rounded else None

    @property
    def bytes_moved(self) -> int:
        return self.rows * self.vocab * (self.dtype.itemsize + 2)

    def refill(self) -> None:
        self.logits.copy_(self.source)

    def run(self, backend: str) -> None:
        kernel = load_row_kernel(backend)
        outputs = RowOutputs(self.logps, self.lse)
        logits = self.logits[:, : self.vocab]
        kernel(logits, self.labels, LogitTransform(), outputs, target_logits=self.target, d_out=self.d)

    def checked(self, backend: str) -> dict[str, Any]:
        """Errors beside fp64 of log-probabilities, in nats, and of D, relative; or ``failed`` with why."""
        try:
            self.refill()
            self.run(backend)
            z = self.source[:CHECKED, : self.vocab].double()
            labels = self.labels[:CHECKED, None]
            log_p = z.log_softmax(-1)
            error = (self.logps[:CHECKED].double() - log_p.gather(1, labels)[:, 0]).abs().max().item()
            if not error <= logps_bound(0, torch.float32):  # the logits are given
                raise Wrong(f"log-probabilities are off by {error:.3e} nats; not timed")
            want = torch.zeros_like(z).scatter_(1, labels, 1.0) - log_p.exp()
            off = ((self.d[:CHECKED].double() - want).norm() / want.norm()).item()
            # One rounding to bf16: 2^-9 of each entry at most on average, twice that.
            if not off <= 2**-8:
                raise Wrong(f"D is off by {off:.3e} of its norm; not timed")
        except Wrong as wrong:
            return {"failed": str(wrong)}
        except Exception as error_raised:  # its result, and no reason to lose the others'
            return {"failed": why(error_raised)}
        return {"logps_error_nats": error, "d_relative_error": off}


def bench_rows(
    device: torch.device,
    backends: list[str],
    *,
    vocab: int,
    logits_dtype: torch.dtype,
    rows: int,
    repeats: int,
    seconds: float | None = None,
    lost_to: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One chunk through every backend, beside a copy of it.

    Args:
        lost_to: reasons for backends that took the device with them in an earlier process: they failed.

    Raises:
        DeviceLost: after an error of a backend the device answers no more.
    """
    problem = RowProblem(device, vocab, logits_dtype, rows)
    contenders = [Contender("copy", problem.refill)]
    failed = {name: reason for name, reason in (lost_to or {}).items() if name in backends}
    errors: dict[str, dict[str, Any]] = {}
    for backend in [name for name in backends if name not in failed]:
        found = problem.checked(backend)
        if "failed" in found:
            failed[backend] = found["failed"]
            recover(device, backend, failed[backend])
            continue
        errors[backend] = found
        # D overwrites the logits, so each run gets them anew.
        contenders.append(
            Contender(backend, lambda backend=backend: problem.run(backend), prepare=problem.refill)  # type: ignore[misc]
        )
    before = smi() if device.type == "cuda" else None
    samples = time_interleaved(contenders, device, repeats=repeats, seconds=seconds, failed=failed)
    after = smi() if device.type == "cuda" else None
    copied = 2 * problem.source.numel() * logits_dtype.itemsize
    cells = {}
    for name, taken in samples.items():
        values = [sample.ms for sample in taken]
        summary = {**summarise(values), **of_host(taken, device)}
        moved = copied if name == "copy" else problem.bytes_moved
        bandwidth = moved / (summary["median_ms"] * 1e6)
        cells[name] = {**summary, **errors.get(name, {}), "gb_per_s": bandwidth, "samples_ms": values}
    return {
        "suite": "row", "key": row_key(vocab, rows, logits_dtype), "vocab": vocab, "rows": rows,
        "logits_dtype": str(logits_dtype).removeprefix("torch."), "failed": failed, "not_run": {},
        "contenders": cells, "smi": [before, after],
    }  # fmt: skip
