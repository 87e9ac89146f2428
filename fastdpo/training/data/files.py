"""Which files a name is: one, those of a folder's split, or those that a pattern finds."""

from __future__ import annotations

import glob
from pathlib import Path

from fastdpo.training.data.kept import cache_folder
from fastdpo.training.data.records import COMPRESSIONS, READERS
from fastdpo.training.settings.hub import looks_like_path

_TABLES = (".parquet", ".arrow")
FILE_SUFFIXES = (*READERS, *_TABLES)


def files_of(name: str, split: str) -> list[Path]:
    """The data files that a name stands for, in the order of their names; none where it may be a hub's id.

    Raises:
        ValueError: no such file or folder, a folder without data files or such a split, or a file of others.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, split)
    found = [path] if path.is_file() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    found = sorted(file for file in found if file.is_file())
    if not found and (looks_like_files(name) or path.exists()):
        raise ValueError(f"dataset: no such file or directory: {name}")
    for file in found:
        suffixes(file)
    if found:
        check_no_split(name, split)
    return found


def check_no_split(name: str, split: str) -> None:
    """Raise ValueError for a split of what has none. Those that are the defaults are said of anything."""
    if split not in ("train", "test"):
        raise ValueError(f"dataset_split: got {split!r} of {name}, which has no splits")


def suffixes(path: Path) -> tuple[str, str]:
    """What a file holds, one of ``FILE_SUFFIXES``, and how it is compressed, one of ``COMPRESSIONS``.

    Raises:
        ValueError: its name says neither.
    """
    names = [suffix.lower() for suffix in path.suffixes]
    compression = names.pop() if names and names[-1] in COMPRESSIONS else ""
    suffix = names[-1] if names else ""
    if suffix not in FILE_SUFFIXES or compression and suffix in _TABLES:
        raise ValueError(
            f"dataset: got a file ending in {suffix + compression!r} ({path}), wanted one of "
            f"{', '.join(FILE_SUFFIXES)}, the texts among them also with "
            f"{', '.join(filter(None, COMPRESSIONS))}"
        )
    return suffix, compression


def looks_like_files(name: str) -> bool:
    """Whether a name is that of files, and no id of the hub."""
    is_file = any(suffix in FILE_SUFFIXES for suffix in Path(name.lower()).suffixes[-2:])
    return looks_like_path(name) or is_file or glob.has_magic(name)


def _of_folder(folder: Path, split: str) -> list[Path]:
    """As ``datasets`` finds them: by the names of files and folders, or by what a README says."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), cache_dir=cache_folder())
        files = builder.config.data_files or {}
    except Exception as error:
        raise ValueError(f"dataset: no data files in {folder}: {error}") from error
    if split not in files:
        found = ", ".join(map(str, files))
        raise ValueError(f"dataset: got the splits {found} in {folder}, wanted {split!r}")
    return sorted(Path(file) for file in files[split])
