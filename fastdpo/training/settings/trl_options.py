"""Every option of TRL's trainers, and what it is here: a page of the docs, made from the installed TRL.

python -m fastdpo.training.settings.trl_options docs/trl_options.md          # writes the page
python -m fastdpo.training.settings.trl_options docs/trl_options.md --check  # fails where it is another
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.losses import find_loss
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.loop import FIXED
from fastdpo.training.settings.losses import all_loss_options
from fastdpo.training.settings.names import ALIASES, ELSEWHERE, SWITCHES, UNSUPPORTED
from fastdpo.training.settings.run import AdapterArguments, DataArguments, ModelArguments

# The four trainers' configs, and what their scripts read beside these.
CONFIGS = ("DPOConfig", "KTOConfig", "CPOConfig", "ORPOConfig")
OF_SCRIPTS = ("ScriptArguments", "DatasetMixtureConfig", "ModelConfig")
_OURS = (PreferenceConfig, ModelArguments, DataArguments, AdapterArguments)
# Our loss for a config's own, whose options and beta its fields are held to.
LOSS_OF = {"DPOConfig": "sigmoid", "KTOConfig": "kto", "CPOConfig": "cpo", "ORPOConfig": "orpo"}
# TRL's CPO calls what it adds to an NLL term by DPO's names.
CPO_LOSSES = {
    "sigmoid": {"loss_type": "cpo"},
    "hinge": {"loss_type": "cpo", "comparison": "hinge"},
    "ipo": {"loss_type": "cpo", "comparison": "ipo"},
    "simpo": {"loss_type": "cpo_simpo"},
    "alphapo": {"loss_type": "simpo"},
}
# Where a name or a default is the same and more has to be said of it.
NOTES = {
    "loss_type": "says the trainer too: see above",
    "learning_rate": "1e-5 with an adapter",
    "bf16": "none is: on a GPU that has bfloat16, unless `fp16`; TRL's on a CPU too",
    "gradient_checkpointing": "none is: on a GPU; `activation_checkpointing` since transformers 5.23",
    "beta": "none is: the loss's own, as in TRL",
    "truncation_mode": "`keep_end` cuts prompts alone, by as much for both answers; and there is `skip`",
    "router_aux_loss_coef": "none is the model's own, as in TRL; of CPO and ORPO too",
    "use_liger_kernel": "of the backbone; its cross entropies stay off",
    "load_in_4bit": "computed in bf16 or fp16 where the run is, else in `dtype`",
    "padding_free": "TRL 1.16 warns and pads",
    "precompute_ref_batch_size": "none is `per_device_eval_batch_size`",
    "pad_to_multiple_of": "`auto` is none",
    "alpha": "of `simpo` and `cpo_simpo` alone: refused with `cpo`",
    "label_smoothing": "none is: the loss's own, 1e-3 for `exo_pair`",
    "dtype": "auto is float32 where weights are trained, the checkpoint's under an adapter",
    "lora_target_modules": "none is every linear layer but the head; TRL's is peft's choice for the model",
    "dataset_test_split": "none: no evaluation, unless `eval_dataset` or `held_out` says of what",
    "dataset": "of a list's parts `path`, `split`, `fraction` (`weight`)",
    "train_sampling_strategy": "KTO's in TRL is sequential, so that its mismatched answers stay neighbours; "
    "here they are made before rows are shuffled",
    "num_train_epochs": "preference training overfits from the second on",
    "logging_nan_inf_filter": "`on_nonfinite_loss` deals with them",
}
_LIST = "| option | of | there | here | |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Option:
    """A field of TRL's.

    Args:
        kind: ``same`` (a setting of ours of that name), ``renamed``, ``switch``, ``fixed`` (ours, of one
            value), ``refused``, or ``unknown``, which the tests do not let pass.
        ours: the setting, or what to write instead.
        defaults: of each config that has it, TRL's and ours; ours is ``MISSING`` of what is no setting here.
    """

    name: str
    kind: str
    ours: str
    defaults: Mapping[str, tuple[Any, Any]]

    @property
    def is_as_there(self) -> bool:
        """Whether the default is TRL's, in all configs."""
        return all(_shown(theirs) == _shown(ours) for theirs, ours in self.defaults.values())


def trl_options() -> dict[str, Option]:
    """Every field of ``CONFIGS`` and ``OF_SCRIPTS`` of the installed TRL, by name; those of one name are one.

    Raises:
        ImportError: TRL is not installed.
    """
    found: dict[str, Option] = {}
    for config, fields in _fields().items():
        for name, default in fields.items():
            before = found.get(name) or Option(name, *_treatment(name), {})
            known = before.ours if before.kind in ("same", "renamed", "fixed") else name
            both = {config: (default, _our_default(known, config))}
            found[name] = dataclasses.replace(before, defaults={**before.defaults, **both})
    return found


def _fields() -> dict[str, dict[str, Any]]:
    import trl
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig
    from trl.scripts import utils

    kinds = {"CPOConfig": CPOConfig, "ORPOConfig": ORPOConfig}
    found = {
        name: kinds.get(name) or getattr(trl, name, None) or getattr(utils, name)
        for name in (*CONFIGS, *OF_SCRIPTS)
    }
    return {name: _defaults(kind) for name, kind in found.items()}


