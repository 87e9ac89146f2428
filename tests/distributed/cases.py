"""What is run under the engines: names, and what differs from the simplest case."""

from __future__ import annotations

from typing import Any

import torch

# Unit of the head: the root's, one of its own, or one with the last norm (tail), as accelerate has it.
FSDP: dict[str, dict[str, Any]] = {
    f"{engine} {unit} {how}{extra}": {"engine": engine, "unit": unit, "how": how, **options}
    for engine, unit, how, extra, options in [
        ("FSDP2", "root", "logps", "", {}),
        ("FSDP2", "own", "loss", "", {}),
        ("FSDP2", "own", "logps", ", recomputed", {"mode": "recompute"}),
        ("FSDP2", "tail", "packed", "", {}),
        ("FSDP2", "tail", "loss", ", tied", {"tied": True}),
        ("FSDP2", "root", "packed", ", tied", {"tied": True}),
        ("FSDP2", "own", "logps", ", frozen head", {"frozen_head": True}),
        ("FSDP2", "own", "loss", ", a rank without labels", {"labels": 2}),
        ("FSDP2", "tail", "loss", ", accumulated", {"accumulates": True}),
        ("FSDP2", "tail", "logps", ", checkpointing", {"checkpointing": True}),
        ("FSDP2", "tail", "loss", ", patched last", {"is_late": True}),
        ("FSDP2", "own", "logps", ", patched last", {"is_late": True}),
        ("FSDP2", "tail", "loss", ", LoRA", {"adapter": "backbone"}),
        ("FSDP2", "own", "loss", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "tail", "logps", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "own", "loss", ", head trained whole", {"adapter": "saved"}),
        ("FSDP2", "root", "lazy", "", {}),
        ("FSDP2", "root", "lazy", ", resharded", {"reshards": True}),
        ("FSDP2", "own", "lazy", "", {}),
        ("FSDP2", "own", "lazy", ", root resharded", {"reshards": True}),
        ("FSDP2", "tail", "lazy", "", {}),
        ("FSDP2", "tail", "lazy", ", tied", {"tied": True}),
        ("FSDP2", "root", "lazy", ", tied, resharded", {"tied": True, "reshards": True}),
        ("FSDP2", "root", "lazy twice", ", a rank without labels", {"labels": 2}),
        ("FSDP2", "own", "lazy twice", ", a rank without labels", {"labels": 2}),
        ("FSDP2", "tail", "lazy twice", ", a rank without labels", {"labels": 2}),
        ("FSDP2", "own", "lazy", ", frozen head", {"frozen_head": True}),
        ("FSDP2", "own", "lazy", ", accumulated", {"accumulates": True}),
        ("FSDP2", "tail", "lazy twice", ", accumulated", {"accumulates": True}),
        ("FSDP2", "own", "lazy", ", accumulated, no sync", {"accumulates": True, "is_late_sync": True}),
        ("FSDP2", "root", "lazy", ", accumulated, no sync", {"accumulates": True, "is_late_sync": True}),
        ("FSDP2", "tail", "lazy", ", checkpointing", {"checkpointing": True}),
        ("FSDP2", "own", "lazy", ", patched last", {"is_late": True}),
        ("FSDP2", "tail", "lazy", ", LoRA", {"adapter": "backbone"}),
        ("FSDP2", "root", "lazy", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "own", "lazy twice", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "tail", "lazy", ", LoRA on the head", {"adapter": "head"}),
        ("FSDP2", "own", "lazy", ", LoRA on the head alone", {"adapter": "head alone"}),
        ("FSDP2", "own", "lazy", ", head trained whole", {"adapter": "saved"}),
        ("FSDP2", "own", "made", "", {}),
        ("FSDP2", "own", "loss", ", states moved", {"split_head": "states"}),
        ("FSDP2", "own", "logps", ", states moved by choice", {"split_head": "auto"}),
        ("FSDP2", "own", "packed", ", states moved", {"split_head": "states"}),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, a rank without labels",
            {"split_head": "states", "labels": 2},
        ),
        ("FSDP2", "own", "logps", ", states moved, unlike numbers", {"split_head": "states", "labels": 3}),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, frozen head",
            {"split_head": "states", "frozen_head": True},
        ),
        (
            "FSDP2",
            "own",
            "logps",
            ", states moved, recomputed",
            {"split_head": "states", "mode": "recompute"},
        ),
        ("FSDP2", "own", "loss", ", states moved, lean", {"split_head": "states", "mode": "lean"}),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, accumulated",
            {"split_head": "states", "accumulates": True},
        ),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, accumulated, no sync",
            {"split_head": "states", "accumulates": True, "is_late_sync": True},
        ),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, checkpointing",
            {"split_head": "states", "checkpointing": True},
        ),
        (
            "FSDP2",
            "own",
            "loss",
            ", states moved, head trained whole",
            {"split_head": "states", "adapter": "saved"},
        ),
        ("FSDP2", "tail", "made", ", tied", {"tied": True}),
        ("FSDP1", "root", "loss", "", {}),
        ("FSDP1", "root", "logps", ", tied", {"tied": True}),
        ("FSDP1", "own", "logps", "", {}),
        ("FSDP1", "own", "packed", "", {}),
        ("FSDP1", "root", "loss", ", a rank without labels", {"labels": 2}),
        ("FSDP1", "own", "loss", ", LoRA on the head", {"adapter": "head"}),
    ]
}

