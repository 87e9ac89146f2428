"""Tiny random models of many families, with logits as large as trained ones, and their plain logits path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fastdpo.integrations.model import FusedLMOutput, require_fused_output
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from tests.integrations.tiny_configs import FAMILIES as FAMILIES
from tests.integrations.tiny_configs import HIDDEN as HIDDEN
from tests.integrations.tiny_configs import IMAGE_TOKEN as IMAGE_TOKEN
from tests.integrations.tiny_configs import VOCAB as VOCAB
from tests.integrations.tiny_configs import make_config as make_config


def make_model(family: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A float32 model in evaluation mode whose logits have a standard deviation of about 3.

    What is asked for again is copied, which takes a quarter of the time; torch's generator is left alike.
    """
    key = (family, seed, repr(sorted(options.items())))
    if key not in _MADE:
        while len(_MADE) >= _MADE_AT_MOST:
            del _MADE[next(iter(_MADE))]
        _MADE[key] = (_make_model(family, seed, options), torch.get_rng_state())
    model, state = _MADE[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


_MADE: dict[tuple[str, int, str], tuple[Any, Tensor]] = {}
_MADE_AT_MOST = 8


def _make_model(family: str, seed: int, options: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    config = make_config(family, **options)
    model = getattr(transformers, FAMILIES[family].model)(config)
    model.set_experts_implementation("eager")  # the default has no float64
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head.bias is not None:
            head.bias.normal_()
        spread = model(input_ids=torch.arange(VOCAB)[None, :32]).logits.std()
        # A cap would hide the spread: these heads are scaled by what their uncapped logits need.
        head.weight.mul_(3 / spread if spread > 0.1 else 30.0)
    return model.eval()


class Batch(NamedTuple):
    """Right-padded sequences, the prompt ignored, and what flows back to every log-probability."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    upstream: Tensor  # (B, T) fp32

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def make_batch(batch: int = 3, length: int = 12, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(batch):
        labels[row, : 2 * row] = -100
        if row:
            attention_mask[row, length - row :] = 0
    labels[attention_mask == 0] = -100
    upstream = torch.randn(batch, length, generator=generator)
    return Batch(input_ids, attention_mask, labels, upstream)


BATCH = make_batch()


def fused(model: nn.Module, **arguments: Any) -> FusedLMOutput:
    """A patched model's answer to `BATCH`; ``arguments`` replace or add to the call's."""
    call = {**BATCH.inputs, "labels": BATCH.labels, "return_logps": True, **arguments}
    return require_fused_output(model(**call))


def plain_logps(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    """``(B, T)`` log-probabilities as users make them today, from the unpatched forward's logits."""
    logits = model(**{**batch.inputs, **inputs}).logits
    logits = logits[:, -batch.labels.shape[1] : -1]  # behind the virtual tokens of PEFT's prompt tuning
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    targets = batch.labels[:, 1:]
    picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.masked_fill(targets == -100, 0.0), (1, 0))


def fused_logps(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    return model(**{**batch.inputs, **inputs}, labels=batch.labels, return_logps=True).logps


class Step(NamedTuple):
    """Log-probabilities and the gradients of their weighted sum."""

    logps: Tensor
    grads: dict[str, Tensor]


def run_step(model: nn.Module, batch: Batch, logps_of: Callable[..., Tensor], **inputs: Any) -> Step:
    model.zero_grad(set_to_none=True)
    logps = logps_of(model, batch, **inputs)
    (logps * batch.upstream.to(logps.dtype)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(logps.detach(), grads)


class Expected(NamedTuple):
    """The unpatched model's step in (nearly) fp64 and in its own dtype."""

    truth: Step
    eager: Step


def expected_step(model: nn.Module, batch: Batch) -> Expected:
    """Through the logits; ``model`` is not patched, and keeps fp64 as far as its own code does."""
    truth = run_step(copy.deepcopy(model).double(), batch, plain_logps)
    return Expected(truth, run_step(model, batch, plain_logps))


# Parameters of fewer entries are held to the rule together: which of two roundings of one number is the
# luckier says nothing, and with many families and CPUs one of them is always luckier by more than twice.
FEW_ENTRIES = 64
# Of which eager gets less right than this has a gradient of rounding alone, and would hide the others'
# errors.
ROUNDING_ALONE = 2**-10


def assert_step_close(ours: Step, expected: Expected, *, renamed: Callable[[str], str] = str) -> None:
    """Log-probabilities and every gradient by the rule; ``renamed`` gives a wrapper's names."""
    truth, eager = expected
    assert_logps_close(ours.logps, truth.logps.double(), torch.float32)
    assert ours.grads.keys() == {renamed(name) for name in eager.grads}
    together: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, own in eager.grads.items():
        three = (ours.grads[renamed(name)], truth.grads[name].double(), own)
        largest = three[1].abs().max()
        if own.numel() <= FEW_ENTRIES and (own - three[1]).abs().max() < ROUNDING_ALONE * largest:
            unit = torch.exp2(largest.log2().ceil()).to(own.dtype)  # a power of two: dividing by it is exact
            together[name] = tuple((x / unit).flatten() for x in three)  # type: ignore[assignment]
        else:
            assert_close_to_fp64(*three, name=name)
    if together:
        columns = [torch.cat(column) for column in zip(*together.values(), strict=True)]
        assert_close_to_fp64(*columns, name=f"{', '.join(together)} in one")  # type: ignore[misc]


def with_weight(make: Callable[[Tensor], Any]) -> Any:
    """A Llama whose head's weight is what ``make`` makes of it."""
    model = make_model()
    weight = model.lm_head.weight
    del model.lm_head.weight
    model.lm_head.weight = make(weight)
    return model
