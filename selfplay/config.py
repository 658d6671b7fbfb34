"""The typed config: YAML + key=value overrides. Imports nothing heavy, so that `--help` stays quick.

A run is a function of its config: every field but those under `cluster` can change what is played or learned.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from selfplay.errors import UserError

NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text that is no YAML raises; ValueError for a number of 5,000 digits or a date that is none."""


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence that says what to change."""


class Section(BaseModel):
    """Strict: an unknown key is an error, and values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """A part chosen by name (or dotted path) with settings of its own, checked when it is built."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


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


class ValueServiceConfig(Section):
    """A served reward model."""

    url: str
    model: str
    endpoint: Literal["classify", "pooling"] = "classify"
    label: int = Field(default=1, ge=0)
    """Which of the classes' probabilities is the value."""
    sigmoid: bool = False
    """Set where the model returns logits."""
    send: Literal["token_ids", "text"] = "text"


class ReloadConfig(Section):
    """How new weights reach a server: a preset, and/or a command that restarts it."""

    preset: Literal["none", "vllm", "sglang"] = "none"
    command: tuple[str, ...] = ()
    """Arguments; {path} and {version} are filled in. Run without a shell."""
    check: Literal["root", "id", "version", "logprobs"] | None = None
    """What proves the new weights; None: the preset's own."""
    id: str = ""


class ServerConfig(Section):
    """An OpenAI-compatible server that draws the steps (docs/SERVER.md)."""

    url: str
    model: str
    """The served model's name."""
    tokenizer: str | None = None
    """Folder of its tokenizer; None: the policy's own."""
    dialect: Literal["vllm", "sglang", "openai"] = "vllm"
    prompt: Literal["token_ids", "text"] = "token_ids"
    split: bool = False
    """One call per sample, for servers that ignore n."""
    in_flight: PositiveInt = 64
    """Calls under way at once, per worker."""
    deadline_seconds: PositiveFloat = 300.0
    attempts: PositiveInt = 5
    """Broken exchanges of one call before its search fails."""
    down_seconds: NonNegativeFloat = 600.0
    """How long a server that is down is waited for."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key; the key itself stands in no config."""
    value: Literal["none", "local"] | ValueServiceConfig = "none"
    """local: the checkpoint's value head, on this machine."""
    reload: ReloadConfig = ReloadConfig()
    extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of each call."""


class EngineConfig(Section):
    kind: Literal["torch", "server"] = "torch"
    server: ServerConfig | None = None
    """Needed by kind: server."""
    rows: PositiveInt = 256
    """Sequences that decode together; part of what fixes a trace bit for bit."""
    kv_slots: PositiveInt = 65536
    """Tokens whose keys and values are kept at once, per worker."""
    max_context: PositiveInt = 128
    """Longest prompt plus path, in tokens."""

    @model_validator(mode="after")
    def _server_is_named(self) -> EngineConfig:
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("engine.kind: server and an engine.server section belong together; add or remove one")
        return self


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


class ClusterConfig(Section):
    """Where it runs; changes no trace, and weights only in their last bits (`learners`)."""

    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    """Of a running Ray cluster to join; None: a Ray of this run's own on this machine."""
    workers: PositiveInt | Literal["fit"] = 2
    """fit: as many as the cluster has room for, growing and shrinking as nodes join and leave."""
    worker_threads: PositiveInt = 1
    worker_cpus: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker."""
    worker_gpus: NonNegativeFloat = 0.0
    """GPUs, or a fraction of one."""
    learners: PositiveInt = 1
    """Processes that learn together, data-parallel."""
    learner_threads: PositiveInt = 2
    """Of each learner."""
    learner_cpus: PositiveFloat = 1.0
    learner_gpus: NonNegativeFloat = 0.0
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: weights, gradients and optimiser state are spread over the learners, for models that fit no single one."""
    by_turns: bool = False
    """Workers and learners free their device's memory while the others work, so that they can share it."""
    restarts: int = Field(default=8, ge=0)
    """Dead actors replaced before the run stops and says so; each committed unit gives one back."""
    lease_seconds: PositiveFloat = 3600.0
    """A unit that takes a worker longer is played by another."""
    silence_seconds: PositiveFloat = 30.0
    """A worker that gives no sign of life for so long counts as lost."""
    deaths_alone: PositiveInt = 2
    """A problem that killed so many workers which played nothing else is recorded as failed."""
    grace_seconds: PositiveFloat = 20.0
    """After SIGTERM: the time to save and exit."""
    save_seconds: PositiveFloat = 300.0
    """A learning phase that lasts longer saves its state so often."""

    @model_validator(mode="after")
    def _inline_is_alone(self) -> ClusterConfig:
        if self.executor == "inline" and (self.address is not None or self.learners > 1):
            raise ValueError("executor: inline is one process: leave out address and learners, or set executor: ray")
        if self.sharding == "fsdp2" and self.learners == 1:
            raise ValueError("sharding: fsdp2 spreads a model over several learners: set learners to 2 or more")
        if self.sharding == "fsdp2" and self.by_turns:
            raise ValueError("a sharded learner keeps its devices: leave out by_turns, or sharding: fsdp2")
        return self


class RetentionConfig(Section):
    """What is deleted while the run goes on. Never what resume or the replay window needs."""

    checkpoints: PositiveInt = 3
    """Newest ones kept besides the first, the best on dev and those that resume needs."""
    iterations: PositiveInt | None = None
    """Newest iterations whose traces are kept; None: all."""
    days: PositiveFloat | None = None
    """Traces older than this are deleted; None: none."""


class PlanConfig(Section):
    """What `launch --dry-run` reckons with beside the rest of the config; changes no trace and no weight."""

    architecture: str | dict[str, Any] | None = None
    """A folder with the model's config.json, or the keys of one, for a model that is not on this machine yet."""
    devices: PositiveInt = 1
    """One: everything shares it. More: the learner has one for itself, and the workers share the others."""
    device_memory_gib: PositiveFloat | None = None
    """None: that of the device that `model.device` names here."""
    headroom: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of a device's memory that is kept free: for the runtime, fragmentation and what no formula knows."""
    prompt_tokens: PositiveInt | None = None
    """Tokens of a typical prompt, template and examples included; None: half the context, 128 at most."""
    item_tokens: PositiveInt | None = None
    """Tokens of a typical training item; None: the prompt and the whole budget of a search, which is the most."""
    play_tokens_per_second: PositiveFloat | None = None
    """Tokens that one worker samples per second."""
    learn_tokens_per_second: PositiveFloat | None = None
    """Tokens that the learner trains on per second."""
    price_per_hour: NonNegativeFloat | None = None
    """Of one device, in any currency."""
    measured: bool = False
    """Whether the speeds were measured on the hardware meant; otherwise the plan calls its times unmeasured."""


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

    def hash(self) -> str:
        """Sha256 over what can change a trace or a weight. `iterations` is left out, so that a run can go on for
        longer, although it is also the horizon of the learning rate."""
        fields = self.model_dump(mode="json", exclude={"cluster", "plan", "keep", "iterations"})
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
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    return f"{where}: {first['msg'].removeprefix('Value error, ')} (got {first.get('input')!r})"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = Config
    for part in location:
        field = section.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]  # a section, or one of several
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), Part)
    return list(section.model_fields)
