"""Records into the README's and the docs' tables, and into the charts of docs/images.

python bench/report.py [--check] [--redraw]

The newest record of a GPU in bench/results, with the sections of it that bench/gpu.py --only ran apart, and the CPU
suites' record.
"""

import argparse
import sys
from pathlib import Path

from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.reporting import records, suite_tables  # noqa: E402  (found through the line above)
from bench.reporting.profile_tables import totals as totals  # noqa: E402
from bench.reporting.records import newest as newest  # noqa: E402
from bench.reporting.rows import Row as Row  # noqa: E402
from bench.reporting.rows import failures as failures  # noqa: E402
from bench.reporting.rows import rows as rows  # noqa: E402
from bench.reporting.tables import DRY as DRY  # noqa: E402
from bench.reporting.tables import NO_RECORD as NO_RECORD  # noqa: E402
from bench.reporting.tables import gpu_table  # noqa: E402
from bench.reporting.tables import markdown as markdown  # noqa: E402

OPEN, CLOSE = "<!-- gpu-table -->", "<!-- /gpu-table -->"
SHORT, FULL = "suites-table", "suites-full"


def between(text: str, opening: str, closing: str, content: str, where: str = "the README") -> str:
    """The text with that content between two markers; ValueError where they are missing."""
    before, opened, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not opened or not closed:
        raise ValueError(f"expected {opening} and {closing} in {where}")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def rendered(readme: str, results: Path) -> str:
    """The README with its tables made anew; ValueError where the markers are missing."""
    return _suites(between(readme, OPEN, CLOSE, gpu_table(results)), SHORT, results)


def rendered_docs(page: str, results: Path) -> str:
    """docs/measured.md with its table of every case made anew."""
    return _suites(page, FULL, results)


def _suites(text: str, marker: str, results: Path) -> str:
    """Without a record the markers may be missing too."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    found = records.suites(results)
    if found is None and opening not in text:
        return text
    table = {SHORT: suite_tables.short, FULL: suite_tables.full}[marker]
    content = suite_tables.NO_RECORD if found is None else table(found[1])
    return between(text, opening, closing, content, {SHORT: "the README", FULL: "docs/measured.md"}[marker])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where texts or charts differ")
    parser.add_argument("--redraw", action="store_true", help="draw every chart, as after a change of how they look")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="beside it stands docs/")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    args = parser.parse_args(argv)
    from bench.reporting import pictures  # and with it torch, which bench/gpu.py leaves to its workers

    docs = args.readme.parent / "docs"
    images = docs / "images"
    try:
        stale = _stale(args.readme, docs / "measured.md", args.results)
        charts = pictures.of_records(args.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    old = [chart for chart in charts if not chart.current(images)]
    if not args.check:
        for path, text in stale.items():
            path.write_text(text)
        for chart in track(charts if args.redraw else old, "charts", transient=True):
            chart.write(images)
        stale, old = {}, []
    for path in (*stale, *(images / chart.name for chart in old)):
        print(f"{path} differs from the records: run python bench/report.py", file=sys.stderr)
    left = sorted({*images.glob("[cg]pu-*.png")} - {images / chart.name for chart in charts})
    for path in left:
        print(f"{path} is of no record: remove it", file=sys.stderr)
    return 1 if stale or old or left else 0


def _stale(readme: Path, page: Path, results: Path) -> dict[Path, str]:
    """The new text of each that changes; without a record the docs' page may be missing."""
    new = {readme: rendered(readme.read_text(), results)}
    if page.exists() or records.suites(results):
        new[page] = rendered_docs(page.read_text(), results)
    return {path: text for path, text in new.items() if text != path.read_text()}


if __name__ == "__main__":
    sys.exit(main())
