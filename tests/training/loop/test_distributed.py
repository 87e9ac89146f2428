"""Two processes give the gradients and the metrics of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from tests.distributed.ranks import run_ranks
from tests.training.conftest import read_metrics, tiny_llama
from tests.training.loop.ddp_run import (
    BUDGETS,
    CPU_RANKS_CAN_RESUME,
    STATES,
    pairs,
    run,
    run_budget,
    run_state,
)


def of_two_ranks(test: Any) -> Any:
    """Two processes are started once for all of these."""
    return pytest.mark.slow(pytest.mark.distributed(test))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks("tests.training.loop.ddp_run", str(folder), seconds=540)
    return folder


@pytest.mark.promise(51)
@of_two_ranks
def test_two_ranks_train_as_one(two_ranks: Path, tmp_path: Path):
    """2 ranks x 2 pairs x 2 micro-batches against 8 pairs at once; of 7 pairs to evaluate one is repeated."""
    run(tmp_path, per_device=8, accumulate=1)
    wanted = torch.load(tmp_path / "gradients0.pt")
    for rank in range(2):
        gradients = torch.load(two_ranks / f"gradients{rank}.pt")
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)
    logs, wanted_logs = read_metrics(two_ranks / "run"), read_metrics(tmp_path / "run")
    assert [entry["step"] for entry in logs] == [1, 2, 2]
    for entry, wanted_entry in zip(logs, wanted_logs, strict=True):
        assert entry == pytest.approx(wanted_entry, rel=1e-5, abs=1e-6)


@of_two_ranks
@pytest.mark.parametrize("name", BUDGETS)
def test_two_ranks_with_a_token_budget_train_as_one(two_ranks: Path, tmp_path: Path, name: str):
    """Batches of unlike numbers of pairs, and one of none, against all pairs at once in a padded batch."""
    run_budget(tmp_path, name)
    wanted = torch.load(tmp_path / f"{name}0.pt")
    for rank in range(2):
        gradients = torch.load(two_ranks / f"{name}{rank}.pt")
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=1e-6)
    logs, wanted_logs = read_metrics(two_ranks / name), read_metrics(tmp_path / name)
    assert ["eval_loss" in entry for entry in logs] == [False, True]
    for entry, wanted_entry in zip(logs, wanted_logs, strict=True):
        # After a step of Adam, which makes of a rounding error in a gradient near 0 one in a weight.
        size = 1e-4 if "eval_loss" in entry else 2e-6
        assert entry == pytest.approx(wanted_entry, rel=1e-5, abs=size)


@of_two_ranks
@pytest.mark.parametrize("name", STATES)
def test_two_ranks_carry_the_same_from_step_to_step(two_ranks: Path, tmp_path: Path, name: str):
    """Other data than pairs, and losses that look at a whole step: against the step in one micro-batch."""
    run_state(tmp_path, name)
    wanted = torch.load(tmp_path / f"{name}0.pt")
    # S-DPO's gradients here are of size 30. On a CPU with AVX-512 they are off by 1.6e-6 of the largest.
    size = max(1.0, *(float(gradient.abs().max()) for gradient in wanted.values()))
    for rank in range(2):
        gradients = torch.load(two_ranks / f"{name}{rank}.pt")
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=4e-6 * size)
    logs, wanted_logs = read_metrics(two_ranks / name), read_metrics(tmp_path / name)
    assert [entry["step"] for entry in logs] == [1, 2, 2]
    for entry, wanted_entry in zip(logs, wanted_logs, strict=True):
        # From the second step on after one of Adam, as above.
        size = 1e-6 if entry is logs[0] else 1e-3
        if name.startswith("aot") and "eval_loss" in entry:
            # Batches of an evaluation are not gathered: its loss is of two pairs at a time, not of seven.
            assert entry.pop("eval_loss") != pytest.approx(wanted_entry.pop("eval_loss"), abs=size)
        assert entry == pytest.approx(wanted_entry, rel=1e-5, abs=size)


@pytest.mark.parametrize("name", ["aot", "aot unpaired"])
def test_a_batch_that_is_not_gathered_would_show(name: str):
    """What the ranks' own pairs give is far from all of them at once: far beyond what is allowed above."""
    loss_type = STATES[name][0]
    args = PreferenceConfig(output_dir="unused", use_cpu=True, loss_type=loss_type)
    policy, reference = (patch_model(tiny_llama(seed)) for seed in (1, 2))
    data, collator = pairs(16, 0, is_even=True), PaddedCollator(0)

    def gradient(rows: list[int]) -> torch.Tensor:
        policy.zero_grad()
        batch = collator([data[i] for i in rows])
        counts = BatchCounts(8, 48)
        batch_loss(policy, policy, batch, counts, args, Reference("copy", reference)).loss.backward()
        return policy.lm_head.weight.grad.clone()

    whole = gradient(list(range(8)))
    # The ranks take turns: batches of four, the first for rank 0.
    parts = gradient([0, 1, 2, 3]) + gradient([4, 5, 6, 7])
    assert (parts - whole).abs().max() > 1e-4


@of_two_ranks
def test_each_rank_keeps_its_part_of_the_progress(two_ranks: Path):
    states = sorted(path.name for path in (two_ranks / "run" / "checkpoint-2").glob("preference_state_*"))
    assert states == ["preference_state_0.json", "preference_state_1.json"]
    assert len(list((two_ranks / "reference").iterdir())) == 2  # training and evaluation pairs, scored once


@of_two_ranks
def test_two_ranks_go_on_with_an_interrupted_scoring(two_ranks: Path):
    """Of 24 pairs each rank has three batches of four; two were done before the interruption."""
    folder = two_ranks / "scoring"
    for rank in range(2):
        scores, counts = torch.load(folder / f"cache{rank}.pt")
        assert counts == [2, 1]
        assert torch.equal(scores, torch.load(folder / f"whole{rank}.pt")[0])
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".npz"]


@of_two_ranks
@pytest.mark.skipif(not CPU_RANKS_CAN_RESUME, reason="transformers before 5.23 cannot resume ranks on a CPU")
@pytest.mark.parametrize("prefix", ["", "packed_"])
def test_two_ranks_resume_as_if_nothing_had_happened(two_ranks: Path, prefix: str):
    logs = read_metrics(two_ranks / f"{prefix}parts")
    assert [entry["step"] for entry in logs] == [2, 4, 6, 8]
    assert logs == read_metrics(two_ranks / f"{prefix}whole")
