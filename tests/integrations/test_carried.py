"""Carried contexts: chunk by chunk what the whole row gives, with the activations of one chunk."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import CarriedContext, forest_batch, patch_model
from fastdpo.doctor.live_bytes import LiveBytes
from fastdpo.integrations.forest import keys_values
from fastdpo.integrations.forest.carried import _Run
from tests.integrations.tiny import VOCAB, make_model

FAMILIES = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "phi",
    "gpt-neox",
    "granite",
    "olmo",
    "mixtral",
    "gpt-oss",
)
WINDOWS = {"mistral": {"sliding_window": 6}, "gemma3": {"sliding_window": 6}, "gemma2": {"sliding_window": 6}}


def make_rows(seed: int = 0) -> Any:
    """Two pairs: one whose prompt is shared, one with an answer of one token and no prompt to share."""
    generator = torch.Generator().manual_seed(seed)
    prompt, a, b, c = (torch.randint(3, VOCAB, (n,), generator=generator) for n in (21, 9, 14, 5))
    sequences = [torch.cat([prompt, a]), c, torch.cat([prompt, b]), c[:4]]
    labels = []
    for sequence, start in zip(sequences, (21, 2, 21, 3), strict=True):
        label = sequence.clone()
        label[:start] = -100
        labels.append(label)
    return forest_batch(sequences, labels)


class Step(NamedTuple):
    loss: Tensor
    logps: Tensor
    grads: dict[str, Tensor]


def run_step(model: nn.Module, rows: Any, context: CarriedContext | None = None) -> Step:
    """DPO's loss of the pairs, made in the head, and a KTO-like use of log-probabilities outside of it."""
    model.zero_grad(set_to_none=True)
    calls = [call if context is None else {**call, "context": context} for call in rows.calls]
    request = {"row_batches": calls, "token_layout": rows.tokens, "return_logps": True}
    made = model(**request, pair_loss={"loss_type": "sigmoid", "beta": 0.3, "ref_logps": torch.zeros(4)})
    logps = model(**request).logps
    (made.pair_loss.loss + logps.sigmoid().sum()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(made.pair_loss.loss.detach(), logps.detach(), grads)


def assert_steps_alike(found: Step, wanted: Step, bound: float = 1e-5) -> None:
    torch.testing.assert_close(found.loss, wanted.loss, rtol=bound, atol=bound)
    torch.testing.assert_close(found.logps, wanted.logps, rtol=0, atol=2 * bound)
    assert found.grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        assert (found.grads[name] - grad).norm() <= bound * grad.norm().clamp(min=1e-3), name


@pytest.mark.promise(61)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_carried_step_is_the_whole_rows(family: str):
    """In chunks of one token, some that cut answers, and one of all."""
    model = patch_model(make_model(family, **WINDOWS.get(family, {})))
    rows = make_rows()
    wanted = run_step(model, rows)
    for chunk in (1, 7, 23, 1000) if family in ("llama", "gemma3") else (7, 23):
        assert_steps_alike(run_step(model, rows, CarriedContext(chunk)), wanted)


@pytest.mark.parametrize("where", ["head", "backbone", "both"])
def test_adapters(where: str):
    targets = {
        "head": ["lm_head"],
        "backbone": "all-linear",
        "both": ["q_proj", "v_proj", "down_proj", "lm_head"],
    }
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("llama"), LoraConfig(r=4, target_modules=targets[where], init_lora_weights=False)
    )
    patch_model(model)
    rows = make_rows()
    wanted = run_step(model, rows)
    assert_steps_alike(run_step(model, rows, CarriedContext(6)), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_draws_the_same_numbers_again(dropout: float):
    """In training mode, of attention and of an adapter's input; against the same chunks with a graph."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    model = patch_model(get_peft_model(make_model("llama", attention_dropout=dropout), config)).train()
    rows, context = make_rows(), CarriedContext(10)
    torch.manual_seed(3)
    carried = run_step(model, rows, context)
    torch.manual_seed(3)
    again = run_step(model, rows, context)
    assert all(torch.equal(again.grads[name], grad) for name, grad in carried.grads.items())
    # The slope of the loss along its gradient, from losses alone: other draws in the backward pass would be
    # the gradient of another loss.
    norm = sum(g.double().square().sum() for g in carried.grads.values()).sqrt()
    slopes = []
    for step in (3e-4, -3e-4):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                if name in carried.grads:
                    p += step * carried.grads[name] / norm
        torch.manual_seed(3)
        at = run_step(moved, rows, context)
        slopes.append(at.loss.double() + at.logps.double().sigmoid().sum())
    assert (slopes[0] - slopes[1]) / 6e-4 == pytest.approx(float(norm), rel=2e-2)


def test_bfloat16():
    """Autocast's dtypes in both passes: no further from fp32 than the whole row in bf16 is, twice over."""
    model = patch_model(make_model("llama"))
    rows = make_rows()
    truth = run_step(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        whole = run_step(model, rows)
        carried = run_step(model, rows, CarriedContext(7))
    for name, grad in truth.grads.items():
        error, unit = ((step.grads[name] - grad).norm() for step in (carried, whole))
        assert error <= 2 * unit + 1e-6, name


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch):
    """A reference's forward pass, and a backbone that is frozen."""
    closed = []
    close = keys_values.KeysValues.close
    monkeypatch.setattr(keys_values.KeysValues, "close", lambda self: (closed.append(1), close(self)))
    model = patch_model(make_model("llama"))
    rows = make_rows()
    call = {**rows.calls[0], "context": CarriedContext(5)}
    with torch.no_grad():
        found = model(row_batches=[call], token_layout=rows.tokens, return_logps=True).logps
        wanted = model(row_batches=rows.calls, token_layout=rows.tokens, return_logps=True).logps
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert closed == [1]
    model.model.requires_grad_(False)
    logps = model(row_batches=[call], token_layout=rows.tokens, return_logps=True).logps
    assert closed == [1, 1]
    logps.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    "context",
    [CarriedContext(9, device_mib=0), CarriedContext(9, device_mib=0, host_mib=0)],
    ids=["host", "disk"],
)
def test_keys_and_values_elsewhere(context: CarriedContext, tmp_path: Any):
    model = patch_model(make_model("llama"))
    rows = make_rows()
    wanted = run_step(model, rows, CarriedContext(9))
    found = run_step(model, rows, CarriedContext(9, context.device_mib, context.host_mib, str(tmp_path)))
    assert torch.equal(found.logps, wanted.logps)
    assert all(torch.equal(found.grads[name], grad) for name, grad in wanted.grads.items())
    assert not list(tmp_path.iterdir())  # also while it ran: the next test


