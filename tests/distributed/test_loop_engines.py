"""``PreferenceTrainer`` under FSDP2 (also twice) and DeepSpeed: the curves and weights of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdpo.training.batches.collate import PaddedCollator
from tests.distributed.cases import LOOP
from tests.distributed.loop_run import run_case
from tests.distributed.problem import tiny_experts
from tests.distributed.ranks import DEVICES, run_ranks
from tests.training.loop.ddp_run import pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENGINES = {"fsdp2": 2, "hsdp": 4, "zero2": 2, "zero3": 2}
# As the files of one process have them.
_SAVED = {"config.json", "model.safetensors", "settings.yaml", "README.md"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    names = ("save_strategy", "save_steps")
    cases = {name: {k: v for k, v in case.items() if k not in names} for name, case in LOOP.items()}
    return {name: run_case(folder / name / "run", None, case) for name, case in cases.items()}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (make test-deepspeed)")
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=DEVICES)
def ran(engine: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of an engine's runs; what they are held to ran on a CPU."""
    folder = tmp_path_factory.mktemp(engine)
    run = ("tests.distributed.loop_run", str(folder), engine)
    run_ranks(*run, world=ENGINES[engine], seconds=500, device=request.param)
    return folder


@pytest.mark.parametrize("name", LOOP)
def test_an_engine_trains_as_one_process(engine: str, name: str, ran: Path, alone: dict[str, Any]):
    found, wanted = torch.load(ran / f"{engine} {name}" / "found.pt"), alone[name]
    assert not isinstance(found, str), found
    # Of 16 bits what is rounded differs: whole weights, or a product's operands.
    loss = 2e-2 if name == "16 bits" else 1e-5
    assert found["losses"] == pytest.approx(wanted["losses"], abs=loss)
    assert len(found["evaluations"]) == len(wanted["evaluations"])
    for ours, theirs in zip(found["evaluations"], wanted["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, abs=loss)
    assert found["weights"].keys() == wanted["weights"].keys()
    if name == "16 bits":
        return
    for key, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=2e-5)


def test_experts_are_balanced_within_each_micro_batch(tmp_path: Path, alone: dict[str, Any]):
    """What the routers' loss is of two ranks, under DDP too: the mean of each micro-batch's, by hand."""
    run_ranks("tests.distributed.loop_run", str(tmp_path), "ddp", "experts")
    found, wanted = torch.load(tmp_path / "ddp experts" / "found.pt"), alone["experts"]
    assert not isinstance(found, str), found
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for key, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=2e-5)
    model, rows = tiny_experts("qwen3_moe"), pairs(24, 0)
    parts = [_balance(model, rows, range(first, first + 2)) for first in range(0, 8, 2)]
    for run in (found, wanted):
        assert run["balance"][0] == pytest.approx(sum(parts) / 4, abs=1e-5)
    assert abs(sum(parts) / 4 - _balance(model, rows, range(8))) > 1e-3  # of the step at once it is another


@torch.no_grad()
def _balance(model: Any, rows: Any, chosen: range) -> float:
    """Experts times the sum over them of their share of choices and their mean probability, of a batch.

    Fedus et al. 2021, equation 4, with as many choices as a token has; over the tokens of all layers.
    """
    batch = PaddedCollator(0)([rows[row] for row in chosen])
    inputs = batch.model_inputs(model)
    logits = model(**inputs, output_router_logits=True).router_logits
    is_token = inputs["attention_mask"].flatten().bool()
    probs = torch.cat([layer.softmax(-1)[is_token] for layer in logits])
    chosen_experts = probs.topk(2).indices
    share = torch.stack([(chosen_experts == expert).any(1).double().mean() for expert in range(4)])
    return float(4 * (share * probs.mean(0)).sum())


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp"], indirect=True)
def test_a_reference_stays_split(engine: str, ran: Path):
    """Its units give up what they gathered when a forward pass is over: no backward pass does it for them."""
    assert torch.load(ran / f"{engine} copy" / "found.pt")["whole"] == []


def test_losses_are_not_rounded_to_16_bits(engine: str, ran: Path):
    losses = torch.load(ran / f"{engine} 16 bits" / "found.pt")["losses"]
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in losses)


def test_what_is_saved_loads(engine: str, ran: Path):
    folder = ran / f"{engine} resumed" / "run" / "final"
    assert {path.name for path in folder.iterdir()} >= _SAVED
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = torch.load(ran / f"{engine} resumed" / "found.pt")["weights"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
