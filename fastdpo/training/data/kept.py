"""Tables that are made once, in folders of the cache of ``datasets``, and held to what was written.

Arrow's files have no checksum of their own: a bit that flipped in them would be trained on. One process of a
node makes a table, under the library's lock, and the others find it; what is not finished has another name.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo.training.written import describe, differences, write_json

_MANIFEST = "written.json"
logger = logging.getLogger(__name__)


def kept_table(fingerprint: str, make: Callable[[str], Any]) -> Any:
    """What ``make`` makes in the folder that it is given, or finds there.

    Where a file is not what was written, all is made again, and a line in the log says so.

    Args:
        fingerprint: says all that decides on the table.

    Raises:
        OSError: the manifest cannot be written; and what ``make`` raises.
    """
    from filelock import FileLock

    folder = Path(cache_folder(), "fastdpo-rows", fingerprint)
    folder.parent.mkdir(exist_ok=True)
    lock = FileLock(folder.with_name(f"{fingerprint}.lock"))
    if _difference(folder) is not None:
        with lock:
            # Another process may have made it again meanwhile.
            if (difference := _difference(folder)) is not None:
                logger.warning("%s: it was changed, and is made again", difference)
                # At once: half-removed, without its manifest, it would be believed.
                changed = folder.with_name(f"{fingerprint}.changed")
                shutil.rmtree(changed, ignore_errors=True)
                folder.rename(changed)
                shutil.rmtree(changed)
    made = make(str(folder))
    if not (folder / _MANIFEST).is_file():
        with lock:
            if not (folder / _MANIFEST).is_file():
                write_json(folder / _MANIFEST, describe(folder, _files(folder)))
    return made


def _files(folder: Path) -> list[str]:
    """Of a finished table; a process that died leaves others."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".arrow", ".json")]
    return sorted(path.as_posix() for path in found if ".incomplete" not in str(path))


def _difference(folder: Path) -> str | None:
    """How a table differs from what was written; None also where that is not noted yet."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return None
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        missing = next((name for name in told if not (folder / name).is_file()), None)
        if missing is not None:
            return f"{folder / missing} is missing"
        return next((" ".join(map(str, found)) for found in differences(folder, told)), None)
    except (ValueError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"


def cache_folder() -> str:
    """Where ``datasets`` keeps what it makes; a folder that goes with this process where that cannot be."""
    import datasets

    folder = str(datasets.config.HF_DATASETS_CACHE)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _temporary_folder(f"{folder}: {error.strerror}").name


@functools.cache
def _temporary_folder(why: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="fastdpo-rows-")
    logger.warning("%s: rows are kept in %s while this process runs (HF_DATASETS_CACHE)", why, folder.name)
    return folder
