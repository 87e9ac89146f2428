"""Lazy logits among what stands around a model: casts, wrappers, evaluation, generation, compiled code."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdpo import Execution, patch_model, unpatch_model
from fastdpo.integrations.lazy import LazyLogits, MadeLogits
from fastdpo.integrations.model import is_patched
from fastdpo.testing import assert_close_to_fp64
from tests.integrations.lazy_losses import (
    LARGE,
    assert_like_real,
    dpo_repository,
    largest_logit,
    lazy_model,
    run_loss,
    selective_by_rows,
    shifted_cross_entropy,
)
from tests.integrations.peft_cases import HEAD, with_lora
from tests.integrations.tiny import make_model

PROMPT = {name: value[:2, :6] for name, value in LARGE.inputs.items()}


# Casts


def under_autocast(model: Any) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs)

    return call


def converted(model: Any) -> Callable[..., Any]:
    """As accelerate's mixed precision: autocast inside, outputs in fp32."""
    convert = pytest.importorskip("accelerate.utils.operations").convert_to_fp32
    return lambda **inputs: convert(under_autocast(model)(**inputs))


@pytest.mark.parametrize("around", [under_autocast, converted], ids=lambda around: around.__name__)
@pytest.mark.parametrize("loss", [dpo_repository, selective_by_rows], ids=lambda loss: loss.__name__)
def test_mixed_precision_is_that_of_the_call(loss: Any, around: Any) -> None:
    """The loss outside autocast; the dtype as of real logits, the values closer to the truth."""
    model = make_model().train()
    patched = lazy_model(model)
    logits, real = around(patched)(**LARGE.inputs).logits, around(model)(**LARGE.inputs).logits
    assert isinstance(logits, LazyLogits) and logits.dtype == real.dtype
    ours, eager = run_loss(patched, loss, call=around(patched)), run_loss(model, loss, call=around(model))
    # fp32 logits of the same bf16 states: what bf16 rounds of the backbone is the same for both.
    states = under_autocast(model.model)(**LARGE.inputs).last_hidden_state.detach()
    exact = F.linear(states.bfloat16().double(), model.lm_head.weight.bfloat16().double())
    truth = loss(exact, LARGE.labels)
    if logits.dtype == torch.float32:
        assert torch.allclose(ours.value.double(), truth, rtol=0, atol=1e-3)
    assert (ours.value.double() - truth).abs().max() <= (eager.value.double() - truth).abs().max() + 0.26
    gradient, own = ours.grads["lm_head.weight"], eager.grads["lm_head.weight"]
    assert gradient.dtype == torch.float32 and (gradient - own).norm() < 0.02 * own.norm()


def test_a_16_bit_model_keeps_its_dtype() -> None:
    model = make_model().train().bfloat16()
    ours, real = run_loss(lazy_model(model), dpo_repository), run_loss(model, dpo_repository)
    truth = run_loss(copy.deepcopy(model).double(), dpo_repository)
    assert ours.value.dtype == real.value.dtype == torch.bfloat16
    for name in ("lm_head.weight", "model.norm.weight"):
        assert_close_to_fp64(ours.grads[name], truth.grads[name], real.grads[name], name=name)


