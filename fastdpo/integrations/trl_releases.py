"""What is known of TRL's releases, none of which is loaded for it: where `patch_trl` reaches into them."""

from __future__ import annotations

import sys

SEAM = "trl.trainer.utils:_ChunkedLogProbFunction"
COMPACTION = "trl.trainer.utils:_use_triton"  # since 1.16; 1.15 drops unlabelled tokens everywhere
FIRST_VERSION = "1.15"

# sha256 of the source, by the releases that have it: of what is replaced, and of what calls it or takes its
# results. `source_patch.source_hash` makes them.
SEAM_SOURCES: dict[str, dict[str, str]] = {
    "trl.trainer.utils:_ChunkedLogProbFunction": {"6a4578b8e7f201fa": "1.15", "17b8716d26881cf9": "1.16"},
    "trl.trainer.utils:_use_triton": {"8bdca0eb73925ed1": "1.16"},
    "trl.trainer.utils:add_fused_lm_head": {"65d22e63e4870d0f": "1.15", "c309684c7d7599a8": "1.16"},
}


def is_before_the_seam(version: str) -> bool:
    """Whether a release has no log-prob function that its trainers share."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) < Version(FIRST_VERSION)
    except InvalidVersion:
        return False  # `patch_trl` says so


def said_by_version(version: str | None) -> list[tuple[str, str]] | None:
    """``(name, finding)`` lines for `fastdpo.doctor`, of a TRL that is not patched; None to look into it.

    To load a TRL that is not loaded takes seconds. What `patch_trl` finds there may still be changed.
    """
    if version is None:
        return [("patch_trl", "TRL is not installed")]
    start = f"TRL {version} is not patched; fastdpo.patch_trl()"
    if is_before_the_seam(version):
        return [("patch_trl", f"{start} would, with lazy logits")]
    is_known = ".".join(version.split(".")[:2]) in SEAM_SOURCES[SEAM].values()
    if is_known and "trl.trainer.utils" not in sys.modules:
        return [("patch_trl", f"{start} knows this release")]
    return None
