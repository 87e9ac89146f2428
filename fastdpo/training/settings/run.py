"""What a run from the command line is told beside ``PreferenceConfig``: model, data, adapter, output."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.hub import check_push, check_there, has_splits, is_adapter, looks_like_path
from fastdpo.training.settings.own_losses import IMPORTED
from fastdpo.training.settings.quantisation import QuantisationArguments
from fastdpo.training.settings.sources import names_of, read_parts
from fastdpo.training.settings.stream import check_stream_settings
from fastdpo.training.settings.values import not_default, settle
from fastdpo.training.settings.words import ArgumentError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Modules that an implementation of attention needs.
_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class ModelArguments(QuantisationArguments):
    """Which model."""

    model: str | None = field(
        default=None,
        metadata=_help(
            "Path or hub id of a causal language model, or of an adapter, whose training goes on."
        ),
    )
    tokenizer: str | None = field(default=None, metadata=_help("Path or hub id. Default: the model's."))
    chat_template: str | None = field(
        default=None,
        metadata=_help("Jinja chat template, as text or a file, for a tokenizer without one."),
    )
    dtype: str | None = field(
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
    use_kernels: bool = field(
        default=False,
        metadata=_help("Replace layers of the backbone by kernels of the hub, where it has some (kernels)."),
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Further arguments of from_pretrained, a dict or JSON, as in TRL.")
    )

    def __post_init__(self) -> None:
        settle(self)
        self._read_init_kwargs()
        self.dtype = self.dtype or "auto"
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype: got {self.dtype!r}, wanted one of {', '.join(DTYPES)}")
        self.check_quantisation()
        if self.use_kernels and not _is_installed("kernels"):
            raise ArgumentError(
                "use_kernels: got True, which needs kernels, which is not installed: pip install kernels"
            )
        needed = _ATTENTION.get(self.attn_implementation or "")
        if needed is not None and not _is_installed(needed):
            raise ArgumentError(
                f"attn_implementation: got {self.attn_implementation!r}, which needs {needed}, which is not "
                "installed: pip install it, or take sdpa"
            )

    def _read_init_kwargs(self) -> None:
        """Those that are settings become settings; the others are kept for ``loading_options``."""
        given: Any = dict(self.model_init_kwargs or {})  # type: ignore[arg-type]
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in given.keys() & (defaults.keys() - {"model", "model_init_kwargs"}):
            if getattr(self, name) not in (defaults[name], given[name]):
                raise ArgumentError(f"model_init_kwargs: got {name}, which is given too: give one of the two")
            setattr(self, name, given.pop(name))
        self.model_init_kwargs = given or None
        settle(self)

    @property
    def name(self) -> str:
        """``model``, which parsing has made sure is there."""
        assert self.model is not None
        return self.model

    def loading_options(
        self, *, adapted: bool, mixed_precision: str | None = None, device: Any = None
    ) -> dict[str, Any]:
        """Keyword arguments of ``load_model``; few bits are computed with as the run does, on its device."""
        given: Any = self.model_init_kwargs or {}
        dtype = "float32" if self.dtype == "auto" and not adapted else self.dtype
        options: dict[str, Any] = {**given, "dtype": dtype}
        for name in ("attn_implementation", "revision", "trust_remote_code", "use_kernels"):
            if getattr(self, name):
                options[name] = getattr(self, name)
        if self.is_quantised:
            computes_in = "float32" if self.dtype == "auto" else str(self.dtype)
            options["quantization_config"] = self.quantisation_config(
                {"bf16": "bfloat16", "fp16": "float16"}.get(str(mixed_precision), computes_in)
            )
            if device is not None:
                options["device_map"] = {"": str(device)}
        return options


def template_text(given: str) -> str:
    """A chat template given as itself, or as the file that it is in.

    Raises:
        ArgumentError: it is neither.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ArgumentError(f"chat_template: got {given!r}, wanted a file or a Jinja template: no such file")
    return path.read_text(encoding="utf-8")


