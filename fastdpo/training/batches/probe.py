"""Prove on the actual model that rows of several sequences give what rows of one give.

Two short pairs of random tokens go through the backbone: every sequence alone, in a plain call without
mask and positions, which is the truth; then as each layout would have them. Models that look at more than
the forest says (recurrent ones, positions counted by the row, an attention of their own) show, and so do
those whose plain calls are others once their attention knows forests.

What is compared is the hidden states that predict labels, by ``|a - b| / |b|`` of each row. Two exact ways
to compute them differ by rounding: each of the ``2 L`` residual branches of L layers adds an error of a few
``eps``, independent of the others, so the relative error grows with ``sqrt(2 L)``. A sum of K products in
fp32 is off by about ``sqrt(K) eps``, 32 eps for K = 1024; in 16 bits the sums are kept in fp32 and what
counts is the rounding of each stored activation, eps / 2, some four times a branch. So the limit is
``32 eps sqrt(2 L)`` in fp32 (8e-6 for two layers, 3e-5 for 32) and ``2 eps sqrt(2 L)`` in 16 bits, or four
times what padding the same sequences together changes, whichever is more; never more than a quarter of
what changes when all sequences see each other, which is what must not be.

A small leak hides below such a limit in 16 bits, so there is a second test: other tokens in one answer must
leave all other sequences as they were. In the same shapes the same sums are made of the same numbers, so
nothing but the grouping of a mixture of experts may change: a tenth of the rounding is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.integrations.backbone_config import (
    backbone_size,
    spans,
    takes_positions,
    text_config,
    why_no_neighbours,
)
from fastdpo.integrations.forest.attention import restore_attention
from fastdpo.integrations.forest.plant import Tree, plant
from fastdpo.integrations.forest.rows import Rows, Text, lay_out
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import backbone_states
from fastdpo.integrations.processor import ImageTokens
from fastdpo.training.batches.batch import mapped
from fastdpo.training.batches.collate import answer_places, make_texts
from fastdpo.training.batches.seen_rows import SeenRows, plant_seen
from fastdpo.training.data.images import RowImage, pixel_digest
from fastdpo.training.data.row import Answer, Row
from fastdpo.training.settings.kinds import PAIRS
from fastdpo.types import CarriedContext

# Longer sequences than this only where a sliding window, a chunk or their like, and the data reach further.
_SHORT = 24
# Cuts prompts and answers of that length.
_CHUNK = 7


@torch.no_grad()
def refusals(
    model: nn.Module,
    candidates: Sequence[tuple[str, str]],
    *,
    longest: int,
    is_carried: bool = False,
    images: ImageTokens | None = None,
) -> dict[tuple[str, str], str | None]:
    """Why each ``(layout, arrangement)`` would change the model's results; None where it does not.

    Args:
        model: a patched causal LM on its device; left as it was.
        longest: tokens of the longest sequence of the data.
        is_carried: whether rows go through the backbone in chunks.
        images: the processor of data with images, which each prompt of the probe then has one of.
    """
    of_forests = why_no_neighbours(model) or (None if images is None else _why_no_images(model))
    known = {case: of_forests if is_carried or _has_neighbours(case) else None for case in candidates}
    if all(known.values()):
        return known
    is_shared = any(reason is None and _has_neighbours(case) for case, reason in known.items())
    reaches = [size + 8 for size in spans(text_config(model)) if is_shared and size < longest]
    was_training = model.training
    model.eval()
    try:
        context = CarriedContext(_CHUNK) if is_carried else None
        probe = _Probe(model, max([_SHORT, *reaches]), context, images)
        return {case: reason or probe.why_not(*case) for case, reason in known.items()}
    except Exception as error:  # whatever a model's own code raises where it has other ideas of its inputs
        return {case: reason or _failure("on rows of one sequence", error) for case, reason in known.items()}
    finally:
        restore_attention(model)
        model.train(was_training)


def _has_neighbours(case: tuple[str, str]) -> bool:
    """Whether a row has several sequences, for attention to keep apart."""
    layout, arrangement = case
    return layout == "shared_prompt" or arrangement == "one_row"


def _why_no_images(model: nn.Module) -> str | None:
    """Why images may not have neighbours in a row, as far as a model says."""
    if hasattr(unwrap(model).base_model, "get_rope_index"):
        return "its positions of images have several dimensions (M-RoPE), which a row's do not"
    return None


def _failure(where: str, error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"its forward fails {where} ({type(error).__name__}: {lines[0][:160]})"


class _Probe:
    """Two pairs, the truth about them, and what other forms may differ by."""

    def __init__(
        self, model: nn.Module, length: int, context: CarriedContext | None, images: ImageTokens | None
    ) -> None:
        self.model, self.context, self.images = model, context, images
        self.device = next(model.parameters()).device
        sizes = _pair_sizes(length)
        vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        self.pairs = []
        for number, pair in enumerate(sizes):
            prompt, *answers = (self._text(n, vocab, generator) for n in pair)
            self.pairs.append(self._with_image(Row(number, prompt, tuple(map(Answer, answers))), generator))
        self.other_answer = self._text(sizes[0][1], vocab, generator)
        self.texts = make_texts(self.pairs)
        apart = [tree for number, text in enumerate(self.texts) for tree in plant([(number, text.ids)])]
        one_by_one = [[number] for number in range(len(apart))]
        calls = self._laid_out(self.pairs, self.texts, apart, one_by_one).calls
        self.first = calls[0]
        self.alone = [self._plain(call)[0] for call in calls]
        self.truth = self._labelled(self.alone)

        padded = self._laid_out(self.pairs, self.texts, apart, [range(len(apart))], in_one_row=False)
        together = self._plain(padded.calls[0])
        noise = _largest_change(self._labelled(list(together)), self.truth)
        factor, eps = self._precision()
        self.rounding = factor * eps * math.sqrt(2 * backbone_size(model).layers)
        self.limit = min(max(self.rounding, 4 * noise), self._leak() / 4)

    def why_not(self, layout: str, arrangement: str) -> str | None:
        first = self.pairs[0]
        changed = [replace(first, answers=(Answer(self.other_answer), first.answers[1])), self.pairs[1]]
        try:
            found, sequences = self._in_rows(self.pairs, layout, arrangement)
            again, _ = self._in_rows(changed, layout, arrangement)
            plain = self._plain(self.first)[0]
        except Exception as error:  # whatever a model's own code raises on inputs it was not made for
            return _failure("on such rows", error)
        change = _largest_change(found, self.truth)
        if change > self.limit:
            return f"its hidden states change by {change:.1e} of their size (rounding: {self.limit:.1e})"
        leak = _largest_change(again[sequences > 0], found[sequences > 0])
        if leak > self.rounding / 10:
            return (
                f"its sequences see each other (a change in one changes others by {leak:.1e} of their size)"
            )
        if not torch.equal(plain, self.alone[0]):
            return "its plain calls are others once its attention knows forests"
        return None

    def _in_rows(self, pairs: list[Row], layout: str, arrangement: str) -> tuple[Tensor, Tensor]:
        """States that predict labels ``(N, H)``, and the sequence of each ``(N,)``."""
        texts = make_texts(pairs)
        places = [place for part in answer_places(pairs, PAIRS) for place in part]
        numbered = [
            (number, pairs[i].salted(text.ids, k))
            for number, ((i, k), text) in enumerate(zip(places, texts, strict=True))
        ]
        groups = [numbered] if layout == "shared_prompt" else [[one] for one in numbered]
        image_ids = frozenset() if self.images is None else self.images.ids
        trees = [tree for group in groups for tree in plant_seen(group, image_ids, shortest=1)]
        calls = [[i] for i in range(len(trees))] if arrangement == "separate" else [[*range(len(trees))]]
        rows = self._laid_out(pairs, texts, trees, calls, in_one_row=arrangement != "bucketed")
        states = [self._states(mapped(call, lambda tensor: tensor.to(self.device))) for call in rows.calls]
        flat = torch.cat([state.flatten(0, -2) for state in states])
        index, sequences = rows.tokens.token_index, rows.tokens.sequence_ids
        return flat[index.to(self.device)].double(), sequences.to(self.device)

    def _laid_out(
        self,
        pairs: list[Row],
        texts: Sequence[Text],
        trees: Sequence[Tree],
        calls: Sequence[Sequence[int]],
        *,
        in_one_row: bool = True,
    ) -> Rows:
        rows = lay_out(texts, trees, calls, pad_token_id=0, in_one_row=in_one_row)
        sequences = [(pairs[i], k) for part in answer_places(pairs, PAIRS) for i, k in part]
        of_calls = [[trees[number] for number in call] for call in calls]
        return replace(rows, calls=SeenRows(self.images).in_rows(rows.calls, of_calls, sequences))

    def _text(self, size: int, vocab: int, generator: torch.Generator) -> Tensor:
        """Tokens, none of which is an image's."""
        ids = torch.randint(vocab // 8, vocab, (size,), generator=generator)
        while self.images is not None and self.images.count(ids.tolist()):
            ids = ids.where(~torch.isin(ids, torch.tensor(sorted(self.images.ids))), ids - 1)
        return ids

    def _with_image(self, row: Row, generator: torch.Generator) -> Row:
        """The row with an image of noise in its prompt."""
        if self.images is None:
            return row
        noise = torch.randint(256, (56, 56, 3), generator=generator, dtype=torch.uint8)
        from PIL import Image

        image = Image.fromarray(noise.numpy())
        (text,) = self.images.see([image]).texts
        ids = torch.tensor(self.images.tokenizer(text, add_special_tokens=False)["input_ids"])
        middle = len(row.prompt) // 2
        prompt = torch.cat([row.prompt[:middle], ids, row.prompt[middle:]])
        images = (RowImage(image, "of the probe", Path(), pixel_digest(image)),)
        return replace(row, prompt=prompt, images=(images,) * len(row.answers))

    def _states(self, call: dict[str, Any]) -> Tensor:
        if not takes_positions(self.model):
            call.pop("position_ids", None)
        if self.context is not None:
            call["context"] = self.context
        return backbone_states(self.model, **call)

    def _leak(self) -> float:
        """What changes when all sequences see each other; without bound where they are too long together."""
        together = torch.cat([text.ids for text in self.texts])
        try:
            merged = self._plain({"input_ids": together[None]})[0]
        except Exception:  # beyond the model's positions
            return math.inf
        return _largest_change(
            self._labelled(list(merged.split([len(t.ids) for t in self.texts]))), self.truth
        )

    def _plain(self, call: Mapping[str, Any]) -> Tensor:
        """Of sequences a row each: without positions."""
        inputs = {name: value.to(self.device) for name, value in call.items() if name != "position_ids"}
        return backbone_states(self.model, **inputs)

    def _labelled(self, states: list[Tensor]) -> Tensor:
        """Of each sequence's states ``(T, H)``, those that predict its answer."""
        kept = [state[text.scored - 1] for state, text in zip(states, self.texts, strict=True)]
        return torch.cat(kept).double()

    def _precision(self) -> tuple[float, float]:
        """Factor and eps of the limit: of the dtype that products are computed in."""
        dtype = unwrap(self.model).dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        if dtype.itemsize < 4:
            return 2.0, torch.finfo(dtype).eps
        if self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            return 2.0, 2.0**-10
        return 32.0, torch.finfo(torch.float32).eps


def _largest_change(states: Tensor, truth: Tensor) -> float:
    change = (states - truth).norm(dim=-1) / truth.norm(dim=-1)
    return math.inf if change.isnan().any() else float(change.max())


def _pair_sizes(length: int) -> list[tuple[int, int, int]]:
    """Prompt, chosen and rejected of two pairs; the longest sequence has about ``length`` tokens."""
    return [(length // 3, length // 4, length - length // 3), (length // 4, length // 3, length // 5)]
