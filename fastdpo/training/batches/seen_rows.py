"""The images of a batch's rows: decoded and processed where the batch is made, each row's once.

In rows without padding an image goes with the tokens that stand for it: those that sequences share are there
once, so the image is too, and is encoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.forest.plant import Tree, plant
from fastdpo.integrations.processor import ImageTokens, SeenImages, joined_inputs
from fastdpo.training.batches.batch import Padded
from fastdpo.training.batches.media import Media
from fastdpo.training.data.images import load_images
from fastdpo.training.data.row import SALT_BITS, Row
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
        if not images:
            return _NOTHING
        if self.tokens is None:
            place = row_of(row.source, row.number)
            raise ValueError(
                f"{place}: got images, which no data had when batch_layout was tried on the model: wanted "
                "such data from the start, or batch_layout='padded' with the model's processor"
            )
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
        parts = [self.of(*one) for one in sequences]
        if self.tokens is None:
            return padded
        inputs = joined_inputs([part.inputs for part in parts])
        sizes = {
            name: tuple(len(part.inputs[name]) if name in part.inputs else 0 for part in parts)
            for name in inputs
        }
        types = {name: self._types(name, parts, padded.input_ids) for name in self.tokens.token_inputs}
        return replace(padded, media=Media(inputs, sizes, types, len(parts)))

    def in_rows(
        self,
        calls: Sequence[Mapping[str, Any]],
        trees_of_calls: Sequence[Sequence[Tree]],
        sequences: Sequence[tuple[Row, int]],
    ) -> tuple[dict[str, Any], ...]:
        """Calls of a backbone with the images of their trees; trees name ``sequences`` by their places."""
        if self.tokens is None:
            for row, answer in sequences:
                self.of(row, answer)  # refuses images
            return tuple(map(dict, calls))
        found = []
        for call, trees in zip(calls, trees_of_calls, strict=True):
            parts = [part for tree in trees for part in self._of_tree(tree, sequences)]
            inputs = dict(call)
            if not parts:
                found.append(inputs)
                continue
            if "forest" not in call:
                del inputs["position_ids"]  # a sequence a row: the model's own, of several dimensions in some
            kinds = {name: {} for name in self.tokens.token_inputs}  # type: dict[str, dict[int, int]]
            for part in parts:
                for name, types in part.types.items():
                    kinds[name].update(types)
            ids = call["input_ids"]
            types_of = {name: types_of_tokens(ids, types) for name, types in kinds.items()}
            found.append({**inputs, **joined_inputs([part.inputs for part in parts]), **types_of})
        return tuple(found)

    def _of_tree(self, tree: Tree, sequences: Sequence[tuple[Row, int]]) -> list[SeenImages]:
        """What stands for a tree's images, in the order of its tokens."""
        assert self.tokens is not None
        places = image_places(tree, self.tokens.ids)
        found = {where[0]: self.of(*sequences[number]) for number, where in places.items()}
        return [found[first] for first in sorted(found)]

    @staticmethod
    def _types(name: str, parts: Sequence[SeenImages], ids: Tensor) -> Tensor:
        rows = zip(ids, parts, strict=True)
        return torch.stack([types_of_tokens(row, part.types.get(name, {})) for row, part in rows])


def types_of_tokens(ids: Tensor, types: Mapping[int, int]) -> Tensor:
    """In the shape of ``ids``: what each of them is, 0 where nothing is said."""
    found = torch.zeros_like(ids)
    for token, kind in types.items():
        found[ids == token] = kind
    return found


def plant_seen(salted: Sequence[tuple[int, Tensor]], image_ids: frozenset[int], **how: Any) -> list[Tree]:
    """The trees of sequences (``row.salted``), in which images are shared whole or not at all."""
    given, found = dict(salted), []
    for tree in plant(salted, **how):
        whole = _unsalted(tree)
        places = set(image_places(whole, image_ids).values())
        if sum(map(len, places)) == len({place for where in places for place in where}):
            found.append(whole)
        else:  # they have the first of several images in common, or the like
            found += [
                _unsalted(one) for number in sorted(tree.ends) for one in plant([(number, given[number])])
            ]
    return found


def image_places(tree: Tree, image_ids: frozenset[int]) -> dict[int, tuple[int, ...]]:
    """Of each of a tree's sequences that has images, where in the tree the tokens of these stand."""
    ids = torch.cat(tree.segments)
    is_image = torch.isin(ids, torch.tensor(sorted(image_ids), dtype=ids.dtype))
    if not is_image.any():
        return {}
    found = {}
    for number, segment in tree.ends.items():
        path = tree.forest.places(segment)
        if where := tuple(path[is_image[path]].tolist()):
            found[number] = where
    return found


def _unsalted(tree: Tree) -> Tree:
    return replace(tree, segments=tuple(ids & ((1 << SALT_BITS) - 1) for ids in tree.segments))
