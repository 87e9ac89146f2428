"""Reference log-probabilities that come with the rows, in the columns that ``fastdpo score`` writes.

Of pairs ``ref_chosen_logps`` and ``ref_rejected_logps``, numbers. Of other kinds ``ref_logps``, a list with a
number for each answer of the row, for each piece or for each token of the answer, as the kind of data has it;
of a pair that makes two rows, the chosen answer's before the rejected one's. KTO's rows have beside it
``ref_mismatched_logps``, of the prompt with another row's answer, and ``ref_mismatched_of``, which says of
which: the score of another pairing is no use.

``ref_of`` says what the numbers are of: a hash of the row's token ids, of where its parts end and of what is
scored, and then, to name what is to blame, the tokenizer, the chat template and the length rule. Numbers of
other tokens are refused.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.messages import is_list
from fastdpo.training.data.row import (
    LD_COLUMN,
    REF_COLUMNS,
    REF_MISMATCHED,
    REF_MISMATCHED_OF,
    REF_OF,
    REFERENCE,
)
from fastdpo.training.data.row_numbers import row_list, row_place
from fastdpo.training.settings.row_checks import CHECKS, BadRow

logger = logging.getLogger(__name__)

_WORDS = (REF_MISMATCHED_OF, REF_OF)
# By this much a log-probability may be above 0: what is promised of each in 16 bits, in nats a token.
_ROUNDING = 1e-4


def reference_columns(
    filled: Collection[str], *, is_pairs: bool, has_mismatched: bool, is_trusted: bool, source: str
) -> tuple[str, ...]:
    """The columns that the reference is read from; none where the rows do not have it.

    Args:
        filled: columns of the data that hold something.
        is_trusted: numbers that do not say of which tokens they are do all the same, with a warning.

    Raises:
        ValueError: they do not say so, and are not trusted.
    """
    needed: tuple[str, ...] = REF_COLUMNS if is_pairs else (REFERENCE,)
    if has_mismatched:
        needed += (REF_MISMATCHED, REF_MISMATCHED_OF)
    if not set(needed) <= set(filled):
        return ()
    optional = (LD_COLUMN, REF_OF) if is_pairs else (REF_OF,)
    if REF_OF not in filled:
        check = CHECKS["tokens_unknown"]
        message = f"{source}: columns {', '.join(needed)}: {check.message} (no column {REF_OF!r})"
        if not is_trusted:
            raise ValueError(
                f"{message}, so rows tokenised or cut otherwise would train on wrong numbers: score the "
                "data with `fastdpo score`; or say reference='precomputed' to take them on trust, or 'copy'"
            )
        logger.warning(
            "%s: taken on trust; were they made with another tokenizer, chat template, max_length or "
            "truncation_mode, the run would train on wrong numbers",
            message,
        )
    return (*needed, *(name for name in optional if name in filled))


class RowReferences:
    """Hands the numbers of each row of the source to the rows that are kept of it, one after the other.

    Args:
        source: the data's name, for messages.
        names: of ``reference_columns``.
    """

    def __init__(self, source: str, names: Collection[str]) -> None:
        self.source = source
        self._rest: dict[int, dict[str, list[Any]]] = {}
        self._touched: set[int] = set()
        self._taken: dict[str, list[Any]] = {name: [] for name in names}
        self._problems: list[ValueError] = []

    def expect(self, number: int, row: Mapping[str, Any]) -> None:
        """Read the columns of a row. Raises ValueError where one is of the wrong type."""
        self._rest[number] = {name: self._read(number, row, name) for name in self._taken}

    def check(self, number: int, num_tokens: int) -> None:
        """Raise BadRow for a number of the row's rest that is missing, not finite, or impossible.

        Args:
            num_tokens: how many a number is of, at most.
        """
        rest = self._rest[number]
        for name in rest:
            if name in _WORDS or name == LD_COLUMN:
                continue
            if not all(map(math.isfinite, rest[name])):
                raise BadRow("not_finite", f"column {name!r}")
            if max(rest[name], default=0.0) > _ROUNDING * num_tokens:
                raise BadRow("impossible_reference", f"column {name!r} has {max(rest[name]):g}")

    def take(self, number: int, count: int) -> None:
        """The next ``count`` numbers of the row are those of the next row kept."""
        self._touched.add(number)
        for name, rest in self._rest[number].items():
            size = count if name == REFERENCE else 1
            if len(rest) < size:
                self._wrong_count(number, name, f"{len(rest)} numbers (left)", str(size))
            self._taken[name].append(rest[:size])
            del rest[:size]

    def added_to(self, dataset: RowDataset) -> RowDataset:
        """The rows kept, in their order, with their reference.

        Raises:
            ValueError: the numbers are of other tokens, too few or too many, or of other mismatched answers.
        """
        for number in sorted(self._touched):
            for name, rest in self._rest[number].items():
                if rest:
                    self._wrong_count(number, name, f"{len(rest)} numbers too many", "none")
        if REF_OF in self._taken:
            self._check_tokens(dataset)
        if self._problems:
            raise self._problems[0]
        if REF_MISMATCHED_OF in self._taken:
            self._check_pairings(dataset)
        if REFERENCE not in self._taken:
            both = torch.tensor([self._flat(name) for name in REF_COLUMNS]).T
            weights = {name: torch.tensor(self._flat(name)) for name in (LD_COLUMN,) if name in self._taken}
            return dataset.with_reference(both.flatten()).with_numbers(**weights)
        names = (name for name in (REFERENCE, REF_MISMATCHED) if name in self._taken)
        scores = [float(x) for name in names for x in self._flat(name)]
        return dataset.with_reference(torch.tensor(scores, dtype=torch.float32))

    def _flat(self, name: str) -> list[Any]:
        return [x for part in self._taken[name] for x in part]

    def _check_tokens(self, dataset: RowDataset) -> None:
        given = [(part or [""])[0] or "" for part in self._taken[REF_OF]]
        wrong = [
            (row, of)
            for row, of, digest in zip(dataset.rows.tolist(), given, dataset.row_digests(), strict=True)
            if of.split(" ")[0] != digest
        ]
        if not wrong:
            return
        rows = list(dict.fromkeys(row for row, _ in wrong))
        here = _settings(dataset.made_with or "")
        there = _settings(wrong[0][1])
        unlike = [
            f"{name} {there[name]}, here {here[name]}"
            for name in here
            if there.get(name, here[name]) != here[name]
        ]
        blame = f"made with {'; '.join(unlike)}" if unlike else "the texts are others"
        if not wrong[0][1]:
            blame = f"they have no {REF_OF!r}, which others have"
        raise ValueError(
            f"{self.source}, {row_list(rows)}: {CHECKS['other_tokens'].message} ({len(rows)} of "
            f"{len(set(dataset.rows.tolist()))} rows): {blame}; wanted numbers of the tokens that are "
            "trained on: score all rows again, with the settings of this run, or say reference='copy'"
        )

    def _check_pairings(self, dataset: RowDataset) -> None:
        pairs = zip(self._flat(REF_MISMATCHED_OF), mismatched_digests(dataset), strict=True)
        wrong = [
            row for row, (got, wanted) in zip(dataset.rows.tolist(), pairs, strict=True) if got != wanted
        ]
        if wrong:
            raise ValueError(
                f"{self.source}, {row_list(wrong)}: column {REF_MISMATCHED!r}: "
                f"{CHECKS['other_pairings'].message}: got scores of other answers than the prompts are "
                "mismatched with in this data set, wanted of those: score all its rows again, with the "
                "settings of this run, or say reference='copy'"
            )

    def _wrong_count(self, number: int, name: str, got: str, wanted: str) -> None:
        # Kept until it is known whether the tokens are others, which says more.
        self._problems.append(
            ValueError(
                f"{row_place(self.source, number)}: column {name!r}: got {got}, wanted {wanted}: "
                "the row was scored with another tokenizer, chat template, max_length or truncation_mode"
            )
        )

    def _read(self, number: int, row: Mapping[str, Any], name: str) -> list[Any]:
        """What a column has, as a list; of a number that is missing NaN."""
        wanted: tuple[type, ...] = (str,) if name in _WORDS else (int, float)
        value: Any = row.get(name)
        if value is None:
            return ["" if name in _WORDS else math.nan]
        is_pairs = REFERENCE not in self._taken
        values = [value] if is_pairs or not is_list(value) else list(value)
        is_wrong = any(isinstance(x, bool) or not isinstance(x, wanted) for x in values)
        if is_wrong or is_list(value) == is_pairs:
            kind = "text" if name in _WORDS else "number"
            raise ValueError(
                f"{row_place(self.source, number)}: column {name!r}: got {value!r:.80}, wanted a "
                f"{kind if is_pairs else f'list of {kind}s'}"
            )
        return values


def _settings(of: str) -> dict[str, str]:
    """What is said behind the hash, or of a whole data set, by name."""
    return dict(word.split("=", 1) for word in of.split(" ") if "=" in word)


def scores_by_row(dataset: RowDataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row of the file, and the columns of its reference: of pairs numbers, of others lists."""
    scores: Any = dataset.numbers[REFERENCE]
    weights: Any = dataset.numbers.get(LD_COLUMN)
    mismatched: Any = dataset.numbers.get(REF_MISMATCHED)
    digests = mismatched_digests(dataset) if dataset.has_mismatched else []
    of = [f"{digest} {dataset.made_with}".strip() for digest in dataset.row_digests()]
    for place, row in enumerate(dataset.rows.tolist()):
        columns: dict[str, Any]
        if dataset.kind.is_paired:
            columns = {**dict(zip(REF_COLUMNS, scores[place].tolist(), strict=True)), REF_OF: of[place]}
            if weights is not None:
                columns[LD_COLUMN] = weights[place].item()
        else:
            columns = {REFERENCE: scores[place].tolist(), REF_OF: [of[place]]}
        if dataset.has_mismatched:
            columns |= {REF_MISMATCHED: [mismatched[place].item()], REF_MISMATCHED_OF: [digests[place]]}
        yield row, columns


def mismatched_digests(dataset: RowDataset) -> list[str]:
    """Of each row a short hash of the answer that its prompt is mismatched with."""
    answers = (dataset[index].mismatched for index in range(len(dataset)))
    return [
        hashlib.blake2b(answer.ids.numpy().tobytes(), digest_size=8).hexdigest()
        for answer in answers
        if answer is not None
    ]
