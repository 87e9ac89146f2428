"""Batches: some rows of a data set as the model and the losses want them, padded or in rows without padding.

Of pairs sequences 0..P-1 are the chosen answers and P..2P-1 the rejected ones, in the order that TRL has
them; of other kinds a row's answers stand together, row after row.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdpo.integrations.backbone_config import takes_positions
from fastdpo.losses.aggregate import sequence_sums, weighted_sums
from fastdpo.training.batches.media import Media
from fastdpo.training.settings.kinds import DataKind
from fastdpo.types import PackedLayout, TokenLayout

IGNORE_INDEX = -100
# Numbers of which a row has one for each of its answers, or of the answer's pieces.
PER_JUDGED = ("group_ids", "scores", "advantages")
Self = TypeVar("Self", bound="Batch")


@dataclass(frozen=True, eq=False)
class Padded:
    """S right-padded sequences, ``(S, T)`` int64 each: labels are -100 but for the answers' scored tokens.

    With ``media`` where they have images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media: Media | None = None

    @property
    def mask(self) -> Tensor:
        """``(S, T)`` bool: the tokens that are scored; nothing predicts the first position."""
        mask = self.labels != IGNORE_INDEX
        mask[:, 0] = False
        return mask

    def pick(self, sequences: Tensor) -> Padded:
        """Some of the sequences."""
        media = None if self.media is None else self.media.pick(sequences.tolist())
        parts = (self.input_ids[sequences], self.attention_mask[sequences], self.labels[sequences])
        return Padded(*parts, media)

    def model_inputs(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Arguments of a model's call for its states."""
        media = {} if self.media is None else {**self.media.inputs, **self.media.per_token}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **media}

    def label_inputs(self) -> dict[str, Any]:
        """What says to a patched model which tokens to score."""
        return {"labels": self.labels}

    def answer_logps(self, logps: Tensor) -> Tensor:
        """``(S,)``: log-probabilities per token summed over each answer."""
        return sequence_sums(logps, self.mask)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(ABC):
    """R rows of S answers that are judged.

    Args:
        kind: of the data.
        rows: ``(R,)`` int64, their numbers in the file.
        num_answers: of each row; gold ones, which are not judged, left out.
        numbers: what the losses use, under the names that ``fused_dpo_loss`` and ``fused_preference_loss``
            have for it: ``(R,)``, or one for each answer or piece.
        num_pieces: of each row whose answer is in pieces.
        segment_ids: the piece that each token is of, counted through the batch, in the shape of ``mask``.
        token_weights: in the shape of ``mask``: of LD-DPO.
        ref_logps: fp32, of the reference: ``(S,)``, or a number for each piece, or for each scored token.
        mismatched: each prompt with another row's answer; ``ref_mismatched_logps`` ``(R,)`` of the reference.
        is_filler: the batch only keeps a rank in step, and counts for nothing.
    """

    kind: DataKind
    rows: Tensor
    num_answers: tuple[int, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    num_pieces: tuple[int, ...] = ()
    segment_ids: Tensor | None = None
    token_weights: Tensor | None = None
    ref_logps: Tensor | None = None
    mismatched: Padded | None = None
    ref_mismatched_logps: Tensor | None = None
    is_filler: bool = False

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Bool, ``(S, T)`` or ``(N,)``: the tokens that are scored."""

    @property
    @abstractmethod
    def layout(self) -> PackedLayout | None:
        """The bounds of the answers among ``(N,)`` tokens; None where they are padded."""

    @property
    @abstractmethod
    def sequence_tokens(self) -> Tensor:
        """``()``: tokens of all sequences, prompts in each, padding not: the same in every layout."""

    @property
    def positions(self) -> int:
        """Positions that the backbone computes, padding included."""
        return sum(call["input_ids"].numel() for call in self.calls)

    @property
    @abstractmethod
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """The inputs that hold every position that the backbone computes."""

    @abstractmethod
    def model_inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of a patched model's call for its states: those of its backbone."""

    @abstractmethod
    def label_inputs(self) -> dict[str, Any]:
        """What says to a patched model which tokens to score."""

    @abstractmethod
    def nll_tokens(self, *, on_prompt: bool) -> Tensor | int:
        """Of pairs: tokens that an NLL term is a mean over.

        Of gold answers, where there are some; else of the chosen ones, and ``on_prompt`` of their prompts.
        """

    @abstractmethod
    def tokens_of(self, sequences: slice) -> Tensor | int:
        """Scored tokens of some sequences."""

    @abstractmethod
    def _of_sequences(self: Self, kept: list[int], count: int) -> Self:
        """With the tokens of the sequences ``kept`` alone, which are those of the first ``count`` rows."""

    @property
    def num_rows(self) -> int:
        """R; of pairs P."""
        return len(self.rows)

    @property
    def loss_rows(self) -> int:
        """What the loss is a mean over: rows, or steps."""
        return sum(self.num_pieces) if self.kind.name == "steps" else self.num_rows

    @property
    def judged(self) -> tuple[int, ...]:
        """Of each row, how many numbers the losses see: of answers, or of pieces."""
        return self.num_pieces or self.num_answers

    @property
    def num_labelled(self) -> Tensor | int:
        """Scored tokens of all answers."""
        return self.tokens_of(slice(None))

    @property
    def bounds(self) -> Tensor | None:
        """``layout``'s."""
        return None if self.layout is None else self.layout.cu_seqlens

    def answer_logps(self, logps: Tensor) -> Tensor:
        """``(S,)``: log-probabilities per token summed over each answer, with the batch's weights if any."""
        if self.token_weights is not None:
            return weighted_sums(logps, self.token_weights, self.mask, self.bounds)
        return sequence_sums(logps, self.mask, self.bounds)

    def by_row(self, values: Tensor) -> Tensor:
        """``(S,)`` numbers of the answers, row after row, as the data set has them."""
        return values.view(2, -1).T.flatten() if self.kind.is_paired else values

    def first(self: Self, count: int) -> Self:
        """The first ``count`` rows; without padding, the backbone computes the others all the same."""
        if count == self.num_rows:
            return self
        answers, judged = sum(self.num_answers[:count]), sum(self.judged[:count])
        kept = [*range(answers)]
        if self.kind.is_paired:
            kept = [*range(count), *range(self.num_rows, self.num_rows + count)]
        cut = self._of_sequences(kept, count)
        numbers = {name: value for name, value in self.numbers.items() if not isinstance(value, Tensor)}
        for name, value in self.numbers.items():
            if isinstance(value, Tensor):
                numbers[name] = value[: judged if name in PER_JUDGED else count]
        numbers |= {"num_groups": count} if "num_groups" in numbers else {}
        numbers |= {"num_segments": judged} if "num_segments" in numbers else {}
        ref_logps = self.ref_logps
        if ref_logps is not None:
            size: Any = cut.num_labelled if self.kind.reference_per == "token" else judged
            ref_logps = ref_logps[kept] if self.kind.is_paired else ref_logps[: int(size)]
        first_ones = torch.arange(count, device=self.rows.device)
        return replace(
            cut,
            rows=self.rows[:count],
            num_answers=self.num_answers[:count],
            num_pieces=self.num_pieces[:count],
            numbers=numbers,
            ref_logps=ref_logps,
            mismatched=None if self.mismatched is None else self.mismatched.pick(first_ones),
            ref_mismatched_logps=_first(self.ref_mismatched_logps, count),
        )

    def to(self: Self, device: torch.device | str, **options: Any) -> Self:
        """With every tensor on a device."""
        found: Self = mapped(self, lambda tensor: tensor.to(device, **options))
        return found

    def pin_memory(self: Self) -> Self:
        """With every tensor in pinned memory, as a ``DataLoader`` asks for it."""
        found: Self = mapped(self, lambda tensor: tensor.pin_memory())
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class PaddedBatch(Batch):
    """A batch whose answers each have a row of their own, padded; pairs' gold answers are beside it."""

    sequences: Padded
    gold: Padded | None = None

    @property
    def mask(self) -> Tensor:
        return self.sequences.mask

    @property
    def layout(self) -> PackedLayout | None:
        return None

    @property
    def parts(self) -> tuple[Padded, ...]:
        """The sequences, and gold ones."""
        return (self.sequences,) if self.gold is None else (self.sequences, self.gold)

    @property
    def sequence_tokens(self) -> Tensor:
        return torch.stack([part.attention_mask.sum() for part in self.parts]).sum()

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        return [part.model_inputs() for part in self.parts]

    def model_inputs(self, model: nn.Module) -> dict[str, Any]:
        return self.sequences.model_inputs()

    def label_inputs(self) -> dict[str, Any]:
        return {"labels": self.sequences.labels}

    def nll_tokens(self, *, on_prompt: bool) -> Tensor | int:
        if self.gold is not None:
            return self.gold.mask.sum()
        if on_prompt:
            return self.sequences.attention_mask[: self.num_rows, 1:].sum()
        return self.tokens_of(slice(self.num_rows))

    def tokens_of(self, sequences: slice) -> Tensor | int:
        return self.mask[sequences].sum()

    def _of_sequences(self, kept: list[int], count: int) -> PaddedBatch:
        index = torch.tensor(kept, device=self.rows.device)
        return replace(
            self,
            sequences=self.sequences.pick(index),
            gold=None if self.gold is None else self.gold.pick(index[:count]),
            segment_ids=None if self.segment_ids is None else self.segment_ids[index],
            token_weights=None if self.token_weights is None else self.token_weights[index],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class RowBatch(Batch):
    """A batch without padding: ``packed`` sequences, or ones that share what they begin with.

    Args:
        rows_of_calls: the inputs of the backbone's calls (``integrations/forest/rows.py``).
        tokens: the labelled tokens of the answers, sequence after sequence, with ``lengths``.
        cu_seqlens: ``(S + 1,)`` their bounds.
        num_tokens: ``()``, tokens of all sequences.
        more: where an NLL term has tokens of its own, those of each pair's gold answer or prompt.
    """

    rows_of_calls: tuple[Mapping[str, Any], ...]
    tokens: TokenLayout
    cu_seqlens: Tensor
    num_tokens: Tensor
    more: TokenLayout | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many labelled tokens each of the S sequences has."""
        return self.tokens.lengths or ()

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.tokens.target_ids, dtype=torch.bool)

    @property
    def layout(self) -> PackedLayout | None:
        return PackedLayout(self.cu_seqlens, self.lengths)

    @property
    def sequence_tokens(self) -> Tensor:
        return self.num_tokens

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        return self.rows_of_calls

    def model_inputs(self, model: nn.Module) -> dict[str, Any]:
        left_out = () if takes_positions(model) else ("position_ids",)
        calls = [{k: v for k, v in call.items() if k not in left_out} for call in self.rows_of_calls]
        return {"row_batches": calls}

    def label_inputs(self) -> dict[str, Any]:
        return {"token_layout": self.tokens}

    def nll_tokens(self, *, on_prompt: bool) -> Tensor | int:
        chosen = self.tokens_of(slice(self.num_rows))
        if self.more is None:
            return chosen
        return sum(self.more.lengths or ()) + (chosen if on_prompt else 0)

    def tokens_of(self, sequences: slice) -> int:
        return sum(self.lengths[sequences])

    def _of_sequences(self, kept: list[int], count: int) -> RowBatch:
        tokens, places = picked_tokens(self.tokens, kept)
        return replace(
            self,
            tokens=tokens,
            cu_seqlens=bounds_of(tokens.lengths or ()).to(places.device),
            more=None if self.more is None else picked_tokens(self.more, [*range(count)])[0],
            segment_ids=None if self.segment_ids is None else self.segment_ids[places],
            token_weights=None if self.token_weights is None else self.token_weights[places],
        )


def bounds_of(lengths: Sequence[int]) -> Tensor:
    """``(S + 1,)`` int64: where S sequences of these lengths begin and end, one after the other."""
    return torch.tensor([0, *accumulate(lengths)])


def picked_tokens(tokens: TokenLayout, kept: Sequence[int]) -> tuple[TokenLayout, Tensor]:
    """The tokens of some sequences, numbered anew, and where they stood."""
    lengths, device = tokens.lengths or (), tokens.token_index.device
    ends = [0, *accumulate(lengths)]
    spans = [torch.arange(ends[i], ends[i + 1]) for i in kept]
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *spans]).to(device)
    sizes = tuple(lengths[i] for i in kept)
    ids = torch.repeat_interleave(torch.arange(len(kept)), torch.tensor(sizes, dtype=torch.int64)).to(device)
    return TokenLayout(tokens.token_index[places], tokens.target_ids[places], ids, sizes), places


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed: of a batch, its parts, and what holds them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, Batch | Padded | Media | TokenLayout):
        parts = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return replace(value, **{name: mapped(part, change) for name, part in parts.items()})
    if isinstance(value, tuple | list) and value and isinstance(value[0], Mapping):
        return type(value)(mapped(item, change) for item in value)
    return value


def _first(values: Tensor | None, count: int) -> Tensor | None:
    return None if values is None else values[:count]
