"""docs/methods.md: its tables are the generator's, its recipes run, and nothing it names is missing."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.losses import LOSSES
from fastdpo.losses.methods import CHECKED, METHODS, PROVISIONS, anchor_of, main, methods_table, render
from tests import ROOT

PAGE = ROOT / "docs" / "methods.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_committed_tables_are_the_generators(tmp_path: Path) -> None:
    assert render(TEXT) == TEXT, "run python -m fastdpo.losses.methods docs/methods.md"
    assert main([str(PAGE), "--check"]) == 0
    other = tmp_path / "page.md"
    other.write_text(TEXT.replace("| A1 | DPO |", "| A1 | DPO! |"), encoding="utf-8")
    assert main([str(other), "--check"]) == 1
    assert main([str(other)]) == 0
    assert other.read_text(encoding="utf-8") == TEXT
    with pytest.raises(ValueError, match="<!-- methods:begin -->"):
        render("no markers")


def test_all_104_methods_once_and_complete() -> None:
    counts = {"A": 43, "B": 11, "C": 4, "D": 9, "E": 6, "F": 10, "G": 3, "H": 1, "I": 5, "J": 4, "K": 8}
    assert Counter(method.id[0] for method in METHODS) == counts
    assert len({method.id for method in METHODS}) == len(METHODS) == 104
    for method in METHODS:
        assert method.provided in PROVISIONS and method.checked in CHECKED, method
        assert method.use and method.name and method.source, method
        assert method.provided != "recipe" or method.recipe, method
    header, _, *rows = methods_table().splitlines()
    assert all(row.count("|") == header.count("|") for row in rows)


def test_every_loss_is_some_method() -> None:
    words = set(re.findall(r"`([a-z0-9_]+)`", " ".join(method.use for method in METHODS)))
    assert set(LOSSES) <= words


def test_functions_named_exist() -> None:
    import importlib

    named = set(re.findall(r"`([a-z_]+)\.(\w+)`", " ".join(method.use for method in METHODS)))
    assert len(named) > 10
    for module, attribute in named:
        assert hasattr(importlib.import_module(f"fastdpo.losses.{module}"), attribute), (module, attribute)


def test_recipes_have_their_headings() -> None:
    headings = {anchor_of(line.removeprefix("## ")) for line in TEXT.splitlines() if line.startswith("## ")}
    linked = {anchor_of(method.recipe) for method in METHODS if method.recipe}
    assert linked == headings


def test_the_recipes_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 20
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    trained = [
        "rpo", "iterative_rpo", "mpo", "wpo", "sem", "ld", "loss", "mrpo", "infifpo", "multi", "tpo", "sdpo",
        "mrpo_weighted", "mrpo_by_hand",
        "brain", "a_star", "trpa", "irpo", "kto", "bco", "npo", "simnpo", "rebel", "rpo_kl",
        "mcts", "dapo", "oprl", "srft", "opa", "tdpo",
        "tdpo_from_logps", "tdpo_by_hand", "aligndistil", "gkd", "minillm",
        "online", "online_ipo", "sppo", "dsppo", "hypo", "xpo", "total", "aot",
    ]  # fmt: skip
    for name in trained:
        value = namespace[name]
        value = value if isinstance(value, torch.Tensor) else value.loss
        assert value.dim() == 0 and value.isfinite(), name
        (grad,) = torch.autograd.grad(value, namespace["hidden"], retain_graph=True)
        assert grad.isfinite().all() and grad.any(), name
