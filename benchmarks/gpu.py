"""What ``make gpu`` runs: every mode against its GEMMs and every row kernel against a copy.

    python -m benchmarks.gpu                 # on a machine with a CUDA device
    python -m benchmarks.gpu --device cpu --quick    # the same code at tiny sizes

Writes ``benchmarks/results/<device>-<date>.json`` with every raw sample, and prints the ratios. ^C keeps
what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, environment, write_results
from benchmarks.head import PASSES, HeadProblem, Size, bench_mode
from benchmarks.rows import VOCABULARIES, bench_rows
from fastdpo.ops.backends import backend_report, unavailable_reason

FULL_SIZES = [Size(model, n) for model in ("llama-3-8b", "qwen2.5-7b", "gemma-2-9b") for n in (4096, 16384)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    backends = [name for name in ("triton", "cuda", "cpu") if unavailable_reason(name, device) is None]
    print(f"device {environment(device)['device']}; backends {', '.join(backends) or 'reference'}")
    for name, reason in backend_report().items():
        if reason:
            print(f"  {name} does not run here: {reason}")

    results: list[dict[str, Any]] = []
    try:
        for run in _jobs(device, backends or ["reference"], args.quick, args.repeats):
            results.append(run())
            print(_line(results[-1]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept")
    if not results:
        return 1
    path = write_results({"environment": environment(device), "results": results}, args.results)
    print(f"wrote {path}")
    return 1 if any(result["failed"] for result in results) else 0


def _jobs(
    device: torch.device, backends: list[str], quick: bool, repeats: int | None
) -> list[Callable[[], dict[str, Any]]]:
    repeats = repeats or (3 if quick else 20)
    sizes = [Size("tiny", 256, torch.float32), Size("tiny", 256)] if quick else FULL_SIZES
    vocabularies = (4001,) if quick else VOCABULARIES
    rows = 64 if quick else 2048
    jobs: list[Callable[[], dict[str, Any]]] = []

    def head(size: Size, mode: str) -> dict[str, Any]:
        try:
            return bench_mode(HeadProblem(size, device), mode, backends, repeats=repeats)
        except torch.OutOfMemoryError as error:
            failed = {"all": f"out of memory: {str(error).splitlines()[0]}"}
            return {"suite": "head", "model": size.model, "num_tokens": size.num_tokens,
                    "dtype": str(size.dtype).removeprefix("torch."), "mode": mode,
                    "gemm_passes": PASSES[mode], "failed": failed, "contenders": {}}  # fmt: skip

    for size in sizes:
        for mode in PASSES:
            jobs.append(lambda size=size, mode=mode: head(size, mode))  # type: ignore[misc]
    for vocab in vocabularies:
        for dtype in (torch.float32, torch.bfloat16):
            jobs.append(
                lambda vocab=vocab, dtype=dtype: bench_rows(  # type: ignore[misc]
                    device, backends, vocab=vocab, logits_dtype=dtype, rows=rows, repeats=repeats
                )
            )
    return jobs


def _line(result: dict[str, Any]) -> str:
    """One result as one line."""
    if result["suite"] == "head":
        what = f"{result['model']:<11} N={result['num_tokens']:<6} {result['dtype']:<9} {result['mode']:<6}"
        cells = [
            f"{name} {cell['median_ms']:.2f} ms ({cell['ratio_to_gemm']:.3f}x)"
            for name, cell in result["contenders"].items()
        ]
    else:
        what = f"rows V={result['vocab']:<7} {result['logits_dtype']:<9}"
        cells = [f"{name} {cell['gb_per_s']:.0f} GB/s" for name, cell in result["contenders"].items()]
    cells += [f"{name} FAILED: {reason}" for name, reason in result["failed"].items()]
    return f"{what} {'  '.join(cells)}"


if __name__ == "__main__":
    sys.exit(main())
