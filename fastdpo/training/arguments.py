"""The command line's arguments: every setting as a flag, in a YAML file, or both (flags win).

Flags come from dataclasses, and those of the losses' options from the registry: nothing is listed
twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastdpo.losses import loss_options
from fastdpo.losses.registry import LossOption
from fastdpo.training.config import PreferenceConfig
from fastdpo.training.kinds import KINDS, PAIRED
from fastdpo.training.setup import load_tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ArgumentError(ValueError):
    """The command line cannot be understood."""


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class ModelArguments:
    """Which model."""

    model: str | None = field(default=None, metadata=_help("Path or hub id of a causal language model."))
    tokenizer: str | None = field(default=None, metadata=_help("Path or hub id. Default: the model's."))
    chat_template: str | None = field(
        default=None, metadata=_help("File with a Jinja chat template, for a tokenizer without one.")
    )
    dtype: str = field(
        default="auto",
        metadata=_help(
            "Dtype of the weights: float32, bfloat16, float16, or auto: float32 when they are trained "
            "(16 bits lose small updates), the checkpoint's under an adapter."
        ),
    )
    ref_model: str | None = field(
        default=None, metadata=_help("Path or id of the reference. Default: the model as it is at the start.")
    )
    teacher_model: str | None = field(
        default=None,
        metadata=_help("Path or id of the model that the loss distils (aligndistil: one trained with DPO)."),
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("sdpa, flash_attention_2, eager ...")
    )
    revision: str | None = field(default=None, metadata=_help("Branch, tag or commit of a hub model."))
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that comes with the model."))

    @property
    def name(self) -> str:
        """``model``, which parsing has made sure is there."""
        assert self.model is not None
        return self.model

    def loading_options(self, *, adapted: bool) -> dict[str, Any]:
        """Keyword arguments of ``load_model``."""
        if self.dtype not in DTYPES:
            raise ArgumentError(f"--dtype: got {self.dtype!r}, wanted one of {DTYPES}")
        options: dict[str, Any] = {"dtype": "float32" if self.dtype == "auto" and not adapted else self.dtype}
        for name in ("attn_implementation", "revision", "trust_remote_code"):
            if getattr(self, name):
                options[name] = getattr(self, name)
        return options

    def load_tokenizer(self) -> Any:
        """The tokenizer, with the chat template given."""
        tokenizer = load_tokenizer(self.tokenizer or self.name, trust_remote_code=self.trust_remote_code)
        if self.chat_template is not None:
            path = Path(self.chat_template)
            if not path.is_file():
                raise ArgumentError(f"--chat_template: no such file: {path}")
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        return tokenizer


@dataclass
class DataArguments:
    """Which pairs."""

    dataset: str | None = field(
        default=None,
        metadata=_help(
            "JSONL, JSON or Parquet file, `datasets` directory, or hub id, with the training pairs, or "
            "what the losses take."
        ),
    )
    dataset_split: str = field(default="train", metadata=_help("Split of the dataset, where it has several."))
    eval_dataset: str | None = field(default=None, metadata=_help("The same for evaluation."))
    eval_dataset_split: str = field(default="test", metadata=_help("Split of the evaluation dataset."))
    held_out: float = field(
        default=0.0,
        metadata=_help("Hold this share (below 1) or number of pairs out of training, for evaluation."),
    )


@dataclass
class AdapterArguments:
    """LoRA, through peft."""

    use_peft: bool = field(default=False, metadata=_help("Train a LoRA adapter instead of all weights."))
    lora_r: int = field(default=16, metadata=_help("Rank."))
    lora_alpha: int = field(default=32, metadata=_help("Scale: the adapter counts lora_alpha / lora_r."))
    lora_dropout: float = field(default=0.0, metadata=_help("Dropout of the adapter."))
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=_help("Names of the adapted modules. Default: every linear layer but the head."),
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Names of modules trained in full beside the adapter (lm_head ...).")
    )

    def peft_config(self) -> Any:
        """A ``LoraConfig``, or None without ``--use_peft``."""
        if not self.use_peft:
            return None
        try:
            from peft import LoraConfig
        except ImportError:
            raise ImportError("--use_peft needs peft, which is not installed: pip install peft") from None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            modules_to_save=self.lora_modules_to_save,
            task_type="CAUSAL_LM",
        )


@dataclass
class ScoreArguments:
    """Where scores go, beside the cache."""

    output: str | None = field(
        default=None,
        metadata=_help(
            "Write the scored rows as JSONL, with ref_chosen_logps and ref_rejected_logps (of other "
            "data than pairs, ref_logps, to look at: train reads the cache)."
        ),
    )


@dataclass(frozen=True)
class RunArguments:
    """Everything a run is told."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    config: PreferenceConfig


