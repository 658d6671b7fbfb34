"""LoRA adapters (peft): put onto a model's own layers, read, written and merged. The model keeps its class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = "default"


def base_of(folder: Path) -> str:
    """The folder or name of the model that the adapter in `folder` was trained on; ValueError where it names none."""
    facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    if not name:
        raise ValueError(f"{folder / CONFIG} names no base model: write it as base_model_name_or_path")
    return str(name)


def has_adapter(model: Any) -> bool:
    """Whether a model carries an adapter that was not merged."""
    return bool(getattr(model, "peft_config", None))


def add(model: Any, base: str, *, rank: int, alpha: float, targets: Any) -> None:
    """Put a new adapter onto `model`, whose folder or name is `base`: the function stays what it was (B is zero), the
    base's weights are frozen, the adapter's are float32 and trainable. ValueError where no layer matches `targets`
    (a list of name endings, or "all-linear": every linear layer but the output's)."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights so
    )
    inject_adapter_in_model(config, model, _NAME)
    model.peft_config = {_NAME: config}


def attach(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` onto its base model, trainable. ValueError where its weights do not fit."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(folder))
    inject_adapter_in_model(config, model, _NAME)
    model.peft_config = {_NAME: config}
    found = set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=_NAME)
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        raise ValueError(f"its weights do not fit ({[*missing, *found.unexpected_keys][0]}): give the base it is of")


def save(model: Any, folder: Path) -> None:
    """Write a model's adapter in peft's layout, with its base's name; the base's weights are not written."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    named = {f"base_model.model.{name.removeprefix('base_model.model.')}": t for name, t in weights.items()}
    save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, folder / WEIGHTS)
    model.peft_config[_NAME].save_pretrained(str(folder))


def merge(model: Any) -> None:
    """Fold a model's adapter into its weights and take it off: a plain model of the same function (up to rounding in
    its dtype)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            base: nn.Module = module.get_base_layer()
            setattr(model.get_submodule(parent), leaf, base)
    if has_adapter(model):
        del model.peft_config
    model.requires_grad_(True)
