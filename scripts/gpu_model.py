"""A Qwen2 of the published shapes with random weights, and a byte-pair tokenizer as large as Qwen's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
}  # fmt: skip
"""Qwen2.5's, with tied embeddings; `tiny` is for trying the scripts."""
LINE = 40
"""One token in so many ends a line."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(folder: Path, shape: Mapping[str, int], texts: Path, seed: int = 0) -> Path:
    """Save the model, in bfloat16, and its tokenizer to `folder`. `texts`: JSON Lines with a question and an answer."""
    made = tokenizer(texts, shape["vocab_size"])
    made.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        **shape,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=made.eos_token_id,
        bos_token_id=None,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def tokenizer(texts: Path, size: int) -> PreTrainedTokenizerFast:
    """Trained on `texts` and filled up to `size` tokens with joined pairs, one in LINE of them ending a line."""
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    core = Tokenizer(BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        [f"{row['question']}\n{row['answer']}\n" for row in rows],
        BpeTrainer(
            vocab_size=min(3000, size),
            special_tokens=[AddedToken(token, special=True) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    facts: dict[str, Any] = json.loads(core.to_str())
    vocabulary: dict[str, int] = facts["model"]["vocab"]
    merges: list[list[str]] = facts["model"]["merges"]
    for left, right in itertools.islice(_pairs(vocabulary, len(special)), size - len(vocabulary)):
        merges.append([left, right])
        vocabulary[left + right] = len(vocabulary)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)),
        eos_token=special[0],
        pad_token=special[0],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def _pairs(vocabulary: Mapping[str, int], first: int) -> Iterator[tuple[str, str]]:
    """Pairs of tokens whose join is no token yet."""
    known = set(vocabulary)
    words = sorted(vocabulary, key=lambda token: vocabulary[token])[first:]
    letters = [word for word in words if word.isalpha() and "Ċ" not in word]
    lines = iter(letters)
    for number, (left, right) in enumerate(itertools.product(letters, letters)):
        if number % LINE == 0 and (end := next(lines, None)) is not None:
            left, right = end, "Ċ"
        if left + right not in known:
            known.add(left + right)
            yield left, right
