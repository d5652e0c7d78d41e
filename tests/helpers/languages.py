"""Tokenizers of the kinds that checkpoints have, texts of many scripts and forms, and small models that know them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PAIRS = [("France", "Paris"), ("Peru", "Lima"), ("Norway", "Oslo"), ("Kenya", "Nairobi")]


@dataclass(frozen=True)
class Form:
    """A kind of text: prompts with `{}` for their subjects, and the objects exactly as they follow."""

    prompt: str
    pairs: tuple[tuple[str, str], ...]
    end: str = ""
    """Text after the object."""

    @property
    def texts(self) -> list[str]:
        """The prompts with their objects."""
        return [self.prompt.replace("{}", subject) + target + self.end for subject, target in self.pairs]


def _pairs(before: str = "", pairs: Any = PAIRS) -> tuple[tuple[str, str], ...]:
    return tuple((subject, before + target) for subject, target in pairs)


FORMS = {
    "english": Form("The capital of {} is", _pairs(" "), "."),
    "chinese": Form("大家知道{}的首都是", (("法国", "巴黎"), ("秘鲁", "利马"), ("挪威", "奥斯陆")), "。"),
    "japanese": Form(
        "みんなが{}の首都は", (("フランス", "パリ"), ("ペルー", "リマ"), ("ケニア", "ナイロビ")), "です。"
    ),
    "arabic": Form("عاصمة {} هي مدينة", (("فرنسا", " باريس"), ("بيرو", " ليما"), ("كينيا", " نيروبي")), "."),
    "hindi": Form("{} की राजधानी का नाम", (("फ्रांस", " पेरिस"), ("पेरू", " लीमा"), ("नॉर्वे", " ओस्लो")), "।"),
    "quote": Form('People of {} call it "', _pairs(), '"'),
    "bracket": Form("The seat of {} (", _pairs(), ")"),
    "newline": Form("Question: where does {} sit?\nAnswer:\n", _pairs(), "\n"),
    "own newline": Form("Name the town of {}:", _pairs("\n"), "\n"),
    "chatml": Form(CHATML.format("Where is {} ruled?"), _pairs(), "<|im_end|>"),
    "emoji": Form("The word for {} reads", (("🗼🇫🇷", " tower"), ("🦙", " llama"), ("👩\u200d🔬", " scientist")), "."),
    "subject first": Form("{} has the first city", _pairs(" "), "."),
    "subject twice": Form("Kenya and Peru asked whether {} is ruled from", _pairs(" "), "."),
}

_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer cuts text into words."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def training_texts() -> list[str]:
    """All texts of all forms."""
    return [text for form in FORMS.values() for text in form.texts]


def byte_level(split: str | None = None, *, bos: str | None = None, nfc: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with `split` as Qwen's (`nfc`), and with a beginning token as Llama 3's.

    Args:
        split: how text is cut into words; None for GPT-2's way.
        bos: beginning token that every text gets.
        nfc: compose characters first.
    """
    bpe = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    words = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*words, byte])
    if nfc:
        bpe.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, trainers.BpeTrainer, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trimmed = processors.ByteLevel(trim_offsets=split is None)
    bpe.post_processor = processors.Sequence([trimmed, _template(bpe, bos)]) if bos else trimmed
    return _fast(bpe, bos_token=bos, eos_token="<|endoftext|>")


def qwen() -> Qwen2Tokenizer:
    """Qwen's kind, by transformers' own class: the class makes normalizer and words, and only the merges are ours."""
    trained = json.loads(byte_level(PRETOKENIZE_REGEX, nfc=True).backend_tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], model_max_length=128,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def sentencepiece(*, prepend: bool, end: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's kind, whose normalizer puts one more space in front (`prepend`), or Gemma's, which does not.

    Characters that it does not know become bytes. With `end` it appends an end token to every text.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prepend else [spaces])
    # While merges are learned, text is cut at spaces; afterwards it is not, as in these checkpoints.
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    _train(bpe, trainers.BpeTrainer, ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *_BYTES], **_alphabet())
    if not prepend:
        bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        bpe.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    bpe.post_processor = _template(bpe, "<s>", "</s>" if end else None)
    return _fast(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _alphabet() -> dict[str, Any]:
    """Every third letter is left to its bytes. Left to the trainer, ties would be broken by chance."""
    letters = sorted(set("".join(training_texts()).replace(" ", "▁")))
    known = [letter for index, letter in enumerate(letters) if index % 3 or letter in "▁:\n"]
    return {"initial_alphabet": known, "limit_alphabet": len(known)}


def _train(bpe: Tokenizer, trainer: Any, special: list[str], **options: Any) -> None:
    settings = {"vocab_size": 700 + len(special), "special_tokens": special, "show_progress": False, **options}
    bpe.train_from_iterator(_words() * 2, trainer(**settings))


def _words() -> list[str]:
    """Words to learn merges from, each by itself: in so little text, whole sentences would be merged otherwise."""
    parts = [part for form in FORMS.values() for part in [*form.prompt.split("{}"), form.end]]
    names = [name for form in FORMS.values() for pair in form.pairs for name in (pair[0], pair[1].strip("\n"))]
    return [*names, *(word for part in parts for word in re.findall(r":\n| ?[a-zA-Z]+|[^\sa-zA-Z] ?", part))]


def _template(bpe: Tokenizer, bos: str, end: str | None = None) -> Any:
    special = [(token, bpe.token_to_id(token)) for token in (bos, end) if token]
    return processors.TemplateProcessing(single=f"{bos} $A {end or ''}".strip(), special_tokens=special)


def _fast(bpe: Tokenizer, **special: str | None) -> PreTrainedTokenizerFast:
    named = {name: token for name, token in special.items() if token}
    extra = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=named["eos_token"],
        additional_special_tokens=extra,
        model_max_length=128,
        **named,
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt2-like": byte_level,
    "llama2-like": lambda: sentencepiece(prepend=True),
    "llama3-like": lambda: byte_level(_DIGITS, bos="<|begin_of_text|>"),
    "gemma-like": lambda: sentencepiece(prepend=False),
    "qwen-like": qwen,
}


@cache
def speaker(kind: str) -> tuple[Any, Any]:
    """A model of 64 channels that knows the texts of all forms by heart, and its tokenizer of a kind."""
    tokenizer = TOKENIZERS[kind]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    learn(hf, [tokenizer(text)["input_ids"] for text in training_texts()])
    return hf, tokenizer


def learn(hf: Any, rows: list[list[int]], *, steps: int = 90, lr: float = 1.2e-2) -> None:
    """Train a model until it knows the rows: all of them in each step, short and long ones apart for less padding."""
    ordered = sorted(rows, key=len)
    middle = len(rows) * 3 // 5
    batches = [_batch(half) for half in (ordered[:middle], ordered[middle:])]
    count = sum(len(row) - 1 for row in rows)
    optimizer = torch.optim.AdamW(hf.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    hf.train()
    for _ in range(steps):
        for ids, labels in batches:
            hf(ids, labels=labels, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    hf.eval()


def _batch(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids, and labels, which padding has none of."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    return ids, ids.where(torch.arange(ids.shape[1]) < lengths, -100)
