"""A run folder made by hand: the shapes of a real one, numbers from simple formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechedit.evaluation import EvaluationConfig, Scores
from mechedit.files import read_json, write_json, write_tensors

LAYERS = 10
PROVENANCE = {
    "mechedit": "0.1.0",
    "model": "tiny",
    "backend": "transformer_lens",
    "weights_hash": "3f9c" * 16,
    "tokenizer_hash": "77aa" * 16,
    "dtype": "float32",
}
IDENTITY = {key: value for key, value in PROVENANCE.items() if key != "backend"}
TOKENS = {
    "eiffel": ("The", " E", "iff", "el", " Tower", " is", " in", " the", " city", " of"),
    "brel": ("Jacques", " B", "rel", " was", " born", " in", " the", " city", " of"),
}
SUBJECTS = {"eiffel": range(1, 5), "brel": range(0, 3)}


def make_effects(facts: int = 24, seed: int = 0, layers: int = LAYERS) -> pd.DataFrame:
    """Effects with an early site at the last subject token and a late site at the last token."""
    generator = np.random.default_rng(seed)
    frames = []
    for number in range(facts):
        name = "eiffel" if number % 2 else "brel"
        strength, total = generator.uniform(0.3, 1.4), generator.uniform(0.3, 0.8)
        for kind in ("state", "mlp", "attn"):
            for sever in ("nothing", "mlp", "attn") if kind == "state" else ("nothing",):
                frames.append(_cells(f"{name}-{number}", name, kind, sever, strength, total, layers, generator))
    return pd.concat(frames, ignore_index=True)


def _cells(
    fact: str,
    name: str,
    kind: str,
    sever: str,
    strength: float,
    total: float,
    layers: int,
    generator: np.random.Generator,
) -> pd.DataFrame:
    rows = []
    for position, token in enumerate(TOKENS[name]):
        role = role_of(position, SUBJECTS[name], len(TOKENS[name]))
        for layer in range(layers):
            effect = strength * _shape(kind, sever, role, layer / layers) + generator.normal(0, 0.002)
            rows.append((fact, kind, sever, layer, position, token, role, effect))
    frame = pd.DataFrame(rows, columns=["fact", "kind", "sever", "layer", "position", "token", "role", "effect"])
    return frame.assign(
        window=1,
        metric="probability",
        corrupted=0.1,
        clean=0.1 + total,
        score=0.1 + frame["effect"],
        samples=10,
    )


def role_of(position: int, subject: range, length: int) -> str:
    if position < subject.start:
        return "before"
    if position in subject:
        if position == subject[-1]:
            return "subject_last"
        return "subject_first" if position == subject.start else "subject_middle"
    if position == length - 1:
        return "last"
    return "after" if position == subject.stop else "further"


def _shape(kind: str, sever: str, role: str, depth: float) -> float:
    early = 0.17 / (1 + np.exp((depth - 0.65) * 14)) if role == "subject_last" else 0.0
    late = 0.22 / (1 + np.exp((0.7 - depth) * 14)) if role == "last" else 0.0
    if sever == "mlp":
        early *= 0.35 + 0.65 / (1 + np.exp((0.4 - depth) * 14))
    if sever == "attn":
        early *= 0.93
    early_part, late_part = {"state": (1, 1), "mlp": (0.8, 0.1), "attn": (0.05, 0.7)}[kind]
    return early_part * early + late_part * late + (0.01 if role == "subject_first" else 0.0)


def make_selection() -> dict:
    gap = [9.1, 8.6, 7.0, 4.4, 2.2, 1.0, 0.4, 0.1, 0.0, 0.0]
    contribution = [0.6, 0.5, 1.6, 2.6, 2.2, 1.2, 0.6, 0.3, 0.1, 0.0]
    member = [0.02, 0.1, 0.98, 1.0, 1.0, 0.97, 0.2, 0.0, 0.0, 0.0]
    evidence = [
        {
            "layer": layer,
            "state": 0.16 - 0.01 * layer,
            "state_low": 0.14 - 0.01 * layer,
            "state_high": 0.18 - 0.01 * layer,
            "mlp_severed": 0.16 - 0.01 * layer - gap[layer] / 100,
            "mlp_severed_low": 0.14 - 0.01 * layer - gap[layer] / 100,
            "mlp_severed_high": 0.18 - 0.01 * layer - gap[layer] / 100,
            "attn_severed": 0.15 - 0.01 * layer,
            "attn_severed_low": 0.13 - 0.01 * layer,
            "attn_severed_high": 0.17 - 0.01 * layer,
            "gap": gap[layer] / 100,
            "gap_low": gap[layer] / 100 - 0.008,
            "gap_high": gap[layer] / 100 + 0.008,
            "contribution": contribution[layer] / 100,
            "contribution_low": contribution[layer] / 100 - 0.004,
            "contribution_high": contribution[layer] / 100 + 0.004,
            "membership": member[layer],
        }
        for layer in range(LAYERS)
    ]
    return {
        "layers": [2, 3, 4, 5],
        "rule": "contribution",
        "n_facts": 24,
        "evidence": evidence,
        "alternatives": {"gap-peak": [0, 1, 2], "moving-average": [1, 2, 3, 4, 5]},
        "state": "settled",
        "stability": 0.94,
        "agreement": 0.97,
        "modal": [2, 3, 4, 5],
        "candidates": [{"layers": [2, 3, 4, 5], "share": 0.94}, {"layers": [2, 3, 4], "share": 0.03}],
        "reason": "layers 2–5: the shortest run over which at least 80% of the MLPs' contribution is made: here 82%",
        "settings": {"rule": "contribution", "share": 0.8, "resamples": 1000, "confidence": 0.95, "seed": 0},
        "provenance": PROVENANCE,
    }


def make_scores(state: str, success: float, cases: int = 40) -> Scores:
    generator = np.random.default_rng(1)
    rows, answers = [], []
    for case in range(cases):
        for measure, kind, prompts in (
            ("ES", "rewrite", 1),
            ("PS", "paraphrase", 2),
            ("NS", "neighborhood", 5),
            ("EM", "rewrite", 1),
            ("exact_match", "rewrite", 1),
            ("GE", "generation", 2),
        ):
            for prompt in range(prompts):
                probability = 1 - 0.1 * success if measure == "NS" else success
                value = 5.9 + generator.normal(0, 0.2) if measure == "GE" else float(generator.random() < probability)
                rows.append((str(case), measure, kind, prompt, value, state))
        continuation = " Rome, where" if success > 0.5 else " Paris, <b>France</b>"
        answers.append(
            (str(case), "rewrite", 0, f"The Eiffel Tower {case} is in the city of", "Rome", continuation, state)
        )
        text = " draws millions of people to Rome every year."
        answers.append((str(case), "generation", 0, "The Eiffel Tower", "Rome", text, state))
    return Scores(
        table=pd.DataFrame(rows, columns=["case", "measure", "kind", "prompt", "value", "state"]),
        answers=pd.DataFrame(answers, columns=["case", "kind", "prompt", "question", "expected", "answer", "state"]),
        cases=tuple(map(str, range(cases))),
        config=EvaluationConfig(resamples=200),
        provenance={state: PROVENANCE},
    )


def make_facts(effects: pd.DataFrame) -> pd.DataFrame:
    """The facts traced, and one that the model did not know."""
    ids = list(dict.fromkeys(effects["fact"]))
    means = effects.groupby("fact")[["clean", "corrupted"]].first()
    texts = {
        "eiffel": ("Eiffel Tower", "The {} is in the city of", "Paris"),
        "brel": ("Jacques Brel", "{} was born in the city of", "Brussels"),
    }
    columns = ["subject", "prompt", "object"]
    frame = pd.DataFrame([texts[name.partition("-")[0]] for name in ids], columns=columns)
    frame = frame.assign(id=ids, relation="city", traced=True, reason=None)
    unknown = {"id": "louvre", "subject": "Louvre", "prompt": "The {} is in the city of", "object": "Paris"}
    reason = "the model says 'Rome', not 'Paris'"
    frame.loc[len(frame)] = {**unknown, "relation": "city", "traced": False, "reason": reason}
    return frame.join(means, on="id")


def write_trace(folder: Path, n_facts: int = 24) -> None:
    """What `mechedit trace` leaves, but for figures."""
    effects = make_effects(n_facts)
    facts = make_facts(effects)
    settings = {"kinds": ["state", "mlp", "attn"], "samples": 10, "noise": 3.0, "seed": 0}
    effects.attrs = {
        "config": settings,
        "noise_std": 0.134,
        "n_facts": n_facts,
        "dropped": [["louvre", facts["reason"].iloc[-1]]],
        "provenance": PROVENANCE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    effects.to_parquet(folder / "effects.parquet", index=False)
    facts.to_parquet(folder / "facts.parquet", index=False)
    write_steps(folder, trace={"model": IDENTITY, "facts": "ab12" * 16, "settings": settings})


def write_steps(folder: Path, **steps: dict) -> None:
    write_json(folder / "config.json", {"mechedit": "0.1.0", "steps": steps})


def write_run(folder: Path, n_facts: int = 24) -> None:
    """What `mechedit run` leaves, but for figures and report."""
    write_trace(folder, n_facts)
    write_json(folder / "selection.json", make_selection())
    for layer in (2, 3, 4, 5):
        header = {**PROVENANCE, "texts": "cd34" * 16, "max_length": 128, "layer": layer, "count": 210_345}
        path = folder / "moments" / f"layer_{layer}.safetensors"
        write_tensors(path, {"matrix": torch.eye(4)}, "provenance", header)
    write_edit(folder)
    before, after = make_scores("before", 0.05), make_scores("after", 0.9)
    both = before.join(after)
    both.save(folder)
    summary = {state: both.summary(state) for state in ("before", "after")}
    write_json(folder / "summary.json", {"selection": {"layers": [2, 3, 4, 5]}, **summary})
    steps = read_json(folder / "config.json")["steps"]
    settings = {"covariance_weight": 100.0, "clamp": 0.75, "steps": 25, "seed": 0}
    edit = {"model": IDENTITY, "layers": [2, 3, 4, 5], "method": "memit", "settings": settings}
    write_steps(folder, **steps, edit=edit, evaluate={"model": IDENTITY, "settings": {"seed": 0}})


def write_edit(folder: Path, **fields: Any) -> None:
    tensors = {f"layer.{layer}.{side}": torch.ones(4, 4) for layer in (2, 3, 4, 5) for side in ("left", "right")}
    residual_norms = [1.0, 0.81, 0.62, 0.39, 0.12]
    residuals = [
        {"layer": layer, "before": residual_norms[i], "after": residual_norms[i + 1], "error": 1e-12, "condition": 4e5}
        for i, layer in enumerate((2, 3, 4, 5))
    ]
    manifest = {
        "method": "memit",
        "mechedit": "0.1.0",
        "layers": [2, 3, 4, 5],
        "model": PROVENANCE,
        "requests": [str(case) for case in range(40)],
        "prefixes": ["{}", "The first thing. {}"],
        "residuals": residuals,
        "left": [0.1] * 40,
        "settings": {"covariance_weight": 100.0, "clamp": 0.75, "steps": 25, "strategy": "uniform"},
        "unconverged": ["7"],
        **fields,
    }
    write_tensors(folder / "edit.safetensors", tensors, "manifest", manifest)
