"""Lazy logits as trainers meet them beside the loss: what they log, and calls of a step without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import patch_model
from fastdpo.integrations.lazy import LazyLogits, MadeLogits
from fastdpo.integrations.model import is_patched
from tests.integrations.lazy_losses import LARGE, Rows, dpo_repository, lazy_model
from tests.integrations.peft_cases import HEAD, with_lora
from tests.integrations.test_lazy_surroundings import one_process  # noqa: F401  (a fixture)
from tests.integrations.tiny import make_model

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda logits: logits.mean(),
    "mean of rows": lambda logits: logits[LARGE.labels != -100].mean(-1),
    "sum": lambda logits: logits.sum(),
    "sum of rows": lambda logits: logits.sum(-1),
    "nansum": lambda logits: logits[:2].nansum(),
    "nansum of none": lambda logits: logits[[]].nansum(),
    "sum in fp64": lambda logits: logits.sum(dtype=torch.float64),
    "of a list": lambda logits: logits[[1, 3]].sum(-1),
    "of log-probabilities": lambda logits: logits.log_softmax(-1).sum(),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "adapter"])
def test_sums_and_means_of_logits(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a gradient; of logits without a cap or LoRA on the head no row is projected."""
    model = make_model("llama" if kind == "adapter" else kind).train().double()
    if kind == "adapter":
        model = with_lora(model, target_modules=HEAD, init_lora_weights=False).double()
    patched = lazy_model(model)
    rows = Rows(monkeypatch)
    with torch.no_grad():
        check(METRICS[name], patched(**LARGE.inputs).logits, model(**LARGE.inputs).logits)
    found, wanted = (
        check_grads(METRICS[name](each(**LARGE.inputs).logits) + 0, each) for each in (patched, model)
    )
    assert found.keys() == wanted.keys() and (wanted or "none" in name)
    for parameter, grad in wanted.items():
        assert torch.allclose(found[parameter], grad, rtol=1e-7, atol=1e-9), parameter
    if kind in ("llama", "phi") and name != "of log-probabilities":
        assert rows.count == 0


def check(metric: Callable[[Tensor], Tensor], ours: Tensor, theirs: Tensor) -> None:
    found, wanted = metric(ours) + 0, metric(theirs)
    assert type(found) is Tensor and found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def check_grads(value: Tensor, model: Any) -> dict[str, Tensor]:
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_nan_among_the_logits_is_left_out_as_torch_does() -> None:
    model = make_model().train()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    ours = lazy_model(model, on_materialize="warn")(**LARGE.inputs).logits.detach()
    with pytest.warns(UserWarning, match="nansum"):
        found = ours.nansum()
    assert torch.allclose(found, model(**LARGE.inputs).logits.nansum(), rtol=1e-5)


def test_a_step_scores_without_gradients_too() -> None:
    """A reference that is the policy without its adapter is in training mode, and has no gradients."""
    model = make_model().train()
    patched = lazy_model(model)
    with torch.no_grad():
        logits = patched(**LARGE.inputs).logits
        assert isinstance(logits, LazyLogits)
        wanted = dpo_repository(model(**LARGE.inputs).logits, LARGE.labels)
        assert torch.allclose(dpo_repository(logits, LARGE.labels), wanted, atol=1e-4)
        assert type(patched.eval()(**LARGE.inputs).logits) is Tensor


def test_generation_in_training_mode_has_real_logits() -> None:
    model = make_model().train()
    patched = lazy_model(model)
    for use_cache in (True, False):
        arguments = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
        inputs = {name: value[:1, :5] for name, value in LARGE.inputs.items()}
        assert torch.equal(patched.generate(**inputs, **arguments), model.generate(**inputs, **arguments))


@pytest.mark.parametrize("keep", [7, torch.tensor([3, 5, 6])], ids=["last", "chosen"])
def test_logits_to_keep_of_answers(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    rows = Rows(monkeypatch)
    chosen = slice(-keep, None) if isinstance(keep, int) else keep
    labels = LARGE.labels[:, chosen]
    found, wanted = (
        dpo_repository(each(**LARGE.inputs, logits_to_keep=keep).logits, labels)
        for each in (lazy_model(model), model)
    )
    assert torch.allclose(found, wanted, atol=1e-4)
    assert rows.count == int((labels[:, 1:] != -100).sum())


def test_one_position_to_keep_is_the_next_token() -> None:
    patched = lazy_model(make_model().train())
    assert type(patched(**LARGE.inputs, logits_to_keep=1).logits) is Tensor
    with pytest.raises(MadeLogits, match="topk"):
        patched(**LARGE.inputs, logits_to_keep=2).logits.topk(3)


def test_the_default_is_lazy_also_where_the_head_is_split(one_process: None) -> None:  # noqa: F811
    """Split after it was patched or before, real or patched."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = patch_model(make_model().train())
    assert isinstance(model(**LARGE.inputs).logits, LazyLogits)
    wanted = model(**LARGE.inputs, labels=LARGE.labels, return_logps=True).logps
    fsdp.fully_shard(model, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(**LARGE.inputs).logits
        assert isinstance(logits, LazyLogits)
        assert torch.allclose(dpo_repository(logits, LARGE.labels), wanted.sum(-1), atol=1e-4)
        assert torch.equal(model(**LARGE.inputs, labels=LARGE.labels, return_logps=True).logps, wanted)
    split = make_model().train()
    fsdp.fully_shard(split, mesh=mesh)
    assert type(patch_model(split).lm_head.weight).__name__ == "DTensor"
    assert isinstance(split(**LARGE.inputs).logits, LazyLogits)


def test_the_default_is_real_where_the_head_is_gone_after_the_call(one_process: None) -> None:  # noqa: F811
    """FSDP1's: real logits, as without the hook, and a warning says why; asked for, lazy ones are refused."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = patch_model(make_model().train())
    wanted = model(**LARGE.inputs, labels=LARGE.labels, return_logps=True).logps
    model.lm_head = fsdp.FullyShardedDataParallel(
        model.lm_head, use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.warns(UserWarning, match="real ones are made of a LlamaForCausalLM: .*return_logps=True"):
        logits = model(**LARGE.inputs).logits
    assert type(logits) is Tensor
    assert torch.allclose(dpo_repository(logits, LARGE.labels), wanted.sum(-1), atol=1e-4)
    other = make_model().train()
    other.lm_head = fsdp.FullyShardedDataParallel(
        other.lm_head, use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="split by FSDP1.*logits='real'"):
        patch_model(other, logits="lazy")
    assert not is_patched(other)


class _Sine(torch.autograd.Function):
    """Stands for a kernel that takes the tensor's memory, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.weights = torch.arange(x.numel(), dtype=x.dtype).view(x.shape).sin()
        return (ctx.weights * x).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.weights


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_gradients_of_kernels_reach_tied_weights_once(family: str) -> None:
    model = make_model(family).train().double()
    patched = lazy_model(model, on_materialize="warn")
    with pytest.warns(UserWarning, match="logits"):
        _Sine.apply(patched(**LARGE.inputs).logits).backward()
    _Sine.apply(model(**LARGE.inputs).logits).backward()
    for ours, theirs in zip(patched.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
