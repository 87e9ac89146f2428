"""The C++ kernels for the CPU read and write nothing that is not theirs, and do nothing undefined."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT
from tests.kernels import sanitized

pytestmark = [
    pytest.mark.slow,  # builds the kernels again
    pytest.mark.skipif(
        sanitized.unavailable_reason() is not None, reason=str(sanitized.unavailable_reason())
    ),
]

USES_WHAT_IS_FREED = """
import tests.kernels.sanitized
import torch
from fastdpo.kernels.native import _C
from fastdpo.kernels.sequence_native import sequence_args
assert _C.compiler == "sanitized"
values, offsets, out = torch.ones(64), torch.tensor([0, 16, 32, 48, 64]), torch.empty(4)
args = sequence_args(values, offsets, out, None, None)
_C.cpu_sequence_sums(args, 1)
print(out.tolist(), flush=True)
del out
_C.cpu_sequence_sums(args, 1)
print("not reported")
"""


@pytest.fixture(scope="module")
def built() -> None:
    sanitized.build()


@pytest.mark.promise(21, 38)
def test_nothing_is_reported(built: None):
    """One case of each test; `make sanitize` runs all."""
    files = [f"tests/kernels/{name}.py" for name in sanitized.TESTS]
    assert sanitized.run("-x", "--quick", "-m", "not slow", "-k", sanitized.LEFT_OUT, *files) == 0


def test_what_is_freed_is_found(built: None):
    done = subprocess.run(
        [sys.executable, "-c", USES_WHAT_IS_FREED],
        cwd=ROOT, env=sanitized.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and "heap-use-after-free" in done.stderr
    assert done.stdout == "[16.0, 16.0, 16.0, 16.0]\n"
