"""Options that several commands share, and how to get a model, a run folder or a method's settings from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechedit.chat import Prompted, prompted
from mechedit.cli.app import print_json, say
from mechedit.cli.parsing import load_quietly, method_settings
from mechedit.data import Conflicts, EditRequest, Fact, read_edit_requests, read_facts
from mechedit.errors import InputError
from mechedit.methods import MethodConfig, Recommendation
from mechedit.models import Model
from mechedit.run_folder import RunFolder
from mechedit.selection import RULES
from mechedit.trace import Agreement, Approximation, DisagreementError, TraceConfig

ALL_SEVERED = {"sever": ("nothing", "mlp", "attn")}
"""`run` and `trace` sever both modules, where `TraceConfig` alone severs none."""

EVALUATION_OPTIONS = ("generation_prompts", "generation_tokens", "stop_words", "seed")
"""Fields of `EvaluationConfig` that `run` and `evaluate` take."""

TINY_DATA = {"facts": "known", "requests": "tiny", "texts": "tiny"}
"""Data that ship with the tiny model; what they speak of is invented, so that no other model knows it."""
PUBLISHED_DATA = {"facts": "known_1000", "requests": "multi_counterfact", "texts": "wikitext"}
"""Data on the real world, downloaded once, for all other models."""


def suited_data(model: str | None) -> dict[str, str]:
    """Names of the facts, requests and texts that suit a model where none are named."""
    return TINY_DATA if model in (None, "tiny") else PUBLISHED_DATA


RULE_NOTE = {"rule": f"Rule that chooses the layers: {', '.join(RULES)}."}


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """Whether the summary is printed."""

    json: bool = False
    """Print the summary on stdout."""

    def print_summary(self, summary: dict[str, Any]) -> None:
        """Print a command's summary on stdout, when --json asks for it."""
        if self.json:
            print_json(summary)


@dataclass(frozen=True, kw_only=True)
class VerifyOption(JsonOption):
    """Whether large files are read for their checksums."""

    verify: bool = False
    """Check the contents of files of 256 MB and more too, which takes a while; those of smaller ones always are."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(VerifyOption):
    """The model, how it is run, and what is drawn at random."""

    model: str | None = "tiny"
    """tiny, a hub name or a folder."""
    backend: str = "transformer_lens"
    """transformer_lens or nnsight."""
    device: str | None = None
    """Device, such as cpu; by default the accelerator if there is one. auto spreads the layers over all of them."""
    dtype: str | None = None
    """float32, bfloat16 or float16."""
    merge_adapter: bool = False
    """Merge an adapter of PEFT into its base model, where --model is an adapter's folder or hub name."""
    allow_pickle: bool = False
    """Read weights also from pickle (pytorch_model.bin), by torch's reader of weights alone; else only safetensors."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    overwrite: bool = False
    """Replace results that were made with other settings, or are damaged."""

    def load_model(self) -> Model:
        """Load the model, without the loading bars of libraries."""
        return load_quietly(
            self.model or "tiny", self.backend, self.device, self.dtype, self.merge_adapter, self.allow_pickle
        )


@dataclass(frozen=True, kw_only=True)
class RunFolderOptions(ModelOptions):
    """A folder for the results."""

    out: Path = Path("run")
    """Folder for the results."""

    def run_folder(self) -> RunFolder:
        """Open the folder, which is made if it is not there."""
        return RunFolder.at(self.out, overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(ModelOptions):
    """How facts and requests are read."""

    joint: str | None = None
    """Text between prompt and object, where a record names none; by default decided by the characters that meet."""
    strict: bool = False
    """Refuse a file with an unclear record, in place of leaving that out."""
    chat: bool = False
    """Ask each prompt as a user's question, through the tokenizer's chat template."""

    def in_turns(self, model: Model, records: Sequence[Prompted]) -> list[Prompted]:
        """The facts or requests, in the tokenizer's chat template if --chat says so."""
        return prompted(model.tokenizer, records, chat=self.chat)

    def read_facts(self, source: str | None) -> list[Fact]:
        """Read facts, by default those that suit the model, and say in a line what was read."""
        source = source or suited_data(self.model)["facts"]
        reading = read_facts(source, joint=self.joint, strict=self.strict)
        say(f"read {reading.summary}")
        return reading.records

    def read_requests(self, source: str | None, conflicts: Conflicts = "refuse") -> list[EditRequest]:
        """Read requests, by default those that suit the model, and say in a line what was read."""
        source = source or suited_data(self.model)["requests"]
        reading = read_edit_requests(source, conflicts=conflicts, joint=self.joint, strict=self.strict)
        say(f"read {reading.summary}")
        return reading.records


