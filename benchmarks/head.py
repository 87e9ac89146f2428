"""The head's modes against the matrix products they are made of, in the same run.

The floor is plain ``torch.mm`` in the inputs' dtype over all N rows at once: X W^T for ``score``, and
D W for ``stash``, and D^T X for ``cache`` and ``pairs``. Same tokens, same shapes, same dtypes; logits are
drawn with a standard deviation of 3 and every third label is the argmax, as ``fastdpo.testing`` makes them.
``pairs`` is the whole of ``fused_dpo_loss``, loss and metrics included, on pairs of 128 and 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Contender, peak_mib, summarise, time_interleaved
from fastdpo import Execution, TokenLayout, fused_dpo_loss, linear_logprob
from fastdpo.reference import linear_logprob_reference

# (hidden, vocabulary) of real models.
MODELS = {
    "llama-3-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "gemma-2-9b": (3584, 256000),
    "tiny": (64, 4001),
}
PASSES = {"score": 1, "stash": 2, "cache": 3, "pairs": 3}
ANSWER_LENGTH = 128
# Checked on as many rows as an fp64 head affords, the first pair; the bound is the promise for logps.
CHECKED_ROWS = 2 * ANSWER_LENGTH
LOGPS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# Of dhidden, relative: D, D W and g D W are rounded once each (2^-9 of bf16 is 2e-3), the sum twice that.
DHIDDEN_BOUND = {torch.float32: 2**-13, torch.bfloat16: 2**-7, torch.float16: 2**-9}
BETA = 0.1


@dataclass(frozen=True)
class Size:
    """One problem: a model's head and N labelled tokens."""

    model: str
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16


