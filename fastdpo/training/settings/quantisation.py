"""Settings of a base whose weights are kept in 4 or 8 bits, under an adapter: QLoRA, through bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

_STORAGES = ("uint8", "bfloat16", "float16", "float32")


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class QuantisationArguments:
    """The part of ``ModelArguments`` that TRL's ``ModelConfig`` names so too."""

    load_in_4bit: bool = field(
        default=False,
        metadata=_help("Keep the base's linear layers in 4 bits, under an adapter (bitsandbytes)."),
    )
    load_in_8bit: bool = field(
        default=False,
        metadata=_help("Keep the base's linear layers in 8 bits, under an adapter (bitsandbytes)."),
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata=_help("Of 4 bits: nf4 or fp4."))
    use_bnb_nested_quant: bool = field(
        default=False, metadata=_help("Of 4 bits: keep the scales in 8 bits, which saves 0.4 bits a weight.")
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata=_help("Of 4 bits: the dtype that they are packed in. Default uint8.")
    )

    @property
    def is_quantised(self) -> bool:
        """Whether the base is loaded in fewer than 16 bits."""
        return self.load_in_4bit or self.load_in_8bit

    def check_quantisation(self) -> None:
        """Raise ValueError for settings that exclude each other, or without the library."""
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit: got True with load_in_8bit, wanted one of the two")
        for name, known in (
            ("bnb_4bit_quant_type", ("nf4", "fp4")),
            ("bnb_4bit_quant_storage", (None, *_STORAGES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {known}")
        if not self.load_in_4bit:
            defaults = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False}
            for name, off in {**defaults, "bnb_4bit_quant_storage": None}.items():
                if getattr(self, name) != off:
                    raise ValueError(f"{name}: got {getattr(self, name)!r} without load_in_4bit, wanted both")
        if self.is_quantised and importlib.util.find_spec("bitsandbytes") is None:
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ValueError(
                f"{name}: got True, which needs bitsandbytes, and it is not there: pip install bitsandbytes"
            )

    def quantisation_config(self, dtype: str) -> Any:
        """A ``BitsAndBytesConfig`` that computes in ``dtype``, as TRL has it, or None."""
        if not self.is_quantised:
            return None
        from transformers import BitsAndBytesConfig

        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )
