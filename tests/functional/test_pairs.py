"""`fused_dpo_loss` against a dense fp64 oracle, in every layout, and what it must do with odd batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.functional import path as functional
from fastdpo.functional.pairs import dpo_loss_from_logps, fused_dpo_loss, shift_labels
from fastdpo.ops.linear_logprob import indexed_logprob
from fastdpo.testing import assert_close_to_fp64
from fastdpo.types import Execution, LinearLogprobOutput, LMHead, PackedLayout
from tests.functional.batch_cases import (
    IGNORED,
    LENGTH,
    PAIRS,
    SEQUENCE_LENGTHS,
    VOCAB,
    Batch,
    dense_loss,
    dense_token_logps,
    make_batch,
    run,
)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"label_smoothing": 0.2}),
        ("ipo", {}),
        ("robust", {"label_smoothing": 0.2}),
        ("sigmoid_norm", {}),
        ("simpo", {}),
        ("sft", {}),
    ],
    ids=str,
)
def test_equals_dense_fp64(name: str, options: dict[str, float], dtype: torch.dtype, packed: bool) -> None:
    batch = make_batch(dtype)
    hidden, weight = batch.leaves()
    ours = run(batch, hidden, weight, packed=packed, loss_type=name, beta=0.3, **options)
    assert ours.loss.dtype == torch.promote_types(dtype, torch.float32)
    results = []
    for compute in (torch.float64, dtype):
        leaves = [x.detach().to(compute).requires_grad_() for x in (hidden, weight)]
        loss = dense_loss(batch, *leaves, name, eps=options.get("label_smoothing", 0.0))
        grads = torch.autograd.grad(loss, leaves)
        results.append([loss.detach().reshape(1), grads[0].flatten(0, 1), grads[1]])
    grads = torch.autograd.grad(ours.loss, (hidden, weight))
    got_all = (ours.loss.detach().reshape(1), grads[0].flatten(0, 1), grads[1])
    for what, got, truth, eager in zip(("loss", "dhidden", "dweight"), got_all, *results, strict=True):
        if dtype == torch.float64:  # eager is the truth itself there
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_fp64(got, truth, eager.to(got), name=what)
    predicts_nothing = shift_labels(batch.labels) == IGNORED
    assert not grads[0][predicts_nothing].any()


@pytest.mark.promise(10)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "execution",
    [None, Execution(mode="cache"), Execution(cache_mib=0), Execution(mode="score")],
    ids=["auto", "cache", "cache_mib=0", "score"],
)
def test_policy_equal_to_reference(packed: bool, execution: Execution | None) -> None:
    """Rewards exactly 0 and a loss of exactly ln 2, whatever is kept for the backward pass."""
    batch = make_batch(torch.bfloat16)
    hidden, weight = batch.leaves()
    if execution is not None and execution.mode == "score":
        hidden, weight = batch.hidden, batch.weight
    ref_hidden = batch.packed(batch.hidden) if packed else batch.hidden
    out = run(
        batch, hidden, weight, packed=packed, ref_hidden=ref_hidden, ref_lm_head=None, execution=execution
    )
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()
    assert out.metrics["rewards/margins"].item() == 0.0 and out.metrics["rewards/accuracies"].item() == 0.0


def test_every_source_of_the_reference_is_the_same() -> None:
    batch = make_batch()
    hidden, weight = batch.leaves()
    out = run(batch, hidden, weight)
    assert out.ref_chosen_logps is not None and out.ref_rejected_logps is not None
    sums = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
    per_token, mask = dense_token_logps(batch.ref_hidden, batch.ref_weight, batch.labels)
    aligned = torch.nn.functional.pad(per_token.where(mask, float("nan")), (0, 1), value=7.0)
    for ref_logps in (sums, sums.double(), aligned, sums.clone().requires_grad_()):
        other = fused_dpo_loss(hidden, weight, batch.labels, ref_logps=ref_logps)
        torch.testing.assert_close(other.loss, out.loss, rtol=1e-5, atol=1e-6)
        assert not other.ref_chosen_logps.requires_grad  # type: ignore[union-attr]
    packed = fused_dpo_loss(
        batch.packed(hidden),
        LMHead(weight),
        batch.packed(batch.labels),
        ref_logps=batch.packed(aligned),
        layout=PackedLayout(batch.layout.cu_seqlens.int(), lengths=SEQUENCE_LENGTHS),
    )
    torch.testing.assert_close(packed.loss, out.loss, rtol=1e-5, atol=1e-6)


def test_reference_gets_no_gradient() -> None:
    batch = make_batch()
    hidden, weight = batch.leaves()
    ref_hidden, ref_weight = batch.ref_hidden.requires_grad_(), batch.ref_weight.requires_grad_()
    loss = run(batch, hidden, weight, ref_hidden=ref_hidden, ref_lm_head=ref_weight).loss
    grads = torch.autograd.grad(loss, (hidden, weight, ref_hidden, ref_weight), allow_unused=True)
    assert grads[0] is not None and grads[1] is not None and grads[2:] == (None, None)


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_the_head_is_asked_for(monkeypatch: pytest.MonkeyPatch, is_shared: bool) -> None:
    """The reference is scored on the policy's tokens: in its call, or, with another head, without a graph."""
    calls = []

    def spy(
        hidden: torch.Tensor,
        head: LMHead,
        targets: torch.Tensor,
        index: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[LinearLogprobOutput, torch.Tensor | None]:
        calls.append((targets, index, torch.is_grad_enabled(), kwargs["execution"], kwargs.get("ref_hidden")))
        return indexed_logprob(hidden, head, targets, index, *args, **kwargs)

    monkeypatch.setattr(functional, "indexed_logprob", spy)
    batch = make_batch()
    ids = batch.labels.clamp(min=0).masked_fill(~batch.is_real, IGNORED)  # the prompt is token 0
    execution = Execution(mode="cache", workspace_mib=7)
    names = ["sigmoid", "sft"]
    hidden, weight = batch.leaves()
    head = {"ref_lm_head": None if is_shared else batch.ref_weight}
    run(
        batch, hidden, weight, loss_type=names, nll_labels=ids, execution=execution,
        ref_hidden=batch.ref_hidden, **head,
    )  # fmt: skip
    targets, index, has_graph, how, ref_hidden = calls[-1]
    assert has_graph and how == execution
    assert (ref_hidden is batch.ref_hidden) == is_shared and len(calls) == (1 if is_shared else 2)
    if not is_shared:
        ref_targets, ref_index, ref_has_graph, ref_how, _ = calls[0]
        assert not ref_has_graph and ref_how == Execution(mode="score", workspace_mib=7)
        assert ref_targets is targets and ref_index is index
    # No NLL of rejected prompts.
    asked_for = torch.cat((shift_labels(ids)[:PAIRS], shift_labels(batch.labels)[PAIRS:]))
    assert torch.equal(asked_for.view(-1)[index], targets)
    assert sorted(index.tolist()) == (asked_for.view(-1) != IGNORED).nonzero().view(-1).tolist()
    # Pair by pair.
    pair = index // asked_for.shape[1] % PAIRS
    assert pair.tolist() == sorted(pair.tolist())


def test_micro_batches_add_up() -> None:
    """Loss and gradients of three micro-batches, unequal in tokens, sum to the batch's to 1e-6."""
    batch = make_batch()
    names, hidden, weight = ["sigmoid", "sft"], *batch.leaves()
    whole = run(batch, hidden, weight, loss_type=names, loss_weights=[1.0, 0.5])
    want = torch.autograd.grad(whole.loss, (hidden, weight))
    num_tokens = (shift_labels(batch.labels)[:PAIRS] != IGNORED).sum()
    total = torch.zeros(())
    for i in range(PAIRS):
        rows = [i, i + PAIRS]
        total = total + fused_dpo_loss(
            hidden[rows], weight, batch.labels[rows], ref_hidden=batch.ref_hidden[rows],
            ref_lm_head=batch.ref_weight, loss_type=names, loss_weights=[1.0, 0.5],
            num_pairs=PAIRS, num_tokens=num_tokens,
        ).loss  # fmt: skip
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=0)
    for got, expected in zip(torch.autograd.grad(total, (hidden, weight)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "hinge", "simpo"])
