"""`patch_trl` of TRL 0.24: its DPO, KTO, CPO and ORPO trainers with the patch and without, by every option.

TRL 0.24 does not import with the libraries of the other tests: ``make test-llama-factory`` runs this file in
an environment of its own; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

# LLaMA-Factory makes TRL 0.24 importable with transformers 5, whose test for packages returns another type.
pytest.importorskip("llamafactory.extras.packages", reason="needs TRL 0.24: make test-llama-factory")
pytest.importorskip("trl.trainer.cpo_trainer")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.cpo_trainer import CPOConfig, CPOTrainer
from trl.trainer.kto_trainer import KTOConfig, KTOTrainer
from trl.trainer.orpo_trainer import ORPOConfig, ORPOTrainer

import fastdpo
from fastdpo import Execution, patch_model, patch_trl, unpatch_trl
from fastdpo.integrations import trl as hook
from fastdpo.integrations import trl_0_24
from tests.conftest import SHARED_DATA
from tests.integrations import trl_runs as runs
from tests.integrations.tiny import IMAGE_TOKEN, VOCAB
from tests.ops.test_gemm_passes import PRODUCTS

STEPS = 30
DPO_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_pair": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
}
# transformers 5.6 logs a loss to four places; the losses of all calls are compared in full.
ROUNDED = ("loss",)
PATHS = (
    trl_0_24.DPO,
    trl_0_24.KTO,
    trl_0_24.KTO_REFERENCE,
    trl_0_24.KTO_KL,
    trl_0_24.CPO,
    trl_0_24.ORPO,
)


def for_trl(model: Any) -> Any:
    """With the attribute that TRL 0.24 writes to, and transformers 5 no longer has."""
    model.warnings_issued = {}
    return model


def policy(family: str = "llama", **options: Any) -> Any:
    return for_trl(runs.policy(family, **options))


def reference(family: str = "llama") -> Any:
    return for_trl(runs.reference(family))


@pytest.fixture(scope="module")
def real() -> tuple[Dataset, Any]:
    """The first words of real pairs, and a tokenizer of their words.

    Rewards are 0.1 of differences of sums over an answer. Of 60 tokens these are about 580, known in fp32 to
    3e-5, in TRL as here; of 20 tokens the differences stay below the tolerance.
    """
    source = SHARED_DATA / "preference_en.jsonl"
    if not source.exists():
        pytest.skip(f"needs the shared data, none at {SHARED_DATA}")

    def words(messages: list[dict[str, str]], count: int) -> str:
        return " ".join(messages[-1]["content"].split()[:count])

    rows = [
        {"prompt": words(row["prompt"], 12)}
        | {name: " " + words(row[name], 16) for name in ("chosen", "rejected")}
        for row in map(json.loads, source.read_text().splitlines()[:64])
    ]
    return Dataset.from_list(rows), runs.word_tokenizer([text for row in rows for text in row.values()])


def make_dpo(folder: Path, *, family: str = "llama", model: Any = None, **changes: Any) -> DPOTrainer:
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    data = changes.pop("train_dataset", None) or runs.pairs()
    tokenizer = changes.pop("processing_class", None) or runs.make_tokenizer()
    model = model or policy(family)
    if changes.get("use_weighting"):
        model.lm_head.weight.data.mul_(0.1)  # else nothing is left of random answers
    return DPOTrainer(
        model,
        ref_model=None if "peft_config" in keywords else reference(family),
        args=DPOConfig(**runs.settings(folder, **changes)),
        train_dataset=data,
        processing_class=tokenizer,
        **keywords,
    )


def compare(make: Callable[[], Any], *, but: tuple[str, ...] = ()) -> tuple[runs.Run, runs.Run]:
    ours, theirs = runs.side_by_side(make, patch_trl)
    gap, what = runs.largest_difference(ours, theirs, but=(*ROUNDED, *but))
    print(f"largest difference {gap:.1e} ({what})")
    runs.assert_alike(ours, theirs, but=(*ROUNDED, *but))
    return ours, theirs


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


# What is replaced


def objects() -> list[Any]:
    """What stands at every place that is patched, looked up without the code under test."""
    found = []
    for module, name in (
        ("dpo", "DPOTrainer.concatenated_forward"),
        ("kto", "KTOTrainer.forward"),
        ("kto", "KTOTrainer.compute_reference_log_probs"),
        ("kto", "KTOTrainer._compute_kl_logps"),
        ("cpo", "CPOTrainer.concatenated_forward"),
        ("orpo", "ORPOTrainer.concatenated_forward"),
    ):
        kind, method = name.split(".")
        found.append(vars(getattr(import_module(f"trl.trainer.{module}_trainer"), kind))[method])
    return found


def test_the_very_methods_come_back() -> None:
    before = objects()
    with patch_trl() as done:
        assert done.is_new and done.replaced == PATHS and done.version == "0.24.0"
        assert all(now is not then for now, then in zip(objects(), before, strict=True))
        assert not patch_trl().is_new
        with pytest.raises(ValueError, match="unpatch_trl"):
            patch_trl(execution=Execution(workspace_mib=16))
    assert all(now is then for now, then in zip(objects(), before, strict=True))
    with patch_trl(experimental=False) as done:
        assert done.replaced == PATHS[:4]
        assert all(now is then for now, then in zip(objects()[4:], before[4:], strict=True))


def test_the_doctor_says_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    lines = fastdpo.doctor().sections["TRL"]
    assert lines == [("patch_trl", "TRL 0.24.0 is not patched; fastdpo.patch_trl() would")]
    trainer = make_dpo(tmp_path)
    sft = SFTTrainer(
        policy(),
        args=SFTConfig(**runs.settings(tmp_path)),
        train_dataset=runs.completions(),
        processing_class=runs.make_tokenizer(),
    )

    class Own(DPOTrainer):
        def concatenated_forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().concatenated_forward(*args, **kwargs)

    with patch_trl():
        lines = fastdpo.doctor().sections["TRL"]
        assert [path for name, path in lines if name == "replaced"] == list(PATHS)
        assert dict(lines)["not replaced"].startswith("SFT, GRPO, RLOO")
        report = fastdpo.doctor(trainer).sections
        assert "not fused" not in dict(report["Trainer DPOTrainer"])
        data = dict(report["Data"])
        rows = trainer.train_dataset
        sizes = sorted(len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows)
        assert data["largest batch"] == f"4 pairs, at most {sum(sizes[-4:])} labelled tokens"
        lines = dict(fastdpo.doctor(sft).sections["Trainer SFTTrainer"])
        assert "is not one that is replaced" in lines["not fused"]
        trainer.__class__ = Own
        lines = dict(fastdpo.doctor(trainer).sections["Trainer Own"])
        assert lines["not fused"] == "Own has a concatenated_forward of its own"


@pytest.mark.parametrize("path", [*trl_0_24.SOURCES, *trl_0_24.CPO_SOURCES])
def test_everything_is_held_to_its_source(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path.replace(":", "."), lambda *args: None)
    with pytest.raises(RuntimeError, match=f"the source of {path} has the sha256"):
        patch_trl()
    if path in trl_0_24.CPO_SOURCES:
        with patch_trl(experimental=False):
            pass
    else:
        with pytest.raises(RuntimeError, match=f"the source of {path} has the sha256"):
            patch_trl(experimental=False)


@pytest.mark.parametrize("other", ["0.23.1", "0.24.1", "0.25.0", "1.0.0"])
def test_only_this_release(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_installed_version", lambda: other)
    with pytest.raises(RuntimeError, match=rf"trl {other} has no log-prob function .*1\.15, or 0\.24\.0"):
        patch_trl()


def test_a_look_at_a_trl_that_does_not_import_leaves_it_importable() -> None:
    """TRL 0.24 remembers what a first import found; LLaMA-Factory has to come before it."""
    source = """
