"""A small untrained model folder for a task whose words are known: a Llama and a tokenizer with one token per word."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay.errors import UserError

PAD = "<pad>"
EOS = "<eos>"

ARCHITECTURE: dict[str, int | float | bool] = {
    "width": 96,
    "layers": 3,
    "heads": 4,
    "kv_heads": 0,
    "intermediate": 0,
    "max_positions": 256,
    "rope_theta": 10000.0,
    "tie_embeddings": False,
}
"""Settings and their defaults. `kv_heads` 0: as many as heads; `intermediate` 0: 8/3 of the width, up to a multiple
of 16 (the SwiGLU rule)."""


def build_fresh_model(
    folder: str | Path, vocabulary: Sequence[str], architecture: Mapping[str, Any], seed: int
) -> None:
    """Write a randomly initialised LlamaForCausalLM in fp32 and its tokenizer in Hugging Face layout.

    Token ids: 0 pad, 1 EOS, then `vocabulary` in order. No token is put before a prompt, decoding joins words by
    single spaces, and a word outside the vocabulary is an error, never an unknown token. The same arguments give
    the same bytes; torch's own random state is left as it was. The folder appears at once, complete.

    Raises UserError: an unknown or impossible setting, a vocabulary that cannot be split at white space, or a
    folder that holds something already.
    """
    settings = _settings(architecture)
    _check_vocabulary(vocabulary)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder: choose another for the fresh model")
    building = target.with_name(target.name + ".building")
    if building.exists():
        shutil.rmtree(building)
    building.mkdir(parents=True)
    _save_tokenizer(building, vocabulary, int(settings["max_positions"]))
    _save_model(building, fresh_config(len(vocabulary) + 2, architecture), seed)
    os.replace(building, target)


def check_architecture(architecture: Mapping[str, Any], context: int) -> None:
    """Raise UserError for an unknown or impossible setting, or for a model that cannot read `context` tokens."""
    allowed = int(_settings(architecture)["max_positions"])
    if context > allowed:
        raise UserError(
            f"engine.max_context is {context} and the fresh model reads at most {allowed} tokens: lower it, or raise "
            "model.fresh.max_positions"
        )


def _settings(architecture: Mapping[str, Any]) -> dict[str, int | float | bool]:
    settings = dict(ARCHITECTURE)
    for key, value in architecture.items():
        if key not in ARCHITECTURE:
            near = difflib.get_close_matches(str(key), ARCHITECTURE, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}" if near else f"choose one of {', '.join(ARCHITECTURE)}"
            raise UserError(f"a fresh model has no setting {key!r}: {hint}")
        kind = type(ARCHITECTURE[key])
        right = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not right or (kind is not bool and (isinstance(value, bool) or value < 0)):
            raise UserError(f"fresh model: {key} must be of the kind of {ARCHITECTURE[key]!r}, not {value!r}")
        settings[key] = value
    width, heads = int(settings["width"]), int(settings["heads"])
    settings["kv_heads"] = settings["kv_heads"] or heads
    settings["intermediate"] = settings["intermediate"] or -(-8 * width // 48) * 16
    for key in ("width", "layers", "heads", "max_positions", "rope_theta"):
        if settings[key] <= 0:
            raise UserError(f"fresh model: {key} must be above 0")
    if width % heads or (width // heads) % 2:
        raise UserError(f"fresh model: width {width} must be an even multiple of heads {heads}, for rotary positions")
    if heads % int(settings["kv_heads"]):
        raise UserError(f"fresh model: heads {heads} must be a multiple of kv_heads {settings['kv_heads']}")
    return settings


def _check_vocabulary(vocabulary: Sequence[str]) -> None:
    if not vocabulary:
        raise UserError("a fresh model needs at least one word: this task has no vocabulary, so give model.path")
    seen = {PAD, EOS}
    for word in vocabulary:
        if word in seen or word.split() != [word]:
            raise UserError(f"word {word!r} is in the vocabulary twice, or has white space in it")
        seen.add(word)


def _save_tokenizer(folder: Path, vocabulary: Sequence[str], max_positions: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: k for k, word in enumerate([PAD, EOS, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def fresh_config(words: int, architecture: Mapping[str, Any]) -> Any:
    """The LlamaConfig of a fresh model for a vocabulary of `words`, pad and EOS included. Raises UserError."""
    from transformers import LlamaConfig

    settings = _settings(architecture)
    return LlamaConfig(
        vocab_size=words,
        hidden_size=int(settings["width"]),
        intermediate_size=int(settings["intermediate"]),
        num_hidden_layers=int(settings["layers"]),
        num_attention_heads=int(settings["heads"]),
        num_key_value_heads=int(settings["kv_heads"]),
        max_position_embeddings=int(settings["max_positions"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(settings["rope_theta"])},
        tie_word_embeddings=bool(settings["tie_embeddings"]),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _save_model(folder: Path, config: Any, seed: int) -> None:
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # its one shard is written in no time
    model.should_save_on_this_rank = lambda _main: True  # each of a group of learners builds its own
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
