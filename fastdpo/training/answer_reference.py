"""Reference log-probabilities that come with the rows, in the columns that ``fastdpo score`` writes.

``ref_logps`` has a number for each answer of the row, for each piece or for each token of the answer, as the
kind of data has it; of a pair that makes two rows, the chosen answer's before the rejected one's. KTO's rows
have beside it ``ref_mismatched_logps``, of the prompt with another row's answer, and ``ref_mismatched_of``,
which says of which: the score of another pairing is no use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdpo.training.answers import REF_MISMATCHED, REF_MISMATCHED_OF, REFERENCE, AnswerDataset
from fastdpo.training.data import row_list


def reference_columns(*, has_mismatched: bool) -> tuple[str, ...]:
    """The columns that a row must have for its reference to be read."""
    return (REFERENCE, *((REF_MISMATCHED, REF_MISMATCHED_OF) if has_mismatched else ()))


class RowReferences:
    """Hands the numbers of each row of the source to the rows that are kept of it, one after the other.

    Args:
        source: the data's name, for messages.
        has_mismatched: whether rows have mismatched answers.
    """

    def __init__(self, source: str, *, has_mismatched: bool) -> None:
        self.source, self.has_mismatched = source, has_mismatched
        self._rest: dict[int, dict[str, list[Any]]] = {}
        self._touched: set[int] = set()
        self._taken: dict[str, list[Any]] = {
            name: [] for name in reference_columns(has_mismatched=has_mismatched)
        }

    def expect(self, number: int, row: Mapping[str, Any]) -> None:
        """Read the columns of a row. Raises ValueError where one is no list of numbers (or names)."""
        self._rest[number] = {name: self._read(number, row, name) for name in self._taken}

    def are_finite(self, number: int) -> bool:
        """Whether none of what is left of the row is NaN or infinite."""
        rest = self._rest[number]
        return all(math.isfinite(x) for name in rest if name != REF_MISMATCHED_OF for x in rest[name])

    def take(self, number: int, count: int) -> None:
        """The next ``count`` numbers of the row are those of the next row kept.

        Raises:
            ValueError: there are fewer left.
        """
        self._touched.add(number)
        for name, rest in self._rest[number].items():
            size = count if name == REFERENCE else 1
            if len(rest) < size:
                raise self._wrong_count(number, name, f"{len(rest)} numbers (left)", str(size))
            self._taken[name] += rest[:size]
            del rest[:size]

    def added_to(self, dataset: AnswerDataset) -> AnswerDataset:
        """The rows kept, in their order, with their reference.

        Raises:
            ValueError: a row has more numbers than were taken, or those of another mismatched answer.
        """
        for number in sorted(self._touched):
            for name, rest in self._rest[number].items():
                if rest:
                    raise self._wrong_count(number, name, f"{len(rest)} numbers too many", "none")
        if self.has_mismatched:
            pairs = zip(self._taken[REF_MISMATCHED_OF], dataset.mismatched_digests(), strict=True)
            wrong = [
                row for row, (got, wanted) in zip(dataset.rows.tolist(), pairs, strict=True) if got != wanted
            ]
            if wrong:
                raise ValueError(
                    f"{self.source}, {row_list(wrong)}: column {REF_MISMATCHED!r}: got scores of other "
                    "answers than the prompts are mismatched with in this data set, wanted of those: score "
                    "all its rows again, with the settings of this run, or say reference='copy'"
                )
        scores = [float(x) for name in self._taken if name != REF_MISMATCHED_OF for x in self._taken[name]]
        return dataset.with_reference(torch.tensor(scores, dtype=torch.float32))

    def _wrong_count(self, number: int, name: str, got: str, wanted: str) -> ValueError:
        return ValueError(
            f"{self.source}, row {number}: column {name!r}: got {got}, wanted {wanted}: the row was scored "
            "with another tokenizer, chat template, max_length or truncation_mode"
        )

    def _read(self, number: int, row: Mapping[str, Any], name: str) -> list[Any]:
        kinds = (str,) if name == REF_MISMATCHED_OF else (int, float)
        value = row.get(name)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or any(isinstance(x, bool) or not isinstance(x, kinds) for x in value or ()):
            wanted = "strings" if kinds == (str,) else "numbers"
            got = f"{value!r:.80}"
            raise ValueError(
                f"{self.source}, row {number}: column {name!r}: got {got}, wanted a list of {wanted}"
            )
        return list(value or ())
