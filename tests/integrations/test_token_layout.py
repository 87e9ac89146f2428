"""The hook with a token layout: rows of hidden states by number, a row for several tokens, several inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.integrations.backbone_config import backbone_size, layer_configs, spans, why_no_neighbours
from fastdpo.integrations.model import backbone_states, patch_model
from fastdpo.types import TokenLayout
from tests.integrations.tiny import BATCH, HIDDEN, fused, make_config, make_model

STATISTICS = ("lse", "entropy", "mean_logit", "is_top1")
LABELLED = (BATCH.labels[:, 1:] != -100).flatten().nonzero().squeeze(1)


def layout_of_labels() -> TokenLayout:
    """The labels of `BATCH` by name: position t of a row predicts its label t + 1."""
    rows, length = BATCH.labels.shape
    flat = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()[LABELLED]
    return TokenLayout(flat, BATCH.labels[:, 1:].flatten()[LABELLED], flat // length)


def with_layout(model: Any, **arguments: Any) -> Any:
    call = {**BATCH.inputs, "token_layout": layout_of_labels(), "return_logps": True, **arguments}
    return model(**{name: value for name, value in call.items() if value is not None})


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "qwen3-moe"])
def test_it_is_what_labels_give(family: str):
    model = patch_model(make_model(family))
    padded = fused(model, logps_outputs=STATISTICS)
    named = with_layout(model, logps_outputs=STATISTICS)
    mask = BATCH.labels[:, 1:] != -100
    assert named.logps_mask is None
    for name in ("logps", *STATISTICS):
        torch.testing.assert_close(
            getattr(named, name), getattr(padded, name)[:, 1:][mask], rtol=1e-6, atol=1e-6
        )


def gradients(model: Any, logps: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (logps * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_of_a_row_that_predicts_twice_add_up():
    model = patch_model(make_model())
    row = torch.tensor([4])
    once = [
        gradients(model, with_layout(model, token_layout=TokenLayout(row, torch.tensor([t]), row)).logps, g)
        for t, g in ((17, torch.tensor([0.5])), (90, torch.tensor([-2.0])))
    ]
    both = TokenLayout(row.repeat(2), torch.tensor([17, 90]), torch.arange(2))
    twice = gradients(model, with_layout(model, token_layout=both).logps, torch.tensor([0.5, -2.0]))
    for name, gradient in twice.items():
        # Entries are sums of terms as large as the largest entry: some ten roundings of it.
        size = gradient.abs().max().item()
        torch.testing.assert_close(gradient, once[0][name] + once[1][name], rtol=0, atol=1e-6 * size)


def test_several_inputs_count_as_one_after_the_other():
    model = patch_model(make_model())
    whole = with_layout(model)
    rows = [{name: value[i : i + 1] for name, value in BATCH.inputs.items()} for i in range(3)]
    parts = with_layout(model, row_batches=rows, input_ids=None, attention_mask=None)
    torch.testing.assert_close(parts.logps, whole.logps, rtol=1e-5, atol=1e-6)


def test_no_tokens_give_no_logps_and_gradients_of_zero():
    model = patch_model(make_model())
    nothing = TokenLayout(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    logps = with_layout(model, token_layout=nothing).logps
    assert logps.shape == (0,)
    assert not any(g.any() for g in gradients(model, logps, logps.detach()).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": BATCH.labels}, "labels: got a value together with token_layout"),
        ({"token_layout": (1, 2)}, "token_layout: got tuple, wanted a TokenLayout"),
        ({"token_layout": None, "row_batches": [BATCH.inputs]}, "token_layout: got NoneType"),
        ({"row_batches": []}, "row_batches: got an empty list"),
        (
            {"row_batches": [BATCH.inputs]},
            r"row_batches: got a value together with \['attention_mask', 'input_ids'\]",
        ),
        ({"return_logps": False}, "wanted return_logps=True with it"),
    ],
)
def test_what_does_not_go_together(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        with_layout(patch_model(make_model()), **arguments)


def test_the_states_that_the_head_gets():
    model = patch_model(make_model())
    states = backbone_states(model, **BATCH.inputs)
    torch.testing.assert_close(states, model.model(**BATCH.inputs).last_hidden_state, rtol=0, atol=0)
    with pytest.raises(TypeError, match="'nonsense'"):
        backbone_states(model, **BATCH.inputs, nonsense=1)


def test_layers_that_may_look_at_more_than_a_forest():
    for family in ("llama", "gemma3", "gemma4"):
        assert why_no_neighbours(patch_model(make_model(family))) is None
    assert "type hybrid" in str(why_no_neighbours(patch_model(make_model("falcon-h1"))))


def test_windows_of_single_layers():
    """transformers does not let a field be read from a config whose layers have it each."""

    def config(types: list[str], windows: list[int]) -> Any:
        per_layer = {layer: {"sliding_window": window} for layer, window in enumerate(windows)}
        return make_config("cohere2", layer_types=types, sliding_window=9, per_layer_config=per_layer)

    full, sliding = "full_attention", "sliding_attention"
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        assert config([sliding, full], [3, 4]).sliding_window
    assert [layer.sliding_window for layer in layer_configs(config([sliding, full], [3, 4]))] == [3, 4]
    assert spans(config([sliding, full], [3, 40])) >= {3, 40}
    assert 30 in spans(make_config("gpt2", attention_types={"local_window": [30, True]}))


def test_the_size_of_a_backbone():
    model = make_model("llama")
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1)
    assert backbone_size(model) == (2, 2 * layer, HIDDEN)
    assert backbone_size(make_model("llama-tied")) == (2, 2 * layer, HIDDEN)
    # Heads of 8 in one layer and of 16 in the other; one layer of two with attention.
    assert backbone_size(make_model("gemma4"))[2] == 4 * (8 + 16) / 2
    assert backbone_size(make_model("recurrent-gemma"))[2] == 4 * 8 / 2
    # A config may say nothing of its layers, under the names that are usual.
    odd = make_model("llama")
    odd.config.get_text_config = lambda: SimpleNamespace(layer_types=None)
    assert backbone_size(odd) == (1, 2 * layer, HIDDEN)


@pytest.mark.parametrize("way", ["inputs", "row_batches"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [({"use_cache": True}, "use_cache: got True"), ({"attention_mask": torch.ones(1, 9)}, "attention_mask")],
    ids=["cache", "mask"],
)
def test_what_lets_packed_sequences_see_each_other_is_refused(
    extra: dict[str, Any], message: str, way: str
) -> None:
    """Unpatched models take both without a word, and are wrong by nats."""
    model = patch_model(make_model("llama"))
    ids = torch.arange(3, 12)[None]
    call = {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(4)])[None], **extra}
    layout = TokenLayout(torch.tensor([5, 6]), ids[0, 6:8], torch.zeros(2, dtype=torch.long), (2,))
    inputs = call if way == "inputs" else {"row_batches": [call]}
    with pytest.raises(ValueError, match=message):
        model(**inputs, token_layout=layout, return_logps=True)