# Of four ranks, of which two and two have all of the model.
HSDP = {
    name: FSDP[f"FSDP2 {name}"]
    for name in (
        "root logps",
        "own loss",
        "tail packed",
        "tail loss, tied",
        "own loss, a rank without labels",
        "tail loss, accumulated",
        "tail loss, LoRA",
        "own loss, LoRA on the head",
        "own lazy",
        "tail lazy twice, a rank without labels",
        "own lazy, accumulated, no sync",
        "own loss, states moved",
        "own logps, states moved by choice",
        "own packed, states moved",
        "own loss, states moved, a rank without labels",
        "own logps, states moved, unlike numbers",
        "own loss, states moved, frozen head",
        "own logps, states moved, recomputed",
        "own loss, states moved, accumulated",
        "own loss, states moved, accumulated, no sync",
        "own loss, states moved, head trained whole",
    )
}

ZERO: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage} {how}{extra}": {"stage": stage, "how": how, **options}
    for stage, how, extra, options in [
        (1, "loss", "", {}),
        (2, "logps", ", tied", {"tied": True}),
        (2, "loss", ", accumulated", {"accumulate": 2}),
        (3, "logps", "", {}),
        (3, "packed", ", tied", {"tied": True}),
        (3, "logps", ", recomputed", {"mode": "recompute"}),
        (3, "loss", ", a rank without labels", {"labels": 2}),
        (3, "loss", ", accumulated", {"accumulate": 2}),
        (3, "logps", ", partitioned first", {"is_partitioned_first": True}),
        (3, "loss", ", LoRA", {"adapter": "backbone"}),
        (3, "logps", ", LoRA on the head", {"adapter": "head"}),
        (3, "loss", ", LoRA on the head", {"adapter": "head"}),
        (3, "loss", ", head trained whole", {"adapter": "saved"}),
        (3, "lazy", "", {}),
        (3, "lazy", ", tied", {"tied": True}),
        (3, "lazy twice", ", a rank without labels", {"labels": 2}),
        (3, "lazy", ", accumulated", {"accumulate": 2}),
        (3, "lazy", ", partitioned first", {"is_partitioned_first": True}),
        (3, "lazy", ", LoRA", {"adapter": "backbone"}),
        (3, "lazy twice", ", LoRA on the head", {"adapter": "head"}),
        (3, "lazy", ", LoRA on the head alone", {"adapter": "head alone"}),
        (3, "lazy", ", head trained whole", {"adapter": "saved"}),
        (3, "made", "", {}),
    ]
}

