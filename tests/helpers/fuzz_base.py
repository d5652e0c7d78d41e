"""What the fuzz begins with: a small random model, and a folder of files of every format, made by the commands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import mechedit as me
from helpers.models import random_hf, small_tokenizer
from mechedit.cli import main as run_command_line
from mechedit.methods import mend_training, tuned_folder_of
from mechedit.trace import tokenize_fact

TRAINING = {
    "": "tiny", "requests": "many.json", "texts": "texts.txt", "layers": "0", "steps": "2", "batch-size": "1",
    "rank": "4", "text-tokens": "8", "validation": "1", "validate-every": "1",
}  # fmt: skip
"""Options of a training of MEND's editor, without its file."""
SUBJECTS = ("Leon Blum", "Miles Davis", "Toko Yasuda", "Apple", "Danielle Darrieux", "LeBron James", "Kate Bush",
            "Edwin", "Anaal Nathrakh", "Go Hyeon-jeong", "Windows Media Player", "Space Needle")  # fmt: skip


def small_model() -> Any:
    """A random model that says French of all subjects, and only just."""
    hf = random_hf("gpt2", initializer_range=0.05)
    model: Any = me.load_model(hf, tokenizer=small_tokenizer(), backend="nnsight")
    facts = [me.Fact(id=name, subject=name, prompt="{} plays the sport of", object="French") for name in SUBJECTS]
    all_traced = [tokenize_fact(model, fact) for fact in facts]
    row = model.hf.transformer.wte.weight[all_traced[0].object_ids[0]]
    for _ in range(100):
        prompts = [torch.tensor([traced.ids]) for traced in all_traced]
        answers = [int(model.next_logits(ids, torch.ones_like(ids))[0].argmax()) for ids in prompts]
        if all(answer == traced.object_ids[0] for answer, traced in zip(answers, all_traced, strict=True)):
            return model
        with torch.no_grad():
            model.hf.transformer.ln_f.bias += 0.3 * row
    raise AssertionError("it does not learn")


def make_base(folder: Path, model: Any) -> None:
    """Fill a folder with files of every format, made by the commands themselves."""
    facts = [{"id": str(i), "subject": name, "prompt": "{} plays the sport of", "object": "French", "relation": "r"}
             for i, name in enumerate(SUBJECTS)]  # fmt: skip
    requests = [
        {"id": str(i), "subject": name, "prompt": "{} plays the sport of", "target_new": "Korean",
         "target_true": "French",
         "paraphrases": [f"Every day {name} plays"], "neighbors": [{"prompt": "Kate Bush speaks", "object": "French"}]}
        for i, name in enumerate(SUBJECTS[:2])
    ]  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    names = list(facts[0])
    (folder / "facts.csv").write_text("\n".join([",".join(names), *(",".join(fact.values()) for fact in facts)]))
    (folder / "requests.json").write_text(json.dumps(requests))
    many = [{**requests[0], "id": str(i), "subject": name, "paraphrases": []} for i, name in enumerate(SUBJECTS[:4])]
    (folder / "many.json").write_text(json.dumps(many))
    columns = ["id", "subject", "prompt", "target_new", "target_true"]
    rows = [",".join(str(request[name]) for name in columns) for request in requests]
    (folder / "requests.csv").write_text("\n".join([",".join(columns), *rows]))
    texts = [
        f"{a} and {b} speak French in the city of Paris, number {i}."
        for i in range(2)
        for a in SUBJECTS
        for b in SUBJECTS
    ]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "config.yaml").write_text("seed: 1\n")
    with contextlib.chdir(folder), patched(model, draws=False):
        for words in (
            ["trace", "--facts=facts.json", "--samples=2", "--sever=nothing,mlp,attn", "--out=run"],
            ["select", "run"],
            ["moments", "--layers=0-2", "--texts=texts.txt", "--out=run"],
            ["edit", "--requests=requests.json", "--layers=0", "--moments=run", "--set=steps=1",
             "--out=edit.safetensors"],
            ["evaluate", "--requests=requests.json", "--edit=edit.safetensors", "--generation-prompts=1",
             "--generation-tokens=2", "--out=run"],
            ["tune", "tiny", "--requests=many.json", "--moments=run", "--windows=0-0,0-1", "--facts=4", "--edits=8",
             "--set=steps=1", "--out=tuned"],
        ):  # fmt: skip
            with contextlib.suppress(SystemExit):
                run_command_line(words)
        make_editor(tuned_folder_of(model))
        make_plan_config(Path("model"))
    shutil.rmtree(folder / "run" / "targets", ignore_errors=True)


def make_editor(folder: Path) -> None:
    """An editor of MEND, also in the folder where methods look for it, and the checkpoint of half a training."""
    argument, *options = TRAINING.items()
    words = ["train-mend", argument[1], *(f"--{name}={value}" for name, value in options)]
    with contextlib.suppress(SystemExit):
        run_command_line([*words, "--out=mend.safetensors"])
    folder.mkdir(parents=True)
    shutil.copy("mend.safetensors", folder)
    write = mend_training.write_checkpoint

    def interrupt(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with (
        mock.patch.object(mend_training, "SECONDS", -1),
        mock.patch.object(mend_training, "write_checkpoint", interrupt),
        contextlib.suppress(SystemExit),
    ):
        run_command_line([*words, "--out=half.safetensors"])


def make_plan_config(folder: Path) -> None:
    """The config of a model whose weights are not there."""
    random_hf("llama").config.save_pretrained(folder)


@contextlib.contextmanager
def patched(model: Any, *, draws: bool) -> Iterator[None]:
    """Let "tiny" be the small model where nothing else is asked of it, and leave figures out."""
    from mechedit.cli import options

    load = options.load_quietly

    def load_small(
        name: str, backend: str, device: str | None, dtype: str | None, merge_adapter: bool, allow_pickle: bool
    ) -> Any:
        plain = device in (None, "cpu") and dtype in (None, "float32") and not merge_adapter
        if name == "tiny" and plain and backend in ("transformer_lens", "nnsight"):
            return model
        return load(name, backend, device, dtype, merge_adapter, allow_pickle)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(options, "load_quietly", load_small))
        # Where nobody's own files are looked for, and for a rate that takes no time.
        folders = {"MECHEDIT_TUNED": "models", "MECHEDIT_CACHE": "cache"}
        stack.enter_context(mock.patch.dict(os.environ, folders))
        stack.enter_context(mock.patch("mechedit.planning.rate.SECONDS", 0.01))
        if not draws:
            stack.enter_context(mock.patch("mechedit.cli.tune.tuning_figures", return_value={}))
            for module in ("select", "evaluate", "run", "report"):
                stack.enter_context(mock.patch(f"mechedit.cli.{module}.run_figures", return_value=[]))
            stack.enter_context(mock.patch("mechedit.cli.trace.refresh_figures", return_value=[]))
        yield
