"""`mechedit edit`: make an edit, or show what one changes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import typer

from mechedit import ranks
from mechedit.cli.app import say
from mechedit.cli.command import command
from mechedit.cli.describe import describe_edit, format_description, say_unconverged
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import MethodOptions, ModelOptions, RequestsOption
from mechedit.cli.parsing import (
    method_settings,
    parse_layers,
    parse_shard,
    require_layers,
    require_one_process,
)
from mechedit.data import Conflicts, EditRequest, revised
from mechedit.data.facts import fill
from mechedit.data.joint import following
from mechedit.edit import Edit
from mechedit.errors import InputError, brief_list, shortened
from mechedit.locks import locked
from mechedit.methods import (
    METHODS,
    MethodConfig,
    Recommendation,
    SearchConfig,
    published_for,
    with_published_layers,
    with_sources,
)
from mechedit.models import Model
from mechedit.moments import is_published, load_moments
from mechedit.paths import writable_file, writable_folder
from mechedit.run_folder import check_seen_by_all
from mechedit.selection import Selection
from mechedit.shards import Rank
from mechedit.targets import (
    TargetConfig,
    check_target_shards,
    find_target_shard,
    find_targets,
    regrouped,
    target_shards,
)

SENTENCE, LEFT_OUT = 80, 300
"""Characters of a request that is left out, and of all of them, in the line that names them."""


@dataclass(frozen=True, kw_only=True)
class EditOptions(RequestsOption, MethodOptions):
    """Requests, layers, moments, method and file; or an edit to show."""

    out: Path = Path("edit.safetensors")
    """File for the edit."""
    show: Path | None = None
    """An edit file: print what it changes, and make none."""
    model: str | None = None
    """tiny (by default), a hub name or a folder."""
    layers: str | None = None
    """Layers, such as 3-8 or 3,5,7; by default those tuned for the model, else published for it (by its name, or
    its architecture and size). Several are separated by commas."""
    selection: Path | None = None
    """A selection.json, in place of --layers."""
    moments: Path = Path("run")
    """Folder that `mechedit moments` wrote; or published moments: a .npz file, its path with {} for the layer's number,
    or a folder of them."""
    without: tuple[str, ...] = ()
    """Ids of requests to leave out: makes the edit that there would have been without them, from the known targets."""
    with_: str | None = None
    """A file of further requests: makes the edit that there would have been with them, from the known targets."""
    targets_only: bool = False
    """Only search for the targets, which a later edit with the same options takes."""
    shard: str | None = None
    """With --targets-only: search for one process's part of the targets, such as 0/4; then --merge."""
    merge: bool = False
    """Make the edit from the targets of all processes, and search for none."""
    conflicts: Conflicts = "refuse"
    """Requests for different objects of one subject and relation: refuse, or keep the first."""
    published: bool = False
    """Take layers and settings that were published for this model, in their own units, and no others."""

    def method_settings(self, model: Model, *, own_layers: bool) -> Recommendation[MethodConfig]:
        """As for every command; with --published, those that were published for the model.

        Raises:
            InputError: --published with --tuned; nothing was published for the model; and as for every command.
        """
        if not self.published:
            return super().method_settings(model, own_layers=own_layers)
        if self.tuned is not None:
            raise InputError("both --tuned and --published are there, expected one of them; leave the other out")
        settings = method_settings(self.method, model, self.seed, self.set, published=True)
        _say_published(settings.for_own_layers() if own_layers else settings, self.method, model)
        return settings


@command()
def edit_command(options: EditOptions) -> int:
    """Make an edit file from requests; the model is not changed. With --show, print what an edit file changes."""
    if options.show is not None:
        path = options.show
        read = {"show", *(field.name for field in fields(ModelOptions))} - {"seed", "overwrite"}
        refuse_idle(
            options,
            names={field.name for field in fields(options)} - read,
            reason="is for making an edit, and --show only prints what one holds; leave one of them out",
        )
        return ranks.current().from_first(lambda: _show(path, options), "the description")
    if options.shard is not None and not options.targets_only:
        raise InputError("--shard is for a search of targets, expected --targets-only with it; add that, then --merge")
    if options.merge and options.targets_only:
        raise InputError("--merge makes the edit, and --targets-only makes none; leave one of them out")
    if options.layers is not None and options.selection is not None:
        raise InputError("give the layers either by --layers or by --selection, and not by both")
    if not ranks.current().is_first or options.targets_only:
        return _make(options)
    writable_file(options.out)
    with locked(options.out, f"the edit {str(options.out)!r}"):
        return _make(options)


