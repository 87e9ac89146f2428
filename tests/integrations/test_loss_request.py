"""``pair_loss=``: the loss of any kind made in the model's forward, as from what the model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import Execution, LinearLogprobOutput, TokenLayout, preference_loss_from_logps, shift_labels
from fastdpo.integrations.model import patch_model
from fastdpo.types import DPOLossOutput, PreferenceLossOutput
from tests.integrations.tiny import HIDDEN, fused, make_batch, make_model
from tests.ops.test_gemm_passes import count_passes

VOCAB = 12301  # one MiB holds 21 rows of D
BATCH = make_batch(batch=4)
SMALL = Execution(workspace_mib=1, cache_mib=1)
STEPS = (torch.arange(12) // 4 + 3 * torch.arange(4)[:, None]).masked_fill(BATCH.labels == -100, -1)
REQUESTS: dict[str, dict[str, Any]] = {
    "kto": {
        "is_desirable": torch.tensor([True, False, False, True]), "kl": torch.tensor(0.2),
        "ref_logps": torch.tensor([-30.0, -24.0, -18.0, -12.0]), "row_weights": torch.arange(1.0, 5.0),
    },
    "sdpo": {
        "group_ids": torch.tensor([1, 0, 1, 0]), "scores": torch.tensor([1.0, 0.0, 3.0, 2.0]),
        "ref_logps": torch.tensor([-30.0, -24.0, -18.0, -12.0]), "num_rows": 5,
    },
    "direct_advantage": {
        "segment_ids": STEPS, "num_segments": 12, "advantages": torch.linspace(-0.1, 0.1, 12),
        "ref_logps": torch.linspace(-9.0, -1.0, 12),
    },
}  # fmt: skip


def model_of(**options: Any) -> Any:
    return patch_model(make_model("llama", vocab_size=VOCAB), execution=SMALL, **options)


def as_rows() -> tuple[TokenLayout, dict[str, Tensor]]:
    """Each sequence a row of its own, and the labelled tokens of all."""
    targets = shift_labels(BATCH.labels)
    sequence, position = (targets != -100).nonzero(as_tuple=True)
    layout = TokenLayout(
        sequence * targets.shape[1] + position, targets[sequence, position], sequence,
        tuple(sequence.bincount(minlength=4).tolist()),
    )  # fmt: skip
    return layout, {"input_ids": BATCH.input_ids, "position_ids": torch.arange(12).expand(4, -1)}


def in_layout(request: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
    if "segment_ids" not in request:
        return request
    following = torch.nn.functional.pad(STEPS, (0, 1), value=-1)[:, 1:].reshape(-1)
    return request | {"segment_ids": following[layout.token_index]}


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]))


@pytest.mark.parametrize("name", list(REQUESTS))
def test_it_is_the_loss_of_what_the_model_returns(name: str) -> None:
    model, request = model_of(), {"loss_type": name, **REQUESTS[name]}
    layout, rows = as_rows()
    flat = in_layout(request, layout)
    call = {"token_layout": layout, "row_batches": [rows], "return_logps": True}
    logps = model(**call).logps
    want = preference_loss_from_logps(LinearLogprobOutput(logps), None, layout=layout, **flat)
    want_grads = gradients(model, want.loss)
    padded = fused(model, **BATCH.inputs, labels=BATCH.labels, pair_loss=request)
    for out in (padded, model(**call, pair_loss=flat)):
        assert isinstance(out.pair_loss, PreferenceLossOutput) and out.logps is None
        assert out.loss is out.pair_loss.loss and "entropy" in out.pair_loss.metrics
        torch.testing.assert_close([out.loss, out.pair_loss.logps], [want.loss, want.logps])
        for ours, theirs in zip(gradients(model, out.loss), want_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", list(REQUESTS))
@pytest.mark.parametrize(("trained", "passes"), [(True, 3), (False, 2)])
def test_products(name: str, trained: bool, passes: int) -> None:
    """Though D does not fit into the cache; a loss of the model's log-probabilities takes more."""
    model, request = model_of(), {"loss_type": name, **REQUESTS[name]}
    model.lm_head.weight.requires_grad_(trained)
    num_tokens = int((shift_labels(BATCH.labels) != -100).sum())
    assert num_tokens > 21

    def step() -> None:
        fused(model, **BATCH.inputs, labels=BATCH.labels, pair_loss=request).loss.backward()

    assert count_passes(step, num_tokens, HIDDEN, VOCAB, of_size=VOCAB) == passes


def test_a_name_decides() -> None:
    model = model_of()
    pairs = fused(model, **BATCH.inputs, labels=BATCH.labels, pair_loss={"ref_logps": torch.zeros(4)})
    assert isinstance(pairs.pair_loss, DPOLossOutput)
    for request, message in (
        ({"loss_type": "ktoo"}, "loss_type: got 'ktoo', wanted one of"),
        ({"loss_type": "kto", "ref_logps": torch.zeros(4)}, "is_desirable: got None, wanted a value for kto"),
        ({"loss_type": ["kto", "sigmoid"]}, "wanted losses of the same batch"),
        (REQUESTS["kto"] | {"loss_type": "kto", "shift": False}, "pair_loss: got .'shift'."),
    ):
        with pytest.raises(ValueError, match=message):
            fused(model, **BATCH.inputs, labels=BATCH.labels, pair_loss=request)
