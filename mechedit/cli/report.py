"""`mechedit report`: one page from a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mechedit.cli.app import say
from mechedit.cli.command import POSITIONAL, command
from mechedit.cli.options import VerifyOption
from mechedit.cli.parsing import existing_folder
from mechedit.figures import run_figures
from mechedit.report import write_report


@dataclass(frozen=True, kw_only=True)
class ReportOptions(VerifyOption):
    """The folder."""

    directory: Annotated[Path, POSITIONAL]
    """A run folder."""


@command()
def report_command(options: ReportOptions) -> int:
    """Draw a folder's figures again and write report.html."""
    report = write_report(existing_folder(options.directory), draw=run_figures)
    say(f"the report is {report}")
    options.print_summary({"report": str(report)})
    return 0
