"""Which row-kernel backend runs here, and why the others do not.

A backend asked for by name runs or raises; only ``auto`` chooses. The choice depends on the device and
the dtype alone, so that every call of a run, with or without gradients, goes through the same kernel.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import cast

import torch

from fastdpo import reference, reference_sequence
from fastdpo.kernels import divergence
from fastdpo.kernels.contract import RowKernel
from fastdpo.kernels.divergence import DivergenceKernel
from fastdpo.kernels.sequence import SequenceKernels

DEVICE_TYPE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
# Backends with a kernel for divergences over the vocabulary.
DIVERGENCE_BACKENDS = ("reference", "cpu", "triton")
# In order of preference on each kind of device.
AUTO_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def unavailable_reason(
    name: str, device: torch.device, logits_dtype: torch.dtype = torch.float32
) -> str | None:
    """None when the backend runs on the device, else why it does not and what would help."""
    if name == "reference":
        return None
    if logits_dtype == torch.float64:
        return "float64 runs on the 'reference' backend only"
    try:
        module = import_module(f"fastdpo.kernels.{name}")
    except ImportError as error:
        return f"cannot be imported: {error}"
    reason = module.unavailable_reason(device)
    return cast("str | None", reason)


def resolve_backend(name: str, device: torch.device, logits_dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs for ``name``, which may be ``auto``.

    Raises:
        TypeError: the backend asked for by name cannot process float64.
        ValueError: the backend asked for by name does not run on this device.
    """
    if name == "auto":
        for candidate in AUTO_ORDER.get(device.type, ()):
            if unavailable_reason(candidate, device, logits_dtype) is None:
                return candidate
        if logits_dtype != torch.float64 and device.type in AUTO_ORDER:
            _warn_of_no_kernel(device.type, device.index)
        return "reference"
    reason = unavailable_reason(name, device, logits_dtype)
    if reason is not None:
        error = TypeError if logits_dtype == torch.float64 else ValueError
        raise error(f"backend: {name!r} does not run on {device}: {reason}")
    return name


def resolve_divergence_backend(name: str, device: torch.device, logits_dtype: torch.dtype) -> str:
    """``resolve_backend`` for the divergence kernel, which not every backend has.

    Raises:
        TypeError, ValueError: as there.
    """
    if name == "auto":
        chosen = resolve_backend(name, device, logits_dtype)
        return chosen if chosen in DIVERGENCE_BACKENDS else "reference"
    return resolve_backend(name, device, logits_dtype)


@cache
def _warn_of_no_kernel(device_type: str, index: int | None) -> None:
    """Once for each device."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    reasons = "; ".join(f"{name}: {unavailable_reason(name, device)}" for name in AUTO_ORDER[device_type])
    warnings.warn(
        f"no kernel of fastdpo runs on {device}, so plain torch computes, as exact but slower ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )


def load_row_kernel(name: str) -> RowKernel:
    """The row kernel of a resolved backend."""
    module = reference if name == "reference" else import_module(f"fastdpo.kernels.{name}")
    return cast(RowKernel, module.row_kernel)


def load_divergence_kernel(name: str) -> DivergenceKernel:
    """The divergence kernel of a backend that ``resolve_divergence_backend`` returned."""
    module = divergence if name == "reference" else import_module(f"fastdpo.kernels.divergence_{name}")
    return cast(DivergenceKernel, module.divergence_kernel)


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, over which the waves of a product go; 0 for a CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def load_sequence_kernels(name: str) -> SequenceKernels:
    """The sequence kernels of a resolved backend: they run where its row kernel does."""
    if name == "reference":
        return cast(SequenceKernels, reference_sequence)
    return cast(SequenceKernels, import_module(f"fastdpo.kernels.sequence_{name}"))


def backend_report() -> dict[str, str | None]:
    """For every backend, None if it runs on this machine, else the reason why not."""
    report: dict[str, str | None] = {"reference": None}
    for name, device_type in DEVICE_TYPE.items():
        if device_type == "cuda" and not torch.cuda.is_available():
            report[name] = "no CUDA device is available to torch"
        else:
            report[name] = unavailable_reason(name, torch.device(device_type))
    return report
