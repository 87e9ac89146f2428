"""``PreferenceTrainer`` that is stopped after a checkpoint, and one that goes on from it, elsewhere perhaps.

python -m tests.distributed.resume_run FOLDER save WAY...       # one of `make`, or alone
python -m tests.distributed.resume_run FOLDER resume FROM:TO...
python -m tests.distributed.resume_run FOLDER differ SETTING...    # or data
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.distributed.loop_run import StopAfterSaving, weights
from tests.distributed.ranks import leave
from tests.training.conftest import tiny_llama
from tests.training.loop.ddp_run import pairs

ADAPTED = " adapted"


def make(folder: Path, way: str, **changes: Any) -> PreferenceTrainer:
    """Four steps of eight pairs, a checkpoint after the second; ``way``: an engine, and what it trains.

    ddp, fsdp2, sharded (FSDP2's state dicts), hsdp, sharded hsdp, zero2, zero3.
    """
    from peft import LoraConfig

    engine = way.removesuffix(ADAPTED)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    how: dict[str, Any] = {"engine": engine} if engine not in ("alone", "ddp") else {}
    if engine.startswith("sharded"):
        how = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    if engine.endswith("hsdp"):
        how = (
            {"engine": "fsdp2", "dp_replicate_size": 2}
            if engine == "hsdp"
            else {**how, "dp_replicate_size": 2}
        )
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "ddp_backend": "gloo" if ranks > 1 else None,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // ranks,
        "loss_type": ["sigmoid", "sft"],
        "reference": "adapter" if way.endswith(ADAPTED) else "copy",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 3,  # a checkpoint between two logs
        "longest_batch_first": False,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 1,
        **how,
        **changes,
    }
    args = PreferenceConfig(**settings)
    if engine not in ("alone", "ddp"):
        args.device  # noqa: B018  makes the state, which has these engines on GPUs only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
        AcceleratorState._shared_state.clear()
    torch.manual_seed(7)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    return PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=pairs(40, 0),
        peft_config=adapter if way.endswith(ADAPTED) else None,
    )


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def save(folder: Path, way: str) -> None:
    trainer = make(folder / way, way)
    trainer.add_callback(StopAfterSaving())
    trainer.train()


def resume(folder: Path, way: str, **changes: Any) -> dict[str, Any]:
    """``way``: FROM:TO. What the run that goes on logs, its weights, and what it says."""
    source, target = way.split(":")
    place = folder / way.replace(":", " to ")
    trainer = make(place, target, **changes)
    heard = Heard()
    logging.getLogger("fastdpo").addHandler(heard)
    logging.getLogger("fastdpo").setLevel(logging.INFO)
    trainer.train(resume_from_checkpoint=str(folder / source / "checkpoint-2"))
    logging.getLogger("fastdpo").removeHandler(heard)
    trainer.save_model(str(place / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": weights(trainer), "said": heard.lines}


def whole(folder: Path, way: str) -> dict[str, Any]:
    """The same run, not stopped."""
    trainer = make(folder, way, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": weights(trainer)}


def differ(folder: Path, way: str) -> str:
    """What a rank is told where the second one has another setting, or other rows."""
    changes: dict[str, Any] = {}
    if os.environ["RANK"] == "1" and way != "data":
        changes = {way: {"learning_rate": 2e-3, "beta": 0.3, "max_steps": 9, "data_seed": 5}[way]}
    trainer = make(folder / way, "ddp", **changes)
    if os.environ["RANK"] == "1" and way == "data":
        trainer.train_dataset = pairs(40, 3)
    try:
        trainer.train()
    except ValueError as error:
        print(f"{way}: {error}", flush=True)
    return ""


def main(folder: Path, what: str, ways: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if any("zero" in way for way in ways):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    for way in ways:
        try:
            found: Any = {"save": save, "resume": resume, "differ": differ}[what](folder, way)
        except Exception:
            found = traceback.format_exc()[-3000:]
            print(what, way, found, flush=True)
        if int(os.environ.get("RANK", "0")) == 0 and found is not None:
            torch.save(found, folder / f"{way.replace(':', ' to ')}.pt")
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
