"""One tokenised row: a prompt and its answers. A pair is a row with two; with a gold answer it has three."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.integrations.forest.plant import distinct_tokens
from fastdpo.training.data.images import RowImage

# The reference of a row: of pairs in two columns of a file, of other kinds in one.
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# The ld_alpha that they were weighted with; without this column they are plain sums.
LD_COLUMN = "ref_ld_alpha"
REFERENCE = "ref_logps"
REF_MISMATCHED = "ref_mismatched_logps"
REF_MISMATCHED_OF = "ref_mismatched_of"
REF_OF = "ref_of"
# All that `fastdpo score` may write.
WRITTEN_COLUMNS = (*REF_COLUMNS, LD_COLUMN, REFERENCE, REF_MISMATCHED, REF_MISMATCHED_OF, REF_OF)


# Of a salted token id, those of the id itself.
SALT_BITS = 32


class Answer(NamedTuple):
    """Token ids ``(n,)``, and which of them are scored, bool ``(n,)``; None: all."""

    ids: Tensor
    scored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """What a data set hands to a collator.

    Args:
        number: of the row in its file, from 1.
        prompt: token ids ``(m,)``.
        answers: of a pair chosen, rejected and, where there is one, gold.
        numbers: what the losses use, by name: a number of the row, or ``(k,)`` for its answers or pieces.
        pieces: how many tokens each piece of the answer has, of one in pieces.
        mismatched: another row's answer, for KTO's reference point.
        images: of each answer's sequence, in the order of its text; nothing where there are none.
        source: the data's name, for messages.
    """

    number: int
    prompt: Tensor
    answers: tuple[Answer, ...]
    numbers: Mapping[str, float | Tensor] = field(default_factory=dict)
    pieces: tuple[int, ...] = ()
    mismatched: Answer | None = None
    images: tuple[tuple[RowImage, ...], ...] = ()
    source: str = ""

    @property
    def distinct_tokens(self) -> int:
        """Tokens that ``shared_prompt`` computes of the row: what its sequences begin alike with once."""
        return distinct_tokens(
            self.salted(torch.cat([self.prompt, a.ids]), k) for k, a in enumerate(self.answers)
        )

    def salted(self, ids: Tensor, answer: int) -> Tensor:
        """Token ids of one answer's sequence ``(n,)``, equal to those of another only where its images are.

        The lower ``SALT_BITS`` are the ids.
        """
        images = self.images[answer] if self.images else ()
        if not images:
            return ids
        digest = hashlib.blake2b(repr([image.digest for image in images]).encode(), digest_size=3).digest()
        return ids.to(torch.int64) + ((1 + int.from_bytes(digest, "little")) << SALT_BITS)
