"""Policies on disk: a Hugging Face folder with its tokenizer and, beside it, the value head."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn

from mcts.engines import adapters
from mcts.engines.value_head import FILE, ValueHead
from mcts.types import SettingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
"""What configs call the longest sequence that a model reads."""

NO_TEMPLATE = (TemplateError, TypeError, ValueError, ArithmeticError)
"""What a chat template raises that refuses messages, or is none."""

_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, and no code that lies in a model's folder is run: nobody is asked either."""


class DamagedModel(Exception):
    """Weights that cannot be read; the message is one sentence."""


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
        """Token ids that end a text, ascending: those of the generation config (often several), the tokenizer's, and
        the one that closes an assistant's turn in the chat template (`turn_end`)."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
        ids |= {self.tokenizer.eos_token_id, turn_end(self.tokenizer)}
        return tuple(sorted(int(i) for i in ids if i is not None))

    def hidden(self, token_ids: Tensor, **kwargs: Any) -> Tensor:
        """Final hidden states (after the last norm) of [B, T] token ids: [B, T, d]."""
        out: Tensor = self.model.base_model(input_ids=token_ids, **kwargs).last_hidden_state
        return out

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., d], scaled and capped as the model's config says (Cohere,
        Granite, Gemma)."""
        out: Tensor = self.model.get_output_embeddings()(hidden)
        config = self.model.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            out = out * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:
            out = out / scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            out = torch.tanh(out / cap) * cap
        return out


def turn_end(tokenizer: Any) -> int | None:
    """The special token that closes an assistant's turn in the tokenizer's chat template: often not its EOS token
    (<|im_end|> beside <|endoftext|>, <|eot_id|>). None where there is no template, where it closes turns otherwise,
    or where it refuses a plain exchange of two messages."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = "an answer of the assistant"
    exchange = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
    try:
        _, found, rest = tokenizer.apply_chat_template(exchange, tokenize=False).rpartition(said)
    except NO_TEMPLATE:
        return None
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    if not ids:
        return None
    known = tokenizer.added_tokens_decoder.get(ids[0])
    return int(ids[0]) if known is not None and known.special else None


def cache_name(model: Any) -> str:
    """What a transformers model calls its cache of keys and values, as an argument and in its output: `cache` since
    5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def resolve(name: str | Path) -> Path:
    """The folder that a model's folder or name means. A name is looked up in Hugging Face's local cache; nothing is
    ever downloaded. Raises ModelError that says how to get it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    text = str(name)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise ModelError(f"there is no model folder {name}: give a checkpoint, a Hugging Face folder or a model's name")
    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"there is no model folder {name}, nor a model of that name in the cache {HF_HUB_CACHE}: give a folder, or "
            f"run `hf download {name}` once on a machine with a network (models are never downloaded by a run)"
        ) from error


def _folders(path: str | Path, head: str | Path | None) -> tuple[Path, Path | None]:
    """The Hugging Face folder and the value head's file (None: there is none) that `path` means."""
    root = resolve(path)
    folder = root / "policy" if (root / "policy").is_dir() else root
    if not any((folder / name).is_file() for name in ("config.json", adapters.CONFIG)):
        raise ModelError(f"{folder} is no Hugging Face model folder: it has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer: save the model's tokenizer into the folder")
    if head is not None:
        if not Path(head).is_file():
            raise ModelError(f"there is no value head {head}: give the file or leave it out")
        return folder, Path(head)
    beside = folder.parent / FILE if folder.name == "policy" else folder / FILE
    return folder, beside if beside.is_file() else None


