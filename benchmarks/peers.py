"""The peers: other ways to the same log-probabilities and gradients, one small adapter each.

A peer is called as its documentation shows: on all positions, unlabelled ones by ``ignore_index``, unless its
own caller drops them first (TRL's trainers do). Which rows it projects is in ``rows``. A peer that is
not installed, or does not run on a machine, is listed with the reason.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.method import Method
from benchmarks.problem import BETA, IGNORED, OF_PAIRS, WITH_DWEIGHT, HeadProblem, Outcome, Size

# Bytes a logit of a graph over full logits: 16-bit logits, their fp32 copy, log-softmax and its gradient.
FULL_LOGITS = {2: 14, 4: 16, 8: 32}
HALF = (torch.bfloat16, torch.float16)
CUTE_OPERATION = "_linear_cross_entropy_batch_chunked"


def _torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits, softmax in fp32 at least: ``(N,)`` and 0 where a label is ignored."""
    logits = F.linear(hidden, weight)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(labels == IGNORED, 0.0)


def _torch(problem: HeadProblem, task: str) -> Outcome:
    return problem.compose(task, lambda h, w: _torch_logps(h, w, problem.labels)[problem.index])


def _torch_compacted(problem: HeadProblem, task: str) -> Outcome:
    return problem.compose(task, lambda h, w: _torch_logps(h[problem.index], w, problem.targets))


@cache
def _compiled_logps() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_torch_logps, dynamic=False)


def _torch_compile(problem: HeadProblem, task: str) -> Outcome:
    logps = _compiled_logps()
    return problem.compose(task, lambda h, w: logps(h, w, problem.labels)[problem.index])


def _torch_fused(problem: HeadProblem, task: str) -> Outcome:
    from torch.nn import LinearCrossEntropyOptions

    def run(hidden: Tensor, weight: Tensor, reduction: str) -> Tensor:
        return F.linear_cross_entropy(
            hidden, weight, problem.labels, reduction=reduction, ignore_index=IGNORED,
            options=LinearCrossEntropyOptions(),
        )  # fmt: skip

    if task == "ce":
        return _mean_loss(problem, lambda h, w: run(h, w, "mean"))
    return problem.compose(task, lambda h, w: -run(h, w, "none")[problem.index])


def _torch_fused_cute(problem: HeadProblem, task: str) -> Outcome:
    from torch.nn import LinearCrossEntropyOptions

    # What its kernel is for: fp32 sums, and no second fp32 dweight.
    options = LinearCrossEntropyOptions(acc_policy="compact", acc_dtype=torch.float32)
    return _mean_loss(
        problem,
        lambda h, w: F.linear_cross_entropy(h, w, problem.labels, ignore_index=IGNORED, options=options),
    )


def _trl(problem: HeadProblem, task: str) -> Outcome:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask = problem.labels != IGNORED

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        # As TRL's patched forward does on a GPU; without the statistics that its trainers log beside.
        labels = problem.labels[mask]
        chunk = _CHUNKED_LOGPROB_CHUNK_SIZE
        return ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels, 1.0, chunk, None, 1.0, ())[0]

    return problem.compose(task, logps)


def _liger_dpo(problem: HeadProblem, task: str) -> Outcome:
    """Its gradients are made in the forward pass: timed, as all, over forward and backward."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # Inductor is for GPUs here; on a CPU its compilation is what one would time.
    loss_of = LigerFusedLinearDPOLoss(
        ignore_index=IGNORED, beta=BETA, use_ref_model=False, compiled=problem.device.type == "cuda"
    )
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_(task in WITH_DWEIGHT)
    shape = (problem.size.num_sequences, problem.size.length)
    loss, (chosen, rejected, *_) = loss_of(weight, hidden.view(*shape, -1), problem.labels.view(shape))
    wanted = (hidden, weight) if task in WITH_DWEIGHT else (hidden,)
    return Outcome(torch.cat((chosen, rejected)).detach(), *torch.autograd.grad(loss, wanted))


def _liger_scaled(problem: HeadProblem, task: str) -> Outcome:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return problem.compose(
        task,
        lambda h, w: (
            -LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, problem.labels, 1.0, IGNORED)[
                problem.index
            ]
        ),
    )


def _liger_cute(problem: HeadProblem, task: str) -> Outcome:
    """A vocabulary in one piece: the tensor-parallel kernel on a process group of this process alone."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyTPFunction as Function,
    )

    group = _configured_for(problem.size, problem.device)
    return problem.compose(
        task, lambda h, w: -Function.apply(h, w, problem.labels, group, 1.0, IGNORED)[problem.index]
    )


