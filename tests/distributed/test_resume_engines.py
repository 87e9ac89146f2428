"""Checkpoints of each engine: resumed under it and under others, on ranks of any number, to one curve."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdpo.training.loop.checkpoint_files import check_files
from fastdpo.training.loop.folders import find_checkpoint
from tests import ROOT
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_run import ADAPTED, resume, whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# accelerate's state is of a process, so runs of one engine share theirs; DDP comes before FSDP2.
SAVED = [("ddp", f"ddp{ADAPTED}", "fsdp2", "sharded", f"fsdp2{ADAPTED}", f"sharded{ADAPTED}")]
RESUMED = [
    (
        "ddp:ddp",
        "fsdp2:ddp",
        "ddp:fsdp2",
        "fsdp2:fsdp2",
        "sharded:sharded",
        "fsdp2:sharded",
        "sharded:fsdp2",
        f"ddp{ADAPTED}:fsdp2{ADAPTED}",
        f"fsdp2{ADAPTED}:fsdp2{ADAPTED}",
        f"sharded{ADAPTED}:sharded{ADAPTED}",
    )
]
ALONE = ["ddp:alone", "fsdp2:alone", "sharded:alone", f"fsdp2{ADAPTED}:alone{ADAPTED}"]
if HAS_DEEPSPEED:
    SAVED += [("zero2", "zero3", f"zero3{ADAPTED}")]
    RESUMED[0] = ("zero3:ddp", "zero2:fsdp2", *RESUMED[0])
    RESUMED[0] = tuple(sorted(RESUMED[0], key=lambda way: not way.endswith("ddp")))
    RESUMED += [("zero2:zero2", "ddp:zero2", "zero3:zero2", "zero3:zero3", "zero2:zero3", "sharded:zero3")]
    RESUMED[1] += (f"zero3{ADAPTED}:zero3{ADAPTED}", f"ddp{ADAPTED}:zero3{ADAPTED}")
    ALONE += ["zero2:alone", "zero3:alone", f"zero3{ADAPTED}:alone{ADAPTED}"]
# On four ranks, and back on two.
OF_FOUR = ("hsdp", "sharded hsdp", f"hsdp{ADAPTED}")
ON_FOUR = ("hsdp:hsdp", "fsdp2:hsdp", "ddp:hsdp", "sharded:sharded hsdp", "sharded hsdp:sharded hsdp")
ON_FOUR += ("sharded hsdp:hsdp", f"hsdp{ADAPTED}:hsdp{ADAPTED}", f"ddp{ADAPTED}:hsdp{ADAPTED}")
FROM_FOUR = ("hsdp:ddp", "hsdp:fsdp2", "sharded hsdp:sharded", f"hsdp{ADAPTED}:fsdp2{ADAPTED}")
ALONE += ["hsdp:alone", "sharded hsdp:alone"]
if HAS_DEEPSPEED:
    ON_FOUR += ("zero3:hsdp",)
WAYS = [way for ways in (*RESUMED, ON_FOUR, FROM_FOUR, ALONE) for way in ways]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what each run found."""
    place = tmp_path_factory.mktemp("engines")
    for adapted in ("", ADAPTED):
        torch.save(whole(place / f"truth{adapted}", f"alone{adapted}"), place / f"truth{adapted}.pt")
    for ways in SAVED:
        run_ranks("tests.distributed.resume_run", str(place), "save", *ways, seconds=600)
    run_ranks("tests.distributed.resume_run", str(place), "save", *OF_FOUR, world=4, seconds=600)
    for ways in (*RESUMED, FROM_FOUR):
        run_ranks("tests.distributed.resume_run", str(place), "resume", *ways, seconds=600)
    run_ranks("tests.distributed.resume_run", str(place), "resume", *ON_FOUR, world=4, seconds=600)
    command = [sys.executable, "-m", "tests.distributed.resume_run", str(place), "resume", *ALONE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return place


def found_in(folder: Path, way: str) -> dict[str, Any]:
    found: Any = torch.load(folder / f"{way.replace(':', ' to ')}.pt")
    assert not isinstance(found, str), found
    return dict(found)


@pytest.mark.promise(54)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_to_the_same_curve(way: str, folder: Path):
    found = found_in(folder, way)
    truth = torch.load(folder / f"truth{ADAPTED if ADAPTED in way else ''}.pt")
    # A log over the checkpoint has the sums of the ranks before it.
    assert found["losses"] == pytest.approx(truth["losses"], abs=1e-5)
    for name, value in truth["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=2e-6)
    said = "\n".join(found["said"])
    source, target = way.removesuffix(ADAPTED).replace(f"{ADAPTED}:", ":").split(":")
    # Of an adapter FSDP2's own files lack what is on the head.
    of_fsdp2 = {
        name: name.replace("sharded hsdp", "sharded").replace("hsdp", "fsdp2") for name in (source, target)
    }
    is_one_engine = of_fsdp2[source] == of_fsdp2[target]
    reads_its_own = is_one_engine and (ADAPTED not in way or source.startswith("zero"))
    if reads_its_own or way == "ddp:alone":
        assert "taken over" not in said
    else:
        assert "taken over: weights, the optimiser's state, its schedule" in said
    then, now = (4 if "hsdp" in way else 1 if way == "alone" else 2 for way in (source, target))
    assert (f"resuming on {now} ranks a checkpoint of {then}" in said) == (then != now)


@pytest.mark.parametrize("way", [way for way in WAYS if ADAPTED not in way])
def test_what_is_saved_loads(way: str, folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder / way.replace(":", " to ") / "final")
    weights = found_in(folder, way)["weights"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=0)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "sharded", tmp_path / "sharded")
    shard = tmp_path / "sharded" / "checkpoint-2" / "pytorch_model_fsdp_0" / "__1_0.distcp"
    whole_shard = shard.read_bytes()
    shard.write_bytes(whole_shard[:-1])
    with pytest.raises(ValueError, match=f"__1_0.distcp has {len(whole_shard) - 1} bytes, wanted the "):
        resume(tmp_path, "sharded:alone")
    shard.unlink()
    with pytest.raises(ValueError, match="checkpoint-2 has no pytorch_model_fsdp_0/__1_0.distcp, which was"):
        resume(tmp_path, "sharded:alone")


@pytest.mark.promise(69)
def test_what_was_not_written_to_its_end_is_refused(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "ddp" / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "preference_run.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2, which has no preference_run.json"):
        find_checkpoint(None, str(tmp_path / "checkpoint-2"))  # type: ignore[arg-type]


def test_another_batch_is_said(folder: Path):
    found = resume(folder, "ddp:alone", gradient_accumulation_steps=2, max_steps=5)
    said = "a step was of 8 rows and is of 4: the data go on behind 2 steps of those, at row 8 of what was"
    assert any(said in line for line in found["said"])


def test_a_file_that_a_run_does_without(tmp_path: Path):
    check_files(tmp_path, {"optimizer.pt": 3, "rng_state_1.pth": 3})


def test_ranks_that_differ_are_told_before_the_first_step(tmp_path: Path):
    ways = ("learning_rate", "beta", "data", "max_steps", "data_seed")
    said = run_ranks("tests.distributed.resume_run", str(tmp_path), "differ", *ways)
    for printed in said:  # on every rank
        assert "settings: rank 1 has others than rank 0: learning_rate 0.001 -> 0.002" in printed
        assert "loss: rank 1 has others than rank 0: beta None -> 0.3" in printed
        assert "data: rank 1 has others than rank 0: hash " in printed
        assert re.search(r"steps: rank 1 has others than rank 0: max_steps \d+ -> 9", printed)
        assert "steps: rank 1 has others than rank 0: data_seed None -> 5" in printed
