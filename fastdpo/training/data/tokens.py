"""Token ids of a row: of its prompt and answers, cut to ``max_length``, and which of them are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class RowTokenizer:
    """Tokens of texts, and where in them an answer begins."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        # Where texts end or begin with it, it says nothing.
        ends = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
        self.unknown = None if unknown in ends else unknown

    def tokenize(self, texts: Sequence[str], is_chat: Sequence[bool]) -> list[list[int]]:
        """Token ids of each text; the tokenizer adds its special tokens to plain texts only."""
        ids: list[list[int]] = [[] for _ in texts]
        for chat in set(is_chat):
            places = [i for i, value in enumerate(is_chat) if value == chat]
            encoded = self.tokenizer(
                [texts[i] for i in places],
                add_special_tokens=not chat,
                return_attention_mask=False,
                verbose=False,
            )
            for place, tokens in zip(places, encoded["input_ids"], strict=True):
                ids[place] = list(tokens) if chat else self._without_extra_bos(list(tokens))
        return ids

    def split(
        self, prompt_text: str, prompt: list[int], texts: Sequence[list[int]], *, is_chat: bool
    ) -> tuple[list[int], list[list[int]], bool]:
        """Prompt and answers, and whether the prompt's last tokens are others once an answer follows.

        Args:
            prompt_text, prompt: the prompt and its tokens.
            texts: tokens of the prompt with each answer.
            is_chat: texts hold their special tokens; else each answer gets an end.
        """
        if not is_chat:
            texts = [self._ended(text) for text in texts]
            # A tokenizer that ends every text ends the prompt too, which the answer follows.
            is_ended = prompt[-1:] == [self.tokenizer.eos_token_id]
            if is_ended and not prompt_text.endswith(self.tokenizer.eos_token):
                prompt = prompt[:-1]
        shared = min(common_prefix(prompt, text) for text in texts)
        return prompt[:shared], [text[shared:] for text in texts], shared < len(prompt)

    def _without_extra_bos(self, ids: list[int]) -> list[int]:
        # A text that already starts with the BOS token gets a second one from the tokenizer.
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _ended(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one EOS at the end, whatever the text and the tokenizer put there."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "the tokenizer has no EOS token, so answers given as strings would have no end: set "
                "tokenizer.eos_token"
            )
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        return [*ids, eos]


@dataclass(frozen=True)
class RowTokens:
    """Token ids of one row.

    Args:
        prompt, answers: their ids.
        scored: of each answer, which tokens are; None where all are, of all answers.
        pieces: how many tokens each piece of the answer has, of one in pieces.
    """

    prompt: list[int]
    answers: list[list[int]]
    scored: list[list[bool]] | None = None
    pieces: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the prompt and of all answers."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def num_scored(self) -> list[int]:
        """Of each answer."""
        return list(map(len, self.answers)) if self.scored is None else list(map(sum, self.scored))

    def flat(self) -> torch.Tensor:
        """All ids, prompt first, int32."""
        return torch.tensor([*self.prompt, *(x for ids in self.answers for x in ids)], dtype=torch.int32)

    def flat_scored(self) -> torch.Tensor:
        """Which of them are scored, bool."""
        scored = self.scored or [[True] * len(answer) for answer in self.answers]
        return torch.tensor([*[False] * len(self.prompt), *(x for mask in scored for x in mask)])

    def truncated(self, max_length: int | None, mode: str) -> tuple[RowTokens, str | None]:
        """The row within ``max_length``, or as it is and the check that it fails."""
        longest = max(map(len, self.answers))
        if max_length is None or len(self.prompt) + longest <= max_length:
            return self, None
        if mode == "skip":
            return self, "too_long"
        kept = self.prompt
        if mode == "keep_end":
            kept = self.prompt[-max(max_length - longest, 1) :]
        room = max_length - len(kept)
        if room <= 0:
            return self, "long_prompt"
        scored = None if self.scored is None else [mask[:room] for mask in self.scored]
        return RowTokens(
            kept, [answer[:room] for answer in self.answers], scored, self._pieces_within(room)
        ), None

    def _pieces_within(self, room: int) -> tuple[int, ...]:
        kept = []
        for size in self.pieces:
            kept.append(min(size, room))
            room -= kept[-1]
        return tuple(size for size in kept if size)


def scored_between(cuts: Sequence[int], size: int) -> list[bool]:
    """Which of ``size`` tokens are scored: from the first cut to the second, and so on."""
    bounds = [min(max(cut, 0), size) for cut in cuts]
    scored = [False] * size
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        scored[start:end] = [True] * (end - start)
    return scored


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def token_digest(ids: torch.Tensor, ends: Sequence[int | str], scored: torch.Tensor | None) -> str:
    """A short hash of a row's token ids, int32, of where its parts end, and of what is scored."""
    digest = hashlib.blake2b(repr(list(ends)).encode(), digest_size=8)
    digest.update(ids.contiguous().numpy().tobytes())
    if scored is not None and not scored.all():
        digest.update(scored.contiguous().numpy().tobytes())
    return digest.hexdigest()


def short_hash(value: Any) -> str:
    """Of what JSON can say."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()
