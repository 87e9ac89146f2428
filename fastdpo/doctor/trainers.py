"""The trainers that are installed, and what the hook does for each; none of them is imported."""

from __future__ import annotations

from pathlib import Path

from fastdpo.integrations.source_patch import installed_version
from fastdpo.integrations.trl_releases import FIRST_VERSION, is_before_the_seam

_PLUGIN = Path(__file__).parents[1] / "integrations" / "ms_swift.py"
_FOUND: dict[str, str] = {
    "llamafactory": "fastdpo.patch_llama_factory() before run_exp: its DPO and KTO stages make no logits",
    "axolotl": "plugins: [fastdpo.integrations.axolotl.FastDPOPlugin] in the YAML: DPO, KTO, CPO/SimPO, ORPO",
    "ms_swift": f"--external_plugins {_PLUGIN}: DPO, KTO, CPO/SimPO, ORPO",
    "openrlhf": (
        "fastdpo.patch_model(model): lazy logits, of which all positions are projected; where flash-attn is "
        "installed its kernel makes them"
    ),
}


def trainer_lines() -> list[tuple[str, str]]:
    """``(name, finding)`` lines for `fastdpo.doctor`."""
    lines = []
    if (trl := installed_version("trl")) is not None:
        lines.append((f"trl {trl}", _of_trl(trl)))
    for name, finding in _FOUND.items():
        if (version := installed_version(name)) is not None:
            lines.append((f"{name} {version}", finding))
    own = (
        "fastdpo.patch_model(model): its own log-softmax, gather and mask run in the fused op (docs/lazy.md)"
    )
    return [*lines, ("any other loop", own)]


def _of_trl(version: str) -> str:
    if is_before_the_seam(version):
        return "fastdpo.patch_trl(): DPO, KTO, CPO/SimPO, ORPO and TPO make no logits"
    return (
        "fastdpo.patch_trl(): CPO/SimPO, ORPO and TPO make no logits, and the head of DPO, KTO, GRPO, RLOO "
        f"and SFT, which asks for none since {FIRST_VERSION}, is fastdpo's"
    )
