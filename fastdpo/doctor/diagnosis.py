"""``fastdpo doctor``: what is installed, what will run here, and why the rest will not."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.doctor.trainers import trainer_lines
from fastdpo.integrations.source_patch import installed_version
from fastdpo.integrations.trl_releases import said_by_version
from fastdpo.ops.backends import backend_report, explain_auto
from fastdpo.plan.schedule import MIB
from fastdpo.types import Execution

# Beside what fastdpo cannot be installed without: what each is for.
OPTIONAL = {
    "triton": "the Triton kernels",
    "peft": "training adapters",
    "datasets": "datasets directories and hub ids",
    "pyarrow": "Parquet files",
    "matplotlib": "curves.png",
    "trl": "patch_trl",
}
REQUIRED = ("torch", "transformers", "accelerate")
LARGE_SHARE = 0.15  # of a GPU's memory, beside a model, its gradients and its activations


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What ``doctor`` found: titled sections of (name, finding) lines. Printed or shown, it is the report."""

    sections: dict[str, list[tuple[str, str]]]

    def __str__(self) -> str:
        width = max(len(name) for lines in self.sections.values() for name, _ in lines)
        text = []
        for title, lines in self.sections.items():
            text += [title, *(f"  {name:<{width}}  {finding}" for name, finding in lines), ""]
        return "\n".join(text).rstrip()

    __repr__ = __str__


def doctor(
    model: Any = None,
    *,
    context: int | None = None,
    memory_gib: float | None = None,
    context_chunk: int | None = None,
) -> Diagnosis:
    """Look at this machine, and at a model or a trainer if one is given. Nothing runs, nothing is changed.

    Args:
        model: path or hub id of a causal language model, of which only the configuration is read; or a model;
            or a `PreferenceTrainer` or another ``Trainer`` (TRL's). Of a model: its head, whether it is
            patched, and mode, backend, plan and memory of 4096 labelled tokens. Of a trainer: these for the
            largest batch of its ``train_dataset``, and its longest pair. What would be refused says why.
        context: tokens of a row (a prompt and its answers): of a model also what a step on it takes, in each
            way of running it, and the longest row that fits. It is counted, which takes half a minute.
        memory_gib: of the card that it is to fit on, in GiB; None for this machine's first GPU.
        context_chunk: tokens of a chunk where the context is carried; None for 1024.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: a context without a model, or without a card, or numbers that are none.
    """
    check_context(model, context, memory_gib, context_chunk)
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Kernels": _kernels(),
        "Extension": [("fastdpo._C", _extension())],
        "Trainers": trainer_lines(),
        "TRL": _trl(),
        "LLaMA-Factory": _llama_factory(),
    }
    if isinstance(model, str):
        sections[f"Model {model}"] = _model(model)
    elif model is not None:
        sections |= _loaded(model)
    if context is not None:
        sections[f"Context of {context} tokens"] = _context(model, context, memory_gib, context_chunk)
    return Diagnosis(sections)


def check_context(
    model: Any, context: int | None, memory_gib: float | None, context_chunk: int | None
) -> None:
    """Raise ValueError for what ``doctor`` cannot say anything of."""
    if context is None:
        for name, value in (("memory_gib", memory_gib), ("context_chunk", context_chunk)):
            if value is not None:
                raise ValueError(f"{name}: got {value!r} without context, wanted both")
        return
    for name, number in (("context", context), ("memory_gib", memory_gib), ("context_chunk", context_chunk)):
        if number is not None and not number > 0:
            raise ValueError(f"{name}: got {number!r}, wanted more than 0")
    if model is None:
        raise ValueError("context: got a value without a model, wanted both")
    if memory_gib is None and not torch.cuda.is_available():
        raise ValueError("memory_gib: got None where torch sees no GPU, wanted the GiB of a card")


def _context(
    model: Any, context: int, memory_gib: float | None, context_chunk: int | None
) -> list[tuple[str, str]]:
    from fastdpo.doctor.context import DEFAULT_CHUNK, context_lines
    from fastdpo.doctor.model import is_trainer
    from fastdpo.integrations.auto_class import read_config
    from fastdpo.integrations.lm_head import unwrap

    if memory_gib is None:
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    try:
        if isinstance(model, str):
            config = read_config(model)
        else:
            inner: Any = unwrap(model.model if is_trainer(model) else model)
            config = inner.config
    except (OSError, ValueError, KeyError) as error:
        return [("model", f"cannot be read: {_one_line(error)}")]
    chunk = DEFAULT_CHUNK if context_chunk is None else context_chunk
    return context_lines(config, context, memory_gib=memory_gib, chunk=chunk)


