"""Settings of ``fastdpo sample``, and of files for it and ``fastdpo judge``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.training.settings.command_line import given_settings
from fastdpo.training.settings.run import ModelArguments
from fastdpo.training.settings.sources import names_of, read_parts
from fastdpo.training.settings.values import hints_of, settle
from fastdpo.training.settings.words import ArgumentError

SAMPLERS = ("transformers", "vllm")
SOURCES = ("policy", "reference", "mixture")
# Of generation: what other settings say, or what would make another number of answers.
_OWN_GENERATION = (
    "do_sample", "temperature", "top_p", "max_new_tokens", "max_length", "num_return_sequences",
    "return_dict_in_generate", "eos_token_id", "pad_token_id", "bos_token_id",
)  # fmt: skip


def help_text(text: str) -> Any:
    """The metadata of a field."""
    return {"help": text}


def check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ArgumentError for a word that is none of some."""
    if value not in choices:
        raise ArgumentError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")


def check_at_least(settings: Any, low: int, *names: str) -> None:
    """Raise ArgumentError for a number below the least."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < low:
            raise ArgumentError(f"{name}: got {value}, wanted {low} or more")


@dataclass
class FileArguments:
    """What is read, what is written, and on what."""

    dataset: str | list[str] | None = field(
        default=None,
        metadata=help_text(
            "The rows: whatever `fastdpo train` reads, a file, a folder, a hub id, or several."
        ),
    )
    dataset_split: str | list[str] = field(
        default="train", metadata=help_text("Split of the dataset, where it has several.")
    )
    output: str | None = field(default=None, metadata=help_text("The JSONL file to write."))
    overwrite_output: bool = field(
        default=False,
        metadata=help_text("Replace the file, and what another run left unfinished beside it."),
    )
    seed: int = field(default=42, metadata=help_text("Of all that is left to chance."))
    use_cpu: bool = field(default=False, metadata=help_text("Leave GPUs alone."))

    def __post_init__(self) -> None:
        self.dataset, self.dataset_split, weights = read_parts(
            "dataset", self.dataset, self.dataset_split, None
        )
        if weights is not None:
            raise ArgumentError("dataset: got weights, wanted none: all rows are taken")
        settle(self)
        for name in ("dataset", "output"):
            if not getattr(self, name):
                raise ArgumentError(f"--{name} is required")
        path = self.path
        if path.suffix != ".jsonl" or path.is_dir():
            raise ArgumentError(f"output: got {self.output}, wanted a file ending in .jsonl")
        if any(
            Path(name).exists() and Path(name).resolve() == path.resolve() for name in names_of(self.dataset)
        ):
            raise ArgumentError(f"output: got {self.output}, which is the data that is read, wanted another")

    @property
    def path(self) -> Path:
        """``output``."""
        return Path(str(self.output)).expanduser()


@dataclass
class SampleArguments(FileArguments):
    """Which answers are drawn."""

    prompt_column: str | None = field(
        default=None, metadata=help_text("Column to read the prompt from, in place of one of that name.")
    )
    ignore_columns: list[str] | None = field(
        default=None, metadata=help_text("Columns to read as if they were not there.")
    )
    skip_rows: int = field(default=0, metadata=help_text("Rows of the data to leave out at its start."))
    max_rows: int | None = field(default=None, metadata=help_text("Rows to take then. Default: all."))
    num_samples: int = field(default=4, metadata=help_text("Answers a prompt, of the model."))
    num_reference_samples: int = field(
        default=0, metadata=help_text("Further answers a prompt, of ref_model (XPO).")
    )
    num_mixture_samples: int = field(
        default=0,
        metadata=help_text(
            "Further answers a prompt, of the geometric mixture of model and ref_model, token by token "
            "(Nash-MD)."
        ),
    )
    mixture_weight: float = field(
        default=0.5, metadata=help_text("ref_model's share of the mixture's log-probabilities, in [0, 1].")
    )
    temperature: float = field(default=1.0, metadata=help_text("Of sampling; 0 takes the likeliest token."))
    top_p: float = field(
        default=1.0, metadata=help_text("Draw from the likeliest tokens of this mass, in (0, 1].")
    )
    max_new_tokens: int = field(default=512, metadata=help_text("Longest answer, in tokens."))
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=help_text(
            "Further settings of the sampler (transformers' GenerationConfig, vLLM's SamplingParams), a "
            "dict or JSON: top_k, min_p, repetition_penalty ..."
        ),
    )
    batch_size: int = field(
        default=32,
        metadata=help_text("Answers drawn at once. Other batches, other answers, with the same seed."),
    )
    on_bad_row: str = field(
        default="error",
        metadata=help_text(
            "Rows without a prompt that the model can go on from: error (names them) or skip."
        ),
    )
    sampler: str = field(
        default="transformers",
        metadata=help_text("What draws: transformers (generate) or vllm, where installed."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("sampler", self.sampler, SAMPLERS)
        check_one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        check_at_least(self, 0, "skip_rows", "num_samples", "num_reference_samples", "num_mixture_samples")
        check_at_least(self, 1, "max_rows", "max_new_tokens", "batch_size")
        if not self.counts:
            raise ArgumentError("num_samples: got 0 and no samples of ref_model or a mixture, wanted some")
        for name, legal in (
            ("temperature", self.temperature >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("mixture_weight", 0 <= self.mixture_weight <= 1),
        ):
            if not legal:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, which is out of its range")
        many = next((name for name, count in self.counts.items() if count > 1), None)
        if self.temperature == 0 and many is not None:
            raise ArgumentError(
                f"temperature: got 0 with {self.counts[many]} samples of the {many}, wanted one: they would "
                "be the same"
            )
        for name in self.generation:
            if name in _OWN_GENERATION:
                raise ArgumentError(
                    f"generation_kwargs: got {name!r}, which has a setting of its own, or is fixed"
                )

    @property
    def counts(self) -> dict[str, int]:
        """Answers a prompt by where they are from, in the order of ``SOURCES``; those of none left out."""
        counts = (self.num_samples, self.num_reference_samples, self.num_mixture_samples)
        return {source: count for source, count in zip(SOURCES, counts, strict=True) if count}

    @property
    def generation(self) -> dict[str, Any]:
        """``generation_kwargs``, if any."""
        found: Any = self.generation_kwargs
        return found or {}


def check_sampled_model(model: ModelArguments, sample: SampleArguments) -> None:
    """Raise ArgumentError for models that are missing, or that nothing is drawn of."""
    if not model.model:
        raise ArgumentError("--model is required")
    if model.teacher_model is not None:
        raise ArgumentError(f"teacher_model: got {model.teacher_model}, and nothing is distilled here")
    needed = [source for source in sample.counts if source != "policy"]
    if needed and model.ref_model is None:
        raise ArgumentError(f"ref_model: got none, wanted one for samples of the {needed[0]}")
    if not needed and model.ref_model is not None:
        raise ArgumentError(
            f"ref_model: got {model.ref_model}, wanted num_reference_samples or num_mixture_samples beside it"
        )


def parse_sample(argv: Sequence[str]) -> tuple[ModelArguments, SampleArguments]:
    """The arguments of ``fastdpo sample``. Raises ArgumentError or, for a refused value, ValueError."""
    model, sample = parse_settings((ModelArguments, SampleArguments), argv, "fastdpo sample")
    check_sampled_model(model, sample)
    return model, sample


def parse_settings(kinds: Sequence[type], argv: Sequence[str], prog: str) -> list[Any]:
    """One of each dataclass, of words of a command line. Raises ArgumentError or ValueError."""
    given = given_settings(kinds, argv, prog=prog)
    return [kind(**{name: given[name] for name in hints_of(kind) if name in given}) for kind in kinds]
