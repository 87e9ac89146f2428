"""``fastdpo rounds``: the chain, killed anywhere and gone on with, and what is refused before it begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdpo import cli
from fastdpo.cli import main
from fastdpo.rounds import chain, judge, partial
from fastdpo.rounds.generation import TransformersSampler
from fastdpo.training.loop.checkpoint_files import RUN_FILE
from fastdpo.training.loop.trainer import PreferenceTrainer
from tests import ROOT
from tests.rounds.conftest import RULES, killed_after, make_prompts, read

TRAIN = {
    "loss_type": "sigmoid",
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "save_steps": 1,
    "logging_steps": 1,
    "max_bad_rows": 1.0,
}


def config(models: Path, **changes: Any) -> dict[str, Any]:
    """Two rounds of a rule as judge; a part of the file is changed name by name."""
    settings: dict[str, Any] = {
        "model": str(models / "policy"),
        "dataset": "prompts.jsonl",
        "output_dir": "out",
        "rounds": 2,
        "use_cpu": True,
        "sample": {"num_samples": 3, "max_new_tokens": 8, "batch_size": 6},
        "judge": {"function": "rules.py:vowels"},
        "train": TRAIN,
    }
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **value} if is_part else value
    return settings


@pytest.fixture
def rounds(models: Path, here: Path) -> Callable[..., int]:
    """``fastdpo rounds`` with changes to the file above."""

    def run(*words: str, **changes: Any) -> int:
        Path("rounds.yaml").write_text(yaml.safe_dump(config(models, **changes)))
        return main(["rounds", "rounds.yaml", *words])

    return run


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(folder) / "model.safetensors")
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_round_goes_on_from_the_last(rounds: Callable[..., int], models: Path):
    assert rounds() == 0
    assert read("out/round-1/scored.jsonl")[0].keys() > {"ref_chosen_logps", "chosen", "letter"}
    start, first, second = (weights(f) for f in (models / "policy", "out/round-1/model", "out/round-2/model"))
    assert not same(start, first) and not same(first, second)
    # Round 2 by hand, with the commands that a user has.
    by_hand = (
        f"sample --model out/round-1/model --dataset prompts.jsonl --output s.jsonl --seed {42 + 2} --use_cpu"
    )
    assert (
        main([*by_hand.split(), *"--use_cpu --num_samples 3 --max_new_tokens 8 --batch_size 6".split()]) == 0
    )
    assert read("s.jsonl") == read("out/round-2/samples.jsonl")
    by_hand = "judge --dataset s.jsonl --output j.jsonl --function rules.py:vowels --use_cpu"
    assert main(by_hand.split()) == 0
    assert read("j.jsonl") == read("out/round-2/judged.jsonl")
    assert main(["train", "out/round-2/train.yaml", "--output_dir", "again"]) == 0
    assert same(weights("again"), second)
    # A third one later; what is done stays.
    before = Path("out/round-2/trained.json").read_bytes()
    assert rounds(rounds=3) == 0
    assert Path("out/round-2/trained.json").read_bytes() == before
    assert Path("out/round-3/model/model.safetensors").is_file()


# Where the process dies: a function, and how many calls of it are over.
DEATHS = {
    "first batch of samples": (TransformersSampler, "draw", 0),
    "between batches of round 1": (TransformersSampler, "draw", 2),
    "between batches of round 2": (TransformersSampler, "draw", 4),
    "samples drawn and not written": (partial, "write_rows", 0),
    "samples written, not noted": (chain, "note", 0),
    "before the judge": (chain, "judge", 0),
    "verdicts and no file": (judge.PartialWork, "finish", 0),
    "before scoring": (cli, "write_scored", 0),
    "before training": (PreferenceTrainer, "train", 0),
    "second step": (PreferenceTrainer, "training_step", 1),
    "third step of round 2": (PreferenceTrainer, "training_step", 5),
    "before the model is saved": (PreferenceTrainer, "save_model", 0),
    "model saved, not marked": (chain, "write_json", 1),
}


@pytest.fixture(scope="session")
def uninterrupted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two rounds make where nobody kills them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_prompts()
        Path("rules.py").write_text(RULES)
        Path("rounds.yaml").write_text(yaml.safe_dump(config(models)))
        assert main(["rounds", "rounds.yaml"]) == 0
        sys.modules.pop("rules", None)
    return {
        "weights": weights(folder / "out/round-2/model"),
        "samples": read(folder / "out/round-2/samples.jsonl"),
    }


# One of each step always; the others are as slow as these.
OFTEN = (
    "between batches of round 1",
    "verdicts and no file",
    "before scoring",
    "third step of round 2",
    "model saved, not marked",
)


@pytest.mark.promise(68)
@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=[] if where in OFTEN else pytest.mark.slow) for where in DEATHS]
)
def test_a_killed_run_ends_as_one_that_was_not(
    rounds: Callable[..., int], uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
):
    owner, name, calls = DEATHS[where]
    with killed_after(monkeypatch, owner, name, calls):
        rounds()
    assert rounds() == 0
    assert read("out/round-2/samples.jsonl") == uninterrupted["samples"]
    assert same(weights("out/round-2/model"), uninterrupted["weights"])


def test_a_checkpoint_cut_off_is_not_gone_on_with(tmp_path: Path):
    """Of two with steps left the later one lacks the file that the loop writes last."""
    for step, is_whole in ((2, True), (4, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 6}))
        (folder / "preference_state_0.json").write_text("{}")
        if is_whole:
            (folder / RUN_FILE).write_text("{}")
    assert chain._unfinished(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.promise(68)
@pytest.mark.slow
def test_kill_9(models: Path, here: Path):
    """The signal itself. All of it in processes of one kind: other numbers of threads make other sums."""
    for name in ("whole", "out"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config(models, output_dir=name)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def started(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fastdpo.cli", "rounds", f"{name}.yaml"]
        with Path("log.txt").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    assert started("whole").wait(300) == 0, Path("log.txt").read_text()
    for seen in ("round-1/samples.jsonl", "round-1/model/checkpoint-2", "round-2/judged.jsonl"):
        process = started("out")
        deadline = time.time() + 200
        while not Path("out", seen).exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, Path("log.txt").read_text()
    assert not Path("out/round-2/trained.json").exists()
    assert started("out").wait(300) == 0, Path("log.txt").read_text()
    assert same(weights("out/round-2/model"), weights("whole/round-2/model"))


def test_start_and_reference(rounds: Callable[..., int], models: Path):
    """Which model is trained, and which is the reference: the last one, or the one that it began with."""
    assert rounds(start="base", reference="base") == 0
    told = yaml.safe_load(Path("out/round-2/train.yaml").read_text())
    scored = yaml.safe_load(Path("out/round-2/score.yaml").read_text())
    assert (told["model"], scored["ref_model"]) == (str(models / "policy"),) * 2
    assert read("out/round-2/samples.jsonl") != read("out/round-1/samples.jsonl")
    metrics = json.loads(Path("out/round-2/model/metrics.jsonl").read_text().splitlines()[0])
    # The policy is its reference before the first step: both scores are of the base.
    assert metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("loss", "scores"), [("simpo", False), ("tdpo1", False), ("kto", True)])
def test_losses_with_other_references(rounds: Callable[..., int], loss: str, scores: bool):
    """Without one nothing is scored; with divergences it is the model itself; KTO has other pairings too."""
    assert rounds(reference="base", train={"loss_type": loss}) == 0
    assert Path("out/round-2/scored.jsonl").exists() == scores
    told = yaml.safe_load(Path("out/round-2/train.yaml").read_text())
    assert ("ref_model" in told) == (loss == "tdpo1")


def test_an_adapter_goes_on(rounds: Callable[..., int], models: Path):
    pytest.importorskip("peft")
    assert rounds(train={"use_peft": True, "lora_r": 4}) == 0
    one, two = (load_file(f"out/round-{n}/model/adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and not all(torch.equal(one[name], two[name]) for name in one)
    assert not Path("out/round-2/model/model.safetensors").exists()
    base = json.loads(Path("out/round-2/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(models / "policy")


def test_parts_of_the_prompts_and_settings_from_a_round_on(rounds: Callable[..., int]):
    assert rounds(prompts_per_round=3, overrides=[{"round": 2, "sample": {"num_samples": 2}}]) == 0
    found = [read(f"out/round-{n}/samples.jsonl") for n in (1, 2)]
    assert [[row["prompt_row"] for row in rows] for rows in found] == [["1", "2", "3"], ["4", "5", "6"]]
    assert [len(rows[0]["completions"]) for rows in found] == [3, 2]


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"sample": {"num_sample": 2}},
        "sample: num_sample: not a setting of fastdpo; did you mean num_samples?",
    ),
    ({"judge": {"functon": "x"}}, "judge: functon: not a setting of fastdpo; did you mean function?"),
    ({"train": {"loss_typ": "x"}}, "train: loss_typ: not a setting of fastdpo; did you mean loss_type?"),
    ({"train": {"model": "x"}}, "train: got 'model', which each round says itself"),
    ({"sample": {"seed": 1}}, "sample: got 'seed', which each round says itself"),
    ({"train": {"loss_type": "nash_md"}}, "judge: got format 'pairs', but nash_md takes samples data"),
    ({"judge": {"function": "rules.py:nothing"}}, "has no function 'nothing'"),
    ({"judge": {"function": None, "reward_model": "no/such/folder/at/all"}}, "there is no such folder"),
    ({"prompts_per_round": 4}, "prompts_per_round: got 4 in each of 2 rounds, and prompts.jsonl has 6 rows"),
    ({"train": {"fsdp": True, "fsdp_config": {"version": 2}}}, "train: got FSDP2, wanted whole models"),
    ({"train": {"reference": "copy"}}, "train: got 'reference', which each round says itself"),
    ({"train": {"sync_ref_model": True}}, "train: got sync_ref_model, wanted none"),
    ({"start": "first"}, "start: got 'first', wanted one of last, base"),
    ({"overrides": [{"round": 2, "sample": {"temperature": -1}}]}, "sample: temperature: got -1"),
    ({"overrides": [{"from": 2}]}, "overrides: got 'from', wanted round, sample, judge or train"),
    ({"dataset": "nothing.jsonl"}, "no such file or directory: nothing.jsonl"),
    ({"model": "no/such/folder/at/all"}, "model: got 'no/such/folder/at/all', and there is no such folder"),
    ({"round": 3}, "round: not a setting of fastdpo; did you mean rounds?"),
)


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_settings_show_before_anything_is_done(
    rounds: Callable[..., int], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    assert rounds(**changes) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_folder_of_other_rounds_is_refused(
    rounds: Callable[..., int],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with killed_after(monkeypatch, chain, "judge", 0):
        rounds()
    kept = Path("out/round-1/samples.jsonl").read_bytes()
    assert rounds(sample={"temperature": 0.5}) == 2
    assert "holds rounds with other settings (sample: " in capsys.readouterr().err
    rule = Path("rules.py").read_text()
    Path("rules.py").write_text(rule + "\n# another rule\n")
    assert rounds() == 2
    assert "holds rounds with other settings (functions: " in capsys.readouterr().err
    Path("rules.py").write_text(rule)
    (here / "prompts.jsonl").write_text('{"prompt": "cloud:", "letter": "a"}\n' * 6)
    assert rounds() == 2
    assert "holds rounds with other settings (prompts: " in capsys.readouterr().err
    assert Path("out/round-1/samples.jsonl").read_bytes() == kept
    Path("used").mkdir()
    Path("used/file").write_text("")
    assert rounds(output_dir="used") == 2
    assert "output_dir: used is in use, and not by rounds" in capsys.readouterr().err
