"""The reference: a copy, the policy without its adapter, or the cache; the same numbers from each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from fastdpo.training.batches.forward import sequence_logps
from fastdpo.training.data.row import REF_COLUMNS
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference import precompute
from fastdpo.training.reference.cache import ReferenceCache, cache_key, fingerprint_model
from fastdpo.training.reference.scoring import score_dataset
from fastdpo.training.reference.sources import Reference, is_fresh_adapter
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes})


def trained_adapter() -> Any:
    """A LoRA model whose adapter is no longer what it starts as."""
    model = get_peft_model(tiny_llama(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("use_lora", [False, True])
def test_every_kind_of_reference_trains_alike(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, use_lora: bool
):
    logs = {}
    for kind in ("copy", "precomputed", *(["adapter"] if use_lora else [])):
        args = make_args(
            output_dir=str(tmp_path / kind),
            reference=kind,
            eval_strategy="steps",
            eval_steps=4,
            per_device_eval_batch_size=3,
        )
        trainer = PreferenceTrainer(
            tiny_llama(),
            args,
            train_dataset=make_rows(12),
            eval_dataset=make_rows(5, 2),
            processing_class=tokenizer,
            peft_config=lora(lora_dropout=0.2) if use_lora else None,
        )
        assert trainer.reference.kind == kind
        torch.manual_seed(1)  # of the adapter's dropout
        trainer.train()
        logs[kind] = read_metrics(args.output_dir)
    for kind in logs:
        for ours, wanted in zip(logs[kind], logs["copy"], strict=True):
            assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-5), kind


def test_what_auto_chooses(make_args: MakeArgs, tokenizer: Any):
    def kind(model: Any, rows: Any = None, **settings: Any) -> str:
        extra = {name: settings.pop(name) for name in ("ref_model", "peft_config") if name in settings}
        trainer = PreferenceTrainer(
            model, make_args(**settings), train_dataset=rows, processing_class=tokenizer, **extra
        )
        return str(trainer.reference.kind)

    scored = [{**row, **dict.fromkeys(REF_COLUMNS, -1.0)} for row in make_rows(2)]
    assert kind(tiny_llama()) == "copy"
    assert kind(tiny_llama(), peft_config=lora()) == "adapter"
    assert kind(trained_adapter()) == "precomputed"
    # Of which tokens they are is not said: nobody takes them for what they may not be.
    with pytest.raises(ValueError, match=r"do not say of which tokens \(no column 'ref_of'\).*'precomputed'"):
        kind(tiny_llama(), scored)
    assert kind(tiny_llama(), scored, reference="precomputed") == "precomputed"
    assert kind(tiny_llama(), scored, ref_model=tiny_llama(1)) == "copy"
    assert kind(tiny_llama(), ref_model=tiny_llama(1)) == "copy"
    assert kind(tiny_llama(), loss_type="simpo") == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "none"}, "sigmoid needs one"),
        ({"reference": "adapter"}, "has no adapter"),
        ({"reference": "copy", "loss_type": "simpo"}, "simpo uses no reference"),
        ({"ref_model": True, "loss_type": "simpo"}, "simpo uses no reference"),
        ({"ref_model": True, "reference": "adapter"}, "and a ref_model"),
    ],
)
def test_losses_and_references_that_do_not_go_together(
    make_args: MakeArgs, tokenizer: Any, settings: dict[str, Any], message: str
):
    ref_model = tiny_llama() if settings.pop("ref_model", False) else None
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(
            tiny_llama(), make_args(**settings), processing_class=tokenizer, ref_model=ref_model
        )


def test_the_reference_is_not_the_model_itself(make_args: MakeArgs, tokenizer: Any):
    model = tiny_llama()
    with pytest.raises(ValueError, match="ref_model: got the model that is trained"):
        PreferenceTrainer(model, make_args(), processing_class=tokenizer, ref_model=model)


def test_adapters_that_cannot_be_trained(make_args: MakeArgs, tokenizer: Any):
    with pytest.raises(ValueError, match="has an adapter already"):
        PreferenceTrainer(trained_adapter(), make_args(), processing_class=tokenizer, peft_config=lora())


def test_what_counts_as_a_fresh_adapter():
    assert is_fresh_adapter(get_peft_model(tiny_llama(), lora()))
    assert is_fresh_adapter(get_peft_model(tiny_llama(), lora(target_modules=["embed_tokens", "q_proj"])))
    assert not is_fresh_adapter(trained_adapter())
    assert not is_fresh_adapter(get_peft_model(tiny_llama(), lora(init_lora_weights="pissa")))
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    assert not is_fresh_adapter(get_peft_model(tiny_llama(), ia3))


def test_the_adapter_reference_has_no_dropout_and_restores_the_mode(make_args: MakeArgs, tokenizer: Any):
    trainer = PreferenceTrainer(
        tiny_llama(attention_dropout=0.5),
        make_args(disable_dropout=False),
        train_dataset=make_rows(4),
        processing_class=tokenizer,
        peft_config=lora(lora_dropout=0.5),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    policy = trainer.model.train()
    logps = trainer.reference.logps(policy, batch)
    assert policy.training and not logps.requires_grad
    plain = PreferenceTrainer(tiny_llama(), make_args(), processing_class=tokenizer).model.eval()
    torch.testing.assert_close(logps, sequence_logps(plain, batch), rtol=0, atol=0)


def test_a_trained_adapter_is_part_of_the_reference(make_args: MakeArgs, tokenizer: Any):
    model = trained_adapter()
    args = make_args()
    trainer = PreferenceTrainer(model, args, train_dataset=make_rows(8), processing_class=tokenizer)
    metrics = trainer.evaluate(make_rows(3, 2))
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    assert read_metrics(args.output_dir)[1]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.fixture
def scorings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the data sets that were scored."""
    sizes: list[int] = []

    def counted(model: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(dataset))
        return score_dataset(model, dataset, *args, **kwargs)

    monkeypatch.setattr(precompute, "score_dataset", counted)
    return sizes


