"""A vision-language model's processor: what it makes of images, and of their places in a text.

An image stands in a text as a *placeholder*, which the processor replaces by as many tokens as the model has
features of it, with whatever goes around them. That is done by the processor itself, of any family: it is
called with placeholders alone, and what it hands to its tokenizer are the replacements. That texts with these
in place of placeholders have the tokens that the processor makes of the whole is proven on data
(``ImageTokens.prove``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.lm_head import unwrap

# Between placeholders: no replacement has it.
_BETWEEN = "\x1f"
_OF_TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class SeenImages:
    """What a processor makes of the images of one sequence.

    Args:
        texts: what stands in the place of each image.
        inputs: of the model: pixels, sizes, masks ...; the images of further sequences go behind them, in
            dimension 0.
        types: of names of inputs per token, the value that they have for each token id of an image; 0 for all
            others.
    """

    texts: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    types: Mapping[str, Mapping[int, int]]


class ImageTokens:
    """Images through a processor of transformers.

    Args:
        processor: with an image processor and a tokenizer.

    Raises:
        ValueError: no placeholder that it replaces is known.
        ImportError: it lacks a library.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholder = self._find_placeholder()

    @classmethod
    def of(cls, processing_class: Any, *, must_see: bool = False) -> ImageTokens | None:
        """Of a processor with an image processor; None of a tokenizer, and of what is not understood.

        Raises:
            ValueError: it is not understood, and ``must_see``.
        """
        has_eyes = getattr(processing_class, "image_processor", None) is not None
        if not has_eyes or not hasattr(processing_class, "tokenizer"):
            return None
        try:
            return cls(processing_class)
        except (ValueError, ImportError):
            if must_see:
                raise
            return None

    def _find_placeholder(self) -> str:
        error: Exception | None = None
        found = (getattr(self.processor, name, None) for name in ("image_token", "boi_token"))
        for placeholder in dict.fromkeys(found):
            if not isinstance(placeholder, str):
                continue
            try:
                self._see([_grey()], placeholder)
            except ImportError:
                raise
            except Exception as raised:  # whatever a processor raises on a text that it has no use for
                error = raised
                continue
            return placeholder
        kind = type(self.processor).__name__
        raise ValueError(
            f"processing_class: got a {kind}, which replaces no placeholder of an image that is known here"
            + (f" ({type(error).__name__}: {error})" if error else "")
        )

    def see(self, images: Sequence[Any]) -> SeenImages:
        """What the processor makes of the images (of PIL) of one sequence, in the order of its text.

        Raises:
            ValueError: the processor refuses them; says what it said.
        """
        try:
            return self._see(images, self.placeholder)
        except ImportError:
            raise
        except Exception as error:  # whatever a processor raises on an image
            raise ValueError(f"the processor refuses it ({type(error).__name__}: {error})") from error

    def _see(self, images: Sequence[Any], placeholder: str) -> SeenImages:
        listener = copy.copy(self.processor)
        heard: list[str] = []
        listener.tokenizer = _Listening(self.tokenizer, heard)
        made = listener(
            text=[_BETWEEN.join([placeholder] * len(images))],
            images=[list(images)],
            add_special_tokens=False,
            return_tensors="pt",
        )
        texts = heard[-1].split(_BETWEEN) if heard else []
        if len(texts) != len(images):
            raise ValueError(f"got {len(texts)} replacements of {len(images)} placeholders")
        ids = made["input_ids"]
        of_tokens = {name for name in made if "token" in name and made[name].shape == ids.shape}
        types = {
            name: {
                token: kind
                for token, kind in zip(ids[0].tolist(), made[name][0].tolist(), strict=True)
                if kind
            }
            for name in sorted(of_tokens - {*_OF_TEXT})
        }  # fmt: skip
        inputs = {name: value for name, value in made.items() if name not in {*of_tokens, *_OF_TEXT}}
        return SeenImages(
            tuple(texts), {name: torch.as_tensor(value) for name, value in inputs.items()}, types
        )

    @cached_property
    def ids(self) -> frozenset[int]:
        """Token ids that features of images take the place of."""
        seen = self._see([_grey()], self.placeholder)
        used = set(self.tokenizer(seen.texts[0], add_special_tokens=False)["input_ids"])
        named = {getattr(part, "image_token_id", None) for part in (self.processor, self.tokenizer)}
        found = used & {*named, *getattr(self.processor, "image_token_ids", ())}
        if not found:
            raise ValueError(f"{type(self.processor).__name__}: no token id of images among {sorted(used)}")
        return frozenset(found)

    @cached_property
    def token_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a model has per token beside ids and mask."""
        return tuple(self._see([_grey()], self.placeholder).types)

    def count(self, ids: Sequence[int]) -> int:
        """Tokens of images among some."""
        return sum(map(self.ids.__contains__, ids))

    def prove(
        self, text: str, images: Sequence[Any], expanded: str, types: Mapping[str, Mapping[int, int]]
    ) -> None:
        """Hold a text with replacements to what the processor makes of the text with placeholders.

        Raises:
            ValueError: it makes other tokens, or other inputs per token.
        """
        whole = self.processor(
            text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt"
        )
        ids = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        alike = whole["input_ids"][0].tolist() == list(ids) and all(
            whole[name][0].tolist() == [kinds.get(token, 0) for token in ids] for name, kinds in types.items()
        )
        if not alike:
            raise ValueError(
                f"processing_class: a {type(self.processor).__name__} makes other tokens of a text than of "
                "its parts, which is not supported"
            )

    def told(self) -> str:
        """All that decides on what becomes of an image, in words."""
        return f"{type(self.processor).__name__} {self.processor.to_dict()}"


class _Listening:
    """A tokenizer that writes down the texts that it gets."""

    def __init__(self, tokenizer: Any, heard: list[str]) -> None:
        self._tokenizer, self._heard = tokenizer, heard

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        self._heard += [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def sees(model: Any) -> bool:
    """Whether a model, wrapped or not, makes features of images."""
    return hasattr(unwrap(model), "get_image_features")


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, which a processor has inside, with the processor's chat template where it has none."""
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "eos_token_id"):
        return processing_class
    if getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    return tokenizer


def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (56, 56), (128, 128, 128))


def joined_inputs(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of several sequences' images as one batch's, in dimension 0; smaller ones padded with zeros,
    as processors pad what differs in size."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        tensors = [part[name] for part in parts if name in part]
        sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        found[name] = torch.cat([_padded(tensor, sizes) for tensor in tensors])
    return found


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    behind = [x for count in reversed(missing) for x in (0, count)]
    return torch.nn.functional.pad(tensor, behind)
