"""The images of rows: where they stand in a row, how they are read, and what a data set keeps of them.

A data set keeps where in its row an image is, and a digest of its pixels; the row is read again, and the
image decoded, when a batch is made of it. All are read once before, where rows are made into tokens: how many
tokens an image takes is known only then, and a broken one is to be found before training, not in the middle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from torch import Tensor

from fastdpo.training.data.row_numbers import file_of, row_of
from fastdpo.training.data.rows import RowSource
from fastdpo.training.settings.row_checks import BadRow

# Columns of a row's images, and of those that the rejected answer's prompt has in their place.
IMAGES, IMAGE, IMAGES_REJECTED = "images", "image", "images_rejected"
IMAGE_COLUMNS = (IMAGES, IMAGE, IMAGES_REJECTED)
# Keys of a part of a message, or of an image given as an object, that may hold the image itself.
_SOURCES = ("image", "image_url", "url", "path", "bytes", "base64", "data")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


@dataclass(frozen=True)
class ImageRef:
    """An image as a row has it; equal to another of the same value.

    Args:
        value: None where the part of a message only says that there is one, and a column has it.
        path: keys that lead to it in its row.
    """

    value: Any
    path: tuple[str | int, ...] = field(default=(), compare=False)


def ref_of(value: Any, path: tuple[str | int, ...]) -> ImageRef:
    """An image of a row, or of a part of a message that is one. Raises BadRow for what is none."""
    while isinstance(value, Mapping):
        found = [key for key in _SOURCES if value.get(key) is not None]
        # Of an image in a table, its bytes; the path is only what it was called.
        found = ["bytes"] if "bytes" in found else found
        if not found:
            value = None
            break
        value, path = value[found[0]], (*path, found[0])
    if value is not None and not isinstance(value, str | bytes | os.PathLike) and not _is_pil(value):
        raise BadRow("not_image", f"{_named(path)} is {type(value).__name__}")
    return ImageRef(value, path)


def column_refs(row: Mapping[str, Any], name: str) -> list[ImageRef]:
    """The images of a column, which holds one, several or none. Raises BadRow for anything else."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refs = [ref_of(value, (name,))]
    else:
        refs = [ref_of(item, (name, place)) for place, item in enumerate(value)]
    if any(ref.value is None for ref in refs):
        raise BadRow("not_image", f"column {name!r} has an empty one")
    return refs


def row_refs(row: Mapping[str, Any]) -> list[ImageRef]:
    """The images of a row's column ``images``, or ``image``."""
    return column_refs(row, IMAGES) or column_refs(row, IMAGE)


def _named(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _is_pil(value: Any) -> bool:
    return any(
        kind.__module__.startswith("PIL.") and kind.__name__ == "Image" for kind in type(value).__mro__
    )


@dataclass(frozen=True, eq=False)
class RowImage:
    """An image of a row, to be read when it is wanted.

    Args:
        value: as a row has it.
        name: where it is, for messages.
        folder: that paths are relative to.
        digest: of the pixels that were seen when the row was tokenised, or nothing.
    """

    value: Any
    name: str
    folder: Path
    digest: str = ""

    def load(self) -> Any:
        """The image, of PIL: in RGB, turned as it says it is to be.

        Raises:
            BadRow: it is not there, broken, or another than the one that was tokenised.
            ImportError: without Pillow.
        """
        try:
            from PIL import Image
            from transformers.image_utils import load_image
        except ImportError:
            raise ImportError(
                "images need Pillow, which is not installed: pip install 'fastdpo[images]'"
            ) from None
        opened = self._opened()
        try:
            image = load_image(Image.open(opened) if isinstance(opened, Path | io.BytesIO) else opened)
        except FileNotFoundError:
            raise BadRow("image_missing", f"{self.name}: {opened}") from None
        except Exception as error:  # whatever a decoder raises on what is no image of its format
            shown = f" {opened}" if isinstance(opened, Path) else ""
            raise BadRow("image_broken", f"{self.name}:{shown} {error}") from error
        if self.digest and self.digest != pixel_digest(image):
            raise BadRow("image_changed", self.name)
        return image

    @property
    def file(self) -> Path | None:
        """The file that it is in, if it is in one."""
        value = self.value
        if isinstance(value, str) and (value.startswith("data:") or _BASE64.fullmatch(value)):
            return None
        if isinstance(value, str) and "://" in value or str(value).startswith("file:"):
            parts = urlsplit(str(value))
            if parts.scheme != "file":
                raise BadRow("image_remote", f"{self.name}: {value!r:.80}")
            value = url2pathname(parts.path)
        if not isinstance(value, str | os.PathLike):
            return None
        return self.folder / Path(value).expanduser()

    def _opened(self) -> Any:
        file, value = self.file, self.value
        if file is not None:
            return file
        if isinstance(value, str):
            try:
                value = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value)
            except binascii.Error as error:
                raise BadRow("image_broken", f"{self.name}: {error}") from None
        return io.BytesIO(value) if isinstance(value, bytes) else value


