"""mechedit COMMAND: arguments in, calls of the pipeline, files out.

Exit 0 on success, 2 with one line on bad input, 3 when no layer range is found, 130 when interrupted.
"""

from mechedit.cli.app import app, main
from mechedit.cli.apply import apply_command
from mechedit.cli.edit import edit_command
from mechedit.cli.evaluate import evaluate_command
from mechedit.cli.moments import moments_command
from mechedit.cli.parsing import method_config, parse_layers, parse_names, parse_windows
from mechedit.cli.plan import plan_command
from mechedit.cli.report import report_command
from mechedit.cli.run import run_command
from mechedit.cli.select import select_command
from mechedit.cli.trace import trace_command
from mechedit.cli.train_mend import train_mend_command
from mechedit.cli.tune import tune_command

__all__ = ["main", "method_config", "parse_layers", "parse_names", "parse_windows"]

for _name, _command in (
    ("run", run_command),
    ("trace", trace_command),
    ("select", select_command),
    ("moments", moments_command),
    ("tune", tune_command),
    ("plan", plan_command),
    ("train-mend", train_mend_command),
    ("edit", edit_command),
    ("evaluate", evaluate_command),
    ("apply", apply_command),
    ("report", report_command),
):
    app.command(_name)(_command)
