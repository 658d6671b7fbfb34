"""The typed config: YAML + key=value overrides. Imports nothing heavy, so that `--help` stays quick.

A run is a function of its config: every field but those under `cluster` can change what is played or learned.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from selfplay.config_base import Part, Section
from selfplay.config_cluster import ClusterConfig, PlanConfig, RetentionConfig
from selfplay.config_engine import EngineConfig, ReloadConfig, ServerConfig, ValueServiceConfig
from selfplay.errors import UserError

__all__ = [
    "ClusterConfig", "Config", "ConfigError", "EngineConfig", "EvaluateConfig", "LearnConfig", "LoraConfig",
    "ModelConfig", "OptimizerConfig", "Part", "PlanConfig", "PlayConfig",
    "ReloadConfig", "RetentionConfig", "SearchConfig", "Section",
    "ServerConfig", "ValueServiceConfig", "WarmupConfig", "load_config", "parse_config",
]  # fmt: skip

NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text that is no YAML raises; ValueError for a number of 5,000 digits or a date that is none."""


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence that says what to change."""


class LoraConfig(Section):
    """A LoRA adapter (peft): W + alpha / rank x B A."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Literal[0] = 0
    """Always 0: a tree is trained as its paths only without dropout."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Endings of the names of the layers adapted (such as q_proj); all-linear: every one but the output layer."""


class ModelConfig(Section):
    """The policy: a Hugging Face causal LM by folder or name (of the local cache), or a fresh one built for the task's
    vocabulary."""

    path: str | None = None
    """Folder or name of a causal LM; None builds `fresh`."""
    fresh: dict[str, Any] = Field(default_factory=lambda: {"width": 96, "layers": 3, "heads": 4})
    """Architecture of a fresh Llama: width, layers, heads, intermediate, tie_embeddings."""
    device: str = "cpu"
    """cpu, or an accelerator by torch's name, with a number where one of several is meant (cuda:1)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention of the learner's forwards, by transformers' name; the engine brings its own. flash_attention_2 takes no
    tree mask: then the model is trained per path."""
    value_width: int = Field(default=64, ge=0)
    """GELU units of a new value head; 0: a linear head, which exports exactly as a token-classification model."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter on `path` instead of its weights. Checkpoints hold the adapter and the base's name."""
    freeze_trunk: bool = False
    """Train the value head alone."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, about a third more time, equal gradients."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if not re.fullmatch(r"cpu|(cuda|mps|xpu)(:[0-9]+)?", self.device):
            raise ValueError(f"there is no device {self.device!r}: set cpu, cuda, or one of several, such as cuda:1")
        if self.lora is not None and self.path is None:
            raise ValueError("lora trains an adapter on a given model: set model.path, or leave lora out")
        if self.lora is not None and self.freeze_trunk:
            raise ValueError("lora and freeze_trunk exclude each other: a frozen trunk has no adapter to train")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for hidden matrices, AdamW for the rest."""
    lr: PositiveFloat = 2e-3
    muon_lr: PositiveFloat = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0


class WarmupConfig(Section):
    """Supervised warm-up on worked examples (for Countdown: random legal play, relabelled with its result)."""

    steps: int = Field(default=1000, ge=0)
    """Optimiser steps; 0 starts from the model as it is."""
    examples_per_step: PositiveInt = 256
    lr_warmup_steps: int = Field(default=50, ge=0)
    final_lr_scale: NonNegativeFloat = 0.3
    """The learning rate decays linearly to this share of `optimizer.lr` over the warm-up."""
    negative_share: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the task's negative examples that is used: they teach the value head alone."""


class SearchConfig(Section):
    """How one problem is searched."""

    strategy: Part
    budget: PositiveInt
    """Sampled tokens per search, those thrown away included."""
    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    prior_rule: Literal["exact", "draws"] = "exact"


class PlayConfig(Section):
    search: SearchConfig
    problems: PositiveInt = 4096
    """Searches per iteration."""
    unit: PositiveInt = 256
    """Problems of one work unit: one shard each."""
    open_searches: PositiveInt = 512
    """Searches that a worker has under way at once."""
    weighting: Literal["uniform", "solve_rate"] = "solve_rate"
    """How problems are drawn: solve_rate favours those that the policy wins sometimes but not always."""
    weight_floor: float = Field(default=0.1, gt=0.0, le=1.0)
    """Least relative weight of a problem, so that none is ever forgotten."""
    max_staleness: int = Field(default=0, ge=0)
    """0: play and learning alternate, and a run repeats exactly. s: play runs ahead of learning by up to s versions."""