@dataclass(frozen=True, kw_only=True)
class FactsOptions(ReadingOptions):
    """The facts to trace."""

    facts: str | None = None
    """known (ships with the package), known_1000, or a file of facts; by default known with the tiny model, and
    known_1000 with others."""
    max_facts: int | None = None
    """Trace a seeded sample of this many facts."""


@dataclass(frozen=True, kw_only=True)
class ApproximateOption:
    """Whether the trace is approximate."""

    approximate: bool = False
    """Estimate effects from gradients, trace some cells exactly, and refuse where the two disagree."""

    def trace_config(self, trace: TraceConfig, approximation: Approximation | None = None) -> TraceConfig:
        """The settings of the trace, with those of the approximation where it is asked for."""
        return replace(trace, approximation=(approximation or Approximation()) if self.approximate else None)


STOPPED = {
    "settled": "the selection is settled",
    "facts": "there are no more",
    "minutes": "the time is up, and the selection is not settled",
}
"""Why a trace ended, in words."""


@dataclass(frozen=True, kw_only=True)
class MinutesOption:
    """How long facts are traced where that ends when the selection settles."""

    minutes: float | int | None = None
    """Minutes after which no more facts are traced, where that otherwise ends when the selection settles."""


def say_agreement(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say how well an approximate trace agrees with exact effects, and return the records."""
    records = attrs.get("agreement", [])
    _say_agreements(Agreement(**record) for record in records)
    return records


@contextmanager
def saying_disagreement(remedy: str) -> Iterator[None]:
    """Say how well all kinds and severings agree where an approximate trace is refused.

    Args:
        remedy: what to do on the command line in place of a trace without approximation.

    Raises:
        DisagreementError: with that remedy.
    """
    try:
        yield
    except DisagreementError as error:
        _say_agreements(error.agreements)
        raise DisagreementError(error.agreements, error.least, remedy) from error


def _say_agreements(agreements: Iterable[Agreement]) -> None:
    for agreement in agreements:
        say(f"approximate: {agreement.in_words()}")


@dataclass(frozen=True, kw_only=True)
class RequestsOption(ReadingOptions):
    """The requests to edit with."""

    requests: str | None = None
    """tiny (ships with the package), counterfact, multi_counterfact, zsre, or a file of edit requests; by default tiny
    with the tiny model, and multi_counterfact where others take a sample."""

    def read_named_requests(self, conflicts: Conflicts) -> list[EditRequest]:
        """Read the requests, all of which a command takes; with other models than the tiny one they must be named.

        Raises:
            InputError: they are not.
        """
        if self.requests is None and suited_data(self.model) is not TINY_DATA:
            raise InputError(
                f"no requests are named for {self.model!r}; expected --requests, such as a file of yours or counterfact"
            )
        return self.read_requests(self.requests, conflicts)


@dataclass(frozen=True, kw_only=True)
class TextsOption(ModelOptions):
    """The texts for second moments."""

    texts: str | None = None
    """tiny, a .txt or .jsonl file, or a datasets name; by default tiny with the tiny model, and wikitext with
    others."""

    @property
    def suited_texts(self) -> str:
        """The texts, by default those that suit the model."""
        return self.texts or suited_data(self.model)["texts"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions(ModelOptions):
    """The editing method."""

    method: str = "memit"
    """Editing method: memit, rome or another of `mechedit.methods.METHODS`."""
    set: list[str] | None = None
    """A setting of the method, name=value; may be repeated."""
    tuned: Path | None = None
    """A tuned.json of this model; by default that beside its checkpoint, else that in the folder of tuned settings."""
    no_tuned: bool = False
    """Leave tuned settings out."""

    def method_settings(self, model: Model, *, own_layers: bool) -> Recommendation[MethodConfig]:
        """The method's settings for this model: its recommended ones, then the seed, then those of --set.

        A line says which files they come from.

        Args:
            model: for which they are.
            own_layers: whether the layers are not taken from these files.

        Raises:
            InputError: --tuned and --no-tuned; and what `Method.recommendation` refuses.
        """
        if self.tuned is not None and self.no_tuned:
            raise InputError("both --tuned and --no-tuned are there, expected one of them; leave the other out")
        settings = method_settings(self.method, model, self.seed, self.set, tuned=not self.no_tuned, file=self.tuned)
        for source in (settings.for_own_layers() if own_layers else settings).sources:
            if source.settings:
                say(f"settings of {self.method}: {source.in_words()}")
        return settings

    def untuned(self, model: Model) -> MethodConfig:
        """The same without settings that were tuned before."""
        return method_settings(self.method, model, self.seed, self.set, tuned=False).config
