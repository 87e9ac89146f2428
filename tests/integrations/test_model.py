"""The hook: what it returns, and that everything else about a model stays as it was."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, LlamaForCausalLM, StaticCache

from fastdpo import Execution
from fastdpo.integrations.model import (
    patch_model,
    require_fused_output,
    unpatch_model,
)
from tests.integrations.tiny import (
    BATCH,
    VOCAB,
    fused,
    fused_logps,
    make_batch,
    make_model,
    plain_logps,
    run_step,
)

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class _VocabularyTensors(TorchDispatchMode):
    """Counts results with V columns outside fastdpo's own ops, whose inside is not seen either."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "fastdpo":
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.count += sum(t.dim() > 1 and t.shape[-1] == VOCAB for t in tensors)
        return result


# What comes back


def test_output_is_aligned_with_labels_and_masked() -> None:
    out = fused(patch_model(make_model()))
    scored = BATCH.labels != -100
    scored[:, 0] = False
    assert out.logps.shape == BATCH.labels.shape and out.logps.dtype == torch.float32
    assert torch.equal(out.logps_mask, scored)
    assert torch.equal(out.logps != 0, scored) and (out.logps[scored] < 0).all()
    assert out.past_key_values is None and out.hidden_states is None and out.entropy is None


def test_statistics_equal_those_of_the_logits() -> None:
    model = make_model()
    with torch.no_grad():
        z = model(**BATCH.inputs).logits.double()[:, :-1]
        out = fused(
            patch_model(model),
            logps_outputs=(
                *("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1"),
                *("topk_mass", "topk_entropy"),
            ),
            logps_topk=3,
        )
    p, targets = z.softmax(-1), BATCH.labels[:, 1:]
    wanted = {
        "lse": z.logsumexp(-1),
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logit": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "topk_mass": p.topk(3).values.sum(-1),
        "topk_entropy": torch.special.entr(p.topk(3).values).sum(-1),
    }
    mask = out.logps_mask[:, 1:]
    for name, values in wanted.items():
        got = out[name]
        assert not got[~out.logps_mask].any(), name
        # 1e-5 nats: fp32 at this width; logits here have a standard deviation of 3.
        assert torch.allclose(got[:, 1:][mask].double(), values[mask].double(), rtol=0, atol=1e-5), name
    assert out.lse.dtype == torch.float32 and out.is_top1.dtype == torch.bool


def test_no_logits_are_made_and_the_head_is_not_called() -> None:
    model, calls = make_model().train(), []
    with _VocabularyTensors() as plain:
        run_step(model, BATCH, plain_logps)
    patch_model(model)
    original = type(model.lm_head).__call__
    with pytest.MonkeyPatch.context() as patch, _VocabularyTensors() as ours:
        patch.setattr(type(model.lm_head), "__call__", lambda m, *a: calls.append(m) or original(m, *a))
        run_step(model, BATCH, fused_logps)
    assert plain.count > 3 and ours.count == 0
    assert model.model.layers[0].mlp.up_proj in calls and model.lm_head not in calls


def test_backbone_results_and_arguments_pass_through() -> None:
    model = make_model()
    own = model(**BATCH.inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    patch_model(model)
    out = fused(model, output_hidden_states=True, output_attentions=True, use_cache=True)
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(out[name], own[name], strict=True))
    assert out.past_key_values.get_seq_length() == BATCH.labels.shape[1]


def test_positional_arguments_mean_what_they_mean_to_the_model() -> None:
    model = patch_model(make_model())
    out = model(BATCH.input_ids, BATCH.attention_mask, labels=BATCH.labels, return_logps=True)
    assert torch.equal(out.logps, fused(model).logps)
    with pytest.raises(TypeError, match="multiple values for .*input_ids"):
        model(BATCH.input_ids, input_ids=BATCH.input_ids, labels=BATCH.labels, return_logps=True)


def test_embeddings_as_input() -> None:
    model = patch_model(make_model())
    out = fused(model, input_ids=None, inputs_embeds=model.model.embed_tokens(BATCH.input_ids))
    assert torch.equal(out.logps, fused(model).logps)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cached_prefix_is_continued(name: str) -> None:
    """By either name: transformers 5.24 calls ``cache`` what was ``past_key_values``."""
    model = patch_model(make_model())
    ids = BATCH.input_ids[:1]
    prefix = model(input_ids=ids[:, :5], labels=ids[:, :5], use_cache=True, return_logps=True)
    assert prefix.past_key_values is prefix.cache
    rest = model(input_ids=ids[:, 5:], labels=ids[:, 5:], **{name: prefix.cache}, return_logps=True).logps
    whole = model(input_ids=ids, labels=ids, return_logps=True).logps
    assert torch.allclose(rest[:, 1:], whole[:, 6:], rtol=0, atol=1e-5)  # fp32 at this width


