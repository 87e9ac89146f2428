"""What a checkpoint keeps beside transformers' own state: the sums since the last log, per rank."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fastdpo.training.loop.base import BaseTrainer

STATE_FILE = "preference_state_{rank}.json"
logger = logging.getLogger(__name__)


def save_progress(trainer: BaseTrainer, folder: Path) -> None:
    """Write this rank's part of the progress into a checkpoint."""
    state = {
        "loss": trainer._tr_loss.item(),
        "last_logged_step": trainer._globalstep_last_logged,
        "sums": trainer._sums["train"].state(),
        "input_tokens": trainer._input_tokens.item(),
        "is_first": trainer.ranks.is_first,
    }
    (folder / STATE_FILE.format(rank=trainer.accelerator.process_index)).write_text(json.dumps(state))


def load_progress(trainer: BaseTrainer, folder: Path) -> None:
    """At the start of a resumed run: the sums since the last log before the checkpoint."""
    accelerator = trainer.accelerator
    path = folder / STATE_FILE.format(rank=accelerator.process_index)
    count = len([*folder.glob(STATE_FILE.format(rank="*"))])
    if not count or (count == accelerator.num_processes and not path.exists()):
        logger.warning("%s is missing: the first log after resuming covers the new steps only", path)
        return
    if count == accelerator.num_processes:
        state: dict[str, Any] = json.loads(path.read_text())
    else:
        state = _over(folder, count, trainer.ranks.index == 0)
    trainer._sums["train"].load(state["sums"], trainer.accelerator.device)
    trainer._input_tokens.fill_(state["input_tokens"])
    trainer._tr_loss.fill_(state["loss"])
    trainer._globalstep_last_logged = state["last_logged_step"]
    # The summary at the end is about the steps of this call alone.
    trainer._total_loss_scalar -= trainer._over_ranks(trainer._tr_loss.clone()).item() / trainer.ranks.count


def _over(folder: Path, count: int, is_main: bool) -> dict[str, Any]:
    """The progress of another number of ranks: sums go to the main one, and the mean loss to each."""
    files = [folder / STATE_FILE.format(rank=rank) for rank in range(count)]
    # Of ranks that saw one batch, one.
    states = [state for path in files if (state := json.loads(path.read_text())).get("is_first", True)]
    sums = {
        name: [sum(parts) for parts in zip(*(state["sums"][name] for state in states), strict=True)]
        if is_main
        else [0.0, 0.0]
        for name in states[0]["sums"]
    }
    return {
        "loss": sum(state["loss"] for state in states) / len(states),
        "last_logged_step": states[0]["last_logged_step"],
        "sums": sums,
        "input_tokens": sum(state["input_tokens"] for state in states) if is_main else 0,
    }
