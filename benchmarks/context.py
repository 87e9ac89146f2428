"""Suite ``context``: time and peak memory of a whole DPO step against the length of its context.

A step is one pair: a prompt of T tokens less two answers, of T / 8 tokens each and at most 512, all made up.
Policy, loss, backward pass, clipping to norm 1, AdamW; only the answers have labels. Equal for all: token
ids, seed of the weights, optimiser, and the reference, which is two numbers that come with the pair: no
reference model runs. Not equal: ours are on one row, on which the prompt lies once; TRL runs it once for each
answer.

Contenders: ``plain``, our row with all activations kept; ``checkpointed``, with activation checkpointing;
``carried``, with ``context_chunk``; ``carried-host`` (on a GPU) and ``carried-disk`` (on a CPU), where keys
and values lie in host memory, or in files; ``trl``, its ``DPOTrainer`` with ``gradient_checkpointing``.

Before anything is timed, a contender's first loss and gradient norm are held to those of ``plain`` at the
same length, or of ``checkpointed`` where that does not fit, and these two, and whoever is left without them,
to fp64 at the shortest length of the preset (`benchmarks.step_truth`). On a CPU each has a process of its
own, one after the other, whose ``VmHWM`` is its peak; on a GPU all run in this one. A peak is what a step
takes above weights and Adam's state; on a CPU pages of ``carried-disk``'s files count too while they are
resident, which the system may write out and drop. What does not fit, or takes too long, is ``not_run``.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import free_bytes, in_a_process, package_version, peak_mib, recover, summarise, why
from benchmarks.step_contenders import SIZES, Contender
from benchmarks.step_data import made_up_rows, make_data
from benchmarks.step_truth import Truth, true_steps, wrong
from benchmarks.timing import Sample, Timer, of_host
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.report import DataReport
from fastdpo.training.data.row import REFERENCE

# Contender -> settings of its trainer; of those that carry the context, beside the length of a chunk.
CHECKPOINTED = {"gradient_checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": CHECKPOINTED,
    "carried": {},
    "carried-host": {"context_device_mib": 0},
    "carried-disk": {"context_device_mib": 0, "context_host_mib": 0},
    "trl": CHECKPOINTED,
}
ANCHORS = ("plain", "checkpointed")  # what others are held to, the first that fits
CHUNK = 1024
LONGEST_ANSWER = 512  # the bounds of `benchmarks.step_truth` are of some thousand labelled tokens
STEPS = 5  # timed, of each contender
CONTENDER_SECONDS = 1800.0


class Check(NamedTuple):
    """What a contender is held to: ``truth`` on a row of ``tokens``; by whom, in words."""

    tokens: int
    truth: Truth
    by: str


def names_for(device: torch.device) -> list[str]:
    """Contenders of who names none."""
    return [n for n in WAYS if n != ("carried-disk" if device.type == "cuda" else "carried-host")]


def context_key(model: str, tokens: int, precision: str) -> str:
    return f"context/{model}/T={tokens}/{precision}"


def bench_context(
    model: str,
    tokens: int,
    precision: str,
    device: torch.device,
    names: Sequence[str],
    *,
    shortest: int,
    step_seconds: float = 0.0,
    steps: int = STEPS,
    lost_to: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One length by every contender.

    Args:
        shortest: the length at which fp64 is what the first is held to.
        step_seconds: a guess of a step's; a case of steps that are too long is not begun.
        lost_to: reasons for contenders that took the device with them in an earlier process: they failed.

    Raises:
        DeviceLost: after an error of a contender the device answers no more.
        torch.OutOfMemoryError: the truth does not fit.
    """
    found: dict[str, dict[str, Any]] = {}
    at_shortest: Check | None = None
    anchor: Check | None = None
    is_too_long = 3 * step_seconds > CONTENDER_SECONDS
    # An anchor that nobody asked for runs too, untimed, where others need it.
    for name in sorted({*names, *ANCHORS}, key=list(WAYS).index):
        if name not in names and (anchor is not None or tokens == shortest):
            continue
        if name in (lost_to or {}):
            found[name] = {"failed": (lost_to or {})[name]}
        elif is_too_long:
            found[name] = {"not_run": f"too long: a step takes about {step_seconds:.0f} s"}
        else:
            if anchor is None and at_shortest is None:
                truth = truth_of(model, shortest, precision, device)
                at_shortest = Check(shortest, truth, f"fp64 at T = {shortest}")
            check = anchor or at_shortest
            assert check is not None
            job = {
                "name": name, "model": model, "tokens": tokens, "precision": precision,
                "device": device.type, "steps": steps if name in names else 0,
                "check": [check.tokens, [check.truth.losses, check.truth.gradient_norms], check.by],
            }  # fmt: skip
            found[name] = measure_apart(job, device)
        if name in ANCHORS and anchor is None and tokens != shortest and "loss" in found[name]:
            cell = found[name]
            one = Truth([cell["loss"]], [cell["gradient_norm"]], torch.float32)
            anchor = Check(tokens, one, f"{name} at T = {tokens}")
    found = {name: cell for name, cell in found.items() if name in names}
    prompt, answer = lengths_of(tokens)
    return {
        "suite": "context", "key": context_key(model, tokens, precision), "model": model,
        "precision": precision, "tokens": tokens, "prompt_tokens": prompt, "answer_tokens": answer,
        "chunk": chunk_of(tokens), "size": vars(SIZES[model]),
        "equal": "token ids, weights, optimiser, numbers of the reference",
        "failed": {name: cell["failed"] for name, cell in found.items() if "failed" in cell},
        "not_run": {name: cell["not_run"] for name, cell in found.items() if "not_run" in cell},
        "contenders": {name: cell for name, cell in found.items() if "samples_ms" in cell},
    }  # fmt: skip


