"""What every tokenised data set can do, whatever its kind."""

from __future__ import annotations

from typing import TypeAlias

from fastdpo.training.data.answers import AnswerDataset
from fastdpo.training.data.pairs import PreferenceDataset

RowDataset: TypeAlias = PreferenceDataset | AnswerDataset
