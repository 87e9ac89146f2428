"""What one training step costs on the same model and batch, with the fused head and without it.

Both sides run the same model forward and backward under the same DPO loss; they differ in how the answers'
log-probabilities come about:

* ``fused``: the model patched by ``fastdpo.patch_model`` returns them;
* ``unpatched``: the model as it is returns logits, then ``log_softmax`` and ``gather``.

Time is the median of interleaved repeats in one process. Memory is the growth of the peak resident set from
just before the step, each side in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fastdpo

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels (2P, T), chosen rows first; ref_logps (2P,)
SIDES = ("fused", "unpatched")
BETA = 0.1


def fused_logps(model: nn.Module, batch: Batch) -> Tensor:
    """``(2P,)`` log-probabilities of the answers, from a patched model."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    logps: Tensor = model(**inputs, return_logps=True).logps
    return logps.sum(1)


def unpatched_logps(model: nn.Module, batch: Batch) -> Tensor:
    """The same from logits, as a plain training loop does it."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    labels = batch["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * (labels >= 0)).sum(1)


def step(
    answer_logps: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch
) -> tuple[float, float]:
    """Forward and backward; the loss and the norm of the gradient."""
    model.zero_grad(set_to_none=True)
    chosen, rejected = (answer_logps(model, batch) - batch["ref_logps"]).chunk(2)
    loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    return loss.item(), float(squares) ** 0.5


def load_side(side: str, model_dir: Path) -> tuple[Callable[[nn.Module, Batch], Tensor], nn.Module]:
    """``side``'s log-probabilities, and the model they need."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    if side == "unpatched":
        return unpatched_logps, model
    return fused_logps, fastdpo.patch_model(model)


def compare(model_dir: Path, batch: Batch, repeats: int) -> dict[str, Any]:
    """Measure both sides.

    Returns:
        ``loss``, ``step_s`` and ``peak_mib``, each by side, and what was equal.

    Raises:
        RuntimeError: the two sides disagree on the loss or on the gradient's norm.
    """
    sides = {side: load_side(side, model_dir) for side in SIDES}
    results = {side: step(*sides[side], batch) for side in SIDES}
    for fused, unpatched in zip(*results.values(), strict=True):
        if abs(fused - unpatched) > 1e-4 * max(1.0, abs(unpatched)):
            raise RuntimeError(f"loss and gradient norm: {results}, wanted both sides equal to 1e-4")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            start = time.perf_counter()
            step(*sides[side], batch)
            times[side].append(time.perf_counter() - start)
    del sides
    return {
        "batch": describe(batch),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "loss": {side: results[side][0] for side in SIDES},
        "step_s": {side: statistics.median(times[side]) for side in SIDES},
        "peak_mib": {side: peak_in_a_process(side, model_dir, batch) for side in SIDES},
    }


def describe(batch: Batch) -> dict[str, int]:
    """Sizes of a batch."""
    rows, length = batch["input_ids"].shape
    return {
        "pairs": rows // 2,
        "length": length,
        "tokens": int(batch["attention_mask"].sum()),
        "labelled_tokens": int((batch["labels"] >= 0).sum()),
    }


def peak_in_a_process(side: str, model_dir: Path, batch: Batch) -> float:
    """Growth of the peak resident set over one step, in MiB, in a fresh process."""
    batch_file = model_dir / "step_batch.pt"
    torch.save(batch, batch_file)
    command = [sys.executable, __file__, side, str(model_dir), str(batch_file), str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        batch_file.unlink()
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_mib() -> float:
    """This process's peak resident set.

    Read from /proc, as ``ru_maxrss`` of a child starts at the peak of its parent.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak start again from what is resident now: loading a model leaves a higher one behind."""
    with contextlib.suppress(OSError):  # some sandboxes do not allow it; the growth then reads too small
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """One side's growth of the peak, in MiB, on the last line of standard output."""
    side, model_dir, batch_file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    batch = torch.load(batch_file)
    answer_logps, model = load_side(side, Path(model_dir))
    # One pair first: gradients, thread pools and libraries are then there on both sides.
    pairs = len(batch["ref_logps"]) // 2
    step(answer_logps, model, {name: value[[0, pairs]] for name, value in batch.items()})
    model.zero_grad(set_to_none=True)
    forget_peak()
    before = peak_mib()
    step(answer_logps, model, batch)
    print(json.dumps(peak_mib() - before))


if __name__ == "__main__":
    main()
