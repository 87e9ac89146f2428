"""Whole DPO steps, side by side: a plain loop, TRL's ``DPOTrainer`` and ours in every batch layout.

    python -m benchmarks.step --data pairs.jsonl                     # on a CPU: small-llama, 4 pairs a step
    python -m benchmarks.step --size llama-3-8b-lora --device cuda --precision bf16  # pairs made up
    python -m benchmarks.step --data pairs.jsonl --size qwen2.5-0.5b --device cuda --precision bf16

A step is: log-probabilities of the reference, of the policy, loss, backward pass, clipping to norm 1,
AdamW; fp32 weights, no activation checkpointing, no precomputed reference. Equal for all contenders: the
token ids of every batch, the seed of the weights, the optimiser and the order of the batches. The first steps
of each contender are compared with fp64 before anything is timed (`benchmarks.step_truth`): whose losses or
gradient norms are others is reported and not timed.

Contenders: ``plain``, padded pairs and full logits in a loop without a trainer; ``trl`` as it comes;
``trl-compacted`` with its dropping of unlabelled tokens, which it does on GPUs alone, forced on; ``padded``,
``packed``, ``shared_prompt`` and ``auto``, which is one of the three. Each is built anew for every round and
freed after it; rounds take turns, so that drift hits all alike. The loss of every step is printed and kept.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, peak_mib, summarise_steps, why
from benchmarks.results import RESULTS, ResultFile
from benchmarks.step_contenders import CONTENDERS, OURS, SIZES, Contender, Size
from benchmarks.step_data import MADE_UP, made_up_rows, make_data
from benchmarks.step_truth import LOSS_BOUND, Truth, true_steps, wrong
from benchmarks.timing import Timer, of_host
from fastdpo.training.batches.batch import Batch
from fastdpo.training.data.dataset import RowDataset


class Run:
    """The batches of a comparison, and what came of each contender."""

    def __init__(
        self,
        size: Size,
        data: RowDataset,
        tokenizer: Any,
        device: torch.device,
        precision: str,
        steps: int,
        attention: str = "sdpa",
    ) -> None:
        self.size, self.data, self.tokenizer = size, data, tokenizer
        self.device, self.precision, self.attention = device, precision, attention
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        needed = size.pairs * steps
        order = (order * -(-needed // len(order)))[:needed]
        self.batches = [[data[i] for i in order[k : k + size.pairs]] for k in range(0, needed, size.pairs)]

    def truth(self, steps: int) -> Truth:
        """What the first ``steps`` steps give in fp64."""
        try:
            batches = self.batches[:steps]
            return true_steps(self.size, batches, self.tokenizer, self.device, self.precision, self.attention)
        finally:
            self.free()

    def build(self, name: str) -> Contender:
        return Contender(
            name, self.size, self.data, self.tokenizer, self.device, self.precision, self.attention
        )

    def once(self, name: str, steps: int, *, measure_peak: bool = False) -> dict[str, Any]:
        """Losses, milliseconds, tokens and peak memory of the first ``steps`` steps of a new contender."""
        contender = None
        try:
            contender = self.build(name)
            return self._steps(contender, steps, measure_peak)
        finally:
            # Also of one that failed: what it holds would be missing for the next.
            del contender
            self.free()

    def free(self) -> None:
        gc.collect()  # trainers and models refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, contender: Contender, steps: int) -> list[Any]:
        """The first batches as a contender takes them: loaders collate in processes of their own while the
        device computes."""
        return [contender.trainer._prepare_inputs(contender.collate(b)) for b in self.batches[:steps]]

    def _steps(self, contender: Contender, steps: int, measure_peak: bool) -> dict[str, Any]:
        inputs = self.inputs(contender, steps)
        found: dict[str, Any] = {"samples_ms": [], "host": [], "tokens": [], "positions": []}
        losses, norms = [], []
        timer = Timer(self.device)
        for batch in inputs:
            sample = timer(lambda batch=batch: losses.append(contender.step(batch)))  # type: ignore[misc]
            found["samples_ms"].append(sample.ms)
            found["host"].append(sample)
            norms.append(contender.gradient_norm)
            positions, tokens = _size(batch)
            found["positions"].append(positions)
            found["tokens"].append(tokens)
        found["losses"] = [float(loss) for loss in losses]
        found["gradient_norms"] = [float(norm) for norm in norms]
        if measure_peak:
            largest = inputs[max(range(steps), key=lambda i: found["positions"][i])]
            # Above what is held between steps: weights, reference, Adam's state.
            found["peak_mib"] = peak_mib(lambda: contender.step(largest), self.device)
        return found


def checked(run: Run, name: str, truth: Truth, check_steps: int) -> dict[str, Any]:
    """A contender's first steps and their errors: of `fastdpo bench` and of pytest-benchmark.

    Returns:
        ``failed`` or ``not_run`` with why where it is not to be timed, and otherwise its peak memory; in any
        case the losses of the steps that it made.
    """
    try:
        found = run.once(name, check_steps, measure_peak=True)
    except ImportError as error:
        return {"not_run": f"not installed: {error}"}
    except Exception as error:  # whatever a peer does, the others are measured
        # One that does not fit is a result; whatever else is raised, and ours, is a mistake to mend.
        is_result = isinstance(error, torch.OutOfMemoryError) and name not in OURS
        return {"not_run" if is_result else "failed": why(error)}
    errors = truth.errors(found)
    reason = wrong(errors, run.precision)
    if reason is not None:
        return {"failed": reason, "losses": found["losses"], "errors": errors}
    return {**found, "errors": errors}


def compare(run: Run, names: Sequence[str], *, check_steps: int, steps: int, rounds: int) -> dict[str, Any]:
    """Check the contenders against fp64, then time those that are right.

    Returns:
        ``failed`` and ``not_run`` by name; ``contenders``: losses, errors, milliseconds, tokens a second,
        positions of the backbone a pair, peak memory; ``losses`` by name, of those that failed the check too;
        ``truth``: the losses and gradient norms that they were held to.

    Raises:
        torch.OutOfMemoryError: the truth does not fit.
    """
    truth = run.truth(check_steps)
    found = {name: checked(run, name, truth, check_steps) for name in names}
    failed = {name: cell["failed"] for name, cell in found.items() if "failed" in cell}
    not_run = {name: cell["not_run"] for name, cell in found.items() if "not_run" in cell}
    curves = {name: cell["losses"] for name, cell in found.items() if "losses" in cell}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in curves if name not in failed}
    for number in range(rounds):
        turn = list(samples)
        for name in turn[number % max(len(turn), 1) :] + turn[: number % max(len(turn), 1)]:
            if name in failed:
                continue
            try:
                samples[name].append(run.once(name, steps + 1))
            except Exception as error:
                failed[name] = f"in round {number + 1}: {why(error)}"
    contenders = {
        name: _summary(run, rounds_of, found[name])
        for name, rounds_of in samples.items()
        if name not in failed
    }
    return {
        "failed": failed, "not_run": not_run, "contenders": contenders,
        "losses": {name: contenders.get(name, {"losses": curve})["losses"] for name, curve in curves.items()},
        "truth": {**vars(truth), "dtype": str(truth.dtype).removeprefix("torch.")},
    }  # fmt: skip


def _summary(run: Run, rounds: Sequence[dict[str, Any]], checked: dict[str, Any]) -> dict[str, Any]:
    # The first step of a round warms up: allocators, thread pools, Adam's state.
    times = [time_ms for found in rounds for time_ms in found["samples_ms"][1:]]
    seconds = sum(times) / 1e3
    tokens = sum(count for found in rounds for count in found["tokens"][1:])
    positions = sum(count for found in rounds for count in found["positions"][1:])
    return {
        **summarise_steps(times, len(rounds[0]["samples_ms"]) - 1),
        **of_host([sample for found in rounds for sample in found["host"][1:]], run.device),
        "useful_tokens_per_s": tokens / seconds,
        "backbone_positions_per_pair": positions / (run.size.pairs * len(times)),
        "peak_mib": checked.get("peak_mib"),
        **checked["errors"],
        "losses": rounds[0]["losses"],
        "samples_ms": times,
    }


def loss_table(losses: Mapping[str, Sequence[float]]) -> str:
    """The loss curves: contenders across, steps down; who failed the check has no more steps than that."""
    widths = {name: max(len(name), 7) for name in losses}
    lines = ["loss at step  " + "  ".join(f"{name:>{width}}" for name, width in widths.items())]
    for i in range(max(map(len, losses.values()), default=0)):
        cells = [
            f"{values[i]:>{widths[name]}.5f}" if i < len(values) else " " * widths[name]
            for name, values in losses.items()
        ]
        lines.append(f"{i + 1:>12}  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="preference pairs, JSONL; default: pairs made up")
    parser.add_argument("--size", choices=SIZES, default="small-llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=LOSS_BOUND, default="fp32", help="bf16 is autocast")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=None)
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of every model")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=None, help="pairs a step; default: the size's own")
    parser.add_argument("--check_steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    try:
        file = ResultFile(args.results, environment(device), {"suites": ["step"]})
        result = bench_step(
            args.size, device, args.precision, data=args.data, contenders=args.contenders, pairs=args.pairs,
            attention=args.attention, max_length=args.max_length, check_steps=args.check_steps,
            steps=args.steps, rounds=args.rounds,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, cell in result["contenders"].items():
        peak = "" if cell["peak_mib"] is None else f"{cell['peak_mib']:10.0f} MiB"
        print(
            f"{name:<14} {cell['median_ms']:10.1f} ms {cell['useful_tokens_per_s']:10.0f} tokens/s "
            f"{cell['backbone_positions_per_pair']:8.0f} positions/pair{peak}"
        )
    for name, reason in result["failed"].items():
        print(f"{name:<14} FAILED: {reason}")
    for name, reason in result["not_run"].items():
        print(f"{name:<14} not run: {reason}")
    print(loss_table(result["losses"]))
    print(f"wrote {file.add(result)}")
    return 1 if result["failed"] else 0


def bench_step(
    size_name: str,
    device: torch.device,
    precision: str,
    *,
    data: Path | None = None,
    contenders: Sequence[str] | None = None,
    pairs: int | None = None,
    attention: str = "sdpa",
    max_length: int = 1024,
    check_steps: int = 3,
    steps: int = 5,
    rounds: int = 3,
) -> dict[str, Any]:
    """One size by every contender; ``data`` None: pairs made up."""
    # On a GPU TRL drops unlabelled tokens by itself: the two are one.
    names = contenders or [n for n in CONTENDERS if n != "trl-compacted" or device.type == "cpu"]
    count = max(steps + 1, check_steps)
    run = make_run(
        size_name, device, precision, steps=count, data=data, pairs=pairs, attention=attention,
        max_length=max_length,
    )  # fmt: skip
    size = run.size
    compared = compare(run, names, check_steps=check_steps, steps=steps, rounds=rounds)
    return {
        "suite": "step", "key": step_key(size_name, precision, data, size.pairs, max_length, attention),
        "attention": attention, "model": size_name, "size": vars(size),
        "precision": precision, "max_length": max_length, "steps": steps, "rounds": rounds,
        "data": data.name if data else MADE_UP, "equal": "token ids, weights, optimiser, order of batches",
        **compared,
    }  # fmt: skip


def make_run(
    size_name: str,
    device: torch.device,
    precision: str,
    *,
    steps: int,
    data: Path | None = None,
    pairs: int | None = None,
    attention: str = "sdpa",
    max_length: int = 1024,
) -> Run:
    """The batches of ``steps`` steps at one size; ``data`` None: pairs made up."""
    size = SIZES[size_name]
    size = replace(size, pairs=pairs or size.pairs)
    dataset, tokenizer = make_data(data or made_up_rows(size.pairs * steps), size.vocab, max_length)
    return Run(size, dataset, tokenizer, device, precision, steps, attention)


def step_key(
    size_name: str,
    precision: str,
    data: Path | None = None,
    pairs: int | None = None,
    max_length: int = 1024,
    attention: str = "sdpa",
) -> str:
    """What must be equal for two results to be of one case."""
    source = "made-up" if data is None else data.stem
    batch = f"{pairs or SIZES[size_name].pairs}x{max_length}"
    return f"step/{size_name}/{precision}/{source}/{batch}/{attention}"


if __name__ == "__main__":
    sys.exit(main())


def _size(batch: Any) -> tuple[int, int]:
    """Positions that the backbone computes of a batch, ours or TRL's, and tokens of its sequences."""
    if isinstance(batch, Batch):
        return batch.positions, int(batch.sequence_tokens)
    return batch["input_ids"].numel(), int(batch["attention_mask"].sum())
