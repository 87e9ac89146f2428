"""Settings are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from accelerate import ParallelismConfig

from fastdpo.losses import LOSSES, PairLogps
from fastdpo.training.settings import parallel
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.steps import COLUMN_FIELDS

MakeArgs = Callable[..., PreferenceConfig]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 2, "engine": "zero3"}, "tp_size: got 2 with DeepSpeed, wanted engine='fsdp2'"),
        ({"tp_size": 2, "fsdp": True}, "tp_size: got 2 and fsdp or fsdp_config"),
        ({"tp_size": 2, "sync_ref_model": True}, "sync_ref_model: got True.* wanted none with tp_size"),
        ({"tp_size": 2, "loss_type": "tdpo1"}, "loss_type: got tdpo1, with divergences"),
        ({"tp_size": 2, "longest_batch_first": True}, "longest_batch_first: got True with tp_size"),
        ({"sp_size": 2, "loss_type": "tdpo1"}, "loss_type: got tdpo1, .* wanted none with sp_size"),
        ({"sp_size": 2, "longest_batch_first": True}, "longest_batch_first: got True; wanted none with sp_"),
    ],
)
def test_what_ranks_with_one_batch_cannot_do(settings, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def _sizes(**sizes: int) -> dict[str, Any]:
    return {"parallelism_config": ParallelismConfig(**sizes)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            _sizes(dp_replicate_size=2, dp_shard_size=2),
            "dp_shard_size: got 2, and dp_replicate_size 2, without",
        ),
        (_sizes(dp_shard_size=4), "dp_shard_size: got 4, .* wanted engine='fsdp2'; or neither size, for DDP"),
        (_sizes(sp_size=2, dp_shard_size=2), "dp_shard_size: got 2, .* wanted engine='fsdp2'"),
        ({"dp_replicate_size": 2}, "dp_shard_size: got 2, and dp_replicate_size 2, without an engine"),
        (
            {"dp_replicate_size": 2, "engine": "zero3"},
            "dp_replicate_size: got 2 under DeepSpeed, wanted engine='f",
        ),
        (
            {"dp_replicate_size": 4, "engine": "fsdp2"},
            "dp_replicate_size: got 4 of 4 processes under FSDP2, .* 2,",
        ),
        (
            {"dp_replicate_size": 3, "fsdp": True},
            "dp_replicate_size 3: got 4 processes, wanted a multiple of 3",
        ),
        ({"dp_replicate_size": 2, "tp_size": 2}, "dp_replicate_size: got 2 with tp_size 2 on 4 processes"),
        (
            {"dp_replicate_size": 4, "engine": "fsdp2", **_sizes(dp_replicate_size=2, dp_shard_size=2)},
            "dp_replicate_size: got 4, and 2 in parallelism_config, wanted one",
        ),
        (
            {"engine": "fsdp2", **_sizes(dp_replicate_size=2, dp_shard_size=4)},
            "dp_replicate_size 2, dp_shard_size 4: got 4 processes, wanted 8",
        ),
    ],
)
def test_copies_of_a_split_model_that_do_not_go_together(settings, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_accelerate_is_told_of_no_size_twice(monkeypatch):
    """By its variables too, which name the copies that transformers' own sizes contain."""
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    assert parallel._config(tp_size=2, dp_shard_size=4).total_size == 8


