"""Tiny models made on the spot: no download, random weights, one token per word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
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


def config(family: str, vocabulary: int, width: int = 32, layers: int = 2, context: int = 256) -> PreTrainedConfig:
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
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, **extra,
    )  # fmt: skip


def make_policy(
    family: str = "llama", seed: int = 0, head: bool = True, scale: float = 4.0, vocabulary: list[str] | None = None,
    **sizes: int,
) -> Policy:  # fmt: skip
    """A tiny policy with random weights. `scale` sharpens its distributions, so that differences show."""
    tok = tokenizer(words() if vocabulary is None else vocabulary)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, len(tok), **sizes), attn_implementation="sdpa").eval()
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


__all__ = ["FAMILIES", "config", "load_policy", "make_policy", "save_model", "tokenizer", "words"]
