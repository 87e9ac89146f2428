"""README's tables and ``docs/benchmarks.md``, generated from ``benchmarks/results`` and the losses' registry.

python -m benchmarks.tables          # rewrites README.md between its markers, docs/benchmarks.md and plots
python -m benchmarks.tables --check  # fails when they are not what the results give
python -m benchmarks.tables --results DIR --page DIR  # the page and its plots alone, of other results

Results of two devices never share a table; what no GPU has measured says *not run*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.head_tables import Result, head_table, peer_targets_table, steps_table
from benchmarks.padding import padding_tables
from benchmarks.page import document, plots_of
from benchmarks.plots import check_plots, write_plots
from benchmarks.results import RESULTS, ROOT, newest, read_results
from fastdpo.losses import losses_table


def render(readme: str, results: Sequence[Result]) -> str:
    """The README with its tables replaced.

    Raises:
        ValueError: a pair of markers is not there, once each and in order.
    """
    readme = _replace(readme, "losses", losses_table())
    readme = _replace(readme, "results", head_table(results))
    readme = _replace(readme, "peers", f"{peer_targets_table(results)}\n\n{padding_tables(results)}")
    readme = _replace(readme, "steps", steps_table(results))
    return _replace(readme, "plots", plots_of(results))


def _replace(readme: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README.md: wanted {begin} and {end} once each, in this order")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table.rstrip()}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables and plots of benchmarks/results.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmarks.md and plots/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, metavar="DIR", help="benchmarks.md and plots/ there, no README")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
        old = new = ""
        if args.page is None:
            old = args.readme.read_text()
            new = render(old, results)
        page, folder = document(results), args.page or args.docs
        if args.page is not None:
            page = page.replace("benchmarks/results", str(args.results))
        path, plots = folder / "benchmarks.md", folder / "plots"
        devices = {**newest(results, of_gpu=True), **newest(results, of_gpu=False)}
        cases = {device: list(found.values()) for device, found in devices.items()}
        if not args.check:
            if new != old:
                args.readme.write_text(new)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
            write_plots(cases, plots)
            return 0
        stale = [args.readme.name] if new != old else []
        if not path.is_file() or path.read_text() != page:
            stale.append(path.name)
        stale += check_plots(cases, plots)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stale:
        print(f"{', '.join(stale)}: not what benchmarks/results gives; run `make tables`", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
