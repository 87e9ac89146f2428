"""Which sizes each suite measures at each preset: of ``fastdpo bench``, and of pytest-benchmark.

``tiny`` is for tests, ``small`` for a CPU, ``gpu`` what an H200 should do in about 25 minutes: every model at
N = 16384, one model over N and over the share of ignored labels; ``full`` is every model at every N and
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.problem import MODELS, PASSES, Size
from benchmarks.rows import VOCABULARIES
from fastdpo.ops.backends import DEVICE_TYPE, unavailable_reason

PRESETS = ("tiny", "small", "gpu", "full")
# Whose targets are in DESIGN section 6.
TARGET_MODELS = ("llama-3-8b", "qwen2.5-7b", "gemma-2-9b")
REAL_MODELS = tuple(name for name in MODELS if name not in ("small", "tiny"))
TOKENS = (1024, 4096, 16384, 65536)
IGNORED_PERCENT = (0, 50, 80)
CENTRE = Size("llama-3-8b", 16384)
COMPILED = "left out: compiled anew for every size; timed at one size of a preset, or when asked for"
# Of whole steps: sizes of `benchmarks.step_contenders` and their precision.
STEPS = {
    "tiny": (("tiny", "fp32"), ("tiny-lora", "fp32")),
    "small": (("mini-llama", "fp32"), ("small-llama", "fp32")),
    "gpu": (("qwen2.5-0.5b", "bf16"), ("llama-3.2-1b", "bf16"), ("llama-3-8b-lora", "bf16")),
}
# Of whole steps against context length: the same, and tokens of a row, shortest first.
CONTEXTS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[int, ...]]] = {
    "tiny": ((("tiny", "fp32"),), (64, 128)),
    "small": ((("mini-llama", "fp32"),), (2048, 4096, 8192, 16384)),
    "gpu": (
        (("llama-3.2-1b", "bf16"), ("llama-3-8b-lora", "bf16")),
        tuple(2048 * 2**k for k in range(8)),
    ),
}

SizeTasks = list[tuple[Size, tuple[str, ...]]]


def preset_of(device: torch.device) -> str:
    """The preset of who names none."""
    return "gpu" if device.type == "cuda" else "small"


def op_sizes(preset: str) -> SizeTasks:
    """Sizes, and which tasks at each."""
    every = tuple(PASSES)
    if preset == "tiny":
        return [(Size("tiny", 256, torch.float32, 50), every)]
    if preset == "small":
        return [(Size("small", 1024, torch.float32, share), every) for share in IGNORED_PERCENT]
    if preset == "full":
        return [
            (Size(model, tokens, ignored_percent=share), every)
            for model in REAL_MODELS for tokens in TOKENS for share in IGNORED_PERCENT
        ]  # fmt: skip
    both = ("stash", "pairs")
    sizes = [(CENTRE, every)]
    sizes += [(replace(CENTRE, num_tokens=n), both) for n in TOKENS if n != CENTRE.num_tokens]
    sizes += [(replace(CENTRE, ignored_percent=share), both) for share in IGNORED_PERCENT[1:]]
    for model in REAL_MODELS:
        if model != CENTRE.model:
            sizes.append((replace(CENTRE, model=model), ("score", *both) if model in TARGET_MODELS else both))
    return sizes + [(Size(model, 4096), ("cache",)) for model in TARGET_MODELS]


def accuracy_sizes(preset: str) -> SizeTasks:
    """Errors do not depend on how long a run is: N = 4096 is enough for chunks, groups and sums in bf16."""
    every = tuple(PASSES)
    return {
        "tiny": [(Size("tiny", 256, dtype), every) for dtype in (torch.bfloat16, torch.float32)],
        # Products of 16-bit operands are slow on a CPU that has no instructions for them.
        "small": [(Size("tiny", 2048), every), (Size("small", 1024, torch.float32), every)],
        "gpu": [(Size(model, 4096), ("cache", "pairs", "ce")) for model in TARGET_MODELS],
        "full": [(Size(model, 4096), every) for model in REAL_MODELS],
    }[preset]


def memory_points(preset: str, tasks: Sequence[str] | None = None) -> dict[tuple[Size, str], list[str]]:
    """A size and a task -> the axes that it lies on: from a centre along each; T at a fixed N, so that only
    the length of a pair changes."""
    if preset in ("tiny", "small"):
        base = Size("tiny", 512, torch.float32, vocab=8000)
        points = {"N": [512]} if preset == "tiny" else {
            "N": [512, 1024, 2048, 4096], "V": [4000, 8000, 16000, 32000], "T": [128, 256, 512, 1024]
        }  # fmt: skip
        if preset == "small":
            base = replace(base, model="small", num_tokens=2048, vocab=None)
    else:
        base = CENTRE
        points = {
            "N": [2048, 8192, 16384, 32768], "V": [32000, 128256, 152064, 256000],
            "T": [512, 1024, 2048, 4096],
        }  # fmt: skip
    # The frozen head over N alone: its curves over V and T are those of the trained one less dweight.
    tasks = [task for task in ("pairs", "pairs-frozen") if task in (tasks or PASSES)]
    axes_of: dict[tuple[Size, str], list[str]] = {}
    for axis, values in points.items():
        for value in values:
            size = {
                "N": replace(base, num_tokens=value),
                "V": replace(base, vocab=value),
                "T": replace(base, sequence_length=value),
            }[axis]
            # Written out: comparable.
            size = replace(size, vocab=size.vocab_size, sequence_length=size.length)
            for task in tasks if axis == "N" and preset != "tiny" else tasks[:1]:
                axes_of.setdefault((size, task), []).append(axis)
    return axes_of


def row_sizes(preset: str) -> list[tuple[int, int, torch.dtype]]:
    """Vocabulary, rows of a chunk, and the dtype of its logits."""
    vocabularies = {"tiny": (4001,), "small": (32000,)}.get(preset, VOCABULARIES)
    rows = 64 if preset in ("tiny", "small") else 2048
    return [(vocab, rows, dtype) for vocab in vocabularies for dtype in (torch.float32, torch.bfloat16)]


def row_backends(device: torch.device) -> list[str]:
    """Whose kernels run here; where none does, plain torch."""
    return [name for name in DEVICE_TYPE if unavailable_reason(name, device) is None] or ["reference"]


def step_sizes(preset: str) -> Sequence[tuple[str, str]]:
    """Models and precisions of whole steps."""
    return STEPS.get(preset, STEPS["gpu"])


def context_sizes(preset: str) -> tuple[Sequence[tuple[str, str]], Sequence[int]]:
    """Models and precisions of steps against context length, and the lengths of their row."""
    return CONTEXTS.get(preset, CONTEXTS["gpu"])


def is_compiled_at(size: Size) -> bool:
    """Whether contenders that are compiled for every size, for a minute, are so for this one."""
    return size in (CENTRE, Size("small", 1024, torch.float32))
