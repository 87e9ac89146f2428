"""Imports go only downwards, also inside functions; only the upper layers know other libraries."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastdpo"

# Bottom first. A module imports from its own layer and from those below it, also for annotations.
LAYERS = (
    "native_build",  # which setup.py runs by itself
    "types",
    "_C",
    "plan",
    "definitions",
    "kernels",
    "ops",
    "losses",
    "functional",
    "integrations",
    "doctor",
    "fastdpo",  # the public names and the version
    "training",
    "training.settings",
    "training.data",
    "training.batches",
    "training.reference",
    "training.loop",
    "rounds",
    "commands",
    "cli",
)
# What does not follow from the order: pure maths stays pure, and the checker must not rest on what it checks.
ONLY = {
    "native_build": set(),
    "losses": set(),
    "plan": set(),
    "definitions": {"types"},
    "kernels": {"types", "_C", "plan", "definitions"},
    "testing": {"types", "definitions", "kernels"},
}

# Libraries beside the standard one. Every layer may import torch, and names of types for annotations; those
# missing here may import anything.
LIBRARIES = {
    "types": set(),
    "plan": set(),
    "definitions": set(),
    "kernels": {"triton"},
    "ops": set(),
    "losses": set(),
    "functional": set(),
    "testing": set(),
}

_EVERYWHERE = {*sys.stdlib_module_names, "torch", "typing_extensions"}


def layer_of(name: str) -> str:
    """``fastdpo.kernels.cpu`` is of the layer ``kernels``; the package's own names are of ``fastdpo``."""
    _, *rooms = name.split(".")
    for layer in (".".join(rooms[:2]), *rooms[:1]):
        if layer in LAYERS or layer in ONLY:
            return layer
    return ".".join(rooms) if len(rooms) > 1 or rooms and is_module(name) else "fastdpo"


def is_module(name: str) -> bool:
    """Whether a dotted name is that of a module or a package here."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def allowed_layers(layer: str) -> set[str]:
    if layer in ONLY:
        return ONLY[layer] | {layer}
    assert layer in LAYERS, f"fastdpo.{layer} has no place in LAYERS: give it one"
    return {*LAYERS[: LAYERS.index(layer) + 1]}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import: lazy and dynamic ones, and those for annotations, included."""
    for node in ast.iter_child_nodes(tree):
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
        elif libraries is not None and root not in sys.stdlib_module_names | libraries | {
            "torch",
            "typing_extensions",
        }:
            found.append(f"{module}:{line} imports {name}; {layer} may import torch and {sorted(libraries)}")
    return found


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path):
    is_package = path.stem == "__init__"
    assert violations(path.read_text(encoding="utf-8"), _name_of(path), is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdpo.kernels.cpu", "from fastdpo.ops import linear_logprob"),
        ("fastdpo.kernels.cpu", "from fastdpo import ops"),
        ("fastdpo.kernels.cpu", "from ..ops.linear_logprob import linear_logprob"),
        ("fastdpo.kernels.cpu", "from .. import losses"),
        ("fastdpo.kernels.cpu", "import fastdpo.functional.pairs"),
        ("fastdpo.kernels.cpu", "def f():\n    from fastdpo.ops import checks"),
        ("fastdpo.kernels.cpu", "import importlib\nimportlib.import_module('fastdpo.ops')"),
        ("fastdpo.kernels.cpu", "import fastdpo"),
        ("fastdpo.kernels.cpu", "from fastdpo import LMHead"),
        ("fastdpo.kernels.cpu", "import numpy"),
        ("fastdpo.definitions.logprob", "from fastdpo.plan.call import Plan"),
        ("fastdpo.definitions.logprob", "from fastdpo.kernels.contract import LogitTransform"),
        (
            "fastdpo.definitions.logprob",
            "if TYPE_CHECKING:\n    from fastdpo.kernels.contract import RowOutputs",
        ),
        ("fastdpo.losses.pairwise", "from fastdpo.types import LMHead"),
        ("fastdpo.training.data.encode", "from fastdpo.training.batches import collate"),
        ("fastdpo.training.settings.config", "def f():\n    from fastdpo.training.loop import models"),
        ("fastdpo.training.loop.trainer", "from fastdpo.rounds.sample import sample"),
        ("fastdpo.rounds.chain", "def f():\n    from fastdpo.cli import train"),
        ("fastdpo.ops.linear_logprob", "from fastdpo.losses import registry"),
        ("fastdpo.ops.linear_logprob", "def f():\n    import transformers"),
        ("fastdpo.functional.pairs", "from fastdpo.integrations import lm_head"),
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
        ("fastdpo.losses.pairwise", "import math\nimport torch\nfrom fastdpo.losses.registry import LOSSES"),
        ("fastdpo.training.loop.trainer", "import fastdpo\nfrom fastdpo import __version__, functional"),
        (
            "fastdpo.integrations.model",
            "import transformers\nfrom fastdpo.functional.pairs import fused_dpo_loss",
        ),
    ],
)
def test_downward_imports_are_not(module: str, source: str):
    assert violations(source, module) == []


def test_a_module_without_a_layer_is_refused():
    with pytest.raises(AssertionError, match=r"fastdpo\.misc"):
        violations("import torch", "fastdpo.misc.module")


def _imports() -> dict[str, set[str]]:
    """Of each module those of the package that it imports, for annotations too; the public names aside."""
    found = {}
    for path in _modules():
        module = _name_of(path)
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        names = {name for _, name in imported_modules(ast.parse(path.read_text("utf-8")), package)}
        # Of `from fastdpo.plan.call import make_plan` the module is what is imported.
        names |= {name.rpartition(".")[0] for name in names}
        found[module] = {name for name in names if name.startswith("fastdpo.") and is_module(name)}
    found.pop("fastdpo")
    return found


def test_no_module_imports_itself_by_way_of_others():
    imports = _imports()
    try:
        tuple(TopologicalSorter({name: of - {name} for name, of in imports.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert imports["fastdpo.training.loop.trainer"] > {"fastdpo.training.loop.guard"}