def test_per_pair_arguments_equal_a_loop_over_pairs(name: str) -> None:
    batch = make_batch()
    per_pair = {
        "beta": torch.tensor([0.05, 0.3, 1.0]),
        "margin": torch.tensor([-0.5, 0.0, 2.0]),
        "soft_labels": torch.tensor([1.0, 0.6, 0.0]),
        "pair_weights": torch.tensor([2.0, 0.0, 0.5]),
    }
    hidden, weight = batch.leaves()
    together = run(batch, hidden, weight, loss_type=name, **per_pair)
    total = torch.zeros(())
    for i in range(PAIRS):
        rows = [i, i + PAIRS]
        one = Batch(
            hidden[rows], weight, batch.ref_hidden[rows], batch.ref_weight, batch.labels[rows], batch.is_real
        )
        numbers = {key: value[i].item() for key, value in per_pair.items()}
        out = run(one, one.hidden, weight, loss_type=name, num_pairs=PAIRS, **numbers)
        total = total + out.loss
        torch.testing.assert_close(out.chosen_rewards[0], together.chosen_rewards[i])
    torch.testing.assert_close(together.loss, total, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, weight)[0] for x in (together.loss, total)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_token_weights(packed: bool) -> None:
    batch = make_batch(torch.float64)
    weights = torch.rand(2 * PAIRS, LENGTH, dtype=torch.float64)
    given = batch.packed(weights) if packed else weights
    out = run(batch, batch.hidden, batch.weight, packed=packed, token_weights=given)
    for hidden, weight, got in (
        (batch.hidden, batch.weight, (out.chosen_logps, out.rejected_logps)),
        (batch.ref_hidden, batch.ref_weight, (out.ref_chosen_logps, out.ref_rejected_logps)),
    ):
        token, _ = dense_token_logps(hidden, weight, batch.labels)
        torch.testing.assert_close(torch.cat(got), (token * weights[:, 1:]).sum(1))  # type: ignore[arg-type]
    ones = run(batch, batch.hidden, batch.weight, loss_type="ipo", token_weights=torch.ones_like(weights))
    assert torch.equal(ones.loss, run(batch, batch.hidden, batch.weight, loss_type="ipo").loss)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_nll_labels(packed: bool) -> None:
    """The NLL of prompt and answer beside a preference over the answer; the rejected half is left out."""
    batch = make_batch(torch.float64)
    ids = torch.randint(VOCAB, batch.labels.shape).masked_fill(~batch.is_real, IGNORED)
    ids = batch.labels.where(batch.labels != IGNORED, ids)
    given = batch.packed(ids) if packed else ids
    plain = run(batch, batch.hidden, batch.weight, packed=packed)
    out = run(
        batch, batch.hidden, batch.weight, packed=packed,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], nll_labels=given,
    )  # fmt: skip
    token, mask = dense_token_logps(batch.hidden, batch.weight, ids)
    nll = -token[:PAIRS].sum() / mask[:PAIRS].sum()
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * nll)
    torch.testing.assert_close(out.chosen_logps, plain.chosen_logps)
    assert out.metrics["num_tokens"] == plain.metrics["num_tokens"]
    same = run(batch, batch.hidden, batch.weight, loss_type=["sigmoid", "sft"], nll_labels=batch.labels)
    torch.testing.assert_close(
        same.loss, run(batch, batch.hidden, batch.weight, loss_type=["sigmoid", "sft"]).loss
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "sft"])
def test_all_labels_ignored(name: str, packed: bool) -> None:
    batch = make_batch()
    hidden, weight = batch.leaves()
    batch.labels.fill_(IGNORED)
    out = run(batch, hidden, weight, packed=packed, loss_type=name)
    assert out.loss.item() == 0.0 and out.loss.requires_grad
    for grad in torch.autograd.grad(out.loss, (hidden, weight)):
        assert not grad.any()
    assert all(value.item() == 0.0 for value in out.metrics.values())


