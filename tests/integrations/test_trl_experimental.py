"""TRL's CPO/SimPO, ORPO and TPO trainers with the patch and without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from transformers import T5Config, T5ForConditionalGeneration
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from fastdpo import Execution, patch_model, patch_trl
from fastdpo.integrations.model import is_patched
from tests.integrations import trl_runs as runs
from tests.integrations.test_wrappers import _process_group as process_group
from tests.integrations.tiny import VOCAB
from tests.ops.test_memory import largest_allocation

TRAINERS = {
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "tpo": (TPOTrainer, TPOConfig),
}


def make_trainer(kind: str, folder: Path, *, model: Any = None, family: str = "llama", **changes: Any) -> Any:
    trainer, config = TRAINERS[kind]
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    if kind != "tpo":
        changes = {"max_length": 32, **changes}
    args = config(**runs.settings(folder, **changes))
    return trainer(
        model=model or runs.policy(family),
        args=args,
        train_dataset=runs.pairs(with_reference=kind == "tpo"),
        processing_class=runs.make_tokenizer(),
        **keywords,
    )


def compare(kind: str, folder: Path, *, model: Callable[[], Any] | None = None, **changes: Any) -> Any:
    ours, theirs = runs.side_by_side(
        lambda: make_trainer(kind, folder, model=model and model(), **changes), patch_trl
    )
    runs.assert_alike(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "cpo_alpha": 0.0},
        {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 1.0},
        {"loss_type": "alphapo", "alpha": 0.3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_cpo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare("cpo", tmp_path, **changes)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.5}, {"gradient_checkpointing": True}], ids=str)
def test_orpo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare("orpo", tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1, "tpo_alpha": 0.5},
        {"tpo_alpha": 0.0},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "tpo-l", "tpo_l_gamma": 1.0},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=str,
)
def test_tpo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare("tpo", tmp_path, **changes)


# A head goes the same way in all three, so each trainer has two of the four.
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("cpo", "gemma2"), ("cpo", "phi")),
        *(("orpo", "cohere"), ("orpo", "llama-tied")),
        *(("tpo", "gemma2"), ("tpo", "phi")),
    ],
)
def test_softcap_scale_bias_and_tied_heads(kind: str, family: str, tmp_path: Path) -> None:
    compare(kind, tmp_path, family=family)


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_the_auxiliary_loss_of_a_mixture_of_experts(kind: str, tmp_path: Path) -> None:
    def model() -> Any:
        return runs.policy("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)

    ours, _ = compare(kind, tmp_path, model=model)
    without, _ = compare(kind, tmp_path, family="mixtral")
    assert abs(ours.losses[0] - without.losses[0]) > 0.1


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_evaluation(kind: str, tmp_path: Path) -> None:
    rows = runs.pairs(seed=3, with_reference=kind == "tpo")
    ours, _ = compare(kind, tmp_path, eval_dataset=rows)
    assert any("eval_rewards/margins" in entry for entry in ours.logs)


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_adapters(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, _ = compare(kind, tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM"))
    assert all("lora" in name for name in ours.grads)


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_mixed_precision_runs_and_is_put_back(kind: str, tmp_path: Path) -> None:
    """accelerate's wrapper around the forward steps aside for the call; autocast is on all the same."""
    exact = runs.record(make_trainer(kind, tmp_path, max_steps=1))
    with patch_trl():
        trainer = make_trainer(kind, tmp_path, max_steps=1, bf16=True)
        ours = runs.record(trainer)
        wrapper = vars(trainer.model)["forward"]
        assert "_original_forward" in vars(trainer.model) and wrapper is trainer.model.forward
    # bf16 through two layers moves a loss by about 1%, and by more than fp32's rounding.
    assert 1e-5 < abs(ours.losses[0] - exact.losses[0]) < 0.05 * max(1.0, abs(exact.losses[0]))
    assert trainer.model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32