def _loaded(target: Any) -> dict[str, list[tuple[str, str]]]:
    from fastdpo.doctor.model import is_trainer, model_sections, trainer_sections

    if is_trainer(target):
        return trainer_sections(target)
    if isinstance(target, torch.nn.Module):
        return model_sections(target)
    raise TypeError(f"model: got {type(target).__name__}, wanted a path or id, a model, or a trainer")


def _versions() -> list[tuple[str, str]]:
    lines = [
        ("fastdpo", installed_version("fastdpo") or "in its source tree, not installed"),
        ("python", platform.python_version()),
    ]
    lines += [(name, installed_version(name) or "not installed") for name in REQUIRED]
    return lines + [
        (name, installed_version(name) or f"not installed: needed for {use}")
        for name, use in OPTIONAL.items()
    ]


def _devices() -> list[tuple[str, str]]:
    lines = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
        capability = f"compute capability {found.major}.{found.minor}"
        lines.append((f"cuda:{index}", f"{found.name}, {size}, {capability}"))
        lines += _budgets(f"cuda:{index}", found.total_memory)
    if len(lines) == 1:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        lines.append(("cuda", f"none that torch can use ({built})"))
    return lines


def _budgets(name: str, total_bytes: int) -> list[tuple[str, str]]:
    """A line where the default budgets are much of a small GPU, or of a slice of a large one (MIG)."""
    default = Execution()
    workspace, cache = default.workspace_mib, default.cache_mib
    share = (workspace + cache) * MIB / total_bytes
    if share <= LARGE_SHARE:
        return []
    smaller = f"Execution(workspace_mib={workspace // 4}, cache_mib={cache // 4})"
    said = f"the defaults, {workspace} MiB of logits and {cache} MiB of kept D, are {share:.0%} of it"
    return [(f"{name} budgets", f"{said}; {smaller} takes a quarter of that")]


def _kernels() -> list[tuple[str, str]]:
    """Every backend, and of every device what ``auto`` takes and why."""
    lines = [(name, "runs" if reason is None else reason) for name, reason in backend_report().items()]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            lines.append((f"auto on {device}", explain_auto(device)))
        except torch.OutOfMemoryError as error:
            lines.append((f"auto on {device}", f"cannot be asked: {error}"))
    return lines


def _extension() -> str:
    try:
        from fastdpo import _C
    except ImportError as error:
        return f"not built ({error}); install fastdpo with a C++17 compiler on PATH"
    if not _C.built_with_cuda:
        return "built without CUDA (no nvcc when it was installed)"
    version = f"{_C.cuda_runtime_version // 1000}.{_C.cuda_runtime_version % 1000 // 10}"
    return f"built with CUDA {version} for {_C.cuda_archs.replace(' ', ', ')}"


def _trl() -> list[tuple[str, str]]:
    is_loaded = "fastdpo.integrations.trl" in sys.modules  # and may have patched it
    if not is_loaded and (said := said_by_version(installed_version("trl"))) is not None:
        return said
    from fastdpo.integrations.trl import trl_status

    return trl_status()


def _llama_factory() -> list[tuple[str, str]]:
    if installed_version("llamafactory") is None:
        return [("patch_llama_factory", "LLaMA-Factory is not installed")]
    from fastdpo.integrations.llama_factory import llama_factory_status

    return llama_factory_status()


def _model(name: str) -> list[tuple[str, str]]:
    from fastdpo.integrations.auto_class import auto_class, read_config
    from fastdpo.integrations.lm_head import read_head

    try:
        config = read_config(name)
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError, KeyError) as error:
        return [("model", f"cannot be read: {_one_line(error)}")]
    lines = [("class", type(model).__name__)]
    try:
        head = read_head(model)
    except ValueError as error:
        return [*lines, ("head", f"refused: {_one_line(error)}")]
    vocab, hidden = head.weight.shape
    tied = head.weight is model.get_input_embeddings().weight
    lines += [
        ("head", f"vocabulary {vocab}, hidden {hidden}, {'tied to the embeddings' if tied else 'not tied'}"),
        ("bias", "none" if head.bias is None else "yes"),
        (
            "logits",
            f"scale {head.logit_scale:g}, softcap {head.softcap if head.softcap is not None else 'none'}",
        ),
        ("logits avoided", f"{vocab * 4096 * 4 / 2**30:.2f} GiB per 4096 tokens in fp32"),
    ]
    return lines + _tokenizer(name)


def _tokenizer(name: str) -> list[tuple[str, str]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        return [("tokenizer", f"cannot be read: {_one_line(error)}")]
    return [
        ("EOS token", tokenizer.eos_token or "none: pairs given as strings will be refused"),
        ("padding token", tokenizer.pad_token or "none: another id is used, which masking makes harmless"),
        (
            "chat template",
            "yes" if tokenizer.chat_template else "none: pairs given as messages will be refused",
        ),
    ]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
