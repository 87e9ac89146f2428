"""Rows with images: their texts with what a processor puts in the places of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os.path import commonprefix
from typing import Any

from fastdpo.integrations.processor import ImageTokens, SeenImages
from fastdpo.training.data.images import ImageFolders, ImageRef, pixel_digest
from fastdpo.training.data.texts import RowTexts
from fastdpo.training.settings.row_checks import BadRow


@dataclass
class ImageReader:
    """Reads the images of rows, and puts what they take into their texts.

    Args:
        tokens: the processor.
        folders: that paths are relative to.
    """

    tokens: ImageTokens
    folders: ImageFolders
    _is_proven: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._count = lru_cache(4096)(self._count_in)

    def read(self, texts: RowTexts) -> RowTexts:
        """A row's texts with its images in them, and with their digests.

        Raises:
            BadRow: an image that is not there, broken or refused, or not as many as there are places.
        """
        if not any(texts.images):
            return texts
        loaded: dict[int, Any] = {}
        seen: dict[tuple[int, ...], SeenImages] = {}
        per_answer: list[SeenImages] = []
        for refs in texts.images:
            for ref in refs:
                if id(ref) not in loaded:
                    loaded[id(ref)] = self.folders.image(ref, texts.row).load()
            key = tuple(map(id, refs))
            if key not in seen:
                seen[key] = self._see([loaded[place] for place in key])
            per_answer.append(seen[key])
        digests = {place: pixel_digest(image) for place, image in loaded.items()}
        return self._put(texts, per_answer, loaded, digests)

    def _see(self, images: Sequence[Any]) -> SeenImages:
        if not images:
            return SeenImages((), {}, {})
        try:
            return self.tokens.see(images)
        except ValueError as error:
            raise BadRow("image_refused", str(error)) from None

    def _put(
        self, texts: RowTexts, seen: Sequence[SeenImages], loaded: dict[int, Any], digests: dict[int, str]
    ) -> RowTexts:
        answers, cuts, counts, prompts = [], [], [], []
        for place, (answer, refs, found) in enumerate(zip(texts.answers, texts.images, seen, strict=True)):
            whole = self._replaced(answer, found.texts, of=len(refs))
            if not self._is_proven and refs:
                self._is_proven = True
                self.tokens.prove(answer, [loaded[id(ref)] for ref in refs], whole, found.types)
            start = self._replaced(commonprefix([texts.prompt, answer]), found.texts)
            own = [self._replaced(cut, found.texts) for cut in texts.cuts[place]] if texts.cuts else []
            prompts.append(self._replaced(texts.prompt, found.texts))
            answers.append(whole)
            cuts.append(tuple(self._without_images(answer, start, found, own)))
            counts.append(sum(map(self._count, found.texts)))
        if len(set(prompts)) > 1:
            # An answer's prompt is then partly its own, behind what all have in common; it is not scored.
            for place, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
                cuts[place] = cuts[place] or (commonprefix([prompt, answer]), answer)
        return replace(
            texts,
            prompt=prompts[0],
            answers=tuple(answers),
            cuts=tuple(cuts),
            digests=tuple(tuple(digests[id(ref)] for ref in refs) for refs in texts.images),
            image_tokens=tuple(counts),
        )

    def _replaced(self, text: str, expansions: Sequence[str], of: int | None = None) -> str:
        """A text with its images, the first ones of some; ``of``: it must have so many."""
        first, *others = text.split(self.tokens.placeholder)
        if of is not None and len(others) != of:
            raise BadRow(
                "image_places", f"{of} images for {len(others)} places in what is rendered of the row"
            )
        return first + "".join(image + other for image, other in zip(expansions, others, strict=False))

    def _without_images(self, answer: str, start: str, found: SeenImages, own: Sequence[str]) -> list[str]:
        """The cuts of an answer, or, of one with images, those that leave its images out."""
        texts, cuts, at = answer.split(self.tokens.placeholder), [], ""
        for text, image in zip(texts, (*found.texts, ""), strict=True):
            at += text
            if image and len(at) >= len(start):
                cuts += [at, at + image]
            at += image
        if not cuts:
            return list(own)
        if len(own) % 2:  # ends of pieces, not of turns
            raise BadRow("image_places", "an answer in pieces has images")
        spans = list(zip(own[::2], own[1::2], strict=True)) or [(start, at)]
        bounds = []
        for begin, end in spans:
            inside = [cut for cut in cuts if len(begin) <= len(cut) <= len(end)]
            bounds += [begin, *inside, end]
        return bounds

    def _count_in(self, text: str) -> int:
        return self.tokens.count(self.tokens.tokenizer(text, add_special_tokens=False)["input_ids"])


def told_refs(texts: RowTexts) -> list[list[tuple[ImageRef, str]]]:
    """Of each answer's sequence the images, with their digests."""
    return [
        list(zip(refs, digests, strict=True))
        for refs, digests in zip(texts.images, texts.digests, strict=True)
    ]