def _defaults(kind: Any) -> dict[str, Any]:
    return {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in dataclasses.fields(kind)
        if item.init
    }


def _treatment(name: str) -> tuple[str, str]:
    """The kind of an option, and our setting or what to write instead."""
    if name in FIXED:
        return "fixed", name
    if name == "parallelism_config":
        return "refused", "the loop has DDP, FSDP2 and DeepSpeed: `engine`"
    if _setting_default(name) is not dataclasses.MISSING or name in all_loss_options():
        return "same", name
    if name in ALIASES:
        return "renamed", ALIASES[name]
    if name in SWITCHES:
        return "switch", ": ".join(SWITCHES[name])
    text = UNSUPPORTED.get(name) or ELSEWHERE.get(name)
    return ("refused", text) if text else ("unknown", "")


def _setting_default(name: str) -> Any:
    for kind in _OURS:
        defaults: Mapping[str, Any] = _defaults(kind)
        if name in defaults:
            return defaults[name]
    return dataclasses.MISSING


def _our_default(name: str, config: str) -> Any:
    loss = LOSS_OF.get(config, "sigmoid")
    if name == "beta":
        return find_loss(loss).default_beta
    if name == "learning_rate":
        return 1e-6
    takers = all_loss_options().get(name)
    if takers:
        # Of CPO those that its `simpo` has.
        return takers.get(loss, takers.get("cpo_simpo", next(iter(takers.values())))).default
    return _setting_default(name)


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING:
        return ""
    value = getattr(value, "value", value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The page of the docs, as Markdown."""
    import trl
    from transformers import TrainingArguments

    options = trl_options()
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = [option for option in options.values() if option.name not in inherited]
    changed = [
        option
        for option in options.values()
        if option.name in inherited
        and not (option.kind == "same" and option.is_as_there and option.name not in NOTES)
    ]
    unchanged = sorted(options.keys() - {option.name for option in (*own, *changed)})
    return _PAGE.format(
        version=trl.__version__,
        count=len(options),
        own=_table(own),
        changed=_table(changed),
        number=len(unchanged),
        unchanged=", ".join(f"`{name}`" for name in unchanged),
        losses="\n".join(_loss_row(name, ours) for name, ours in CPO_LOSSES.items()),
    )


def _loss_row(name: str, ours: Mapping[str, str]) -> str:
    return f"| `{name}` | {', '.join(f'`{key}: {value}`' for key, value in ours.items())} |"


def _table(options: list[Option]) -> str:
    return "\n".join([_LIST, *(_row(option) for option in options)])


def _row(option: Option) -> str:
    is_all = set(CONFIGS) <= set(option.defaults)
    whose = "all" if is_all else ", ".join(config.removesuffix("Config") for config in option.defaults)
    here = {
        "same": "the same",
        "renamed": f"`{option.ours}`",
        "switch": f"`{option.ours}`",
        "fixed": f"only {_shown(FIXED[option.name][0])}" if option.name in FIXED else "",
        "refused": "refused",
    }[option.kind]
    if option.kind in ("same", "renamed") and not option.is_as_there:
        here += f", default {_each({config: ours for config, (_, ours) in option.defaults.items()})}"
    note = NOTES.get(option.name) or NOTES.get(option.ours, "")
    note = {"refused": option.ours, "fixed": FIXED.get(option.name, ("", ""))[1]}.get(option.kind, note)
    there = _each({config: theirs for config, (theirs, _) in option.defaults.items()})
    return f"| `{option.name}` | {whose} | {there} | {here} | {note} |"


def _each(values: Mapping[str, Any]) -> str:
    """The first config's value, and those of configs that have another."""
    first, *others = (_shown(value) for value in values.values())
    names = list(values)[1:]
    unlike = [f"{n.removesuffix('Config')}: {v}" for n, v in zip(names, others, strict=True) if v != first]
    return f"{first} ({', '.join(unlike)})" if unlike else first


_PAGE = """# TRL's options

Made by `python -m fastdpo.training.settings.trl_options docs/trl_options.md` from the fields of TRL
{version}'s `DPOConfig`, `KTOConfig`, `CPOConfig` and `ORPOConfig`, and of what its scripts read beside
them; a test holds it to the TRL that is installed, so that none of the {count} is left out. A YAML file
of TRL's or of alignment-handbook's runs as it is: `fastdpo train FILE`. What is refused is refused by
name before anything is loaded, with what to write instead; given as none or as off it is taken. `fastdpo
convert-config FILE` writes such a file in our names.

**The loss.** A file of TRL's does not say its trainer, and here the loss does: add `--loss_type kto` or
`orpo` to a file of theirs, and for CPOTrainer's `loss_type`

| there, in CPOConfig | here |
|---|---|
{losses}

where `cpo_alpha` and `simpo_gamma` are taken by those names too. Losses of DPOTrainer and KTOTrainer have
TRL's names and numbers (`tests/losses/test_trl_*.py`).

## Their own

{own}

## Of transformers' `TrainingArguments`

Those that TRL, or this version, has otherwise:

{changed}

The same, with the same default, {number}: {unchanged}.
"""


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` say whether it is as it would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    text = page()
    if options.check:
        return int(options.path.read_text(encoding="utf-8") != text)
    options.path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
