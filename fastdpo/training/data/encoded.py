"""Rows as token ids in a table of Arrow: made once, and memory-mapped from then on.

Where it is known which rows a source has, the table is kept in the cache of ``datasets``, under a name that
says what it is made of: the rows, the tokenizer, the settings, and the code of this room.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.training.data.arrow import bars
from fastdpo.training.data.chunks import Chunks
from fastdpo.training.data.images import images_digest
from fastdpo.training.data.kept import cache_folder, kept_table
from fastdpo.training.data.maker import LeftOut, MadeRow
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.settings.row_checks import Finding

Made = Callable[[], Iterator[list[MadeRow | LeftOut]]]


@dataclass(frozen=True)
class EncodedRows:
    """R rows to keep, and what was found in these and in others.

    Args:
        numbers: ``(R,)`` int64, of the rows of the source that they are from.
        tokens: of all rows, int32: prompt, then answers.
        scored: as ``tokens``, bool.
        prompts, answers, pieces: how many tokens they have.
        values: what the losses use, by name, one for each row.
        left_out, found: a row's number and what was found in it; where the row is not kept, and where it is.
        is_cut: ``(R,)``, whether ``max_length`` took something off.
        digests: ``(R,)`` int64, equal where all tokens and images are.
        images: what ``told_images`` made of each row that was read, a column of Arrow.
        entries, places: ``(R,)`` int64, the places of the rows in it, and in the source.
    """

    numbers: Tensor
    tokens: Chunks
    scored: Chunks
    prompts: Tensor
    answers: Ragged
    pieces: Ragged
    values: dict[str, list[Any]]
    left_out: list[tuple[int, Finding]]
    found: list[tuple[int, Finding]]
    is_cut: Tensor
    digests: Tensor
    images: Any
    entries: Tensor
    places: Tensor

    @cached_property
    def starts(self) -> Tensor:
        """``(R,)``: where rows begin in ``tokens``."""
        ends = (self.prompts + self.answers.sums()).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends[:-1]])

    @cached_property
    def num_unscored(self) -> Tensor:
        """``(R,)``: tokens of answers that are not scored."""
        sizes = self.answers.sums()
        return sizes - self.scored.sums(self.starts + self.prompts, sizes)


def encoded_rows(made: Made, told: str | None) -> EncodedRows:
    """The rows that ``made`` makes, or made before.

    Args:
        told: all that decides on them, in words; None where that cannot be said, and nothing is kept.

    Raises:
        ValueError: as ``made``, or the cache cannot be written.
    """
    import datasets
    import pyarrow

    features = datasets.Features(
        number=datasets.Value("int64"),
        tokens=datasets.List(datasets.Value("int32")),
        scored=datasets.List(datasets.Value("uint8")),
        sizes=datasets.List(datasets.Value("int64")),
        pieces=datasets.List(datasets.Value("int64")),
        values=datasets.Value("string"),
        findings=datasets.Value("string"),
        is_cut=datasets.Value("bool"),
        digest=datasets.Value("int64"),
        place=datasets.Value("int64"),
        images=datasets.Value("string"),
    )
    if told is None or not datasets.is_caching_enabled():
        return _read(pyarrow.Table.from_pylist(list(_records(made)), schema=features.arrow_schema))
    fingerprint = hashlib.blake2b("\n".join([told, _code()]).encode(), digest_size=8).hexdigest()
    try:
        with bars(False):
            kept = kept_table(
                fingerprint,
                lambda folder: datasets.Dataset.from_generator(
                    _records,
                    features=features,
                    cache_dir=folder,
                    gen_kwargs={"made": made},
                    fingerprint=fingerprint,
                ),
            )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise ValueError(
                f"{cache_folder()}: tokenised rows cannot be kept there: {cause} "
                "(HF_DATASETS_CACHE names the folder)"
            ) from cause
        raise cause from None
    return _read(kept.data.table)


@functools.cache
def _code() -> str:
    """Of what makes rows: this room, and the libraries."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    libraries = [f"{name} {version(name)}" for name in ("transformers", "tokenizers")]
    return " ".join([digest.hexdigest(), *libraries])


