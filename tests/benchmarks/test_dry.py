"""The dry run: a GPU that is not there finds what a real one would, short of numbers.

In processes of their own: a `Pretence` replaces parts of torch, and Triton is aimed at its card.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dry.claims import REFUTED, Claims, _Asking
from benchmarks.dry.device import CARDS, Card
from benchmarks.dry.everything import jobs, run_jobs
from benchmarks.dry.launches import read_launches
from tests import ROOT

CARD = CARDS["h200"]

TENSORS = """
import copy
import pytest
import torch
from benchmarks.dry.device import CARDS, Pretence

CUDA = torch.device("cuda")
with Pretence(CARDS["h200"]) as pretence:
    mode = pretence.mode
    assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    hidden = torch.randn(6, 8, device="cuda", requires_grad=True)
    weight = torch.randn(32, 8).to(CUDA).requires_grad_()
    labels = torch.tensor([3, -100, 5, 31, -100, 0], device="cuda")
    assert hidden.device.type == weight.device.type == "cuda" and hidden.is_cuda

    # Integers keep their values, so shapes that hang on them are right.
    assert labels.tolist() == [3, -100, 5, 31, -100, 0]
    index = (labels != -100).nonzero()[:, 0]
    assert index.tolist() == [0, 2, 3, 5] and hidden[labels != -100].shape == (4, 8)
    assert mode.made_up == 0
    logps = (hidden[index] @ weight.t()).log_softmax(-1).gather(1, labels[index][:, None])
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]
    assert all(grad.device.type == "cuda" for grad in grads) and mode.made_up == 0
    assert isinstance(logps.sum().item(), float) and mode.made_up == 1

    # Sums of another dtype than the operands', of which torch knows not every shape.
    halves = torch.empty(3, 4, 8, dtype=torch.bfloat16, device="cuda")
    sums = torch.empty(3, 4, 4, device="cuda")
    torch.bmm(halves, halves.mT, out_dtype=sums.dtype, out=sums)
    sums = torch.baddbmm(sums, halves, halves.mT, out_dtype=sums.dtype)
    assert sums.shape == (3, 4, 4) and sums.dtype == torch.float32 and sums.is_cuda

    # Memory of the host is no GPU's.
    pinned = torch.empty_like(hidden, device="cpu", pin_memory=True, requires_grad=False)
    assert pinned.device.type == "cpu" and pinned.shape == hidden.shape
    assert pinned.copy_(hidden.detach()).to(CUDA).is_cuda

    # What a GPU refuses.
    with pytest.raises(RuntimeError, match="same device"):
        hidden + torch.ones(6, 8)
    torch.cuda.set_sync_debug_mode("error")
    for wait in (lambda: labels.tolist(), lambda: hidden[labels > 0], lambda: float(hidden.sum())):
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait()
    torch.cuda.set_sync_debug_mode("default")
    before = torch.cuda.memory_allocated()
    huge = torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == 60 << 30
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(100 << 30, dtype=torch.uint8, device="cuda")
    del huge
    assert torch.cuda.memory_allocated() == before

    # Views share memory, and its address.
    rows = torch.empty(4, 16, device="cuda")
    assert rows[1].data_ptr() == rows.data_ptr() + 64 and rows.data_ptr() % 16 == 0
    assert rows.clone().data_ptr() != rows.data_ptr() == rows.view(-1).data_ptr()

    module = torch.nn.Linear(8, 4).to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        assert module(hidden).dtype == torch.bfloat16
    assert copy.deepcopy(module).weight.device.type == "cuda"
assert not torch.cuda.is_available() or torch.version.cuda
assert torch.ones(2).to("cpu").sum().item() == 2
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_its_tensors_do_what_a_gpus_do() -> None:
    done = python("-W", "ignore", "-c", TENSORS)
    assert done.returncode == 0, done.stderr


def test_what_hangs_on_no_made_up_value_is_believed() -> None:
    made_up = 0
    claims = Claims(lambda: made_up)
    source = (
        "def check(value):\n"
        "    assert value > 1, 'small'\n"
        "    if value < 3:\n"
        "        raise AssertionError('odd')\n"
        "    return 1\n"
    )
    space: dict[str, Any] = {REFUTED: claims.refuted}
    exec(compile(ast.fix_missing_locations(_Asking().visit(ast.parse(source))), "x", "exec"), space)
    check = space["check"]
    claims.begin()
    assert check(5) == 1
    for value, message in ((0, "small"), (2, "odd")):
        with pytest.raises(AssertionError, match=message):
            check(value)
    made_up += 1  # read since the test began
    assert check(0) == 1 and claims.left_aside == 2
    claims.begin()  # another test has read nothing yet
    with pytest.raises(AssertionError):
        check(0)


