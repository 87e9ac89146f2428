"""What is run under the engines: names, and what differs from the simplest case."""

from __future__ import annotations

from typing import Any

# Unit of the head: the root's, one of its own, or one with the last norm (tail), as accelerate has it.
FSDP: dict[str, dict[str, Any]] = {
    f"{engine} {unit} {how}{extra}": {"engine": engine, "unit": unit, "how": how, **options}
    for engine, unit, how, extra, options in [
        ("FSDP2", "root", "logps", "", {}),
        ("FSDP2", "own", "loss", "", {}),
        ("FSDP2", "own", "logps", ", recomputed", {"mode": "recompute"}),
        ("FSDP2", "tail", "packed", "", {}),
        ("FSDP2", "tail", "loss", ", tied", {"tied": True}),
        ("FSDP2", "root", "packed", ", tied", {"tied": True}),
        ("FSDP2", "own", "logps", ", frozen head", {"frozen_head": True}),
        ("FSDP2", "own", "loss", ", a rank without labels", {"labels": 2}),
        ("FSDP2", "tail", "loss", ", accumulated", {"accumulates": True}),
        ("FSDP2", "tail", "logps", ", checkpointing", {"checkpointing": True}),
        ("FSDP2", "tail", "loss", ", patched last", {"is_late": True}),
        ("FSDP2", "own", "logps", ", patched last", {"is_late": True}),
        ("FSDP2", "tail", "loss", ", LoRA", {"adapter": "backbone"}),
        ("FSDP2", "own", "loss", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "tail", "logps", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "own", "loss", ", head trained whole", {"adapter": "saved"}),
        ("FSDP1", "root", "loss", "", {}),
        ("FSDP1", "root", "logps", ", tied", {"tied": True}),
        ("FSDP1", "own", "logps", "", {}),
        ("FSDP1", "own", "packed", "", {}),
        ("FSDP1", "root", "loss", ", a rank without labels", {"labels": 2}),
        ("FSDP1", "own", "loss", ", LoRA on the head", {"adapter": "head"}),
    ]
}

ZERO: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage} {how}{extra}": {"stage": stage, "how": how, **options}
    for stage, how, extra, options in [
        (1, "loss", "", {}),
        (2, "logps", ", tied", {"tied": True}),
        (2, "loss", ", accumulated", {"accumulate": 2}),
        (3, "logps", "", {}),
        (3, "packed", ", tied", {"tied": True}),
        (3, "logps", ", recomputed", {"mode": "recompute"}),
        (3, "loss", ", a rank without labels", {"labels": 2}),
        (3, "loss", ", accumulated", {"accumulate": 2}),
        (3, "logps", ", partitioned first", {"is_partitioned_first": True}),
        (3, "loss", ", LoRA", {"adapter": "backbone"}),
        (3, "logps", ", LoRA on the head", {"adapter": "head"}),
        (3, "loss", ", LoRA on the head", {"adapter": "head"}),
        (3, "loss", ", head trained whole", {"adapter": "saved"}),
    ]
}
