"""Whether a model has what the data ask for: token ids in its vocabulary, and positions for the longest row.

What it lacks shows only when the row's turn comes, as an index error, on a GPU as an assertion that names
neither the row nor the sizes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdpo.integrations.lm_head import head_module, unwrap, wrappers_and_model
from fastdpo.integrations.processor import sees
from fastdpo.integrations.virtual_tokens import has_virtual_tokens
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.row import Row
from fastdpo.training.data.row_numbers import row_of
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.row_checks import CHECKS

logger = logging.getLogger(__name__)
# Names of tables with a row for each position, as families have them. XGLM's ``weights`` grow by themselves.
_TABLES = re.compile(
    r"(^|\.)(wpe|pos_encoding|embed_positions|positions_embed|position_embeddings)(\.weight)?$"
)
_OF_OTHERS = re.compile(r"vision|visual|image|audio")


def check_fit(
    data: Any, models: Mapping[str, nn.Module | None], args: PreferenceConfig, *, warns: bool = True
) -> None:
    """Look for what models lack, before the first step.

    Args:
        data: rows, or several by name, or none.
        models: by what they are in messages.
        warns: of more positions than a model was made for.

    Raises:
        ValueError: token ids, or positions, that a model does not have; names the row and both sizes.
    """
    if isinstance(data, Mapping):
        for dataset in data.values():
            check_fit(dataset, models, args, warns=warns)
    elif data is not None:
        for name, model in models.items():
            if model is not None:
                _check_eyes(data, name, model, args)
                _check_ids(data, name, vocabulary_size(model))
                longest = sequence_lengths(data).argmax()
                number, length = int(data.rows[longest]), int(sequence_lengths(data)[longest])
                row = row_of(data.report.source, number)
                check_positions(row, length, name, model, args.pad_to_multiple_of or 1, warns=warns)


def _check_eyes(dataset: RowDataset, name: str, model: nn.Module, args: PreferenceConfig) -> None:
    """Raise ValueError for images that a model does not see, or settings that do not go with them."""
    if dataset.images is None:
        return
    if not sees(model):
        raise ValueError(
            f"{name}: got a {type(unwrap(model)).__name__}, which sees no images, with rows that have some; "
            "wanted one that AutoModelForImageTextToText loads"
        )
    if args.context_chunk is not None:
        raise ValueError(
            f"context_chunk: got {args.context_chunk} with rows that have images, which are not carried in "
            "chunks; wanted none"
        )
    if args.nll_on_prompt:
        raise ValueError(
            "nll_on_prompt: got True with rows that have images, which nothing predicts; wanted False"
        )


def vocabulary_size(model: nn.Module) -> int:
    """Ids that a model has both an embedding and a row of the head for."""
    inner = unwrap(model)
    embedding, head = inner.get_input_embeddings(), head_module(inner)
    head = getattr(head, "base_layer", head)
    # Of weights that ZeRO-3 has partitioned the length is 0.
    return min(len(embedding.weight) or embedding.num_embeddings, len(head.weight) or head.out_features)


def fitting_pad_id(pad_token_id: int, models: Sequence[nn.Module]) -> int:
    """An id for padding that all models have: padding is masked, so any will do."""
    return pad_token_id if pad_token_id < min(map(vocabulary_size, models)) else 0


def _check_ids(dataset: RowDataset, name: str, size: int) -> None:
    if dataset.tokens.largest() < size:
        return
    found: dict[int, int] = {}
    for row, (start, end) in zip(dataset.rows.tolist(), dataset.row_bounds.tolist(), strict=True):
        largest = int(dataset.tokens[start:end].max())
        if largest >= size:
            found.setdefault(row, largest)
    if found:
        row, largest = next(iter(found.items()))
        check = CHECKS["token_ids"]
        raise ValueError(
            f"{name}: {check.message}: {row_of(dataset.report.source, row)} has the id {largest} "
            f"({len(found)} such rows), wanted ids below {size}, the rows of its embedding and head. "
            f"{check.remedy}"
        )


def check_positions(
    row: str, longest: int, name: str, model: nn.Module, multiple_of: int, *, warns: bool = True
) -> None:
    """Hold the longest sequence of ``row``, in tokens, to the positions of a model. Raises ValueError."""
    in_front = sum(_num_virtual_tokens(wrapper) for wrapper in wrappers_and_model(model))
    needed = -(-longest // multiple_of) * multiple_of + in_front
    row = f"{row} has {longest} tokens"
    if needed > longest:
        row += f", {needed} with padding to a multiple of {multiple_of} and {in_front} virtual tokens"
    table, known = position_table(model), _known_positions(model)
    if table is not None and needed > table:
        check = CHECKS["positions"]
        raise ValueError(f"{name}: {check.message}: {row}; wanted {table} at most. {check.remedy}")
    if warns and known is not None and needed > known:
        logger.warning(
            "%s: %s, more than the %d that its configuration says it was made for (max_position_embeddings)",
            name,
            row,
            known,
        )


def sequence_lengths(dataset: RowDataset) -> Tensor:
    """Tokens of each row's longest sequence, those with another row's answer included."""
    lengths = dataset.lengths
    if getattr(dataset, "has_mismatched", False):
        lengths = lengths.maximum(dataset.prompt_lengths + dataset.mismatched_lengths)
    return lengths


def _num_virtual_tokens(wrapper: Any) -> int:
    return int(wrapper.active_peft_config.num_virtual_tokens) if has_virtual_tokens(wrapper) else 0


def _known_positions(model: nn.Module) -> int | None:
    known = getattr(_text_config(model), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def _text_config(model: nn.Module) -> Any:
    config: Any = unwrap(model).config
    return config.get_text_config()


def position_table(model: nn.Module) -> int | None:
    """How many positions a model has a table for; None where it computes them (rotary, ALiBi)."""
    sizes = []
    inner = unwrap(model)
    for name, table in [*inner.named_parameters(), *inner.named_buffers()]:
        if _TABLES.search(name) and not _OF_OTHERS.search(name) and table.dim() == 2:
            owner: Any = inner.get_submodule(name.rpartition(".")[0])
            # The first rows are of no position: OPT's two, and RoBERTa's up to that of padding.
            padding = getattr(owner, "padding_idx", None)
            sizes.append(len(table) - getattr(owner, "offset", 0) - (0 if padding is None else padding + 1))
    known = _known_positions(model)
    if not sizes:
        return None
    return min([*sizes, known] if known is not None else sizes)


class StreamFit:
    """Holds what a stream gives to the models, as it comes.

    Args:
        models: by what they are in messages.
    """

    def __init__(self, models: Mapping[str, nn.Module | None], args: PreferenceConfig) -> None:
        self.models, self.args = models, args
        self._longest = 0

    def check_part(self, part: RowDataset) -> None:
        """Raise ValueError for token ids, or positions, that a model does not have."""
        check_fit(part, self.models, self.args, warns=False)

    def check_row(self, row: Row, source: str) -> None:
        """Raise ValueError where a row's prompt with its mismatched answer needs more positions."""
        length = 0 if row.mismatched is None else len(row.prompt) + len(row.mismatched.ids)
        if length <= self._longest:
            return
        self._longest = length
        for name, model in self.models.items():
            if model is not None:
                place, multiple_of = row_of(source, row.number), self.args.pad_to_multiple_of or 1
                check_positions(place, length, name, model, multiple_of, warns=False)
