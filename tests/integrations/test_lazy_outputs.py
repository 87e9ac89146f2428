"""What others do with lazy logits that they were given: copies, files, kernels, compilers, functions."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdpo.integrations.lazy import MadeLogits
from fastdpo.testing import assert_close_to_fp64
from tests.integrations.lazy_losses import (
    LARGE,
    assert_like_real,
    dpo_repository,
    lazy_model,
    run_loss,
)
from tests.integrations.tiny import VOCAB, make_model


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:logits")
@pytest.mark.parametrize(
    "copied", [through_a_file, lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy]
)
def test_copies_of_outputs_have_real_values(copied: Callable[[Any], Any]) -> None:
    model = make_model().train()
    patched = lazy_model(model, on_materialize="warn")
    wanted = model(**LARGE.inputs).logits.detach()
    for value in (
        patched(**LARGE.inputs).logits.detach(),
        {"logits": patched(**LARGE.inputs).logits.detach()},
    ):
        found = copied(value)
        found = found["logits"] if isinstance(found, dict) else found
        assert type(found) is Tensor and torch.equal(found, wanted)
    if copied is copy.deepcopy:
        with pytest.raises(RuntimeError, match="deepcopy protocol"):  # as of every tensor with a graph
            copied(patched(**LARGE.inputs))
    else:
        assert torch.equal(copied(patched(**LARGE.inputs)).logits, wanted)


@pytest.mark.filterwarnings("ignore:logits")
def test_who_looks_for_memory_finds_it() -> None:
    model = make_model().train()
    patched, real = lazy_model(model, on_materialize="warn"), model(**LARGE.inputs).logits.detach()
    logits = patched(**LARGE.inputs).logits
    assert "LazyLogits(logits, shape=(4, 24, 199)" in repr(logits) and logits.memory.real is None
    part = logits[:, 1:]
    assert part.stride() == real[:, 1:].stride() and not part.is_contiguous() and logits.is_contiguous()
    assert (logits.shape, logits.dtype, logits.device) == (real.shape, real.dtype, real.device)
    assert (
        logits.requires_grad and len(logits) == 4 and logits.size(-1) == VOCAB and logits.memory.real is None
    )
    assert part.data_ptr() - logits.data_ptr() == VOCAB * 4
    fresh = lambda: patched(**LARGE.inputs).logits.detach()  # noqa: E731
    assert np.array_equal(np.asarray(fresh()), real.numpy()) and fresh()[0].tolist() == real[0].tolist()
    assert torch.equal(torch.from_dlpack(fresh()), real) and fresh()[1, 2, 3].item() == real[1, 2, 3]
    buffer = torch.zeros_like(real)
    buffer[:, 1:] = fresh()[:, 1:]
    assert torch.equal(buffer[:, 1:], real[:, 1:]) and torch.equal(buffer.copy_(fresh()), real)
    assert torch.equal(torch.ops.aten.exp(fresh()), real.exp())  # no function of Python's
    other = torch.zeros_like(fresh())
    assert type(other) is Tensor and other.shape == real.shape and fresh().new_zeros(3).shape == (3,)
    assert torch.equal(fresh().topk(3).indices, real.topk(3).indices)
    assert torch.equal(torch.vmap(lambda row: row.sum(-1))(fresh()), real.sum(-1))


class _OwnBackward(torch.autograd.Function):
    """As a kernel that takes a tensor's memory: nothing of it is seen but the address."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x, y = x.contiguous(), y.contiguous()
        found = [
            np.ctypeslib.as_array((ctypes.c_float * v.numel()).from_address(v.data_ptr())) for v in (x, y)
        ]
        return torch.tensor(float((found[0].astype(float) ** 2).sum() + found[1].astype(float).sum()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0], torch.ones(4, 5, VOCAB) * grads[0]


@pytest.mark.filterwarnings("ignore:logits")
def test_kernels_with_a_backward_pass_of_their_own() -> None:
    model = make_model().train()

    def squares(logits: Tensor, labels: Tensor) -> Tensor:
        return _OwnBackward.apply(logits[:, 1:], logits.log_softmax(-1)[:, :5]) + logits.logsumexp(-1).sum()

    ours, real = run_loss(lazy_model(model, on_materialize="warn"), squares), run_loss(model, squares)
    assert torch.allclose(ours.value, real.value)
    for name, grad in real.grads.items():
        assert (ours.grads[name] - grad).norm() < 1e-5 * grad.norm(), name
    with pytest.raises(MadeLogits, match="data_ptr"):
        run_loss(lazy_model(model), squares)


@pytest.mark.filterwarnings("ignore")
def test_compiled_losses_are_those_of_plain_ones() -> None:
    model = make_model().train()
    compiled = torch.compile(dpo_repository, backend="eager")
    truth = run_loss(copy.deepcopy(model).double(), dpo_repository)
    assert_like_real(run_loss(lazy_model(model), compiled), run_loss(model, dpo_repository), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_of_an_installed_trainer(dtype: torch.dtype) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = make_model().train().to(dtype)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        logps = utils.selective_log_softmax(logits[:, :-1], targets)
        entropies = utils.entropy_from_logits(logits[:, :-1])
        return torch.where(mask, logps, 0.0).sum(-1) - 0.1 * (entropies * mask).sum(-1)

    ours, real = run_loss(lazy_model(model), loss), run_loss(model, loss)
    truth = run_loss(copy.deepcopy(model).double(), loss)
    name = "lm_head.weight"
    assert ours.value.dtype == real.value.dtype
    assert_close_to_fp64(ours.grads[name], truth.grads[name].double(), real.grads[name])
