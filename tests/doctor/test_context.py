"""What a context takes, as ``doctor`` counts it, is what a step takes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fastdpo import CarriedContext, Forest, doctor, patch_model
from fastdpo.cli import main
from fastdpo.doctor import context as counted
from fastdpo.doctor.context import ContextNeeds, Curve, context_lines, context_needs
from fastdpo.doctor.live_bytes import LiveBytes
from fastdpo.integrations.model import backbone_states
from tests import ROOT

CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=10**6,
)  # fmt: skip
WAYS = ("plain", "checkpointed", "carried")
CHUNK = 256


def step(model: Any, tokens: int, way: str) -> None:
    """A forward and backward pass of the backbone."""
    model.zero_grad(set_to_none=True)
    how: dict[str, Any] = {}
    if way == "carried":
        labelled = range(max(0, tokens - counted.LABELLED), tokens)
        how = {"context": CarriedContext(CHUNK), "wanted": labelled}
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    backbone_states(model, input_ids=ids, forest=Forest.of_sequences([tokens]), **how).sum().backward()


def real_model(way: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = patch_model(AutoModelForCausalLM.from_config(CONFIG)).train(way == "checkpointed")
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measured(way: str, tokens: int) -> float:
    """Peak of resident memory in a step, in MiB, in this process."""
    from benchmarks.harness import peak_mib

    torch.set_num_threads(1)
    model = real_model(way)
    step(model, 64, way)
    model.zero_grad(set_to_none=True)
    peak = peak_mib(lambda: step(model, tokens, way), torch.device("cpu"))
    assert peak is not None
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_count_is_what_a_step_takes(way: str):
    """Resident memory of a process, whose allocator gives back what is free."""
    program = f"from tests.doctor.test_context import measured; print(measured({way!r}, 4096))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PATH": "/usr/bin"},
    )  # fmt: skip
    needs = context_needs(CONFIG, chunk=CHUNK, dtype=torch.float32)
    assert float(done.stdout.split()[-1]) == pytest.approx(needs.curves[way].at(4096) / 2**20, rel=0.2)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_without_memory_are_counted_as_those_with(way: str):
    model = real_model(way)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        step(model, 3 * CHUNK, way)
    without = counted._count(CONFIG, torch.float32, False, way, CHUNK, 3 * CHUNK)[0]
    # Constants of the model that were there before.
    assert live.peak == pytest.approx(without, rel=0.05)


def test_weights_are_not_among_activations():
    """Views of them, which every product makes, are no memory of the step's."""
    config = copy.deepcopy(CONFIG)
    config.hidden_size, config.intermediate_size = 512, 4096
    layers = 6 * (4 * 512 * 512 + 3 * 512 * 4096) * 4
    few = counted.activation_bytes(config, 16, "checkpointed", dtype=torch.float32)
    assert few < layers / 2


@pytest.mark.slow
@pytest.mark.parametrize("is_lora", [False, True])
def test_few_layers_tell_of_many(is_lora: bool):
    """At most the gradient of the embeddings more, which is not always there when most is."""
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers, config.vocab_size = 12, 20000
    for way, tokens in (("plain", 4096), ("checkpointed", 4096), ("carried", 4 * CHUNK)):
        few, _ = counted._count_all(config, torch.bfloat16, is_lora, way, CHUNK, tokens)
        whole, _ = counted._count(config, torch.bfloat16, is_lora, way, CHUNK, tokens)
        of_words = 0 if is_lora else 20000 * 256 * 2
        assert 0.98 * whole <= few <= 1.02 * whole + of_words, way


