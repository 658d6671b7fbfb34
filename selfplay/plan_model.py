"""What a model weighs, without loading it: it is built on the meta device, which holds shapes and no numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM

from mcts.engines import adapters
from mcts.engines.kinds import check_class
from mcts.engines.model import DTYPES, ModelError, resolve, shortly
from mcts.engines.value_head import ValueHead
from mcts.tasks import load_task
from selfplay.config import Config
from selfplay.errors import UserError
from selfplay.fresh import fresh_config
from selfplay.optimizers import split_parameters

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRACED: Final = 64
"""Tokens by which the two forwards differ that activations are counted in."""
_ATTENTION: Final = "plan_counted"


class PlanError(UserError):
    """A plan that cannot be made, or a run that cannot fit; the message is one sentence that says what to change."""


class _Fused(torch.autograd.Function):
    """Stands in for fused attention: keeps what that keeps (inputs, output, a float32 per query), computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, H, T, D], [B, G, T, D] twice
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention on the meta device is only counted")


def _counted_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    # as transformers does under a mask: each key-value head is copied for every query head that shares it
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out: Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arithmetic of a plan needs to know of a model."""

    name: str
    """Model type, width and layers, for people."""
    parameters: int
    trainable: int
    """Of the model, or of its adapters; the value head left out."""
    head_parameters: int
    weights: int
    """Bytes, in `model.dtype`."""
    adapters: int
    """Bytes of LoRA adapters, float32; 0: there are none."""
    gradients: int
    edge: int
    """Bytes of the output layer's gradient, which is made before those of the layers; 0: it is not trained."""
    optimizer: int
    """Bytes of the optimiser's state, the value head's included."""
    layers: int
    width: int
    kv_heads: int
    head_size: int
    heads: int
    vocabulary: int
    positions: int
    """Longest context that the architecture allows."""
    activation: int
    """Bytes that the trunk keeps per token for the backward pass, without gradient checkpointing."""


def architecture(config: Config) -> Any:
    """The transformers config of the run's model: of `model.path` where that is here, else of
    `plan.architecture`, else that of a fresh model for the task's vocabulary. Raises PlanError."""
    path, stated = config.model.path, config.plan.architecture
    folder = None if path is None else model_folder(path)
    if folder is not None:
        return _read(folder)
    if isinstance(stated, str):
        return _read(Path(stated))
    if stated is not None:
        return _make(stated, "plan.architecture")
    if path is not None:
        raise PlanError(f"the model {path} is not here; get it, or state plan.architecture to plan without it")
    task = load_task(config.task.name, **config.task.settings)
    return fresh_config(len(task.vocabulary()) + 2, config.model.fresh)


def model_folder(path: str) -> Path | None:
    """The folder here that holds the config.json of a model (a folder, a checkpoint, a name in the local cache) or of
    the one that an adapter was trained on; None: it is not here."""
    try:
        root = resolve(path)
        for folder in (root, root / "policy"):
            if (folder / "config.json").is_file():
                return folder
            if (folder / adapters.CONFIG).is_file():
                base = adapters.base_of(folder)
                return None if base == path else model_folder(base)
    except (ModelError, ValueError):
        return None
    return None


def _read(folder: Path) -> Any:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {folder}/config.json: {error}; give a Hugging Face model folder") from error
    if not isinstance(facts, dict):
        raise PlanError(f"{folder}/config.json holds no JSON object; give a Hugging Face model folder")
    return _make(facts, f"{folder}/config.json")


def _make(facts: Mapping[str, Any], where: str) -> Any:
    known = dict(facts)
    kind = known.pop("model_type", None)
    if not isinstance(kind, str):
        raise PlanError(f"{where} names no model_type, such as qwen2; add it")
    try:
        return AutoConfig.for_model(kind, **known)
    except ValueError as error:
        if kind not in CONFIG_MAPPING:
            raise PlanError(f"{where}: transformers knows no model_type {kind!r}") from error
        raise PlanError(f"{where} is no {kind}: {shortly(error)}") from error
    except (StrictDataclassError, TypeError, ArithmeticError) as error:  # a width of 0, a text for a number
        raise PlanError(f"{where} is no {kind}: {shortly(error)}") from error


