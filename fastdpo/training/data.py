"""Preference data: where rows come from, and how tokenised pairs are held.

``read_rows`` reads JSONL, JSON, Parquet, a ``datasets`` directory or a hub id; ``PreferenceDataset``
holds the token ids of all pairs in one flat tensor. ``encode.py`` turns the one into the other.
Rows are counted from 1, as editors count lines; every message about data names the row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastdpo.training.report import DataReport
from fastdpo.training.row_references import LD_COLUMN, REF_COLUMNS, REF_OF
from fastdpo.training.row_tokens import token_digest

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class RowSource:
    """Raw rows, their numbers for messages (from 1), and the name of the place they come from."""

    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    name: str

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        return zip(self.numbers, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: Any, *, split: str = "train") -> RowSource:
    """Read preference rows.

    Args:
        source: path of a ``.jsonl``, ``.json`` or ``.parquet`` file, a ``datasets`` directory, a hub
            id, or rows already in memory: a sequence of mappings, a ``datasets.Dataset``, a
            data frame of pandas, or a mapping of splits.
        split: which split, where the source has several.

    Raises:
        ValueError: nothing there, a broken row (with its number), or not a format named above.
        ImportError: Parquet without pyarrow, or a directory or id without ``datasets``.
    """
    if isinstance(source, RowSource):
        return source
    if not isinstance(source, str | os.PathLike):
        return _rows_in_memory(source, split)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_datasets(str(path), split, on_disk=_is_saved_dataset(path))
    if _looks_like_path(os.fspath(source)):
        raise ValueError(f"dataset: no such file or directory: {os.fspath(source)}")
    return _read_datasets(os.fspath(source), split, on_disk=False)


def has_splits(source: str) -> bool:
    """Whether a path or id may have several splits: no file has, nor has one split that was saved.

    Args:
        source: as ``read_rows``.
    """
    path = Path(source).expanduser()
    return not path.is_file() and not (path / "state.json").is_file()


def _read_file(path: Path) -> RowSource:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".parquet":
        return _numbered(_read_parquet(path), str(path))
    raise ValueError(f"dataset: got a file ending in {suffix!r} ({path}), wanted one of {FILE_SUFFIXES}")


def _read_jsonl(path: Path) -> RowSource:
    rows, numbers = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, row {number}: not valid JSON: {error}") from None
            rows.append(_checked_mapping(row, number, str(path)))
            numbers.append(number)
    return RowSource(rows, numbers, str(path))


def _read_json(path: Path) -> RowSource:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files named .json hold one object a line.
        if text.lstrip().startswith("{"):
            return _read_jsonl(path)
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if isinstance(rows, Mapping):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: got a JSON {type(rows).__name__}, wanted a list of objects")
    return _numbered([_checked_mapping(row, i, str(path)) for i, row in enumerate(rows, 1)], str(path))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(
            f"reading {path} needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _read_datasets(name: str, split: str, *, on_disk: bool) -> RowSource:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading {name!r} needs the package `datasets`, which is not installed: pip install datasets, "
            f"or give a file ending in one of {FILE_SUFFIXES}"
        ) from None
    try:
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, split=split)
    except Exception as error:
        # Whatever went wrong (network, layout, unknown split), the user has to know which data set it was.
        raise ValueError(f"dataset: could not load {name!r}, split {split!r}: {error}") from error
    source = _rows_in_memory(loaded, split)
    return RowSource(source.rows, source.numbers, f"{name}[{split}]")


def _rows_in_memory(source: Any, split: str) -> RowSource:
    if isinstance(source, Mapping):
        if split not in source:
            firsts = [part[0] for part in source.values() if isinstance(part, list) and part]
            if firsts and not isinstance(firsts[0], Mapping):
                got = f"a dict of the columns {', '.join(source)}"
                raise ValueError(f"dataset: got {got}, wanted rows: a list of dicts, or datasets' from_dict")
            raise ValueError(f"dataset: got splits {sorted(source)}, wanted {split!r}")
        source = source[split]
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):
        # A data frame of pandas: its columns' numbers as Python's, its missing values as nothing.
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "custom"):
        # Of `datasets`: its rows as Python has them, not as tensors or tables. A transform stays.
        source = source.with_format(None, columns=form["columns"])
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"dataset: got {type(source).__name__}, wanted a path, an id or a sequence of rows; "
            "streaming data sets are not supported by this version"
        )
    return _numbered(source, "dataset")


def _numbered(rows: Sequence[Mapping[str, Any]], name: str) -> RowSource:
    return RowSource(rows, range(1, len(rows) + 1), name)


def _checked_mapping(row: Any, number: int, name: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}, row {number}: got a JSON {type(row).__name__}, wanted an object")
    return row


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES


class Divisible(Protocol):
    """A data set that can be cut."""

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> Any: ...


Dataset = TypeVar("Dataset", bound=Divisible)


class PreferenceDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """P tokenised preference pairs.

    Args:
        tokens: all token ids, int32, pair after pair: prompt, chosen, rejected and, of all or none, gold.
        bounds: ``(P, 4)`` or ``(P, 5)`` int64 into ``tokens``: start, end of prompt, chosen, rejected, gold.
        rows: ``(P,)`` int64, the row each pair came from.
        columns: further numbers per pair, each ``(P,)`` fp32: those of ``COLUMN_FIELDS`` (margin ...),
            ref_chosen_logps, ref_rejected_logps, and with LD-DPO their ref_ld_alpha.
        report: what became of the rows.
        scored: bool, as ``tokens``: which of the answers' tokens are scored; None for all of them.
        made_with: what beside the rows' texts decided on the tokens, in words.
    """

    def __init__(
        self,
        tokens: Tensor,
        bounds: Tensor,
        rows: Tensor,
        columns: Mapping[str, Tensor],
        report: DataReport,
        *,
        scored: Tensor | None = None,
        made_with: str = "",
    ) -> None:
        self.tokens, self.bounds, self.rows = tokens, bounds, rows
        self.columns, self.report = dict(columns), report
        self.scored, self.made_with = scored, made_with

    def __len__(self) -> int:
        return self.bounds.shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, prompt, chosen, rejected, *gold = self.bounds[index].tolist()
        return {
            "prompt_ids": self.tokens[start:prompt],
            "chosen_ids": self.tokens[prompt:chosen],
            "rejected_ids": self.tokens[chosen:rejected],
            **({"gold_ids": self.tokens[rejected : gold[0]]} if gold else {}),
            **({} if self.scored is None else {"scored": self._scored_answers(index)}),
            "row": int(self.rows[index]),
            **{name: float(values[index]) for name, values in self.columns.items()},
        }

    def _scored_answers(self, index: int) -> tuple[Tensor, ...]:
        """Of each answer, which tokens are scored."""
        assert self.scored is not None
        _, *bounds = self.bounds[index].tolist()
        return tuple(self.scored[start:end] for start, end in zip(bounds, bounds[1:], strict=False))

    def _num_scored(self, answer: int) -> Tensor:
        """``(P,)``: of the chosen (0), rejected (1) or gold (2) answer of each pair."""
        starts, ends = self.bounds[:, answer + 1], self.bounds[:, answer + 2]
        if self.scored is None:
            return ends - starts
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), self.scored.cumsum(0)])
        return counts[ends] - counts[starts]

    @property
    def num_labelled(self) -> Tensor:
        """``(P,)``: tokens of each pair's answers that are scored."""
        return torch.stack([self._num_scored(i) for i in range(self.bounds.shape[1] - 2)]).sum(0)

    @property
    def row_bounds(self) -> Tensor:
        """``(P, 2)``: where each pair begins and ends in ``tokens``."""
        return self.bounds[:, [0, -1]]

    @property
    def lengths(self) -> Tensor:
        """``(P,)``: tokens of the longest of the pair's sequences, prompt included."""
        sizes = self.bounds.diff(dim=1)
        return sizes[:, 0] + sizes[:, 1:].amax(1)

    @property
    def has_gold(self) -> bool:
        """Whether each pair has a third, gold answer."""
        return self.bounds.shape[1] == 5

    @property
    def num_chosen_tokens(self) -> int:
        """Labelled tokens of all chosen answers."""
        return int(self._num_scored(0).sum())

    def num_nll_tokens(self, *, on_prompt: bool) -> int:
        """Tokens of an NLL term: of gold answers, else of chosen ones, with or without their prompts."""
        if self.has_gold:
            return int(self._num_scored(2).sum())
        # Nothing predicts a sequence's first token.
        sequences = (self.bounds[:, 2] - self.bounds[:, 0] - 1).clamp(min=0)
        return int(sequences.sum()) if on_prompt else self.num_chosen_tokens

    @property
    def num_sequences(self) -> Tensor:
        """``(P,)``: sequences that a pair makes in a batch."""
        return torch.full((len(self),), self.bounds.shape[1] - 2)

    def sizes(self, pairs: Tensor) -> list[list[int]]:
        """Of each pair named, tokens of prompt, chosen, rejected and, if any, gold answer."""
        sizes: list[list[int]] = self.bounds[pairs].diff(dim=1).tolist()
        return sizes

    def batch_tokens(self, layout: str) -> Tensor:
        """``(P,)``: tokens that a pair adds to a batch; those of its longer sequence where it is padded."""
        if layout == "padded":
            return self.lengths
        start, prompt, end = self.bounds[:, 0], self.bounds[:, 1], self.bounds[:, -1]
        repeated = (self.bounds.shape[1] - 3) * (prompt - start)
        return (end - start) + (repeated if layout == "packed" else 0)

    @property
    def has_reference(self) -> bool:
        """Whether the pairs carry reference log-probabilities."""
        return all(name in self.columns for name in REF_COLUMNS)

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Of what ``with_reference`` takes."""
        return (len(self), 2)

    def put_scores(self, scores: Tensor, pairs: Tensor, values: Tensor) -> None:
        """Write the scores ``(2k,)`` of a batch of ``pairs`` where they belong."""
        scores[pairs] = values.view(2, -1).T

    def with_reference(self, scores: Tensor) -> PreferenceDataset:
        """The same pairs with reference log-probabilities ``(P, 2)``, chosen and rejected."""
        return self.with_columns(**dict(zip(REF_COLUMNS, scores.unbind(1), strict=True)))

    def scores_by_row(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each pair's row, and its reference log-probabilities by column."""
        names = [*REF_COLUMNS, *([LD_COLUMN] if LD_COLUMN in self.columns else [])]
        table = torch.stack([self.columns[name] for name in names], 1)
        for row, values, of in zip(self.rows.tolist(), table.tolist(), self.row_digests(), strict=True):
            yield row, {**dict(zip(names, values, strict=True)), REF_OF: f"{of} {self.made_with}".strip()}

    def row_digests(self) -> list[str]:
        """Of each pair a short hash of the tokens that its numbers are of; gold answers have none."""
        found = []
        for start, *ends in self.bounds[:, :4].tolist():
            scored = None if self.scored is None else self.scored[ends[0] : ends[-1]]
            found.append(token_digest(self.tokens[start : ends[-1]], [end - start for end in ends], scored))
        return found

    def rows_not_finite(self, scores: Tensor) -> list[int]:
        """Rows with a score that is NaN or infinite."""
        found: list[int] = self.rows[~torch.isfinite(scores).all(1)].tolist()
        return found

    def subset(self, indices: Sequence[int] | Tensor) -> PreferenceDataset:
        """The pairs at ``indices``, sharing the token storage."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        columns = {name: values[index] for name, values in self.columns.items()}
        return self._with(self.bounds[index], self.rows[index], columns)

    def with_columns(self, **columns: Tensor) -> PreferenceDataset:
        """The same pairs with further (or replaced) per-pair numbers."""
        return self._with(self.bounds, self.rows, {**self.columns, **columns})

    def _with(self, bounds: Tensor, rows: Tensor, columns: Mapping[str, Tensor]) -> PreferenceDataset:
        return PreferenceDataset(
            self.tokens, bounds, rows, columns, self.report, scored=self.scored, made_with=self.made_with
        )

    def fingerprint(self) -> str:
        """Hash of token ids, boundaries and what is scored, in order: equal exactly when these are."""
        digest = hashlib.blake2b(digest_size=16)
        lengths = self.bounds.diff(dim=1)
        digest.update(lengths.contiguous().numpy().tobytes())
        for start, *_, end in self.bounds.tolist():
            digest.update(self.tokens[start:end].numpy().tobytes())
            if self.scored is not None:
                digest.update(self.scored[start:end].numpy().tobytes())
        return digest.hexdigest()


def split_pairs(dataset: Dataset, held_out: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (training, held-out) pairs, the same way for the same seed.

    Args:
        held_out: a fraction in (0, 1), or a whole number of pairs from 1.

    Raises:
        ValueError: a split that leaves either side empty.
    """
    count = round(held_out * len(dataset)) if held_out < 1 else int(held_out)
    if not 0 < count < len(dataset) or (held_out >= 1 and count != held_out):
        raise ValueError(
            f"held_out: got {held_out} of {len(dataset)} pairs, wanted a fraction in (0, 1) or a whole "
            "number that leaves pairs on both sides"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.subset(order[count:].sort().values), dataset.subset(order[:count].sort().values)
