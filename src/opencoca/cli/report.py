"""`opencoca report`: what runs have learned, as a page."""

import argparse
from typing import Any

from opencoca.cli.common import add_command, check_writable


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        "Draw curves, scores and captions of a training run, or compare several, at any time.",
        example="opencoca report runs/flickr8k\n  opencoca report runs/first runs/second --output comparison.html",
        more="The page holds its pictures and needs nothing else. Of one run, report.html and report.png are written\n"
        "into its folder; a run that still goes on may be looked at. Of several runs one page shows their curves\n"
        "together, their captions of the same photographs, and what their recipes differ in.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of an `opencoca train`")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: report.html, in the run's folder, or here if there are several runs)",
    )


def run_report(arguments: argparse.Namespace) -> int:
    from opencoca.train.report.report import report_runs

    check_writable(arguments.output)
    for path in report_runs(arguments.runs, arguments.output):
        print(path)
    return 0
