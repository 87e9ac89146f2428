"""Imports go only downwards, also inside functions; only the upper layers know other libraries."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastdpo"

# Bottom first. A module imports from its own layer and from those below it; modules named together
# stand side by side and do not know each other.
LAYERS = (
    {"types", "_C", "waves", "plan_modes"},
    {"schedule"},
    {"plan_lean", "plan_memory", "plan_text"},
    {"reference", "reference_sequence", "plan"},
    {"plan_explain"},
    {"kernels"},
    {"ops"},
    {"losses"},
    {"batch"},
    {"pair_loss", "preference_rows", "functional_checks"},
    {"functional", "functional_rows"},
    {"integrations"},
    {"doctor_plan"},
    {"doctor_model"},
    {"doctor"},
    {"fastdpo"},  # the public names and the version
    {"training"},
    {"cli"},
)
# What does not follow from the order: pure maths stays pure, and the checker must not rest on what it checks.
ONLY = {
    "losses": set(),
    "waves": set(),
    "schedule": {"waves"},
    "plan": {"plan_lean", "plan_memory", "plan_modes", "plan_text", "schedule", "waves"},
    "plan_explain": {"plan", "plan_modes", "schedule"},
    "plan_lean": {"schedule", "waves"},
    "plan_memory": {"schedule", "waves"},
    "plan_modes": set(),
    "plan_text": {"schedule"},
    "testing": {"types", "reference", "kernels"},
}

# Libraries beside the standard one. Every layer may import torch; those missing here may import anything.
LIBRARIES = {
    "types": set(),
    "reference": set(),
    "reference_sequence": set(),
    "plan": set(),
    "plan_explain": set(),
    "schedule": set(),
    "waves": set(),
    "plan_lean": set(),
    "plan_memory": set(),
    "plan_modes": set(),
    "plan_text": set(),
    "kernels": {"triton"},
    "ops": set(),
    "losses": set(),
    "batch": set(),
    "pair_loss": set(),
    "preference_rows": set(),
    "functional_checks": set(),
    "functional": set(),
    "functional_rows": set(),
    "testing": set(),
}


def layer_of(name: str) -> str:
    """``fastdpo.kernels.cpu`` is of the layer ``kernels``; the package's own names are of ``fastdpo``."""
    parts = name.split(".")
    is_module = len(parts) > 1 and parts[1] in _names_of_modules()
    return parts[1] if is_module or len(parts) > 2 else "fastdpo"


def _names_of_modules() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir()}.union(*LAYERS)


def allowed_layers(layer: str) -> set[str]:
    if layer in ONLY:
        return ONLY[layer] | {layer}
    for height, names in enumerate(LAYERS):
        if layer in names:
            return set().union({layer}, *LAYERS[:height])
    raise AssertionError(f"fastdpo.{layer} has no place in LAYERS: give it one")


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, lazy and dynamic ones included, annotations' excepted."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # With the member's name, since in `from fastdpo import ops` that is the module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    name = str(argument.value)
                    yield node.lineno, f"{package}{name}" if name.startswith(".") else name
        yield from imported_modules(node, package)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    layer = layer_of(module)
    if module == "fastdpo":
        return []  # the public names: joins everything
    package = module if is_package else module.rpartition(".")[0]
    allowed, libraries = allowed_layers(layer), LIBRARIES.get(layer)
    found = []
    for line, name in imported_modules(ast.parse(source), package):
        root = name.split(".")[0]
        if root == "fastdpo":
            if layer_of(name) not in allowed:
                found.append(f"{module}:{line} imports {name}; {layer} may import {sorted(allowed)}")
        elif libraries is not None and root not in sys.stdlib_module_names | libraries | {"torch"}:
            found.append(f"{module}:{line} imports {name}; {layer} may import torch and {sorted(libraries)}")
    return found


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdpo.kernels.cpu", "from fastdpo.ops import linear_logprob"),
        ("fastdpo.kernels.cpu", "from fastdpo import ops"),
        ("fastdpo.kernels.cpu", "from ..ops.linear_logprob import linear_logprob"),
        ("fastdpo.kernels.cpu", "from .. import losses"),
        ("fastdpo.kernels.cpu", "import fastdpo.functional"),
        ("fastdpo.kernels.cpu", "def f():\n    from fastdpo.ops import checks"),
        ("fastdpo.kernels.cpu", "import importlib\nimportlib.import_module('fastdpo.ops')"),
        ("fastdpo.kernels.cpu", "import fastdpo"),
        ("fastdpo.kernels.cpu", "from fastdpo import LMHead"),
        ("fastdpo.kernels.cpu", "import numpy"),
        ("fastdpo.reference", "from fastdpo.plan import Plan"),
        ("fastdpo.reference", "from fastdpo.kernels.contract import LogitTransform"),
        ("fastdpo.losses.pairwise", "from fastdpo.types import LMHead"),
        ("fastdpo.ops.linear_logprob", "from fastdpo.losses import registry"),
        ("fastdpo.ops.linear_logprob", "def f():\n    import transformers"),
        ("fastdpo.functional", "from fastdpo.integrations import lm_head"),
        ("fastdpo.testing.cases", "from fastdpo.ops import linear_logprob"),
    ],
)
def test_upward_imports_are_found(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdpo.kernels.cpu", "from fastdpo import _C"),
        (
            "fastdpo.kernels.cpu",
            "from .contract import RowOutputs\nfrom .. import _C\nimport triton.language as tl",
        ),
        ("fastdpo.reference", "if TYPE_CHECKING:\n    from fastdpo.kernels.contract import RowOutputs"),
        ("fastdpo.losses.pairwise", "import math\nimport torch\nfrom fastdpo.losses.registry import LOSSES"),
        ("fastdpo.training.trainer", "import fastdpo\nfrom fastdpo import __version__, functional"),
        ("fastdpo.integrations.model", "import transformers\nfrom fastdpo.functional import fused_dpo_loss"),
    ],
)
def test_downward_imports_are_not(module: str, source: str):
    assert violations(source, module) == []


def test_a_module_without_a_layer_is_refused():
    with pytest.raises(AssertionError, match=r"fastdpo\.misc"):
        violations("import torch", "fastdpo.misc.module")