@dataclass
class DataArguments:
    """Which rows."""

    dataset: str | list[str] | None = field(
        default=None,
        metadata=_help(
            "The training pairs, or what the losses take: a JSONL, JSON, CSV or TSV file (also .gz, .zst, "
            ".xz, .bz2), a Parquet or Arrow file, a pattern or a folder of files, a hub id; or several."
        ),
    )
    dataset_split: str | list[str] = field(
        default="train",
        metadata=_help(
            "Split of the dataset, where it has several; of several, one for all or one for each."
        ),
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata=_help(
            "Of several datasets, the share of the rows that each has, of any sum: as many rows as that "
            "allows without a repeat. Default: all rows of all."
        ),
    )
    dataset_streaming: bool = field(
        default=False,
        metadata=_help(
            "Read rows while they are trained on, and keep none, for data that do not fit on the disk; with "
            "max_steps."
        ),
    )
    eval_dataset: str | list[str] | None = field(
        default=None, metadata=_help("As dataset, for evaluation; of several all rows.")
    )
    eval_dataset_split: str | list[str] | None = field(
        default=None,
        metadata=_help(
            "Split of the evaluation dataset. Default test; without eval_dataset, a split of dataset to "
            "evaluate on."
        ),
    )
    held_out: float = field(
        default=0.0,
        metadata=_help("Hold this share (below 1) or number of pairs out of training, for evaluation."),
    )

    def __post_init__(self) -> None:
        self.dataset, self.dataset_split, self.dataset_weights = read_parts(
            "dataset", self.dataset, self.dataset_split, self.dataset_weights
        )
        self.eval_dataset, self.eval_dataset_split, weights = read_parts(
            "eval_dataset", self.eval_dataset, self.eval_dataset_split, None
        )
        if weights is not None:
            raise ArgumentError("eval_dataset: got weights, wanted none: all rows are evaluated on")
        settle(self)
        if self.eval_dataset is None and self.eval_dataset_split is not None:
            self.eval_dataset = self.dataset
        if self.held_out and self.dataset_streaming:
            raise ArgumentError(
                "--held_out: got a value with --dataset_streaming, wanted --eval_dataset: which rows a "
                "stream has is not known, so none can be held out of it"
            )
        if self.held_out and self.eval_dataset is not None:
            raise ArgumentError("--held_out and --eval_dataset: give one of the two")
        named = None if self.dataset_split == "train" else self.dataset_split
        self._check_split("dataset_split", self.dataset, named)
        self._check_split("eval_dataset_split", self.eval_dataset, self.eval_dataset_split)

    def _check_split(self, name: str, source: object, split: object) -> None:
        """Raise ArgumentError for a split of what has none: all of its rows would be taken for it."""
        if isinstance(split, str) and isinstance(source, str) and not has_splits(source):
            raise ArgumentError(f"--{name}: got {split!r} of {source}, which has no splits")

    @property
    def has_evaluation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.held_out) or self.eval_dataset is not None


@dataclass
class AdapterArguments:
    """LoRA, through peft."""

    use_peft: bool = field(default=False, metadata=_help("Train a LoRA adapter instead of all weights."))
    lora_r: int = field(default=16, metadata=_help("Rank."))
    lora_alpha: int = field(default=32, metadata=_help("Scale: the adapter counts lora_alpha / lora_r."))
    lora_dropout: float = field(default=0.0, metadata=_help("Dropout of the adapter."))
    lora_target_modules: str | list[str] | None = field(
        default=None,
        metadata=_help(
            "Names of the adapted modules, a pattern of their full names, or all-linear, the default: every "
            "linear layer but the head."
        ),
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata=_help("Names of adapted parameters that are no modules, as a mixture's experts."),
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata=_help("Must stay CAUSAL_LM."))
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Names of modules trained in full beside the adapter (lm_head ...).")
    )
    use_rslora: bool = field(
        default=False, metadata=_help("Scale by lora_alpha / sqrt(lora_r): rank-stabilised LoRA.")
    )
    use_dora: bool = field(
        default=False, metadata=_help("DoRA: directions from LoRA, magnitudes of their own.")
    )

    def __post_init__(self) -> None:
        settle(self)
        changed = [item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default]
        if self.lora_task_type != "CAUSAL_LM":
            raise ArgumentError(f"--lora_task_type: got {self.lora_task_type!r}, wanted 'CAUSAL_LM'")
        if changed and not self.use_peft:
            raise ArgumentError(f"--{changed[0]}: has no effect without --use_peft")

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
            target_modules=_target_modules(self.lora_target_modules),
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )


