"""Before the first step a model shows which layouts change nothing; others are refused, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastdpo.integrations.forest.backends import attend
from fastdpo.integrations.forest.segments import Forest
from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.budget import STRATEGIES
from fastdpo.training.batches.collate import RowCollator
from fastdpo.training.batches.layouts import (
    _is_single_call,
    choose_collator,
    first_batches,
    layout_of,
    predicted_cost,
    row_costs,
    token_budget,
)
from fastdpo.training.batches.probe import refusals
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.tiny import HIDDEN, VOCAB, make_model
from tests.training.batches.layout_cases import PAIRS, ROW_CASES
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
ONE_ROW = ("packed", "one_row")
RECURRENT = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}
FALCON = {
    **RECURRENT, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}  # fmt: skip


def probed(model: nn.Module, *, longest: int = 64) -> dict[tuple[str, str], str | None]:
    return refusals(patch_model(model), ROW_CASES, longest=longest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6}),
        ("gemma3", {"sliding_window": 6}),
        ("gemma4", {}),
        ("cohere2", {"sliding_window": 6}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_models_that_may(family: str, options: dict[str, Any], dtype: torch.dtype):
    assert probed(make_model(family, **options).to(dtype)) == dict.fromkeys(ROW_CASES)


def recurrent(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Mamba", {**RECURRENT, "state_size": 4}, "takes no position_ids"),
        ("FalconH1", FALCON, "layers of type hybrid may look at more than a row's forest"),
    ],
)
def test_recurrent_models_have_a_row_for_each_sequence(name: str, options: dict[str, Any], reason: str):
    found = probed(recurrent(name, **options))
    assert {case for case, why in found.items() if why is None} == {
        ("packed", "separate"),
        ("packed", "bucketed"),
    }
    assert all(reason in why for why in found.values() if why is not None)


@pytest.mark.parametrize("name", ["Mamba", "FalconH1"])
def test_the_numbers_alone_would_refuse_neighbours(name: str, monkeypatch: pytest.MonkeyPatch):
    """Without the list of layer types, which another recurrent model may not have."""
    monkeypatch.setattr("fastdpo.training.batches.probe.why_no_neighbours", lambda model: None)
    options = {**RECURRENT, "state_size": 4} if name == "Mamba" else FALCON
    found = probed(recurrent(name, **options))
    for case in (ONE_ROW, ("shared_prompt", "separate"), ("shared_prompt", "one_row")):
        assert found[case] is not None, case


@pytest.mark.promise(60)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_shows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Segments that see what stands before them in the row, whether they continue it or not."""

    def over_the_row(query: Any, key: Any, value: Any, pieces: Any, *args: Any, **options: Any) -> Any:
        whole = Forest.of_sequences([query.shape[2]]).pieces()
        return attend(query, key, value, whole, *args, **options)

    monkeypatch.setattr("fastdpo.integrations.forest.attention.attend", over_the_row)
    found = probed(make_model("llama").to(dtype))
    of_forests = {ONE_ROW, *(case for case in ROW_CASES if case[0] == "shared_prompt")}
    assert {case for case, reason in found.items() if reason} == of_forests
    assert "change" in str(found[ONE_ROW])


def test_an_attention_of_its_own_is_refused():
    """GPT-Neo adds its mask to the scores in code of its own."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2, num_heads=4, max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]], window_size=30,
    )  # fmt: skip
    torch.manual_seed(0)
    found = probed(transformers.GPTNeoForCausalLM(config).eval())
    assert {case for case, reason in found.items() if reason} == {
        ONE_ROW, *(case for case in ROW_CASES if case[0] == "shared_prompt")
    }  # fmt: skip
    assert "attention is its own" in str(found[ONE_ROW])


def test_an_attention_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch):
    attend = nn.functional.scaled_dot_product_attention

    def causal_only(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        return attend(query, key, value, **{**options, "is_causal": True})

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", causal_only)
    found = probed(make_model("llama"))
    refused = {case for case, reason in found.items() if reason}
    # A sequence that begins at the row's root needs no mask.
    assert refused == {case for case in ROW_CASES if case[0] == "shared_prompt"}


def test_a_window_that_attention_forgets_shows_where_the_data_reach_it(monkeypatch: pytest.MonkeyPatch):
    """A window of 30 is beyond the probe's usual 24 tokens, so it is as long as the data make it."""
    model = make_model("gemma3", sliding_window=30)
    assert not any(probed(model).values())

    def no_window(*args: Any, sliding_window: int | None = None, **options: Any) -> Any:
        return attend(*args, **options)

    monkeypatch.setattr("fastdpo.integrations.forest.attention.attend", no_window)
    assert all(reason for case, reason in probed(model).items() if case[0] == "shared_prompt")
    assert not any(refusals(model, ROW_CASES, longest=30).values())


