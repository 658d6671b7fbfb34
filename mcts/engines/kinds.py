"""Whether models of a kind can be served and trained here, told by their config alone: no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcts.engines.model import ModelError, described

WHY = "the torch engine serves decoders with full causal attention only; use the server engine for this model"
_NEEDS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
"""Attention by transformers' name -> the mark of the classes that have it; every class has eager."""


def check_kind(path: str | Path, *, attention: str, served: int | None) -> None:
    """Raise ModelError where the model `path` (folder or name) is none that `check_class` lets pass."""
    config = described(path)
    check_class(kind_of(config), config, attention=attention, served=served)


def check_class(kind: Any, config: Any, *, attention: str, served: int | None) -> None:
    """Raise ModelError where a model of class `kind` is none that learns under `attention`, or that the torch engine
    serves in a context of `served` tokens (None: it need not)."""
    check_text(kind)
    if served is not None:
        check_served(kind, config, served)
    check_attention(kind, attention)


def kind_of(config: Any) -> Any:
    """The class of the causal language models that a transformers config describes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"transformers has no causal language model of type {config.model_type}: choose another model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def check_text(kind: Any) -> None:
    """Raise ModelError where models of class `kind` hold more than one that reads text: its config is in parts then."""
    if "text_config" in (getattr(kind.config_class, "sub_configs", None) or {}):
        raise ModelError(f"{kind.__name__} reads more than text: take a model of its kind that reads text alone")


def check_attention(kind: Any, attention: str) -> None:
    """Raise ModelError where models of class `kind` have no such attention."""
    if not getattr(kind, _NEEDS.get(attention, ""), True):
        raise ModelError(f"{kind.__name__} has no attention {attention!r}: set model.attention: eager")


def check_served(kind: Any, config: Any, context: int) -> None:
    """Raise ModelError where the torch engine cannot serve a model of class `kind` in `context` tokens, as far as its
    class and the cache that its config asks for tell. A window that no sequence outgrows is full attention."""
    from transformers.cache_utils import DynamicCache

    if not getattr(kind, "_supports_attention_backend", False):
        raise ModelError(f"{kind.__name__} does not use transformers' attention interface: {WHY}")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{kind.__name__} caps its attention's scores: {WHY}")
    try:
        cache = DynamicCache(config=config)
    except ValueError as error:
        raise ModelError(f"the config of this {kind.__name__} describes no layers ({error}): correct it") from error
    check_layers(kind.__name__, cache, context)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context and getattr(config, "use_sliding_window", True):
        raise ModelError(_narrow(kind.__name__, window))


def check_layers(name: str, cache: Any, context: int) -> None:
    """Raise ModelError where a layer of a model's cache keeps anything but the keys and values of every token."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.sliding_window < context:
                raise ModelError(_narrow(name, layer.sliding_window))
        elif type(layer) is not DynamicLayer:
            raise ModelError(f"{name} has recurrent or other layers without keys and values of their own: {WHY}")


def _narrow(name: str, window: int) -> str:
    return f"{name} has a sliding window of {window} tokens: lower engine.max_context to that; otherwise {WHY}"