def step(trainer: Any, wrapped: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = trainer.compute_loss(wrapped, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    "wrapper", ["DDP", "compiled, run eagerly", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", list(TRAINERS))
def test_inside_a_wrapper(kind: str, wrapper: str, tmp_path: Path) -> None:
    """The model that calls go through is DDP's or torch.compile's; what is inside is patched for the call."""
    torch.manual_seed(0)
    expected_loss, expected = step(trainer := make_trainer(kind, tmp_path), trainer.model)

    def check(wrap: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        trainer = make_trainer(kind, tmp_path)
        wrapped = wrap(trainer.model)
        with patch_trl():
            loss, grads = step(trainer, wrapped)
        assert not is_patched(trainer.model)
        runs.assert_number(loss, expected_loss, "loss")
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            runs.assert_gradient(grads[name], grad, name)

    if wrapper == "DDP":
        with process_group(str(tmp_path / "store")):
            check(torch.nn.parallel.DistributedDataParallel)
        return
    try:
        with torch.compiler.set_stance("force_eager" if "eager" in wrapper else "default"):
            check(lambda model: torch.compile(model, backend="aot_eager"))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_no_logits_of_the_batch(kind: str, tmp_path: Path) -> None:
    """Nothing is larger than the workspace; the trainers' own code makes all of the logits."""
    vocab = 4096

    def largest() -> tuple[int, int]:
        model = runs.policy(vocab_size=vocab)
        trainer = make_trainer(kind, tmp_path, model=model, per_device_train_batch_size=8)
        inputs = next(iter(trainer.get_train_dataloader()))
        rows, length = inputs["input_ids" if kind == "tpo" else "chosen_input_ids"].shape
        found = largest_allocation(lambda: trainer.compute_loss(model, inputs).backward())
        assert not is_patched(model)
        return found, rows * length * vocab * 4

    with patch_trl(execution=Execution(workspace_mib=1, cache_mib=0)):
        ours, logits = largest()
    theirs, _ = largest()
    assert ours <= 2**20 < logits <= theirs


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_nothing_is_left_on_the_model(kind: str, tmp_path: Path) -> None:
    with patch_trl():
        trainer = make_trainer(kind, tmp_path, max_steps=1)
        model = trainer.model
        before, names = type(model), set(vars(model))
        runs.record(trainer)
        assert type(model) is before and set(vars(model)) - names <= {"_is_accelerate_prepared"}


def test_nothing_is_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with patch_trl():
        trainer = make_trainer("cpo", tmp_path, max_steps=1)
        before = type(trainer.model)

        def fails(*args: Any, **kwargs: Any) -> None:
            raise KeyError("in the backbone")

        monkeypatch.setattr(trainer.model.model, "forward", fails)
        batch = next(iter(trainer.get_train_dataloader()))
        with pytest.raises((KeyError, ValueError)):
            trainer.compute_loss(trainer.model, batch)
        assert type(trainer.model) is before


def test_a_model_that_is_patched_already_stays_so(tmp_path: Path) -> None:
    theirs = runs.record(make_trainer("cpo", tmp_path))
    with patch_trl():
        trainer = make_trainer("cpo", tmp_path, model=patch_model(runs.policy()))
        ours = runs.record(trainer)
    assert is_patched(trainer.model)
    runs.assert_alike(ours, theirs)


def test_who_asks_tpo_for_outputs_gets_the_logits(tmp_path: Path) -> None:
    found = []
    for patched in (False, True):
        trainer = make_trainer("tpo", tmp_path)
        inputs = next(iter(trainer.get_train_dataloader()))
        if patched:
            with patch_trl():
                found.append(trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False))
        else:
            found.append(trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False))
    (their_loss, their_logits, _), (our_loss, our_logits, _) = found
    runs.assert_number(our_loss.item(), their_loss.item(), "loss")
    assert torch.equal(our_logits, their_logits)


def encoder_decoder() -> Any:
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).train()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "runs its own code" in r.getMessage()]


def assert_own(ours: runs.Run, theirs: runs.Run) -> None:
    """To the bit, metrics included."""
    assert ours.losses == theirs.losses and len(ours.losses) > 1
    assert all(torch.equal(ours.grads[name], grad) for name, grad in theirs.grads.items())


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_encoder_decoders(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whose decoders have heads like others."""

    def make() -> Any:
        trainer = make_trainer(kind, tmp_path, model=encoder_decoder())
        assert trainer.is_encoder_decoder
        return trainer

    runs.assert_alike(*runs.side_by_side(make, patch_trl))
    assert not said(caplog)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_head_that_is_not_understood_goes_on_in_trl_s_own_way(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Any:
        trainer = make_trainer(kind, tmp_path)
        trainer.model.lm_head.register_forward_hook(lambda *_: None)
        return trainer

    assert_own(*runs.side_by_side(make, patch_trl))
    (line,) = said(caplog)
    assert "forward hooks" in line
