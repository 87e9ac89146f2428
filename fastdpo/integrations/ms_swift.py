"""ms-swift on lazy logits by one flag: ``--external_plugins`` with the path of this file.

ms-swift imports the files of that flag for what they do when they are imported, and nothing else imports this
one. Its DPO, KTO, CPO/SimPO and ORPO trainers have steps of their own beside TRL's.
"""

from __future__ import annotations

from fastdpo.integrations.source_patch import replace
from fastdpo.integrations.trainer_steps import steps_of
from fastdpo.integrations.trl import patch_trl
from fastdpo.types import Execution

TRAINERS = (
    "swift.rlhf_trainers.rlhf_mixin:RLHFTrainerMixin",
    *(f"swift.rlhf_trainers.{name.lower()}_trainer:{name}Trainer" for name in ("DPO", "KTO", "CPO", "ORPO")),
)

if patch_trl().is_new:  # once, also where a data loader's worker imports it again
    replace(steps_of(TRAINERS, Execution()))
