"""Foreign loss code on lazy logits: its values and gradients, what it projects, and what it never makes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo import patch_model
from fastdpo.integrations.lazy import LazyLogits, MadeLogits
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from tests.integrations.lazy_losses import (
    LARGE,
    LOSSES,
    STATISTICS,
    LargestResult,
    Loss,
    Result,
    Rows,
    concatenated_forward,
    dpo_repository,
    label_smoother,
    largest_logit,
    lazy_model,
    mean_logit,
    run_loss,
    shifted_cross_entropy,
    smoothed_cross_entropy,
)
from tests.integrations.tiny import FAMILIES as FAMILIES_OF_ALL
from tests.integrations.tiny import VOCAB, make_model
from tests.ops.test_gemm_passes import count_passes

FAMILIES = ["llama", "phi", "gemma2", "cohere"]  # plain; with a bias; with a cap; with a scale
OF_MEAN_LOGITS = (smoothed_cross_entropy, label_smoother, mean_logit, concatenated_forward)
NUM_LABELLED = int((LARGE.labels[:, 1:] != -100).sum())


def assert_close(ours: Result, model: Any, loss: Loss, **how: Any) -> None:
    """By the rule: the truth is the same code on the real logits in fp64, the unit its error in fp32."""
    truth, eager = run_loss(copy.deepcopy(model).double(), loss, **how), run_loss(model, loss, **how)
    values = ours.value.reshape(-1), truth.value.reshape(-1).double(), eager.value.reshape(-1)
    assert_close_to_fp64(*values, name=loss.__name__)
    assert ours.grads.keys() == eager.grads.keys() == truth.grads.keys()
    largest = max(grad.abs().max() for grad in truth.grads.values())
    for name, grad in ours.grads.items():
        true, own = truth.grads[name].double(), eager.grads[name]
        if true.abs().max() < 1e-6 * largest:  # of rounding alone
            assert grad.abs().max() < 1e-5 * largest
        else:
            assert_close_to_fp64(grad, true, own, name=f"{loss.__name__} {name}")


def assert_equal_in_fp64(ours: Result, wanted: Result) -> None:
    """Where what is counted, not how it is rounded, is in question."""
    assert torch.allclose(ours.value, wanted.value, rtol=1e-10, atol=1e-10)
    assert ours.grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        scale = float(grad.abs().max())
        assert torch.allclose(ours.grads[name], grad, rtol=0, atol=1e-10 * (1 + scale)), name


@pytest.mark.promise(63)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_equal_those_of_real_logits_and_make_none(
    loss: Loss, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(family).train(), Rows(monkeypatch)
    with LargestResult() as largest:
        ours = run_loss(lazy_model(model), loss)
    assert largest.num_bytes < LARGE.labels.numel() * VOCAB * 4
    chosen = LARGE.labels[: len(LARGE.labels) // 2, 1:]
    chosen = chosen[chosen != -100]
    of_chosen = int((chosen != chosen[0]).sum())
    assert rows.count == (of_chosen if loss.__name__ == "cross_entropy_of_chosen" else NUM_LABELLED)
    assert_close(ours, model, loss)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", STATISTICS, ids=lambda loss: loss.__name__)
def test_statistics_equal_those_of_real_logits(loss: Loss, family: str) -> None:
    model = make_model(family).train()
    with LargestResult() as largest:
        ours = run_loss(lazy_model(model), loss)
    # An argmax, and the gradient of a mean of capped logits, take chunks as large as the workspace: all here.
    has_chunks = loss is largest_logit or (family == "gemma2" and loss in OF_MEAN_LOGITS)
    assert largest.num_bytes < LARGE.labels.numel() * VOCAB * 4 or has_chunks
    assert_close(ours, model, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_loss_and_log_probabilities(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(family).train(), Rows(monkeypatch)
    patched = lazy_model(model)

    def own_loss(model: Any) -> Result:
        model.zero_grad()
        loss = model(**LARGE.inputs, labels=LARGE.labels).loss
        loss.backward()
        return Result(loss.detach()[None], {n: p.grad.clone() for n, p in model.named_parameters()})

    ours, eager = own_loss(patched), own_loss(model)
    truth = own_loss(copy.deepcopy(model).double())
    assert rows.count == NUM_LABELLED
    assert_close_to_fp64(ours.value, truth.value.double(), eager.value)
    name = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert_close_to_fp64(ours.grads[name], truth.grads[name].double(), eager.grads[name])

    def logps(model: Any) -> Tensor:
        logits = model(**LARGE.inputs).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, LARGE.labels[:, 1:, None].clamp(min=0)).squeeze(-1) * 1.0

    assert_logps_close(logps(patched).detach(), logps(copy.deepcopy(model).double()).detach(), torch.float32)


@pytest.mark.parametrize("family", FAMILIES_OF_ALL)
def test_every_family(family: str) -> None:
    """What their forwards do between head and loss is done to lazy logits."""
    model, patched = make_model(family).train(), lazy_model(make_model(family).train())
    found = []
    for each in (model, patched):
        torch.manual_seed(0)  # of dropout
        found.append(run_loss(each, dpo_repository))
        torch.manual_seed(0)
        own = each(**LARGE.inputs, labels=LARGE.labels)
        found.append(own.loss.detach())
    assert isinstance(own.logits, LazyLogits)
    real, real_loss, ours, our_loss = found
    assert torch.allclose(ours.value, real.value, rtol=1e-5, atol=1e-3) and torch.allclose(
        our_loss, real_loss
    )
    head = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert (ours.grads[head] - real.grads[head]).norm() < 1e-4 * real.grads[head].norm()


@pytest.mark.parametrize("loss", [dpo_repository, shifted_cross_entropy], ids=lambda loss: loss.__name__)
def test_products_are_those_of_the_op_on_labelled_rows(loss: Loss) -> None:
    """Two with a frozen head, three with a trained one (as D is kept)."""
    for trains, passes in ((False, 2), (True, 3)):
        model = lazy_model(make_model().train())
        model.lm_head.weight.requires_grad_(trains)
        weight = model.lm_head.weight
        counted = count_passes(
            lambda model=model: run_loss(model, loss), NUM_LABELLED, weight.shape[1], VOCAB, of_size=VOCAB
        )
        assert counted == passes


# What makes real values


def odd(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(-1).square() * torch.arange(VOCAB)).sum(-1)


@pytest.mark.promise(64)
def test_an_unknown_operation_makes_real_values_once_and_says_where() -> None:
    model = make_model().train()
    patched = lazy_model(model, on_materialize="warn")
    with pytest.warns(UserWarning, match=r"logits: square at .*test_lazy\.py:\d+ needs the real") as caught:
        ours = run_loss(patched, odd)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_close(ours, model, odd)
    with pytest.raises(MadeLogits, match=r"logits: square at .*test_lazy\.py:\d+"):
        run_loss(lazy_model(model), odd)

    logits = patched(**LARGE.inputs).logits
    with warnings.catch_warnings(record=True) as caught_all:
        warnings.simplefilter("always")
        first, second = logits.sum(), logits[:, 1:] + 1
        assert dpo_repository(logits, LARGE.labels).requires_grad
    assert len(caught_all) == 1 and first.requires_grad and second.requires_grad
    assert logits.memory.real is not None


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("logits", "lazi", "one of .*'lazy'"),
        ("logits", True, "one of"),
        ("on_materialize", "never", "'warn'"),
    ],
)
def test_unknown_values_are_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value!r}.*{wanted}"):
        patch_model(make_model(), **{name: value})


# Changes in place


def by_mask(logits: Tensor, labels: Tensor) -> Tensor:
    view = logits[:, 1:]
    logits[labels == -100] = -1.0
    return view.log_softmax(-1)[..., 5].sum(-1)


def through_a_view(logits: Tensor, labels: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)  # of before
    logits[:, :2].mul_(2.0)
    return logps[..., 3].sum() + logits.logsumexp(-1).sum()


def through_all_views(logits: Tensor, labels: Tensor) -> Tensor:
    """``view`` shares memory with the logits, ``copied`` does not."""
    view, copied = logits[:, 1:], logits[:, 1:].clone()
    same = logits.view(-1, logits.shape[-1])
    same /= 0.5
    return view.logsumexp(-1).sum(-1) - copied.logsumexp(-1).sum(-1)


def reshaped_copy(logits: Tensor, labels: Tensor) -> Tensor:
    tripled = logits.transpose(0, 1).reshape(-1, logits.shape[-1]).mul_(3.0)  # of a copy
    part = logits[:, 1:]
    part.reshape(-1, logits.shape[-1]).mul_(3.0)  # of another
    return part.logsumexp(-1).sum(-1) + 2 * logits.logsumexp(-1).sum(-1) + tripled.logsumexp(-1).sum()


def labels_written_to_later(logits: Tensor, labels: Tensor) -> Tensor:
    index = labels.clamp(min=0)[..., None]
    logps = logits.detach().log_softmax(-1).gather(-1, index)  # of real ones, done by now
    index.zero_()
    return logps.sum((-1, -2)) + logits.logsumexp(-1).sum(-1)


def rows_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
    seen = logps.squeeze(-1)[:, 2:]
    flat = logps.squeeze(-1)
    flat[labels == -100] = 7.0
    flat[:, 3].mul_(2)
    return seen.sum(-1) + flat.masked_fill_(labels == 3, 1.0).sum(-1)


def without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        detached = logits.detach()
        lowered = logits.log_softmax(-1)
    weight = detached.logsumexp(-1).exp().clamp(max=2.0)
    assert not lowered.requires_grad and not weight.requires_grad
    return (logits.logsumexp(-1) * weight).sum(-1) + lowered[..., 1].sum(-1)


def seen_first_without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """A metric looks at what is differentiated later."""
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    with torch.no_grad():
        assert not (logps + 1).requires_grad
        assert not (logps * (labels != -100)).requires_grad
    return (logps * (labels != -100)).sum(-1)


def two_masks(logits: Tensor, labels: Tensor) -> Tensor:
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    few = labels > 100
    return (logps * few).sum(-1) + (logps * (labels != -100)).sum(-1) + torch.where(few, 0.0, logps).sum(-1)


def mask_with_a_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    lse = logits.logsumexp(-1) + 0
    weight = lse - lse.detach()  # 0, with a gradient
    return (logps * weight).sum(-1)


def several_labels_of_a_row(logits: Tensor, labels: Tensor) -> Tensor:
    index = labels.clamp(min=0)[:, :-3, None].repeat(1, 1, 3) // torch.tensor([1, 2, 3])
    return logits.softmax(-1).log().gather(-1, index).sum((-1, -2))


def swapped_and_joined(logits: Tensor, labels: Tensor) -> Tensor:
    first, second = logits.transpose(0, 1).chunk(2)
    joined = torch.cat([second, first]).roll(1, dims=0).index_select(0, torch.tensor([0, 5, 5]))
    return joined.logsumexp(-1, keepdim=True).flip(0).squeeze(-1).mean(-1)


@pytest.mark.filterwarnings("ignore:logits")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "loss",
    [
        *(by_mask, through_a_view, through_all_views, reshaped_copy, rows_in_place, without_gradient),
        *(seen_first_without_gradient, two_masks, mask_with_a_gradient, several_labels_of_a_row),
        *(swapped_and_joined, labels_written_to_later),
    ],
    ids=lambda loss: loss.__name__,
)
def test_what_is_seen_through_views_copies_and_without_gradients(loss: Loss, family: str) -> None:
    model = make_model(family).train().double()
    assert_equal_in_fp64(run_loss(lazy_model(model, on_materialize="warn"), loss), run_loss(model, loss))


def test_temperatures_in_place_stay_lazy() -> None:
    model = make_model().train().double()
    assert_equal_in_fp64(run_loss(lazy_model(model), through_all_views), run_loss(model, through_all_views))


def test_backward_twice_and_after_a_change_of_the_head() -> None:
    model = lazy_model(make_model().train())
    loss = dpo_repository(model(**LARGE.inputs).logits, LARGE.labels).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    logits = model(**LARGE.inputs).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        dpo_repository(logits, LARGE.labels)
    with pytest.raises(RuntimeError, match="register_hook on lazy logits"):
        model(**LARGE.inputs).logits.register_hook(print)


def test_other_names_of_arguments() -> None:
    model = make_model()
    logits, real = (m(**LARGE.inputs).logits.detach() for m in (lazy_model(model), model))
    assert torch.allclose(logits.roll(shifts=1, dims=(1,)).logsumexp(dim=-1), real.roll(1, 1).logsumexp(-1))
    labels = LARGE.input_ids[..., None]
    assert torch.allclose(torch.gather(logits, dim=2, index=labels) + 0, real.gather(2, labels))
    logits = lazy_model(model, on_materialize="warn")(**LARGE.inputs).logits.detach()
    with pytest.warns(UserWarning, match="mean"):
        assert torch.allclose(logits.mean(axis=-1), real.mean(-1))
    written = torch.empty_like(real)
    torch.exp(logits, out=written)
    assert torch.allclose(written, real.exp())


def test_errors_are_those_of_real_logits() -> None:
    logits = lazy_model(make_model().train())(**LARGE.inputs).logits
    with pytest.raises(RuntimeError):
        logits[:, :-1].view(-1, VOCAB)  # not contiguous
    with pytest.raises(IndexError):
        logits[:, 99]
    with pytest.raises(ValueError, match="label"):
        logits.log_softmax(-1).gather(-1, torch.full((4, 24, 1), VOCAB)).sum()
    with pytest.raises(MadeLogits):
        F.cross_entropy(logits.view(-1, VOCAB), torch.zeros(3, dtype=torch.long))