def test_evaluation_inside_autocast_is_that_of_a_call_outside() -> None:
    patched = lazy_model(make_model().train())
    logits = patched(**LARGE.inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = shifted_cross_entropy(logits, LARGE.labels)
    assert torch.equal(inside, shifted_cross_entropy(patched(**LARGE.inputs).logits, LARGE.labels))


# Adapters, checkpoints, wrappers


ADAPTED: dict[str, Callable[[], Any]] = {
    "backbone": lambda: with_lora(make_model()),
    "head": lambda: with_lora(make_model(), target_modules=HEAD),
    "copy of the head": lambda: with_lora(make_model(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_peft(kind: str) -> None:
    model = ADAPTED[kind]().train()
    for loss in (dpo_repository, largest_logit) if kind != "head" else (dpo_repository,):
        truth = run_loss(copy.deepcopy(model).double(), loss)
        assert_like_real(run_loss(lazy_model(model), loss), run_loss(model, loss), truth)
    odd = lazy_model(model, on_materialize="warn")
    with pytest.warns(UserWarning, match="square"):
        assert torch.allclose(
            odd(**LARGE.inputs).logits.square(), model(**LARGE.inputs).logits.square(), atol=1e-4
        )


def test_dropout_on_the_heads_adapter_has_real_logits() -> None:
    model = with_lora(make_model(), target_modules=HEAD, lora_dropout=0.1).train()
    assert type(lazy_model(model)(**LARGE.inputs).logits) is Tensor
    assert isinstance(lazy_model(model.eval())(**LARGE.inputs).logits, LazyLogits)


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing() -> None:
    model = make_model().train()
    truth, real = run_loss(copy.deepcopy(model).double(), dpo_repository), run_loss(model, dpo_repository)
    model.gradient_checkpointing_enable()
    assert_like_real(run_loss(lazy_model(model), dpo_repository), real, truth)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Converted(nn.Module):
    """What a mixed-precision engine leaves inside DDP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return converted(self.model)(**inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("has_cast", [False, True])
def test_ddp_sees_which_parameters_are_used(one_process: None, options: Any, has_cast: bool) -> None:
    """One that is not used too: DDP looks for it from what the forward returned."""
    model = make_model().train()
    model.unused = nn.Linear(3, 3)
    patched = lazy_model(model)
    if not options:
        del model.unused, patched.unused
    around = [DistributedDataParallel(Converted(m) if has_cast else m, **options) for m in (model, patched)]
    for _ in range(3):
        real, ours = (run_loss(wrapped, dpo_repository) for wrapped in around)
        assert torch.allclose(ours.value, real.value, atol=0.1 if has_cast else 1e-3)
        used = {name for name, grad in real.grads.items() if grad.any()}
        assert used == {name for name, grad in ours.grads.items() if grad.any()} and len(used) > 10
        for name in used:
            assert (ours.grads[name] - real.grads[name]).norm() < 0.03 * real.grads[name].norm(), name


@pytest.mark.parametrize("has_cast", [False, True])
def test_ddp_with_a_static_graph_is_refused(one_process: None, has_cast: bool) -> None:
    """Its first step is added up over ranks by a function around the outputs, which lazy ones go past."""
    model = lazy_model(make_model().train())
    wrapped = DistributedDataParallel(Converted(model) if has_cast else model, static_graph=True)
    with pytest.raises(RuntimeError, match="static_graph=False, or logits='real'"):
        wrapped(**LARGE.inputs)


# Evaluation, generation, compiled code


def test_generation_and_evaluation_without_labels_have_real_logits() -> None:
    model = make_model()
    patched = lazy_model(model)
    for options in ({}, {"use_cache": False}, {"do_sample": True, "num_beams": 2}):
        found = []
        for each in (model, patched):
            torch.manual_seed(0)
            found.append(each.generate(**PROMPT, max_new_tokens=5, **{"do_sample": False, **options}))
        assert torch.equal(*found)
    assert type(patched(**PROMPT, logits_to_keep=1).logits) is Tensor
    cached = patched(**PROMPT, use_cache=True)
    assert type(cached.logits) is Tensor
    assert type(patched(input_ids=PROMPT["input_ids"][:, :1], past_key_values=cached.cache).logits) is Tensor
    gathered = []
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            gathered.append(patched(**LARGE.inputs).logits)
            assert type(gathered[-1]) is Tensor and torch.equal(gathered[-1], model(**LARGE.inputs).logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_evaluation_with_labels_and_a_reference(context: Any) -> None:
    model = make_model()
    patched = lazy_model(model)
    with context():
        output, real = (each(**LARGE.inputs, labels=LARGE.labels) for each in (patched, model))
        assert isinstance(output.logits, LazyLogits) and torch.allclose(output.loss, real.loss, atol=1e-5)
        assert not output.loss.requires_grad
        with pytest.raises(MadeLogits, match="numpy"):
            output.logits.numpy()
        hook = lazy_model(model, on_materialize="warn")
        with pytest.warns(UserWarning, match="numpy"):
            values = hook(**LARGE.inputs, labels=LARGE.labels).logits.detach().cpu().float().numpy()
        assert np.array_equal(values, real.logits.numpy())
        reference = lazy_model(model, logits="always_lazy")
        logits = reference(**LARGE.inputs).logits
        assert isinstance(logits, LazyLogits)
        wanted = dpo_repository(real.logits, LARGE.labels)
        assert torch.allclose(dpo_repository(logits, LARGE.labels), wanted, atol=1e-4)
        assert type(reference(**PROMPT, logits_to_keep=1).logits) is Tensor


def test_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone is one graph, which other batches of the shape take too; lazy logits stand outside."""
    model = make_model().train()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    lazy = lazy_model(model)
    compiled = torch.compile(lazy, backend=backend)
    for shift in range(3):
        ids = (LARGE.inputs["input_ids"] + shift) % 90 + 3
        inputs = {**LARGE.inputs, "input_ids": ids}
        found = []
        for called in (compiled, model):
            called.zero_grad()
            logits = called(**inputs, use_cache=False).logits
            assert (type(logits) is Tensor) == (called is model)
            logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            logps.sum().backward()
            grads = [p.grad for p in called.parameters()]
            found.append([logps.detach(), *(g for g in grads if g is not None)])
        assert len(found[0]) == len(found[1])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="logits='real'"):
        torch.compile(lazy, backend=backend, fullgraph=True)(**LARGE.inputs, use_cache=False)


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = {**LARGE.inputs, "labels": LARGE.labels}
        return {name: value[place % 4] for name, value in row.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_of_transformers(tmp_path: Any, smoothing: float) -> None:
    """As it is: its loss fused in training, its logits real where it collects them in evaluation."""
    transformers = pytest.importorskip("transformers")
    found = []
    for options in ({"logits": "real"}, {"logits": "lazy", "on_materialize": "error"}, {"logits": "lazy"}):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
            },
            **{"learning_rate": 1e-3, "use_cpu": True, "report_to": [], "save_strategy": "no"},
            **{"disable_tqdm": True, "label_smoothing_factor": smoothing, "per_device_eval_batch_size": 4},
        )
        model = patch_model(make_model(), **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=_Rows(), eval_dataset=_Rows())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        predicted = None if "on_materialize" in options else trainer.predict(_Rows()).predictions
        found.append((losses, trainer.evaluate()["eval_loss"], predicted))
    for losses, eval_loss, predicted in found[1:]:
        assert np.allclose(losses, found[0][0], rtol=1e-4) and abs(eval_loss - found[0][1]) < 1e-3
        if predicted is not None:
            assert type(predicted) is np.ndarray and np.allclose(predicted, found[0][2], atol=1e-2)


# The model itself


def test_patching_with_other_options_and_copies_of_the_model() -> None:
    model = patch_model(make_model().train(), logits="lazy")
    assert patch_model(model, logits="lazy") is model
    with pytest.raises(ValueError, match="other options"):
        patch_model(model)
    with pytest.raises(ValueError, match="other options"):
        patch_model(model, logits="lazy", on_materialize="error")
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_patched(each) and isinstance(each(**LARGE.inputs).logits, LazyLogits)
    unpatch_model(model)
    assert type(model(**LARGE.inputs).logits) is Tensor
    plain = patch_model(model, logits="real")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(plain(**LARGE.inputs).logits) is Tensor


def test_what_else_a_patched_model_does_stays() -> None:
    model = make_model().train()
    lazy, plain = lazy_model(model), patch_model(copy.deepcopy(model))
    given = {**LARGE.inputs, "labels": LARGE.labels}
    assert torch.equal(lazy(**given, return_logps=True).logps, plain(**given, return_logps=True).logps)
    assert torch.equal(
        lazy(**LARGE.inputs, return_states=True).hidden, plain(**LARGE.inputs, return_states=True).hidden
    )
    pairs = {"ref_logps": torch.zeros(4)}
    losses = [m(**given, return_logps=True, pair_loss=pairs).loss for m in (lazy, plain)]
    assert torch.equal(*losses)
    as_tuple = lazy(**given, return_dict=False)
    assert torch.allclose(as_tuple[0], model(**given).loss) and isinstance(as_tuple[1], LazyLogits)
    hidden = lazy(**LARGE.inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and type(hidden[-1]) is Tensor


@pytest.mark.parametrize("mode", ["cache", "recompute", "pairs"])
def test_execution_is_the_hooks(mode: str) -> None:
    model = make_model().train()
    patched = lazy_model(model, execution=Execution(mode=mode, workspace_mib=1))
    truth = run_loss(copy.deepcopy(model).double(), dpo_repository)
    assert_like_real(run_loss(patched, dpo_repository), run_loss(model, dpo_repository), truth)
