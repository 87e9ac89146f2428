"""The row kernel in CUDA C++ (``csrc/cuda``): compute capability 8.0 and up, with clusters from 9.0 on.

Takes fp32 and bf16 logits. Each logit is read from memory once: with clusters up to a vocabulary of 360
thousand, without them up to 32 thousand on an A100. Of a longer row the part that does not fit on chip is
read twice.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import native
from .contract import LogitTransform, RowOutputs
from .native import cuda_problem, row_args

MIN_CAPABILITY = (8, 0)
# cudaError_t of what has a remedy of its own.
OUT_OF_MEMORY, DRIVER_TOO_OLD = 2, 35
NO_CODE = (
    98,
    209,
    218,
    222,
)  # no such kernel, no image for the device, invalid PTX, PTX too new for the driver


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot run here (on ``device``), with the remedy, or None."""
    if (problem := cuda_problem()) is not None:
        return problem
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 or higher, {name} has {capability[0]}.{capability[1]}"
    index = None if device is None else device.index
    return _launch_problem(torch.cuda.current_device() if index is None else index)


@cache
def _launch_problem(index: int) -> str | None:
    """Why the driver cannot run what was built on a GPU; the answer stays, so it is asked once.

    Raises:
        torch.OutOfMemoryError: there was no room for the code; the next call asks again.
    """
    with torch.cuda.device(index):
        error, meaning, _ = native._C.cuda_probe()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if error == 0:
        return None
    if error == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"no memory left on cuda:{index} for the code of fastdpo's kernels")
    if error == DRIVER_TOO_OLD:
        return _old_driver(native._C.cuda_driver_version(), native._C.cuda_runtime_version)
    if error in NO_CODE:
        gpu = f"{name} (compute capability {capability[0]}.{capability[1]})"
        remedy = "install fastdpo again where nvcc is of the driver's CUDA and knows this GPU"
        return f"it was built for {native._C.cuda_archs}, which {gpu} does not run ({meaning}): {remedy}"
    return f"the driver answers: {meaning} (error {error})"


def _old_driver(driver: int, runtime: int) -> str:
    if driver == 0:
        return "there is no NVIDIA driver"
    ours, its = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"it was built with CUDA {ours}, and the driver supports no more than CUDA {its}: update the driver, "
        f"or install fastdpo again where nvcc is of CUDA {its} or older"
    )


def row_kernel(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    outputs: RowOutputs,
    *,
    target_logits: Tensor | None = None,
    d_out: Tensor | None = None,
    grad_coeffs: Tensor | None = None,
) -> None:
    """``contract.RowKernel`` on CUDA tensors: one launch on the device's current stream, no synchronisation.

    Raises:
        RuntimeError: the backend cannot run here, see ``unavailable_reason``, or the launch failed.
        ValueError: tensors of a shape, dtype, device or strides the kernel cannot take.
    """
    if (reason := unavailable_reason(logits.device)) is not None:
        raise RuntimeError(reason)
    from fastdpo import _C  # not there in an install without a compiler, and then refused above

    args = row_args(
        logits,
        labels,
        transform,
        outputs,
        target_logits=target_logits,
        d_out=d_out,
        grad_coeffs=grad_coeffs,
    )
    # The launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(logits.device):
        _C.cuda_row_kernel(args, torch.cuda.current_stream().cuda_stream)
