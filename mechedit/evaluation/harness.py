"""General ability by the benchmarks of lm-evaluation-harness: what an edit costs beyond the facts it changes.

`pip install mechedit[harness]` installs the harness; nothing else needs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.errors import InputError, brief, first_line
from mechedit.models import Model, exclusive, transformers_model

COLUMNS = ("task", "metric", "value", "stderr", "n")


@exclusive
def general_ability(
    model: Model,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    shots: int | None = None,
    folder: str | Path | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Run benchmarks on the model as it is now, in place: within `edited(...)`, on its edited self.

    Args:
        model: loaded by either backend; the harness sees its transformers model.
        tasks: names that the harness knows, such as `lambada_openai` or `hellaswag` (their data come from the
            hub), or a task's whole configuration, in which data may be local.
        limit: number of examples per task; None takes all.
        shots: examples before each question; None leaves it to the task.
        folder: folder of your own task files.
        batch_size: rows per forward pass.
        seed: seed of every random draw of the harness.

    Returns:
        One row per task and metric: `task, metric, value, stderr` (NaN where the harness has none), and `n`, the
        examples evaluated. A metric after a filter is called `metric,filter`.

    Raises:
        InputError: the harness is not installed, no tasks are named, or it knows no such task.
    """
    if not tasks:
        raise InputError("no tasks are named, expected names such as 'lambada_openai': name one")
    simple_evaluate, language_model, task_manager = _harness()
    names = [task for task in tasks if isinstance(task, str)]
    # Reading the harness's own task files takes seconds.
    manager = task_manager(include_path=None if folder is None else str(folder), include_defaults=bool(names))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise InputError(
            f"the harness knows no task {brief(unknown[0])}, expected a name that `lm_eval ls tasks` prints, or one "
            f"of a "
            f"task file in `folder`: check the name"
        )
    # The harness gives a tokenizer without padding token one of its own, so it gets a copy.
    tokenizer = copy.deepcopy(model.tokenizer)
    wrapped = language_model(
        pretrained=transformers_model(model), tokenizer=tokenizer, batch_size=batch_size, max_length=model.max_positions
    )
    results = simple_evaluate(
        model=wrapped,
        tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None, "only processes other than the first get none"
    return _tidy(results)


def _tidy(results: Mapping[str, Any]) -> pd.DataFrame:
    """The harness's nested results as rows: `metric,filter` holds a value, `metric_stderr,filter` its error."""
    rows = []
    for task, values in results["results"].items():
        n = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, applied_filter = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, str) or not applied_filter:
                continue
            error = values.get(f"{metric}_stderr,{applied_filter}")
            stderr = float(error) if isinstance(error, int | float) else math.nan
            name = metric if applied_filter == "none" else f"{metric},{applied_filter}"
            rows.append((task, name, float(value), stderr, int(n)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _harness() -> tuple[Any, Any, Any]:
    """`simple_evaluate`, the wrapper of transformers models and the task manager, imported only when used."""
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness cannot be imported ({first_line(error)}); it is an extra: "
            f"pip install mechedit[harness]"
        ) from error
    return simple_evaluate, HFLM, TaskManager
