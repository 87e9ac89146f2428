"""The patched class: what looks at a model's class, copies it or saves it finds what it found before."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastdpo import Execution
from fastdpo.integrations.model import is_patched, patch_model, unpatch_model
from tests.integrations.tiny import BATCH, fused, make_config, make_model


class _Outer:
    class OwnForCausalLM(transformers.LlamaForCausalLM):
        """A class of one's own, with a qualified name and a docstring."""


@pytest.mark.parametrize("original", [transformers.LlamaForCausalLM, _Outer.OwnForCausalLM])
def test_the_class_looks_like_the_original(original: Any) -> None:
    model, twin = original(make_config()), original(make_config())
    assert patch_model(model) is model
    patched = type(model)
    assert patched is not original and isinstance(model, original) and patched.__mro__[1] is original
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "config_class", "base_model_prefix"):
        assert getattr(patched, name) == getattr(original, name)
    assert inspect.signature(patched.forward) == inspect.signature(original.forward)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    assert patched.forward.__qualname__ == original.forward.__qualname__
    assert model.can_generate() and not hasattr(patched.forward, "__wrapped__") and repr(model) == repr(twin)
    assert transformers.utils.generic.find_labels(patched) == transformers.utils.generic.find_labels(original)
    assert type(pickle.loads(pickle.dumps(model))) is patched


def test_trainer_finds_the_columns_and_labels_it_found_before(tmp_path: Path) -> None:
    found = []
    for model in (make_model(), patch_model(make_model())):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        trainer = transformers.Trainer(model=model, args=arguments)
        trainer._set_signature_columns_if_needed()
        found.append((trainer._signature_columns, trainer.label_names, trainer.model_accepts_loss_kwargs))
    assert found[0] == found[1] and "labels" in found[0][0]


def test_unpatching_restores_the_class() -> None:
    model = make_model()
    original, attributes = type(model), set(vars(model))
    patch_model(model)
    assert is_patched(model) and set(vars(model)) == attributes
    assert unpatch_model(model) is model
    assert type(model) is original and set(vars(model)) == attributes and not is_patched(model)
    assert unpatch_model(model) is model


def test_patching_twice_changes_nothing_or_raises() -> None:
    model = patch_model(make_model())
    patched = type(model)
    assert type(patch_model(model)) is patched
    with pytest.raises(ValueError, match="patched with other options"):
        patch_model(model, ignore_index=0)
    assert type(patch_model(make_model())) is patched


def test_a_model_is_freed() -> None:
    model = patch_model(make_model())
    fused(model).logps.sum().backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def _train_one_step(model: Any) -> None:
    fused(model).logps.sum().neg().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def test_deepcopy_has_weights_of_its_own() -> None:
    model = patch_model(make_model())
    before = fused(model).logps.detach()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    _train_one_step(twin)
    assert torch.equal(fused(model).logps, before)
    assert not torch.equal(fused(twin).logps, before)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_models_are_patched(how: str) -> None:
    model = patch_model(make_model("gemma2"), ignore_index=-100, execution=Execution(cache_mib=3))
    file = io.BytesIO()
    if how == "pickle":
        pickle.dump(model, file)
    else:
        torch.save(model, file)
    file.seek(0)
    twin = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert type(twin) is type(model) and type(twin)._fastdpo_hook.execution.cache_mib == 3
    assert torch.equal(fused(twin).logps, fused(model).logps)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_saved_models_load_as_the_original_class(tmp_path: Path) -> None:
    model = patch_model(make_model())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded(**BATCH.inputs).logits, model(**BATCH.inputs).logits)
    assert torch.equal(fused(patch_model(loaded)).logps, fused(model).logps)