def _make(options: EditOptions) -> int:
    """Make and write the edit, or find its targets."""
    shard = require_one_process(parse_shard(options.shard))
    if not options.targets_only and options.out.exists() and not options.overwrite:
        raise InputError(f"the file {str(options.out)!r} exists; choose another --out, or pass --overwrite")
    requests = options.read_named_requests(options.conflicts)
    added = options.read_requests(options.with_, options.conflicts) if options.with_ is not None else []
    revised(requests, without=options.without, added=added)
    chosen = _layers(options)
    model = options.load_model()
    added = options.in_turns(model, added)
    requests = options.in_turns(model, requests)
    settings = options.method_settings(model, own_layers=bool(chosen))
    if not chosen and settings.layers is None:
        settings = with_published_layers(settings, options.method, model)
        _say_published(settings, options.method, model)
    config, layers = settings.config, chosen or list(settings.layers or ())
    require_layers(layers, model.n_layers)
    if options.without or added:
        requests = _revised(options, model, requests, added, config)
    targets = (options.out.parent if is_published(options.moments) else options.moments) / "targets"
    check_seen_by_all(writable_folder(targets.parent))
    if options.targets_only or options.merge:
        search = _shared_search(config, options.method)
        layer = search.target_layer(layers)
    if options.targets_only:
        return _find_targets(options, model, requests, layer, search.targets, targets, shard)
    moments = load_moments(options.moments, layers, model) if config.preserves_keys else {}
    if options.merge:
        check_target_shards(model, requests, layer, cache=targets, config=search.targets)
    edit = METHODS[options.method](model, requests, layers, moments, config=config, cache=targets)
    edit = with_sources(edit, settings, layers=not chosen)

    def save() -> None:
        if options.merge:
            target_shards(targets).remove()  # before the edit is there: killed in between, the same command makes it
        edit.save(options.out)

    ranks.current().from_first(save, "the file of the edit")
    say(f"wrote {options.out}: {len(requests)} request{'' if len(requests) == 1 else 's'} in layers {layers}")
    say_unconverged(edit)
    options.print_summary({"edit": str(options.out), "layers": layers, "requests": len(requests)})
    return 0


def _shared_search(config: MethodConfig, method: str) -> SearchConfig:
    """The settings of a method whose targets are kept.

    Raises:
        InputError: it has none, or finds each fact's on the model as edited so far.
    """
    if not (isinstance(config, SearchConfig) and config.shares_targets):
        names = [name for name, entry in METHODS.items() if getattr(entry.config, "shares_targets", False)]
        raise InputError(
            f"the method {method!r} keeps no targets, expected one of {', '.join(names)} for --targets-only and --merge"
        )
    return config


def _find_targets(
    options: EditOptions,
    model: Model,
    requests: list[EditRequest],
    layer: int,
    config: TargetConfig,
    folder: Path,
    shard: Rank | None,
) -> int:
    """Find the targets of all requests, or of a shard of them, and leave them in a folder."""
    if shard is None:
        n_facts = len(find_targets(model, requests, layer, config=config, cache=folder).ids)
        say(f"the targets of {n_facts} requests are in {folder}")
    else:
        n_facts = find_target_shard(
            model, requests, layer, shard, cache=folder, config=config, overwrite=options.overwrite
        )
        say(f"shard {shard} is finished; when all are: mechedit edit --merge with the same options")
    options.print_summary({"targets": str(folder), "requests": n_facts, "shard": None if shard is None else str(shard)})
    return 0


def _revised(
    options: EditOptions, model: Model, requests: list[EditRequest], added: list[EditRequest], config: MethodConfig
) -> list[EditRequest]:
    """The requests to write; says which known targets are of no use, since those who shared them are others now."""
    remaining = revised(requests, without=options.without, added=added)
    left_out = [request for request in requests if request.id in set(options.without)]
    sentences = f" ({brief_list(map(_sentence, left_out), LEFT_OUT)})" if left_out else ""
    say(f"requests left out: {len(left_out)}{sentences}; added: {len(added)}; in all: {len(remaining)}")
    if isinstance(config, SearchConfig) and config.shares_targets:
        again = regrouped(model.tokenizer, requests, remaining, config.targets)
        if again:
            say(f"searched for again, since they share a subject with one of those: {', '.join(again)}")
    return remaining


def _sentence(request: EditRequest) -> str:
    """A request's id and what it would have the model say."""
    prompt = fill(request.prompt, request.subject)
    return f"{request.id}: {shortened(prompt + following(prompt, request.target_new, request.joint), SENTENCE)}"


def _show(path: Path, options: EditOptions) -> int:
    """Print an edit's description, as text or with --json; with a model, also the relative norms."""
    edit = Edit.load(path)
    description = describe_edit(edit, options.load_model() if options.model else None)
    options.print_summary(description)
    if not options.json:
        typer.echo(format_description(path, description))
    return 0


def _layers(options: EditOptions) -> list[int]:
    """The layers that --layers or --selection gives; none without both."""
    if options.selection is None:
        return [] if options.layers is None else parse_layers(options.layers)
    layers = list(Selection.load(options.selection).layers)
    if not layers:
        raise InputError(f"{str(options.selection)!r} selects no layers; give them by --layers")
    return layers


def _say_published(settings: Recommendation[MethodConfig], method: str, model: Model) -> None:
    """Say where published layers come from, and what else was published for the method on this model."""
    say(f"settings of {method}: {settings.sources[-1].in_words()}")
    for entry in published_for(method, model)[1:]:
        say(f"  published as well: {entry.in_words()}")