def shape_of(config: Config) -> Shape:
    """Sizes of the run's model and of what training it takes. Raises PlanError; ModelError for one of a kind that
    cannot be served or trained here."""
    found = architecture(config)
    dtype = config.model.dtype
    low = config.learn.precision == "bfloat16"
    try:
        model = meta_model(found, dtype)
        found = model.config
        served = config.engine.max_context if config.engine.kind == "torch" else None
        check_class(type(model), found, attention=config.model.attention, served=served)
        activation = autocast_activation_bytes(found, dtype) if low else activation_bytes(model)
    except ModelError:
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        what = shortly(error)
        raise PlanError(f"no causal language model can be planned from this architecture: {what}") from error
    head = ValueHead(int(found.hidden_size), config.model.value_width)
    head_parameters = sum(p.numel() for p in head.parameters())
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    lora = config.model.lora
    adapters: list[Tensor] = []
    trainable: list[Tensor] = []
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    if getattr(config.model, "freeze_trunk", False):
        pass  # the value head alone
    elif lora is None:
        trainable = parameters
        muon = config.learn.optimizer.name == "muon"
        hidden, rest = split_parameters(model) if muon else ([], parameters)
    else:
        adapters = lora_parameters(model, lora.rank, lora.targets)
        trainable = adapters
        rest = adapters
    rest = [*rest, *head.parameters()]
    heads = int(found.num_attention_heads)
    output = model.get_output_embeddings().weight
    return Shape(
        name=f"{found.model_type}, width {found.hidden_size}, {found.num_hidden_layers} layers",
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        head_parameters=head_parameters,
        weights=weights,
        adapters=_bytes(adapters),
        gradients=_bytes([*trainable, *head.parameters()]),
        edge=_bytes([output]) if any(output is p for p in trainable) else 0,
        optimizer=optimizer_bytes(hidden, rest),
        layers=int(found.num_hidden_layers),
        width=int(found.hidden_size),
        kv_heads=int(getattr(found, "num_key_value_heads", None) or heads),
        head_size=int(getattr(found, "head_dim", None) or found.hidden_size // heads),
        heads=heads,
        vocabulary=int(output.shape[0]),
        positions=int(getattr(found, "max_position_embeddings", 0) or 0),
        activation=activation,
    )


def meta_model(found: Any, dtype: str) -> Any:
    """The causal language model of a transformers config, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found, dtype=DTYPES[dtype])


def lora_parameters(model: nn.Module, rank: int, targets: str | Sequence[str]) -> list[Tensor]:
    """The matrices that adapters of `rank` add: A [rank, in] and B [out, rank] per target, in float32 as peft keeps
    them. `targets`: names of layers (the last part of their path), or "all-linear": all but the output layer."""
    output = id(getattr(model, "get_output_embeddings", lambda: None)())
    found: list[Tensor] = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        wanted = id(module) != output if targets == "all-linear" else last in targets
        if not wanted or not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim != 2:
            continue
        if isinstance(module, nn.Embedding):
            continue
        rows, columns = module.weight.shape
        sides = ((rank, columns), (rows, rank))
        found += [torch.empty(side, dtype=torch.float32, device="meta") for side in sides]
    if not found:
        raise PlanError(f"the model has no layer that model.lora.targets {targets!r} names; check their names")
    return found


def optimizer_bytes(hidden: Sequence[Tensor], rest: Sequence[Tensor]) -> int:
    """State of Muon over `hidden` (one buffer) and AdamW over `rest` (two, and a float32 step count each)."""
    return _bytes(hidden) + 2 * _bytes(rest) + 4 * len(rest)


def activation_bytes(model: Any) -> int:
    """Bytes that a forward of the trunk keeps per token for its backward, parameters and what is made of them alone
    left out, attention fused. The model is one without memory."""
    AttentionInterface.register(_ATTENTION, _counted_attention)
    model.set_attn_implementation(_ATTENTION)
    return (_kept(model, 2 * _TRACED) - _kept(model, _TRACED)) // _TRACED


def autocast_activation_bytes(found: Any, dtype: str) -> int:
    """The same for a model of weights in `dtype` under bfloat16 autocast."""
    with FakeTensorMode():  # autocast knows no meta tensors; these hold nothing either, and are said to be a CPU's
        model = AutoModelForCausalLM.from_config(found, dtype=DTYPES[dtype])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return activation_bytes(model)


def _kept(model: Any, count: int) -> int:
    """Bytes that a forward of `count` tokens keeps beside the parameters."""
    parameters = {id(p) for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters and id(tensor) not in parameters:
            alive.append(base)  # so that no id is given twice
            kept[id(base)] = base.numel() * base.element_size()
        return tensor

    tokens, positions = (torch.zeros((1, count), dtype=torch.int64, device=model.device) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    return sum(kept.values())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
