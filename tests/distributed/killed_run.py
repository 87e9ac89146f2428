"""One of several ranks, of which one is lost in the middle of the third step; or that go on afterwards.

python -m tests.distributed.killed_run FOLDER WAY killed|stopped|raised|full|resumed [RANK]

``full``: FOLDER is a small disk, which is filled before the second checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import transformers
from transformers import TrainerCallback

from tests.distributed.loop_run import weights
from tests.distributed.ranks import leave
from tests.distributed.resume_run import make
from tests.faults.conftest import SmallDisk

TIMEOUT = 15


class Lost(TrainerCallback):
    """Between two micro-batches of the third step, when a checkpoint of the second is there."""

    def __init__(self, how: str, rank: str) -> None:
        self.how, self.rank = how, rank

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] != self.rank or state.global_step != 2:
            return
        print("LOST", flush=True)
        if self.how == "full":
            files = Path(args.output_dir, "checkpoint-2").rglob("*")
            size = sum(file.stat().st_size for file in files if file.is_file())
            return SmallDisk(Path(args.output_dir).parent).leave(size // 2)
        if self.how == "raised":
            raise OSError("the disk is full")
        os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)


def main(folder: Path, way: str, how: str, rank: str = "1") -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if way.startswith("zero"):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    trainer = make(folder / way, way, ddp_timeout=TIMEOUT if how == "stopped" else 600)
    if how != "resumed":
        trainer.add_callback(Lost(how, rank))
    trainer.train(resume_from_checkpoint=how == "resumed")
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights(trainer),
    }
    if os.environ["RANK"] == "0":
        torch.save(found, folder / f"{way}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
