"""`lit-align report`: runs as one HTML file."""

from pathlib import Path

from lit_align.cli.argument_parser import ArgumentParser

ABOUT = "Write one HTML file about runs: curves, frontier, memory, completions, configs."


def main(argv: list[str]) -> int:
    """Parse the words after `report` and write the page.

    Args:
        argv: The words after `report`.
    """
    parser = ArgumentParser(prog="lit-align report", description=ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folder that `fit` wrote.")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="File to write.")
    options = parser.parse_args(argv)
    from lit_align.report.build import write_report

    out = write_report(options.runs, options.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB). Open it in a browser.")
    return 0