import fastdpo
try:
    fastdpo.patch_trl()
except RuntimeError as error:
    assert "does not import with this transformers" in str(error)
else:
    raise AssertionError
assert "llamafactory.extras.packages first" in dict(fastdpo.doctor().sections["TRL"])["patch_trl"]
import llamafactory.extras.packages
from trl import DPOTrainer
with fastdpo.patch_trl():
    assert DPOTrainer.concatenated_forward.__module__ == "fastdpo.integrations.trl_0_24"
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# DPO


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
def test_dpo_curves_of_thirty_steps(loss_type: str, real: tuple[Dataset, Any], tmp_path: Path) -> None:
    rows, tokenizer = real
    ours, _ = compare(
        lambda: make_dpo(
            tmp_path,
            train_dataset=rows,
            processing_class=tokenizer,
            max_length=64,
            max_steps=STEPS,
            learning_rate=1e-4,
            loss_type=[loss_type],
            **DPO_LOSSES[loss_type],
        )
    )
    assert len(ours.losses) == STEPS and ours.losses[0] != pytest.approx(ours.losses[-1], abs=1e-4)
    assert {"rewards/margins", "logits/chosen", "logits/rejected", "logps/chosen"} <= ours.logs[0].keys()


def test_the_loss_types_are_trls() -> None:
    import inspect

    source = inspect.getsource(DPOTrainer.dpo_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(DPO_LOSSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"rpo_alpha": 0.5},
        {"rpo_alpha": 0.5, "use_logits_to_keep": True},
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.5, "use_logits_to_keep": True},
        {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"use_weighting": True, "use_logits_to_keep": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "ipo"], "use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"use_logits_to_keep": True},
        {"padding_free": True},
        {"padding_free": True, "rpo_alpha": 0.5},
        {"padding_free": True, "loss_type": ["ipo"]},
        {"padding_free": True, "max_length": 6},
        {"max_length": 8},
        {"max_length": 8, "truncation_mode": "keep_end"},
        {"max_length": 4, "truncation_mode": "keep_end"},
        {"max_length": 4, "truncation_mode": "keep_end", "loss_type": ["ipo"], "rpo_alpha": 0.5},
        {"max_length": 4, "truncation_mode": "keep_end", "use_weighting": True},
        {"max_length": 4, "truncation_mode": "keep_end", "ld_alpha": 0.5, "use_logits_to_keep": True},
        {"max_length": 4, "truncation_mode": "keep_end", "padding_free": True},
        {"reference_free": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_every_option_of_dpo(changes: dict[str, Any], tmp_path: Path) -> None:
    compare(lambda: make_dpo(tmp_path, **changes))


@pytest.mark.parametrize("name", ["use_logits_to_keep", "use_weighting", "ld_alpha"])
def test_what_padding_free_breaks_in_trl_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes = {"padding_free": True, "max_steps": 1, name: 0.5 if name == "ld_alpha" else True}
    with pytest.raises((RuntimeError, IndexError, ValueError)) as own:
        runs.record(make_dpo(tmp_path, **changes))
    assert "padding_free" not in str(own.value)
    with patch_trl(), pytest.raises(ValueError, match=f"{name}: got .* padding_free=True"):
        runs.record(make_dpo(tmp_path, **changes))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi", "llama-tied"])
def test_softcap_scale_bias_and_tied_heads(family: str, tmp_path: Path) -> None:
    compare(lambda: make_dpo(tmp_path, family=family))


def test_the_auxiliary_loss_of_a_mixture_of_experts(tmp_path: Path) -> None:
    def model() -> Any:
        return policy("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)

    ours, _ = compare(lambda: make_dpo(tmp_path, model=model(), family="mixtral"))
    assert ours.logs[0]["aux_loss"] > 0


def test_evaluation(tmp_path: Path) -> None:
    ours, _ = compare(lambda: make_dpo(tmp_path, eval_dataset=runs.pairs(seed=3)), but=("eval_loss",))
    assert any("eval_rewards/margins" in entry for entry in ours.logs)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters(kind: str, tmp_path: Path) -> None:
    """The reference is the model without its adapter; virtual tokens before the rows, too."""
    import peft

    def make() -> DPOTrainer:
        torch.manual_seed(1)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return make_dpo(tmp_path, peft_config=lora if kind == "lora" else prompt)

    ours, _ = compare(make)
    assert all(("lora" if kind == "lora" else "prompt_encoder") in name for name in ours.grads)


def test_bf16_autocast(tmp_path: Path) -> None:
    """TRL rounds logits to bf16 and ours are not rounded, so the two may differ as bf16 does."""
    exact = runs.record(make_dpo(tmp_path, max_steps=1, loss_type=["sft"]))
    ours, theirs = runs.side_by_side(
        lambda: make_dpo(tmp_path, max_steps=1, loss_type=["sft"], bf16=True), patch_trl
    )
    # bf16 through two layers: 2^-8 of logits of about 3 for each, averaged over some 30 tokens.
    assert 1e-5 < abs(ours.losses[0] - exact.losses[0]) < 2e-2
    assert abs(ours.losses[0] - theirs.losses[0]) < 2e-2


def test_a_trainer_made_before_the_patch_is_patched(tmp_path: Path) -> None:
    theirs = runs.record(make_dpo(tmp_path))
    trainer = make_dpo(tmp_path)
    with patch_trl(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.selective_log_softmax", forbidden)
        ours = runs.record(trainer)
    runs.assert_alike(ours, theirs, but=ROUNDED)
    assert type(trainer.model).__name__ == "LlamaForCausalLM" and trainer.model.__class__.__mro__[1:]


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the logits of a batch were asked for")


@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("family", ["llava", "gemma3-vl"])
def test_images_and_token_types(family: str, limit: int | None, tmp_path: Path) -> None:
    """One call of the method on a batch as TRL's collator makes it of prompts with images."""
    model = runs.make_model(family)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():  # Gemma 3's projector starts at 0, and no image would be seen
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 190, (2, length), generator=generator)

    prompt, chosen, rejected = tokens(8), tokens(5), tokens(4)
    prompt[:, 3:7] = IMAGE_TOKEN
    chosen[0, 1] = 0  # which RPO's likelihood leaves out in TRL
    batch = {
        f"{name}_{what}": value
        for name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
        for what, value in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))
    }
    batch["prompt_attention_mask"][1, :2] = 0
    batch["chosen_attention_mask"][0, 3:] = 0
    batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    if family == "gemma3-vl":
        batch["token_type_ids"] = (prompt == IMAGE_TOKEN).long()
    trainer = make_dpo(tmp_path, rpo_alpha=1.0)
    trainer.max_length = limit

    def run() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        out = trainer.concatenated_forward(model, {name: value.clone() for name, value in batch.items()})
        (out["chosen_logps"].sum() - out["rejected_logps"].sum() + out["nll_loss"]).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {name: value.detach().sum().item() for name, value in out.items()}, grads

    theirs, their_grads = run()
    with patch_trl():
        ours, our_grads = run()
    assert ours.keys() == theirs.keys() and our_grads.keys() == their_grads.keys()
    for name, value in theirs.items():
        runs.assert_number(ours[name], value, name)
    for name, grad in their_grads.items():
        if not name.endswith("self_attn.k_proj.bias"):  # shifts all scores of a query: rounding alone
            runs.assert_gradient(our_grads[name], grad, name)
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert abs(run()[0]["chosen_logps"] - theirs["chosen_logps"]) > 1e-3