def lengths_of(tokens: int) -> tuple[int, int]:
    """Tokens of the prompt, and of each of two answers, of a row of so many."""
    answer = min(tokens // 8, LONGEST_ANSWER)
    return tokens - 2 * answer, answer


def chunk_of(tokens: int) -> int:
    return min(CHUNK, tokens // 4)


def make_pair(tokens: int, vocab: int) -> tuple[RowDataset, Any]:
    """One pair on a row of ``tokens``, with numbers of its reference, and a tokenizer for trainers.

    The reference is one that finds all tokens alike likely, and the chosen answer a little better: by what
    sums of so many tokens differ by, so that gradients do not vanish.
    """
    _, tokenizer = make_data(made_up_rows(2), vocab, None)
    prompt, answer = lengths_of(tokens)
    ids = torch.randint(4, vocab, (tokens,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[prompt], ids[prompt + answer] = 2, 3  # the answers have no beginning in common
    bounds = torch.tensor([[0, prompt, prompt + answer, tokens]])
    logp = -answer * math.log(vocab)
    numbers = Ragged(torch.tensor([logp + math.sqrt(2 * answer), logp]), torch.tensor([0, 2]))
    report = DataReport("made up", 1, 1)
    return RowDataset.of_pairs(ids, bounds, torch.arange(1), {REFERENCE: numbers}, report), tokenizer


@lru_cache
def truth_of(model: str, tokens: int, precision: str, device: torch.device) -> Truth:
    """The first step in fp64, which nothing here is shared with but weights and token ids."""
    data, tokenizer = make_pair(tokens, SIZES[model].vocab)
    try:
        return true_steps(SIZES[model], [[data[0]]], tokenizer, device, precision, "sdpa")
    finally:
        _free(device)


def measure_apart(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`measure` where nothing else can be in its peak: on a CPU a process of its own.

    Raises:
        DeviceLost: after it the device answers no more.
    """
    if device.type != "cuda":
        found = in_a_process("benchmarks.context", job, CONTENDER_SECONDS)
        # No mistake of its own: the machine is too small or too slow.
        return {"not_run": f"{found['beyond']}: {found['failed']}"} if "beyond" in found else found
    found = measure(job)
    recover(device, job["name"], found.get("failed", "the device was lost after it"))
    return found


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """One contender at one length, in this process: checked, its peak, then timed; or why not."""
    device, is_peer = torch.device(job["device"]), job["name"] == "trl"
    try:
        return _measure(job, device)
    except ImportError as error:
        return {"not_run" if is_peer else "failed": f"not installed: {error}"}
    except Exception as error:  # whatever it does, the others are measured
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        return {"not_run": f"does not fit: {why(error)}"} if is_full else {"failed": why(error)}
    finally:
        _free(device)


def _measure(job: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    name, tokens, steps = job["name"], job["tokens"], job["steps"]
    checked_at, (losses, norms), by = job["check"]
    if checked_at != tokens:
        short, batch = build(job, checked_at, device)
        found = first_step(short, batch)
        del short, batch
        _free(device)
        reason, errors = _held(found, Truth(losses, norms, torch.float64), job["precision"])
        if reason is not None:
            return {"failed": reason}
    contender, batch = build(job, tokens, device)
    found = first_step(contender, batch)  # libraries, thread pools and Adam's state come with it
    if checked_at == tokens:
        reason, errors = _held(found, Truth(losses, norms, torch.float64), job["precision"])
        if reason is not None:
            return {"failed": reason}
    if not steps:
        return found
    peak = peak_mib(lambda: contender.step(batch), device)
    timer, start = Timer(device), time.monotonic()
    samples: list[Sample] = []
    while len(samples) < steps and (not samples or time.monotonic() - start < CONTENDER_SECONDS / 3):
        samples.append(timer(lambda: contender.step(batch)))
    times = [sample.ms for sample in samples]
    summary = summarise(times)
    return {
        **summary, **of_host(samples, device), **found, **errors, "held_to": by, "peak_mib": peak,
        "useful_tokens_per_s": tokens / summary["median_ms"] * 1e3, "samples_ms": times,
        "version": package_version("trl" if name == "trl" else "fastdpo"),
    }  # fmt: skip


def build(job: Mapping[str, Any], tokens: int, device: torch.device) -> tuple[Contender, Any]:
    """A contender, and the batch of a row of ``tokens`` as it takes it."""
    size, name = replace(SIZES[job["model"]], pairs=1), job["name"]
    data, tokenizer = make_pair(tokens, size.vocab)
    settings = dict(WAYS[name])
    if name != "trl":
        settings["batch_layout"] = "shared_prompt"
    if name.startswith("carried"):
        settings["context_chunk"] = chunk_of(tokens)
    contender = Contender(name, size, data, tokenizer, device, job["precision"], "sdpa", settings)
    return contender, contender.trainer._prepare_inputs(contender.collate([data[0]]))


def first_step(contender: Contender, batch: Any) -> dict[str, float]:
    loss = contender.step(batch)
    return {"loss": float(loss), "gradient_norm": float(contender.gradient_norm)}


def _held(found: Mapping[str, float], truth: Truth, precision: str) -> tuple[str | None, dict[str, float]]:
    errors = truth.errors({"losses": [found["loss"]], "gradient_norms": [found["gradient_norm"]]})
    return wrong(errors, precision), errors


def _free(device: torch.device) -> None:
    gc.collect()  # trainers and models refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def limit_memory() -> None:
    """To what is free now: what does not fit raises, instead of having the system kill somebody."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return
    held = int(text.split("VmData:")[1].split()[0]) * 1024
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + free_bytes(torch.device("cpu")), most))


def main(argv: list[str]) -> int:
    """The child: a job as JSON, the result as the last line of what it prints."""
    limit_memory()
    print(json.dumps(measure(json.loads(argv[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
