"""Families of models: the patched forward against the model's own logits, values and all gradients."""

from __future__ import annotations

import pytest
import torch

from fastdpo import LMHead
from fastdpo.integrations.lm_head import find_backbone
from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_logps_close
from tests.integrations.tiny import (
    FAMILIES,
    assert_step_close,
    expected_step,
    fused_logps,
    make_batch,
    make_model,
    run_step,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_equal_the_logits_path(family: str) -> None:
    model, batch = make_model(family), make_batch()
    expected = expected_step(model, batch)
    assert_step_close(run_step(patch_model(model), batch, fused_logps), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_bf16_models_lose_nothing_in_the_head(family: str) -> None:
    model, batch = make_model(family).bfloat16(), make_batch()
    patch_model(model)
    with torch.no_grad():
        ours = fused_logps(model, batch)
        hidden = find_backbone(model)(**batch.inputs).last_hidden_state
    head = LMHead.from_model(model)
    logits = hidden.double() @ head.weight.double().T
    logits = head.logit_scale * (logits if head.bias is None else logits + head.bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    targets = batch.labels.roll(-1, dims=1)
    truth = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].roll(1, dims=1)
    ignored = batch.labels == -100
    ignored[:, 0] = True
    assert ours.dtype == torch.float32
    assert_logps_close(ours, truth.masked_fill(ignored, 0.0), torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "has_bias"),
    [
        ("llama", 1.0, None, False),
        ("gemma2", 1.0, 5.0, False),
        ("cohere2", 0.25, None, False),
        ("granite", 0.25, None, False),
        ("hyperclovax", 4.0, None, False),
        ("phi", 1.0, None, True),
    ],
)
def test_heads_are_read_from_the_config(
    family: str, scale: float, softcap: float | None, has_bias: bool
) -> None:
    model = make_model(family)
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap, head.bias is not None) == (scale, softcap, has_bias)
    assert head.weight is model.get_output_embeddings().weight


def test_tied_embeddings_get_gradients_from_both_ends() -> None:
    model, batch = make_model("llama-tied"), make_batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    patch_model(model)
    both = run_step(model, batch, fused_logps).grads["model.embed_tokens.weight"]
    with torch.no_grad():
        embeds = model.model.embed_tokens(batch.input_ids)
    head_only = run_step(model, batch, fused_logps, input_ids=None, inputs_embeds=embeds)
    head_only = head_only.grads["model.embed_tokens.weight"]
    seen = batch.input_ids.unique()
    unseen = torch.ones(len(both), dtype=torch.bool).index_fill(0, seen, False)
    assert torch.allclose(both[unseen], head_only[unseen], atol=1e-6) and not torch.allclose(
        both[seen], head_only[seen]
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("asked_in", ["call", "config"])
def test_mixtures_of_experts_keep_their_balancing_loss(family: str, asked_in: str) -> None:
    model, batch = make_model(family), make_batch()
    asked = {"output_router_logits": True}
    if asked_in == "config":
        model.config.update(asked)
    inputs = {**batch.inputs, **(asked if asked_in == "call" else {})}
    own = model(**inputs)
    patch_model(model)
    ours = model(**inputs, labels=batch.labels, return_logps=True)
    assert torch.equal(ours.aux_loss, own.aux_loss) and ours.aux_loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(ours.router_logits, own.router_logits, strict=True))
    inputs["output_router_logits"] = False
    assert model(**inputs, labels=batch.labels, return_logps=True).aux_loss is None
