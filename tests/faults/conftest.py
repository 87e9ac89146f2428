"""A small disk that can be filled, and the runs whose faults are looked at."""

# ruff: noqa: F401  (fixtures)

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rounds.conftest import here, models
from tests.training.conftest import make_args, make_tokenizer, no_curves, tokenizer, trained_bpe

SIZE = 8 << 20
_PAGE = 4096


class SmallDisk:
    """A disk of 8 MiB of which as much is taken as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def free(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    def leave(self, size: int) -> None:
        """Fill it up to ``size`` bytes, rounded to pages."""
        self.make_room()
        with self._filler.open("wb") as file:
            file.write(bytes(self.free() - size // _PAGE * _PAGE))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounted; skipped where that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["-t", "tmpfs", "-o", f"size={SIZE},mode=1777", "tmpfs", str(folder)]
    for before in ([], ["sudo", "-n"]):
        try:
            subprocess.run([*before, "mount", *words], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            why = error
        else:
            break
    else:
        pytest.skip(f"a small disk cannot be mounted here: {why}")
    yield SmallDisk(folder)
    # Lazily: what a test still holds open may stay.
    subprocess.run([*before, "umount", "--lazy", str(folder)], check=True, timeout=30)