@pytest.mark.promise(23)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"loss_type": []}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_weights": [float("nan")]}, "loss_weights"),
        ({"beta": 0.0}, "beta"),
        ({"loss_options": {"gamma": 1.0}}, "gamma"),
        ({"loss_options": {"label_smoothing": 0.7}}, "label_smoothing"),
        ({"loss_options": "{not json"}, "loss_options"),
        ({"loss_options": "[1]"}, "loss_options"),
        ({"loss_type": "sft", "margin_column": "gap"}, "margin"),
        (
            {"chosen_win_rate_column": "w", "rejected_win_rate_column": "l"},
            "chosen_win_rate_column: got a value, wanted",
        ),
        ({"loss_type": "sppo", "chosen_win_rate_column": "w"}, "^rejected_win_rate_column: got None beside"),
        ({"loss_type": ["tdpo1", "sigmoid"]}, "wanted losses of the same batch"),
        (
            {"loss_type": "tdpo1", "reference": "precomputed"},
            "tdpo1 needs the reference's whole distribution",
        ),
        ({"loss_type": "tdpo2", "mode": "lean"}, "mode: got 'lean' with tdpo2"),
        ({"loss_type": "tdpo1", "backend": "cuda"}, "backend: got 'cuda' with tdpo1"),
        ({"loss_type": "tdpo1", "logits_dtype": "bf16"}, "logits_dtype: got 'bf16' with tdpo1"),
        ({"loss_type": "tdpo1", "dynamic_beta": {}}, "dynamic_beta: got a value with tdpo1"),
        ({"loss_type": ["kto", "sigmoid"]}, "got kto of unpaired, sigmoid of paired data"),
        ({"loss_type": ["sdpo", "in_context_ranking"]}, "sdpo of listwise, in_context_ranking of ranking"),
        ({"loss_type": "kto", "accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"over_optimisation_monitor": "[]"}, "over_optimisation_monitor: got"),
        (
            {"over_optimisation_monitor": {"k": 3}},
            "over_optimisation_monitor: got the option 'k', wanted some",
        ),
        ({"over_optimisation_monitor": {"topk": 0}}, "topk: got 0"),
        ({"beta_column": "b", "beta": 0.1}, "beta_column: got 'b' with beta, wanted one of the two"),
        ({"beta_column": "b", "dynamic_beta": {}}, "beta_column: got 'b' with dynamic_beta"),
        ({"beta_column": "b", "loss_type": "sft"}, "beta_column: got a value with sft"),
        ({"beta_column": "b", "loss_type": "kto"}, "beta_column: got a value with kto"),
        ({"dynamic_beta": "[]"}, "dynamic_beta: got"),
        ({"dynamic_beta": {"gamma": 1}}, "dynamic_beta: got the option 'gamma'"),
        ({"dynamic_beta": {"rho": 1.5}}, "rho: got 1.5"),
        ({"dynamic_beta": {}, "loss_type": "kto"}, "dynamic_beta: got a value with kto"),
        ({"dynamic_beta": {}, "loss_type": "aot"}, "dynamic_beta: got a value with aot"),
        ({"dynamic_beta": {}, "loss_type": "simpo"}, "dynamic_beta: got a value with simpo"),
        ({"dynamic_beta": {}, "loss_type": ["sigmoid", "sft"]}, "dynamic_beta: got a value with sft"),
        ({"sync_ref_model": True, "reference": "precomputed"}, "sync_ref_model: got True with"),
        ({"sync_ref_model": True, "loss_type": "simpo"}, "sync_ref_model: got True with simpo"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps"),
        ({"gather_batch_losses": True}, "gather_batch_losses: got True"),
        ({"gather_batch_losses": True, "loss_type": "aot", "pair_weight_column": "w"}, "pair_weight_column"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": -5}, "max_length"),
        ({"truncation_mode": "middle"}, "truncation_mode"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
        ({"reference": "copied"}, "reference"),
        ({"reference_batch_size": 0}, "reference_batch_size"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"learning_rate": -1e-6}, "learning_rate: got -1e-06"),
        ({"mode": "pairs"}, "mode"),
        ({"mode": "score"}, "mode"),
        ({"backend": "cutlass"}, "backend"),
        ({"logits_dtype": "fp8"}, "logits_dtype"),
        ({"workspace_mib": 0}, "workspace_mib"),
        ({"cache_mib": -1}, "cache_mib"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of"),
        ({"on_nonfinite_loss": "hope"}, "on_nonfinite_loss"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp: got version 1, .* wanted FSDP2"),
        ({"engine": "fsdp3"}, r"engine: got 'fsdp3', wanted one of \(None, 'fsdp2'"),
        ({"engine": "fsdp2", "offload_activations": True}, "offload_activations: got True.* under FSDP2"),
        ({"engine": "zero3", "fsdp": True}, "engine: got 'zero3' and fsdp, wanted one of the two"),
        (
            {"fsdp": True, "context_chunk": 8, "batch_layout": "packed"},
            "context_chunk: got 8.* wanted none under FSDP2",
        ),
        ({"parallelism_config": object()}, "parallelism_config: got a object, wanted accelerate's"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "cp_size: got 2, .* wanted sp_size"),
        ({"parallelism_config": ParallelismConfig(tp_size=2), "tp_size": 4}, "tp_size: got 4, and 2 in"),
        ({"parallelism_config": ParallelismConfig(dp_shard_size=2)}, "dp_shard_size 2: got 1 processes"),
        ({"tp_size": 2}, "tp_size 2: got 1 processes, wanted a multiple of 2"),
        ({"sp_size": 2}, "sp_size 2: got 1 processes, wanted a multiple of 2"),
        ({"tp_size": 2, "sp_size": 2}, "tp_size, sp_size: got 2 and 2, wanted one"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: got False"),
        ({"label_names": ["labels"]}, "label_names: got"),
        ({"do_predict": True}, "do_predict: got True"),
        ({"report_to": "tensorbord"}, "report_to: got 'tensorbord', wanted none, all, or some of"),
        ({"report_to": ["codecarbon"]}, "report_to: got 'codecarbon', which is not installed"),
        ({"optim": "adamw"}, "optim: got 'adamw', wanted one of"),
        ({"optim": "lomo"}, "optim: got 'lomo', which is not installed"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: got 'cosin', .*did you mean 'cosine'"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size: got 0, wanted a whole number from 1",
        ),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"save_total_limit": 0}, "save_total_limit"),
        (
            {"loss_options": {"gamma": 1.0}, "loss_type": "simpo", "gamma": "x"},
            "gamma: got 'x', wanted a number",
        ),
    ],
)
def test_wrong_settings_are_refused(make_args: MakeArgs, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_an_optimizer_that_wants_the_model_is_accepted(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch):
    """Whether what it needs is installed is asked before there is a model, and it says that it wants one."""
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)
    assert make_args(optim="lomo").optim == "lomo"


@pytest.mark.promise(23)
def test_an_unknown_setting_is_refused(make_args: MakeArgs):
    with pytest.raises(TypeError, match="betta"):
        make_args(betta=0.1)


@pytest.mark.parametrize("name", sorted(name for name, spec in LOSSES.items() if spec.inputs is PairLogps))
def test_every_loss_of_pairs_is_a_setting(make_args: MakeArgs, name: str):
    spec = LOSSES[name]
    column = {COLUMN_FIELDS[name]: "number" for name in COLUMN_FIELDS.keys() & set(spec.needs)}
    options = {option.name: option.default for option in spec.options}
    args = make_args(loss_type=name, loss_options=options, **column)
    assert args.losses == [spec]
    assert args.needs_reference == spec.uses_reference


def test_a_column_that_a_loss_needs_is_asked_for(make_args: MakeArgs):
    with pytest.raises(ValueError, match="reward_gap_column: got None, wanted the column to read for rebel"):
        make_args(loss_type="rebel")
    with pytest.raises(ValueError, match="reward_gap_column: got a value, wanted None: sigmoid takes none"):
        make_args(reward_gap_column="gap")


def test_presets_are_settings(make_args: MakeArgs):
    args = make_args(loss_type="exo_pair@authors")
    assert args.losses[0].default_beta == 0.5 and args.options == {}
    with pytest.raises(ValueError, match="loss_type: got exo_pair@mine, wanted exo_pair@authors"):
        make_args(loss_type="exo_pair@mine")


def test_loss_options_may_be_json(make_args: MakeArgs):
    assert make_args(loss_options='{"label_smoothing": 0.1}').options == {"label_smoothing": 0.1}


@pytest.mark.parametrize("value", [0, None, "none", "null", "0"])
def test_no_limit_on_the_length(make_args: MakeArgs, value: Any):
    assert make_args(max_length=value).max_length is None


@pytest.mark.parametrize("value", ["none", None, [], ["none"]])
def test_no_tracker(make_args: MakeArgs, value: Any):
    assert make_args(report_to=value).report_to == []


def test_pushing_without_a_network_is_refused(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="push_to_hub: got True with HF_HUB_OFFLINE"):
        make_args(push_to_hub=True)


def test_options_of_the_losses_are_keywords(make_args: MakeArgs):
    args = make_args(loss_type="simpo", gamma=1.5, loss_options={"gamma": 1.0, "label_smoothing": 0.1})
    assert args.options == {"gamma": 1.5, "label_smoothing": 0.1}


def test_defaults_on_a_cpu(make_args: MakeArgs):
    args = make_args()
    assert args.bf16 is False
    assert not args.gradient_checkpointing
    assert args.execution().mode == "auto"


def test_gradient_checkpointing_may_be_asked_for(make_args: MakeArgs, recwarn: pytest.WarningsRecorder):
    assert make_args(gradient_checkpointing=True).gradient_checkpointing
