"""What tests of losses of pairs share: the logits in plain torch, gradients, and the rule for ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.testing import assert_close_to_fp64
from fastdpo.training.batches.batch import Batch
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.batches.layout_cases import PAIRS, ROW_CASES

LAYOUTS = ["padded", "packed", "shared_prompt"]
CASES = [("padded", "auto"), *ROW_CASES]


class Tokens(NamedTuple):
    """Of sequences ``(S, T)``, each aligned with the token it is of."""

    logps: Tensor
    log_sum_sq: Tensor
    mask: Tensor


def dense_tokens(model: nn.Module, prompts: Sequence[Any], answers: Sequence[Any]) -> list[Tokens]:
    """Of each answer behind its prompt, every token's numbers from the logits, one sequence at a time."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([torch.as_tensor(prompt), torch.as_tensor(answer)]).long()
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        logps = log_p[:-1].gather(-1, ids[1:, None])[:, 0]
        is_answer = torch.arange(1, len(ids)) >= len(prompt)
        found.append(Tokens(logps, (2 * log_p[:-1]).logsumexp(-1), is_answer))
    return found


def sides(model: nn.Module, pairs: Sequence[Any], *answers: int) -> list[list[Tokens]]:
    """``dense_tokens`` of the pairs' answers: chosen (0), rejected (1), gold (2)."""
    prompts = [pair.prompt for pair in pairs]
    return [dense_tokens(model, prompts, [pair.answers[k].ids for pair in pairs]) for k in answers]


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]


def gradients(model: nn.Module, loss: Tensor) -> Step:
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads)


def looped(
    model: nn.Module, batch: Batch, reference: Reference, *, counts: tuple[int, int], **settings: Any
) -> Step:
    """The step of the loop."""
    args = PreferenceConfig(output_dir="unused", use_cpu=True, **settings)
    return gradients(model, batch_loss(model, model, batch, BatchCounts(*counts), args, reference).loss)


Formula = Callable[[nn.Module, Sequence[Any]], Tensor]


def truth_and_eager(model: nn.Module, formula: Formula, pairs: Sequence[Any] = PAIRS) -> tuple[Step, Step]:
    """``formula`` is a sum over pairs of losses. In fp64; and in the model's dtype, summed in two ways.

    Of each gradient the one that is further off is kept: of a few entries one way may be exact by luck.
    """
    wide = copy.deepcopy(model).double()
    truth = gradients(wide, formula(wide, pairs))
    whole = gradients(model, formula(model, pairs))
    single = [gradients(model, formula(model, [pair])) for pair in pairs]
    grads = {}
    for name, gradient in whole.grads.items():
        parts = torch.stack([step.grads[name] for step in single]).sum(0)
        grads[name] = max(gradient, parts, key=lambda value: (value - truth.grads[name]).abs().max())
    return truth, whole._replace(grads=grads)


def assert_step(ours: Step, truth: Step, eager: Step, *, loss_limit: float, name: str = "") -> None:
    assert ours.loss.item() == pytest.approx(truth.loss.item(), abs=loss_limit), name
    assert ours.grads.keys() == truth.grads.keys()
    for key, gradient in ours.grads.items():
        assert_close_to_fp64(gradient, truth.grads[key], eager.grads[key], name=f"{key} {name}")


def logistic(margin: Tensor) -> Tensor:
    return -F.logsigmoid(margin)