def parse_train(argv: Sequence[str]) -> RunArguments:
    """The arguments of ``fastdpo train``. Raises ArgumentError or, for a refused value, ValueError."""
    return _checked(*Parser(_RUN_TYPES, prog="fastdpo train").parse(argv))


def parse_score(argv: Sequence[str]) -> tuple[RunArguments, Path | None]:
    """The arguments of ``fastdpo score``, and where to write the scored rows."""
    *run, extra = Parser((*_RUN_TYPES, ScoreArguments), prog="fastdpo score").parse(argv)
    config = run[-1]
    if config.needs_divergences:
        names = ", ".join(config.loss_type)
        raise ArgumentError(f"--loss_type: got {names}, which has no use for reference log-probabilities")
    arguments = _checked(*run)
    return arguments, None if extra.output is None else Path(extra.output)


def _checked(
    model: ModelArguments, data: DataArguments, adapter: AdapterArguments, config: PreferenceConfig
) -> RunArguments:
    for name, value in (("model", model.model), ("dataset", data.dataset)):
        if value is None:
            raise ArgumentError(f"--{name} is required")
    losses = ", ".join(config.loss_type)
    if config.needs_teacher and model.teacher_model is None:
        raise ArgumentError(f"--teacher_model is required for {losses}, which distils it")
    if model.teacher_model is not None and not config.needs_teacher:
        raise ArgumentError(f"--teacher_model: got {model.teacher_model}, but {losses} distils no model")
    if data.held_out and data.eval_dataset is not None:
        raise ArgumentError("--held_out and --eval_dataset: give one of the two")
    changed = [
        item.name for item in dataclasses.fields(adapter) if getattr(adapter, item.name) != item.default
    ]
    if changed and not adapter.use_peft:
        raise ArgumentError(f"--{changed[0]}: has no effect without --use_peft")
    return RunArguments(model, data, adapter, config)


_RUN_TYPES = (ModelArguments, DataArguments, AdapterArguments, PreferenceConfig)


class Parser(HfArgumentParser):
    """One flag per field of some dataclasses; the losses' options are flags of their own."""

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", help="YAML file with any of these settings; flags win over it.")
        group = self.add_argument_group("options of the losses")
        for name, takers in _all_loss_options().items():
            option = next(iter(takers.values()))
            switch: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True}
            group.add_argument(
                f"--{name}",
                dest=f"{_OPTION}{name}",
                metavar=name.upper(),
                **(switch if option.type is bool else {"type": option.type}),
                help=f"Of {', '.join(takers)}. Default {option.default}.".replace("%", "%%"),
            )

    def error(self, message: str) -> NoReturn:
        """One line instead of a page of usage."""
        raise ArgumentError(message)

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """The dataclasses, filled from ``argv`` and the YAML file it names.

        Raises:
            ArgumentError: an unknown flag or setting, or a value of the wrong type.
            ValueError: a value that a dataclass refuses.
        """
        argv = list(argv)
        if argv and argv[0].endswith((".yaml", ".yml")):
            argv.insert(0, "--config")
        config, _ = self.parse_known_args([word for word in argv if word not in ("-h", "--help")])
        from_file = _read_yaml(Path(config.config)) if config.config else []
        values, unknown = self.parse_known_args([*from_file, *argv])
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ArgumentError(f"unknown argument {unknown[0]}{hint}")
        return self._fill(vars(values))

    def _fill(self, values: dict[str, Any]) -> list[Any]:
        given = {
            name.removeprefix(_OPTION): value
            for name, value in values.items()
            if name.startswith(_OPTION) and value is not None
        }
        if given:
            values["loss_options"] = {**json.loads(values["loss_options"] or "{}"), **given}
        return [
            kind(**{item.name: values[item.name] for item in dataclasses.fields(kind) if item.init})
            for kind in self.dataclass_types
        ]


def _all_loss_options() -> dict[str, dict[str, LossOption]]:
    """Every option of the losses that the loop takes: option -> loss -> option."""
    options: dict[str, dict[str, LossOption]] = {}
    for inputs in dict.fromkeys((*PAIRED, *(kind.inputs for kind in KINDS.values()))):
        for name, takers in loss_options(inputs).items():
            options.setdefault(name, {}).update(takers)
    return options


_OPTION = "loss option "  # no flag's name has spaces, so no field can collide


def _read_yaml(path: Path) -> list[str]:
    """The file's settings as command-line words, so that argparse checks and converts them alike."""
    import yaml  # type: ignore[import-untyped]

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ArgumentError(f"--config: cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ArgumentError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ArgumentError(f"--config: {path} holds a {type(settings).__name__}, wanted names and values")
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return words