def _target_modules(given: str | list[str] | None) -> str | list[str]:
    """One word is a module's name, a pattern where it could not be one, or ``all-linear``."""
    words = [given] if isinstance(given, str) else given or ["all-linear"]
    if len(words) == 1 and (words[0] == "all-linear" or not re.fullmatch(r"[\w.]+", words[0])):
        return words[0]
    return words


@dataclass
class ScoreArguments:
    """Where scores go, beside the cache."""

    output: str | None = field(
        default=None,
        metadata=_help(
            "Write the scored rows as JSONL, with ref_chosen_logps and ref_rejected_logps (of other "
            "data than pairs, ref_logps, a list)."
        ),
    )

    def __post_init__(self) -> None:
        settle(self)

    def checked_path(self, data: DataArguments) -> Path | None:
        """The file to write. Raises ArgumentError for one that cannot be written as it is named."""
        if self.output is None:
            return None
        path = Path(self.output).expanduser()
        if path.suffix != ".jsonl":
            raise ArgumentError(
                f"--output: got {path}, wanted a file ending in .jsonl, which is what is written"
            )
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            raise ArgumentError(f"--output: got {path}, wanted a file in a folder")
        read = [*names_of(data.dataset), *names_of(data.eval_dataset)]
        if any(Path(name).exists() and Path(name).resolve() == path.resolve() for name in read):
            raise ArgumentError(f"--output: got {path}, which is the data that is read, wanted another file")
        return path


@dataclass(frozen=True)
class RunArguments:
    """Everything a run is told."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    config: PreferenceConfig

    def __post_init__(self) -> None:
        for name, value in (("model", self.model.model), ("dataset", self.data.dataset)):
            if not value:
                raise ArgumentError(f"--{name} is required")
        if self.model.is_quantised and not self.is_adapted:
            name = "load_in_4bit" if self.model.load_in_4bit else "load_in_8bit"
            raise ArgumentError(
                f"--{name}: got True without an adapter, wanted --use_peft, or an adapter as --model: "
                "weights of so few bits cannot be trained"
            )
        if self.data.dataset_streaming:
            check_stream_settings(self.config)
        losses, teacher = ", ".join(self.config.loss_type), self.model.teacher_model
        if self.config.needs_teacher and teacher is None:
            raise ArgumentError(f"--teacher_model is required for {losses}, which distils it")
        if teacher is not None and not self.config.needs_teacher:
            raise ArgumentError(f"--teacher_model: got {teacher}, but {losses} distils no model")
        if self.config.do_eval and not self.data.has_evaluation:
            strategy = str(getattr(self.config.eval_strategy, "value", self.config.eval_strategy))
            got = "do_eval" if strategy == "no" else f"eval_strategy: got {strategy!r}"
            raise ArgumentError(f"{got} without rows to evaluate on: give --eval_dataset or --held_out")

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is trained: a new one, or the one that ``model`` is."""
        return self.adapter.use_peft or is_adapter(self.model.name)

    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments of ``load_model``."""
        quantised: dict[str, Any] = {}
        if self.model.is_quantised:
            quantised = {"mixed_precision": self.config.mixed_precision, "device": self.config.device}
        return self.model.loading_options(adapted=self.is_adapted, **quantised)

    def told(self) -> dict[str, Any]:
        """What is not in ``config``, where it is not the default: for ``settings.yaml``."""
        parts = (self.model, self.data, self.adapter)
        told = {name: value for part in parts for name, value in not_default(part).items()}
        return {**({"import": list(IMPORTED)} if IMPORTED else {}), **told}

    def check_there(self) -> None:
        """Make sure that what is named is there, and that what is made may be pushed, before any is loaded.

        Raises:
            ValueError: it is not; says which.
        """
        for name in ("model", "tokenizer", "ref_model", "teacher_model"):
            value = getattr(self.model, name)
            if value is not None:
                check_there(name, value)
        for name in ("dataset", "eval_dataset"):
            for value in names_of(getattr(self.data, name)):
                # Files, and paths that are wrong, are for what reads them.
                if not looks_like_path(value) and not Path(value).suffix:
                    check_there(name, value, kind="dataset")
        check_push(self.config)


def _is_installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
