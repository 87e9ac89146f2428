"""A plugin of pytest: tests that need a GPU, on one that is not there (``-p benchmarks.dry.plugin``).

Tests run as they would on the card, but for values: see `benchmarks.dry.tensor` and `benchmarks.dry.claims`.
What they launch of Triton is recorded and not compiled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dry.claims import Claims
from benchmarks.dry.device import CARDS, Card, Pretence
from benchmarks.dry.launches import Launches
from benchmarks.dry.ours import prepare, take_for_granted


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dry run")
    group.addoption("--dry-card", default=CARDS["h200"].to_json(), help="the GPU that is not there, as JSON")
    group.addoption("--dry-launches", type=Path, help="a file to record launches in")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_DryRun(config), "dry run")


class _DryRun:
    def __init__(self, config: pytest.Config) -> None:
        self._pretence = Pretence(Card.from_json(config.getoption("--dry-card")))
        self._launches = Launches(config.getoption("--dry-launches"))
        self._claims = Claims(lambda: self._pretence.mode.made_up)
        self._claims.install()
        self._pretence.__enter__()
        self._launches.install(self._pretence)
        prepare(self._pretence)
        self._skip_walks()

    def _skip_walks(self) -> None:
        """Checks that go through a gradient block by block, of values that are not there."""
        from fastdpo.testing import checker

        self._pretence.replace(checker, "_assert_blocks", lambda *args, **options: None)

    def pytest_collection_finish(self) -> None:
        if "fastdpo.training" in sys.modules:  # which takes seconds to import where no test wants it
            take_for_granted(self._pretence)

    def pytest_runtest_setup(self) -> None:
        self._claims.begin()

    def pytest_runtest_teardown(self) -> None:
        # A test that failed in the midst of it.
        self._pretence.mode.forbids_waiting = False
        self._pretence.mode.limit = self._pretence.card.memory

    def pytest_unconfigure(self) -> None:
        self._pretence.__exit__()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(
            f"{self._launches.count} launches of {len(self._launches.specialisations)} specialisations; "
            f"{self._claims.left_aside} claims left aside, which hang on values"
        )