@pytest.mark.promise(19)
def test_pair_without_tokens_changes_nothing_and_one_empty_answer_is_finite() -> None:
    batch = make_batch()
    hidden, weight = batch.leaves()
    keep = [0, 1, 3, 4]
    batch.labels[[2, 5]] = IGNORED
    out = run(batch, hidden, weight)
    kept = Batch(
        hidden[keep], weight, batch.ref_hidden[keep], batch.ref_weight, batch.labels[keep], batch.is_real
    )
    alone = run(kept, kept.hidden, weight)
    assert torch.equal(out.loss, alone.loss)
    assert all(torch.equal(out.metrics[key], alone.metrics[key]) for key in out.metrics)

    batch.labels[3] = IGNORED
    out = run(batch, hidden, weight, loss_type="ipo")
    assert out.rejected_logps[0] == 0.0 and out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.loss, (hidden, weight)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_nan_in_ignored_rows_changes_nothing(packed: bool) -> None:
    batch = make_batch()
    ignored = shift_labels(batch.labels) == IGNORED
    results = []
    for poison in (0.0, float("nan")):
        hidden = batch.hidden.masked_fill(ignored[..., None], poison).requires_grad_()
        ref_hidden = batch.ref_hidden.masked_fill(ignored[..., None], poison)
        weight = batch.weight.clone().requires_grad_()
        reference = batch.packed(ref_hidden) if packed else ref_hidden
        out = run(batch, hidden, weight, packed=packed, ref_hidden=reference)
        results.append([out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), *out.metrics.values()])
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))