def check_device(device: str) -> None:
    """Raise ModelError where `device` is not on this machine."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return
    counter = getattr(getattr(torch, kind, None), "device_count", None)
    if counter is None:
        raise ModelError(f"there is no device {device!r}: use cpu or cuda")
    count = counter()
    if not count:
        raise ModelError(f"device {device!r} was asked for but there is no GPU here: use device: cpu")
    if number and int(number) >= count:
        raise ModelError(f"device {device!r} was asked for but the last one here is {kind}:{count - 1}: use that")


def check_folder(path: str | Path, context: int | None = None) -> None:
    """Raise ModelError where `path` is no model (folder, or name in the local cache) with weights in safetensors and a
    tokenizer, or where it cannot read `context` tokens. Loads nothing big."""
    folder, _ = _folders(path, None)
    if not (folder / "config.json").is_file():
        check_folder(_base_of(folder), context)
        return
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no weights in safetensors: save them so (pickled ones are never loaded)")
    allowed = context_of(folder)
    if context is not None and allowed is not None and context > allowed:
        raise ModelError(
            f"engine.max_context is {context} and the model {path} reads at most {allowed} tokens: lower max_context"
        )


def context_of(path: str | Path) -> int | None:
    """Longest sequence in tokens that a model's config.json allows; None where it states none."""
    folder, _ = _folders(path, None)
    if not (folder / "config.json").is_file():
        return context_of(_base_of(folder))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is no JSON ({error}): give a Hugging Face model folder") from error
    return next((int(config[name]) for name in _POSITIONS if config.get(name)), None)


def described(path: str | Path) -> Any:
    """The transformers config of a model, or of the base of an adapter; loads no weights. Raises ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder, _ = _folders(path, None)
    if not (folder / "config.json").is_file():
        return described(_base_of(folder))
    try:
        return AutoConfig.from_pretrained(folder, **_OFFLINE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder}/config.json describes no model that transformers knows: {shortly(error)}"
        ) from error


def _base_of(folder: Path) -> str:
    try:
        return adapters.base_of(folder)
    except ValueError as error:
        raise ModelError(str(error)) from error


def load_policy(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    attn: str | None = None,
    head: str | Path | None = None,
    *,
    merge: bool = True,
) -> Policy:
    """Load a policy from a checkpoint (`path/policy` and `path/value_head.safetensors`), its `policy` folder, or
    a plain Hugging Face folder or name, whose head may be given as `head` or lie in the folder. Nothing is ever
    downloaded, and no weights are unpickled.

    `attn` is transformers' name of the attention for plain forwards ("sdpa", "eager", "flash_attention_2"); None: sdpa,
    or eager for a model that has none. A folder that holds a LoRA adapter is loaded onto its base, and merged into its
    weights unless `merge` is false.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the caller's to show
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    check_device(device)
    folder, head_file = _folders(path, head)
    if (folder / "config.json").is_file():
        model, tokenizer = _load(folder, dtype, attn)
    else:
        base = load_policy(_base_of(folder), "cpu", dtype, attn)
        model, tokenizer = base.model, read_tokenizer(folder)
        try:
            adapters.attach(model, folder)
            if merge:
                adapters.merge(model)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"the adapter in {folder} cannot be put on its base model: {error}") from error
    model = model.to(device).eval()
    value_head = None
    if head_file is not None:
        try:
            value_head = ValueHead.load(head_file).to(device).eval()
        except ValueError as error:
            raise DamagedModel(f"the value head cannot be read: {error}") from error
        if value_head.hidden_size != model.config.hidden_size:
            raise ModelError(
                f"{head_file} reads {value_head.hidden_size} hidden units but the policy has "
                f"{model.config.hidden_size}: give the head that was trained with this policy"
            )
    return Policy(model, tokenizer, value_head)


@contextmanager
def _told_if_loaded() -> Iterator[None]:
    """What transformers has to say of a model is said once it is loaded; where it is not, the error says it all."""
    logger, said = logging.getLogger("transformers"), MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [said], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    for record in said.buffer:
        logger.handle(record)


def _load(folder: Path, dtype: str, attn: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    try:
        with _told_if_loaded():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], attn_implementation=attn, **_OFFLINE, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {shortly(error)}") from error
    except SafetensorError as error:
        raise DamagedModel(f"the weights in {folder} are damaged ({error}): restore them from a copy") from error
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {folder} are not those of its config.json, which asks for other shapes: restore one of "
            "the two from a copy"
        ) from error
    return model, read_tokenizer(folder)


def shortly(error: Exception) -> str:
    """What another library has to say, in one line of at most 240 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 240 else said[:237] + "..."


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model; loads nothing big."""
    return read_tokenizer(_folders(path, None)[0])


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a folder. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **_OFFLINE)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {shortly(error)}") from error


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write `folder/policy` (Hugging Face layout, loads anywhere) and, if there is one, the value head beside it.
    Of a policy with a LoRA adapter the adapter and its base's name are written, not the base's weights."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if adapters.has_adapter(policy.model):
        adapters.save(policy.model, root / "policy")
    else:
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
