"""`opencoca report`: draws the curves, scores and captions of training runs as a page."""

import argparse
from typing import Any

from opencoca.cli.common import add_command, add_overwrite, check_new


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        "Draw curves, scores and captions of a training run, or compare several runs.",
        example="opencoca report runs/flickr8k\n  opencoca report runs/first runs/second --out comparison.html",
        more="For one run, report.html and report.png are written into its folder; the run may still be training. For\n"
        "several runs, one page shows their curves together, their captions of the same photographs, and where\n"
        "their recipes differ. The page contains its pictures and needs no other file.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--out",
        "--output",
        metavar="FILE",
        help="page to write (default: report.html in the run's folder, or in the current folder for several runs)",
    )
    add_overwrite(parser)


def run_report(arguments: argparse.Namespace) -> int:
    from opencoca.train.report.report import report_runs

    out = arguments.out or ("report.html" if len(arguments.runs) > 1 else None)  # a run's own page is made anew
    check_new(arguments, out)
    for path in report_runs(arguments.runs, out):
        print(path)
    return 0