@lru_cache(maxsize=1)
def _configured_for(size: Size, device: torch.device) -> Any:
    """The process group, with the library's buffers for a size: they do not grow, but are made anew."""
    import torch.distributed as dist
    from liger_cute_kernels import nvshmem
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure

    if dist.is_initialized():
        torch.cuda.synchronize(device)
        nvshmem.pool_clear_all()
    else:
        dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    capacity = FusedLinearCrossEntropyConfig(size.num_tokens, size.hidden_size, size.vocab_size, group="tp")
    if not configure(process_groups={"tp": group}, bootstrap_group=group, device=device, flsce=capacity):
        raise RuntimeError("liger-cute-kernels does not take this GPU: what would run is Liger's fallback")
    return group


def _unsloth(problem: HeadProblem, task: str) -> Outcome:
    """Called as Unsloth's trainers do; what has no label it leaves out by itself."""
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_cross_entropy, fused_linear_logprobs

    if task == "ce":
        return _mean_loss(
            problem,
            lambda h, w: fused_linear_cross_entropy(
                h, w, None, problem.labels, divisor=problem.size.num_labelled, ignore_index=IGNORED
            ),
        )
    return problem.compose(task, lambda h, w: fused_linear_logprobs(h, w, problem.labels)[problem.index])


def _cce(filter_eps: str | None) -> Callable[[HeadProblem, str], Outcome]:
    def run(problem: HeadProblem, task: str) -> Outcome:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, Any] = {} if filter_eps == "default" else {"filter_eps": None}
        return problem.compose(
            task,
            lambda h, w: (
                -linear_cross_entropy(
                    h, w, problem.labels, ignore_index=IGNORED, reduction="none", **options
                )[problem.index]
            ),
        )

    return run


def _quack(problem: HeadProblem, task: str) -> Outcome:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _mean_loss(
        problem, lambda h, w: chunked_linear_cross_entropy(h, w, problem.labels, ignore_index=IGNORED)
    )


def _mean_loss(problem: HeadProblem, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
    """A method that knows the mean cross-entropy alone."""
    hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    loss = loss_of(hidden, weight)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def _needs(
    *modules: str,
    package: str | None = None,
    is_gpu_only: bool = False,
    capabilities: tuple[tuple[int, int], ...] = (),
    dtypes: tuple[torch.dtype, ...] = (),
) -> Callable[[torch.device, torch.dtype], str | None]:
    """A test for what a peer needs; it imports, because a module that is there may still not load."""

    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if is_gpu_only and device.type != "cuda":
            return "runs on CUDA GPUs only"
        if capabilities and (found := torch.cuda.get_device_capability(device)) not in capabilities:
            wanted = " or ".join(map(str, capabilities))
            return f"its kernel is for compute capability {wanted}, this GPU has {found}"
        if dtypes and dtype not in dtypes:
            taken = " and ".join(str(each).removeprefix("torch.") for each in dtypes)
            return f"takes {taken} only, not {str(dtype).removeprefix('torch.')}"
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                named = "" if package is None else f"; `pip install {package}` brings it"
                return f"not installed: no module {error.name}{named}"
            except Exception as error:  # a peer may fail in any way: that is its result
                return f"does not load: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        return None

    return reason


def _torch_fused_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy"


def _torch_cute_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _needs(is_gpu_only=True, dtypes=HALF)(device, dtype)) is not None:
        return reason
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"its kernel is for compute capability (8, 0) and newer, this GPU has {found}"
    if torch.__version__ < (2, 15):
        return f"torch {torch.__version__} has no row kernel in CuTe for linear_cross_entropy; torch 2.15 has"
    if CUTE_OPERATION not in torch.backends.python_native.get_dsl_operations("cutedsl", "torch_nn"):
        return (
            "torch has not taken its row kernel in CuTe: it wants nvidia-cutlass-dsl (4.6.2, 4.7.1 or 4.8.0 "
            "for torch 2.15) and apache-tvm-ffi"
        )
    return None


