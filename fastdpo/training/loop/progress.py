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
    }
    (folder / STATE_FILE.format(rank=trainer.accelerator.process_index)).write_text(json.dumps(state))


def load_progress(trainer: BaseTrainer, folder: Path) -> None:
    """At the start of a resumed run: the sums since the last log before the checkpoint."""
    path = folder / STATE_FILE.format(rank=trainer.accelerator.process_index)
    if not path.exists():
        logger.warning("%s is missing: the first log after resuming covers the new steps only", path)
        return
    state: dict[str, Any] = json.loads(path.read_text())
    trainer._sums["train"].load(state["sums"], trainer.accelerator.device)
    trainer._input_tokens.fill_(state["input_tokens"])
    trainer._tr_loss.fill_(state["loss"])
    trainer._globalstep_last_logged = state["last_logged_step"]
    # The summary at the end is about the steps of this call alone.
    trainer._total_loss_scalar -= trainer._over_ranks(trainer._tr_loss.clone()).item() / trainer.ranks.count