VOCABULARY_SHARDS: dict[str, dict[str, Any]] = {
    name: options
    for name, options in [
        ("score", {"size": 61, "how": "logps", "trained": "nothing", "outputs": "lse"}),
        ("stash", {"size": 61, "how": "logps", "mode": "stash", "trained": "hidden"}),
        ("cache, bias and cap", {"size": 67, "how": "logps", "mode": "cache", "bias": True, "softcap": 3.0}),
        ("cache, gradient of lse", {"size": 67, "how": "logps", "mode": "cache", "outputs": "lse"}),
        (
            "recompute, entropy",
            {"size": 61, "how": "logps", "outputs": "lse,entropy", "temperature": 0.8, "softcap": 4.0},
        ),
        ("lean, head trained", {"size": 61, "how": "logps", "mode": "lean", "bias": True}),
        (
            "lean, head frozen",
            {"size": 61, "how": "logps", "mode": "lean", "trained": "hidden", "softcap": 2.0},
        ),
        (
            "statistics",
            {
                "size": 61,
                "how": "logps",
                "mode": "cache",
                "logit_scale": 0.5,
                "outputs": "lse,entropy,log_sum_sq_probs,mean_logit,is_top1",
            },
        ),
        ("rows that predict several tokens", {"size": 61, "how": "layout", "bias": True}),
        ("LoRA on the head", {"size": 61, "how": "logps", "adapter": True, "trained": "hidden"}),
        ("the loss", {"size": 61, "how": "loss"}),
        ("pairs", {"size": 61, "how": "pairs", "mode": "pairs"}),
        (
            "pairs, many groups",
            {"size": 3001, "how": "pairs", "mode": "pairs", "bias": True, "softcap": 3.0, "cache_mib": 1},
        ),
        ("pairs, many chunks", {"size": 3001, "how": "pairs", "mode": "pairs", "workspace_mib": 1}),
        (
            "pairs, a reference's states",
            {"size": 3001, "how": "pairs with states", "mode": "pairs", "cache_mib": 1, "logit_scale": 0.5},
        ),
        ("pairs, the head alone", {"size": 3001, "how": "pairs", "mode": "pairs", "trained": "only head"}),
        ("pairs, answers", {"size": 3001, "how": "answers", "mode": "pairs", "cache_mib": 1}),
        (
            "pairs, fp32",
            {
                "size": 3001,
                "how": "pairs",
                "mode": "pairs",
                "dtype": "float32",
                "softcap": 20.0,
                "cache_mib": 1,
            },
        ),
        (
            "pairs, bf16",
            {
                "size": 3001,
                "how": "pairs",
                "mode": "pairs",
                "dtype": "bfloat16",
                "bias": True,
                "cache_mib": 1,
            },
        ),
        ("the loss, and a reference's states", {"size": 61, "how": "loss with a reference's states"}),
        (
            "fp32",
            {"size": 3001, "how": "logps", "dtype": "float32", "outputs": "lse,entropy", "mode": "cache"},
        ),
        ("fp32, the loss", {"size": 3001, "how": "loss", "dtype": "float32", "bias": True, "softcap": 20.0}),
        ("bf16", {"size": 3001, "how": "logps", "dtype": "bfloat16"}),
        ("bf16, head frozen", {"size": 3001, "how": "logps", "dtype": "bfloat16", "trained": "hidden"}),
    ]
}

# Of two ranks, whose parts are rows 0 to 29 and 30 to 60.
MISTAKES: dict[str, dict[str, Any]] = {
    "overlap": {"starts": (0, 29)},
    "gap": {"starts": (0, 31), "sizes": (30, 30)},
    "too few": {"sizes": (30, 30)},
    "nothing": {"starts": (0, 0), "sizes": (0, 61)},
    "another size": {"second": {"vocab_size": 62}},
    "another scale": {"second": {"logit_scale": 2.0}},
    "a bias": {"second": {"bias": True}},
    "another dtype": {"second": {"dtype": torch.float64}},
    "other labels": {"labels_differ": True, "check_labels": True},
    "a label beyond all": {"beyond": True, "check_labels": True},
    "k alone": {"topk": 3},
    "top-k": {"outputs": ("topk_mass",)},
}

TENSOR_PARALLEL: dict[str, dict[str, Any]] = {
    "log-probabilities": {"how": "logps"},
    "the loss": {"how": "loss"},
    "packed, tied": {"how": "packed", "tied": True},
    "experts": {"how": "loss", "moe": "qwen3_moe"},
    "and FSDP2": {"how": "loss", "data": 2},
    "and FSDP2, tied": {"how": "packed", "data": 2, "tied": True},
    "lazy": {"how": "lazy"},
    "lazy, two looks, tied": {"how": "lazy twice", "tied": True},
    "lazy, and made": {"how": "made"},
    "lazy, statistics": {"how": "statistics"},
    "and FSDP2, lazy": {"how": "lazy", "data": 2},
    "and FSDP2, lazy, made": {"how": "made", "data": 2, "tied": True},
}

# Lazy logits of a head under FSDP2, by the unit of the head; see lazy_run.
LAZY: dict[str, dict[str, Any]] = {
    "two steps": {"unit": "own", "run": "steps"},
    "two steps, tail": {"unit": "tail", "run": "steps"},
    "two steps, root": {"unit": "root", "run": "steps", "tied": True},
    "a reference without the adapter, asked later": {"unit": "own", "run": "reference", "adapter": "head"},
    "masks of which one rank knows the rows": {"unit": "own", "run": "masks"},
    "statistics": {"unit": "own", "run": "statistics"},
    "16 bits": {"unit": "own", "run": "bits"},
    "16 bits, tail": {"unit": "tail", "run": "bits"},
    "kept beyond a step": {"unit": "own", "run": "stale"},
    "kept beyond a step, root": {"unit": "root", "run": "stale"},
    "ranks that ask for different things": {"unit": "own", "run": "different"},
    "a function of its own": {"unit": "own", "run": "function"},
    "in a trainer's method": {"unit": "own", "run": "method"},
    "in a trainer's method, root": {"unit": "root", "run": "method", "adapter": "head"},
    "without gradients": {"unit": "own", "run": "evaluation"},
    "states moved, two steps": {"unit": "own", "run": "steps", "split_head": "states"},
    "states moved, statistics": {"unit": "own", "run": "outputs"},
    "states moved, 16 bits": {"unit": "own", "run": "moved bits"},
    "states of another unit": {"unit": "tail", "run": "refused"},
    "states of LoRA": {"unit": "own", "run": "refused", "adapter": "head"},
    "one rank alone": {"unit": "own", "run": "alone"},  # the last: the others go on without it
}

