"""A reward model as judge: a sequence classifier with one label, with its own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError

from fastdpo.integrations.auto_class import read_config
from fastdpo.rounds.candidates import Candidates
from fastdpo.rounds.generation import positions_of
from fastdpo.rounds.ranks import device_of
from fastdpo.training.data.chat import Conversation, wants_parts
from fastdpo.training.data.messages import read_template_arguments, read_tools
from fastdpo.training.data.template_checks import lost_in_the_answer
from fastdpo.training.data.tokens import RowTokenizer
from fastdpo.training.loop.models import first_line, load_tokenizer
from fastdpo.training.settings.hub import check_there
from fastdpo.training.settings.row_checks import BadRow


class RewardModel:
    """Scores answers; texts, not tokens, go to it, so the policy's tokenizer does not matter.

    Checked: one label, and no weights missing; a chat template of its own for messages, which keeps the
    answer's text; token ids that the model has; no more tokens than it reads; finite scores.

    Args:
        name: path or hub id.
        max_length: the most tokens of prompt and answer; None for the model's own limit.

    Raises:
        ValueError: there is no such model, or it is no reward model.
    """

    def __init__(
        self, name: str, *, dtype: str, max_length: int | None, batch_size: int, use_cpu: bool, **options: Any
    ) -> None:
        check_there("reward_model", name)
        self.name, self.batch_size = name, batch_size
        self.tokenizer = load_tokenizer(name, what="reward_model", **options)
        model = self._loaded(dtype, options)
        self._choose_padding(model)
        self.model: Any = model.to(device_of(use_cpu)).eval()
        limit = positions_of(model)
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(
                f"reward_max_length: got {max_length}, wanted {limit} at most: what {name} has positions for"
            )
        self.limit = max_length or limit
        self._tokens = RowTokenizer(self.tokenizer)

    def _loaded(self, dtype: str, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForSequenceClassification

        try:
            labels = read_config(self.name, **options).num_labels
            if labels != 1:
                raise ValueError(f"it has {labels} labels, wanted a model with one")
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype=dtype, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"reward_model: could not load {self.name!r}: {first_line(error)}") from error
        missing = sorted(found["missing_keys"])
        if missing:
            # transformers would make them up: scores by chance, which look like others.
            raise ValueError(
                f"reward_model: {self.name} has no weights of {missing[0]}: it is no reward model"
            )
        return model

    def _choose_padding(self, model: Any) -> None:
        """Classifiers of decoders look for the last token that is no padding: the ids have to agree."""
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f"reward_model: the tokenizer of {self.name} has no padding token, and no EOS to take "
                    "for it"
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"

    @cached_property
    def _as_parts(self) -> bool:
        return wants_parts(self.tokenizer)

    def check(self, rows: Sequence[tuple[Candidates, Sequence[int]]]) -> None:
        """Raise ValueError, naming the row, for an answer that the model cannot read."""
        self._encoded(_each(rows), [text for row, places in rows for text in self._texts(row, places)])

    def score(self, rows: Sequence[tuple[Candidates, Sequence[int]]]) -> list[list[float]]:
        """Scores of some answers of each row: those at the places given.

        Raises:
            ValueError: an answer that the model cannot read, or a score that is not finite; names the row.
        """
        asked = _each(rows)
        texts = [text for row, places in rows for text in self._texts(row, places)]
        ids = self._encoded(asked, texts)
        scores: dict[int, float] = {}
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            scores |= dict(zip(places, self._forward([ids[place] for place in places]), strict=True))
        for place, (row, _) in enumerate(asked):
            if not math.isfinite(scores[place]):
                raise ValueError(
                    f"reward_model: {self.name} gives {scores[place]} for an answer of {row.where}"
                )
        found = iter(scores[place] for place in range(len(asked)))
        return [[next(found) for _ in places] for _, places in rows]

    def _texts(self, row: Candidates, places: Sequence[int]) -> list[str]:
        if not row.is_chat:
            return [row.prompt + row.answers[place] for place in places]
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"reward_model: {row.where} holds messages, but the tokenizer of {self.name} has no chat "
                "template: its own is what it was trained with"
            )
        answers = [row.answers[place] for place in places]
        try:
            arguments = read_template_arguments(row.columns)
            talk = Conversation(
                self.tokenizer, row.prompt, answers, read_tools(row.columns), arguments, self._as_parts
            )
            for answer, text in zip(answers, talk.texts, strict=True):
                for finding in lost_in_the_answer(answer, text, None):
                    if finding.check == "answer_lost":
                        raise BadRow(*finding)
        except BadRow as error:
            raise ValueError(
                f"reward_model: {row.where}: the chat template of {self.name}: {error}"
            ) from None
        return talk.texts

    def _encoded(self, asked: Sequence[tuple[Candidates, int]], texts: Sequence[str]) -> list[list[int]]:
        ids = self._tokens.tokenize(texts, [row.is_chat for row, _ in asked])
        known = self.model.get_input_embeddings().num_embeddings
        for (row, _), tokens in zip(asked, ids, strict=True):
            if not tokens:
                raise ValueError(f"reward_model: {row.where}: got an answer without tokens")
            if max(tokens) >= known:
                raise ValueError(
                    f"reward_model: {row.where}: the tokenizer of {self.name} gives token {max(tokens)}, "
                    f"and the model has {known}: it is another model's"
                )
            if self.limit is not None and len(tokens) > self.limit:
                raise ValueError(
                    f"reward_model: {row.where}: got {len(tokens)} tokens of prompt and answer, wanted "
                    f"{self.limit} at most, which {self.name} reads: draw shorter answers "
                    "(--max_new_tokens), or leave the row out"
                )
        return ids

    @torch.no_grad()
    def _forward(self, ids: Sequence[list[int]]) -> list[float]:
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
        logits = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


def _each(rows: Sequence[tuple[Candidates, Sequence[int]]]) -> list[tuple[Candidates, int]]:
    return [(row, place) for row, places in rows for place in places]