class HeadProblem:
    """Inputs of one size on a device, and its contenders."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        hidden_size, vocab = MODELS[size.model]
        generator = torch.Generator(device).manual_seed(seed)
        self.size, self.device = size, device

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(size.dtype)

        self.hidden = normal(size.num_tokens, hidden_size, std=1.0)
        self.weight = normal(vocab, hidden_size, std=3 / hidden_size**0.5)
        self.labels = torch.randint(vocab, (size.num_tokens,), generator=generator, device=device)
        self._peak_labels()
        self.upstream = torch.randn(size.num_tokens, generator=generator, device=device)
        self.index = torch.arange(size.num_tokens, device=device)
        self.layout = self._pairs()

    def _pairs(self) -> TokenLayout:
        """The tokens as answers of 128: pair by pair, chosen and rejected."""
        num_pairs = self.size.num_tokens // (2 * ANSWER_LENGTH)
        answer = self.index // ANSWER_LENGTH
        sequence = answer // 2 + answer % 2 * num_pairs
        return TokenLayout(self.index, self.labels, sequence, (ANSWER_LENGTH,) * (2 * num_pairs))

    def _peak_labels(self) -> None:
        """Every third label becomes the argmax, a few rows of logits at a time."""
        for start in range(0, self.size.num_tokens, 512):
            best = (self.hidden[start : start + 512] @ self.weight.t()).argmax(-1)
            self.labels[start : start + 512 : 3] = best[::3]

    def execution(self, mode: str, backend: str) -> Execution:
        # `cache` is timed with all of D kept: three products, as its floor.
        itemsize = torch.float32.itemsize if self.device.type == "cpu" else self.size.dtype.itemsize
        cache_mib = self.size.num_tokens * self.weight.shape[0] * itemsize // 2**20 + 1
        if mode == "pairs":
            return Execution(mode=mode, backend=backend)
        return Execution(mode=mode, backend=backend, cache_mib=cache_mib if mode == "cache" else 0)

    def step(self, mode: str, backend: str) -> tuple[Tensor, ...]:
        """One forward pass, and the backward pass where the mode has one: logps, dhidden, dweight.

        The log-probabilities are those of the tokens, for ``pairs`` the sums of the answers.
        """
        hidden = self.hidden.detach().requires_grad_(mode != "score")
        weight = self.weight.detach().requires_grad_(mode in ("cache", "pairs"))
        if mode == "pairs":
            reference = torch.zeros(len(self.layout.lengths or ()), device=self.device)
            loss = fused_dpo_loss(
                hidden, weight, None, layout=self.layout, ref_logps=reference, beta=BETA,
                execution=self.execution(mode, backend),
            )  # fmt: skip
            sums = torch.stack((loss.chosen_logps, loss.rejected_logps), 1).view(-1)
            return (sums, *torch.autograd.grad(loss.loss, (hidden, weight)))
        out = linear_logprob(
            hidden, weight, self.labels, token_index=self.index, execution=self.execution(mode, backend)
        )
        if mode == "score":
            return (out.logps,)
        wanted = (hidden, weight) if mode == "cache" else (hidden,)
        return (out.logps.detach(), *torch.autograd.grad(out.logps, wanted, self.upstream))

    def check(self, mode: str, backend: str) -> dict[str, float]:
        """Log-probabilities and dhidden of some rows against fp64; raises where they are wrong."""
        rows = slice(0, CHECKED_ROWS)
        logps, *grads = self.step(mode, backend)
        hidden = self.hidden[rows].double().requires_grad_()
        truth = linear_logprob_reference(hidden, self.weight.double(), self.labels[rows]).logps
        loss = (truth * self.upstream[rows]).sum()
        if mode == "pairs":
            truth = truth.view(-1, ANSWER_LENGTH).sum(1)
            margins = BETA * (truth[::2] - truth[1::2])
            num_pairs = len(self.layout.lengths or ()) // 2
            loss = -torch.nn.functional.logsigmoid(margins).sum() / num_pairs
        error = (logps[: len(truth)].double() - truth).abs().max().item()
        allowed = LOGPS_BOUND[self.size.dtype] * (ANSWER_LENGTH if mode == "pairs" else 1)
        if not error <= allowed:
            raise AssertionError(
                f"{mode}/{backend}: log-probabilities are off by {error:.3e} nats; not timed"
            )
        errors = {"logps_error_nats": error}
        if grads:
            (wanted,) = torch.autograd.grad(loss, hidden)
            off = ((grads[0][rows].double() - wanted).norm() / wanted.norm()).item()
            if not off <= DHIDDEN_BOUND[self.size.dtype]:
                raise AssertionError(f"{mode}/{backend}: dhidden is off by {off:.3e} of its norm; not timed")
            errors["dhidden_relative_error"] = off
        if not all(tensor.isfinite().all() for tensor in (logps, *grads)):
            raise AssertionError(f"{mode}/{backend}: a result is not finite; not timed")
        return errors

    def floor(self, mode: str) -> Contender:
        """The mode's products as plain GEMMs; D is random of D's size, because zeros run faster."""
        logits = torch.empty(
            self.size.num_tokens, self.weight.shape[0], dtype=self.size.dtype, device=self.device
        )
        d = torch.randn_like(logits) if mode != "score" else logits
        dhidden, dweight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

        def run() -> None:
            torch.mm(self.hidden, self.weight.t(), out=logits)
            if mode != "score":
                torch.mm(d, self.weight, out=dhidden)
            if mode in ("cache", "pairs"):
                torch.mm(d.t(), self.hidden, out=dweight)

        return Contender("gemm", run)


def bench_mode(problem: HeadProblem, mode: str, backends: list[str], *, repeats: int) -> dict[str, Any]:
    """One mode over its floor for every backend; a backend that fails its check is reported, not timed."""
    contenders, errors = [problem.floor(mode)], {}
    failed: dict[str, str] = {}
    peaks: dict[str, float | None] = {}
    for backend in backends:
        try:
            errors[backend] = problem.check(mode, backend)
        except (AssertionError, RuntimeError, ValueError) as error:
            failed[backend] = str(error).splitlines()[0]
            continue
        peaks[backend] = peak_mib(lambda backend=backend: problem.step(mode, backend), problem.device)  # type: ignore[misc]
        contenders.append(Contender(backend, lambda backend=backend: problem.step(mode, backend)))  # type: ignore[misc]
    samples = time_interleaved(contenders, problem.device, repeats=repeats)
    floor = summarise(samples["gemm"])["median_ms"]
    return {
        "suite": "head",
        "model": problem.size.model,
        "num_tokens": problem.size.num_tokens,
        "dtype": str(problem.size.dtype).removeprefix("torch."),
        "mode": mode,
        "gemm_passes": PASSES[mode],
        "failed": failed,
        "contenders": {
            name: {
                **summarise(values),
                "ratio_to_gemm": summarise(values)["median_ms"] / floor,
                "peak_mib": peaks.get(name),
                **errors.get(name, {}),
                "samples_ms": values,
            }
            for name, values in samples.items()
        },
    }