# Settings of the loop, beside three steps of eight pairs.
LOOP: dict[str, dict[str, Any]] = {
    "copy": {"ref_model": True, "num_eval": 5, "eval_strategy": "steps", "eval_steps": 3},
    "adapter": {"lora": ("q_proj", "v_proj"), "reference": "adapter"},
    "LoRA on the head": {"lora": ("q_proj", "lm_head"), "reference": "adapter"},
    "packed": {"ref_model": True, "batch_layout": "packed"},
    "shared prompts, own copy": {"batch_layout": "shared_prompt", "reference": "copy"},
    "dynamic beta": {"ref_model": True, "dynamic_beta": {"rho": 0.3}},
    "no reference, accumulated": {"loss_type": "simpo"},
    "offloaded": {"loss_type": "simpo", "activation_checkpointing": True, "offload_activations": True},
    "KTO": {"loss_type": "kto", "kind": "unpaired", "num_eval": 5, "eval_strategy": "steps", "eval_steps": 3},
    "lists": {"loss_type": "sdpo", "kind": "listwise", "reference": "copy"},
    "BCO": {"loss_type": "bco", "kind": "unpaired", "ref_model": True},
    "AOT over ranks": {
        "loss_type": "aot",
        "kind": "even",  # pairs of unlike length are ranked alike by two models, by length
        "ref_model": True,
        "gather_batch_losses": True,
        "one_batch": True,
    },
    "TR-DPO, resumed": {
        "ref_model": True,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.3,
        "is_resumed": True,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "TDPO": {
        "loss_type": "tdpo2",
        "ref_model": True,
        "num_eval": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "TDPO, adapter": {"loss_type": "tdpo1", "lora": ("q_proj", "v_proj"), "reference": "adapter"},
    "AlignDistil": {
        "loss_type": "aligndistil",
        "loss_options": {"beta2": 2.0},
        "kind": "prompt-completion",
        "ref_model": True,
        "teacher": True,
        "batch_layout": "packed",
    },
    "precomputed, the largest first": {
        "longest_batch_first": True,
        "reference": "precomputed",
        "num_eval": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "a rank without rows": {"batch_layout": "packed", "num_train": 3, "max_steps": 1, "budget": 24},
    "precomputed, ref_model": {
        "ref_model": True,
        "reference": "precomputed",
        "num_eval": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "by its path": {"by_path": True, "batch_layout": "shared_prompt"},
    "by its path, precomputed": {
        "by_path": True,
        "reference": "precomputed",
        "batch_layout": "packed",
        "num_eval": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "experts": {"experts": "qwen3_moe", "router_aux_loss_coef": 0.3, "loss_type": "simpo"},
    "16 bits": {"ref_model": True, "bf16": True},
    "resumed": {"ref_model": True, "is_resumed": True, "save_strategy": "steps", "save_steps": 2},
}

# The same under tensor parallelism.
TENSOR_LOOP: dict[str, dict[str, Any]] = {
    "copy": {"num_eval": 5, "eval_strategy": "steps", "eval_steps": 3},
    "ref_model, packed": {"ref_model": True, "batch_layout": "packed"},
    "shared prompts": {"ref_model": True, "batch_layout": "shared_prompt"},
    "LoRA": {"lora": ("q_proj", "v_proj"), "reference": "adapter"},
    "precomputed": {"reference": "precomputed", "num_eval": 5, "eval_strategy": "steps", "eval_steps": 3},
    "resumed": {"ref_model": True, "is_resumed": True, "save_strategy": "steps", "save_steps": 2},
    "KTO": {"loss_type": "kto", "kind": "unpaired", "ref_model": True},
    "BCO": {"loss_type": "bco_pair", "ref_model": True},
    "AOT": {"loss_type": "aot", "ref_model": True, "gather_batch_losses": True},
    "dynamic beta": {"ref_model": True, "dynamic_beta": {"rho": 0.3}},
}

# And with rows that are split over ranks.
SEQUENCE_LOOP: dict[str, dict[str, Any]] = {
    "padded": {"num_eval": 5, "eval_strategy": "steps", "eval_steps": 3},
    "packed, LoRA": {"lora": ("q_proj", "lm_head"), "reference": "adapter", "batch_layout": "packed"},
    "shared prompts": {"ref_model": True, "batch_layout": "shared_prompt", "activation_checkpointing": True},
    "ZeRO-2": {"ref_model": True, "engine": "zero2", "batch_layout": "packed"},
    "ZeRO-3": {"ref_model": True, "engine": "zero3", "batch_layout": "shared_prompt"},
    "FSDP2": {"ref_model": True, "engine": "fsdp2"},
    "FSDP2 twice": {"ref_model": True, "engine": "fsdp2", "dp_replicate_size": 2},
    "KTO": {"loss_type": "kto", "kind": "unpaired", "ref_model": True},
    "BCO": {"loss_type": "bco_pair", "ref_model": True},
    "AOT": {"loss_type": "aot", "ref_model": True, "gather_batch_losses": True},
    "dynamic beta": {"ref_model": True, "dynamic_beta": {"rho": 0.3}},
    "precomputed": {"reference": "precomputed", "loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    "resumed": {"ref_model": True, "is_resumed": True, "save_strategy": "steps", "save_steps": 2},
}

# Losses of sequences that are split over ranks, and how their references and tokens are given.
SEQUENCES: dict[str, dict[str, Any]] = {
    "DPO": {"loss_type": "sigmoid", "how": "sums"},
    "DPO, reference per token": {"loss_type": "sigmoid", "how": "tokens"},
    "DPO, weighted": {"loss_type": "sigmoid", "how": "weights"},
    "DPO and NLL": {"loss_type": "sigmoid", "how": "nll"},
    "rows of tokens": {"loss_type": "ipo", "how": "layout"},
    "SimPO": {"loss_type": "simpo", "how": "none"},
    "ORPO": {"loss_type": "orpo", "how": "none"},
    "KTO": {"loss_type": "kto", "how": "sums"},
    "lists": {"loss_type": "sdpo", "how": "sums"},
}

# The unit that TRL's fused head is in under FSDP2.
TRL: dict[str, dict[str, Any]] = {
    f"{unit}, {'patched' if is_patched else 'as it is'}": {"unit": unit, "is_patched": is_patched}
    for unit in ("root", "tail", "own")
    for is_patched in (False, True)
}

# TRL's fused head under ZeRO-3.
TRL_ZERO: dict[str, dict[str, Any]] = {
    "as it is": {"is_patched": False},
    "patched": {"is_patched": True},
    "patched, tied": {"is_patched": True, "tied": True},
    "patched, head frozen": {"is_patched": True, "frozen_head": True},
    "patched, with an entropy": {"is_patched": True, "outputs": ("log_probs", "entropy")},
    "patched, a rank without labels": {"is_patched": True, "labels": 2},
}

# What `fastdpo plan` predicts and ranks count; `tensors` and `data`: ranks of each, without the loop.
MACHINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "ddp, LoRA": {"engine": "ddp", "lora": True},
    "fsdp2": {"engine": "fsdp2"},
    "fsdp2, copy": {"engine": "fsdp2", "reference": "copy"},
    "fsdp2, 16 bits": {"engine": "fsdp2", "bf16": True},
    "fsdp2, LoRA, adapter": {"engine": "fsdp2", "lora": True, "reference": "adapter"},
    "fsdp2, LoRA, copy": {"engine": "fsdp2", "lora": True, "reference": "copy"},
    "hsdp": {"engine": "fsdp2", "replicas": 2, "data": 4},
    "hsdp, copy, 16 bits": {"engine": "fsdp2", "replicas": 2, "data": 4, "reference": "copy", "bf16": True},
    "zero1": {"engine": "zero1"},
    "zero2": {"engine": "zero2"},
    "zero2, 16 bits": {"engine": "zero2", "bf16": True},
    "zero3": {"engine": "zero3"},
    "zero3, copy": {"engine": "zero3", "reference": "copy"},
    "zero3, 16 bits": {"engine": "zero3", "bf16": True},
    "zero3, LoRA": {"engine": "zero3", "lora": True},
    "zero3, small weights whole": {"engine": "zero3", "persistent": 10**5},
    "tp": {"engine": "tp", "tensors": 2, "data": 1},
    "tp and FSDP2": {"engine": "tp", "tensors": 2, "data": 2},
}