class LearnConfig(Section):
    objective: Part = Part(name="alphazero")
    window: PositiveInt = 3
    """Iterations of traces that learning draws from."""
    steps: PositiveInt = 200
    """Optimiser steps per iteration."""
    reanalyse: bool = False
    """Before each learning phase, score the window's traces by older weights again with the newest: the values and
    targets of their trees are then those of the weights that learn (`selfplay.reanalyse`)."""
    items_per_step: PositiveInt = 256
    """Training sequences (trees or paths) per optimiser step, warm-up replay included."""
    batch_tokens: PositiveInt = 4096
    """Tokens per forward and backward pass; a step is cut into such batches. Changes the speed, not the loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the learner's forwards (autocast); weights and optimiser stay as they are."""
    replay: float = Field(default=0.15, ge=0.0, lt=1.0)
    """Share of fresh warm-up examples among them."""
    lr_scale: PositiveFloat = 1.0
    """The learning rate begins self-play at this share of `optimizer.lr` ..."""
    final_lr_scale: NonNegativeFloat = 0.0
    """... and decays linearly to this share over the whole run (all iterations)."""
    optimizer: OptimizerConfig = OptimizerConfig()


class EvaluateConfig(Section):
    samples: int = Field(default=16, ge=0)
    """Chains per problem at temperature 1 for pass@k; 0 leaves pass@k out."""
    every: PositiveInt = 1
    """Evaluate after every so many iterations, and always after the last."""


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0)
    iterations: PositiveInt = 10
    task: Part
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig = WarmupConfig()
    engine: EngineConfig = EngineConfig()
    play: PlayConfig
    learn: LearnConfig = LearnConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    plan: PlanConfig = PlanConfig()
    keep: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Config:
        if self.cluster.sharding == "fsdp2" and self.learn.optimizer.name == "muon":
            raise ValueError(
                "muon needs whole matrices and cluster.sharding: fsdp2 has none: use learn.optimizer adamw"
            )
        if self.cluster.sharding == "fsdp2" and self.learn.reanalyse:
            raise ValueError("a sharded learner cannot score traces again: leave out learn.reanalyse or the sharding")
        return self

    @model_validator(mode="after")
    def _turns_alternate(self) -> Config:
        if self.cluster.by_turns and self.play.max_staleness:
            raise ValueError("cluster.by_turns alternates and play.max_staleness overlaps: leave one of them out")
        return self

    @model_validator(mode="after")
    def _compiles_for_a_gpu(self) -> Config:
        if self.engine.compile and self.model.device == "cpu":
            raise ValueError("engine.compile fuses kernels of a GPU: set model.device: cuda, or leave it out")
        return self

    @model_validator(mode="after")
    def _a_server_serves_one_version(self) -> Config:
        if self.engine.kind == "server" and self.play.max_staleness:
            raise ValueError(
                "play.max_staleness plays with several versions at once and a server serves one: set it to 0"
            )
        return self

    def hash(self) -> str:
        """Sha256 over what can change a trace or a weight. `iterations` is left out, so that a run can go on for
        longer, although it is also the horizon of the learning rate."""
        fields = self.model_dump(mode="json", exclude={"cluster", "plan", "keep", "iterations"})
        for newer in ("dtype", "compile"):  # runs from before they existed keep their hash
            if not fields["engine"][newer]:
                del fields["engine"][newer]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `key.path=value` overrides (values are YAML). Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read config {path}: it is no UTF-8 text; give the path of a YAML file") from error
    return parse_config(text, overrides, source=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    try:
        tree = yaml.safe_load(text)
    except NO_YAML as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form key.path=value")
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except NO_YAML as error:
        raise ConfigError(f"override {override[:80]!r}: the value is not valid YAML") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    said = ": ".join(part for part in (where, first["msg"].removeprefix("Value error, ")) if part)
    given = first.get("input")
    return said if isinstance(given, dict) else f"{said} (got {given!r})"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = Config
    for part in location:
        field = section.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]  # a section, or one of several
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), Part)
    return list(section.model_fields)
