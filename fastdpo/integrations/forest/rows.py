"""Trees laid out in rows: what the calls of a backbone take, and where the tokens to score are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.forest.plant import SHORTEST_SHARED, Tree, plant
from fastdpo.integrations.forest.segments import Forest
from fastdpo.ops.checks import fail
from fastdpo.types import TokenLayout


@dataclass(frozen=True, eq=False)
class Text:
    """A sequence: token ids ``(n,)``, and the places ``(k,)``, from 1 on, of those to score."""

    ids: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Rows:
    """Inputs of the backbone's calls, and the tokens to score over all of them.

    Args:
        calls: each ``input_ids``, ``position_ids`` ``(R, T)`` int64 and, where a row holds more than one
            sequence, its `Forest` as ``forest``.
        tokens: the tokens to score, sequence after sequence; with ``lengths``.
    """

    calls: tuple[dict[str, Any], ...]
    tokens: TokenLayout


def lay_out(
    texts: Sequence[Text], trees: Sequence[Tree], calls: Sequence[Sequence[int]],
    *, pad_token_id: int, in_one_row: bool = True, multiple_of: int = 1,
) -> Rows:  # fmt: skip
    """Rows of trees.

    Args:
        texts: every sequence; the trees name them by their places here.
        trees: without those of empty sequences.
        calls: the trees of each call, each tree once: all in one row, or in a row each, which are padded and
            hold trees of one segment.
        pad_token_id: fills rows up.
        multiple_of: of the tokens of a row.
    """
    places = [torch.zeros(0, dtype=torch.int64)] * len(texts)
    made, offset = [], 0
    for call in calls or [[]]:
        rows = [call] if in_one_row or not call else [[number] for number in call]
        longest = max(sum(trees[n].num_tokens for n in row) for row in rows)
        length = -(-max(longest, 1) // multiple_of) * multiple_of
        padding = length - longest if in_one_row else 0
        input_ids, forest = torch.full((len(rows), length), pad_token_id), None
        for place, row in enumerate(rows):
            forest, ids = _joined([trees[n] for n in row], padding, places, offset + place * length)
            input_ids[place, : len(ids)] = ids
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if forest is None:  # a sequence a row: what pads it goes on behind it, and is seen by nothing
            inputs["position_ids"] = torch.arange(length).repeat(len(rows), 1)
        else:
            inputs |= {"position_ids": forest.position_ids, "forest": forest}
        made.append(inputs)
        offset += input_ids.numel()
    return Rows(tuple(made), _tokens(texts, places))


def _joined(
    trees: Sequence[Tree], padding: int, places: list[Tensor], offset: int
) -> tuple[Forest | None, Tensor]:
    """The forest of a row, None for one sequence alone, and its ids; fills in ``places`` of its sequences."""
    lengths: list[int] = []
    parents: list[int] = []
    ends: dict[int, int] = {}
    for tree in trees:
        first = len(lengths)
        lengths += map(len, tree.segments)
        parents += [-1 if parent < 0 else first + parent for parent in tree.parents]
        ends |= {number: first + segment for number, segment in tree.ends.items()}
    if not lengths:
        return None, torch.zeros(0, dtype=torch.int64)
    is_alone = len(lengths) == 1
    if padding and not is_alone:
        lengths, parents = [*lengths, padding], [*parents, -1]
    forest = Forest(tuple(lengths), tuple(parents))
    for number, segment in ends.items():
        places[number] = forest.places(segment) + offset
    ids = torch.cat([segment.to(torch.int64) for tree in trees for segment in tree.segments])
    return None if is_alone else forest, ids


def _tokens(texts: Sequence[Text], places: Sequence[Tensor]) -> TokenLayout:
    lengths = tuple(len(text.scored) for text in texts)
    index = [place[text.scored - 1] for text, place in zip(texts, places, strict=True)]
    targets = [text.ids.to(torch.int64)[text.scored] for text in texts]
    numbers = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return TokenLayout(torch.cat(index), torch.cat(targets), numbers, lengths)


def forest_batch(
    sequences: Sequence[Sequence[int] | Tensor],
    labels: Sequence[Sequence[int] | Tensor],
    *,
    ignore_index: int = -100,
    shortest_shared: int = SHORTEST_SHARED,
    device: torch.device | str = "cpu",
) -> Rows:
    """Sequences in one row without padding, in which those that begin alike share their beginning.

    For a loop of one's own around `patch_model`: each token of a common beginning (a prompt, answers that
    begin alike, a system prompt) is computed once, and every result is that of the sequences by themselves::

        rows = forest_batch(sequences, labels)
        out = model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True)

    ``out.logps`` are ``(N,)``, sequence after sequence; with ``pair_loss=`` the first half of the sequences
    are the chosen ones.

    Args:
        sequences: token ids of each.
        labels: of the same lengths: the token itself where it is scored, else ``ignore_index``. The first of
            a sequence is never scored.
        shortest_shared: common beginnings of fewer tokens are computed for each sequence.
        device: of the call's inputs, which is the model's.

    Returns:
        `Rows` with one call.

    Raises:
        ValueError: no sequences, labels of another length, or that are not the tokens that they label.
    """
    if not sequences or len(sequences) != len(labels):
        raise fail("sequences", f"{len(sequences)} with {len(labels)} labels", "at least one, and as many")
    texts = []
    for number, (given, wanted) in enumerate(zip(sequences, labels, strict=True)):
        ids, label = torch.as_tensor(given).cpu(), torch.as_tensor(wanted).cpu()
        if ids.dim() != 1 or ids.shape != label.shape:
            shapes = f"shapes {tuple(ids.shape)} and {tuple(label.shape)} of sequence {number} and its labels"
            raise fail("labels", shapes, "one dimension, and equal ones")
        is_scored = label != ignore_index
        if not torch.equal(ids[is_scored], label[is_scored]):
            raise fail("labels", f"other tokens than sequence {number} has", f"its tokens or {ignore_index}")
        is_scored[:1] = False
        texts.append(Text(ids, is_scored.nonzero()[:, 0]))
    trees = plant([(number, text.ids) for number, text in enumerate(texts)], shortest=shortest_shared)
    rows = lay_out(texts, trees, [range(len(trees))], pad_token_id=0)
    calls = (
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
        for call in rows.calls
    )
    return Rows(tuple(calls), rows.tokens)
