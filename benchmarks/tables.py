"""README's tables, generated: results from ``benchmarks/results/*.json``, losses from their registry.

python -m benchmarks.tables          # rewrites README.md between its markers
python -m benchmarks.tables --check  # fails when README.md is not what the results give
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, read_results
from benchmarks.head import PASSES
from fastdpo.losses import losses_table

# DESIGN section 6, fp32 logits: the time allowed, as a ratio to the mode's products in plain cuBLAS.
TARGETS = {"score": 1.18, "stash": 1.16, "cache": 1.15, "pairs": 1.15}
TARGET_TOKENS = {"score": 16384, "stash": 16384, "cache": 4096, "pairs": 16384}
GPU_MODELS = ("llama-3-8b", "qwen2.5-7b", "gemma-2-9b")


def head_table(results: list[dict[str, Any]]) -> str:
    """Ratio to the mode's own GEMMs, newest result of each cell; *not run* where there is none."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for payload in results:
        if "nvidia_smi" not in payload["environment"]:
            continue
        for result in payload["results"]:
            if result["suite"] == "head" and result["num_tokens"] == TARGET_TOKENS[result["mode"]]:
                cells[result["model"], result["mode"]] = {**result, "file": payload["file"]}
    lines = [
        "| mode | GEMM passes | tokens | target | " + " | ".join(GPU_MODELS) + " |",
        "|---|---|---|---|" + "---|" * len(GPU_MODELS),
    ]
    for mode, passes in PASSES.items():
        measured = [_cell(cells.get((model, mode))) for model in GPU_MODELS]
        head = f"| `{mode}` | {passes} | {TARGET_TOKENS[mode]} | {TARGETS[mode]:.2f} x {passes} GEMM"
        lines.append(f"{head} | " + " | ".join(measured) + " |")
    files = sorted({cell["file"] for cell in cells.values()})
    source = ", ".join(f"`benchmarks/results/{name}`" for name in files)
    note = f"Measured: {source}." if files else "No GPU result has been recorded yet; `make gpu` makes one."
    return "\n".join([*lines, "", note])


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "*not run*"
    ours = {name: cell for name, cell in result["contenders"].items() if name != "gemm"}
    if not ours:
        return "failed: " + "; ".join(result["failed"].values())
    best = min(ours, key=lambda name: ours[name]["ratio_to_gemm"])
    peak = ours[best]["peak_mib"]
    memory = "" if peak is None else f", {peak / 1024:.2f} GiB"
    return f"{ours[best]['ratio_to_gemm']:.3f} ({best}, {ours[best]['median_ms']:.1f} ms{memory})"


def render(readme: str, results: list[dict[str, Any]]) -> str:
    """The README with its tables replaced.

    Raises:
        ValueError: a pair of markers is not there, once each and in order.
    """
    readme = _replace(readme, "losses", losses_table())
    return _replace(readme, "results", head_table(results))


def _replace(readme: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README.md: wanted {begin} and {end} once each, in this order")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table.rstrip()}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's tables from benchmarks/results.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    old = args.readme.read_text()
    new = render(old, read_results(args.results))
    if args.check:
        if new != old:
            print("README.md is not what benchmarks/results gives; run `make tables`", file=sys.stderr)
        return int(new != old)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