def test_positions_that_do_not_reach_over_all_sequences():
    """The probe's four have 62 tokens, which this model could not take as one sequence."""
    assert not any(probed(make_model("gpt2", n_positions=32)).values())


def test_the_probe_leaves_the_model_as_it_was():
    model = patch_model(make_model("llama")).train()
    state = torch.get_rng_state()
    refusals(model, ROW_CASES, longest=64)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def own_attention(vocab: int = 360) -> nn.Module:
    config = transformers.GPTNeoConfig(
        vocab_size=vocab, hidden_size=HIDDEN, num_layers=1, num_heads=4, max_position_embeddings=512,
        attention_types=[[["global"], 1]],
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


@pytest.mark.promise(60)
def test_a_layout_that_the_model_cannot_do_is_refused(make_args: MakeArgs, tokenizer: Any):
    args = make_args(batch_layout="packed", row_arrangement="one_row")
    with pytest.raises(ValueError, match="batch_layout: got 'packed', which this model cannot be trained in"):
        PreferenceTrainer(own_attention(), args, train_dataset=make_rows(4), processing_class=tokenizer)
    # Left to choose, it takes an arrangement that is exact.
    args = make_args(batch_layout="packed", max_steps=1)
    trainer = PreferenceTrainer(own_attention(), args, train_dataset=make_rows(4), processing_class=tokenizer)
    assert trainer.data_collator.arrangements == ("separate", "bucketed")
    trainer.train()


def test_the_reference_is_probed_too(make_args: MakeArgs, tokenizer: Any):
    args = make_args(batch_layout="packed", row_arrangement="one_row")
    with pytest.raises(ValueError, match="batch_layout: got 'packed'"):
        PreferenceTrainer(
            tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer,
            ref_model=own_attention(),
        )  # fmt: skip


def _wants_several_rows(layer: nn.Module, args: tuple[Any, ...]) -> None:
    if len(args[0]) == 1:
        raise KeyError("a batch of one")


def test_auto_falls_back_to_padded_and_says_why(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    """Whatever a model makes of rows that it was not made for, a run is set up."""
    caplog.set_level(logging.INFO, logger="fastdpo")
    model = tiny_llama()
    model.model.layers[0].register_forward_pre_hook(_wants_several_rows)
    args = make_args(batch_layout="auto", max_steps=1)
    trainer = PreferenceTrainer(model, args, train_dataset=make_rows(4), processing_class=tokenizer)
    assert layout_of(trainer.data_collator) == "padded"
    assert "one_row: refused: its forward fails on rows of one sequence (KeyError: 'a batch" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match="batch_layout: got 'packed', .* fails on rows of one sequence"):
        PreferenceTrainer(
            model, make_args(batch_layout="packed"), train_dataset=make_rows(4), processing_class=tokenizer
        )


def test_auto_takes_the_cheapest(make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture):
    """Long prompts are shared; answers alone are not worth a mask."""
    caplog.set_level(logging.INFO, logger="fastdpo")
    rows = [{**row, "prompt": row["prompt"] * 40} for row in make_rows(12)]
    args = make_args(batch_layout="auto", max_steps=2)
    trainer = PreferenceTrainer(
        tiny_llama(hidden_size=64), args, train_dataset=rows, processing_class=tokenizer
    )
    collator = trainer.data_collator
    assert isinstance(collator, RowCollator) and collator.layout == "shared_prompt"
    costs, data = row_costs(trainer.model), trainer.train_dataset
    packed = RowCollator(0, "packed", costs)
    assert predicted_cost(collator, costs, data, args) < predicted_cost(packed, costs, data, args)
    assert "batches are shared_prompt" in caplog.text
    trainer.train()
    assert len(read_metrics(args.output_dir)) == 2


def test_costs_are_in_tokens():
    """A call takes 0.3 ms a layer; of a token's matrix products a CPU makes 40 GFLOP a second."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, the MLP
    costs = row_costs(tiny_llama())
    assert costs.call_tokens == pytest.approx(3e-4 / (2 * layer / 4e10))
    assert costs.pair_tokens == pytest.approx(1.5 * 2 * (2 * 32) / (2 * layer))
    assert row_costs(tiny_llama(num_hidden_layers=4)).call_tokens == pytest.approx(costs.call_tokens)


@pytest.mark.parametrize("data_seed", [None, 7])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [None, 60])
def test_predicted_batches_are_those_of_training(
    make_args: MakeArgs, tokenizer: Any, budget: int | None, strategy: str, data_seed: int | None
):
    """What meets in a batch decides how much padding it has: by chance, by length, or by the data's order."""
    args = make_args(
        train_sampling_strategy=strategy,
        data_seed=data_seed,
        batch_layout="padded" if budget is None else "packed",
        max_tokens_per_batch=budget,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(20), processing_class=tokenizer)
    data = trainer.train_dataset
    predicted = first_batches(data, token_budget(args, trainer.data_collator), args)
    assert [data.rows[batch].tolist() for batch in predicted] == [
        batch.rows.tolist() for batch in trainer.get_train_dataloader() if not batch.is_filler
    ]


def test_a_collator_of_ones_own_is_padded(make_args: MakeArgs, tokenizer: Any):
    with pytest.raises(ValueError, match="data_collator: got one with batch_layout='packed'"):
        PreferenceTrainer(
            tiny_llama(), make_args(batch_layout="packed"), processing_class=tokenizer, data_collator=dict
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_layout": "flat"}, "batch_layout: got 'flat'"),
        ({"row_arrangement": "one_row"}, "row_arrangement: got 'one_row' with batch_layout='padded'"),
        ({"batch_layout": "packed", "row_arrangement": "rows"}, "row_arrangement: got 'rows'"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch: got 0"),
        ({"max_tokens_per_batch": 9, "reference_batch_size": 2}, "reference_batch_size: got a value"),
    ],
)
def test_wrong_settings(make_args: MakeArgs, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_reentrant_checkpointing_on_several_ranks_runs_the_backbone_once(make_args: MakeArgs):
    """Each call has a backward pass of its own there, and DDP takes a second gradient for an error."""
    options = {"gradient_checkpointing": True, "batch_layout": "packed"}
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    several, alone = SimpleNamespace(num_processes=2), SimpleNamespace(num_processes=1)
    assert _is_single_call(make_args(**options, **reentrant), several)
    assert not _is_single_call(make_args(**options, **reentrant), alone)
    assert not _is_single_call(make_args(**options), several)
    assert not _is_single_call(make_args(batch_layout="packed", **reentrant), several)
    several.is_main_process, several.device = True, torch.device("cpu")
    several.reduce = lambda value, reduction: value
    model, args = patch_model(tiny_llama()), make_args(**options, **reentrant)
    collator = choose_collator([model], args, 0, None, several)
    assert collator.single_call and collator.arrangements == ("bucketed", "one_row")
    assert len(collator(PAIRS).calls) == 1
    args = make_args(**options, **reentrant, row_arrangement="separate")
    with pytest.raises(ValueError, match="re-entrant checkpointing in DDP forbids"):
        choose_collator([model], args, 0, None, several)


def test_a_refusal_on_one_rank_holds_on_all(make_args: MakeArgs):
    both = SimpleNamespace(num_processes=2, is_main_process=True, device=torch.device("cpu"))
    both.reduce = lambda value, reduction: value + torch.tensor([0, 0, 1])  # the other rank refuses one_row
    collator = choose_collator([patch_model(tiny_llama())], make_args(batch_layout="packed"), 0, None, both)
    assert collator.arrangements == ("separate", "bucketed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma2", {"sliding_window": 6})])
def test_models_of_flex_attention(family: str, options: dict[str, Any]):
    """What a model computes attention with otherwise makes no difference to forests."""
    model = make_model(family, head_dim=16, **options)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert probed(model) == dict.fromkeys(ROW_CASES)
