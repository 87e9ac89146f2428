"""What `patch_trl` puts in the place of TRL's log-prob function, and of its test for Triton.

TRL calls ``_ChunkedLogProbFunction.apply`` with the labelled rows of one forward pass and gives the results
to every loss, so that all of TRL's loss code stays TRL's. Nothing here keeps a tensor between calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdpo.integrations.partitioned import gathered
from fastdpo.integrations.probe import NotSupported
from fastdpo.integrations.trainer_steps import say_own
from fastdpo.ops.checks import check_execution, fail
from fastdpo.ops.linear_logprob import linear_logprob
from fastdpo.types import Execution, LinearLogprobOutput, LMHead

# TRL's names of the statistics, and ours; log_probs always comes.
STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
APPLY_SIGNATURE = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class FusedLogProb:
    """``ChunkedLogProbFunction`` by `linear_logprob`: the same arguments, results and gradients.

    TRL's entropy is always differentiable, and only GRPO's entropy bonus ever differentiates it. A
    differentiable entropy costs the logits again in the backward pass, so it is made so on demand: the
    gradient of an entropy that nobody asked for costs nothing, the first one asked for is computed by itself,
    and from then on calls that want the same outputs compute both gradients together.
    """

    def __init__(self, execution: Execution | None = None, own: Any = None) -> None:
        self.execution = check_execution(execution)
        self._own = own  # the function that this one stands for, which goes on with what it does not serve
        self._said: set[str] = set()
        self._differentiated: set[tuple[str, ...]] = set()

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(STATISTICS),
    ) -> Results:
        """Log-probabilities of ``targets (N,)`` for ``hidden (N, H)`` under a head ``(V, H)``; fp32, nats.

        Args:
            chunk_size: the width of TRL's tiles of the vocabulary. Ours follow from
                ``execution.workspace_mib``; no result depends on either.

        Returns:
            ``(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, ``(N,)`` each, None if not asked
            for. As TRL's but for what rounding does: logits are not rounded to 16 bits on the way, and a
            label that ties for the largest logit is top-1 even if it is not the first.

        A head that is quantised, or sharded by FSDP1, is left to TRL's function, and one line says so. One
        that ZeRO-3 has gathered for this call is gathered again for its backward pass, as in TRL's function.

        Raises:
            ValueError: unknown outputs, or a value out of range; without TRL's function, such a head; or a
                trained one that was gathered from shards.
        """
        _check_reduced(weight)
        outputs = tuple(outputs)
        if unknown := set(outputs) - STATISTICS.keys() - {"log_probs"}:
            raise fail("outputs", sorted(unknown), f"names from {('log_probs', *STATISTICS)}")
        try:
            _check_weight(weight)
        except NotSupported as error:
            if self._own is None:
                raise
            say_own("ChunkedLogProbFunction", error, self._said)
            scaled = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            own: Results = self._own.apply(hidden, weight, bias, targets, *scaled)
            return own
        transform: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
            "temperature": temperature,
        }
        if not hasattr(weight, "ds_id") or not torch.is_grad_enabled():
            return self._scored(hidden, weight, bias, targets, outputs, transform)

        def scored(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Results:
            return self._scored(hidden, weight, bias, targets, outputs, transform)

        found: Results = _GatheredAgain.apply(scored, hidden, weight, bias)
        return found

    def _scored(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        outputs: tuple[str, ...],
        transform: dict[str, Any],
    ) -> Results:
        """The same with checked arguments, of a weight that is whole here, and in the backward pass."""
        head = LMHead(weight, bias=bias, **transform)
        run = dataclasses.replace(self.execution, compute_dtype=self._compute_dtype(hidden))
        wanted = tuple(STATISTICS[name] for name in outputs if name != "log_probs")

        has_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
        )
        wants_entropy = has_grad and "entropy" in wanted
        together = wants_entropy and run.mode in ("auto", "recompute") and outputs in self._differentiated

        scored = linear_logprob(
            hidden, head, targets, outputs=wanted, entropy_requires_grad=together, execution=run
        )
        if wants_entropy and not together:
            assert scored.entropy is not None
            alone = dataclasses.replace(run, mode="recompute")

            def entropy_again(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
                self._differentiated.add(outputs)
                again = linear_logprob(
                    hidden,
                    dataclasses.replace(head, weight=weight, bias=bias),
                    targets,
                    outputs=("entropy",),
                    entropy_requires_grad=True,
                    execution=alone,
                )
                return again.entropy

            entropy = _EntropyOnDemand.apply(scored.entropy, hidden, weight, bias, entropy_again)
            scored = scored._replace(entropy=entropy)
        return _as_trl(scored)

    def _compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """TRL's rule: autocast's dtype where it is on, else that of hidden, whatever the weight's is."""
        if self.execution.compute_dtype is not None:
            return self.execution.compute_dtype
        kind = hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _GatheredAgain(torch.autograd.Function):
    """Results of weights that ZeRO-3 puts away after this call: they are gathered for the backward pass too.

    What the op keeps of a parameter is the parameter, whose values are those of the moment.
    """

    @staticmethod
    def forward(
        ctx: Any, scored: Callable[..., Results], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        states = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            ctx.made = scored(states, weight, bias)
        ctx.operands = (states, weight, bias)
        results = tuple(None if value is None else value.detach() for value in ctx.made)
        made = zip(results, ctx.made, strict=True)
        ctx.mark_non_differentiable(*(r for r, value in made if r is not None and not value.requires_grad))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.made is None:
            raise RuntimeError("log_probs: got a second backward pass through ZeRO-3's head, wanted one")
        made, ctx.made = ctx.made, None
        known = [n for n, grad in enumerate(grads) if grad is not None]
        wanted = [t for t in ctx.operands if t is not None and t.requires_grad]
        if not known or not wanted:
            return None, None, None, None
        with gathered(ctx.operands[1:]):
            values, upstream = ([of[n] for n in known] for of in (made, grads))
            found = iter(torch.autograd.grad(values, wanted, upstream, allow_unused=True))
        return None, *(next(found) if t is not None and t.requires_grad else None for t in ctx.operands)


class _EntropyOnDemand(torch.autograd.Function):
    """The entropy as it is, with a backward pass that makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        entropy_again: Callable[..., Tensor],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.entropy_again = entropy_again
        return entropy.view_as(entropy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        needs = ctx.needs_input_grad[1:4]
        if grad is None:
            return None, None, None, None, None
        operands = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            entropy = ctx.entropy_again(*operands)
        found = iter(
            torch.autograd.grad(entropy, [t for t in operands if t is not None and t.requires_grad], grad)
        )
        return None, *(next(found) if needed else None for needed in needs), None


def _as_trl(scored: LinearLogprobOutput) -> Results:
    """TRL's order and dtype: fp32, also where the operands are fp64."""

    def fp32(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.float()

    return (
        scored.logps.float(),
        fp32(scored.entropy),
        fp32(scored.log_sum_sq_probs),
        fp32(scored.mean_logit),
        scored.is_top1,
    )


def _check_weight(weight: Any) -> None:
    """What TRL hands over and `linear_logprob` cannot see is not a whole matrix of numbers."""
    if is_traceable_wrapper_subclass(weight) or not weight.dtype.is_floating_point:
        raise NotSupported(
            f"lm_head.weight: got a {type(weight).__name__} of {weight.dtype}, quantised or sharded; wanted "
            "a plain floating-point tensor; leave lm_head out of the quantisation"
        )


def _check_reduced(weight: Tensor) -> None:
    """Raise ValueError for ``full_tensor()`` of a shard, whose backward pass adds nothing up over the ranks.

    TRL does that where FSDP2 has the head in a unit of its own, and trains each rank's part of it on that
    rank's rows alone. In the root's unit, or in one with the last norm (accelerate's), the head is whole.
    """
    made_by = "" if weight.grad_fn is None else weight.grad_fn.name()
    if "ToTorchTensor" in made_by and dist.get_world_size() > 1:
        raise ValueError(
            "lm_head.weight: got one that TRL gathered from FSDP2's shards, whose gradient would not be "
            "added up over the ranks; wanted the head in the root's unit, or frozen: leave it out of the "
            "modules that FSDP2 wraps by themselves"
        )


def drop_unlabelled(original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """TRL's `_use_triton` as its fused head asks it: whether only labelled positions are scored."""

    def drops_unlabelled(device: torch.device) -> bool:
        return device.type == "cpu" or original(device)

    return drops_unlabelled