def test_a_recurrent_state_is_passed_through() -> None:
    """Mamba's is ``cache_params`` before transformers 5.24."""
    assert isinstance(fused(patch_model(make_model("mamba2")), use_cache=True).cache, Cache)


def test_packed_rows_equal_separate_ones() -> None:
    model = patch_model(make_model())
    lengths = [12, 11, 10]
    ids = torch.cat([row[:n] for row, n in zip(BATCH.input_ids, lengths, strict=True)])[None]
    labels = torch.cat([row[:n] for row, n in zip(BATCH.labels, lengths, strict=True)])[None].clone()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels[positions == 0] = -100
    packed = model(input_ids=ids, position_ids=positions, labels=labels, return_logps=True).logps
    separate = fused(model).logps
    expected = torch.cat([row[:n] for row, n in zip(separate, lengths, strict=True)])[None]
    assert torch.allclose(packed, expected, rtol=0, atol=1e-5)  # fp32 at this width


def test_everything_ignored_gives_zeros_and_a_connected_graph() -> None:
    model = patch_model(make_model())
    out = fused(model, labels=torch.full_like(BATCH.labels, -100))
    out.logps.sum().backward()
    assert not out.logps.any() and not out.logps_mask.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_one_position_predicts_nothing() -> None:
    model = patch_model(make_model())
    ids = torch.tensor([[5]])
    out = model(input_ids=ids, labels=ids, return_logps=True)
    assert out.logps.tolist() == [[0.0]] and out.logps_mask.tolist() == [[False]]


def test_options_of_patch_model_reach_the_op() -> None:
    labels = BATCH.labels.masked_fill(BATCH.labels == -100, -7)
    model = patch_model(make_model(), ignore_index=-7, execution=Execution(backend="reference", cache_mib=0))
    expected = fused(patch_model(make_model())).logps
    assert torch.allclose(
        fused(model, labels=labels).logps, expected, rtol=0, atol=1e-5
    )  # fp32 at this width
    rounded = patch_model(make_model(), execution=Execution(compute_dtype=torch.bfloat16))
    assert not torch.allclose(fused(rounded).logps, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="backend"):
        patch_model(make_model(), execution=Execution(backend="gpu"))


def test_autocast_decides_the_dtype_of_the_products_not_of_the_results() -> None:
    model = patch_model(make_model())
    exact = fused(model).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(model)
    assert out.logps.dtype == torch.float32 and not torch.equal(out.logps, exact)
    # bf16 keeps 8 bits; logits reach 10 and pass two layers.
    assert torch.allclose(out.logps, exact, rtol=0, atol=20 * 2**-8)
    out.logps.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    batch = make_batch()

    def products_with_the_vocabulary(model: Any) -> int:
        with torch.profiler.profile(record_shapes=True) as profile:
            run_step(model, batch, fused_logps)
        shapes = [
            event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::addmm")
        ]
        return sum(any(VOCAB in shape for shape in shapes_of_one) for shapes_of_one in shapes)

    trained, frozen = patch_model(make_model()), patch_model(make_model())
    frozen.lm_head.requires_grad_(False)
    assert products_with_the_vocabulary(trained) == 3 and products_with_the_vocabulary(frozen) == 2
    assert frozen.lm_head.weight.grad is None


# Every other call


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("is_training", [True, False])
def test_other_calls_are_the_same_to_the_bit(family: str, is_training: bool) -> None:
    model = make_model(family).train(is_training)
    patched = patch_model(copy.deepcopy(model), logits="real")
    for arguments in ({}, {"labels": BATCH.labels}, {"labels": BATCH.labels, "num_items_in_batch": 7}):
        own, ours = model(**BATCH.inputs, **arguments), patched(**BATCH.inputs, **arguments)
        assert type(ours) is type(own) and ours.keys() == own.keys()
        assert torch.equal(ours.logits, own.logits)
        assert "loss" not in own or torch.equal(ours.loss, own.loss)
    as_tuple = patched(**BATCH.inputs, return_dict=False)
    assert torch.equal(as_tuple[0], model(**BATCH.inputs, return_dict=False)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 2},
        {"do_sample": False, "cache_implementation": "static"},
    ],
)
def test_generate_is_the_same(arguments: dict[str, Any]) -> None:
    model = make_model("gemma2")
    patched = patch_model(copy.deepcopy(model))
    texts = []
    for each in (model, patched):
        torch.manual_seed(0)
        texts.append(each.generate(BATCH.input_ids[:2, :6], max_new_tokens=6, **arguments))
    assert torch.equal(*texts)
    for each in (model, patched):
        with pytest.raises(ValueError, match="not used by the model"):
            each.generate(BATCH.input_ids, max_new_tokens=2, no_such_option=1)


