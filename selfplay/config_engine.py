"""The sections of the config about what draws the steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from selfplay.config_base import Section


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
    """Sequences that decode together, a multiple of 16; part of what fixes a trace bit for bit."""
    kv_slots: PositiveInt = 65536
    """Tokens whose keys and values are kept at once, per worker."""
    max_context: PositiveInt = 128
    """Longest prompt plus path, in tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights that draw steps, and of their keys and values; None: model.dtype. A learner's float32 weights
    can so be played in bfloat16."""
    compile: bool = False
    """On a GPU: small kernels of a decode made into few by torch.compile, which needs a C compiler there."""

    @model_validator(mode="after")
    def _server_is_named(self) -> EngineConfig:
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("engine.kind: server and an engine.server section belong together; add or remove one")
        if self.kind == "server" and (self.dtype or self.compile):
            raise ValueError(
                "engine.dtype and engine.compile are for kind: torch: a server has its own; leave them out"
            )
        return self
