"""Whether files still are what was written: their sizes, and digests of their bytes.

XXH3 finds what a disk, a copy or an editor changed as fast as files are read, which no digest of the
standard library does; it is no proof against somebody who changes a file and what is told of it. A manifest
says of each file, by its place in a folder, ``[bytes, digest]``.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

Manifest: TypeAlias = Mapping[str, Any]
# Of a file, digested side by side by so many threads. Digests hang on it.
_BLOCK = 64 << 20
_THREADS = 8
_READ_AT_ONCE = 256 << 10
# A disk that does not hold so much is full.
_PROBE = 1 << 20


def describe(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """The manifest of some files of a folder."""
    names = list(names)
    return {
        name: [(folder / name).stat().st_size, digest]
        for name, digest in zip(names, _digests([folder / name for name in names]), strict=True)
    }


def differences(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, str]]:
    """Each file that is there and is not what was written, and in words how it differs.

    Files that are missing are passed over. What a manifest tells as a number alone is a size.
    """
    same: list[tuple[Path, str]] = []
    for name, told in manifest.items():
        size, digest = told if isinstance(told, list) else (told, None)
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size != size:
            yield path, f"has {path.stat().st_size} bytes, wanted the {size} that were written"
        elif digest is not None:
            same.append((path, digest))
    for (path, told), found in zip(same, _digests([path for path, _ in same]), strict=True):
        if found != told:
            yield path, f"has other bytes than the {path.stat().st_size} that were written"


def own_digest(told: Mapping[str, Any]) -> str:
    """Of what a file of JSON tells, so that it can tell this too."""
    import xxhash

    return xxhash.xxh3_128(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Errors of writing a file name it: that of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def placed(path: Path, *, is_shared: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to that is there under its name once it is whole, and else not at all.

    Args:
        is_shared: other runs may write it at the same time.

    Raises:
        OSError: it cannot be written; names it.
    """
    own = f".{uuid.uuid4().hex}" if is_shared else ""
    partial = path.with_name(f"{path.name}{own}.tmp")
    try:
        with errors_named(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_json(path: Path, told: Any) -> None:
    """Write JSON that is there whole or not at all. Raises OSError."""
    with placed(path) as file:
        file.write(json.dumps(told, indent=1).encode())


def no_room(folder: Path) -> str | None:
    """Why a folder takes no further file, in the system's words; None where it takes one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _digests(paths: list[Path]) -> list[str]:
    """Of each file, the digest of the digests of its blocks."""
    import xxhash

    blocks = [
        (place, start) for place, path in enumerate(paths) for start in range(0, path.stat().st_size, _BLOCK)
    ]

    def digest(block: tuple[int, int]) -> bytes:
        place, start = block
        found, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_AT_ONCE))
        with paths[place].open("rb", buffering=0) as file:
            file.seek(start)
            left = _BLOCK
            while left and (count := file.readinto(buffer[:left])):
                found.update(buffer[:count])
                left -= count
        of_block: bytes = found.digest()
        return of_block

    wholes = [xxhash.xxh3_128() for _ in paths]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for (place, _), part in zip(blocks, pool.map(digest, blocks), strict=True):
            wholes[place].update(part)
    return [whole.hexdigest() for whole in wholes]
