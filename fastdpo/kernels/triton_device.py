"""Whether Triton's kernels run on a device, found out by running one."""

from __future__ import annotations

import os
from functools import cache

import torch

from .triton_parts import _jit

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None

MIN_CAPABILITY = (8, 0)


@_jit()
def _probe_kernel(out):
    tl.store(out, 1.0)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot run here (on ``device``), with the remedy, or None.

    Once for each GPU a kernel of one store is compiled and launched: Triton needs a C compiler and a folder
    to write to, and a version that knows the GPU.
    """
    if triton is None:
        return "triton is not installed; pip install triton"
    if not isinstance(_probe_kernel, triton.JITFunction):
        return None  # interpreted
    for_tests = "TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}; {for_tests}"
    if not torch.cuda.is_available():
        return f"no CUDA device is available to torch; {for_tests}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_CAPABILITY} or newer, got {capability}"
    index = None if device is None else device.index
    return _launch_problem(torch.cuda.current_device() if index is None else index)


@cache
def _launch_problem(index: int) -> str | None:
    """Why a kernel does not run on a GPU; the answer stays, so it is asked once.

    Raises:
        torch.OutOfMemoryError: there was no room to find out; the next call asks again.
    """
    try:
        _launch_probe(index)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, a kernel of ours would meet it too
        return _problem_of(error)
    return None


def _launch_probe(index: int) -> None:
    with torch.cuda.device(index):
        _probe_kernel[(1,)](torch.empty(1, device="cuda"))


def _problem_of(error: BaseException) -> str:
    """What Triton's error says, with the remedy where it is known."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join("~", ".triton")
        remedy = "set TRITON_CACHE_DIR to a folder that can be written to"
        return f"Triton cannot write what it compiles to {folder} ({said}); {remedy}"
    if "C compiler" in said:
        return f"Triton finds no C compiler to build its launcher with ({said}); install gcc, or set CC"
    if "Python.h" in said or type(error).__name__ == "CalledProcessError":
        remedy = "it needs a C compiler, Python's headers and the driver's libcuda.so"
        return f"Triton cannot build its launcher ({said}); {remedy}"
    return f"Triton {triton.__version__} cannot run a kernel on this GPU ({said})"
