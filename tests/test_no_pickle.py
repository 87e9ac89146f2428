"""Nothing of ours unpickles: who takes data, a cache or a checkpoint of another's runs none of its code."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdpo.training.reference.cache import ReferenceCache
from tests import ROOT

# A process's own error on its way to its parent, and what DeepSpeed writes, which pickles objects of its own.
ALLOWED = {
    ("training/data/processes.py", "pickle.loads"): 1,
    ("training/loop/checkpoint_files.py", "torch.load"): 3,
}


def unsafe(source: str) -> Iterator[str]:
    """The calls of a file that would run what a pickle asks for."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield "torch.load"
        if name.rpartition(".")[2] in ("load", "loads", "Unpickler") and "pickle" in name:
            yield name
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield name
        if name in ("joblib.load", "pd.read_pickle", "pandas.read_pickle", "dill.load", "yaml.unsafe_load"):
            yield name
        if given.get("trust_remote_code") == "True":
            yield "trust_remote_code"


@pytest.mark.promise(72)
def test_no_file_of_ours_is_unpickled():
    found: dict[tuple[str, str], int] = {}
    for path in sorted((ROOT / "fastdpo").rglob("*.py")):
        for name in unsafe(path.read_text(encoding="utf-8")):
            place = (path.relative_to(ROOT / "fastdpo").as_posix(), name)
            found[place] = found.get(place, 0) + 1
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(text)",
        "np.load(path, allow_pickle=True)",
        "load_model(name, trust_remote_code=True)",
    ],
)
def test_what_would_is_found(source: str):
    assert list(unsafe(source))


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was run",)


@pytest.mark.promise(72)
def test_a_pickle_in_a_cache_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cache = ReferenceCache(tmp_path)
    with cache.path("key").open("wb") as file:
        np.savez(file, key=np.array("key"), logps=np.array([Bomb()], dtype=object))
    assert cache.load("key", (1, 2)) is None and "cannot be read" in caplog.text
    cache.path("key").write_bytes(pickle.dumps(Bomb()))
    assert cache.load("key", (1, 2)) is None


@pytest.mark.promise(69, 74)
def test_no_flipped_bit_of_a_cache_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every byte, and every length: the numbers that were written, or none."""
    monkeypatch.setattr("fastdpo.training.reference.cache.logger.warning", lambda *text: None)
    cache, scores = ReferenceCache(tmp_path), torch.tensor([[-1.5, -2.25], [-3.125, -0.5]])
    path = cache.save("key", scores)
    whole = path.read_bytes()
    for place, byte in enumerate(whole):
        path.write_bytes(whole[:place] + bytes([byte ^ 1 << place % 8]) + whole[place + 1 :])
        found = cache.load("key", (2, 2))
        assert found is None or torch.equal(found, scores), f"byte {place}"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.load("key", (2, 2)) is None, f"of {length} bytes"