@pytest.mark.promise(62)
def test_files_have_no_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """Nothing is left of a process that is killed."""
    seen = []
    chunk = _Run._chunk

    def looked_at(self: _Run, *args: Any, **options: Any) -> Tensor:
        seen.append(list(tmp_path.iterdir()))
        return chunk(self, *args, **options)

    monkeypatch.setattr(_Run, "_chunk", looked_at)
    run_step(patch_model(make_model("llama")), make_rows(), CarriedContext(9, 0, 0, str(tmp_path)))
    assert len(seen) > 10 and not any(seen)


@pytest.mark.promise(62)
def test_a_full_disk_is_an_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """Not a signal that ends the process, as a write through memory would be."""

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="context: 0 MiB of keys and values: No space left"):
        run_step(patch_model(make_model("llama")), make_rows(), CarriedContext(9, 0, 0, str(tmp_path)))
    assert not list(tmp_path.iterdir())


def saved_bytes(model: nn.Module, length: int, chunk: int | None) -> int:
    """Most bytes that graphs hold at once for a backward pass; the last 8 tokens are scored."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:-8] = -100
    rows = forest_batch([ids], [labels])
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held += self.size
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    calls = [call if chunk is None else {**call, "context": CarriedContext(chunk)} for call in rows.calls]
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        logps = model(row_batches=calls, token_layout=rows.tokens, return_logps=True).logps
        logps.sum().backward()
    return most


def test_graphs_do_not_grow_with_the_context():
    """Keys and values of one layer are saved by its attention, while it is run again: these alone grow."""
    model = patch_model(make_model("llama"))
    plain, carried = ([saved_bytes(model, n, chunk) for n in (128, 512)] for chunk in (None, 16))
    config = model.config
    of_a_layer = 2 * 4 * config.num_key_value_heads * config.head_dim  # bytes a token
    assert plain[1] - plain[0] > 20 * of_a_layer * 384
    assert carried[1] - carried[0] <= 2 * of_a_layer * 384


def long_pair(tokens: int) -> Any:
    """A pair that shares a prompt: a row of so many tokens, 16 of them of each answer."""
    generator = torch.Generator().manual_seed(tokens)
    prompt, *answers = (torch.randint(3, VOCAB, (n,), generator=generator) for n in (tokens - 32, 16, 16))
    labels = [torch.cat([torch.full_like(prompt, -100), answer]) for answer in answers]
    return forest_batch([torch.cat([prompt, answer]) for answer in answers], labels)


def train_step(model: nn.Module, rows: Any, context: CarriedContext | None) -> float:
    calls = [call if context is None else {**call, "context": context} for call in rows.calls]
    loss = {"loss_type": "sigmoid", "beta": 0.3, "ref_logps": torch.zeros(2)}
    made = model(row_batches=calls, token_layout=rows.tokens, return_logps=True, pair_loss=loss).pair_loss
    made.loss.backward()
    return float(made.loss.detach())


@pytest.mark.slow
def test_sixteen_times_the_context_that_checkpointing_holds():
    """Counted in bytes of tensors alive, gradients among them, files not: 4096 tokens in what 256 take.

    20 steps there give the curve of a run that keeps the whole row.
    """
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    model = patch_model(LlamaForCausalLM(config)).train()
    on_disk = CarriedContext(64, device_mib=0, host_mib=0)
    of_files = 4 * 4096 * config.num_hidden_layers * config.head_dim * 4  # keys, values, their gradients

    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    with LiveBytes() as few:
        train_step(checkpointed, long_pair(256), None)
    with LiveBytes() as many:
        train_step(copy.deepcopy(model), long_pair(4096), on_disk)
    assert many.peak - of_files <= few.peak

    rows, curves = long_pair(4096), []
    for context in (on_disk, None):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        curve = []
        for _ in range(20):
            curve.append(train_step(trained, rows, context))
            optimizer.step()
            optimizer.zero_grad()
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][-1] < 0.5 * curves[0][0]


def test_states_are_made_of_labelled_tokens_alone(monkeypatch: pytest.MonkeyPatch):
    """And what the layout names lies where it did: two calls, one of which nothing is labelled in."""
    model = patch_model(make_model("llama"))
    rows, unlabelled = make_rows(), {"input_ids": torch.arange(3, 10)[None]}
    calls = [{**call, "context": CarriedContext(9)} for call in (unlabelled, *rows.calls)]
    index = rows.tokens.token_index
    tokens = dataclasses.replace(rows.tokens, token_index=index + 7)
    seen: list[Tensor] = []
    run = _Run.forward
    monkeypatch.setattr(
        _Run, "forward", lambda self, **how: seen.append(states := run(self, **how)) or states
    )
    plain = run_step(model, rows)
    model.zero_grad()
    logps = model(row_batches=calls, token_layout=tokens, return_logps=True).logps
    torch.testing.assert_close(logps, plain.logps, rtol=1e-5, atol=1e-5)
    assert [len(states[0]) for states in seen] == [0, len(index.unique())]
    logps.sum().backward()
    with pytest.raises(ValueError, match="token_index"):
        model(
            row_batches=calls,
            token_layout=dataclasses.replace(tokens, token_index=index + 700),
            return_logps=True,
        )


def test_a_second_backward_pass_is_refused():
    model = patch_model(make_model("llama"))
    rows = make_rows()
    call = {**rows.calls[0], "context": CarriedContext(9)}
    loss = model(row_batches=[call], token_layout=rows.tokens, return_logps=True).logps.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="context: got a second backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "chunk: got 0, wanted a number of tokens"),
        ({"chunk": True}, "chunk: got True"),
        ({"chunk": 2.5}, "chunk: got 2.5"),
        ({"chunk": 8, "device_mib": -1}, "device_mib: got -1"),
        ({"chunk": 8, "host_mib": 1.5}, "host_mib: got 1.5"),
    ],
)
def test_contexts_that_are_none(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CarriedContext(**arguments)


def carried_call(model: nn.Module, **changes: Any) -> Any:
    rows = make_rows()
    call = {**rows.calls[0], "context": CarriedContext(9), **changes}
    call = {name: value for name, value in call.items() if value is not None}
    return model(row_batches=[call], token_layout=rows.tokens, return_logps=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 9}, "context: got int, wanted a CarriedContext"),
        (
            {"forest": None, "input_ids": torch.ones(2, 9, dtype=torch.long)},
            r"got shape \(2, 9\) with context",
        ),
        ({"attention_mask": torch.ones(1, 49)}, "attention_mask: got a value together with forest"),
    ],
)
def test_calls_that_no_context_goes_with(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        carried_call(patch_model(make_model("llama")), **changes)


def test_models_that_it_is_not_for():
    with pytest.raises(ValueError, match="context: .* layers of type hybrid"):
        carried_call(patch_model(make_model("falcon-h1")))
    model = patch_model(make_model("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="context: got a CarriedContext with activation checkpointing"):
        carried_call(model)
    model = patch_model(make_model("mixtral"))
    with pytest.raises(ValueError, match="output_router_logits"):
        carried_call(model, output_router_logits=True)
