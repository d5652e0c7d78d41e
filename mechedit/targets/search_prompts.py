"""The prompts of the search: one per request and context template, and one KL prompt per δ.

The tokens before the subject's last one do not depend on δ: their keys and values are computed once, and only the
tokens from there on run again at every step. Prompts with about equally much to run share a batch (`search_batches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mechedit.batching import PassCost, block_parameters, padding_budget
from mechedit.data import EditRequest, fill
from mechedit.errors import InputError, brief
from mechedit.models import Model
from mechedit.prefixes import BARE, completed_prompts
from mechedit.prompt_tokens import tokenize_prompt
from mechedit.targets.config import TargetConfig
from mechedit.workers import LARGE_BLOCK

KL_PROMPT = -1
"""Stands in place of a context template's index in KL prompts."""
LEAST_TOKENS = 160
"""Tokens below which a pass is not cut for the sake of workers: the products of one core would become slower."""
ENOUGH_TOKENS = 256, 1024
"""Tokens from which on a longer pass is no faster on a CPU: of models whose products take long, and of small or very
large ones. They also bound the memory for what the gradient reads."""


@dataclass(frozen=True, kw_only=True)
class SearchPrompt:
    """A prompt followed by all tokens of its object but the last, or a KL prompt."""

    ids: tuple[int, ...]
    at: int
    """Position of the token where δ is added, the subject's last one by default."""
    scored: tuple[int, ...]
    """Positions whose logits enter the loss."""
    labels: tuple[int, ...]
    """Tokens to be predicted at `scored`; none for a KL prompt."""
    fact: int
    """Index of the fact in the batch."""
    template: int
    """Index of the context template; `KL_PROMPT` for a KL prompt."""
    weight: float
    """Weight of this prompt in the fact's mean loss."""
    bare: bool = False
    """Whether h is read off this prompt: it stands without any text around it."""

    @property
    def width(self) -> int:
        """Number of tokens from there on, which depend on δ."""
        return len(self.ids) - self.at


def search_prompts(
    model: Model, requests: Sequence[EditRequest], groups: Sequence[int], prefixes: Sequence[str], config: TargetConfig
) -> list[SearchPrompt]:
    """The prompts of some facts: one per context template for each fact, and one KL prompt for each δ.

    There is no KL prompt where its term has the weight 0.

    Args:
        model: tokenizes them.
        requests: the facts.
        groups: index of each fact's δ.
        prefixes: context templates with one {} for the whole prompt.
        config: names the KL prompt and where it is scored.

    Raises:
        InputError: a prompt is longer than the model takes, or an object gives no tokens.
    """
    prompts, groups_with_kl = [], set()
    first_bare = next((index for index, prefix in enumerate(prefixes) if prefix == BARE), None)
    for fact, (request, group) in enumerate(zip(requests, groups, strict=True)):
        for template, (prompt, object_ids) in enumerate(completed_prompts(model, request, prefixes)):
            ids = check_length(model, request, [*prompt.ids, *object_ids[:-1]])
            scored = range(len(prompt.ids) - 1, len(ids))
            prompts.append(
                SearchPrompt(
                    ids=tuple(ids), at=prompt.position(config.token), scored=tuple(scored), labels=tuple(object_ids),
                    fact=fact, template=template, weight=1 / len(prefixes), bare=template == first_bare,
                )
            )  # fmt: skip
        if config.kl_weight and group not in groups_with_kl:
            groups_with_kl.add(group)
            prompts.append(_kl_prompt(model, request, fact, config))
    return prompts


def _kl_prompt(model: Model, request: EditRequest, fact: int, config: TargetConfig) -> SearchPrompt:
    """The prompt of the KL term, scored at its end or, by the published code, at the token where δ is added."""
    prompt = tokenize_prompt(model.tokenizer, fill(request.turn, config.kl_prompt), request.subject)
    at = prompt.position(config.token)
    position = at if config.convention == "memit-2022" else len(prompt.ids) - 1
    return SearchPrompt(
        ids=tuple(check_length(model, request, prompt.ids)), at=at, scored=(position,),
        labels=(), fact=fact, template=KL_PROMPT, weight=1.0,
    )  # fmt: skip


def search_batches(
    model: Model, prompts: Sequence[SearchPrompt], pass_tokens: int, blocks: int | None = None, workers: int = 1
) -> Iterator[list[SearchPrompt]]:
    """Group prompts that run together: those of like width, in the passes that take least time in all.

    Args:
        model: tells what a pass costs, and a token in it (`PassCost`).
        prompts: in any order.
        pass_tokens: most tokens in the passes that run at once, padding included.
        blocks: number of blocks that run; by default all.
        workers: number of passes that run at once.
    """
    enough = _enough_tokens(model) if model.device.type == "cpu" else pass_tokens
    cost, rows = PassCost.of(model, blocks or model.n_layers), sorted(prompts, key=lambda prompt: prompt.width)
    widths, scored = (
        [0, *accumulate(map(size, rows))] for size in (lambda row: row.width, lambda row: len(row.scored))
    )

    def tokens(begin: int, end: int) -> int:
        """Tokens that are computed for these prompts as one batch."""
        return widths[end] - widths[begin] if model.skips_padding else rows[end - 1].width * (end - begin)

    ends = [end for end in range(1, len(rows) + 1) if end == len(rows) or rows[end].width > rows[end - 1].width]
    # Least cost of the prompts before each width, and where the last group of these begins.
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for end in ends:
        size = max(1, pass_tokens // rows[end - 1].width)

        def of_group(begin: int, end: int = end, size: int = size) -> float:
            cuts = [*range(begin, end, size), end]
            return sum(cost.of_pass(tokens(i, j), scored[j] - scored[i]) for i, j in pairwise(cuts))

        best[end] = min((before + of_group(begin), begin) for begin, (before, _) in best.items())
    end, groups = len(rows), list[tuple[int, int]]()
    while end:
        begin = best[end][1]
        groups.append((begin, end))
        end = begin
    for begin, end in reversed(groups):
        most = max(1, min(pass_tokens, max(pass_tokens // workers, LEAST_TOKENS)) // rows[end - 1].width)
        total = tokens(begin, end)
        passes = max(1, min(workers * max(1, round(total / workers / enough)), total // LEAST_TOKENS))
        start, number = begin, 1
        for stop in range(begin + 1, end + 1):
            is_full = stop - start >= most or tokens(begin, stop) >= total * number / passes
            if is_full or stop == end:
                yield rows[start:stop]
                start, number = stop, number + 1


def _enough_tokens(model: Model) -> float | int:
    """Tokens from which on a longer pass is no faster on a CPU.

    In a small model each operation is started in a part of the time that few tokens take; in a large one the weights
    come from memory in that time.
    """
    if block_parameters(model) >= LARGE_BLOCK:
        return ENOUGH_TOKENS[1]
    return min(max(8 * padding_budget(model), ENOUGH_TOKENS[0]), ENOUGH_TOKENS[1])


def check_length(model: Model, request: EditRequest, ids: Sequence[int]) -> list[int]:
    """The ids as a list.

    Raises:
        InputError: the model has no room for so many tokens.
    """
    if len(ids) > model.max_positions:
        raise InputError(
            f"request {brief(request.id)} takes {len(ids)} tokens with its prefix and object, expected at most "
            f"{model.max_positions}; shorten the prompt or the prefixes"
        )
    return list(ids)
