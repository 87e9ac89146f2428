"""What losses carry from step to step: KTO's reference point, BCO's running mean, beta-DPO's beta.

Each is fed once per optimiser step, with numbers of all micro-batches of all ranks in the order of their
rows: then it is the same on every rank, and however a step is cut up. Numbers of a whole step are there
before its first loss only if somebody computes them: mismatched answers take a forward pass of their own
anyway (KTO); the step's own log-probabilities (BCO, beta-DPO) come with the loss where a step is one
micro-batch, and otherwise from a forward pass without gradients ahead of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastdpo.losses.controllers import BetaController, KLEstimate, RunningMean
from fastdpo.training.batches.batch import Batch, mapped
from fastdpo.training.batches.forward import sequence_logps, token_logps
from fastdpo.training.batches.ranks import DataRanks
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.loop.engines import is_split
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig

STATE_FILE = "loss_state.pt"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepValues:
    """What a micro-batch's loss gets.

    Args:
        named: ``kl``, ``reward_shift``: ``()`` each, under the losses' names for them.
        beta, pair_weights, num_pairs: of beta-DPO: ``()``, ``(P,)``, and how many pairs of the step are kept.
    """

    named: Mapping[str, Tensor] = field(default_factory=dict)
    beta: Tensor | None = None
    pair_weights: Tensor | None = None
    num_pairs: int | None = None


# Of a batch, its log-probabilities per token where they are there already, and what the reference has of it.
GetValues: TypeAlias = Callable[[Batch, Tensor | None, Tensor | None], StepValues]


class LossState:
    """The state of a run's losses.

    Args:
        args: the run's settings.
        reference: where its reference log-probabilities come from.
        ranks: those that have batches of their own.
    """

    def __init__(self, args: PreferenceConfig, reference: Reference, ranks: DataRanks) -> None:
        self.reference, self.ranks, self.accelerator = reference, ranks, ranks.accelerator
        needs = {name for spec in args.losses for name in spec.needs}
        self.kl = KLEstimate() if "kl" in needs else None
        self.shift = RunningMean() if "reward_shift" in needs else None
        self.base_beta = next(
            (args.beta or spec.default_beta for spec in args.losses if spec.default_beta is not None), None
        )
        self.betas: BetaController | None = None
        if args.dynamic_beta is not None:
            assert self.base_beta is not None  # the settings have been checked
            options: Any = args.dynamic_beta
            self.betas = BetaController(self.base_beta, seed=args.seed, **options)
        self._training_kl: KLEstimate | None = None
        self._is_waiting = False
        self._queue: deque[StepValues] = deque()

    @property
    def _needs_scores(self) -> bool:
        return self.shift is not None or self.betas is not None

    def begin_step(self, policy: nn.Module, batches: Sequence[Batch]) -> None:
        """Before the first micro-batch of an optimiser step. ``policy`` is not wrapped."""
        self._queue.clear()
        if self.kl is not None:
            self._update_kl(policy, batches)
        self._is_waiting = self._needs_scores and len(batches) == 1
        if self._needs_scores and not self._is_waiting:
            with _evaluating(policy):
                self._take([self._scores_ahead(policy, batch) for batch in batches])

    def values(self, batch: Batch, logps: Tensor | None, ref_logps: Tensor | None) -> StepValues:
        """What the next micro-batch of the step gets, which is ``batch``."""
        if self._is_waiting:
            assert logps is not None  # losses that wait for them are made of them
            self._is_waiting = False
            self._take([self._scores(batch, logps.detach(), ref_logps)])
        return self._queue.popleft() if self._queue else self.frozen(batch, logps, ref_logps)

    def frozen(self, batch: Batch, logps: Tensor | None, ref_logps: Tensor | None) -> StepValues:
        """What evaluation gets: everything as it stands, and every pair with the beta of the settings."""
        device = batch.rows.device
        named = {}
        if self.kl is not None:
            named["kl"] = self.kl.value.to(device)
        if self.shift is not None:
            named["reward_shift"] = self.shift.value.to(device)
        return StepValues(named)

    def begin_evaluation(
        self, policy: nn.Module, dataset: RowDataset, collator: Callable[[list[Any]], Batch], batch_size: int
    ) -> None:
        """Until ``end_evaluation``, KTO's reference point is that of all of ``dataset``."""
        if self.kl is None:
            return
        self._training_kl, self.kl = self.kl, KLEstimate()
        rank, ranks = self.ranks.index, self.ranks.count
        own = range(rank, len(dataset), ranks)
        most = -(-len(dataset) // ranks)  # of any rank
        batches = (
            collator([dataset[i] for i in own[start : start + batch_size]])
            if start < len(own)
            else replace(collator([dataset[0]]), is_filler=True)
            for start in range(0, most, batch_size)
        )
        self._update_kl(policy, batches)

    def end_evaluation(self) -> None:
        """Back to what training has come to."""
        if self._training_kl is not None:
            self.kl, self._training_kl = self._training_kl, None

    @torch.no_grad()
    def _update_kl(self, policy: nn.Module, batches: Any) -> None:
        device = self.accelerator.device
        parts = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
        with _evaluating(policy):
            for batch in batches:
                if batch.is_filler and not is_split(self.accelerator):
                    continue
                # Only what is used goes to the device: the batch itself may be large.
                mismatched = mapped(batch.mismatched, lambda tensor: tensor.to(device))
                reference = self.reference.mismatched_logps(policy, mismatched, batch.ref_mismatched_logps)
                ratios = sequence_logps(policy, mismatched) - reference
                if batch.is_filler:
                    continue
                parts.append(torch.stack([batch.rows.to(device, torch.float64), ratios.double()], 1))
        seen, _ = self._gathered(torch.cat(parts))
        ratios = seen[:, 1].float()
        if bool(ratios.isfinite().all()) and self.kl is not None:
            self.kl.update(ratios, torch.zeros_like(ratios))

    @torch.no_grad()
    def _scores_ahead(self, policy: nn.Module, batch: Batch) -> Tensor:
        if batch.is_filler and not is_split(self.accelerator):
            return torch.zeros(0, 2, dtype=torch.float64, device=self.accelerator.device)
        batch = batch.to(self.accelerator.device)
        return self._scores(batch, token_logps(policy, batch).logps, self.reference.logps(policy, batch))

    @torch.no_grad()
    def _scores(self, batch: Batch, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """``(n, 2)`` fp64: the number of each row, and its log-ratio, or the gap of a pair's two."""
        if batch.is_filler:
            return torch.zeros(0, 2, dtype=torch.float64, device=logps.device)
        ratios = batch.answer_logps(logps).double()
        ratios = ratios if ref_logps is None else ratios - ref_logps
        if self.betas is not None:
            chosen, rejected = ratios.view(2, -1)
            ratios = chosen - rejected
        return torch.stack([batch.rows.to(ratios.device, ratios.dtype), ratios], 1)

    def _take(self, parts: Sequence[Tensor]) -> None:
        """The step's scores are there, those of each micro-batch: make what each of them gets."""
        sizes = [len(part) for part in parts]
        seen, places = self._gathered(torch.cat(list(parts)))
        scores = seen[:, 1]
        if self.shift is not None:
            assert self.base_beta is not None
            self.shift.update(self.base_beta * scores[scores.isfinite()])
            shift = self.shift.value.to(scores.device)
            named = {"reward_shift": shift}
            if self.kl is not None:
                named["kl"] = self.kl.value.to(scores.device)
            self._queue.extend(StepValues(named) for _ in sizes)
        if self.betas is not None:
            # A gap that is not finite makes the step's loss so, which the trainer deals with.
            if not bool(scores.isfinite().all()):
                self._queue.extend(StepValues() for _ in sizes)
                return
            step = self.betas.step(scores)
            own = step.pair_weights[places].float()
            beta = step.beta.float()
            self._queue.extend(StepValues({}, beta, weights, step.num_pairs) for weights in own.split(sizes))

    def _gathered(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, C)`` of all ranks in the order of the first column, and where this rank's rows stand."""
        ranks = self.ranks
        if ranks.count == 1:
            everything, start = own, 0
        else:
            counts = ranks.gathered(torch.tensor([len(own)], device=own.device)).tolist()
            missing = max(counts) - len(own)
            parts = ranks.gathered(torch.cat([own, own.new_zeros(missing, own.shape[1])]))
            parts = parts.view(len(counts), max(counts), own.shape[1])
            everything = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
            start = sum(counts[: ranks.index])
        order = everything[:, 0].argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return everything[order], places[start : start + len(own)]

    # Checkpoints

    def _parts(self) -> dict[str, Any]:
        parts = {"kl": self.kl, "shift": self.shift, "betas": self.betas}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, folder: Path) -> None:
        """Into a checkpoint, by the main process: every rank holds the same."""
        if self._parts() and self.accelerator.is_main_process:
            torch.save({name: part.state_dict() for name, part in self._parts().items()}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        if not self._parts():
            return
        if not (folder / STATE_FILE).exists():
            logger.warning("%s is missing: the losses' running means start anew", folder / STATE_FILE)
            return
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            options = {} if name == "betas" else {"device": self.accelerator.device}
            part.load_state_dict(state[name], **options)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which would also move the random numbers of the step."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
