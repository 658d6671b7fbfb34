"""The sections of the config about where a run happens, what it keeps, and what it is reckoned with. They change no
trace, and weights only in their last bits (`learners`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from selfplay.config_base import Section


class ClusterConfig(Section):
    """Where it runs; changes no trace, and weights only in their last bits (`learners`)."""

    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    """Of a running Ray cluster to join; None: a Ray of this run's own on this machine."""
    workers: PositiveInt | Literal["fit"] = 2
    """fit: as many as the cluster has room for, growing and shrinking as nodes join and leave."""
    worker_threads: int = Field(default=1, gt=0, le=1024)
    worker_cpus: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker."""
    worker_gpus: NonNegativeFloat = 0.0
    """GPUs, or a fraction of one."""
    learners: PositiveInt = 1
    """Processes that learn together, data-parallel."""
    learner_threads: int = Field(default=2, gt=0, le=1024)
    """Of each learner."""
    learner_cpus: PositiveFloat = 1.0
    learner_gpus: NonNegativeFloat = 0.0
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: weights, gradients and optimiser state are spread over the learners, for models that fit no single one."""
    by_turns: bool = False
    """Workers and learners free their device's memory while the others work, so that they can share it."""
    restarts: int = Field(default=8, ge=0)
    """Dead actors replaced before the run stops and says so; each finished piece of work gives one back."""
    lease_seconds: PositiveFloat = 3600.0
    """A unit that takes a worker longer is played by another."""
    silence_seconds: PositiveFloat = 30.0
    """A worker that gives no sign of life for so long counts as lost."""
    peer_seconds: PositiveFloat = 300.0
    """Longest that a learner waits for another's tensors; then the learners start again. Errors and deaths are noticed
    long before."""
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