@pytest.mark.slow
def test_a_carried_step_takes_keys_values_gradients_and_a_constant():
    """Beside them grows what one layer's attention works on; hidden states are of labelled tokens alone."""
    kept_a_token = 2 * 2 * 6 * 128 * 4  # keys and values, with gradients, of six layers of 2 heads of 64
    gradients = 2 * 128 * 4  # of one layer's keys and values, before they are added to those kept
    of_a_layer = 2 * 256 * 4  # keys and values for 4 heads: copied, kept for a backward pass, their gradients
    found = {n: counted._count(CONFIG, torch.float32, False, "carried", 1024, n) for n in (4096, 8192, 32768)}
    for few, many in ((4096, 8192), (8192, 32768)):
        per_token = (found[many][0] - found[few][0]) / (many - few)
        assert found[many][1] - found[few][1] == kept_a_token * (many - few)
        assert kept_a_token <= per_token <= kept_a_token + gradients + 4 * of_a_layer + 64


def test_curves():
    curve = Curve(((10, 100.0), (20, 150.0), (40, 450.0)))
    assert [curve.at(n) for n in (10, 15, 20, 30, 50)] == [100, 125, 150, 300, 600]
    assert [curve.longest(room) for room in (20, 100, 125, 300, 600)] == [0, 10, 15, 30, 50]
    assert curve.without(Curve(((10, 10.0), (20, 20.0)))).points == ((10, 90), (20, 130), (40, 410))


def test_what_is_said(needs: ContextNeeds):
    lines = context_lines(CONFIG, 2**20, memory_gib=8.0, chunk=512)
    assert "one row of 1048576 tokens" in lines[0][1] and "the last 512 are labelled" in lines[0][1]
    assert "8 GiB, carried in chunks of 512" in lines[0][1]
    ways = ["  plain", "  checkpointed", "  carried", "  carried, K and V away"]
    assert [name for name, _ in lines] == ["assumed", "full", *ways, "LoRA", *ways]
    # 8 GiB less weights, moments and the head's leave 3.375; what is carried takes 1 and 2 KiB a token.
    assert lines[1][1] == "weights 1.00 GiB, moments 2.00 GiB, and with gradients:"
    assert lines[4][1] == "3.00 GiB, fits; the longest: 1179648 tokens"
    assert lines[5][1].startswith("2.00 GiB, fits; the longest: 1769472 tokens; 1.00 GiB in host memory")
    assert lines[2][1] == "10.00 GiB, does not fit; the longest: 353894 tokens"


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> ContextNeeds:
    """Made up: nothing is counted."""

    def line(per_token: int) -> Curve:
        return Curve(((0, 0.0), (2**20, float(per_token * 2**20))))

    curves = {"plain": line(10 * 1024), "checkpointed": line(5 * 1024), "carried": line(3 * 1024)}
    found = ContextNeeds(curves, line(1024), 2**30, 2**30)
    monkeypatch.setattr(counted, "context_needs", lambda *_, **__: found)
    return found


def test_a_model_that_carries_more_says_so():
    from tests.integrations.tiny import make_model

    lines = dict(context_lines(make_model("falcon-h1").config, 4096, memory_gib=8.0, chunk=64))
    assert "not known: context: " in lines["full"] and "layers of type hybrid" in lines["full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 4096}, "context: got a value without a model"),
        ({"model": "m", "context": 4096}, "memory_gib: got None where torch sees no GPU"),
        ({"model": "m", "context": 0, "memory_gib": 8.0}, "context: got 0, wanted more than 0"),
        ({"model": "m", "context": 9, "memory_gib": -1.0}, "memory_gib: got -1.0"),
        ({"model": "m", "memory_gib": 8.0}, "memory_gib: got 8.0 without context"),
        ({"model": "m", "context_chunk": 8}, "context_chunk: got 8 without context"),
    ],
)
def test_what_it_cannot_say(arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        doctor(**arguments)


def test_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str], needs: ContextNeeds):
    config = copy.deepcopy(CONFIG)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    ask = [
        "doctor",
        "--model",
        str(tmp_path),
        "--context",
        "8192",
        "--memory_gib",
        "8",
        "--context_chunk",
        "512",
    ]
    assert main(ask) == 0
    assert "Context of 8192 tokens" in capsys.readouterr().out
    assert main(["doctor", "--context", "8192", "--memory_gib", "8"]) == 2
    assert "--context: got a value without a model" in capsys.readouterr().err
