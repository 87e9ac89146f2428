"""The pairs that whole steps are timed on: a file's, or made up ones of realistic lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions

# Words of prompts and answers, medians and spread of log-normal lengths: prompts as long as answers, answers
# of a pair unlike each other, a long tail. Of the order of what chat preference sets have.
PROMPT_WORDS, ANSWER_WORDS, SPREAD = 120, 150, 0.8
MADE_UP = "pairs made up: lengths log-normal, words by Zipf's law, seed 0"


def made_up_rows(count: int) -> list[dict[str, str]]:
    """``count`` rows with ``prompt``, ``chosen`` and ``rejected``; the same for the same count."""
    random = numpy.random.default_rng(0)
    letters = numpy.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(5000)]
    share = 1 / numpy.arange(1, len(words) + 1)

    def text(median: int) -> str:
        length = max(4, int(median * random.lognormal(0, SPREAD)))
        return " ".join(words[k] for k in random.choice(len(words), length, p=share / share.sum()))

    return [
        {"prompt": text(PROMPT_WORDS), "chosen": text(ANSWER_WORDS), "rejected": text(ANSWER_WORDS)}
        for _ in range(count)
    ]


def make_data(
    source: Path | list[dict[str, str]], vocab: int, max_length: int | None
) -> tuple[RowDataset, Any]:
    """The pairs of a file, or rows, and a byte-level BPE trained on them: ids are below ``vocab``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = read_rows(source)
    texts = [str(row.get(name, "")) for row in rows.rows for name in ("prompt", "chosen", "rejected")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    return encode_rows(rows, tokenizer, EncodingOptions(max_length)), tokenizer
