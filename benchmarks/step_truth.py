"""The losses and gradient norms that every contender of whole steps is held to, in fp64.

Not the middle of the contenders: four of them are ours, and a mistake in what they share would be the
middle. Here nothing is shared with any of them but the weights and the token ids: no padding, no collator, no
trainer, one answer at a time in plain torch, every weight, gradient and moment in fp64. Llama's own code
takes its norms and its angles in fp32 whatever it is given, for all alike.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_contenders import (
    BETA,
    Size,
    lora_config,
    make_model,
    make_optimizer,
    move_adapter,
    update,
    weights_dtype,
)
from fastdpo.training.data.row import REFERENCE, Row

# By how much losses may differ from fp64, in nats. fp32: sums of some thousand tokens of 1e-5 nats, times
# beta; sums over H have random signs, 1e-4 nats (`fastdpo.testing.accuracy`) times the root of as many. bf16:
# TRL rounds logits to 16 bits, 2e-2 nats a token of random sign: times beta and the root of a thousand
# tokens.
LOSS_BOUND = {"fp32": 1e-3, "bf16": 6e-2}
# And norms of the whole gradient, before clipping, as a share: Adam's steps, and clipping, hide a gradient
# that is off by a factor. Random rounding adds half its square to a norm, next to nothing; what is left is
# the factor of each pair, sigmoid(-m), whose relative error is at most that of its margin m, in nats, and a
# loss moves by sigmoid(-m) of that: twice as much as the loss where the margins are small.
NORM_BOUND = {"fp32": 2e-3, "bf16": 6e-2}


@dataclass(frozen=True)
class Truth:
    """Of every step: the loss in nats, and the norm of its gradient before clipping."""

    losses: list[float]
    gradient_norms: list[float]
    dtype: torch.dtype

    def errors(self, found: Mapping[str, Any]) -> dict[str, float]:
        """By how much a contender's first steps are off; NaN where they are."""
        steps = range(len(self.losses))
        losses = [abs(found["losses"][i] - self.losses[i]) for i in steps]
        norms = [abs(found["gradient_norms"][i] / self.gradient_norms[i] - 1) for i in steps]
        # `max` would pass over a NaN that is not the first.
        return {
            "loss_error_nats": torch.tensor(losses).max().item(),
            "gradient_norm_relative_error": torch.tensor(norms).max().item(),
        }


def wrong(errors: Mapping[str, float], precision: str) -> str | None:
    """What is off and by how much; None where nothing is."""
    loss, norm = errors["loss_error_nats"], errors["gradient_norm_relative_error"]
    if not loss <= LOSS_BOUND[precision]:
        return f"its losses are off by {loss:.1e} nats, allowed {LOSS_BOUND[precision]:.0e}; not timed"
    if not norm <= NORM_BOUND[precision]:
        return f"its gradient's norm is off by {norm:.1e}, allowed {NORM_BOUND[precision]:.0e}; not timed"
    return None


def true_steps(
    size: Size,
    batches: Sequence[Sequence[Row]],
    tokenizer: Any,
    device: torch.device,
    precision: str,
    attention: str,
) -> Truth:
    """A step for each of the batches, which are lists of pairs.

    Where fp64 does not fit, fp32 is the truth of a step in bf16, which it is as far from.

    Raises:
        torch.OutOfMemoryError: neither fits.
    """
    for dtype in (torch.float64, torch.float32):
        try:
            return _steps(size, batches, tokenizer, device, precision, attention, dtype)
        except torch.OutOfMemoryError:
            if precision != "bf16" or dtype == torch.float32:
                raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("not reached")


def _steps(
    size: Size,
    batches: Sequence[Sequence[Row]],
    tokenizer: Any,
    device: torch.device,
    precision: str,
    attention: str,
    dtype: torch.dtype,
) -> Truth:
    how = {"device": device, "dtype": weights_dtype(size, precision), "attention": attention}
    model: Any = make_model(size, tokenizer, seed=0, **how)
    reference = None
    if size.is_adapted:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
        move_adapter(model)
    elif any(REFERENCE not in pair.numbers for pairs in batches for pair in pairs):
        reference = make_model(size, tokenizer, seed=1, **how).requires_grad_(False).eval().to(dtype)
    model = model.to(dtype).train()
    optimizer = make_optimizer(model)
    truth = Truth([], [], dtype)
    for pairs in batches:
        loss = torch.zeros((), dtype=torch.float64)
        for pair in pairs:
            of_reference = _reference_margin(model, reference, pair, device)
            of_pair = -nn.functional.logsigmoid(BETA * (_margin(model, pair, device) - of_reference))
            (of_pair / len(pairs)).backward()  # a pair's graph at a time
            loss += of_pair.detach().cpu() / len(pairs)
        truth.losses.append(loss.item())
        truth.gradient_norms.append(update(model, optimizer).item())
    return truth


def _reference_margin(model: Any, reference: nn.Module | None, pair: Row, device: torch.device) -> Tensor:
    """The same of the reference: the pair's own numbers, a model, or the policy without its adapter."""
    if REFERENCE in pair.numbers:
        chosen, rejected = torch.as_tensor(pair.numbers[REFERENCE]).to(device, torch.float64)
        return chosen - rejected
    adapter_off = contextlib.nullcontext if reference is not None else model.disable_adapter
    with torch.no_grad(), adapter_off():
        return _margin(model if reference is None else reference, pair, device)


def _margin(model: nn.Module, pair: Row, device: torch.device) -> Tensor:
    """``()``: log-probability of the chosen answer less that of the rejected one, in nats."""
    chosen, rejected = (_answer_logp(model, pair.prompt, answer.ids, device) for answer in pair.answers)
    return chosen - rejected


def _answer_logp(model: nn.Module, prompt: Tensor, answer: Tensor, device: torch.device) -> Tensor:
    ids = torch.cat((prompt, answer)).to(device)
    first = max(len(prompt), 1)  # nothing predicts the very first token
    logits = model(ids[None], use_cache=False).logits[0, first - 1 : -1]
    total: Tensor = logits.log_softmax(-1).gather(-1, ids[first:, None]).sum()
    return total
