"""Families of models: the patched forward against the model's own logits, values and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastdpo import LMHead
from fastdpo.integrations.lm_head import find_backbone
from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_logps_close
from tests.integrations.tiny import (
    FAMILIES,
    FEW_ENTRIES,
    IMAGE_TOKEN,
    VOCAB,
    Batch,
    Expected,
    assert_step_close,
    expected_step,
    fused_logps,
    make_batch,
    make_model,
    plain_logps,
    run_step,
)


@pytest.mark.promise(49)
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_equal_the_logits_path(family: str) -> None:
    model, batch = make_model(family), make_batch()
    expected = expected_step(model, batch)
    assert_step_close(run_step(patch_model(model), batch, fused_logps), expected)


def test_a_wrong_gradient_of_few_entries_is_found() -> None:
    """They are held to the rule together, and one of them scaled by 1e-4 is still found."""
    model, batch = make_model("qwen2"), make_batch()
    expected = expected_step(model, batch)
    assert_step_close(expected.eager, expected)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        assert expected.eager.grads[name].numel() <= FEW_ENTRIES
        wrong = {**expected.eager.grads, name: expected.eager.grads[name] * (1 + 1e-4)}
        with pytest.raises(AssertionError, match="in one"):
            assert_step_close(expected.eager._replace(grads=wrong), expected)


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
        ("falcon-h1", 0.5, None, False),
        ("recurrent-gemma", 1.0, 5.0, False),
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


def test_a_ragged_vocabulary_of_262k() -> None:
    """Gemma 3's size less a few, a prime: no vector or tile width divides it."""
    vocab = 262_139
    model = make_model("gemma3", vocab_size=vocab)
    batch = make_batch(batch=1, length=6)
    labels = batch.input_ids + vocab - VOCAB
    labels[0, -1] = vocab - 1
    batch = batch._replace(labels=labels)
    expected = expected_step(model, batch)
    assert_step_close(run_step(patch_model(model), batch, fused_logps), expected)


@pytest.mark.parametrize("family", ["llava", "vipllava", "gemma3-vl", "qwen2-vl", "qwen2.5-vl"])
def test_images_reach_the_backbone(family: str) -> None:
    """Four tokens of an image in the prompt: their embeddings come from pixels, by the config's layers."""
    model, batch = make_model(family), make_batch(batch=1)
    ids = batch.input_ids.clamp(max=190)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():  # Gemma 3's projector starts at 0, and no image would be seen
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if family.startswith("qwen"):
        ids[0, 2] = model.config.vision_start_token_id
        shape, inputs = (16, 3 * 2 * 4 * 4), {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        types = "mm_token_type_ids"
    else:
        shape, inputs, types = (1, 3, 8, 8), {}, "token_type_ids"
    ids[0, 3:7] = IMAGE_TOKEN
    if "llava" not in family:
        inputs[types] = (ids == IMAGE_TOKEN).long()
    pixels = [torch.randn(shape, generator=generator) for _ in range(2)]
    batch = batch._replace(input_ids=ids, labels=ids.masked_fill(torch.arange(12) < 8, -100))
    wanted = [plain_logps(model, batch, pixel_values=image, **inputs) for image in pixels]
    assert not torch.allclose(*wanted, rtol=0, atol=1e-3)
    expected = expected_step_of_images(model, batch, pixels[0], inputs)
    ours = run_step(patch_model(model), batch, fused_logps, pixel_values=pixels[0], **inputs)
    for step in (ours, *expected):
        for name in [name for name in step.grads if name.endswith("self_attn.k_proj.bias")]:
            del step.grads[name]  # shifts all scores of a query alike: its gradient is rounding alone
    assert_step_close(ours, expected)


def expected_step_of_images(
    model: Any, batch: Batch, pixels: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> Expected:
    wide = copy.deepcopy(model).double()
    truth = run_step(wide, batch, plain_logps, pixel_values=pixels.double(), **inputs)
    return Expected(truth, run_step(model, batch, plain_logps, pixel_values=pixels, **inputs))


@pytest.mark.promise(32)
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
