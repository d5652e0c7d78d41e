"""The command line that the scripts of the papers' tables and figures share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analyses.common.experiment import Experiment
from mechedit.cli.app import GOES_ON, end_bars
from mechedit.errors import InputError, is_interrupt


def options(
    doc: str | None, *, count: int | None = None, quick_count: int | None = 10, max_facts: int = 200
) -> argparse.ArgumentParser:
    """The options that all scripts share; a script adds its own and calls `open_experiment`.

    Args:
        doc: the script's docstring; its first line is the help text.
        count: requests used unless `--count` says otherwise; None for all.
        quick_count: the same with `--quick`; None where the script takes its own few.
        max_facts: facts traced unless `--max-facts` says otherwise.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, a hub name or a folder")
    parser.add_argument("--requests", default="known", help="a file of edit requests; known makes them from facts")
    parser.add_argument("--count", type=int, help=f"of the requests, the first so many (default {count or 'all'})")
    parser.add_argument("--facts", default="known", help="facts to trace where no layers are given")
    sampling = f"trace a seeded sample of so many (default {max_facts})"
    parser.add_argument("--max-facts", type=int, default=max_facts, help=sampling)
    parser.add_argument("--samples", type=int, default=10, help="noise samples per fact (default 10)")
    parser.add_argument("--texts", default="tiny", help="running text for second moments")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of it (default 2,000,000; 0 for all)")
    parser.add_argument("--documents", type=int, help="of the text, drawn at random (the papers: 100000, --tokens 0)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens per document (default 1024; GPT-J: 2048)")
    parser.add_argument("--layers", help="such as 3-8; by default what was tuned, else what the trace selects")
    parser.add_argument("--out", type=Path, default=Path("papers"), help="folder, the same for all scripts if you like")
    parser.add_argument(
        "--quick", action="store_true", help=f"a first look: {quick_count or 'few'} requests, a smaller trace"
    )
    parser.add_argument(
        "--likelihood", default="normalized", choices=["normalized", "joint"],
        help="P of an object of several tokens: the geometric mean, as the published tables have it, or the product",
    )  # fmt: skip
    parser.add_argument("--backend", default="transformer_lens")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights in pickle, as those of GPT-J are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tuned", action="store_true", help="leave settings out that mechedit tune chose")
    parser.add_argument("--overwrite", action="store_true", help="replace results of other inputs in the folder")
    parser.set_defaults(full_count=count, quick_count=quick_count)
    return parser


def open_experiment(name: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Experiment:
    """Read the command line and open the experiment.

    Raises:
        InputError: as `Inputs.check`.
    """
    parsed = parser.parse_args(arguments)
    if parsed.count is None:
        parsed.count = parsed.quick_count if parsed.quick else parsed.full_count
    experiment = Experiment(name=name, arguments=parsed)
    experiment.check()
    return experiment


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script: its exit code; or one line, and 2 on bad input, 130 where it was interrupted."""
    try:
        code = main() or 0
    except (Exception, KeyboardInterrupt) as error:
        if not is_interrupt(error) and not isinstance(error, InputError):
            raise
        code, line = (130, GOES_ON) if is_interrupt(error) else (2, str(error))
        end_bars()
        print(f"{Path(sys.argv[0]).stem}: {line}\n", end="", file=sys.stderr)
    sys.exit(code)