def pixel_digest(image: Any) -> str:
    """A short hash of an image's size and pixels."""
    digest = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=8)
    digest.update(image.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageFolders:
    """What paths of images are relative to: the folder given, or that of the file that their row is from."""

    source: str
    given: str | None = None

    def of(self, number: int) -> Path:
        """For a row."""
        if self.given is not None:
            return Path(self.given).expanduser()
        file = Path(file_of(self.source, number)).expanduser()
        return file.parent if file.is_file() else Path()

    def image(self, ref: ImageRef, number: int, digest: str = "") -> RowImage:
        """An image of a row."""
        return RowImage(ref.value, _named(ref.path), self.of(number), digest)

    def state(self, source: RowSource) -> str:
        """Says which images those of some rows are, as far as they are files of columns: a hash of what their
        files' times and sizes are, or that there are none."""
        digest = hashlib.blake2b(digest_size=8)
        for number, row in source:
            for name in IMAGE_COLUMNS:
                try:
                    files = [self.image(ref, number).file for ref in column_refs(row, name)]
                except BadRow:
                    continue
                for file in files:
                    digest.update(_state_of(file))
            for name in ("prompt", "chosen", "rejected", "completion", "completions"):
                for value in _parts_in(row.get(name)):
                    try:
                        digest.update(_state_of(self.image(ref_of(value, ()), number).file))
                    except BadRow:
                        continue
        return digest.hexdigest()


def _parts_in(value: Any) -> list[Any]:
    """Parts of messages that are images, wherever they stand in a column."""
    if isinstance(value, Mapping):
        if isinstance(value.get("type"), str) and "image" in value["type"]:
            return [value]
        return _parts_in(value.get("content"))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [part for item in value for part in _parts_in(item)]
    return []


def _state_of(file: Path | None) -> bytes:
    if file is None:
        return b""
    try:
        found = file.stat()
    except OSError:
        return f"{file} -".encode()
    return f"{file} {found.st_size} {found.st_mtime_ns}".encode()


# What a data set keeps


def told_images(images: Sequence[Sequence[tuple[ImageRef, str]]]) -> str:
    """Of each answer's sequence the images, with their digests, as a table keeps them; empty for none."""
    distinct: dict[tuple[tuple[str | int, ...], str], int] = {}
    of = [[distinct.setdefault((ref.path, digest), len(distinct)) for ref, digest in part] for part in images]
    return json.dumps([list(distinct), of]) if distinct else ""


def images_digest(told: str) -> str:
    """What says which images a row has, wherever they are kept; nothing for none."""
    if not told:
        return ""
    distinct, of = json.loads(told)
    return repr([[distinct[k][1] for k in part] for part in of])


@dataclass(frozen=True, eq=False)
class RowImages:
    """The images of R rows of a data set, read from its source when they are asked for.

    Args:
        source: the rows as they are.
        folders: that paths are relative to.
        texts: what ``told_images`` made of each row that was read, by its place; a column of Arrow.
        entries: ``(R,)`` int64, the places of the rows among them.
        places: ``(R,)`` int64, those of the rows in the source.
    """

    source: RowSource
    folders: ImageFolders
    texts: Any
    entries: Tensor
    places: Tensor

    def __getitem__(self, index: int) -> tuple[tuple[RowImage, ...], ...]:
        """Of each answer's sequence the images, in the order of its text; nothing for a row without any."""
        text = self._text(index)
        if not text:
            return ()
        place = int(self.places[index])
        row, number = self.source.rows[place], self.source.numbers[place]
        distinct, of = json.loads(text)
        images = []
        for path, digest in distinct:
            value: Any = row
            for key in path:
                value = value[key]
            images.append(self.folders.image(ImageRef(value, tuple(path)), number, digest))
        return tuple(tuple(images[k] for k in part) for part in of)

    def _text(self, index: int) -> str:
        text: str = self.texts[int(self.entries[index])].as_py()
        return text

    def digests(self, index: int) -> str:
        """What says which images a row has; nothing for none."""
        return images_digest(self._text(index))

    def subset(self, index: Tensor) -> RowImages:
        """Of some of the rows."""
        return RowImages(self.source, self.folders, self.texts, self.entries[index], self.places[index])


def load_images(images: Sequence[RowImage], source: str, number: int) -> list[Any]:
    """Images of a row, decoded. Raises ValueError, which names the row, for one that cannot be read now."""
    try:
        return [image.load() for image in images]
    except BadRow as bad:
        raise ValueError(f"{row_of(source, number)}: {bad}") from bad
