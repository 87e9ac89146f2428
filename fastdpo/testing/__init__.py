"""The fp64 checker, the data it is fed and the bugs it has to find, for tests and benchmarks.

``assert_close_to_fp64`` and ``assert_logps_close`` are the only tolerances of the test suite; ``accuracy``
has what is promised, by H, dtype and hardware, ``hardware_sums`` and ``simulated_logps`` the arithmetic
behind it; ``make_case`` and ``same_sign_case`` make data, ``fp64_results`` and ``eager_results`` the truth
and the yardstick for it, and ``assert_results_close`` holds a whole result to both.
"""

from fastdpo.testing.cases import (
    Case,
    HeadResults,
    assert_results_close,
    eager_results,
    fp64_results,
    make_case,
    same_sign_case,
)
from fastdpo.testing.checker import assert_close_to_fp64, assert_logps_close
from fastdpo.testing.planted_bugs import PLANTED_BUGS, PlantedBug, emulated_results

__all__ = [
    "PLANTED_BUGS",
    "Case",
    "HeadResults",
    "PlantedBug",
    "assert_close_to_fp64",
    "assert_logps_close",
    "assert_results_close",
    "eager_results",
    "emulated_results",
    "fp64_results",
    "make_case",
    "same_sign_case",
]
