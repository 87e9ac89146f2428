"""Importing fastdpo changes nothing, loads no optional library, and works without any of them."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import fastdpo
from fastdpo.losses.registry import preference_loss
from tests import ROOT

OPTIONAL = ("triton", "peft", "datasets", "matplotlib", "trl", "deepspeed", "accelerate", "transformers")

OBSERVE = """
import atexit, gc, logging, os, random, signal, sys, threading, warnings
import torch, torch.nn.functional

def functions_of(owner):
    return {f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items() if callable(value)}

def observe():
    owners = (torch, torch.Tensor, torch.nn.Module, torch.nn.functional, torch.autograd, torch.nn, torch.ops)
    functions = {}
    for owner in owners:
        functions |= functions_of(owner)
    return {
        **functions,
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
                      torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark),
        "deterministic": (torch.are_deterministic_algorithms_enabled(),
                          torch.utils.deterministic.fill_uninitialized_memory),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "logging": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        "handlers": ([signal.getsignal(s) for s in signal.valid_signals()], sys.excepthook, sys.displayhook),
        "atexit": atexit._ncallbacks(),
        "importers": (list(sys.path), list(sys.meta_path), list(sys.path_hooks)),
        "recursion": sys.getrecursionlimit(),
        "gc": (gc.isenabled(), gc.get_threshold(), list(gc.callbacks)),
        "folder": os.getcwd(),
        "cuda": torch.cuda.is_initialized(),
    }
"""

REPORT = """
before, loaded = observe(), set(sys.modules)
import fastdpo
for name in fastdpo.__all__:  # what it is about, loaded on use; the others need transformers
    if fastdpo._LOADED_ON_USE[name].split(".")[1] not in ("integrations", "training") or name == "LMHead":
        getattr(fastdpo, name)
after = observe()
changed = [key for key in before | after if before.get(key) != after.get(key)]
assert not changed, f"import fastdpo changed {changed}"
new = {name.split(".")[0] for name in set(sys.modules) - loaded} & set(OPTIONAL)
assert not new, f"import fastdpo imported {sorted(new)}"
"""

BLOCK = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL or name == "fastdpo._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""

USE = """
hidden = torch.randn(3, 4, requires_grad=True)
weight = torch.randn(7, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as told:  # by its first use, not by the import
    warnings.simplefilter("always")
    out = fastdpo.linear_logprob(hidden, weight, torch.tensor([0, 6, -100]))
assert "no kernel of fastdpo runs on cpu" in str(told[0].message)
out.logps.sum().backward()
assert out.logps[2] == 0 and hidden.grad.isfinite().all() and weight.grad.count_nonzero() > 0
"""


def _run(*sources: str) -> None:
    script = "\n".join((f"OPTIONAL = {OPTIONAL!r}", *sources))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == "", "importing fastdpo printed something"


def test_import_has_no_side_effect():
    """Each of these, done by the import, would be found."""
    effects = (
        "torch.nn.functional.cross_entropy = print",
        "torch.Tensor.sum = print",
        "os.environ['TOKENIZERS_PARALLELISM'] = 'false'",
        "warnings.filterwarnings('ignore')",
        "torch.set_num_threads(1 + torch.get_num_threads())",
        "torch.manual_seed(1 + torch.initial_seed())",
        "logging.basicConfig()",
        "torch.set_float32_matmul_precision('high')",
    )
    checks = (f"before = observe()\n{effect}\nassert before != observe(), {effect!r}" for effect in effects)
    _run(OBSERVE, REPORT, *checks)


@pytest.mark.promise(44)
def test_import_and_use_without_optional_libraries():
    _run(OBSERVE, BLOCK, "import fastdpo", USE)


def test_no_public_name_is_a_module() -> None:
    """A submodule of the same name, once imported, would stand in the place of what is meant."""
    for module in pkgutil.iter_modules(fastdpo.__path__):
        if module.name != "_C":
            importlib.import_module(f"fastdpo.{module.name}")
    for name in fastdpo.__all__:
        assert not isinstance(getattr(fastdpo, name), ModuleType), name
    assert fastdpo.preference_loss is preference_loss
