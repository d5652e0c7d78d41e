"""An `EditSession`: batches of edits one after another, each made on the model as the earlier ones left it.

Batch n is solved with the keys of all earlier ones beside the moments, C = λ E[k kᵀ] + Σ_{m<n} K_m K_mᵀ (MEMIT Eq. 14
with C₀ grown by what was written), so that it leaves their values alone. After it, all requests so far are judged
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest, check_requests, conflicts, unique_ids
from mechedit.edit import Edit, apply_, restoring, transaction, undo_
from mechedit.edit.weights import uninterrupted
from mechedit.errors import InputError, check_choice
from mechedit.evaluation import QUICK, EvaluationConfig
from mechedit.methods import MethodConfig, check_layers, moment_matrices
from mechedit.models import Model
from mechedit.moments import SecondMoment
from mechedit.prompts import check_prefixes
from mechedit.session.folder import Folder
from mechedit.session.metrics import HISTORY_COLUMNS, SCORE_COLUMNS, Judged, Measure, frame, means, update_norms
from mechedit.session.plan import Plan, check_rule, check_settings
from mechedit.session.record import Record, hash_of, in_force, kept_keys
from mechedit.session.stop_rule import StopRule


class EditSession:
    """Batches of edits written one after another, within a `with` block that ends with the model as it was.

    Inside the block the model is the unedited one with `edit` applied, bit for bit: its weights are the unedited ones
    plus the sum of all ΔW so far, rounded once. A `write` that fails or is interrupted leaves it as it was before.

        with EditSession(model, layers, moments, texts=held_out, folder="run") as session:
            for batch in batches:
                session.write(batch)
                if session.stopped:
                    break
        session.history
        apply_(model, session.edit)

    Killed at any moment, the same script goes on after the last finished batch, with the same results.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[int],
        moments: Mapping[int, SecondMoment | Tensor],
        method: str = "memit",
        config: MethodConfig | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        folder: str | Path | None = None,
        rule: StopRule | None = None,
        accumulate: bool = True,
        judged: Judged = "rewrite",
        evaluation: EvaluationConfig = QUICK,
    ) -> None:
        """Check everything, and measure the unedited model; nothing is changed.

        Args:
            model: unedited.
            layers: the critical range, 0-based, ascending; the same for all batches.
            moments: for each layer E[k kᵀ] of the unedited model over running text.
            method: one of `METHODS`.
            config: its settings; by default those that ship with the model.
            prefixes: templates with one {} for the whole prompt, for all batches; by default the method's own, on the
                unedited model (`MethodConfig.default_prefixes`).
            texts: held-out documents for the perplexity; without them it is not watched.
            folder: where finished batches are kept. When it holds some of the same session they are taken over.
            rule: when to stop; by default `StopRule()`.
            accumulate: whether later batches preserve the keys of earlier ones. Without it forgetting is faster.
            judged: requests are judged by the rewritten prompt alone, or by `all` their prompts.
            evaluation: how they are judged; by default without free text.

        Raises:
            InputError: an unknown method, or settings of another; layers or moments that do not fit the model; a rule
                about perplexity without texts; a folder of another session (names the field that differs).
        """
        check_choice("judged", judged, ("rewrite", "all"))
        config = check_settings(config, method, model)
        layers = check_layers(layers, model)
        self._folder = Folder(path=None if folder is None else Path(folder))
        found = self._folder.found()
        known = None if found is None else found[0].get("prefixes")
        self._plan = Plan(
            model=model,
            layers=layers,
            moments=moment_matrices(moments, config.edited_layers(layers) if config.preserves_keys else [], model),
            method=method,
            config=config,
            prefixes=check_prefixes(prefixes or known or config.default_prefixes(model)),
            texts=texts,
            rule=check_rule(rule, texts),
            accumulate=accumulate,
            judged=judged,
            evaluation=evaluation,
            base=model.provenance(),
        )
        if found is None:
            self._unedited = tuple(self._plan.measure())
            self._folder.start(self._plan.made_with, self._unedited)
        else:
            self._folder.check(found[0], self._plan.made_with)
            self._unedited = found[1]
        self._records = self._folder.records(self._plan.base["weights_hash"])
        self._given = 0
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> EditSession:
        """Put all that was written so far on the model.

        Raises:
            InputError: the session is open already; the model is not the unedited one, or does not become what it was
                when the last batch was written.
        """
        if self._open is not None:
            raise InputError("the session is open already, expected one `with` block at a time; leave the other first")
        with contextlib.ExitStack() as stack:
            self._plan.check_weights(self._plan.base["weights_hash"])
            stack.enter_context(restoring(self._plan.model, self._plan.layers))
            if self._standing:
                apply_(self._plan.model, self.edit)
            self._plan.check_weights(self._expected)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *reason: object) -> None:
        """Put the model back, bit for bit."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    @property
    def records(self) -> tuple[Record, ...]:
        """The batches so far, a refused one included."""
        return self._records

    @property
    def stopped(self) -> str | None:
        """Why no more batches are taken; None while they are."""
        return self._records[-1].refused if self._records else None

    @property
    def history(self) -> pd.DataFrame:
        """What came of every batch, one row a number: `HISTORY_COLUMNS`.

        `batch` is 0 for the unedited model; `requests` are those in force. Measures: `ES`, `exact_match` … in percent,
        with the scope `batch`, `earlier` (batches) or `all`; `perplexity` of the texts and each layer's `weight_norm`
        ‖W‖, with the scope `model`; `update_norm` ‖ΔW‖ by layer, of this `batch` and of `all`; `seconds`. The rows of a
        batch that was taken back are marked `refused`: they tell of the model that it would have left.
        """
        parts = [frame(0, 0, self._unedited), *(record.history for record in self._records)]
        return pd.concat(parts, ignore_index=True).loc[:, list(HISTORY_COLUMNS)]

    @property
    def scores(self) -> pd.DataFrame:
        """Every request after every batch: `batch, case, measure, value`, in percent."""
        parts = [record.scores.assign(batch=record.number) for record in self._records]
        columns = ["batch", *SCORE_COLUMNS]
        return pd.concat(parts, ignore_index=True).loc[:, columns] if parts else pd.DataFrame(columns=columns)

    @property
    def requests(self) -> list[EditRequest]:
        """What the model should say by now: all that was written and not superseded."""
        return in_force(self._standing)

    @property
    def keys(self) -> dict[int, Float[Tensor, "d_mlp fact"]]:
        """The keys of `requests`, in their order, for each edited layer; empty before the first batch."""
        return kept_keys(self._standing)

    @property
    def edit(self) -> Edit:
        """All batches that stand as one edit of the unedited model.

        Raises:
            InputError: there are none.
        """
        return self._plan.together(self._standing)

    def write(self, requests: Sequence[EditRequest], *, overwrite: bool = False) -> Record:
        """Write one batch on top of those before it, and judge all so far; a batch against the rule is taken back.

        In a session that was taken over from a folder, batches are to be given again in the same order: those that
        are finished are known by their hash, and their records returned at once.

        Args:
            requests: ids must differ from those of all earlier batches.
            overwrite: whether requests may contradict earlier ones. The earlier are superseded: no longer judged, and
                their keys no longer preserved.

        Raises:
            InputError: the session is not open, or has stopped; another batch than the finished one in its place;
                requests that conflict with each other or, without `overwrite`, with earlier ones; weights changed by
                others; and what the method refuses. Without texts, also a model whose logits are no longer finite.
        """
        if self._open is None:
            raise InputError("the session is not open, expected a `with` block around every write; put it in one")
        batch = tuple(requests)
        if self._given < len(self._records):
            return self._again(batch)
        if self.stopped:
            raise InputError(
                f"the session stopped at batch {len(self._records)} and took it back: {self.stopped}. Expected no more "
                f"batches; start another session, with milder settings or another rule"
            )
        superseded = self._superseded(batch, overwrite)
        self._plan.check_weights(self._expected)
        record = self._tried(batch, superseded)
        self._keep_(record)
        return record

    @property
    def _standing(self) -> list[Record]:
        return [record for record in self._records if record.refused is None]

    @property
    def _expected(self) -> str:
        """The hash of the weights as the session left them."""
        return self._standing[-1].weights_hash if self._standing else self._plan.base["weights_hash"]

    def _again(self, batch: tuple[EditRequest, ...]) -> Record:
        """The record of a batch that is finished already."""
        record = self._records[self._given]
        if record.asked != hash_of(batch):
            raise InputError(
                f"batch {record.number} is finished and holds {len(record.requests)} requests from "
                f"{record.requests[0].id!r} on, found {len(batch)} others in its place; give the same batches in the "
                f"same order (their requests are in `records`), or choose another folder"
            )
        self._given += 1
        return record

    def _superseded(self, batch: tuple[EditRequest, ...], overwrite: bool) -> tuple[str, ...]:
        """Ids of requests in force that the batch contradicts, once the batch is found to be in order."""
        check_requests(batch)
        written = [request.id for record in self._records for request in record.requests]
        unique_ids([*written, *(request.id for request in batch)], "requests of the session")
        found = {old.id: new.id for new, old, _ in conflicts([*batch, *self.requests])}
        if found and not overwrite:
            old, new = next(iter(found.items()))
            raise InputError(
                f"{len(found)} earlier requests are contradicted, {old!r} by {new!r} for one; expected one object for "
                f"each subject and relation: drop them, or pass overwrite=True to let the later ones stand"
            )
        return tuple(found)

    def _tried(self, batch: tuple[EditRequest, ...], superseded: tuple[str, ...]) -> Record:
        """Make the batch's edit and measure the model with it; the model is left as it was."""
        start = time.perf_counter()
        previous = kept_keys(self._standing, superseded) if self._plan.accumulate else {}
        edit, keys = self._plan.make(batch, previous, self._folder.targets)
        record = Record(number=len(self._records) + 1, requests=batch, edit=edit, keys=keys, superseded=superseded)
        with restoring(self._plan.model, self._plan.layers):
            self._move_([*self._standing, record])
            return self._measured(record, start)

    def _measured(self, record: Record, start: float) -> Record:
        """The record with all that is measured of the model as it is now."""
        standing = [*self._standing, record]
        requests, measures = in_force(standing), self._plan.measure()
        scores = record.scores
        # A model whose text has no finite likelihood is not asked for facts.
        if all(one.value is not None for one in measures):
            scores = self._plan.judge(requests)
            measures += means(scores, {request.id for request in record.requests})
        measures += update_norms(record.edit, "batch") + update_norms(self._plan.together(standing), "all")
        measures.append(Measure("seconds", "batch", time.perf_counter() - start))
        return dataclasses.replace(
            record,
            scores=scores,
            measures=tuple(measures),
            in_force=len(requests),
            refused=self._plan.rule.reason(measures, self._unedited),
            weights_hash=self._plan.model.weights_hash(),
        )

    def _keep_(self, record: Record) -> None:
        """Take the batch on: its file, the model and the session change together, or not at all."""
        with uninterrupted(), transaction(self._plan.model, self._plan.layers):
            if record.refused is None:
                self._move_([*self._standing, record])
            self._folder.keep(record)
            self._records = (*self._records, record)
            self._given += 1
        if self._folder.targets is not None:
            shutil.rmtree(self._folder.targets, ignore_errors=True)

    def _move_(self, records: Sequence[Record]) -> None:
        """Go from the weights of the batches that stand to those of `records`."""
        if self._standing:
            undo_(self._plan.model, self.edit)
        apply_(self._plan.model, self._plan.together(records))
