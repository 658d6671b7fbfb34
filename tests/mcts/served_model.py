"""A small Llama with a byte-level BPE tokenizer, as a server would be given it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mcts.engines.model import Policy, save_policy
from mcts.engines.value_head import ValueHead
from tests.models import SPECIAL, config

DELIMITER = "\n"
LINES = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "Weng earns $12 an hour for babysitting. Yesterday she did 50 minutes of babysitting.\n\n",
    "How many clips did Natalia sell altogether in April and May?\n",
    "She has 12 + 30 = 42 apples left.\nSo the answer is 42.\n",
]


def bpe(size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens, special tokens first; every text can be written in it."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_served(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint (`policy/` and a value head). The newline and EOS are made likely, so that steps end."""
    tokenizer = bpe()
    torch.manual_seed(seed)
    shape = config("llama", len(tokenizer), width=128, context=512)
    shape.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    head = ValueHead(model.config.hidden_size, seed=seed)
    with torch.no_grad():
        head.outer.weight.copy_(torch.randn(1, head.width))
    save_policy(Policy(model, tokenizer, head), folder)
    return folder
