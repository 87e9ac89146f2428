"""``PreferenceConfig``: transformers' ``TrainingArguments`` plus what preference training needs.

Every value is checked here, before a model is loaded: the checks are beside this file, a file a subject.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from fastdpo.losses import build_objective
from fastdpo.training.settings.batches import check_batches, check_loader
from fastdpo.training.settings.data import check_data_settings
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.engines import (
    check_engine,
    is_launched,
    join_ranks,
    name_engine,
    told_engine,
)
from fastdpo.training.settings.fields import SettingFields
from fastdpo.training.settings.kinds import kind_of
from fastdpo.training.settings.loop import check_installed, check_loop
from fastdpo.training.settings.losses import TakesLossOptions
from fastdpo.training.settings.nll import trains_on_prompt
from fastdpo.training.settings.parallel import name_parallel
from fastdpo.training.settings.steps import COLUMN_FIELDS, check_step_settings, stand_ins
from fastdpo.training.settings.values import not_default, plain_values, settle


@dataclass
class PreferenceConfig(SettingFields, metaclass=TakesLossOptions):
    """All settings of ``PreferenceTrainer``; the losses' options, and TRL's names, are keywords too.

    Values are read as on the command line and in YAML: ``None``, ``none`` and ``null`` are one.

    Raises:
        TypeError: an unknown setting; says what it is called here.
        ValueError: a value out of range, an unknown loss, option, mode or policy, or a setting of
            ``TrainingArguments`` that this trainer cannot honour; names the field, got, wanted.
    """

    def __post_init__(self) -> None:
        # Values that transformers takes beside those that its hints name.
        resume: Any = self.resume_from_checkpoint
        self.resume_from_checkpoint = {True: "true", False: None}.get(resume, resume)
        self.debug = "" if self.debug is None else self.debug
        fsdp: Any = self.fsdp
        self.fsdp = {True: "true", False: None}.get(fsdp, fsdp)
        padded: Any = self.pad_to_multiple_of
        self.pad_to_multiple_of = None if padded == "auto" else padded  # TRL's, of a machine that is not here
        settle(self)
        fsdp = self.fsdp
        self.fsdp = {"true": True, "false": None}.get(str(fsdp).lower(), fsdp)
        self.given = not_default(self)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.report_to = self.report_to or "none"
        self.max_length = self.max_length or None
        self._choose_defaults()
        self._check_losses()
        check_loop(self)
        check_data_settings(self)
        check_batches(self)
        name_parallel(self)
        name_engine(self)
        super().__post_init__()
        engine = told_engine(self)
        check_engine(self, engine)
        if is_launched() and (engine == "ZeRO-3" or (self.sp_size or 1) > 1):
            join_ranks(self)
        check_loader(self)
        check_installed(self)
        self._settled = plain_values(self)

    def changed(self) -> dict[str, Any]:
        """Settings that were given, or changed since, as plain values."""
        since = {name: value for name, value in plain_values(self).items() if value != self._settled[name]}
        return {**self.given, **since}

    def encoding_options(self) -> EncodingOptions:
        """How rows become tokens."""
        return EncodingOptions(
            self.max_length,
            self.truncation_mode,
            self.on_bad_row,
            {name: getattr(self, column) for name, column in COLUMN_FIELDS.items() if getattr(self, column)},
            assistant_only=self.assistant_only,
            allow_bad_rows=self.allow_bad_rows or (),
            max_bad_rows=self.max_bad_rows,
            processes=self.dataset_num_proc,
            show_progress=not self.disable_tqdm and self.process_index == 0,
            image_folder=self.image_folder,
            image_conditional_pairs=self.image_conditional_pairs,
        )

    def _choose_defaults(self) -> None:
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.longest_batch_first is None:
            self.longest_batch_first = on_gpu
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        # transformers 5.23 calls it activation_checkpointing and warns about the older name.
        names = {item.name for item in dataclasses.fields(TrainingArguments)}
        wanted = on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing
        if "activation_checkpointing" not in names:
            self.gradient_checkpointing = wanted
            return
        if self.activation_checkpointing is None:
            self.activation_checkpointing = wanted
        self.gradient_checkpointing = None
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.gradient_checkpointing_kwargs = None

    def _check_losses(self) -> None:
        kind_of(self.losses)  # raises for losses that want unlike data
        check_step_settings(self)
        try:
            objective = build_objective(
                self.loss_type,
                self.loss_weights,
                beta=self.beta,
                **stand_ins(self),
                **self.options,
            )
        except ValueError as error:
            name, _, rest = str(error).partition(":")
            if name == "beta" or name not in COLUMN_FIELDS:
                raise
            # What is called so is a setting here, which names a column.
            raise ValueError(f"{COLUMN_FIELDS[name]}:{rest}") from None
        self.nll_on_prompt = trains_on_prompt(self, has_nll=objective.uses_nll)
