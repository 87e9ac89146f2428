"""The doctor at a model, and at a trainer: what it says is what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdpo
from fastdpo import Execution, PreferenceTrainer, linear_logprob, patch_model
from fastdpo.doctor.diagnosis import Diagnosis
from fastdpo.plan.plan import Plan
from fastdpo.plan.schedule import MIB, leading_dim
from tests.integrations.peft_cases import HEAD, quantised, with_lora
from tests.integrations.tiny import HIDDEN, VOCAB, make_model
from tests.training.conftest import (  # noqa: F401  (fixtures)
    make_args,
    make_rows,
    make_tokenizer,
    no_curves,
    tiny_llama,
    tokenizer,
    trained_bpe,
)


def section(diagnosis: Diagnosis, start: str) -> dict[str, str]:
    (found,) = [lines for title, lines in diagnosis.sections.items() if title.startswith(start)]
    return dict(found)


def test_a_model_before_and_after_patching() -> None:
    model = make_model("gemma2")
    lines = section(fastdpo.doctor(model), "Model Gemma2ForCausalLM")
    assert lines["head"] == f"vocabulary {VOCAB}, hidden {HIDDEN}, float32, cpu, tied, trained"
    assert lines["logits"] == "scale 1, softcap 5.0" and lines["bias"] == "none"
    assert "fastdpo.patch_model(model)" in lines["patched"] and "trained in 16 bits" not in lines
    execution = Execution(cache_mib=0)
    patch_model(model, execution=execution)
    after = fastdpo.doctor(model)
    assert section(after, "Model")["patched"] == f"yes, with {execution}"
    assert section(after, "Plan")["mode"] == "recompute"
    assert str(after) == repr(after) and "Plan for 4096 labelled tokens" in str(after)


@pytest.mark.parametrize(
    ("make", "mode", "passes"),
    [
        (lambda: make_model(), "cache", "3.00"),
        (lambda: make_model().requires_grad_(False), "score", "1.00"),
        (lambda: with_lora(make_model()), "stash", "2.00"),
        (lambda: with_lora(make_model(), target_modules=HEAD), "cache", "2.00"),
        (lambda: with_lora(make_model(), modules_to_save=["lm_head"]), "cache", "3.00"),
    ],
)
def test_the_plan_is_that_of_the_call(make: Callable[[], Any], mode: str, passes: str) -> None:
    lines = section(fastdpo.doctor(make()), "Plan for 4096")
    assert lines["mode"] == mode and lines["GEMM passes"].startswith(passes)
    assert lines["backend"] in ("cpu", "reference")


def test_the_memory_is_that_of_the_plan() -> None:
    lines = section(fastdpo.doctor(make_model()), "Plan")
    parts = {name: float(lines[name].split()[0]) for name in ("workspace", "kept", "peak")}
    # D of all tokens, in rows as long as those of logits.
    assert parts["kept"] == pytest.approx(4096 * leading_dim(VOCAB) * 4 / MIB, abs=0.06)
    assert parts["peak"] > parts["workspace"] + parts["kept"]


def test_an_adapter_on_the_head_is_described() -> None:
    model = with_lora(make_model(), target_modules=HEAD, lora_alpha=6, lora_dropout=0.25)
    lines = section(fastdpo.doctor(model), "Model LlamaForCausalLM")
    assert lines["adapter on the head"] == "LoRA of rank 4, scale 1.5"
    assert lines["class"] == "LlamaForCausalLM in a PeftModelForCausalLM"
    lines = section(fastdpo.doctor(model.train()), "Model")
    assert lines["adapter on the head"].endswith("dropout 0.25") and ", frozen" in lines["head"]


def test_what_would_be_refused_says_so() -> None:
    lines = section(fastdpo.doctor(quantised("lm_head")), "Model")
    assert "quantised" in lines["refused"] and "Leave the head out of the quantisation" in lines["refused"]
    bf16 = section(fastdpo.doctor(make_model().bfloat16()), "Model")
    assert "load them as float32" in bf16["trained in 16 bits"]
    model = patch_model(with_lora(make_model(), target_modules=HEAD), execution=Execution(mode="stash"))
    assert "with an adapter on the head" in section(fastdpo.doctor(model), "Plan")["refused"]
    with pytest.raises(TypeError, match="model: got int"):
        fastdpo.doctor(3)


def test_a_preference_trainer(
    make_args: Callable[..., Any],  # noqa: F811
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = PreferenceTrainer(
        tiny_llama(), make_args(), train_dataset=make_rows(12), processing_class=tokenizer
    )
    diagnosis = fastdpo.doctor(trainer)
    data = section(diagnosis, "Data")
    pairs = trainer.train_dataset
    parts = torch.tensor(pairs.sizes(torch.arange(12)))
    longest = int(pairs.lengths.argmax())
    prompt, chosen, rejected = parts[longest].tolist()
    assert (
        data["longest pair"]
        == f"row {longest + 1}: prompt {prompt}, chosen {chosen}, rejected {rejected} tokens"
    )
    tokens = int(parts[:, 1:].sum(1).topk(4).values.sum())
    assert data["largest batch"] == f"4 pairs, at most {tokens} labelled tokens"
    assert section(diagnosis, "Trainer PreferenceTrainer")["reference"] == "copy"
    lines = section(diagnosis, "Plan for the largest batch")
    assert lines["tokens"] == f"{tokens} labelled" and lines["mode"] == "pairs"

    seen: list[Plan] = []
    import fastdpo.ops.library as library

    make_plan = library.make_plan

    def recorded(*arguments: Any, **options: Any) -> Plan:
        seen.append(make_plan(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(library, "make_plan", recorded)
    batch = trainer.data_collator([pairs[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=None)
    assert lines["mode"] in {plan.mode for plan in seen}


@pytest.mark.parametrize(
    ("loss_type", "adapter", "mode", "products"),
    [
        ("tdpo1", False, "cache", "4.00 (forward 2.00, backward 2.00)"),
        ("tdpo2", True, "stash", "4.00 (forward 4.00, backward 0.00)"),
        ("aligndistil", False, "cache", "5.00 (forward 3.00, backward 2.00)"),
        ("aligndistil", True, "stash", "4.00 (forward 4.00, backward 0.00)"),
    ],
)
def test_a_trainer_of_divergences(
    loss_type: str,
    adapter: bool,
    mode: str,
    products: str,
    make_args: Callable[..., Any],  # noqa: F811
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan of its batch is the one that the backward pass of that batch makes."""
    args = make_args(loss_type=loss_type, per_device_train_batch_size=8)
    model = with_lora(tiny_llama()) if adapter else tiny_llama()
    # Wider than the policy's, and padded: what is planned is over the rows that count.
    teacher = tiny_llama(2, vocab_size=384, hidden_size=64) if args.needs_teacher else None
    trainer = PreferenceTrainer(
        model, args, train_dataset=make_rows(8), processing_class=tokenizer, teacher_model=teacher
    )
    diagnosis = fastdpo.doctor(trainer)
    lines = section(diagnosis, "Plan for the largest batch")
    heads = 2 if teacher is None else 3
    assert lines.pop("op") == f"token_divergence, with a product for each of {heads} heads"
    assert ("teacher" in section(diagnosis, "Memory")) == (teacher is not None)
    assert lines.pop("backend") in ("cpu", "reference")  # the latter where nothing is compiled
    assert lines["mode"] == mode and lines["GEMM passes"] == products
    assert section(diagnosis, "Data")["head for it alone"].endswith("at once, gradients included")

    seen: list[Plan] = []
    from fastdpo.ops import divergence_library

    make_plan = divergence_library.divergence_plan

    def recorded(*arguments: Any, **options: Any) -> Plan:
        seen.append(make_plan(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(divergence_library, "divergence_plan", recorded)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=None).backward()
    ran = [line.split("  ", 1) for line in str(seen[-1]).splitlines()]
    assert lines == {name.strip(): finding.strip() for name, finding in ran}


def test_a_trainer_of_divergences_whose_mode_has_none(
    make_args: Callable[..., Any],  # noqa: F811
    tokenizer: Any,  # noqa: F811
) -> None:
    args = make_args(loss_type="tdpo2")
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(8), processing_class=tokenizer)
    args.mode = "lean"
    assert "'lean'" in section(fastdpo.doctor(trainer), "Plan for the largest batch")["refused"]


def test_a_trl_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from tests.integrations import trl_runs

    trainer = trl.DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=trl.DPOConfig(**trl_runs.settings(tmp_path)),
        train_dataset=trl_runs.pairs(),
        processing_class=trl_runs.make_tokenizer(),
    )
    diagnosis = fastdpo.doctor(trainer)
    assert "patch_trl" in section(diagnosis, "Trainer DPOTrainer")
    data = section(diagnosis, "Data")
    rows = trainer.train_dataset
    sizes = sorted(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert data["pairs"] == str(len(rows))
    assert data["largest batch"] == f"4 pairs, at most {sum(sizes[-4:])} labelled tokens"
    assert section(diagnosis, "Plan for the largest batch")["tokens"] == f"{sum(sizes[-4:])} labelled"


def test_a_look_changes_nothing() -> None:
    model = with_lora(make_model(), target_modules=HEAD)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    fastdpo.doctor(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    hidden = torch.randn(3, HIDDEN)
    assert linear_logprob(hidden, fastdpo.LMHead.from_model(model), torch.arange(3)).logps.isfinite().all()
