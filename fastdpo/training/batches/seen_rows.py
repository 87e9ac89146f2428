"""The images of a batch's rows: decoded and processed where the batch is made, each row's once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastdpo.integrations.processor import ImageTokens, SeenImages, joined_inputs
from fastdpo.training.batches.batch import Padded
from fastdpo.training.batches.media import Media
from fastdpo.training.data.images import load_images
from fastdpo.training.data.row import Row
from fastdpo.training.data.row_numbers import row_of

_NOTHING = SeenImages((), {}, {})


@dataclass(eq=False)
class SeenRows:
    """What a processor makes of the images of some rows.

    Args:
        tokens: the processor; None for rows without images.
    """

    tokens: ImageTokens | None
    _seen: dict[tuple[int, tuple[str, ...]], SeenImages] = field(default_factory=dict)

    def of(self, row: Row, answer: int) -> SeenImages:
        """Of one answer's sequence. Raises ValueError, which names the row, where images cannot be read."""
        images = row.images[answer] if row.images else ()
        if not images or self.tokens is None:
            return _NOTHING
        key = (row.number, tuple(image.digest + image.name for image in images))
        if key not in self._seen:
            loaded = load_images(images, row.source, row.number)
            try:
                self._seen[key] = self.tokens.see(loaded)
            except ValueError as error:
                raise ValueError(f"{row_of(row.source, row.number)}: an image: {error}") from None
        return self._seen[key]

    def beside(self, padded: Padded, sequences: Sequence[tuple[Row, int]]) -> Padded:
        """Padded sequences with their images; ``sequences`` are their rows and answers."""
        if self.tokens is None:
            return padded
        parts = [self.of(*one) for one in sequences]
        inputs = joined_inputs([part.inputs for part in parts])
        sizes = {
            name: tuple(len(part.inputs[name]) if name in part.inputs else 0 for part in parts)
            for name in inputs
        }
        types = {name: self._types(name, parts, padded.input_ids) for name in self.tokens.token_inputs}
        return replace(padded, media=Media(inputs, sizes, types, len(parts)))

    @staticmethod
    def _types(name: str, parts: Sequence[SeenImages], ids: Tensor) -> Tensor:
        found = torch.zeros_like(ids)
        for place, part in enumerate(parts):
            for token, kind in part.types.get(name, {}).items():
                found[place, ids[place] == token] = kind
        return found