def _records(made: Made) -> Iterator[dict[str, Any]]:
    for place, parts in enumerate(made()):
        for part in parts:
            yield {**(_left_out(part) if isinstance(part, LeftOut) else _kept(part)), "place": place}


def _left_out(row: LeftOut) -> dict[str, Any]:
    nothing: dict[str, Any] = {name: [] for name in ("tokens", "scored", "sizes", "pieces")}
    told = {"values": "", "findings": json.dumps([row.finding]), "is_cut": False, "digest": 0, "images": ""}
    return {"number": row.number, **nothing, **told}


def _kept(row: MadeRow) -> dict[str, Any]:
    tokens = row.tokens.flat()
    of_images = images_digest(row.images).encode()
    digest = hashlib.blake2b(tokens.numpy().tobytes() + of_images, digest_size=8).digest()
    return {
        "number": row.number,
        "tokens": tokens.numpy(),
        "scored": row.tokens.flat_scored().numpy().astype("uint8"),
        "sizes": [len(row.tokens.prompt), *map(len, row.tokens.answers)],
        "pieces": list(row.tokens.pieces),
        "values": json.dumps(row.numbers) if row.numbers else "",
        "findings": json.dumps(row.findings) if row.findings else "",
        "is_cut": row.is_cut,
        "digest": int.from_bytes(digest, "little", signed=True),
        "images": row.images,
    }


def _read(table: Any) -> EncodedRows:
    numbers, sizes = _tensor(table["number"]), _ragged(table["sizes"])
    is_kept = sizes.counts > 0
    kept = is_kept.nonzero().flatten()
    left_out: list[tuple[int, Finding]] = []
    found: list[tuple[int, Finding]] = []
    for place, text in _texts(table["findings"]):
        findings = found if is_kept[place] else left_out
        findings.extend((int(numbers[place]), Finding(*finding)) for finding in json.loads(text))
    values: dict[str, list[Any]] = {}
    for _, text in _texts(table["values"]):
        for name, value in json.loads(text).items():
            values.setdefault(name, []).append(value)
    prompts, answers = sizes.subset(kept).parted()
    return EncodedRows(
        numbers[kept],
        _chunks(table["tokens"], torch.int32),
        _chunks(table["scored"], torch.bool),
        prompts,
        answers,
        _ragged(table["pieces"]).subset(kept),
        values,
        left_out,
        found,
        _tensor(table["is_cut"].cast("uint8"))[kept],
        _tensor(table["digest"])[kept],
        table["images"],
        kept,
        _tensor(table["place"])[kept],
    )


def _texts(column: Any) -> Iterator[tuple[int, str]]:
    """Those that say something, and the places of their rows."""
    place = 0
    for chunk in column.chunks:
        if chunk.nbytes > 4 * (len(chunk) + 1):  # more than the offsets of empty texts
            yield from ((place + k, text) for k, text in enumerate(chunk.to_pylist()) if text)
        place += len(chunk)


def _tensor(column: Any) -> Tensor:
    return torch.tensor(column.to_numpy())


def _ragged(column: Any) -> Ragged:
    lengths = [torch.tensor(chunk.value_lengths().to_numpy(), dtype=torch.int64) for chunk in column.chunks]
    values = [torch.tensor(chunk.flatten().to_numpy()) for chunk in column.chunks]
    return Ragged.of_counts(_joined(values), _joined(lengths))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def _chunks(column: Any, dtype: torch.dtype) -> Chunks:
    with warnings.catch_warnings():
        # Nothing writes to them.
        warnings.filterwarnings("ignore", message=".*not writable")
        parts = [torch.from_numpy(chunk.flatten().to_numpy()).view(dtype) for chunk in column.chunks]
    return Chunks(parts or [torch.zeros(0, dtype=dtype)])
