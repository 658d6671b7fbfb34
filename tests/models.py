"""Tiny models made on the spot: no download, random weights, one token per word or real byte-pair tokenizers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mcts.engines.model import Policy, load_policy, save_policy
from mcts.engines.value_head import ValueHead

SPECIAL = ("<pad>", "<eos>", "<unk>")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
"""Public data beside the checkout; tests that need it skip where it is absent."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Step one.\n\nStep two: 3 + 4 = 7\n",
    "a\n\n\nb\n\n- c.\n\n- d",
    "So 12 * 3 = 36.\n\n#### 36",
    "It is so.\nIt is not.\nEnd.\n",
] * 40
"""What a byte-pair tokenizer is trained on where the public data are not there."""


def words(count: int = 100) -> list[str]:
    """A Countdown vocabulary: operators, punctuation and the numbers 0 to count - 1."""
    return ["->", ":", "|", ";", "=", "+", "-", "*", "/", *map(str, range(count))]


def tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer over whitespace-separated words, special tokens first."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *vocabulary])}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@cache
def _gsm8k_texts(count: int = 1000) -> tuple[str, ...]:
    """Questions and solutions, with lines and blank lines between steps; where they are absent, the project's own
    licence and README, so that the tokenizer is one of the same kind and size."""
    file = GSM8K / "train.jsonl"
    if not file.exists():
        root = Path(__file__).resolve().parents[1]
        own = [(root / name).read_text(encoding="utf-8") for name in ("LICENSE", "README.md")]
        return tuple([*TEXTS, *own] + [text.replace("\n", "\n\n") for text in own])
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
    found = [f"{row['question']}\n{row['answer']}\n" for row in rows]
    return tuple(found + [text.replace("\n", "\n\n") for text in found[:200]])


@cache
def _bpe(size: int) -> str:
    """A byte-level BPE tokenizer trained on GSM8K text, as JSON. Its pre-tokenizer splits at words only, as Qwen's and
    Llama's do, so that punctuation and runs of line ends merge into one token (".\n\n", "\n\n\n")."""
    from tokenizers import Regex

    core = Tokenizer(BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        _gsm8k_texts(),
        BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    text: str = core.to_str()
    return text


def bpe_tokenizer(size: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, as Qwen's base models ship: the EOS token is <|endoftext|>, a
    turn ends with <|im_end|>. Trained once per session."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(size)),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def make_bpe_policy(
    family: str = "llama", seed: int = 0, head: bool = True, scale: float = 4.0, **sizes: int
) -> Policy:
    """As `make_policy`, with a byte-pair tokenizer."""
    return make_policy(family, seed, head, scale, tok=bpe_tokenizer(), **sizes)


def config(
    family: str, vocabulary: int, width: int = 32, layers: int = 2, context: int = 256, tied: bool = True
) -> PreTrainedConfig:
    """The configuration of a tiny model of one of FAMILIES; the Qwen ones and Llama share KV heads among queries."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=4,
            bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    extra: dict[str, Any] = {"head_dim": width // 4} if family == "qwen3" else {}
    return kind(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, **extra,
    )  # fmt: skip


def make_policy(
    family: str = "llama", seed: int = 0, head: bool = True, scale: float = 4.0, vocabulary: list[str] | None = None,
    tok: Any = None, **sizes: int,
) -> Policy:  # fmt: skip
    """A tiny policy with random weights. `scale` sharpens its distributions, so that differences show."""
    tok = tokenizer(words() if vocabulary is None else vocabulary) if tok is None else tok
    torch.manual_seed(seed)
    settings = config(family, len(tok), **sizes)
    if tok.eos_token_id != settings.eos_token_id:
        settings.eos_token_id = tok.eos_token_id
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(scale)
    value_head = ValueHead(model.config.hidden_size, seed=seed) if head else None
    if value_head is not None:
        with torch.no_grad():
            value_head.outer.weight.copy_(torch.randn(1, value_head.width))
    return Policy(model, tok, value_head)


def save_model(folder: str | Path, family: str = "llama", **kwargs: Any) -> Path:
    """Write a tiny checkpoint (`folder/policy`, `folder/value_head.safetensors`) and return `folder`."""
    save_policy(make_policy(family, **kwargs), folder)
    return Path(folder)


__all__ = [
    "FAMILIES", "GSM8K", "bpe_tokenizer", "config", "load_policy", "make_bpe_policy", "make_policy", "save_model",
    "tokenizer", "words",
]  # fmt: skip
