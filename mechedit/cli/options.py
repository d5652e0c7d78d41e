"""Options that several commands share: their types and what --help says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechedit.data.loading import Conflicts

ModelName = Annotated[str, typer.Option(help="tiny, a hub name or a folder")]
Out = Annotated[Path, typer.Option(help="folder for the results")]
FactsFile = Annotated[str, typer.Option(help="known (ships with the package), known_1000, or a file of facts")]
RequestsFile = Annotated[
    str,
    typer.Option(
        help="tiny (ships with the package), counterfact, multi_counterfact, zsre, or a file of edit requests"
    ),
]
ConflictsKept = Annotated[
    Conflicts,
    typer.Option(help="requests for different objects of one subject and relation: refuse, or keep the first"),
]
Texts = Annotated[str, typer.Option(help="tiny, a .txt or .jsonl file, or a datasets name")]
Layers = Annotated[str | None, typer.Option(help="such as 3-8 or 3,5,7; overrules the selection")]
Method = Annotated[str, typer.Option(help="editing method")]
Backend = Annotated[str, typer.Option(help="transformer_lens or nnsight")]
Device = Annotated[str | None, typer.Option(help="such as cpu; the accelerator when there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")]
Seed = Annotated[int, typer.Option(help="seed of all that is drawn")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace results of other settings")]
Json = Annotated[bool, typer.Option("--json", help="print the summary on stdout")]
MaxFacts = Annotated[int | None, typer.Option(help="trace a seeded sample of so many facts")]
Samples = Annotated[int, typer.Option(help="noise samples a fact")]
Sever = Annotated[str, typer.Option(help="some of nothing,mlp,attn, also such as mlp@3 or attn:last")]
Kinds = Annotated[str, typer.Option(help="what to restore: some of state,mlp,attn")]
TraceWindow = Annotated[int | None, typer.Option("--window", help="layers in a window of MLP or attention outputs")]
Roles = Annotated[str | None, typer.Option(help="tokens to restore, such as subject_last,last; all by default")]
Noise = Annotated[float, typer.Option(help="noise, in units of the subject embeddings' standard deviation")]
CorruptionName = Annotated[
    str, typer.Option("--corruption", help="gaussian, multivariate, student, uniform, or tokens of another subject")
]
Replace = Annotated[bool, typer.Option("--replace", help="noise in place of the embedding, not added to it")]
ExtraTokens = Annotated[int, typer.Option(help="tokens after the subject that are corrupted too")]
Metrics = Annotated[
    str, typer.Option(help="some of probability,log_probability,logit_difference,kl, each also after normalized_")
]
Memory = Annotated[float | None, typer.Option(help="most GiB beside the weights")]
Rule = Annotated[str, typer.Option(help="rule that chooses the layers")]
Share = Annotated[float, typer.Option(help="part of the evidence that the range must hold, as the rule means it")]
MinWidth = Annotated[int | None, typer.Option(help="fewest layers")]
MaxWidth = Annotated[int | None, typer.Option(help="most layers")]
Width = Annotated[int | None, typer.Option(help="layers of moving-average, and of the windows that are swept")]
By = Annotated[str, typer.Option(help="trace, sweep or both: what chooses the layers; the last two sweep")]
Windows = Annotated[
    str | None, typer.Option(help="windows to sweep, such as 1-4,2-5; by default all as wide as selected")
]
ValidateRequests = Annotated[int, typer.Option(help="requests to sweep with, about subjects that were not traced")]
MomentTokens = Annotated[int | None, typer.Option(help="stop after so many tokens of text")]
MaxLength = Annotated[int, typer.Option(help="tokens of a document that are read")]
Shard = Annotated[str | None, typer.Option(help="collect one process's part of the text, such as 0/4; then --merge")]
Merge = Annotated[bool, typer.Option("--merge", help="add up the parts of all processes that lie in --out")]
ConvergenceCurve = Annotated[
    bool, typer.Option("--convergence", help="also write how the moments settle: moments/convergence.parquet")
]
Weight = Annotated[float, typer.Option(help="weight of the second moment in the update that --convergence measures")]
CheckpointSeconds = Annotated[float, typer.Option(help="seconds between checkpoints")]
Setting = Annotated[list[str] | None, typer.Option("--set", help="a setting of the method: name=value")]
GenerationPrompts = Annotated[int | None, typer.Option(help="free texts a request for GE; all its prompts by default")]
HeldOut = Annotated[
    str | None, typer.Option("--texts", help="texts to measure perplexity on, other than those of the moments")
]
MaxTexts = Annotated[int, typer.Option(help="how many of the texts, from the first on")]
Config = Annotated[Path | None, typer.Option(help="YAML or JSON file with the same names")]
