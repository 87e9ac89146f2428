"""The tables of README and docs, and ``docs/benchmarks.md``, from what was measured and the losses.

python -m benchmarks.tables          # rewrites README and docs between their markers, benchmarks.md, plots
python -m benchmarks.tables --check  # fails when they are not what the results give
python -m benchmarks.tables --results DIR --page DIR  # the page and its plots alone, of other results

Results of two devices never share a table; what no GPU has measured says *not run*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.drawings import check_drawings, memory_table, write_drawings
from benchmarks.head_tables import Result, head_table, peer_targets_table, steps_table
from benchmarks.padding import padding_tables
from benchmarks.page import document, plots_of
from benchmarks.plots import check_plots, write_plots
from benchmarks.results import RESULTS, ROOT, newest, read_results
from fastdpo.losses import losses_table


def tables_of(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """What stands between which markers of which page; pages other than README.md are those of ``docs/``."""
    return {
        "README.md": {"memory": memory_table()},
        "losses.md": {"losses": losses_table()},
        "measured.md": {
            "memory": memory_table(),
            "results": head_table(results),
            "peers": f"{peer_targets_table(results)}\n\n{padding_tables(results)}",
            "steps": steps_table(results),
            "plots": plots_of(results),
        },
    }


def render(name: str, page: str, results: Sequence[Result]) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: a pair of markers is not there, once each and in order.
    """
    for table, text in tables_of(results)[name].items():
        begin, end = f"<!-- {table}:begin -->", f"<!-- {table}:end -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"{name}: wanted {begin} and {end} once each, in this order")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text.rstrip()}\n{end}{rest.split(end)[1]}"
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables and plots of benchmarks/results.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, metavar="DIR", help="benchmarks.md and plots/ there alone")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
        places = {
            name: args.readme if name == "README.md" else args.docs / name for name in tables_of(results)
        }
        old = {} if args.page else {name: path.read_text() for name, path in places.items()}
        new = {name: render(name, text, results) for name, text in old.items()}
        page, folder = document(results), args.page or args.docs
        if args.page is not None:
            page = page.replace("benchmarks/results", str(args.results))
        path, plots = folder / "benchmarks.md", folder / "plots"
        devices = {**newest(results, of_gpu=True), **newest(results, of_gpu=False)}
        cases = {device: list(found.values()) for device, found in devices.items()}
        if not args.check:
            for name in new:
                if new[name] != old[name]:
                    places[name].write_text(new[name])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
            write_plots(cases, plots)
            if args.page is None:
                write_drawings(folder / "drawings")
            return 0
        stale = [name for name in new if new[name] != old[name]]
        if args.page is None:
            stale += check_drawings(folder / "drawings")
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
