"""The demo's pieces: what its pairs promise, and a whole run at toy sizes as `make demo` starts it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from stdlib_pairs import Function, documented_functions, make_pairs, split_by_module  # noqa: E402

SOURCE = '''
def first(a, b=1):
    """Add two numbers.

    A second paragraph.
    """
class Box:
    def lift(self):
        """Raise the box by a metre."""
if True:
    def undocumented(): pass
    def second(x):
        """Take one of them away."""
'''


def functions(count: int) -> list[Function]:
    return [
        Function(f"module{i % 7}", f"f{i}", f"def m.f{i}(x):", f"Does the thing called {i} " + "x" * (i % 50))
        for i in range(count)
    ]


def test_functions_are_found_with_signature_and_summary() -> None:
    found = documented_functions({"tools.box": SOURCE})
    assert [(f.module, f.signature, f.summary) for f in found] == [
        ("tools", "def tools.box.first(a, b=1):", "Add two numbers."),
        ("tools", "def tools.box.Box.lift(self):", "Raise the box by a metre."),
        ("tools", "def tools.box.second(x):", "Take one of them away."),
    ]


def test_a_summary_that_two_functions_share_is_left_out() -> None:
    documents = {"a": "The very same words.", "b": "The very same words.", "c": "Some other words."}
    twice = "".join(f'def {name}():\n    "{text}"\n' for name, text in documents.items())
    assert [f.name for f in documented_functions({"m": twice})] == ["c"]


def test_the_answer_alone_says_nothing() -> None:
    """Every text is chosen exactly as often as it is rejected."""
    rows = make_pairs(functions(200), 3, random.Random(0))
    assert len(rows) > 500
    chosen, rejected = (Counter(row[name] for row in rows) for name in ("chosen", "rejected"))
    assert chosen == rejected


def test_no_module_is_in_both_splits() -> None:
    train, test = split_by_module(functions(200), 0.3, random.Random(0))
    assert train and test and len(train) + len(test) == 200
    assert not {f.module for f in train} & {f.module for f in test}


@pytest.mark.slow
def test_a_toy_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "demo.py"),
        "--quick",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # What an earlier run left is replaced: without that, a folder with a log in it is refused.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": "of an earlier run"}\n')
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "of an earlier run" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy_before"]["accuracy"] == 0.5
    assert 0 < summary["accuracy_after"]["accuracy"] < 1
    losses = summary["step"]["loss"]
    assert losses["fused"] == pytest.approx(losses["unpatched"], abs=1e-4)
    for name in ("model.safetensors", "tokenizer.json", "curves.png", "metrics.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for words in (
        "held-out reward accuracy before",
        "held-out reward accuracy after",
        "peak memory of the step",
    ):
        assert words in done.stdout
