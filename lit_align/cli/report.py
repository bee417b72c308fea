"""`lit-align report`: runs as one HTML file."""

from pathlib import Path

from lit_align.cli.argument_parser import Words

ABOUT = "Writes one HTML file about runs: curves, frontier, memory, completions, configs."


def main(args: list[str]) -> int:
    """Parses the words behind `report` and writes the page."""
    words = Words(prog="lit-align report", description=ABOUT)
    words.add_argument("runs", nargs="+", metavar="RUN", help="Folder that `lit-align fit` wrote.")
    words.add_argument("--out", type=Path, default=Path("report.html"), help="The file to write.")
    given = words.parse_args(args)
    from lit_align.report.build import write_report

    out = write_report(given.runs, given.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): open it in any browser")
    return 0