PLANTED = {
    "a tensor of the CPU": ("torch.ones(4)", "same device"),
    "a value that is waited for": ("torch.tensor(float(case.hidden.sum()))", "synchronizing"),
}
PLANTED_TEST = """
import pytest, torch
from fastdpo import linear_logprob
from fastdpo.testing import make_case

@pytest.mark.gpu
def test_it():
    case = make_case(device="cuda")
    index = (case.labels != -100).flatten().nonzero()[:, 0]
    torch.cuda.set_sync_debug_mode("error")
    out = linear_logprob(case.hidden, case.lm_head, case.labels, token_index=index)
    (out.logps.flatten()[:4] * {planted})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_mistakes_that_only_a_gpu_shows_are_found(name: str, tmp_path: Path) -> None:
    planted, said = PLANTED[name]
    path = tmp_path / "test_planted.py"
    path.write_text(PLANTED_TEST.replace("{planted}", planted))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = ["-m", "pytest", "-q", "-p", "benchmarks.dry.plugin", "-p", "no:cacheprovider", str(path)]
    done = python(*command, "-c", str(tmp_path / "pytest.ini"))
    assert done.returncode == 1 and said in done.stdout, done.stdout


@pytest.mark.slow
def test_a_short_dry_run_launches_every_kind_of_kernel(tmp_path: Path) -> None:
    """The head at tiny sizes: contenders of ours and a peer, and what they ask of Triton."""
    pytest.importorskip("triton")
    words = ["accuracy", "row", "--preset", "tiny", "--tasks", "pairs", "cache", "--contenders"]
    words += ["fastdpo-triton", "fastdpo-cuda", "fastdpo-lean", "trl", "triton"]
    commands = jobs(CARD, [], [words], tmp_path)
    assert run_jobs(commands) == {}
    found = read_launches([*tmp_path.glob("*.jsonl")])
    kernels = {name.partition(":")[2] for name, _ in found}
    # Sequences go to the CUDA kernels there, and logits of this size are stored in mode lean, too.
    assert {"_row_kernel", "_slab_kernel", "_scale_kernel"} <= kernels
    assert all(json.loads(data)["target"]["arch"] == 90 for data in found.values())


COMPILE = """
import sys
from pathlib import Path
from benchmarks.dry.device import CARDS
from benchmarks.dry.launches import aim, compile_one, read_launches, watch_cache

aim(CARDS["h200"])
hits = []
watch_cache(lambda kernel, hit: hits.append((kernel, hit)))
(chosen, *_) = [(n, d) for (n, _), d in read_launches([Path(sys.argv[1])]).items() if n.endswith(sys.argv[2])]
compile_one(*chosen)
print([hit for kernel, hit in hits if kernel == "_scale_kernel"])
"""
LAUNCH = """
import torch
from benchmarks.dry.device import CARDS, Pretence
from benchmarks.dry.launches import Launches, aim, watch_cache
from pathlib import Path
import sys

hits = []
with Pretence(CARDS["h200"]) as pretence:
    from benchmarks.dry.ours import prepare
    from fastdpo.ops.scaling import scaled
    from triton.runtime.jit import JITFunction

    prepare(pretence)

    run = JITFunction.run
    if sys.argv[2] == "record":
        Launches(Path(sys.argv[1])).install(pretence)
    else:  # as a real launch looks its kernel up
        aim(CARDS["h200"])
        watch_cache(lambda kernel, hit: hits.append((kernel, hit)))
        pretence.replace(
            JITFunction, "run", lambda k, *a, grid, warmup, **o: run(k, *a, grid=grid, warmup=True, **o)
        )
    scaled(torch.empty(4096, device="cuda"), torch.tensor(0.5, device="cuda"))
print([hit for kernel, hit in hits if kernel == "_scale_kernel"])
"""


@pytest.mark.slow
def test_what_is_compiled_beforehand_is_what_a_launch_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch of another process finds its kernel in the cache; the first compilation did not."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    record = str(tmp_path / "launches.jsonl")
    for arguments, said in (
        (("-c", LAUNCH, record, "record"), "[]"),
        (("-c", COMPILE, record, "_scale_kernel"), "[False]"),
        (("-c", LAUNCH, record, "look"), "[True]"),
    ):
        done = python("-W", "ignore", *arguments)
        assert done.returncode == 0 and done.stdout.strip() == said, done.stdout + done.stderr


def test_a_card_goes_from_process_to_process_as_it_is() -> None:
    assert [Card.from_json(card.to_json()) for card in CARDS.values()] == list(CARDS.values())


def test_a_card_or_suite_that_is_not_known_is_refused() -> None:
    from benchmarks.dry.__main__ import main, read_card
    from benchmarks.dry.everything import dry_run

    with pytest.raises(ValueError, match="card: got 'v100', wanted one of a100"):
        dry_run("v100", [], [])
    assert read_card("b200").capability == (10, 0)
    with pytest.raises(SystemExit):
        main(["--card", "v100"])


@pytest.mark.slow
def test_what_a_small_card_cannot_hold_is_not_run() -> None:
    """Of whole steps, of which it makes two layers, too: by what all of them need."""
    done = python("-W", "ignore", "-m", "benchmarks.dry", "step", "--card", "rtx5060")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if "not run: does not fit: needs at least" in line]
    assert len(said) == 3 and all("7.96 GiB are free" in line for line in said), done.stdout