def test_a_static_cache_fills_as_it_did() -> None:
    model = make_model()
    patched = patch_model(copy.deepcopy(model))
    caches = []
    with torch.no_grad():
        for each in (model, patched):
            cache = StaticCache(config=each.config, max_cache_len=16)
            outputs = [
                each(BATCH.input_ids[:1, :8], **{CACHE: cache}),
                each(BATCH.input_ids[:1, 8:9], **{CACHE: cache}),
            ]
            caches.append((cache, outputs))
        patched(**BATCH.inputs, labels=BATCH.labels, return_logps=True)  # no cache asked for: none touched
    (cache, outputs), (other, theirs) = caches
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(outputs, theirs, strict=True))
    for ours, own in zip(other.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, own.keys) and torch.equal(ours.values, own.values)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": None}, ValueError, "labels: got NoneType"),
        ({"labels": [[1, 2]]}, ValueError, "labels: got list"),
        ({"labels": BATCH.labels[:, 1:]}, ValueError, r"labels: got shape \(3, 11\), wanted \(3, 12\)"),
        ({"labels": BATCH.labels.float()}, ValueError, "labels: got torch.float32"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep: got int"),
        ({"logits_to_keep": torch.tensor([1])}, ValueError, "logits_to_keep: got Tensor"),
        ({"num_items_in_batch": 4}, ValueError, "num_items_in_batch"),
        ({"shift_labels": BATCH.labels[:, 1:]}, ValueError, "shift_labels: got shape"),
        ({"return_dict": False}, ValueError, "return_dict"),
        ({"logps_outputs": "entropy"}, ValueError, "outputs: got 'entropy'"),
        ({"logps_outputs": ("entrophy",)}, ValueError, "outputs: got 'entrophy'"),
        ({"logps_outputs": ("lse",), "logps_topk": 3}, ValueError, "topk: got 3, wanted None"),
        ({"logps_outputs": ("topk_mass",), "logps_topk": 0}, ValueError, "topk: got 0"),
        ({"logps_outputs": ("forward_kl",)}, ValueError, "outputs: got 'forward_kl'"),
        ({"return_logps": False, "logps_topk": 3}, ValueError, "logps_topk.*wanted return_logps=True"),
        ({"logps_output": ("entropy",)}, TypeError, "logps_output.*not supported with return_logps"),
        ({"return_logps": False, "logps_outputs": ("lse",)}, ValueError, "wanted return_logps=True"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = patch_model(make_model())
    with pytest.raises(error, match=message):
        model(**{**BATCH.inputs, "labels": BATCH.labels, "return_logps": True, **arguments})


def test_what_is_no_model_raises() -> None:
    with pytest.raises(TypeError, match="model: got str"):
        patch_model("meta-llama/Llama-3.1-8B")  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore_index", [True, None, -100.0])
def test_bad_ignore_index_raises(ignore_index: Any) -> None:
    with pytest.raises(TypeError, match="ignore_index"):
        patch_model(make_model(), ignore_index=ignore_index)


def test_a_config_changed_after_patching_is_noticed() -> None:
    model = patch_model(make_model("gemma2"))
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="changed; unpatch_model and patch_model again"):
        fused(model)
    uncapped = fused(patch_model(unpatch_model(model))).logps
    assert torch.allclose(uncapped, plain_logps(model, BATCH), rtol=0, atol=1e-5)  # fp32 at this width


def test_an_unpatched_model_ignores_return_logps_and_the_check_says_so() -> None:
    output = make_model()(**BATCH.inputs, labels=BATCH.labels, return_logps=True)
    with pytest.raises(TypeError, match="got CausalLMOutputWithPast, wanted FusedLMOutput.*patch_model"):
        require_fused_output(output)
