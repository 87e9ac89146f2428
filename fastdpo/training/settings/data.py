"""Settings of the data, held to each other and to the losses."""

from __future__ import annotations

from fastdpo.training.settings.fields import SettingFields
from fastdpo.training.settings.row_checks import may_stay


def check_data_settings(args: SettingFields) -> None:
    """Raise ValueError for a setting of the data out of range, or of columns that the losses do not read."""
    if not 0 <= args.max_bad_rows <= 1:
        raise ValueError(f"max_bad_rows: got {args.max_bad_rows!r}, wanted a number from 0 to 1")
    for name in args.allow_bad_rows or ():
        if name not in may_stay():
            raise ValueError(f"allow_bad_rows: got {name!r}, wanted some of {', '.join(may_stay())}")
    kind = args.data_kind
    if args.image_conditional_pairs and not kind.is_paired:
        raise ValueError(
            f"image_conditional_pairs: got True with {', '.join(args.loss_type)}, wanted a loss of pairs"
        )
    read = kind.columns
    if kind.name in ("unpaired", "prompt-completion"):
        read = (*read, "chosen", "rejected")
    read = (*read, "images", "images_rejected") if "rejected" in read else (*read, "images")
    if "scores" in read:
        read = (*read, "ranks")
    for name in args.column_names:
        if name not in read:
            losses = ", ".join(args.loss_type)
            raise ValueError(f"{name}_column: got a value with {losses}, which reads {', '.join(read)}")