def test_a_bad_label_is_loud_and_stays_in_its_pair() -> None:
    batch = make_batch()
    clean = run(batch, batch.hidden, batch.weight)
    batch.labels[1, 5] = VOCAB
    out = run(batch, batch.hidden, batch.weight)
    assert out.loss.isnan() and out.chosen_logps[1].isnan()
    assert torch.equal(out.chosen_logps[[0, 2]], clean.chosen_logps[[0, 2]])


def test_metrics_equal_the_dense_ones() -> None:
    batch = make_batch(torch.float64)
    out = run(batch, batch.hidden, batch.weight)
    logits = batch.hidden[:, :-1] @ batch.weight.T
    mask = batch.labels[:, 1:] != IGNORED
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    chosen, rejected = mask.clone(), mask.clone()
    chosen[PAIRS:], rejected[:PAIRS] = False, False
    top1 = logits.argmax(-1) == batch.labels[:, 1:]
    want = {
        "entropy": entropy[mask].mean(),
        "logits/chosen": logits.mean(-1)[chosen].mean(),
        "logits/rejected": logits.mean(-1)[rejected].mean(),
        "mean_token_accuracy": top1[chosen].double().mean(),
        "num_tokens": mask.sum().double(),
        "logps/chosen": out.chosen_logps.mean(),
        "rewards/chosen": 0.1 * (out.chosen_logps - out.ref_chosen_logps).mean(),
    }
    for key, value in want.items():
        torch.testing.assert_close(out.metrics[key], value, msg=key)
    assert len(out.metrics) == 11
    assert not any(value.requires_grad or value.dim() for value in out.metrics.values())