def _unsloth_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    # Its import replaces the heads of transformers' models too, which suite `step` times, and writes its own
    # source into the current folder, which may be this checkout: its switches for both.
    os.environ.setdefault("UNSLOTH_FUSED_FORWARD", "0")
    os.environ.setdefault(
        "UNSLOTH_COMPILE_LOCATION", os.path.join(tempfile.gettempdir(), f"unsloth-{os.getpid()}")
    )
    return _needs("unsloth_zoo.fused_losses.fused_linear", package="unsloth==2026.10.9")(device, dtype)


def _liger_cute_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _needs(
        "liger_cute_kernels", "liger_kernel.ops.configure", package="liger-cute-kernels[cu13]==0.8.5",
        is_gpu_only=True, capabilities=((9, 0), (10, 0), (10, 3)), dtypes=(torch.bfloat16,),
    )(device, dtype)  # fmt: skip
    if reason is None and not torch.distributed.is_torchelastic_launched():
        return "its kernels are for process groups: start the benchmark with torchrun, one process will do"
    return reason


def _full(size: Size) -> int:
    return size.num_tokens * size.vocab_size * FULL_LOGITS[size.dtype.itemsize]


def _full_labelled(size: Size) -> int:
    return size.num_labelled * size.vocab_size * FULL_LOGITS[size.dtype.itemsize]


def _one_pair(size: Size) -> int:
    return 2 * size.length * size.vocab_size * FULL_LOGITS[size.dtype.itemsize]


_here = _needs()
_cce_reason = _needs("cut_cross_entropy", package="cut-cross-entropy==25.1.1", is_gpu_only=True, dtypes=HALF)
PEERS: tuple[Method, ...] = (
    Method("torch", "torch", "full logits, softmax in fp32", "all", _torch, _here, bytes_needed=_full),
    Method(
        "torch-compacted", "torch", "the same on the labelled rows", "labelled", _torch_compacted, _here,
        bytes_needed=_full_labelled,
    ),
    Method(
        "torch-compile", "torch", "torch.compile of the first", "all", _torch_compile, _here,
        bytes_needed=_full, is_compiled=True,
    ),
    Method(
        "torch-linear-ce", "torch", "torch.nn.functional.linear_cross_entropy, its chunked path", "all",
        _torch_fused, _torch_fused_reason,
    ),
    Method(
        "torch-linear-ce-cute", "torch", "the same with its row kernel in CuTe, mean loss only", "all",
        _torch_fused_cute, _torch_cute_reason, tasks=("ce",),
    ),
    # LGPL and AGPL: its user installs it, our extra does not.
    Method(
        "unsloth", "unsloth-zoo", "fused_linear_logprobs; fused_linear_cross_entropy of a mean", "labelled",
        _unsloth, _unsloth_reason,
    ),
    Method(
        "trl", "trl", "ChunkedLogProbFunction, as TRL's trainers call it on a GPU", "labelled", _trl,
        # The second wants `datasets`, which the first does without.
        _needs("trl.kernels", "trl.trainer.utils", package="trl==1.16.0"),
    ),
    Method(
        "liger-dpo", "liger-kernel", "LigerFusedLinearDPOLoss", "all", _liger_dpo,
        _needs("liger_kernel.chunked_loss", package="liger-kernel==0.8.5"),
        tasks=OF_PAIRS, bytes_needed=_one_pair,
    ),
    Method(
        "liger-scaled-ce-sm90", "liger-kernel", "LigerFusedLinearScaledCrossEntropyFunction, CuTe for SM90",
        "all", _liger_scaled,
        _needs(
            "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
            package="liger-kernel[cutedsl]==0.8.5",
            is_gpu_only=True, capabilities=((9, 0),), dtypes=(torch.bfloat16,),
        ),
    ),
    Method(
        "liger-cute", "liger-cute-kernels",
        "LigerFusedLinearScaledCrossEntropyTPFunction on a group of one process", "all", _liger_cute,
        _liger_cute_reason,
    ),
    Method(
        "cce", "cut-cross-entropy", "linear_cross_entropy, gradients filtered as by default", "labelled",
        _cce("default"),
        _cce_reason,
    ),
    Method(
        "cce-exact", "cut-cross-entropy", "linear_cross_entropy, filter_eps=None", "labelled", _cce(None),
        _cce_reason,
    ),
    Method(
        "quack", "quack-kernels", "chunked_linear_cross_entropy, mean loss only", "all", _quack,
        _needs(
            "quack.linear_cross_entropy", package="quack-kernels==0.6.5", is_gpu_only=True, dtypes=HALF
        ),
        tasks=("ce",),
    ),
)  # fmt: skip
