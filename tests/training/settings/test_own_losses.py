"""A loss of one's own, in a file beside the run."""

# ruff: noqa: F811  (fixtures that are imported are named again where they are asked for)

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastdpo.cli import main
from fastdpo.losses import LOSSES
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.own_losses import IMPORTED, import_losses
from tests import ROOT
from tests.cli_cases import (  # noqa: F401  (fixtures)
    make_tokenizer,
    model_dir,
    pairs,
    train,
    trained_bpe,
)
from tests.training.conftest import no_curves, read_metrics  # noqa: F401  (fixtures)

# The example of the documentation: half the square of the margin's distance from a target.
_PAGE = (ROOT / "docs" / "training.md").read_text()
SOURCE = next(code for code in re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL) if "my_square" in code)


@pytest.fixture(autouse=True)
def own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with the file above; what it registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_losses.py").write_text(SOURCE)
    before = dict(LOSSES)
    yield tmp_path
    LOSSES.clear()
    LOSSES.update(before)
    IMPORTED.clear()
    for name in ("my_losses", "broken_losses"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_losses", "my_losses.py"])
def test_a_loss_of_ones_own_trains_from_the_command_line(
    train: Callable[..., int], tmp_path: Path, name: str
):
    assert train("--import", name, "--loss_type", "my_square", "--target", "3") == 0
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(4.5)


def test_a_loss_of_ones_own_in_yaml(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "import: my_losses\nmodel: m\ndataset: d\nuse_cpu: true\nloss_type: my_square\ntarget: 1e-1"
    )
    for _ in range(2):  # once a process, as any module
        assert parse_train([str(path)]).config.options == {"target": 0.1}
    assert parse_train([str(path), "--target", "2"]).config.options == {"target": 2.0}
    with pytest.raises(ValueError, match="target: got inf"):
        parse_train([str(path), "--target", "inf"])


def test_help_and_doctor_know_it(
    capsys: pytest.CaptureFixture[str], model_dir: Path, pairs: Path, tmp_path: Path
):
    with pytest.raises(SystemExit):
        main(["train", "--import", "my_losses", "--help-all"])
    assert "--target TARGET" in capsys.readouterr().out
    words = [
        "--model",
        str(model_dir),
        "--dataset",
        str(pairs),
        "--output_dir",
        str(tmp_path / "o"),
        "--use_cpu",
    ]
    assert main(["doctor", *words, "--import", "my_losses", "--loss_type", "my_square"]) == 0


@pytest.mark.parametrize(
    ("name", "source", "text"),
    [
        ("no_such_module", None, "got no_such_module, wanted a module or a .py file: no such module"),
        ("no/such/file.py", None, "got no/such/file.py, wanted a module or a .py file: no such module"),
        ("broken_losses", "import no_such_library", "no module 'no_such_library'"),
        ("broken_losses.py", "1 / 0", "broken_losses.py fails: ZeroDivisionError: division by zero"),
        ("broken_losses", SOURCE.replace("my_square", "sigmoid"), "fails: ValueError: .*registered already"),
        ("broken_losses", SOURCE.replace("target", "seed"), "my_square: got the option 'seed', a setting of"),
    ],
)
def test_what_cannot_be_imported_is_said(own_losses: Path, name: str, source: str | None, text: str):
    if source is not None:
        (own_losses / "broken_losses.py").write_text(source)
    with pytest.raises(ValueError, match=text):
        import_losses([name])
        parse_train(["--model", "m"])
