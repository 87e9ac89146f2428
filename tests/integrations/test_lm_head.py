"""Finding the head: what is understood, what is refused and why, and that a look changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdpo import LMHead
from fastdpo.integrations.lm_head import examine, find_backbone, read_head
from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_logps_close
from tests.integrations.tiny import (
    FAMILIES,
    HIDDEN,
    VOCAB,
    fused_logps,
    make_batch,
    make_config,
    make_model,
    plain_logps,
    with_weight,
)


def _with_forward(change: Callable[[Any, Any, dict[str, Any]], Any]) -> Any:
    """A Llama with a forward of its own; ``change(model, forward, arguments)`` runs the original."""

    class OddForCausalLM(transformers.LlamaForCausalLM):
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **kwargs}
            return change(self, super().forward, arguments)

    return OddForCausalLM(make_config("llama"))


def _changes_logits(new: Callable[[Any, Tensor], Tensor]) -> Any:
    def change(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        output.logits = new(model, output.logits)
        return output

    return _with_forward(change)


class _BetweenForCausalLM(transformers.LlamaForCausalLM):
    """Does ``self.between(hidden)`` before its head."""

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(self.between(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def _between(between: Callable[[Tensor], Tensor], **options: Any) -> Any:
    model = _BetweenForCausalLM(make_config("llama", **options))
    model.between = between
    return model


def _drop_label_shift(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    labels = arguments.pop("labels")
    output = forward(**arguments)
    if labels is not None:
        output.loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    return output


def _drop_loss(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    return forward(**{**arguments, "labels": None})


def _shift_inputs(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    return forward(**{**arguments, "input_ids": arguments["input_ids"].roll(1, dims=1)})


def _make_positions(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    positions = torch.arange(arguments["input_ids"].shape[1])[None]
    return forward(**{**arguments, "position_ids": positions})


def _make_embeddings(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    """As Llama 4 with its vision tower does, around a language model with a head of its own."""
    embeddings = model.get_input_embeddings()(arguments.pop("input_ids"))
    return forward(**{**arguments, "input_ids": None}, inputs_embeds=embeddings)


def _make(**made: Any) -> Any:
    """Hands the backbone what is in no field of its config, or not so."""

    def change(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
        model.config.vision_feature_layer = -1
        return forward(**arguments, **made)

    return _with_forward(change)


def _twice(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
    forward(**arguments)
    return forward(**arguments)


def _mask_a_token(model: Any, logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([7]), torch.finfo(logits.dtype).min)


def _with_head(head: nn.Module) -> Any:
    model = make_model()
    model.set_output_embeddings(head)
    return model


class _NormHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight), self.bias)


def _hooked_head() -> Any:
    model = make_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def _replaced_head_forward() -> Any:
    model = make_model()
    model.lm_head.forward = lambda hidden: hidden
    return model


def _encoder_decoder() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _masked_lm(name: str, **options: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, **options)
    return getattr(transformers, name)(config)


REFUSED = {
    "masked token": (lambda: _changes_logits(_mask_a_token), "logits of its forward are not softcap"),
    "scaled logits": (
        lambda: _changes_logits(lambda m, z: 1.001 * z),
        "logits of its forward are not softcap",
    ),
    "late cap": (lambda: _changes_logits(lambda m, z: 99 * torch.tanh(z / 99)), "logits of its forward"),
    "cut vocabulary": (lambda: _changes_logits(lambda m, z: z[..., :-1]), "logits of its forward"),
    "scaled in training": (
        lambda: _changes_logits(lambda m, z: 2 * z if m.training else z),
        "logits of its forward",
    ),
    "scaled in eval": (
        lambda: _changes_logits(lambda m, z: z if m.training else 2 * z),
        "logits of its forward",
    ),
    "scale in no field": (lambda: _between(lambda h: 0.5 * h), "logits of its forward are not softcap"),
    "norm before head": (
        lambda: _between(lambda h: nn.functional.normalize(h, dim=-1)),
        "changes the hidden states",
    ),
    "dropout before head": (
        lambda: _between(lambda h: nn.functional.dropout(h, 0.5)),
        "changes the hidden states",
    ),
    "last position only": (lambda: _between(lambda h: h[:, -1:]), "all of the backbone's hidden states"),
    "labels not shifted": (lambda: _with_forward(_drop_label_shift), "does not shift labels by one"),
    "no loss": (lambda: _with_forward(_drop_loss), "makes no loss from labels"),
    "inputs changed": (lambda: _with_forward(_shift_inputs), "does not hand `input_ids`"),
    "positions made": (lambda: _with_forward(_make_positions), "makes `position_ids`"),
    "layer made": (lambda: _make(vision_feature_layer=-2), "makes `vision_feature_layer`"),
    "switch made": (lambda: _make(is_causal=False), "makes `is_causal`"),
    "embeddings made": (
        lambda: _with_forward(_make_embeddings),
        "does not hand `input_ids` to the backbone as it came but embeddings",
    ),
    "backbone run twice": (lambda: _with_forward(_twice), "2 calls of what may be its backbone"),
    "norm head": (lambda: _with_head(_NormHead(HIDDEN, VOCAB)), "not a plain nn.Linear"),
    "head of two layers": (
        lambda: _with_head(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB))),
        "not a plain nn.Linear",
    ),
    "hooked head": (_hooked_head, "forward hooks"),
    "replaced head forward": (_replaced_head_forward, "forward of its own"),
    "integer weight": (lambda: with_weight(lambda w: nn.Parameter(w.to(torch.int8), False)), "quantised"),
    "flattened weight": (lambda: with_weight(lambda w: nn.Parameter(w.flatten())), "sharded"),
    "gathered elsewhere": (lambda: with_weight(lambda w: nn.Parameter(torch.empty(0))), "sharded"),
    "encoder-decoder": (_encoder_decoder, "encoder-decoder"),
    "classification": (
        lambda: transformers.LlamaForSequenceClassification(make_config("llama")),
        "no output embeddings",
    ),
    "backbone alone": (lambda: transformers.LlamaModel(make_config("llama")), "no output embeddings"),
    "masked LM": (lambda: _masked_lm("BertForMaskedLM"), "does not generate text"),
    "transform in head": (
        lambda: _masked_lm("BertLMHeadModel", is_decoder=True),
        "changes the hidden states",
    ),
    "no transformers model": (lambda: nn.Linear(3, 4), "wanted a causal language model of transformers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    original = type(model)
    with pytest.raises(ValueError, match=reason):
        patch_model(model)
    assert type(model) is original
    with pytest.raises(ValueError, match=reason):
        LMHead.from_model(model)


def test_scale_before_a_head_with_a_bias_is_refused() -> None:
    model = _between(lambda h: 0.5 * h, tie_word_embeddings=False)
    model.config.logit_scale = 0.5
    assert read_head(model).logit_scale == 0.5
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))
    with pytest.raises(ValueError, match="before a head with a bias"):
        read_head(model)


@pytest.mark.parametrize("value", ["inv_sqrt_d_model", 0.0, True])
def test_scales_that_are_no_number_are_refused(value: Any) -> None:
    model = make_model()
    model.config.logit_scale = value
    with pytest.raises(ValueError, match=r"config\.logit_scale is"):
        read_head(model)


@pytest.mark.parametrize(
    ("family", "config", "applied"),
    [
        ("llama", {"logit_scale": 0.25}, (1.0, None)),
        ("llama", {"final_logit_softcapping": 5.0}, (1.0, None)),
        ("cohere", {"final_logit_softcapping": 5.0}, (0.25, None)),
        ("gemma2", {"logit_scale": 0.25}, (1.0, 5.0)),
        ("cohere2-vl", {}, (1.0, None)),
    ],
)
def test_the_forward_decides_what_of_the_config_is_applied(
    family: str, config: dict[str, Any], applied: tuple[float, float | None]
) -> None:
    """As Cohere 2 Vision leaves out the scale of its language model."""
    model, batch = make_model(family), make_batch()
    model.config.get_text_config().update(config)
    truth = plain_logps(copy.deepcopy(model).double(), batch)
    head = read_head(model)
    assert (head.logit_scale, head.softcap) == applied
    assert_logps_close(fused_logps(patch_model(model), batch), truth, torch.float32)
    model.config.get_text_config().update({"logit_scale": 0.5})
    with pytest.raises(ValueError, match="scale or softcap of the logits changed"):
        fused_logps(model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_models_are_understood(family: str) -> None:
    config = make_config(family)
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[family].model)(config)
    meta, real = examine(model), examine(make_model(family))
    assert meta == real
    wanted = {"input_ids", "attention_mask", "inputs_embeds"}
    if family != "mamba2":
        wanted |= {"position_ids"}
    assert wanted <= real.arguments and real.arguments & {"cache", "past_key_values", "cache_params"}
    assert read_head(model).weight.is_meta


def test_the_backbone_is_the_module_the_forward_calls() -> None:
    assert find_backbone(llama := make_model("llama")) is llama.model
    assert find_backbone(gpt2 := make_model("gpt2")) is gpt2.transformer
    assert find_backbone(opt := make_model("opt")) is opt.model.decoder


def test_a_look_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = make_model("gemma2").train()
    model.model.layers[0].eval()
    model.lm_head._hf_hook = object()
    model.lm_head.forward = own = model.lm_head.forward
    modes = [module.training for module in model.modules()]
    attributes = [{**vars(module)} for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        read_head(model)

    assert modes == [module.training for module in model.modules()]
    assert attributes == [{**vars(module)} for module in model.modules()] and model.lm_head.forward is own
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_importing_lm_head_imports_neither_transformers_nor_peft() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fastdpo.integrations.lm_head as _; print({'transformers', 'peft'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
