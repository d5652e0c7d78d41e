"""`EditSession`: batches of edits one after another, each made on the model as the earlier ones left it.

Batch n is solved with the keys of all earlier batches beside the moments, C = λ E[k kᵀ] + Σ_{m<n} K_m K_mᵀ (MEMIT
Eq. 14 with C₀ grown by what was written), so that it leaves their values unchanged. After each batch, all requests so
far are scored again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest, check_requests, check_unique_ids, conflicts, records_of
from mechedit.edit import Edit, apply_, restoring, transaction, undo_
from mechedit.errors import InputError, brief, check_choice
from mechedit.evaluation import QUICK, EvaluationConfig
from mechedit.interrupts import uninterrupted
from mechedit.methods import MethodConfig, check_layers, moment_matrices
from mechedit.models import Model, exclusive
from mechedit.moments import SecondMoment
from mechedit.prefixes import check_prefixes
from mechedit.prompt_tokens import one_spelling
from mechedit.session.batch_editor import BatchEditor, check_rule, check_settings
from mechedit.session.edited_batch import EditedBatch, active_keys, active_requests, requests_hash
from mechedit.session.metrics import (
    HISTORY_COLUMNS,
    SCORE_COLUMNS,
    HistoryEntry,
    ScoredPrompts,
    history_frame,
    mean_scores,
    update_norms,
)
from mechedit.session.session_folder import SessionFolder
from mechedit.session.stop_rule import StopRule


class EditSession:
    """Batches of edits written one after another, within a `with` block that restores the model at its end.

    Inside the block the model is the unedited one with `edit` applied, bit for bit: its weights are the unedited ones
    plus the sum of all ΔW so far, rounded once. A `write` that fails or is interrupted leaves it as it was before.

    Example:
        >>> with EditSession(model, layers, moments, texts=held_out, folder="run") as session:
        ...     for batch in batches:
        ...         session.write(batch)
        ...         if session.stopped:
        ...             break
        >>> session.history
        >>> apply_(model, session.edit)

    Killed at any moment, the same script goes on after the last finished batch, with the same results. A session is in
    one of four states; the model holds the accepted batches while it is open, and none of them while it is closed:

    ========= =============================================== =========================================================
    State     Begins                                          `write(batch)`
    ========= =============================================== =========================================================
    closed    when created, and on leaving `with`             raises InputError
    replaying on entering `with`, if its folder holds         returns the finished batch, if its requests are the same
              finished batches that were not given again yet
    writing   once all finished batches were given again      makes and measures the edit, and accepts or rejects it
    stopped   when a batch is rejected                        raises InputError
    ========= =============================================== =========================================================

    A batch is *accepted* (its edit stays, and counts in `edit`, `keys` and `requests`) or *rejected* by the rule (it is
    taken back, and no more batches follow). A request of an accepted batch is *active* (scored after every batch, its
    key preserved) until a later request *overrides* it with another object.
    """

    @exclusive
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
        scored_prompts: ScoredPrompts = "rewrite",
        evaluation: EvaluationConfig = QUICK,
    ) -> None:
        """Check all arguments, and measure the unedited model; nothing is changed.

        Args:
            model: the unedited model.
            layers: the critical range, 0-based, ascending; the same for all batches.
            moments: for each layer E[k kᵀ] of the unedited model over running text.
            method: one of `METHODS`.
            config: settings of the method; by default the recommended ones for the model, tuned ones among them
                (`settings_from`).
            prefixes: context templates with one {} for the whole prompt, for all batches; by default the method's own,
                generated by the unedited model (`MethodConfig.default_prefixes`).
            texts: held-out documents for the perplexity; without them it is not measured.
            folder: where finished batches are saved; a session with the same settings in it is resumed.
            rule: when to stop; by default `StopRule()`.
            accumulate: whether later batches preserve the keys of earlier ones. Without it forgetting is faster.
            scored_prompts: prompts that requests are scored by: `rewrite` for that of the request alone, or `all`.
            evaluation: how requests are scored; by default without generated text.

        Raises:
            InputError: an unknown method, or settings of another; layers or moments that do not fit the model; a rule
                about perplexity without texts; a folder of another session (names the field that differs).
        """
        check_choice("scored_prompts", scored_prompts, ("rewrite", "all"))
        config, settings_from = check_settings(config, method, model)
        layers = check_layers(layers, model)
        self._folder = SessionFolder(path=None if folder is None else Path(folder))
        saved = self._folder.load_settings()
        saved_prefixes = None if saved is None else saved[0].get("prefixes")
        self._editor = BatchEditor(
            model=model,
            layers=layers,
            moments=moment_matrices(moments, config.edited_layers(layers) if config.preserves_keys else [], model),
            method=method,
            config=config,
            settings_from=settings_from,
            prefixes=check_prefixes(prefixes or saved_prefixes or config.default_prefixes(model)),
            texts=texts,
            rule=check_rule(rule, texts),
            accumulate=accumulate,
            scored_prompts=scored_prompts,
            evaluation=evaluation,
            base=model.provenance(),
        )
        if saved is None:
            self._unedited = tuple(self._editor.model_entries())
            self._folder.save_settings(self._editor.settings, self._unedited)
        else:
            self._folder.check_settings(saved[0], self._editor.settings)
            self._unedited = saved[1]
        self._batches = self._folder.load_batches(self._editor.base["weights_hash"])
        self._n_written = 0
        """Batches that `write` was given; while they are fewer than `_batches`, the session is replaying."""
        self._restore: contextlib.ExitStack | None = None
        """Restores the model on leaving the `with` block; None while the session is closed."""

    def __enter__(self) -> EditSession:
        """Apply all accepted batches to the model.

        Raises:
            InputError: the session is open already; the model is not the unedited one, or does not become what it was
                when the last batch was written; another process writes to the folder, or has done so.
        """
        if self._restore is not None:
            raise InputError("the session is open already, expected one `with` block at a time; leave the other first")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._editor.model.exclusive())
            stack.enter_context(self._folder.locked(len(self._batches)))
            self._editor.check_weights(self._editor.base["weights_hash"])
            stack.enter_context(restoring(self._editor.model, self._editor.layers))
            if self._accepted:
                apply_(self._editor.model, self.edit)
            self._editor.check_weights(self._expected_hash)
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *reason: object) -> None:
        """Restore the model, bit for bit."""
        stack, self._restore = self._restore, None
        if stack is not None:
            stack.close()

    @property
    def settings_from(self) -> list[dict[str, Any]] | None:
        """The files that the settings come from, with their hashes; None where the caller chose the settings."""
        return self._editor.settings_from

    @property
    def batches(self) -> tuple[EditedBatch, ...]:
        """The batches so far, a rejected one included."""
        return self._batches

    @property
    def stopped(self) -> str | None:
        """Reason why the session takes no more batches; None while it does."""
        return self._batches[-1].rejected if self._batches else None

    @property
    def history(self) -> pd.DataFrame:
        """Numbers measured on the unedited model and after every batch, one row per number: `HISTORY_COLUMNS`.

        `batch` is 0 for the unedited model; `requests` counts the active ones. Measures: `ES`, `exact_match` … in
        percent, with the scope `batch`, `earlier` (batches) or `all`; `perplexity` of the texts and each layer's
        `weight_norm` ‖W‖, with the scope `model`; `update_norm` ‖ΔW‖ per layer, of this `batch` and of `all`;
        `seconds`. The rows of a rejected batch are marked `rejected`: they describe the model that it would have left.
        """
        frames = [history_frame(0, 0, self._unedited), *(batch.history for batch in self._batches)]
        return pd.concat(frames, ignore_index=True).loc[:, list(HISTORY_COLUMNS)]

    @property
    def scores(self) -> pd.DataFrame:
        """Scores of every active request after every batch: `batch, case, measure, value`, in percent."""
        frames = [batch.scores.assign(batch=batch.number) for batch in self._batches]
        columns = ["batch", *SCORE_COLUMNS]
        return pd.concat(frames, ignore_index=True).loc[:, columns] if frames else pd.DataFrame(columns=columns)

    @property
    def requests(self) -> list[EditRequest]:
        """The active requests: all that were written and that no later request overrides."""
        return active_requests(self._accepted)

    @property
    def keys(self) -> dict[int, Float[Tensor, "d_mlp fact"]]:
        """Keys of the active requests, in their order, per edited layer; empty before the first batch."""
        return active_keys(self._accepted)

    @property
    def edit(self) -> Edit:
        """All accepted batches as one edit of the unedited model.

        Raises:
            InputError: there are none.
        """
        return self._editor.merge(self._accepted)

    def write(self, requests: Sequence[EditRequest], *, overwrite: bool = False) -> EditedBatch:
        """Write one batch on top of the earlier ones, and score all requests so far; the rule may take it back.

        In a session resumed from a folder, give all batches again in the same order: finished ones are recognized by
        the hash of their requests and returned at once.

        Args:
            requests: the batch; ids must differ from those of all earlier batches.
            overwrite: whether requests may contradict earlier ones, which they then override: those are no longer
                scored, and their keys no longer preserved.

        Returns:
            The batch, accepted or rejected, with its edit and scores.

        Raises:
            InputError: the session is not open, or has stopped; another batch than the finished one in its place;
                requests that conflict with each other or, without `overwrite`, with earlier ones; weights changed by
                others; and what the method refuses. Without texts, also a model whose logits are no longer finite.
        """
        if self._restore is None:
            raise InputError("the session is not open, expected a `with` block around every write; put it in one")
        batch = tuple(records_of(requests, EditRequest))
        if self._n_written < len(self._batches):
            return self._replay(batch)
        if self.stopped:
            raise InputError(
                f"the session stopped at batch {len(self._batches)} and took it back: {self.stopped}. Expected no more "
                f"batches; start another session, with milder settings or another rule"
            )
        overridden = self._overridden(batch, overwrite)
        self._editor.check_weights(self._expected_hash)
        edited_batch = self._try_batch(batch, overridden)
        self._commit(edited_batch)
        return edited_batch

    @property
    def _accepted(self) -> list[EditedBatch]:
        return [batch for batch in self._batches if batch.rejected is None]

    @property
    def _expected_hash(self) -> str:
        """Hash of the weights as the session left them."""
        return self._accepted[-1].weights_hash if self._accepted else self._editor.base["weights_hash"]

    def _replay(self, requests: tuple[EditRequest, ...]) -> EditedBatch:
        """The finished batch with these requests, in a resumed session."""
        batch = self._batches[self._n_written]
        if batch.requests_hash != requests_hash(requests):
            raise InputError(
                f"batch {batch.number} is finished and holds {len(batch.requests)} requests from "
                f"{brief(batch.requests[0].id)} on, found {len(requests)} others in its place; give the same batches "
                f"in the "
                f"same order (their requests are in `batches`), or choose another folder"
            )
        self._n_written += 1
        return batch

    def _overridden(self, requests: tuple[EditRequest, ...], overwrite: bool) -> tuple[str, ...]:
        """Ids of active requests that a new batch contradicts, after checking the batch."""
        check_requests(one_spelling(self._editor.model.tokenizer, requests))
        written = [request.id for batch in self._batches for request in batch.requests]
        check_unique_ids([*written, *(request.id for request in requests)], "requests of the session")
        spelled = one_spelling(self._editor.model.tokenizer, [*requests, *self.requests])
        overridden = {old.id: new.id for new, old, _ in conflicts(spelled)}
        if overridden and not overwrite:
            old, new = next(iter(overridden.items()))
            raise InputError(
                f"{len(overridden)} earlier requests are contradicted, {brief(old)} by {brief(new)} for one; "
                f"expected one object "
                f"for each subject and relation: drop them, or pass overwrite=True to let the later ones override them"
            )
        return tuple(overridden)

    def _try_batch(self, requests: tuple[EditRequest, ...], overridden: tuple[str, ...]) -> EditedBatch:
        """Make the edit of a batch and measure the model with it; the model is then as it was before."""
        start = time.perf_counter()
        number = len(self._batches) + 1
        previous_keys = active_keys(self._accepted, overridden) if self._editor.accumulate else {}
        edit, keys = self._editor.edit_batch(requests, previous_keys, self._folder.targets(number))
        batch = EditedBatch(number=number, requests=requests, edit=edit, keys=keys, overridden=overridden)
        with restoring(self._editor.model, self._editor.layers):
            self._switch_to([*self._accepted, batch])
            return self._measured(batch, start)

    def _measured(self, batch: EditedBatch, start: float) -> EditedBatch:
        """The batch with all that is measured on the model as it is now, and with the rule's verdict."""
        batches = [*self._accepted, batch]
        requests, entries = active_requests(batches), self._editor.model_entries()
        scores = batch.scores
        # Prompts have no finite likelihood either if the text has none.
        if all(entry.value is not None for entry in entries):
            scores = self._editor.score(requests)
            entries += mean_scores(scores, {request.id for request in batch.requests})
        entries += update_norms(batch.edit, "batch") + update_norms(self._editor.merge(batches), "all")
        entries.append(HistoryEntry("seconds", "batch", time.perf_counter() - start))
        return dataclasses.replace(
            batch,
            scores=scores,
            entries=tuple(entries),
            n_active=len(requests),
            rejected=self._editor.rule.reason(entries, self._unedited),
            weights_hash=self._editor.model.weights_hash(),
        )

    def _commit(self, batch: EditedBatch) -> None:
        """Save the batch and, if it is accepted, apply it: file, model and session change together or not at all."""
        with uninterrupted(), transaction(self._editor.model, self._editor.layers):
            if batch.rejected is None:
                self._switch_to([*self._accepted, batch])
            self._folder.save_batch(batch)
            self._batches = (*self._batches, batch)
            self._n_written += 1
        self._folder.remove_targets(batch.number)

    def _switch_to(self, batches: Sequence[EditedBatch]) -> None:
        """Replace the accepted batches on the model by `batches`."""
        if self._accepted:
            undo_(self._editor.model, self.edit)
        apply_(self._editor.model, self._editor.merge(batches))