def test_the_cache_spares_a_second_scoring_until_something_changes(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, scorings: list[int]
):
    def run(name: str, seed: int = 0, rows: Any = None, **settings: Any) -> list[dict[str, Any]]:
        args = make_args(output_dir=str(tmp_path / name), reference="precomputed", max_steps=2, **settings)
        PreferenceTrainer(
            tiny_llama(seed), args, train_dataset=rows or make_rows(6), processing_class=tokenizer
        ).train()
        return read_metrics(args.output_dir)

    first = run("first")
    assert scorings == [6]
    assert run("second") == first
    assert run("other batches", reference_batch_size=2) == first
    assert scorings == [6]
    run("other weights", seed=1)
    run("other data", rows=make_rows(6, 9))
    run("other length", max_length=12)
    run("other kernels", backend="reference")
    assert len(scorings) == 5
    assert len(list((tmp_path / "reference").iterdir())) == 5


def test_the_cache_is_shared_with_and_without_a_fresh_adapter(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, scorings: list[int]
):
    for name, adapter in (("full", None), ("lora", lora()), ("head", lora(modules_to_save=["lm_head"]))):
        args = make_args(output_dir=str(tmp_path / name), reference="precomputed", max_steps=1)
        trainer = PreferenceTrainer(
            tiny_llama(), args, train_dataset=make_rows(6), processing_class=tokenizer, peft_config=adapter
        )
        trainer.train()
        assert scorings == [6], name


