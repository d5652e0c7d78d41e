"""Time every step on every shape against the published schedules, and say which goals are reached.

    python -m benchmarks [--shape tiny gpt2 ...] [--json PATH]

All steps of `benchmarks.edit` and `benchmarks.trace`; about nine minutes for SmolLM2 on two cores. With `--json
benchmarks/results.json` the results take their places in the file from which `python -m benchmarks.page` writes the
documentation's page.
"""

from __future__ import annotations

import argparse
from itertools import chain

from benchmarks.command import add_arguments, print_all
from benchmarks.edit import edit_measurements
from benchmarks.trace import trace_measurements


def main() -> None:
    """Everything on shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    print_all(
        parser.parse_args(),
        lambda timed_model: chain(edit_measurements(timed_model), trace_measurements(timed_model)),
    )


if __name__ == "__main__":
    main()
