"""``fastdpo plan``: what its settings ask for, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastdpo.doctor.context import GIB
from fastdpo.doctor.machines import MULTIPROCESSORS, PAIR_TOKENS, Machine, Run, plan_machines
from fastdpo.integrations.auto_class import read_config
from fastdpo.plan.machine_traffic import COLLECTIVES

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HELD = ("weights", "gradients", "optimizer", "reference", "engine", "activations", "head")
_ADDED = {
    "ddp": "at the most: autocast's copies of the weights, and the buckets that gradients are reduced in",
    "fsdp2": "the head's unit, two layers' weights and one's gradients, whole for the moment",
    "zero1": "a bucket of gradients",
    "zero2": "a bucket of gradients",
    "zero3": "1e9 whole weights, DeepSpeed's default, and a bucket of gradients",
    "tp": "what FSDP2 has whole for the moment, and at the most autocast's copies of the weights",
}


def checked_run(options: argparse.Namespace) -> Run:
    """What is planned.

    Raises:
        ValueError: settings that do not go together, most of which training refuses too.
    """
    engine = "tp" if options.engine == "fsdp2" and options.tp_size > 1 else options.engine
    labelled = options.labelled_tokens
    labelled = -(-options.tokens // 4) if labelled is None else labelled
    reference = options.reference or ("adapter" if options.lora else "copy")
    chunk, tp, mib = options.context_chunk, options.tp_size, options.memory_gib
    replicas = options.dp_replicate_size
    refused = {
        f"tokens: got {options.tokens}, wanted more than 0": options.tokens < 1,
        f"labelled_tokens: got {labelled}, wanted 1 to {options.tokens}, the tokens": not (
            1 <= labelled <= options.tokens
        ),
        f"memory_gib: got {mib}, wanted more than 0": mib <= 0,
        f"context_chunk: got {chunk}, wanted more than 0": chunk is not None and chunk < 1,
        f"context_chunk: got {chunk} under {engine}, which runs whole models; wanted ddp, zero1 or zero2": (
            chunk is not None and engine in ("fsdp2", "zero3", "tp")
        ),
        "reference: got adapter without --lora: all weights are trained; wanted copy, precomputed or none": (
            reference == "adapter" and not options.lora
        ),
        f"tp_size: got {tp}, wanted 1 or more": tp < 1,
        f"tp_size: got {tp} under {engine}, wanted engine tp or fsdp2": tp > 1 and engine != "tp",
        "tp_size: got 1 under tp, wanted 2 or more: how many GPUs share each layer": tp == 1
        and engine == "tp",
        f"dp_replicate_size: got {replicas}, wanted 1 or more": replicas < 1,
        f"dp_replicate_size: got {replicas} under {engine}, wanted fsdp2 without tp_size": (
            replicas > 1 and engine != "fsdp2"
        ),
        "lora: got it under tp, where what adapters exchange is not counted in this version; wanted fsdp2": (
            options.lora and engine == "tp"
        ),
        f"dtype: got {options.dtype} under {engine}: DeepSpeed computes in bf16 by its own means; wanted "
        "--mixed_precision bf16, or float32": (
            engine.startswith("zero") and options.mixed_precision == "no" and options.dtype == "bfloat16"
        ),
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(what)
    for count in options.gpus:
        if count % tp:
            raise ValueError(f"gpus: got {count}, wanted a multiple of tp_size, {tp}")
        if replicas > 1 and (count % replicas or count == replicas):
            raise ValueError(
                f"gpus: got {count}, wanted a multiple of dp_replicate_size, {replicas}, and 2 or more to "
                "split each copy over"
            )
    return Run(
        engine=engine,
        tp_size=tp,
        is_lora=options.lora,
        tokens=options.tokens,
        labelled_tokens=labelled,
        dtype=_DTYPES[options.dtype or ("bfloat16" if options.lora else "float32")],
        is_mixed=options.mixed_precision == "bf16",
        reference=reference,
        is_checkpointed=not options.no_activation_checkpointing,
        context_chunk=chunk,
        replicas=replicas,
    )


def config_of(name: str) -> Any:
    """The config of a model.

    Raises:
        ValueError: there is none, or it cannot be read, or is not of a language model.
    """
    try:
        config = read_config(name)
    except Exception as error:  # whatever transformers, its hub and JSON raise
        raise ValueError(f"model: got {name!r}, whose config cannot be read: {error}") from error
    for size in ("hidden_size", "vocab_size", "num_hidden_layers"):
        if not isinstance(getattr(config, size, None), int):
            raise ValueError(
                f"model: got a config of {config.model_type} without {size}, wanted a causal LM's"
            )
    return config


def machine_report(options: argparse.Namespace) -> str:
    """What ``fastdpo plan`` prints.

    Raises:
        ValueError, ImportError: as `checked_run`, `config_of` and `plan_machines`.
    """
    run = checked_run(options)
    config = config_of(options.model)
    machines = plan_machines(config, run, options.gpus)
    lines = [f"Plan of {options.model}: predicted, not measured", ""]
    lines += [f"  {name:<12}{text}" for name, text in _assumed(run)]
    lines += ["", "Memory of a GPU in GiB"]
    lines += _table(("GPUs", *_HELD, "total", "fits"), [_memory(m, options.memory_gib) for m in machines])
    lines += ["", "Sent by a GPU in a step, in GiB"]
    titles = [f"{of} {name}" for of in ("backbone", "head") for name in COLLECTIVES]
    kept = [title for title in titles if any(m.sent(*title.split(" ", 1)) for m in machines)]
    rows = [
        [str(m.num_gpus), *(_gib(m.sent(*t.split(" ", 1))) for t in kept), _gib(m.sent())] for m in machines
    ]
    lines += _table(("GPUs", *kept, "total"), rows)
    lines += ["", "Head", *(f"  {line}" for line in _of_heads(machines))]
    return "\n".join(lines)


def _assumed(run: Run) -> Iterator[tuple[str, str]]:
    what = "LoRA of rank 16 on all linear layers but the head" if run.is_lora else "all weights trained"
    tensors = f", tensors over {run.tp_size} GPUs" if run.tp_size > 1 else ""
    tensors += f" in {run.replicas} copies of the model" if run.replicas > 1 else ""
    yield "run", f"{run.engine}{tensors}; {what}; Adam; reference: {run.reference}"
    computing = "bf16" if run.is_mixed else str(run.dtype).removeprefix("torch.")
    yield "dtypes", f"weights loaded as {str(run.dtype).removeprefix('torch.')}, activations in {computing}"
    yield (
        "step",
        f"one micro-batch a GPU: a row of {run.tokens} tokens, {run.labelled_tokens} of them labelled",
    )
    ways = {
        "plain": "all kept",
        "checkpointed": "checkpointed",
        "carried": f"carried in chunks of {run.context_chunk}",
    }
    yield "activations", f"{ways[run.way]}; counted on the step's own code, without what kernels take inside"
    yield "engine", _ADDED[run.engine]
    yield (
        "head",
        (
            f"planned for {MULTIPROCESSORS} multiprocessors and pairs of {PAIR_TOKENS} labelled tokens; its "
            "workspace, what it keeps, and its gradients for the moment"
        ),
    )
    yield "total", "all at their most at once: more than a step has; without CUDA's context and fragments"
    yield "sent", "by rings: (n - 1) / n of what n GPUs gather or scatter, twice that of what they all reduce"


def _memory(machine: Machine, memory_gib: float) -> list[str]:
    fits = "yes" if machine.total <= memory_gib * GIB else f"no ({memory_gib:g} GiB)"
    sizes = [_gib(machine.held[name]) for name in _HELD]
    return [str(machine.num_gpus), *sizes, _gib(machine.total), fits]


def _of_heads(machines: Sequence[Machine]) -> Iterator[str]:
    for machine in machines:
        plan, ways = machine.head, machine.ways
        text = (
            f"{machine.num_gpus} GPUs: mode {plan.mode}, {plan.num_tokens} tokens x {plan.vocab_size}, "
            f"workspace {plan.workspace_bytes / 2**20:.0f} MiB, kept {plan.kept_bytes / 2**20:.0f} MiB"
        )
        if ways is not None:
            moved = "hidden states move" if machine.moves_states else "the weight moves"
            text += (
                f"; {moved} (in a unit of its own: the weight {ways.weight_bytes / 2**20:.0f} MiB, states "
                f"{ways.states_bytes / 2**20:.0f} MiB)"
            )
        yield text


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    return [
        "  " + "  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in (titles, *rows)
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
