"""A caller's mistake is an error that names the argument, what was got and what is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastdpo import Execution, LMHead, TokenLayout, linear_logprob
from fastdpo.ops import backends, checks

H, V = 8, 11
HIDDEN = torch.randn(2, 5, H)
WEIGHT = torch.randn(V, H)
LABELS = torch.randint(V, (2, 5))


def call(hidden: Any = HIDDEN, head: Any = WEIGHT, labels: Any = LABELS, **kwargs: Any) -> Any:
    return linear_logprob(hidden, head, labels, **kwargs)


def adapted(*adapter: Any) -> dict[str, Any]:
    return {"head": LMHead(WEIGHT, adapter=adapter)}


def execution(**kwargs: Any) -> dict[str, Any]:
    return {"execution": Execution(**kwargs)}


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of another size": ({"hidden": torch.randn(2, 5, H + 1)}, r"hidden.*\(2, 5, 9\).*8"),
    "hidden is 0-d": ({"hidden": torch.tensor(1.0), "labels": torch.tensor(1)}, "hidden"),
    "hidden of integers": ({"hidden": HIDDEN.long()}, "hidden.*int64"),
    "hidden complex": ({"hidden": HIDDEN.to(torch.complex64)}, "hidden.*complex"),
    "labels too short": ({"labels": LABELS[:, :-1]}, r"labels.*\(2, 4\).*\(2, 5\)"),
    "labels with a further dimension": ({"labels": LABELS[..., None]}, "labels"),
    "labels of floats": ({"labels": LABELS.float()}, "labels.*float32.*int64"),
    "labels of bool": ({"labels": LABELS.bool()}, "labels.*bool"),
    "labels on another device": ({"labels": LABELS.to("meta")}, "labels.*meta.*cpu"),
    "weight of another dtype": ({"head": WEIGHT.bfloat16()}, "weight.*bfloat16.*float32"),
    "weight of integers": ({"head": WEIGHT.to(torch.int8)}, "weight.*int8"),
    "weight with one dimension": ({"head": WEIGHT[0]}, r"weight.*\(8,\).*\(V, H\)"),
    "weight empty, as a partitioned one is": ({"head": torch.empty(0, H)}, "weight.*gather"),
    "weight on another device": ({"head": WEIGHT.to("meta")}, "weight.*meta"),
    "bias of another size": ({"head": LMHead(WEIGHT, bias=torch.zeros(H))}, r"bias.*\(8,\).*\(11,\)"),
    "bias of another dtype": ({"head": LMHead(WEIGHT, bias=torch.zeros(V).half())}, "bias.*float16"),
    "bias on another device": ({"head": LMHead(WEIGHT, bias=torch.zeros(V, device="meta"))}, "bias.*meta"),
    "logit_scale of 0": ({"head": LMHead(WEIGHT, logit_scale=0.0)}, "logit_scale.*0.0"),
    "logit_scale of nan": ({"head": LMHead(WEIGHT, logit_scale=float("nan"))}, "logit_scale"),
    "softcap of 0": ({"head": LMHead(WEIGHT, softcap=0.0)}, "softcap"),
    "softcap of inf": ({"head": LMHead(WEIGHT, softcap=float("inf"))}, "softcap"),
    "temperature of 0": ({"head": LMHead(WEIGHT, temperature=0.0)}, "temperature"),
    "temperature below 0": ({"head": LMHead(WEIGHT, temperature=-1.0)}, "temperature.*-1.0"),
    "adapter of another size": (adapted(WEIGHT[:3], WEIGHT, 1.0), r"adapter.lora_b.*\(11, 8\).*\(11, 3\)"),
    "adapter of no rank": (adapted(WEIGHT[:0], WEIGHT[:, :0], 1.0), "adapter.lora_a.*r at least 1"),
    "adapter of integers": (adapted(WEIGHT[:3].int(), WEIGHT[:, :3].int(), 1.0), "adapter.lora_a.*int32"),
    "adapter of another dtype": (adapted(WEIGHT[:3], WEIGHT[:, :3].half(), 1.0), "adapter.lora_b.*float16"),
    "adapter on another device": (adapted(WEIGHT[:3].to("meta"), WEIGHT[:, :3], 1.0), "adapter.lora_a.*meta"),
    "adapter scaled by nan": (adapted(WEIGHT[:3], WEIGHT[:, :3], float("nan")), "adapter.scale"),
    "adapter dropping all": (adapted(WEIGHT[:3], WEIGHT[:, :3], 1.0, 1.0), "adapter.dropout.*1.0"),
    "outputs as a string": ({"outputs": "lse"}, "outputs.*'lse'"),
    "unknown output": ({"outputs": ("lse", "perplexity")}, "outputs.*perplexity.*lse"),
    "k without a top-k output": ({"topk": 3, "outputs": ("lse",)}, r"topk: got 3.*topk_mass"),
    "k of 0": ({"topk": 0, "outputs": ("topk_mass",)}, r"topk: got 0, wanted an integer in 1\.\.11"),
    "k past the vocabulary": ({"topk": V + 1, "outputs": ("topk_entropy",)}, r"topk: got 12.*1\.\.11"),
    "k is no integer": ({"topk": 2.0, "outputs": ("topk_mass",)}, r"topk: got 2\.0"),
    "k is a bool": ({"topk": True, "outputs": ("topk_mass",)}, "topk: got True"),
    "entropy gradient without entropy": ({"entropy_requires_grad": True}, "entropy_requires_grad"),
    "token_index with two dimensions": ({"token_index": torch.zeros(1, 1, dtype=torch.long)}, "token_index"),
    "token_index of int32": ({"token_index": torch.zeros(1, dtype=torch.int32)}, "token_index.*int32"),
    "token_index on another device": (
        {"token_index": torch.zeros(1, device="meta").long()},
        "token_index.*meta",
    ),
    "grad_weight_out for a frozen weight": ({"grad_weight_out": torch.zeros(V, H)}, "grad_weight_out"),
    "unknown mode": (execution(mode="fast"), "mode.*fast.*stash"),
    "mode that needs the loss": (execution(mode="pairs"), "mode.*pairs.*fused_dpo_loss"),
    "unknown backend": (execution(backend="tpu"), "backend.*tpu.*triton"),
    "backend for another device": (execution(backend="cuda"), "backend.*cuda.*cpu"),
    "unknown logits_dtype": (execution(logits_dtype="fp8"), "logits_dtype.*fp8"),
    "bf16 logits from fp32 operands": (execution(logits_dtype="bf16"), "logits_dtype.*bf16.*bfloat16"),
    "compute_dtype of integers": (execution(compute_dtype=torch.int8), "compute_dtype.*int8"),
    "no workspace": (execution(workspace_mib=0), "workspace_mib.*0.*1"),
    "workspace of a fraction": (execution(workspace_mib=0.5), "workspace_mib.*0.5"),
    "negative cache": (execution(cache_mib=-1), "cache_mib.*-1"),
}


@pytest.mark.promise(22, 43)
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_value_is_named(name: str) -> None:
    kwargs, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(**kwargs)


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head": nn.Embedding(V, H)}, "lm_head.*Embedding.*LMHead"),
        ({"head": None}, "lm_head.*NoneType"),
        ({"head": LMHead(WEIGHT, vocab_parallel=3)}, "vocab_parallel.*int.*VocabShard"),  # type: ignore[arg-type]
        ({"hidden": [[1.0]]}, "hidden.*list.*Tensor"),
        ({"execution": {"mode": "auto"}}, "execution.*dict.*Execution"),
        (
            {"hidden": HIDDEN.double(), "head": WEIGHT.double(), **execution(backend="cpu")},
            "float64.*reference",
        ),
    ],
)
def test_bad_type_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(**kwargs)


def test_modes_that_cannot_give_the_gradient_asked_for() -> None:
    trained = WEIGHT.clone().requires_grad_()
    for mode in ("score", "stash"):
        with pytest.raises(ValueError, match=f"mode.*{mode}"):
            call(head=trained, **execution(mode=mode))
    with pytest.raises(ValueError, match="mode.*entropy.*cache"):
        call(head=trained, outputs=("entropy",), entropy_requires_grad=True, **execution(mode="cache"))


def test_grad_weight_out_is_checked() -> None:
    weight = WEIGHT.clone().requires_grad_()
    for bad in (
        torch.zeros(V, H + 1),
        torch.zeros(V, H).half(),
        torch.zeros(H, V).t(),
        torch.zeros(V, H, device="meta"),
    ):
        with pytest.raises(ValueError, match="grad_weight_out"):
            call(head=weight, grad_weight_out=bad)


def test_a_workspace_below_one_row_is_refused_with_the_bytes() -> None:
    hidden, weight = torch.randn(3, 2), torch.randn(300_000, 2)
    with pytest.raises(ValueError, match=r"workspace_mib.*300000.*1200128 bytes.*1 MiB"):
        labels = torch.zeros(3, dtype=torch.long)
        linear_logprob(hidden, weight, labels, execution=Execution(mode="score", workspace_mib=1))


@pytest.mark.promise(21)
@pytest.mark.parametrize("label", [-1, V, V + 1000, -(2**40)])
def test_label_out_of_range_is_loud(label: int) -> None:
    labels = LABELS.clone()
    labels[1, 2] = label
    out = call(labels=labels, outputs=("lse",))
    clean = call(outputs=("lse",))
    assert out.logps[1, 2].isnan() and out.logps.isnan().sum() == 1
    others = torch.ones_like(labels, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out.logps[others], clean.logps[others])
    with pytest.raises(ValueError, match=rf"labels: got {label} at flat position 7, wanted 0\.\.10"):
        call(labels=labels, check_labels=True)


def test_good_labels_pass_the_check() -> None:
    labels = LABELS.clone()
    labels[0, 0] = -100
    assert torch.equal(call(labels=labels, check_labels=True).logps, call(labels=labels).logps)


def test_a_machine_without_kernels_is_told_once(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, *_: f"{name} was not built")
    backends._warn_of_no_kernel.cache_clear()
    cpu = torch.device("cpu")
    assert backends.resolve_backend("auto", cpu, torch.float64) == "reference" and not recwarn.list
    for _ in range(2):
        assert backends.resolve_backend("auto", cpu) == "reference"
    (warning,) = recwarn.list
    assert "no kernel of fastdpo runs on cpu" in str(warning.message)
    assert "cpu: cpu was not built" in str(warning.message)
    backends._warn_of_no_kernel.cache_clear()


@pytest.mark.parametrize("index", [[0, 9], [0, -1], [4], [2, 1, 2], [0, 0]])
@pytest.mark.parametrize("check_labels", [False, True])
def test_values_of_token_index(index: list[int], check_labels: bool) -> None:
    """A row named twice would get dweight twice and dhidden once."""
    hidden, weight, labels = torch.randn(2, 2, 8), torch.randn(50, 8), torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"token_index: got position.*wanted (no )?position"):
        linear_logprob(hidden, weight, labels, token_index=torch.tensor(index), check_labels=check_labels)


def test_good_values_of_token_index_in_any_order() -> None:
    hidden, weight, labels = torch.randn(2, 2, 8), torch.randn(50, 8), torch.tensor([[1, 2], [3, 4]])
    logps = linear_logprob(hidden, weight, labels, token_index=torch.tensor([3, 0])).logps
    assert torch.equal(logps == 0, torch.tensor([[False, True], [True, False]]))
    none = linear_logprob(hidden, weight, labels, token_index=torch.zeros(0, dtype=torch.int64)).logps
    assert not none.any()


def test_a_layout_may_name_a_row_twice() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    rows = torch.tensor([2, 2, 0])
    layout = TokenLayout(rows, torch.tensor([7, 8, 9]), torch.tensor([0, 1, 1]))
    linear_logprob(hidden, weight, layout).logps.sum().backward()
    dense = (hidden.detach() @ weight.T).log_softmax(-1)
    assert hidden.grad is not None and hidden.grad[2].any() and not hidden.grad[1].any()
    assert torch.allclose(linear_logprob(hidden, weight, layout).logps, dense[rows, torch.tensor([7, 8, 9])])


def test_on_a_gpu_values_of_token_index_are_read_when_asked_for() -> None:
    """Without values to read, as on a device nobody waits for, the check passes; asked for, it reads."""
    hidden, index = torch.empty(4, 8, device="meta"), torch.empty(2, device="meta", dtype=torch.int64)
    checks.check_token_index(index, hidden)
    with pytest.raises(RuntimeError, match="meta tensors"):
        checks.check_token_index(index, hidden, reads_values=True)
