"""What one line, ``fastdpo.patch_trl()``, saves in TRL's own trainers: peak memory, with it and without.

    python examples/trl_memory.py                        # two minutes on two CPU cores; prints a table
    python examples/trl_memory.py --record FILE.json     # and keeps it, with versions and machine

Equal on both sides: TRL's trainer and its settings, the model's weights, the pairs and their order, fp32,
threads. Each side trains in a process of its own, two steps: libraries, thread pools and the optimiser's
states are there after the first. Memory is the growth of the peak resident set over the second. The losses of
the two sides have to agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from small_llama import random_llama, train_tokenizer
from stdlib_pairs import read_sources
from step_cost import forget_peak, peak_mib

TRAINERS = ("DPO", "SimPO")
SIDES = ("TRL", "with the line")
SIZES = {"vocab_size": 64000, "hidden_size": 128, "pairs": 8, "max_length": 512, "threads": 2}
QUICK = {"vocab_size": 2000, "hidden_size": 64, "pairs": 2, "max_length": 64, "threads": 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of TRL's trainers, with patch_trl and without.")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, says nothing")
    parser.add_argument("--side", nargs=2, metavar=("TRAINER", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else SIZES
    if args.side:
        print(json.dumps(train(*args.side, sizes)))
        return 0
    result = compare(sizes, args.quick)
    print(f"{'trainer':<10}{'TRL':>12}{'with the line':>18}   peak memory of a step; losses agree to 1e-4")
    for row in result["trainers"]:
        before, after = (row["peak_mib"][side] for side in SIDES)
        print(f"{row['trainer']:<10}{before:>8.0f} MiB{after:>14.0f} MiB")
    if args.record:
        args.record.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def compare(sizes: dict[str, int], quick: bool = False) -> dict[str, Any]:
    """Both sides of every trainer.

    Raises:
        RuntimeError: a side failed, or the losses do not agree to 1e-4.
    """
    rows = []
    for trainer in TRAINERS:
        sides = {side: _in_a_process(trainer, side, quick) for side in SIDES}
        losses = {side: found["loss"] for side, found in sides.items()}
        if not all(
            abs(one - other) <= 1e-4 * max(1.0, abs(one)) for one, other in zip(*losses.values(), strict=True)
        ):
            raise RuntimeError(f"{trainer}: got losses {losses}, wanted both equal to 1e-4")
        peaks = {side: found["peak_mib"] for side, found in sides.items()}
        rows.append({"trainer": trainer, "loss": losses, "peak_mib": peaks, **_shape(sides)})
    packages = {name: version(name) for name in ("fastdpo", "torch", "transformers", "trl")}
    return {"device": platform.machine(), "sizes": sizes, "packages": packages, "trainers": rows}


def _shape(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    one, other = ({name: found[name] for name in ("rows", "length")} for found in sides.values())
    if one != other:
        raise RuntimeError(f"got batches {one} and {other}, wanted the same on both sides")
    return one


def _in_a_process(trainer: str, side: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", trainer, side, *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{trainer}, {side}: its process failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(trainer_name: str, side: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Two steps of one side: their losses, and the growth of the peak over the second step, in MiB."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    import fastdpo

    torch.set_num_threads(sizes["threads"])
    sources = read_sources()
    tokenizer = train_tokenizer(list(sources.values())[:60], 2000)
    model = random_llama(
        tokenizer, vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], layers=1, seed=0
    )
    model.config.max_position_embeddings = 4096
    rows = make_rows(list(sources.values()), sizes)
    seen: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            forget_peak()
            seen["before"] = peak_mib()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen["peak_mib"] = peak_mib() - seen["before"]

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=sizes["pairs"],
            max_length=sizes["max_length"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-4,
            seed=0,
        )
        if trainer_name == "DPO":
            kind, config = DPOTrainer, DPOConfig(**common, loss_type="sigmoid")
            more: dict[str, Any] = {"ref_model": copy.deepcopy(model)}
        else:
            kind, config, more = CPOTrainer, CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0), {}
        if side == SIDES[1]:
            fastdpo.patch_trl()
        trainer = kind(
            model,
            **more,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        collate = trainer.data_collator

        def watched(features: list[Any]) -> Any:
            batch = collate(features)
            ids = next(value for key, value in batch.items() if key.endswith("input_ids"))
            seen["length"] = int(ids.shape[1])
            return batch

        trainer.data_collator = watched
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": losses, "peak_mib": seen["peak_mib"], "rows": 2 * sizes["pairs"],
            "length": seen["length"]}  # fmt: skip


def make_rows(sources: list[str], sizes: dict[str, int]) -> list[dict[str, str]]:
    """Pairs out of the standard library's sources: a short prompt, and two long answers."""
    width = sizes["max_length"] * 4  # characters: more than that many tokens hold, so all rows are as long
    parts = [(text[:cut], text[cut : cut + width]) for text in sources if (cut := _cut(text, width // 8))]
    parts = [part for part in parts if len(part[1]) == width][: 4 * sizes["pairs"]]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for (prompt, chosen), (_, rejected) in zip(parts[::2], parts[1::2], strict=True)
    ]


def _cut(text: str, place: int) -> int:
    """Where, soon after ``place``, one word follows another: no token goes over such a border. Or 0."""
    match = re.compile(r"(?<=[a-z])(?= [a-z])").search(text, place, 2 * place)
    return match.start() if match else 0


if __name__ == "__main__":
    sys.exit(main())
