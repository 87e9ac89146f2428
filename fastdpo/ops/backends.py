"""Which row-kernel backend runs here, and why the others do not.

A backend asked for by name runs or raises; only ``auto`` chooses, by ``ROW_KERNELS`` and by what is asked of
each backend once a device. The choice hangs on the device and the kind of kernel alone, so that every call of
a run, with or without gradients, goes through the same kernel.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import NamedTuple, cast

import torch

from fastdpo.kernels import divergence
from fastdpo.kernels.contract import RowKernel
from fastdpo.kernels.divergence import DivergenceKernel
from fastdpo.kernels.sequence import SequenceKernels

DEVICE_TYPE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
# Backends with a kernel for divergences over the vocabulary.
DIVERGENCE_BACKENDS = ("reference", "cpu", "triton")
# With a forward pass of mode ``lean`` that stores no logits: before all others there.
LEAN_BACKENDS = ("triton",)


class Preference(NamedTuple):
    """The backends of one kind of device: the first that runs is what ``auto`` takes; and why this order."""

    device_type: str
    capability: tuple[int, int]  # of a GPU, from this one on
    backends: tuple[str, ...]
    why: str


# By capability, not by V or dtype: a policy and a reference of other dtypes keep one kernel.
ROW_KERNELS = (
    Preference(
        "cuda",
        (9, 0),
        ("cuda", "triton"),
        "a cluster of thread blocks holds a row on chip and reads each logit once; Triton reads it twice",
    ),
    Preference(
        "cuda",
        (0, 0),
        ("triton", "cuda"),
        "without clusters neither holds a long row on chip, and Triton reads it again from L2 where it fits",
    ),
    Preference(
        "cpu", (0, 0), ("cpu",), "C++ reads each logit from memory once where a row fits in the cache"
    ),
)


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


def preference(device: torch.device) -> Preference | None:
    """The row of ``ROW_KERNELS`` for a device; None where plain torch is all there is."""
    capability = (0, 0)
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    rows = (row for row in ROW_KERNELS if row.device_type == device.type and row.capability <= capability)
    return next(rows, None)


def resolve_backend(
    name: str, device: torch.device, logits_dtype: torch.dtype = torch.float32, mode: str | None = None
) -> str:
    """The backend that runs for ``name``, which may be ``auto``.

    Args:
        name: of ``Execution.backend``.
        device: of the logits.
        logits_dtype: float64 is plain torch's alone.
        mode: what runs, where it is settled; ``lean`` has kernels of its own.

    Raises:
        TypeError: the backend asked for by name cannot process float64.
        ValueError: the backend asked for by name does not run on this device.
    """
    if name == "auto":
        chosen = _first_that_runs(device, logits_dtype, LEAN_BACKENDS if mode == "lean" else ())
        if chosen is None and logits_dtype != torch.float64 and preference(device) is not None:
            _warn_of_no_kernel(device.type, device.index)
        return chosen or "reference"
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
    if name != "auto":
        return resolve_backend(name, device, logits_dtype)
    chosen = _first_that_runs(device, logits_dtype, DIVERGENCE_BACKENDS)
    return chosen if chosen in DIVERGENCE_BACKENDS else "reference"


def _first_that_runs(
    device: torch.device, logits_dtype: torch.dtype = torch.float32, before_others: tuple[str, ...] = ()
) -> str | None:
    """Of the device's backends, those named ``before_others`` first; None where none of them runs."""
    found = preference(device)
    names = () if found is None else sorted(found.backends, key=lambda name: name not in before_others)
    running = (name for name in names if unavailable_reason(name, device, logits_dtype) is None)
    return next(running, None)


@cache
def _warn_of_no_kernel(device_type: str, index: int | None) -> None:
    """Once for each device."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    found = preference(device)
    names = () if found is None else found.backends
    reasons = "; ".join(f"{name}: {unavailable_reason(name, device)}" for name in names)
    warnings.warn(
        f"no kernel of fastdpo runs on {device}, so plain torch computes, as exact but slower ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )


def load_row_kernel(name: str) -> RowKernel:
    """The row kernel of a resolved backend."""
    return cast(RowKernel, import_module(f"fastdpo.kernels.{name}").row_kernel)


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
    return cast(SequenceKernels, import_module(f"fastdpo.kernels.sequence_{name}"))


def explain_auto(device: torch.device) -> str:
    """Which row kernel ``auto`` takes on a device, and why; what of the preferred ones does not run, too."""
    found = preference(device)
    if found is None:
        return "reference: no kernel is made for such devices"
    chosen, first = _first_that_runs(device) or "reference", found.backends[0]
    if chosen == first:
        return f"{chosen}: {found.why}"
    return f"{chosen}, since {first} does not run: {unavailable_reason(first, device)}"


def backend_report() -> dict[str, str | None]:
    """For every backend, None if it runs here (of GPUs, on the current one), else the reason why not."""
    report: dict[str, str | None] = {"reference": None}
    for name, device_type in DEVICE_TYPE.items():
        if device_type == "cuda" and not torch.cuda.is_available():
            report[name] = "no CUDA device is available to torch"
        else:
            try:
                report[name] = unavailable_reason(name, torch.device(device_type))
            except torch.OutOfMemoryError as error:
                report[name] = f"cannot be asked: {error}"
    return report
