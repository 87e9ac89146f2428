"""The fields of ``PreferenceConfig``, and what they say together. Each is a flag of ``fastdpo train``.

Those of the data are in ``data_fields.py``. Defaults that differ from transformers' are the fields repeated
at the top of the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fastdpo.losses import DivergencePairLogps, LossSpec, find_loss
from fastdpo.losses.token_batches import TokenDivergences
from fastdpo.training.settings.choices import TRAINING_MODES
from fastdpo.training.settings.data_fields import DataSettings
from fastdpo.training.settings.kinds import DataKind, kind_of
from fastdpo.types import BACKENDS, CarriedContext, Execution

FULL_LEARNING_RATE = 1e-6
ADAPTER_LEARNING_RATE = 1e-5


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _choice(text: str) -> dict[str, Any]:
    """Of yes, no or the default: transformers' parser of arguments wants to be told of it."""
    return {"help": text, "nargs": "?", "const": True}


@dataclass
class SettingFields(DataSettings, TrainingArguments):
    """What can be set, unchecked: ``PreferenceConfig`` is it, checked."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata=_help(
            f"Peak learning rate. Default {FULL_LEARNING_RATE:g}, with an adapter {ADAPTER_LEARNING_RATE:g}."
        ),
    )
    num_train_epochs: float = field(
        default=1.0, metadata=_help("Passes over the pairs; preference training overfits from the second on.")
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata=_choice("bfloat16 autocast. Default: on a GPU that has bfloat16, unless fp16 is set."),
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata=_choice("Recompute activations in the backward pass. Default: on a GPU yes, on a CPU no."),
    )
    logging_steps: float = field(
        default=10, metadata=_help("Log every so many steps (a share of all if below 1).")
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Hide non-finite losses in the log; on_nonfinite_loss deals with them.")
    )
    remove_unused_columns: bool = field(default=False, metadata=_help("Must stay False."))
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=_help("Checkpoint to go on from; without a value, or true, the last one in output_dir."),
    )

    loss_type: str | list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata=_help("One loss or several, whose sum is minimised.")
    )
    loss_weights: list[float] | None = field(
        default=None, metadata=_help("A weight per loss of loss_type. Default 1 each.")
    )
    beta: float | None = field(
        default=None, metadata=_help("Strength of the tie to the reference. Default: each loss's own.")
    )
    loss_options: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help("Further options of the losses, as a dict or JSON; each is a flag of its own too."),
    )

    ld_alpha: float | None = field(
        default=None,
        metadata=_help(
            "LD-DPO: weight in [0, 1] of an answer's tokens beyond the shorter answer's length. Default: off."
        ),
    )
    use_weighting: bool = field(
        default=False,
        metadata=_help("WPO: weigh each pair by how close its answers are to the policy's own samples."),
    )
    wpo_max_weight: float | None = field(
        default=None,
        metadata=_help("Bound of WPO's weights: 1 in the authors' code. Default: none, as in TRL."),
    )
    nll_on_prompt: bool | None = field(
        default=None,
        metadata=_choice(
            "NLL terms train on the chosen answers' prompts too. Default: where only orpo has one, as in its "
            "paper's code and TRL."
        ),
    )
    gold_column: str | None = field(
        default=None,
        metadata=_help("Column with the gold answer of tpo's NLL. Default: reference, where rows have it."),
    )
    dynamic_beta: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help(
            "beta-DPO: a beta per step from how far apart its pairs are, and pairs far off left out. A dict "
            "or JSON of alpha, rho, momentum, min_beta, warm_start; {} for their defaults."
        ),
    )
    over_optimisation_monitor: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help("Settings of OverOptimisationMonitor, a dict or JSON; {} adds it with its defaults."),
    )
    gather_batch_losses: bool = field(
        default=False,
        metadata=_help(
            "Losses that compare a whole batch (aot) see the pairs of all ranks while they train; else each "
            "rank sees its own, as in TRL and in evaluations."
        ),
    )

    shuffle_buffer_size: int = field(
        default=1000,
        metadata=_help(
            "Of a stream: rows held, from which chance picks the next one; 0 or 1 for the stream's order."
        ),
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata=_help("Processes that tokenise. Default: one for every few thousand rows, up to the cores."),
    )
    pad_to_multiple_of: int | None = field(default=None, metadata=_help("Pad batches to a multiple of this."))

    batch_layout: str = field(
        default="padded",
        metadata=_help(
            "How pairs become rows: padded (TRL's way), packed (sequences without padding), shared_prompt "
            "(what sequences of a batch begin with once, a prompt and more), or auto, the cheapest of those "
            "that the model computes exactly, which a probe finds out before the first step."
        ),
    )
    row_arrangement: str = field(
        default="auto",
        metadata=_help(
            "Rows of packed and shared_prompt: separate (a call each), bucketed (like lengths together; "
            "packed alone), one_row (one after the other), or auto, by predicted cost."
        ),
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=_help(
            "Tokens in a batch of one device, as the layout has them; pairs are packed into batches up to "
            "it. Takes the place of per_device_train_batch_size and reference_batch_size."
        ),
    )
    context_chunk: int | None = field(
        default=None,
        metadata=_help(
            "Run the backbone over a row so many tokens at a time, forwards and again backwards, and carry "
            "keys and values: activations of so many tokens are alive, however long the context is. For "
            "batch_layout packed, shared_prompt or auto, in place of activation checkpointing."
        ),
    )
    context_device_mib: int | None = field(
        default=None,
        metadata=_help(
            "Of a carried context's keys, values and their gradients, what may lie on the device, in MiB. "
            "Default: all."
        ),
    )
    context_host_mib: int | None = field(
        default=None,
        metadata=_help("Of the others, what may lie in host memory, in MiB. Default: all."),
    )
    context_directory: str | None = field(
        default=None,
        metadata=_help(
            "Of the files that the rest lies in, which have no name while they are used. Default: the "
            "system's."
        ),
    )
    offload_activations: bool = field(
        default=False,
        metadata=_help(
            "Keep the backbone's activations in host memory until its backward pass; with "
            "activation_checkpointing those at its checkpoints. Slower, and the same numbers."
        ),
    )
    longest_batch_first: bool | None = field(
        default=None,
        metadata=_choice(
            "Try the largest batch before the first step, so that a run that does not fit fails at once. "
            "Default: on a GPU yes, on a CPU no."
        ),
    )

    engine: str | None = field(
        default=None,
        metadata=_help(
            "Split the model over the ranks: fsdp2 (torch's), zero2 or zero3 (DeepSpeed's), as fsdp and "
            "fsdp_config, or deepspeed, do in more words. Default: what these or accelerate's file say, else "
            "whole models (DDP)."
        ),
    )

    tp_size: int | None = field(
        default=None,
        metadata=_help(
            "Tensor parallelism: so many ranks share the tensors of every layer and of the head, and see the "
            "same batches; over the other ranks the model is split as by fsdp2. transformers has to have a "
            "plan for the model. Default: what accelerate's file says, else 1."
        ),
    )

    sp_size: int | None = field(
        default=None,
        metadata=_help(
            "Sequence parallelism: so many ranks compute a part of every row each, and see the same batches; "
            "DeepSpeed's Ulysses exchanges what attention sees. With any engine. Default: what accelerate's "
            "file says, else 1."
        ),
    )

    dp_replicate_size: int | None = field(
        default=None,
        metadata=_help(
            "With fsdp2: so many groups of ranks have all of the model, split over the ranks of each (HSDP). "
            "What is gathered stays in a group, as on one machine; gradients are summed over all. Default: "
            "what accelerate's file says, else 1."
        ),
    )

    reference: str = field(
        default="auto",
        metadata=_help(
            "Where reference log-probs come from: copy (a second, frozen model), adapter (the policy with "
            "its adapter switched off), precomputed (scored once before training and cached on disk), none "
            "(for losses without a reference), or auto."
        ),
    )
    sync_ref_model: bool = field(
        default=False,
        metadata=_help("TR-DPO: mix the policy into the reference copy every ref_model_sync_steps steps."),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("The policy's share of the mixture, in (0, 1]; 1 replaces the reference.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("Optimiser steps from one mixing to the next.")
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata=_help("Where precomputed log-probs are kept. Default ~/.cache/fastdpo/reference."),
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata=_help("Pairs per batch while precomputing. Default per_device_eval_batch_size."),
    )
    freeze_vision_tower: bool = field(
        default=False,
        metadata=_help(
            "Of a model of images and text: train nothing of what looks at the images, adapters included."
        ),
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=_help(
            "Weight of the loss that balances a mixture of experts. Default: the model's own; 0 is none."
        ),
    )
    disable_dropout: bool = field(default=True, metadata=_help("Set every dropout of the model to 0."))

    mode: str = field(
        default="auto", metadata=_help(f"How the head runs: one of {', '.join(TRAINING_MODES)}.")
    )
    backend: str = field(
        default="auto", metadata=_help(f"Kernels of the head: one of {', '.join(BACKENDS)}.")
    )
    logits_dtype: str | None = field(
        default=None,
        metadata=_help("fp32 (the default: logits rounded nowhere) or bf16 (less memory traffic)."),
    )
    workspace_mib: int = field(default=512, metadata=_help("Bound on the logits scratch, in MiB."))
    cache_mib: int = field(
        default=1024, metadata=_help("Bound on logit gradients kept for the backward pass, in MiB.")
    )

    on_nonfinite_loss: str = field(
        default="stop",
        metadata=_help("A loss or gradient that is not finite: stop (naming the rows), or skip the step."),
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=_help("Train into a directory in use, removing the last run's checkpoints and metrics."),
    )

    @property
    def losses(self) -> list[LossSpec]:
        """The losses of ``loss_type``, in order."""
        return [find_loss(name) for name in self.loss_type]

    @property
    def options(self) -> dict[str, Any]:
        """``loss_options``, if any."""
        options: Any = self.loss_options
        return options or {}

    @property
    def data_kind(self) -> DataKind:
        """What the losses want of the data."""
        return kind_of(self.losses)

    @property
    def needs_reference(self) -> bool:
        """Whether any loss looks at reference log-probabilities."""
        return any(loss.uses_reference for loss in self.losses)

    @property
    def makes_loss_in_head(self) -> bool:
        """Whether the head's call makes the loss itself, so that a trained head runs in mode ``pairs``.

        So it is where all that losses are told is known before their log-probabilities, of sums over rows.
        """
        waits = self.dynamic_beta is not None or self.gather_batch_losses or self.use_weighting or self.fp16
        waits = waits or any("reward_shift" in spec.needs for spec in self.losses)
        waits = waits or (self.sp_size or 1) > 1 or bool(self.nll_on_prompt and self.batch_layout != "padded")
        is_sum = all(spec.scope in ("pair", "token") for spec in self.losses)
        return is_sum and not waits and not self.needs_divergences

    @property
    def needs_divergences(self) -> bool:
        """Whether the losses look at the reference's distributions, not only at its log-probabilities."""
        return any(loss.inputs in (DivergencePairLogps, TokenDivergences) for loss in self.losses)

    @property
    def shared_ranks(self) -> int:
        """How many neighbouring ranks see one batch."""
        return (self.tp_size or 1) * (self.sp_size or 1)

    @property
    def needs_teacher(self) -> bool:
        """Whether the losses distil a model."""
        return any(loss.inputs is TokenDivergences for loss in self.losses)

    def context(self) -> CarriedContext | None:
        """How the backbone is carried over long contexts, if it is."""
        if self.context_chunk is None:
            return None
        places = (self.context_device_mib, self.context_host_mib, self.context_directory)
        return CarriedContext(self.context_chunk, *places)

    def execution(self) -> Execution:
        """How the head runs."""
        return Execution(
            mode=self.mode,
            backend=self.backend,
            logits_dtype=self.logits_dtype,
            workspace_mib=self.workspace_mib,
            cache_mib=self.cache_mib,
        )
