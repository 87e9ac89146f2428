"""docs/families.md is of the transformers that is pinned, has all of its families, and says what is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.integrations.every_family import PAGE, families, table, verdict

TEXT = PAGE.read_text(encoding="utf-8")
VERSION = re.findall(r"of transformers ([0-9.]+) know", TEXT)
ROWS = re.findall(r"^\| (\S+) \| `(\w+)` \| (fused|refused|fails|not built) \| (.+) \|$", TEXT, re.MULTILINE)


def test_the_page_is_of_the_version_pinned():
    pins = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert len(VERSION) == 1 and f'"transformers=={VERSION[0]}' in pins


needs_that_version = pytest.mark.skipif(
    [transformers.__version__] != VERSION, reason="transformers is not of the page's version"
)


@needs_that_version
def test_every_family_has_a_row_below_the_generators_head():
    assert TEXT.startswith(table([]).partition("0 fused")[0])
    assert [(row[0], row[1]) for row in ROWS] == sorted(families())


@pytest.mark.promise(49)
@needs_that_version
@pytest.mark.parametrize("family", ["llama", "bloom", "bert", "qwen2_vl"])
def test_a_row_is_what_is_found(family: str):
    name = next(name for model_type, name in families() if model_type == family)
    row = table([verdict(family, name)]).splitlines()[-1]
    assert row in TEXT.splitlines()
