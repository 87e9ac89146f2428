"""What every test runs under: fixed seeds, two threads, poisoned memory; and the shared real data."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, quick

# Before torch loads OpenMP: idle threads sleep instead of spinning, which on two busy cores makes
# small operations up to ten times faster. Subprocesses of tests inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before `datasets` reads it: what tests read is kept in a folder of theirs, workers and subprocesses too.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastdpo-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import torch  # noqa: E402

# What some tests use, and an image with a GPU may be without.
OPTIONAL_PACKAGES = ("datasets", "hypothesis", "matplotlib", "peft", "pyarrow", "trl")

SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device; skipped, with the reason, where there is none"
    )
    torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each function, and what changed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        kept = quick.chosen(items, quick.rooms_of(quick.changed_files()))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    # Long ones start first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    _leave_out_of_collections()


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    _leave_out_of_collections()


def _leave_out_of_collections() -> None:
    """What is here now is looked at by no later `gc.collect`.

    Every trainer ends with one. With the modules of torch, transformers and TRL it takes longer than a
    tiny run itself; of what a test makes, all is still found.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that imports an optional package which is not installed is skipped, with the reason."""
    report = yield
    call: Any = report.call  # type: ignore[attr-defined]
    cause = call.excinfo and call.excinfo.value.__cause__
    if isinstance(cause, ModuleNotFoundError):
        package = (cause.name or "").partition(".")[0]
        *_, (frame, line) = traceback.walk_tb(cause.__traceback__)
        # Where fastdpo itself cannot be imported without it, that is a mistake.
        is_ours = ROOT / "fastdpo" in Path(frame.f_code.co_filename).parents
        if package in OPTIONAL_PACKAGES and not is_ours:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), line, f"Skipped: needs {package}, which is not installed")
    return report


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restored_logging() -> Generator[None, None, None]:
    """What the command line does to the package's logger is not there for the next test."""
    log = logging.getLogger("fastdpo")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that Python code asks torch for uninitialised holds NaN (integers: their maximum).

    An output that is never written then shows as NaN instead of as whatever lay there before, which
    is often the right result of the test before. torch can do this itself, but only in its
    deterministic mode, which would hide operations that do not give the same bits twice.
    """
    with torch.device("cpu"):  # has torch remember which functions are its own before one is wrapped
        torch.empty(0)
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return allocate_poisoned


@pytest.fixture(scope="session")
def preference_path() -> Path:
    """240 real preference pairs: ``prompt``, ``chosen`` and ``rejected`` as lists of messages."""
    return _shared("preference_en.jsonl")


@pytest.fixture(scope="session")
def preference_rows(preference_path: Path) -> list[dict[str, Any]]:
    return _rows(preference_path)


@pytest.fixture(scope="session")
def unpaired_path() -> Path:
    """300 real rated answers: ``prompt``, ``completion`` and ``label``."""
    return _shared("unpaired_en.jsonl")


@pytest.fixture(scope="session")
def unpaired_rows(unpaired_path: Path) -> list[dict[str, Any]]:
    return _rows(unpaired_path)


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"the shared data file ../shared/data/{name} is not here")
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
