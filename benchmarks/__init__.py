"""Benchmarks: contenders are checked against fp64 before they are timed, and timed interleaved."""
