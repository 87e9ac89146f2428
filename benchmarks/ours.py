"""fastdpo's own contenders: every mode on every backend that runs here."""

from __future__ import annotations

import torch

from benchmarks.method import Method
from benchmarks.problem import BETA, OF_PAIRS, WITH_DWEIGHT, HeadProblem, Outcome
from fastdpo import Execution, fused_dpo_loss, linear_logprob
from fastdpo.ops.backends import DEVICE_TYPE, unavailable_reason

MODE = {
    "score": "score",
    "stash": "stash",
    "cache": "cache",
    "ce": "cache",
    "pairs": "pairs",
    "pairs-frozen": "stash",
}
OF_TOKENS = tuple(task for task in MODE if task not in OF_PAIRS)


def all_of_d(problem: HeadProblem) -> int:
    """MiB that hold D of every labelled token, so that ``cache`` takes three products, as its floor does."""
    size = problem.size
    itemsize = torch.float32.itemsize if problem.device.type == "cpu" else size.dtype.itemsize
    return size.num_labelled * size.vocab_size * itemsize // 2**20 + 1


def run_with(execution: Execution, problem: HeadProblem, task: str) -> Outcome:
    """A task by fastdpo: the labelled rows are given by the loader, as `TokenLayout` and ``token_index``."""
    if task not in OF_PAIRS:
        return problem.compose(
            task,
            lambda hidden, weight: linear_logprob(
                hidden, weight, problem.labels, token_index=problem.index, execution=execution
            ).logps[problem.index],
        )
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_(task in WITH_DWEIGHT)
    out = fused_dpo_loss(
        hidden, weight, None, layout=problem.layout, beta=BETA, execution=execution,
        ref_logps=torch.zeros(problem.size.num_sequences, device=problem.device),
    )  # fmt: skip
    wanted = (hidden, weight) if task in WITH_DWEIGHT else (hidden,)
    grads = torch.autograd.grad(out.loss, wanted)
    return Outcome(torch.cat((out.chosen_logps, out.rejected_logps)), *grads)


def _on(backend: str, **options: str) -> Method:
    def run(problem: HeadProblem, task: str) -> Outcome:
        mode = MODE[task]
        cache_mib = all_of_d(problem) if mode == "cache" else 1024
        return run_with(Execution(mode=mode, backend=backend, cache_mib=cache_mib, **options), problem, task)

    def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        if options and dtype.itemsize != 2:
            return "rounded logits are for 16-bit inputs"
        return None if backend == "auto" else unavailable_reason(backend, device)

    if options:
        return Method(
            "fastdpo-bf16-logits",
            "fastdpo",
            'logits_dtype="bf16", backend auto',
            "labelled",
            run,
            unavailable,
        )
    return Method(
        f"fastdpo-{backend}", "fastdpo", f"the mode made for it, backend {backend}", "labelled", run,
        unavailable, is_exact=True,
    )  # fmt: skip


def _in_mode(name: str, what: str, tasks: tuple[str, ...], execution: Execution) -> Method:
    return Method(
        name, "fastdpo", what, "labelled", lambda problem, task: run_with(execution, problem, task),
        lambda device, dtype: None, tasks=tasks, is_exact=True,
    )  # fmt: skip


OURS: tuple[Method, ...] = (
    *(_on(backend) for backend in (*DEVICE_TYPE, "reference")),
    _on("auto", logits_dtype="bf16"),
    # What a user gets who sets nothing: mode and backend auto, D kept up to 1 GiB.
    _in_mode("fastdpo-default", "Execution(), nothing set", tuple(MODE), Execution()),
    _in_mode("fastdpo-recompute", "mode recompute", OF_TOKENS[1:], Execution(mode="recompute", cache_mib=0)),
    _in_mode("fastdpo-lean", "mode lean", OF_TOKENS, Execution(mode="lean")),
)
