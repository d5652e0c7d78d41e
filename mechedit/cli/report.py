"""`mechedit report`: one page from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.parsing import existing_folder
from mechedit.figures import run_figures
from mechedit.report import write_report


def report_command(
    directory: Annotated[Path, typer.Argument(help="a run folder")],
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Draw a folder's figures again and write report.html."""
    run_figures(existing_folder(directory))
    report = write_report(directory)
    say(f"the report is {report}")
    print_json(json_, {"report": str(report)})
    return 0
