"""Where a run writes, and what it goes on from."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from fastdpo.training.loop.callbacks import METRICS_FILE
from fastdpo.training.loop.checkpoint_files import RUN_FILE
from fastdpo.training.loop.curves import CURVES_FILE
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.written import no_room

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def find_checkpoint(args: PreferenceConfig, resume: str | bool | None) -> str | None:
    """The checkpoint to resume from: a path, the last one in the output directory for True, or None.

    Raises:
        ValueError: there is none, or none that was written to its end.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() != "true":
        folder = Path(str(resume)).expanduser()
        inside = _checkpoints(folder)
        if inside:
            raise ValueError(
                f"resume_from_checkpoint: got {resume}, wanted a checkpoint in it, as {inside[0]}"
            )
        if not is_whole(folder):
            last = RUN_FILE if (folder / TRAINER_STATE_NAME).is_file() else TRAINER_STATE_NAME
            what = f"which has no {last}" if folder.is_dir() else "and there is no such folder"
            raise ValueError(f"resume_from_checkpoint: got {resume}, {what}, wanted a checkpoint's folder")
        return str(folder)
    found = _checkpoints(Path(args.output_dir or "."))
    whole = [folder for folder in found if is_whole(folder)]
    if not whole:
        raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {args.output_dir}")
    return str(whole[0])


def warn_of_unfinished(args: PreferenceConfig, checkpoint: Path) -> None:
    """Log which checkpoint behind the one that a run goes on from was not written to its end."""
    later = [folder for folder in _checkpoints(Path(args.output_dir or ".")) if not is_whole(folder)]
    if later and checkpoint.parent == later[0].parent:
        logger.warning("%s was not written to its end", later[0])


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output directory, the last one first."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    steps = {entry: match for entry in entries if (match := _CHECKPOINT.fullmatch(entry.name)) is not None}
    return sorted(steps, key=lambda entry: -int(steps[entry][1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether transformers' last file is there, and ours, unless none of ours is: then it is another's."""
    is_ours = any(checkpoint.glob("preference_state_*.json"))
    return (checkpoint / TRAINER_STATE_NAME).is_file() and (not is_ours or (checkpoint / RUN_FILE).is_file())


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint, if there is one. What a process that dies meanwhile leaves of it is none."""
    if not checkpoint.is_dir():
        return
    for last in (RUN_FILE, TRAINER_STATE_NAME):
        (checkpoint / last).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path, limit: int | None, *spared: str | Path | None) -> None:
    """Remove the oldest checkpoints of a directory beyond ``save_total_limit``, unfinished ones first.

    Args:
        spared: that stay: the one just written, and the best.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(path).absolute() for path in spared if path is not None}
    others = [found for found in _checkpoints(folder) if found.absolute() not in kept]
    others.sort(key=lambda found: (is_whole(found), found.stat().st_mtime))
    surplus = len(others) + len(kept) - max(limit, len(kept))
    for checkpoint in others[: max(surplus, 0)]:
        forget(checkpoint)


@contextmanager
def full_disk_named(folder: Path, what: str) -> Iterator[None]:
    """Libraries say of a full disk that a position is not what they expected.

    Raises:
        OSError: where nothing more can be written: says so, and what to go on from.
    """
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        standing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        why = no_room(standing)
        if why is None:
            raise
        left = [found for found in _checkpoints(folder.parent) + _checkpoints(folder) if is_whole(found)]
        then = f", from {left[0]}" if left else ""
        raise OSError(
            f"{folder}: {what} was not written to its end: {why}; make room, and go on with "
            f"resume_from_checkpoint=True{then}"
        ) from error


def is_unused(output_dir: str | None) -> bool:
    """Whether a directory does not exist or is empty."""
    path = Path(output_dir or ".")
    return not path.is_dir() or not any(path.iterdir())


def check_output_dir(args: PreferenceConfig) -> None:
    """Make sure that a run can be written, and mixes with no other, or goes on. Nothing is made.

    Raises:
        ValueError: it is no directory, or one that cannot be written; or it has content, and the run neither
            resumes nor overwrites; or there is no checkpoint to go on from.
    """
    path = Path(args.output_dir or ".").absolute()
    standing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not standing.is_dir():
        raise ValueError(f"output_dir: got {args.output_dir}, wanted a directory: {standing} is a file")
    if not os.access(standing, os.W_OK):
        raise ValueError(
            f"output_dir: got {args.output_dir}, wanted one to write to: {standing} is read-only"
        )
    if not (is_unused(args.output_dir) or args.overwrite_output_dir or args.resume_from_checkpoint):
        raise ValueError(
            f"output_dir: {args.output_dir} is in use: choose another, continue that run with "
            "resume_from_checkpoint=True, or replace it with overwrite_output_dir=True"
        )
    find_checkpoint(args, args.resume_from_checkpoint)


def start_output_dir(args: PreferenceConfig) -> None:
    """Make room for a run that begins. Raises ValueError as ``check_output_dir``."""
    check_output_dir(args)
    clear_output_dir(args)


def clear_output_dir(args: PreferenceConfig) -> None:
    """Remove the checkpoints and metrics that another run left."""
    path = Path(args.output_dir or ".")
    for entry in path.iterdir() if path.exists() else ():
        if entry.is_dir() and _CHECKPOINT.fullmatch(entry.name):
            forget(entry)
        elif entry.name in (METRICS_FILE, CURVES_FILE):
            entry.unlink()
