"""What is kept beside a model: the settings of its run, and a card that says how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import fastdpo
from fastdpo.integrations.partitioned import whole_shape
from fastdpo.training.loop.announce import betas_of
from fastdpo.training.loop.curves import CURVES_FILE
from fastdpo.training.reference.sources import is_adapter_model
from fastdpo.training.settings.config import PreferenceConfig

SETTINGS_FILE = "settings.yaml"
CARD_FILE = "README.md"
TAG = "fastdpo"
_LAST = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies")
_OF_A_START = ("local_rank", "output_dir", "resume_from_checkpoint", "overwrite_output_dir")


def settings_of(args: PreferenceConfig) -> dict[str, Any]:
    """What a run's config was given, without secrets, and what is of one machine or one start."""
    told = args.changed().items()
    return {name: value for name, value in told if not (name.endswith("_token") or name in _OF_A_START)}


def write_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Write ``settings.yaml``, which ``fastdpo train`` reads."""
    import yaml  # type: ignore[import-untyped]

    text = f"# fastdpo {fastdpo.__version__}: the settings that made this model, where not the defaults\n"
    text += yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True) if settings else ""
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def has_own_card(folder: Path) -> bool:
    """Whether a folder has a card that is not ours to replace."""
    path = folder / CARD_FILE
    return path.is_file() and TAG not in path.read_text(encoding="utf-8", errors="replace")


def write_card(trainer: Any, folder: Path) -> None:
    """Write the model's card in place of what peft or transformers make of it."""
    from huggingface_hub import ModelCard, ModelCardData

    is_adapter = is_adapter_model(trainer.model)
    base = _base_name(trainer.model)
    data = ModelCardData(
        base_model=None if base is None or Path(base).exists() else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[TAG, "preference-optimization", *trainer.args.loss_type, *(["lora"] if is_adapter else [])],
    )
    text = _text(trainer, base, is_adapter)
    if (folder / CURVES_FILE).is_file():
        text += f"\n![what the run logged]({CURVES_FILE})\n"
    text += _citations(trainer.args)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD_FILE)


def _base_name(model: Any) -> str | None:
    configs = list(getattr(model, "peft_config", {}).values())
    name = getattr(configs[0], "base_model_name_or_path", None) if configs else None
    name = name or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def _text(trainer: Any, base: str | None, is_adapter: bool) -> str:
    args, state = trainer.args, trainer.state
    name = Path(args.output_dir).name
    losses = [
        f"`{spec.name}`: {spec.summary.replace('``', '`').rstrip('.')} ({spec.paper})" for spec in args.losses
    ]
    pairs = trainer.train_dataset
    rows = {
        "made of": base or "a model without a name",
        "trained": _what_is_trained(trainer.model, is_adapter),
        "losses": "; ".join(losses),
        "beta": betas_of(args),
        "reference": trainer.reference.kind,
        "data": None if pairs is None else str(pairs.report).replace("|", "\\|"),
        "steps": f"{state.global_step} (epoch {state.epoch or 0:.2f})",
        "peak learning rate": f"{args.learning_rate:g}",
        "versions": _versions(is_adapter),
        **_last_values(state.log_history),
    }
    table = "".join(f"| {title} | {text} |\n" for title, text in rows.items() if text)
    library, kind = ("peft", "AutoPeftModel") if is_adapter else ("transformers", "AutoModel")
    loading = f"from {library} import {kind}ForCausalLM as Model"
    return (
        f"# {name}\n\nTrained on preferences with fastdpo {fastdpo.__version__}; `{SETTINGS_FILE}` has the "
        f"settings.\n\n| | |\n|---|---|\n{table}\n"
        f"```python\n{loading}\nfrom transformers import AutoTokenizer\n\n"
        f'model = Model.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
    )


def _versions(is_adapter: bool) -> str:
    found = {
        "fastdpo": fastdpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if is_adapter:
        import peft

        found["peft"] = peft.__version__
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _citations(args: PreferenceConfig) -> str:
    """BibTeX of the losses' papers, by their arXiv ids, and of fastdpo."""
    entries = [
        f"@misc{{{spec.name},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{number}}}\n}}"
        for spec in args.losses
        for number in re.findall(r"\b\d{4}\.\d{4,5}\b", spec.paper)[:1]
    ]
    entries.append(f"@software{{fastdpo,\n  title = {{fastdpo}},\n  version = {{{fastdpo.__version__}}}\n}}")
    return "\n## How to cite\n\n```bibtex\n" + "\n\n".join(entries) + "\n```\n"


def _what_is_trained(model: Any, is_adapter: bool) -> str:
    trained = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    total = sum(whole_shape(p).numel() for p in model.parameters())
    share = f"{trained:,} of {total:,} parameters"
    if not is_adapter:
        return share
    kinds = ", ".join(str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values())
    return f"an adapter ({kinds}), {share}"


def _last_values(history: list[dict[str, Any]]) -> dict[str, str]:
    found = {name: entry[name] for entry in history for name in _LAST if entry.get(name) is not None}
    return {f"`{name}`, last": f"{float(value):.4g}" for name, value in found.items()}
