"""Count the facts that the pretrained models know: greedy decoding after the prompt writes exactly the object.

    python -m analyses.real_models.known [smollm2] [gemma3] [--facts known_1000] [--requests counterfact] [--count N]

Reads the known facts of ROME and CounterFact's requests, by name or from files. Prints one row per model and set; with
`--count` for a seeded sample of the requests, with Wilson's 95 % interval.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

import mechedit as me
from analyses.common.command import run_script
from analyses.real_models.make import REAL_MODELS, make
from mechedit.data import Fact, load_facts, load_requests
from mechedit.statistics import wilson_interval
from mechedit.trace.traced_fact import known_facts

FACTS, REQUESTS = "known facts", "CounterFact"
BATCH = 1000
"""Facts per step of the progress bar; those of equal length are run together."""


def facts_of(requests: Sequence[me.EditRequest]) -> list[Fact]:
    """What requests say before they are edited: their true objects after their prompts."""
    return [
        Fact(id=str(index), subject=request.subject, prompt=request.prompt, object=request.target_true)
        for index, request in enumerate(requests)
        if request.target_true
    ]


def count_known(model: me.Model, facts: Sequence[Fact]) -> int:
    """How many of the facts the model completes greedily with their object."""
    batches = [facts[start : start + BATCH] for start in range(0, len(facts), BATCH)]
    return sum(len(known_facts(model, batch)[0]) for batch in tqdm(batches, desc="facts", unit_scale=BATCH))


def rows(options: argparse.Namespace) -> Iterator[str]:
    """The table's rows, as each is counted."""
    sets = {
        FACTS: load_facts(options.facts),
        REQUESTS: facts_of(load_requests(options.requests, conflicts="first")),
    }
    for name in options.models or REAL_MODELS:
        model = me.load_model(make(name), device=options.device)
        for title, facts in sets.items():
            start = time.monotonic()
            total = len(facts)
            if title == REQUESTS and options.count is not None and options.count < total:
                facts = random.Random(options.seed).sample(facts, options.count)
            known = count_known(model, facts)
            low, high = wilson_interval(known / len(facts), len(facts))
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if len(facts) < total else ""
            size = f"{len(facts):,}" + (f" of {total:,}" if len(facts) < total else "")
            percent = f"{100 * known / len(facts):.1f} %{interval}"
            yield f"| {name} | {title} | {size} | {known:,} | {percent} | {(time.monotonic() - start) / 60:.1f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help="by default all")
    parser.add_argument("--facts", default="known_1000", help="known_1000, or a file of facts")
    parser.add_argument("--requests", default="counterfact", help="counterfact, or a file of requests")
    parser.add_argument("--count", type=int, help="of the requests, a seeded sample of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    print("| model | facts | asked | known | share | minutes |\n|---|---|---|---|---|---|")
    for row in rows(parser.parse_args()):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
