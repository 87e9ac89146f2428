"""`patch_trl` of TRL 0.24: its DPO trainer with the patch and without, by every option, products counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fastdpo import Execution, patch_trl
from tests.conftest import SHARED_DATA
from tests.integrations import trl_runs as runs
from tests.integrations.tiny import IMAGE_TOKEN, VOCAB
from tests.integrations.trl_0_24_runs import (  # noqa: F401  (a fixture)
    STEPS,
    DPOTrainer,
    compare,
    for_trl,
    make_dpo,
    policy,
    unpatched,
)
from tests.ops.test_gemm_passes import PRODUCTS

pytestmark = pytest.mark.usefixtures("unpatched")

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
    assert runs.loss_types(DPOTrainer.dpo_loss) == set(DPO_LOSSES)


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
