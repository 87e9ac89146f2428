"""Reference log-probabilities scored once, before training, and kept on disk.

An interrupted scoring goes on where it stopped (``reference_shards.py``), with as many ranks as there are.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

import fastdpo
from fastdpo.integrations.engines import engine_around
from fastdpo.integrations.partitioned import gathered_in_calls, is_partitioned
from fastdpo.training.batches.layouts import layout_of, token_budget
from fastdpo.training.batches.ranks import DataRanks
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.model_fit import check_fit
from fastdpo.training.data.row import LD_COLUMN
from fastdpo.training.data.row_numbers import row_list
from fastdpo.training.reference.cache import ReferenceCache, cache_key, fingerprint_model
from fastdpo.training.reference.scoring import score_dataset
from fastdpo.training.reference.shards import ScoreShards
from fastdpo.training.reference.sources import adapter_off, check_weighted_reference
from fastdpo.training.settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


class PrecomputedReference:
    """Adds the reference's log-probabilities to data sets.

    Args:
        model: patched; the reference, or the policy before its first step.
        is_base: the reference is ``model`` with its adapter switched off, which stays what it is
            while the adapter is trained.
        ranks: those that have batches of their own share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: DataRanks,
        collator: Any,
        args: PreferenceConfig,
        *,
        is_base: bool,
    ) -> None:
        self.model, self.ranks, self.collator, self.args = model, ranks, collator, args
        self.accelerator = ranks.accelerator
        self.is_base = is_base
        self._is_stale = False
        self.cache = ReferenceCache(args.reference_cache_dir)
        self._fingerprint: str | None = None

    def model_will_change(self) -> None:
        """Training begins: from now on the model is the reference only without its adapter, or frozen."""
        is_trained = any(parameter.requires_grad for parameter in self.model.parameters())
        self._is_stale = is_trained and not self.is_base

    def add_to(self, dataset: RowDataset) -> RowDataset:
        """``dataset`` with its reference columns: as they are, from the cache, or computed now.

        Raises:
            ValueError: they have to be computed, but the model has been trained meanwhile; or they were
                weighted otherwise than the run's own (LD-DPO).
        """
        if dataset.has_reference:
            check_weighted_reference(dataset, self.args)
            return dataset
        check_fit(dataset, {"model": self.model}, self.args)
        key = self._key(dataset)
        is_main = self.accelerator.is_main_process
        found = [self.cache.load(key, dataset.score_shape) if is_main and key else None]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found)
        scores = found[0] if found[0] is not None else self._compute(dataset, key)
        scored = dataset.with_reference(scores)
        if self.args.ld_alpha is None:
            return scored
        return scored.with_numbers(**{LD_COLUMN: torch.full((len(scored),), float(self.args.ld_alpha))})

    def _key(self, dataset: RowDataset) -> str | None:
        if self._fingerprint is None:
            if self._is_stale:
                return None
            model = self.accelerator.unwrap_model(self.model)
            self._fingerprint = fingerprint_model(model, without_adapter=self.is_base)
        return cache_key(
            {
                "model": self._fingerprint,
                "data": dataset.fingerprint(),
                "backend": self.args.backend,
                "logits_dtype": self.args.logits_dtype,
                "mixed_precision": self.accelerator.mixed_precision,
                "device": self.accelerator.device.type,
                "version": fastdpo.__version__,
                # Rows round otherwise than padded batches do, which scores kept so far are from.
                **({} if (layout := layout_of(self.collator)) == "padded" else {"layout": layout}),
                # Of LD-DPO the scores are weighted sums.
                **({} if self.args.ld_alpha is None else {"ld_alpha": float(self.args.ld_alpha)}),
            }
        )

    def _compute(self, dataset: RowDataset, key: str | None) -> Tensor:
        if key is None or self._is_stale:
            raise ValueError(
                "reference: 'precomputed' cannot score new data once training has begun, as the reference is "
                "the model before it: give the data to the trainer at the start, or a ref_model"
            )
        accelerator = self.accelerator
        shards = self.cache.shards(key, len(dataset))
        with shards:
            scores = self._score(dataset, shards)
        # Every rank has scored its share and left the rest 0.
        scores = self.ranks.first_ones(self.ranks.total(scores.to(accelerator.device))).cpu()
        self._check(scores, dataset, shards)
        if accelerator.is_main_process:
            path = self.cache.save(key, scores)
            logger.info("reference log-probabilities of %d rows kept in %s", len(dataset), path)
            shards.remove()
        return scores

    def _score(self, dataset: RowDataset, shards: ScoreShards) -> Tensor:
        """This rank's share of what no interrupted run has left; on the main process, with what one has."""
        accelerator = self.accelerator
        # Read by one, as ranks on other machines may see another disk: they must agree on what is left.
        kept = shards.load() if accelerator.is_main_process else []
        found = [torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.rows for batch in kept)])]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found)
        is_done = torch.zeros(len(dataset), dtype=torch.bool)
        is_done[found[0]] = True
        if kept:
            logger.info("%d of %d rows were scored by an interrupted run", int(is_done.sum()), len(dataset))
        without_adapter = adapter_off(self.model) if self.is_base else contextlib.nullcontext()
        with accelerator.autocast(), without_adapter, gathered_in_calls(self.model):
            scores = score_dataset(
                self.model,
                dataset,
                self.collator,
                batch_size=self.args.reference_batch_size or self.args.per_device_eval_batch_size,
                budget=token_budget(self.args, self.collator),
                device=accelerator.device,
                rank=self.ranks.index,
                num_ranks=self.ranks.count,
                show_progress=not self.args.disable_tqdm and accelerator.is_main_process,
                is_done=is_done,
                keep=shards.add if self.ranks.is_first else None,
                in_step=engine_around(self.model) is not None or is_partitioned(self.model),
            )
        for batch in kept:
            dataset.put_scores(scores, *batch)
        return scores

    def _check(self, scores: Tensor, dataset: RowDataset, shards: ScoreShards) -> None:
        bad = dataset.rows_not_finite(scores)
        if bad:
            shards.remove()  # nothing of a scoring that failed is built upon
            raise ValueError(f"reference: log-probabilities are not finite in {row_list(bad)}")
