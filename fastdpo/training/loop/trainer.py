"""``PreferenceTrainer``: preference training on transformers' ``Trainer``, without logits.

What it changes in that loop:

* the batch is pairs (``collate.py``), the policy's forward returns log-probabilities (``patch_model``);
* the loss of a micro-batch is its sum over pairs divided by the number of pairs of the whole
  accumulated batch, over all ranks: the mean is exact, however the batch is cut up. transformers
  divides by labels, which weights pairs by their length;
* metrics have TRL's names and meaning, averaged over every pair (or token) since the last log;
* a resumed run goes on with the sums that its checkpoint cut in two.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from fastdpo.integrations.model import ensure_patched
from fastdpo.integrations.processor import ImageTokens, tokenizer_of
from fastdpo.training.batches.batch import Batch
from fastdpo.training.batches.budget import budget_dataloader
from fastdpo.training.batches.collate import pad_token_id
from fastdpo.training.batches.layouts import choose_collator, like_length_sampler, token_budget
from fastdpo.training.batches.parts import split_sequences
from fastdpo.training.batches.ranks import DataRanks
from fastdpo.training.batches.router import router_coefficient
from fastdpo.training.batches.stream import stream_dataloader
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.model_fit import StreamFit, check_fit
from fastdpo.training.data.rows import is_stream
from fastdpo.training.data.stream import StreamDataset, known_rows, may_have_images
from fastdpo.training.loop.callbacks import CurvesCallback, MetricsFileCallback, TrainerHooks
from fastdpo.training.loop.engines import (
    averaged_ranks,
    on_device,
    settle_engine,
    settle_saving,
    settle_tensors,
    split_frozen,
)
from fastdpo.training.loop.folders import is_unused, start_output_dir
from fastdpo.training.loop.guard import GuardedTrainer
from fastdpo.training.loop.kernels import use_liger
from fastdpo.training.loop.largest_batch import try_before_scoring
from fastdpo.training.loop.loss_state import LossState
from fastdpo.training.loop.lost_ranks import lost_ranks_named
from fastdpo.training.loop.metrics import MetricSums
from fastdpo.training.loop.models import check_trained, load_tokenizer, other_model, prepare_policy
from fastdpo.training.loop.offload import offloaded_activations
from fastdpo.training.loop.over_optimisation import OverOptimisationMonitor
from fastdpo.training.loop.reference_sync import sync_reference
from fastdpo.training.loop.same_run import check_same_ranks
from fastdpo.training.loop.setup import check_machine, check_pairs, find_unused_weights, prepare_pairs
from fastdpo.training.loop.step import (
    BatchCounts,
    batch_loss,
    local_counts,
    record,
    row_rewards,
    with_margins,
)
from fastdpo.training.loop.stream import check_stream_reference, prepare_stream, report_stream
from fastdpo.training.loop.take_over import on_main
from fastdpo.training.reference.precompute import PrecomputedReference
from fastdpo.training.reference.sources import (
    Reference,
    choose_reference,
    is_adapter_model,
    is_fresh_adapter,
    reference_model,
)
from fastdpo.training.reference.teachers import common_vocabulary, prepare_teacher
from fastdpo.training.settings.batches import check_own_collator, check_own_masks
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.engines import check_launched
from fastdpo.training.settings.fields import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE
from fastdpo.training.settings.parallel import check_same_settings
from fastdpo.training.settings.steps import monitor_options
from fastdpo.training.settings.stream import check_no_stream_settings, check_stream_settings

logger = logging.getLogger(__name__)


class PreferenceTrainer(GuardedTrainer):
    """Train a causal LM on preference pairs, or on what other losses take (``kinds.py``).

    Args:
        model: a Hugging Face causal LM, a peft model, or a path or id to load one from; it is patched
            (``patch_model``), which changes none of its other uses.
        args: the settings.
        train_dataset, eval_dataset: whatever ``read_rows`` reads (a path, rows, a ``datasets.Dataset``),
            or a ``RowDataset``; ``eval_dataset`` may be a dict of several. ``train_dataset`` may be a stream
            (``read_rows(..., streaming=True)``, a ``datasets.IterableDataset``), with ``max_steps``.
        processing_class: the model's tokenizer, or a processor that has it; not needed with a path or id as
            ``model``, nor when all data is tokenised already.
        ref_model: the reference, or its path or id, where it is not the policy as it is now; frozen, patched.
        teacher_model: the same of what the losses distil (``aligndistil``: a model trained with DPO).
            The other of AlignDistil's teachers is the reference, or as ``ref_model`` a model trained with
            DPO on swapped pairs.
        peft_config: adds an adapter to ``model``.
        data_collator: makes padded batches in place of ``PaddedCollator``.
        compute_metrics: gets ``predictions`` ``(P, 2)``, the rewards of chosen and rejected (``predict``).
        callbacks, optimizers: as in ``Trainer``.

    Raises:
        ValueError: settings, model, data or reference that do not go together; says which.
    """

    # The loss comes normalised over the whole accumulated batch (transformers >= 5.23 asks this way).
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | nn.Module,
        args: PreferenceConfig,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: str | nn.Module | None = None,
        teacher_model: str | nn.Module | None = None,
        peft_config: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args: got {type(args).__name__}, wanted PreferenceConfig")
        check_launched(args)
        check_same_settings(args)
        if processing_class is None and isinstance(model, str):
            processing_class = load_tokenizer(model, or_processor=True)
        self.args, self._tokenizer = args, tokenizer_of(processing_class)
        self._reads_with = processing_class
        if ref_model is model and not isinstance(model, str):
            raise ValueError(
                "ref_model: got the model that is trained, wanted another, or None for a copy of it"
            )
        if data_collator is not None:
            check_own_collator(args)
        policy = prepare_policy(model, args, peft_config)
        if train_dataset is not None:
            check_trained(policy)
        settle_tensors(args, policy)
        ref_model = other_model("ref_model", ref_model, policy, args)
        teacher_model = other_model("teacher_model", teacher_model, policy, args)
        self.told, self.has_ref_model = {}, ref_model is not None
        if args.learning_rate is None:
            args.learning_rate = ADAPTER_LEARNING_RATE if is_adapter_model(policy) else FULL_LEARNING_RATE
        train_dataset = self._prepare_data(train_dataset, may_stream=True)
        check_own_masks(data_collator, known_rows(train_dataset))
        eval_dataset = self._prepare_data(eval_dataset, may_be_many=True)
        self._has_given_reference = train_dataset is not None and train_dataset.has_reference
        kind = choose_reference(
            args, policy, has_ref_model=ref_model is not None, has_columns=self._has_given_reference
        )
        check_stream_reference(train_dataset, kind)
        find_unused_weights(args, train_dataset)
        ref_model = reference_model(kind, policy, ref_model)
        use_liger(args, policy, ref_model, teacher_model)
        for patched in (policy, ref_model):
            if patched is not None:
                ensure_patched(patched, args.execution())
        self.router = router_coefficient(args, policy)
        monitor = monitor_options(args.over_optimisation_monitor)
        teacher_model = prepare_teacher(args, policy, teacher_model)
        self._owns_output_dir = is_unused(args.output_dir)  # what is in there later on is our own
        saves_all = settle_saving(args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[
                MetricsFileCallback(),
                CurvesCallback(),
                TrainerHooks(self),
                *([] if monitor is None else [OverOptimisationMonitor(**vars(monitor))]),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        args.save_only_model = not saves_all
        check_machine(args)
        settle_engine(args, self.accelerator)
        self.ranks = DataRanks(self.accelerator, args.shared_ranks)
        self.ranks.deal_batches()
        self.model_accepts_loss_kwargs = True  # what transformers < 5.23 reads for loss_is_scaled_for_ga
        self._set_reference(kind, ref_model, teacher_model, data_collator)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._input_tokens = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        self.loss_state = LossState(args, self.reference, self.ranks)

    def _set_reference(
        self, kind: str, ref_model: nn.Module | None, teacher: nn.Module | None, data_collator: Any
    ) -> None:
        is_base = ref_model is None and is_adapter_model(self.model) and is_fresh_adapter(self.model)
        ref_model, teacher = (on_device(self.accelerator, frozen) for frozen in (ref_model, teacher))
        models = [model for model in (self.model, ref_model, teacher) if model is not None]
        size = common_vocabulary(models, self._tokenizer) if self.args.needs_divergences else None
        self._models = {"model": self.model, "ref_model": ref_model, "teacher_model": teacher}
        pairs: Any = known_rows(self.train_dataset)
        for data in (pairs, self.eval_dataset):
            check_fit(data, self._models, self.args)
        self.data_collator = data_collator or choose_collator(
            models, self.args, pad_token_id(self._tokenizer), pairs, self.accelerator,
            ImageTokens.of(self._reads_with),
            has_images=may_have_images(self.train_dataset, self.eval_dataset),
        )  # fmt: skip
        # Only now: before, each rank looks at whole models by itself.
        ref_model, teacher = (split_frozen(self.accelerator, frozen) for frozen in (ref_model, teacher))
        for each in (self.model, ref_model, teacher):
            if each is not None and (self.args.sp_size or 1) > 1:
                split_sequences(each, self.ranks.same)
        self.reference = Reference(kind, ref_model, teacher=teacher, vocab_size=size)
        self._precomputed: PrecomputedReference | None = None
        if kind == "precomputed":
            scorer = self.model if ref_model is None else ref_model
            self._precomputed = PrecomputedReference(
                scorer, self.ranks, self.data_collator, self.args, is_base=is_base
            )

    # Data

    def _prepare_data(self, data: Any, *, may_be_many: bool = False, may_stream: bool = False) -> Any:
        if may_stream and (isinstance(data, StreamDataset) or is_stream(data)):
            return self._prepare_stream(data)
        if may_stream and data is not None:
            check_no_stream_settings(self.args)
        if may_be_many and isinstance(data, Mapping):
            return {name: self._prepare_data(item) for name, item in data.items()}
        dataset = prepare_pairs(data, self._reads_with, self.args, reads_reference=not self.has_ref_model)
        if dataset is not None:
            check_pairs(dataset, self.args)
        if hasattr(self, "_models"):  # data that come after them
            check_fit(dataset, self._models, self.args)
        return dataset

    def _prepare_stream(self, data: Any) -> StreamDataset:
        if not isinstance(data, StreamDataset):
            data = prepare_stream(data, self._reads_with, self.args, reads_reference=not self.has_ref_model)
        check_stream_settings(self.args)
        check_pairs(data.head, self.args)
        dataset: StreamDataset = data
        return dataset

    def _with_reference(self, data: Any) -> Any:
        """``data`` with its precomputed log-probabilities, where the reference is one that needs them."""
        if self._precomputed is None or data is None or isinstance(data, StreamDataset):
            return data
        if isinstance(data, Mapping):
            return {name: self._with_reference(item) for name, item in data.items()}
        if self._has_given_reference and not data.has_reference:
            raise ValueError(
                "eval_dataset: got no reference log-probabilities, wanted them, as the training data has them"
            )
        return self._precomputed.add_to(data)

    def _will_score(self, data: Any) -> bool:
        return self._precomputed is not None and data is not None and not data.has_reference

    def get_train_dataloader(self) -> Any:
        """As ``Trainer.get_train_dataloader``, with batches of so many tokens where the settings say so."""
        budget = token_budget(self.args, self.data_collator)
        if isinstance(self.train_dataset, StreamDataset):
            fit = StreamFit(self._models, self.args)
            return stream_dataloader(self.train_dataset, budget, self.data_collator, self.args, fit)
        if budget is None or self.train_dataset is None:
            return super().get_train_dataloader()
        pairs: Any = self.train_dataset
        return self.accelerator.prepare(budget_dataloader(pairs, budget, self.data_collator, self.args))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, RowDataset):
            return like_length_sampler(dataset, self.args)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)  # rewards come in the order of the pairs

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """As ``Trainer.train``.

        Raises:
            ValueError: the output directory is in use and this run neither resumes nor overwrites it.
            NonFiniteLossError: under ``on_nonfinite_loss="stop"``.
            LostRankError: another rank was killed, or ended with an error; names it.
        """
        with lost_ranks_named(self):
            check_same_ranks(self)
            self.resumed_from = self._find_checkpoint(resume_from_checkpoint)
            if self.resumed_from is None and not self._owns_output_dir:
                on_main(self.accelerator, lambda: start_output_dir(self.args))
            self._owns_output_dir = True
            is_offloaded = self.args.offload_activations
            with offloaded_activations(self.model) if is_offloaded else contextlib.nullcontext():
                if self.args.longest_batch_first and self._will_score(self.train_dataset):
                    try_before_scoring(self)
                self.train_dataset = self._with_reference(self.train_dataset)
                self.eval_dataset = self._with_reference(self.eval_dataset)
                if self._precomputed is not None:
                    self._precomputed.model_will_change()
                output: TrainOutput = super().train(self.resumed_from, trial, ignore_keys_for_eval)
                self.check_gradients()
        report_stream(self.train_dataset)
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of one optimiser step, and what their losses are divided by."""
        batches = list(islice(epoch_iterator, num_batches))
        self._begin_step(batches)
        return batches, self._count(batches)

    def _begin_step(self, batches: list[Batch]) -> None:
        with self.compute_loss_context_manager():
            self.loss_state.begin_step(self.accelerator.unwrap_model(self.model), batches)

    def _count(self, batches: list[Batch]) -> BatchCounts:
        on_prompt = bool(self.args.nll_on_prompt)
        counts = local_counts(batches, self.accelerator.device, nll_on_prompt=on_prompt)
        return BatchCounts(*self._over_ranks(counts).unbind())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss, ``()``; ``num_items_in_batch`` is a ``BatchCounts``."""
        counts = num_items_in_batch
        if not isinstance(counts, BatchCounts):
            self._begin_step([inputs])
            counts = self._count([inputs])
        policy, values = self.accelerator.unwrap_model(model), self.loss_state.values
        result = batch_loss(
            model, policy, inputs, counts, self.args, self.reference, values,
            router=self.router, over_ranks=self.ranks,
        )  # fmt: skip
        if torch.isfinite(result.loss):
            record(self._sums["train"], inputs, result, nll_on_prompt=bool(self.args.nll_on_prompt))
            self._input_tokens += 0 if inputs.is_filler else inputs.sequence_tokens
        else:
            self._report_nonfinite(inputs, result)
        # Gradients are averaged over the ranks, while the counts are sums over them.
        loss = result.loss * (0 if inputs.is_filler else self.ranks.count)
        # Each rank of a sequence has all of its loss, and the gradient of a part.
        parts = averaged_ranks(self.accelerator, self.args) // self.ranks.count
        loss = loss + (parts - 1) * (loss - loss.detach())
        return (loss, {"rewards": row_rewards(inputs, result)}) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Of a step, as ``Trainer`` estimates them: 6 for every weight and token, padding included."""
        weights = self.model.num_parameters(exclude_embeddings=True)
        return int(6 * weights * inputs.positions / self.ranks.shared)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of an optimiser step: ranks that see one batch count once."""
        return int(self._train_batch_size * args.gradient_accumulation_steps * self.ranks.count)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward; a loss that is not finite is logged as 0."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return torch.zeros_like(loss) if self._is_step_bad else loss

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a training log; an evaluation's come with it."""
        if "loss" in logs:
            logs.update(
                with_margins(self._sums["train"].means(self._over_ranks)),
                num_tokens=self._total_input_tokens(),
            )
            self._sums["train"].clear()
        super().log(logs, start_time)

    def _total_input_tokens(self) -> int:
        return int(self._over_ranks(self._input_tokens.clone()))

    def _over_ranks(self, value: Tensor) -> Tensor:
        return self.ranks.total(value)

    def step_ended(self) -> None:
        """After each optimiser step."""
        if isinstance(self.train_dataset, StreamDataset):
            self.state.epoch = self.train_dataset.epoch  # transformers takes all of its steps for one
        sync_reference(self)