def test_new_data_after_training(make_args: MakeArgs, tokenizer: Any, scorings: list[int]):
    rows = make_rows(6)
    full = PreferenceTrainer(
        tiny_llama(), make_args(reference="precomputed"), train_dataset=rows, processing_class=tokenizer
    )
    full.train()
    full.evaluate(rows)  # known from before
    with pytest.raises(ValueError, match="cannot score new data once training has begun"):
        full.evaluate(make_rows(3, 2))
    adapted = PreferenceTrainer(
        tiny_llama(),
        make_args(reference="precomputed", overwrite_output_dir=True),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    adapted.train()
    metrics = adapted.evaluate(make_rows(3, 2))  # without its adapter it is what it was
    assert scorings == [6, 3]
    adapted.reference = Reference("adapter")
    computed = adapted.evaluate(make_rows(3, 2))
    assert abs(metrics["eval_rewards/chosen"]) > 1e-3
    assert metrics["eval_rewards/chosen"] == pytest.approx(computed["eval_rewards/chosen"], abs=1e-5)


def test_reference_columns_of_the_data_are_taken_as_they_are(
    make_args: MakeArgs, tokenizer: Any, scorings: list[int], caplog: pytest.LogCaptureFixture
):
    rows = [{**row, "ref_chosen_logps": -7.0, "ref_rejected_logps": -8.0} for row in make_rows(4)]
    trainer = PreferenceTrainer(
        tiny_llama(),
        make_args(beta=1.0, reference="precomputed"),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert "taken on trust" in caplog.text
    metrics = trainer.evaluate(rows)
    assert metrics["eval_rewards/chosen"] == pytest.approx(metrics["eval_logps/chosen"] + 7, abs=1e-5)
    assert metrics["eval_rewards/rejected"] == pytest.approx(metrics["eval_logps/rejected"] + 8, abs=1e-5)
    assert scorings == []
    with pytest.raises(ValueError, match="as the training data has them"):
        trainer.evaluate(make_rows(2))


def test_scores_are_in_the_order_of_the_data(make_args: MakeArgs, tokenizer: Any):
    trainer = PreferenceTrainer(
        tiny_llama(), make_args(), train_dataset=make_rows(9), processing_class=tokenizer
    )
    data, collator = trainer.train_dataset, trainer.data_collator
    device = torch.device("cpu")
    scores = score_dataset(trainer.model, data, collator, batch_size=4, device=device)
    whole = sequence_logps(trainer.model, collator([data[i] for i in range(9)])).view(2, 9).T.flatten()
    torch.testing.assert_close(scores, whole, rtol=1e-5, atol=1e-5)
    # What each batch's scores are put by is made once, not of all rows again for every batch.
    assert data.reference_rows is data.reference_rows
    parts = [
        score_dataset(trainer.model, data, collator, batch_size=4, device=device, rank=rank, num_ranks=2)
        for rank in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_the_fingerprint_sees_weights_config_and_adapter():
    model = tiny_llama()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[3, 5] += 1e-6
    rescaled = get_peft_model(tiny_llama(), lora(lora_alpha=99))
    prints = [
        fingerprint_model(model),
        fingerprint_model(changed),
        fingerprint_model(tiny_llama(rms_norm_eps=1e-4)),
        fingerprint_model(tiny_llama().to(torch.bfloat16)),
        fingerprint_model(get_peft_model(tiny_llama(), lora())),
        fingerprint_model(rescaled),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint_model(tiny_llama()) == prints[0]
    assert fingerprint_model(rescaled, without_adapter=True) == prints[0]


def test_the_cache_is_in_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ReferenceCache(None).directory == tmp_path / ".cache" / "fastdpo" / "reference"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert ReferenceCache(None).directory == tmp_path / "elsewhere" / "fastdpo" / "reference"
    assert not any(tmp_path.iterdir())


def test_files_of_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cache = ReferenceCache(tmp_path / "new" / "folder")
    scores = torch.tensor([[-1.5, -2.25], [0.0, -1e-30]])
    key = cache_key({"model": "a", "data": "b"})
    assert cache.load(key, (2, 2)) is None
    path = cache.save(key, scores)
    assert torch.equal(cache.load(key, (2, 2)), scores)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no half-written file is left
    assert cache.load(key, (3, 2)) is None  # another number of pairs
    assert cache.load(cache_key({"model": "a", "data": "c"}), (2, 2)) is None
    path.write_bytes(path.read_bytes()[:-20])
    assert cache.load(key, (2, 2)) is None
    path.write_bytes(b"")
    assert cache.load(key, (2, 2)) is None
    assert "cannot be read" in caplog.text


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("numpy.savez", broken)
    with pytest.raises(OSError, match="disk full"):
        ReferenceCache(tmp_path).save("key", torch.zeros(1, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_reference_without_a_model_scores_nothing():
    assert Reference("none").logps(torch.nn.Identity(), {}) is None


def test_scores_that_are_not_finite_name_their_rows(make_args: MakeArgs, tokenizer: Any):
    model = tiny_llama()
    rows = make_rows(4)
    rows[2]["prompt"] = "@" + rows[2]["prompt"]
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("@")["input_ids"][0]] = float("nan")
    trainer = PreferenceTrainer(
        model, make_args(reference="precomputed"), train_dataset=rows, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="not finite in row 3"):
        trainer.train()
