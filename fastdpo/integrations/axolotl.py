"""axolotl on lazy logits by one line of YAML: ``plugins: [fastdpo.integrations.axolotl.FastDPOPlugin]``.

axolotl imports this file, and nothing else does. Its trainers of DPO, KTO, CPO/SimPO and ORPO are TRL's.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from fastdpo.integrations.trl import patch_trl


class FastDPOPlugin(BasePlugin):
    """`patch_trl` before the model is loaded; a run with other trainers is left as it is."""

    def pre_model_load(self, cfg: Any) -> None:
        patch_trl()
