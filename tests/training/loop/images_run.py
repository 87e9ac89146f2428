"""One rank of a two-process run on rows of which some have images; its metrics go to a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastdpo.training.loop.trainer import PreferenceTrainer
from tests.training.conftest import quick_args
from tests.training.eyes import image_rows, make_model, make_processor


def run(folder: Path, ranks: int) -> None:
    rows = image_rows(8, folder / f"images{os.environ.get('RANK', 0)}", text_only=5)
    args = quick_args(
        folder / "run",
        ddp_backend="gloo" if ranks > 1 else None,
        gradient_checkpointing=True,
        per_device_train_batch_size=4 // ranks,
        train_sampling_strategy="sequential",
    )
    model, processor = make_model("llava"), make_processor("llava")
    PreferenceTrainer(model, args, train_dataset=rows, processing_class=processor).train()


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2)