def test_shift_labels() -> None:
    labels = torch.tensor([[5, 6, 7], [8, 9, 4]])
    assert shift_labels(labels).tolist() == [[6, 7, -100], [9, 4, -100]]
    assert shift_labels(labels[:, :0]).shape == (2, 0)
    layout = PackedLayout(torch.tensor([0, 0, 3, 3, 6, 6]))
    assert shift_labels(labels.view(-1), layout=layout, ignore_index=-1).tolist() == [6, 7, -1, 9, 4, -1]
    assert labels.tolist() == [[5, 6, 7], [8, 9, 4]]


def test_a_reference_of_fewer_tokens_than_sequences() -> None:
    """By its shape alone it is one of tokens, not of sums."""
    layout, logps = PackedLayout(torch.tensor([0, 1, 1, 1, 3])), torch.tensor([-1.0, -2.0, -3.0])
    mask, ref_logps = torch.ones(3, dtype=torch.bool), torch.tensor([-1.5, -1.0, -1.0])
    token = LinearLogprobOutput(logps)
    got = dpo_loss_from_logps(token, mask, ref_logps=ref_logps, layout=layout)
    want = dpo_loss_from_logps(token, mask, ref_logps=torch.tensor([-1.5, 0, 0, -2]), layout=layout)
    assert torch.equal(got.loss, want.loss) and got.ref_rejected_logps.tolist() == [0, -2]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_shifted_labels_and_another_ignore_index(packed: bool) -> None:
    batch = make_batch()
    want = run(batch, batch.hidden, batch.weight, packed=packed).loss
    shifted = Batch(**(vars(batch) | {"labels": shift_labels(batch.labels)}))
    assert torch.equal(run(shifted, batch.hidden, batch.weight, packed=packed, shift=False).loss, want)
    other = Batch(**(vars(batch) | {"labels": batch.labels.masked_fill(batch.labels == IGNORED, 7777)}))
    assert torch.equal(run(other, batch.hidden, batch.weight, packed=packed, ignore_index=7777).loss, want)
    narrow = Batch(**(vars(batch) | {"labels": batch.labels.int()}))
    assert torch.equal(run(narrow, batch.hidden, batch.weight, packed=packed).loss, want)


@pytest.mark.parametrize(
    ("device", "packed"),
    [("cuda", False), ("cuda", True), ("cpu", False)],
    ids=["padded", "packed", "backward"],
)
def test_nothing_waits_for_the_device(device: str, packed: bool) -> None:
    """Fake tensors have no values: reading one, or asking how many are true, raises.

    On a build without CUDA autograd does not run on fake CUDA tensors: the backward pass is on fake CPU ones.
    """
    with FakeTensorMode():
        shape = (24,) if packed else (4, 6)
        layout = PackedLayout(torch.zeros(5, dtype=torch.int32, device=device)) if packed else None
        logps = torch.randn(shape, device=device, requires_grad=device == "cpu")
        statistic = logps.detach()
        token = LinearLogprobOutput(logps, entropy=statistic, mean_logit=statistic, is_top1=statistic > 0)
        labels = torch.zeros(shape, dtype=torch.int64, device=device)
        mask = shift_labels(labels, layout=layout) != IGNORED
        out = dpo_loss_from_logps(
            token, mask, ref_logps=statistic, nll_mask=mask, token_weights=statistic, layout=layout,
            loss_type=["sigmoid", "ipo", "sft"], beta=torch.ones(2, device=device), pair_weights=0.5,
            num_pairs=torch.ones((), device=device), num_tokens=24,
        )  # fmt: skip
        assert out.loss.device.type == device
        assert all(value.device.type == device for value in out.metrics.values())
        if logps.requires_grad:
            assert torch.autograd.grad(out.loss, logps)[0].shape == shape


def test_torch_compile_sees_one_graph() -> None:
    batch = make_batch()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    want = run(batch, batch.hidden, batch.weight, label_smoothing=0.1)
    got = compiled(batch, batch.hidden, batch.weight, label_smoothing=0.1)
    torch.testing.assert_close(got.loss, want.loss)
