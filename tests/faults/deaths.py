"""Runs in processes of their own that die by SIGKILL at a planted point, half-way through what they write.

Processes are forked from one that has imported everything and computed nothing, so each is over in seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Action = Callable[[str, str, bool], None]
# What a process is killed in: the function by its module; how many of its calls come to their end, or the
# name of a file that it is given; and what has been done of it by then.
DEATHS: dict[str, tuple[str, int | str, str]] = {
    "in a backward pass": ("fastdpo.training.loop.trainer:PreferenceTrainer.training_step", 3, "before"),
    "in the optimiser's step": ("torch.optim:AdamW.step", 3, "after"),
    "in the log": ("fastdpo.training.loop.callbacks:MetricsFileCallback.on_log", 3, "torn"),
    "checkpoint begun": ("fastdpo.training.loop.saving:save_progress", 1, "before"),
    "weights half-written": ("transformers:PreTrainedModel.save_pretrained", 1, "torn"),
    "optimiser half-written": ("torch:save", 5, "torn"),
    "before the last file": ("fastdpo.training.loop.saving:write_run", 1, "before"),
    "last file not in its place": ("pathlib:Path.replace", "checkpoint-4/preference_run.json", "before"),
    "an earlier one half-removed": ("shutil:rmtree", "checkpoint-2", "half-removed"),
    "a batch scored": ("fastdpo.training.reference.scoring:batch_scores", 3, "after"),
    "scores half-written": ("numpy:savez", 2, "torn"),
    "scored rows half-written": ("pathlib:Path.replace", "scored.jsonl", "before"),
}


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(name: str) -> None:
    """Have this process die there."""
    import importlib

    place, calls, how = DEATHS[name]
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parts, last = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    plain, count = getattr(owner, last), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if isinstance(calls, str):
            is_over = any(str(argument).endswith(calls) for argument in args)
        else:
            count, is_over = count + 1, count == calls
        if not is_over:
            return plain(*args, **kwargs)
        if how == "half-removed":
            for file in sorted(Path(args[0]).iterdir())[::2]:
                file.unlink()
        elif how != "before":
            plain(*args, **kwargs)
        if how == "torn":
            tear(written_by(last, args))
        killed()

    setattr(owner, last, call)


def written_by(name: str, args: Any) -> Path:
    """The file that a call wrote."""
    if name == "on_log":
        return Path(args[1].output_dir, "metrics.jsonl")
    if name == "save_pretrained":
        return Path(args[1], "model.safetensors")
    if name == "savez":
        args[0].flush()
        return Path(args[0].name)
    return Path(args[1])


def tear(path: Path) -> None:
    """As a process leaves a file that dies half-way through the last of it."""
    os.truncate(path, path.stat().st_size - min(path.stat().st_size // 2, 100_000))


def train(folder: str, bpe: str, resume: bool) -> None:
    """Six steps with dropout and checkpoints at every second one, of which the last stays."""
    from safetensors.torch import save_file

    from fastdpo.training.loop.trainer import PreferenceTrainer
    from tests.training.conftest import made_tokenizer, make_rows, quick_args, tiny_llama

    args = quick_args(
        Path(folder, "run"), save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=6,
        disable_dropout=False, resume_from_checkpoint="true" if resume else None,
    )  # fmt: skip
    model = tiny_llama(attention_dropout=0.2)
    trainer = PreferenceTrainer(
        model, args, train_dataset=make_rows(20), processing_class=made_tokenizer(bpe)
    )
    trainer.train()
    save_file(dict(trainer.model.state_dict()), Path(folder, "end.safetensors"))
    Path(folder, "resumed.json").write_text(json.dumps(trainer.resumed_from))


def score(folder: str, bpe: str, resume: bool) -> None:
    """``fastdpo score``, whose scores are kept batch by batch."""
    from fastdpo.cli import main
    from fastdpo.training.reference import shards

    shards.FLUSH_SECONDS = 0.0
    os.chdir(folder)
    words = (
        "score --model model --dataset rows.jsonl --output scored.jsonl --reference_cache_dir cache "
        "--per_device_eval_batch_size 4 --use_cpu --disable_tqdm"
    )
    assert main(words.split()) == 0


def ended(action: Action, folder: Path, bpe: str, death: str = "") -> int | None:
    """How a process ended that did it, or goes on with it: its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    process = context.Process(target=_run, args=(action, str(folder), bpe, death))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _run(action: Action, folder: str, bpe: str, death: str) -> None:
    import logging

    import torch

    torch.set_num_threads(1)
    resume = Path(folder, "run").is_dir()
    log = open(Path(folder, "log.txt"), "a")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(stream=log)
    from fastdpo.training.loop import callbacks

    callbacks.draw_curves = lambda *_: True  # type: ignore[assignment]
    if death:
        plant(death)
    action(folder, bpe, resume)
