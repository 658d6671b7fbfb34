"""Policies on disk: a Hugging Face folder with its tokenizer and, beside it, the value head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcts.engines.value_head import FILE, ValueHead
from mcts.types import SettingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(SettingError):
    """A model that cannot be loaded; the message is one sentence that says what to do."""


@dataclass(slots=True)
class Policy:
    """A causal language model, its tokenizer and its value head."""

    model: Any
    """A transformers AutoModelForCausalLM, in evaluation mode."""
    tokenizer: Any
    head: ValueHead | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, ascending: the generation config's and the tokenizer's."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
        return tuple(sorted(int(i) for i in ids | {self.tokenizer.eos_token_id} if i is not None))

    def hidden(self, token_ids: Tensor, **kwargs: Any) -> Tensor:
        """Final hidden states (after the last norm) of [B, T] token ids: [B, T, d]."""
        out: Tensor = self.model.base_model(input_ids=token_ids, **kwargs).last_hidden_state
        return out

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., d]."""
        out: Tensor = self.model.get_output_embeddings()(hidden)
        return out


def cache_name(model: Any) -> str:
    """What a transformers model calls its cache of keys and values, as an argument and in its output: `cache` since
    5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def _folders(path: str | Path, head: str | Path | None) -> tuple[Path, Path | None]:
    """The Hugging Face folder and the value head's file (None: there is none) that `path` means."""
    root = Path(path)
    if not root.is_dir():
        raise ModelError(f"there is no model folder {root}: give a checkpoint or a Hugging Face folder")
    folder = root / "policy" if (root / "policy").is_dir() else root
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no Hugging Face model folder: it has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer: save the model's tokenizer into the folder")
    if head is not None:
        if not Path(head).is_file():
            raise ModelError(f"there is no value head {head}: give the file or leave it out")
        return folder, Path(head)
    beside = folder.parent / FILE if folder.name == "policy" else folder / FILE
    return folder, beside if beside.is_file() else None


def check_folder(path: str | Path) -> None:
    """Raise ModelError where `path` is no model folder with a tokenizer. Loads nothing."""
    _folders(path, None)


def load_policy(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    attn: str = "sdpa",
    head: str | Path | None = None,
) -> Policy:
    """Load a policy from a checkpoint (`path/policy` and `path/value_head.safetensors`), its `policy` folder, or
    a plain Hugging Face folder, whose head may be given as `head` or lie in it. Nothing is ever downloaded.

    `attn` is transformers' name of the attention for plain forwards ("sdpa" or "eager").
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the caller's to show
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r} was asked for but there is no GPU here: use device: cpu")
    folder, head_file = _folders(path, head)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attn, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    model = model.to(device).eval()
    value_head = None
    if head_file is not None:
        value_head = ValueHead.load(head_file).to(device).eval()
        if value_head.hidden_size != model.config.hidden_size:
            raise ModelError(
                f"{head_file} reads {value_head.hidden_size} hidden units but the policy has "
                f"{model.config.hidden_size}: give the head that was trained with this policy"
            )
    return Policy(model, tokenizer, value_head)


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write `folder/policy` (Hugging Face layout, loads anywhere) and, if there is one, the value head beside it."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(root / "policy")
    policy.tokenizer.save_pretrained(root / "policy")
    if policy.head is not None:
        policy.head.save(root / FILE)


def copy_weights(source: nn.Module, target: nn.Module, what: str) -> None:
    """Copy `source`'s weights into `target` in place; ValueError where their shapes differ."""
    new, old = source.state_dict(), target.state_dict()
    if {name: t.shape for name, t in new.items()} != {name: t.shape for name, t in old.items()}:
        raise ModelError(f"the new {what} has another shape than the one in use: start a new engine for it")
    with torch.no_grad():
        for name, tensor in old.items():
            tensor.copy_(new[name])
