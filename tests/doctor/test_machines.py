"""``fastdpo plan``: its numbers against a count by hand, what it prints, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from fastdpo.cli import main
from fastdpo.doctor import machines
from fastdpo.doctor.context import activation_bytes
from fastdpo.doctor.machines import Run, part_of_layers, plan_machines
from fastdpo.plan.machines import ENGINES
from tests import ROOT

LAYERS = 2
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
LAYER = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128 + 2 * 64
HEAD = 1024 * 64
ALL = LAYERS * LAYER + 2 * HEAD + 64


def run(engine: str, **changes: object) -> Run:
    usual = {
        "tp_size": 1, "is_lora": False, "tokens": 256, "labelled_tokens": 64, "dtype": torch.float32,
        "is_mixed": True, "reference": "copy", "is_checkpointed": True, "context_chunk": None,
    }  # fmt: skip
    return Run(engine, **{**usual, **changes})  # type: ignore[arg-type]


def test_fsdp2_by_hand():
    (machine,) = plan_machines(CONFIG, run("fsdp2"), (8,))
    parts = ALL * 4 // 8
    assert [machine.held[n] for n in ("weights", "gradients", "optimizer", "reference")] == [
        parts, parts, 2 * parts, parts,
    ]  # fmt: skip
    # Layers and embeddings forward, backward and for the reference in bf16; head and norm are kept.
    assert (
        machine.sent("backbone", "all-gather")
        == (LAYERS * LAYER + HEAD) * 3 * 2 * 7 // 8 + 64 * 2 * 2 * 7 // 8
    )
    assert machine.sent("head", "all-gather") == HEAD * 2 * 2 * 7 // 8
    assert machine.sent(collective="reduce-scatter") == ALL * 4 * 7 // 8
    assert machine.held["activations"] == activation_bytes(CONFIG, 256, "checkpointed")


def test_zero_and_ddp_by_hand():
    (ddp,) = plan_machines(CONFIG, run("ddp", reference="none"), (4,))
    assert ddp.held["optimizer"] == 8 * ALL and ddp.sent() == ALL * 4 * 2 * 3 // 4
    assert ddp.held["engine"] == ALL * (2 + 4)  # autocast's copies, and buckets
    (zero2,) = plan_machines(CONFIG, run("zero2", reference="none"), (4,))
    assert zero2.held["optimizer"] == 12 * ALL // 4 and zero2.held["weights"] == 2 * ALL
    (one,) = plan_machines(CONFIG, run("ddp"), (1,))
    assert one.sent() == 0 and one.held["engine"] == ALL * 2


def test_tensors_are_divided():
    whole, part = (plan_machines(CONFIG, run("tp", tp_size=2), (n,))[0] for n in (2, 4))
    norms = (LAYERS * 2 + 1) * 64
    assert whole.held["weights"] == ((ALL - norms) // 2 + norms) * 4 == 2 * part.held["weights"]
    # Checkpointed: two sums a layer forward, again in the backward pass and for the reference, five backward.
    sums = 256 * 64 * 2 * (LAYERS * (2 * 3 + 5) + 2)
    assert whole.sent("backbone", "all-reduce") == sums
    divided = part_of_layers(CONFIG, 2)
    assert (divided.num_attention_heads, divided.num_key_value_heads, divided.intermediate_size) == (2, 1, 64)
    assert whole.held["activations"] < plan_machines(CONFIG, run("fsdp2"), (2,))[0].held["activations"]


def test_copies_of_a_split_model_add_a_sum_of_gradients():
    """8 GPUs in 4 copies hold what 2 GPUs hold; each sums its half of the gradients with 3 others."""
    copies = plan_machines(CONFIG, run("fsdp2", replicas=4), (8,))[0]
    once = plan_machines(CONFIG, run("fsdp2"), (2,))[0]
    assert copies.held == once.held and copies.ways == once.ways
    others = [t for t in copies.transfers if t.collective != "all-reduce"]
    assert others == once.transfers
    sums = {t.of: t.size for t in copies.transfers if t.collective == "all-reduce"}
    halves = {t.of: t.size // 2 for t in once.transfers if t.collective == "reduce-scatter"}
    assert sums == halves and copies.sent("head", "all-reduce") == 2 * sums["head"] * 3 // 4


def test_hidden_states_move_where_the_head_is_alone():
    """Of a model with an adapter; accelerate joins the last norm to the head of others."""
    lora = run("fsdp2", is_lora=True, dtype=torch.bfloat16, reference="adapter", labelled_tokens=16)
    few, many = plan_machines(CONFIG, lora, (4, 1024))
    assert few.moves_states and not many.moves_states
    assert few.ways is not None and few.ways.states_bytes < few.ways.weight_bytes
    assert few.head.num_tokens == 64 and few.head.vocab_size == 256
    assert not plan_machines(CONFIG, run("fsdp2", labelled_tokens=16), (4,))[0].moves_states


@pytest.fixture
def model(tmp_path: Path) -> str:
    CONFIG.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_printed(
    engine: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machines, "activation_bytes", lambda *_, **__: 2**20)
    size = ["--tp_size", "2"] if engine == "tp" else []
    assert (
        main(["plan", "--model", f"{model}/config.json", "--gpus", "6..16", "--engine", engine, *size]) == 0
    )
    text = capsys.readouterr().out
    assert "predicted, not measured" in text and "Adam; reference: copy" in text
    memory = text.split("Memory of a GPU in GiB\n")[1].split("\n\n")[0].splitlines()
    assert memory[0].split() == [
        "GPUs", "weights", "gradients", "optimizer", "reference", "engine", "activations", "head", "total",
        "fits",
    ]  # fmt: skip
    assert [line.split()[0] for line in memory[1:]] == ["8", "16"] and memory[1].endswith("yes")
    assert "Sent by a GPU in a step" in text and "  16 GPUs: mode " in text


def test_what_does_not_fit(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "activation_bytes", lambda *_, **__: 2**20)
    assert main(["plan", "--model", model, "--gpus", "2", "--engine", "ddp", "--memory_gib", "0.01"]) == 0
    assert "no (0.01 GiB)" in capsys.readouterr().out


def test_the_page_has_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "Llama-3.1-8B")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    words = re.search(r"^fastdpo (plan .*)$", page, re.MULTILINE)
    assert words is not None and main(words[1].split()) == 0
    assert f"```\n{capsys.readouterr().out}```" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 8 --engine ddpp", "invalid choice: 'ddpp'"),
        ("--gpus 64..8 --engine ddp", "got '64..8', wanted a number of GPUs"),
        ("--gpus 0 --engine ddp", "got '0', wanted a number"),
        ("--gpus 6 --engine tp --tp_size 4", "gpus: got 6, wanted a multiple of tp_size, 4"),
        ("--gpus 8 --engine tp --tp_size 8", "tp_size: got 8, wanted a divisor of num_attention_heads, 4"),
        ("--gpus 8 --engine tp", "tp_size: got 1 under tp, wanted 2 or more"),
        ("--gpus 8 --engine zero2 --tp_size 2", "tp_size: got 2 under zero2, wanted engine tp or fsdp2"),
        ("--gpus 8 --engine ddp --dp_replicate_size 2", "dp_replicate_size: got 2 under ddp, wanted fsdp2"),
        ("--gpus 8 --engine tp --tp_size 2 --dp_replicate_size 2", "dp_replicate_size: got 2 under tp"),
        ("--gpus 8 --engine fsdp2 --dp_replicate_size 0", "dp_replicate_size: got 0, wanted 1 or more"),
        ("--gpus 8 --engine fsdp2 --dp_replicate_size 8", "gpus: got 8, wanted a multiple of dp_replicate"),
        ("--gpus 6 --engine fsdp2 --dp_replicate_size 4", "gpus: got 6, wanted a multiple of dp_replicate"),
        ("--gpus 8 --engine fsdp2 --reference adapter", "reference: got adapter without --lora"),
        ("--gpus 8 --engine fsdp2 --context_chunk 64", "context_chunk: got 64 under fsdp2"),
        ("--gpus 8 --engine tp --tp_size 2 --lora", "lora: got it under tp"),
        ("--gpus 8 --engine ddp --labelled_tokens 9999", "labelled_tokens: got 9999, wanted 1 to 8192"),
    ],
)
def test_mistakes(words: str, message: str, model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", model, *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("fastdpo: error: ") and said.count("\n") == 1


def test_configs_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    ask = ["plan", "--gpus", "8", "--engine", "ddp", "--model"]
    assert main([*ask, str(tmp_path)]) == 2
    assert "whose config cannot be read" in capsys.readouterr().err
    assert main([*ask, "./missing"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    BertConfig().save_pretrained(tmp_path)
    assert main([*ask, str(tmp_path)]) == 2