def head_passes(run: Callable[[], object], tokens: int, hidden: int, vocab: int) -> float:
    """Products with the head's matrices during ``run()``, in units of 2 N H V, without the backbone's."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        run()
    flop = 0
    for event in profile.events():
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            left, right = [shape for shape in event.input_shapes if len(shape) == 2][first : first + 2]
            if vocab in (*left, *right):
                flop += 2 * left[0] * left[1] * right[1]
    return flop / (2 * tokens * hidden * vocab)


def test_fewer_products_counted(tmp_path: Path) -> None:
    """A step in passes over the answers' tokens: 3 and 1 for the reference; TRL's are over all positions."""
    vocab, hidden = 4099, 32

    def passes() -> tuple[float, float]:
        model = policy(vocab_size=vocab)
        trainer = make_dpo(tmp_path, model=model, per_device_train_batch_size=8)
        trainer.ref_model = for_trl(runs.make_model(vocab_size=vocab, seed=1)).eval()
        batch = next(iter(trainer.get_train_dataloader()))
        answers = int(batch["chosen_attention_mask"].sum() + batch["rejected_attention_mask"].sum())
        positions = answers + 2 * int(batch["prompt_attention_mask"].sum())

        def step() -> None:
            trainer.compute_loss(model, batch).backward()

        return head_passes(step, answers, hidden, vocab), positions / answers

    theirs, share = passes()
    with patch_trl():
        ours, _ = passes()
    assert ours == pytest.approx(4, abs=1e-6)
    assert theirs > 4 * share > 5  # and padding


# KTO, CPO, ORPO


def make_kto(folder: Path, **changes: Any) -> KTOTrainer:
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    family = changes.pop("family", "llama")
    model = changes.pop("model", None) or policy(family)
    return KTOTrainer(
        model,
        ref_model=None if "peft_config" in keywords else reference(family),
        args=KTOConfig(**runs.settings(folder, **{"max_length": 32, "max_prompt_length": 16, **changes})),
        train_dataset=changes.pop("train_dataset", None) or runs.unpaired(),
        processing_class=runs.make_tokenizer(),
        **keywords,
    )


OF_ALL_POSITIONS = ("logits/chosen", "logits/rejected")


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": STEPS},
        {"loss_type": "apo_zero_unpaired", "max_steps": STEPS},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"family": "gemma2"},
        {"eval_dataset": True},
    ],
    ids=str,
)
def test_kto(changes: dict[str, Any], tmp_path: Path) -> None:
    if changes.get("eval_dataset"):
        changes = {"eval_dataset": runs.unpaired()}
    ours, _ = compare(lambda: make_kto(tmp_path, **changes), but=(*OF_ALL_POSITIONS, "eval_loss"))
    assert {"kl", "rewards/margins", "logps/chosen"} <= {name for entry in ours.logs for name in entry}


def test_kto_with_an_adapter(tmp_path: Path) -> None:
    import peft

    def make() -> KTOTrainer:
        torch.manual_seed(1)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        return make_kto(tmp_path, peft_config=lora)

    compare(make, but=OF_ALL_POSITIONS)


def test_the_auxiliary_loss_of_kto(tmp_path: Path) -> None:
    def make() -> KTOTrainer:
        model = policy("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
        return make_kto(tmp_path, family="mixtral", model=model)

    compare(make, but=OF_ALL_POSITIONS)


def test_the_differing_metric_of_kto_is_that_of_the_answers_tokens(tmp_path: Path) -> None:
    trainer = make_kto(tmp_path, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    with patch_trl(), torch.no_grad():
        _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    with torch.no_grad():
        logits = trainer.model(
            input_ids=batch["completion_input_ids"], attention_mask=batch["completion_attention_mask"]
        ).logits
    is_chosen = torch.tensor(batch["label"])
    mask = (batch["completion_labels"][:, 1:] != -100) & is_chosen[:, None]
    expected = logits[:, :-1][mask].double().sum().item()
    # The same sums of some thousand logits of about 3, in another order.
    assert metrics["logits/chosen_sum"] == pytest.approx(expected, rel=1e-4, abs=1e-2)


def make_cpo_or_orpo(kind: str, folder: Path, **changes: Any) -> Any:
    trainer, config = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}[kind]
    keywords = {name: changes.pop(name) for name in ("eval_dataset",) if name in changes}
    family = changes.pop("family", "llama")
    options = {"max_length": 32, "max_prompt_length": 16, **changes}
    return trainer(
        model=policy(family, **({"output_router_logits": True} if family == "mixtral" else {})),
        args=config(**runs.settings(folder, **options)),
        train_dataset=runs.pairs(),
        processing_class=runs.make_tokenizer(),
        **keywords,
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cpo", {"max_steps": STEPS}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 1.0, "max_steps": STEPS}),
        ("cpo", {"loss_type": "hinge"}),
        ("cpo", {"loss_type": "ipo", "cpo_alpha": 0.0}),
        ("cpo", {"label_smoothing": 0.1, "gradient_checkpointing": True}),
        ("cpo", {"family": "mixtral"}),
        ("orpo", {"max_steps": STEPS}),
        ("orpo", {"beta": 0.5, "family": "gemma2"}),
        ("orpo", {"family": "mixtral"}),
    ],
    ids=str,
)
def test_cpo_and_orpo(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare(lambda: make_cpo_or_orpo(kind, tmp_path, **changes), but=OF_ALL_POSITIONS)


# What is refused, and what is left behind


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo"])
def test_bad_input(kind: str, tmp_path: Path) -> None:
    make = {"dpo": make_dpo, "kto": make_kto}.get(kind)
    trainer = make(tmp_path) if make else make_cpo_or_orpo(kind, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with patch_trl():
        trainer.is_encoder_decoder = True
        with pytest.raises(ValueError, match="encoder-decoder"):
            trainer.compute_loss(trainer.model, batch)
        trainer.is_encoder_decoder = False
        if kind != "dpo":
            trainer.label_pad_token_id = -1
            with pytest.raises(ValueError, match="label_pad_token_id: got -1, wanted -100"):
                trainer.compute_loss(trainer.model, batch)
            trainer.label_pad_token_id = -100
        trainer.model.lm_head.register_forward_hook(lambda *_: None)
        before = type(trainer.model)
        with pytest.raises(ValueError, match="forward hooks"):
            trainer.compute_loss(trainer.model, batch)
        assert type(trainer.model) is before


def test_an_unknown_truncation_mode(tmp_path: Path) -> None:
    trainer = make_dpo(tmp_path, max_length=4)
    trainer.truncation_mode = "keep_middle"
    with patch_trl(), pytest.raises(ValueError, match="truncation_mode: got 'keep_middle'"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))


def test_a_model_that_is_patched_already_stays_so(tmp_path: Path) -> None:
    theirs = runs.record(make_dpo(tmp_path))
    with patch_trl():
        trainer = make_dpo(tmp_path, model=patch_model(policy()))
        ours = runs.record(trainer)
    assert hasattr(type(trainer.model), "_fastdpo_hook")
    runs.assert_alike(ours, theirs, but=ROUNDED)


def test_no_logits_of_the_batch(tmp_path: Path) -> None:
    from tests.ops.test_memory import largest_allocation

    def largest() -> tuple[int, int]:
        model = policy(vocab_size=4096)
        trainer = make_dpo(tmp_path, model=model, per_device_train_batch_size=8)
        trainer.ref_model = for_trl(runs.make_model(vocab_size=4096, seed=1)).eval()
        batch = next(iter(trainer.get_train_dataloader()))
        rows = 2 * len(batch["prompt_input_ids"])
        length = batch["prompt_input_ids"].shape[1] + 1
        return largest_allocation(
            lambda: trainer.compute_loss(model, batch).backward()
        ), rows * length * 4096 * 4

    with patch_trl(execution=Execution(workspace_mib=1, cache_mib=0)):
        ours, logits = largest()
    theirs, _ = largest()
    assert ours <= 2**20 < logits <= theirs
    assert VOCAB < 4096
