"""`launch --dry-run`: what a run needs, from its config alone, and whether that fits. Loads no weight.

With `engine.kind: server` the engine's weights and caches lie with the server, whose memory is not part of the plan.
Exact, for what is built here: parameters, bytes of weights, gradients, optimiser state, keys and values, and what the
trunk keeps for its backward pass under fused attention. Bounds: attention scores, logits and sampling. Tokens are the
most that the config allows, times and costs follow from speeds and prices that the config states.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from rich.table import Table

from mcts.strategies import build as build_strategy
from mcts.tasks import Task, load_task, task_files
from selfplay.config import Config, ServerConfig
from selfplay.objectives import build_objective
from selfplay.objectives.base import Need
from selfplay.plan_model import BYTES, PlanError, Shape, model_folder, shape_of

GIB: Final = 1024**3
_MULTIPLE: Final = 16
_NATIVE: Final = 400
"""Row buffers are at least so many products long; both as in `mcts.engines.torch_forward`."""
_LOGIT_COPIES: Final = 5
"""Float32 copies of the logits that sampling holds at its peak, beside those in the model's dtype."""

__all__ = ["Load", "Plan", "PlanError", "make_plan"]


@dataclass(frozen=True, slots=True)
class Load:
    """What one process keeps on its device, in bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in numbers."""

    shape: Shape
    loads: tuple[Load, ...]
    """The learner, and one worker."""
    devices: tuple[tuple[str, int], ...]
    """What lies on each kind of device, and bytes."""
    memory: int
    """Bytes of one device."""
    usable: int
    """Without the headroom."""
    search_slots: int
    """KV slots that one search reserves."""
    in_flight: int
    """Searches at once per worker."""
    kv_token: int
    """Bytes of keys and values per token; 0 where a server keeps them."""
    checkpoint: int
    """Bytes on disk."""
    prompt_tokens: int
    """Of a typical prompt."""
    item_tokens: int
    """Of a typical training item."""
    tokens: dict[str, int]
    """Per iteration, at most."""
    hours: float | None
    cost: float | None
    measured: bool
    iterations: int
    warnings: tuple[str, ...]
    """What the run needs and is not here, a sentence each."""
    refusal: str | None
    """Why the run cannot be, in one sentence."""

    def data(self) -> dict[str, Any]:
        """For programs: bytes, tokens, hours; None where the config states no speed or price."""
        shape = self.shape
        return {
            "model": shape.name,
            "parameters": shape.parameters,
            "trainable": shape.trainable + shape.head_parameters,
            "bytes": {load.name: {**load.parts, "total": load.total} for load in self.loads},
            "devices": dict(self.devices),
            "device_memory": self.memory,
            "usable_memory": self.usable,
            "kv_bytes_per_token": self.kv_token,
            "slots_per_search": self.search_slots,
            "searches_in_flight": self.in_flight,
            "checkpoint_bytes": self.checkpoint,
            "prompt_tokens": self.prompt_tokens,
            "item_tokens": self.item_tokens,
            "tokens_per_iteration": self.tokens,
            "hours_per_iteration": self.hours,
            "cost_per_iteration": self.cost,
            "measured": self.measured,
            "warnings": list(self.warnings),
            "refusal": self.refusal,
        }

    def table(self) -> Table:
        """Bytes by part, for people."""
        table = Table()
        table.add_column("bytes on a device")
        for load in self.loads:
            table.add_column(load.name, justify="right")
        for part in dict.fromkeys(part for load in self.loads for part in load.parts):
            table.add_row(part, *(gib(load.parts[part]) if part in load.parts else "-" for load in self.loads))
        table.add_row("total", *(gib(load.total) for load in self.loads), style="bold")
        return table

    def lines(self) -> list[str]:
        """The rest, a sentence a line."""
        lines = [
            f"{self.shape.name}: {self.shape.parameters:,} parameters, "
            f"{self.shape.trainable + self.shape.head_parameters:,} trained, the value head's included",
        ]
        lines += [
            f"{name}: {gib(size)} of {gib(self.usable)} usable ({gib(self.memory)} less the headroom)"
            for name, size in self.devices
        ]
        lines += [
            f"searches in flight per worker: {self.in_flight} of {self.search_slots:,} KV slots each "
            + (
                f"({self.kv_token:,} bytes per token)" if self.kv_token else "(the server's, which is not planned here)"
            ),
            f"checkpoint on disk: {gib(self.checkpoint)}",
            "tokens per iteration, at most: " + ", ".join(f"{name} {n:,}" for name, n in self.tokens.items()),
            f"reckoned with prompts of {self.prompt_tokens:,} tokens and training items of {self.item_tokens:,}",
        ]
        if self.hours is not None:
            what = "" if self.measured else " (unmeasured: from the speeds that the config states)"
            cost = "" if self.cost is None else f", cost {self.cost:,.2f}"
            total = self.hours * self.iterations
            lines.append(f"an iteration: {self.hours:.2f} h{cost}; {self.iterations} of them: {total:.1f} h{what}")
        else:
            lines.append("times: state plan.play_tokens_per_second and plan.learn_tokens_per_second to have them")
        return lines + [f"warning: {warning}" for warning in self.warnings]


def make_plan(config: Config) -> Plan:
    """The plan of a run. Raises PlanError where the model or the device's memory cannot be known, SettingError for a
    task, strategy or objective that does not exist or refuses a setting (problem files are not read)."""
    task = load_task(config.task.name, **config.task.settings)
    build_strategy(config.play.search.strategy.name, **config.play.search.strategy.settings)
    objective = build_objective(config.learn.objective.name, **config.learn.objective.settings)
    shape = shape_of(config)
    plan, cluster = config.plan, config.cluster
    learner, worker = (
        Load("learner", _learner(config, shape, reference=Need.REFERENCE in objective.needs)),
        Load("worker", _worker(config, shape)),
    )
    workers = cluster.workers if cluster.executor == "ray" and cluster.workers != "fit" else max(1, plan.devices - 1)
    workers = 1 if cluster.executor == "inline" else workers
    if plan.devices == 1:
        devices: tuple[tuple[str, int], ...] = (
            (f"learner and {workers} worker{'s' * (workers > 1)}", learner.total + workers * worker.total),
        )
    else:
        each = math.ceil(workers / (plan.devices - 1))
        devices = (("learner", learner.total), (f"{each} worker{'s' * (each > 1)}", each * worker.total))
    memory = device_memory(config)
    usable = int(memory * (1.0 - plan.headroom))
    slots = prompt_tokens(config) + config.play.search.budget
    in_flight = min(config.play.open_searches, config.engine.kv_slots // slots)
    tokens = tokens_of(config)
    hours = hours_of(config, tokens, workers)
    cost = None if hours is None or plan.price_per_hour is None else hours * plan.price_per_hour * plan.devices
    head = 4 * shape.head_parameters
    return Plan(
        shape=shape,
        loads=(learner, worker),
        devices=devices,
        memory=memory,
        usable=usable,
        search_slots=slots,
        in_flight=in_flight,
        kv_token=0 if config.engine.kind == "server" else kv_bytes(config, shape),
        checkpoint=(shape.adapters or shape.weights) + head + shape.optimizer,
        prompt_tokens=prompt_tokens(config),
        item_tokens=item_tokens(config),
        tokens=tokens,
        hours=hours,
        cost=cost,
        measured=plan.measured,
        iterations=config.iterations,
        warnings=tuple(_missing(config, task)),
        refusal=_refusal(config, shape, devices, (learner, worker), usable, memory, slots),
    )


def engine_bytes(config: Config) -> int:
    """Bytes of a number in the engine's weights, keys and values."""
    return BYTES[config.engine.dtype or config.model.dtype]


def _missing(config: Config, task: Task) -> Iterator[str]:
    """What the run needs and is not here; it may be where the run will start."""
    path = config.model.path
    if path is not None and model_folder(path) is None:
        yield f"the model {path} is not here: its sizes are those that plan.architecture states"
    for file in task_files(task):
        if not os.path.exists(file):
            yield f"the task's {file} is not here (looked for from {os.getcwd()}): a launch reads it where it starts"


def kv_bytes(config: Config, shape: Shape) -> int:
    """Bytes of one token's keys and values in the engine."""
    return shape.layers * 2 * shape.kv_heads * shape.head_size * engine_bytes(config)


def row_length(config: Config, shape: Shape) -> int:
    """Positions of the engine's row buffers once a row has been as long as the context; on a GPU, from the start."""
    longest = config.engine.max_context
    least = -(-_NATIVE // shape.head_size // _MULTIPLE) * _MULTIPLE
    spare = longest // 8 if config.model.device == "cpu" else 0
    return max(least, -(-(longest + spare) // _MULTIPLE) * _MULTIPLE)


def _worker(config: Config, shape: Shape) -> dict[str, int]:
    if config.engine.server is not None:
        return _beside_a_server(config, config.engine.server, shape)
    size, rows = engine_bytes(config), config.engine.rows
    length = row_length(config, shape)
    # one layer at a time; fused on a GPU
    scores = rows * shape.heads * length * (2 * size + 4) if config.model.device == "cpu" else 0
    logits = rows * shape.vocabulary * (size + 4 * _LOGIT_COPIES)
    return {
        "weights": shape.parameters * size + 4 * shape.head_parameters,  # adapters are merged into them
        "KV cache, tree": config.engine.kv_slots * kv_bytes(config, shape),
        "KV cache, rows": rows * length * kv_bytes(config, shape),
        "activations": scores + logits,
    }


def _beside_a_server(config: Config, server: ServerConfig, shape: Shape) -> dict[str, int]:
    """What a worker keeps whose steps a server draws: nothing, or with `value: local` the policy and its head, which
    read one sequence at a time. (A reload that is checked by log-probabilities loads it once more, on the CPU.)"""
    if server.value != "local":
        return {}
    size = BYTES[config.model.dtype]
    low = 2 if config.learn.precision == "bfloat16" else size
    layer = -(-shape.activation // shape.layers) * size // low  # `activation` is that of the learner's arithmetic
    return {
        "weights": shape.weights + 4 * shape.head_parameters,
        "one sequence": config.engine.max_context * (layer + kv_bytes(config, shape)),
    }


def _learner(config: Config, shape: Shape, *, reference: bool) -> dict[str, int]:
    size = BYTES[config.model.dtype]
    low = 2 if config.learn.precision == "bfloat16" else size
    tokens = config.learn.batch_tokens
    per_token = shape.activation
    if getattr(config.model, "gradient_checkpointing", False):
        # each layer's input, and one layer as a whole while it is computed again
        per_token = shape.activation // shape.layers + shape.layers * shape.width * low
    item = max(item_tokens(config), 1)
    row = min(tokens, item)
    scores = shape.layers * shape.heads * tokens * row * (low + 4) if config.model.attention == "eager" else 0
    trunk = tokens * per_token + tokens * row * low + scores
    logits = tokens * max(item - prompt_tokens(config), 1) // item * shape.vocabulary  # of tokens that are predicted
    batches = -(-config.learn.items_per_step * item // tokens)
    side_by_side = config.cluster.learner_threads if config.model.device == "cpu" else 1
    if side_by_side == 1:
        sets, activations = _most(shape, trunk, logits, low, min(batches, 2))
    else:  # sums of every batch at hand, of those before, and of one that waits; any batch may be at its peak
        sets, activations = min(batches, 2 + side_by_side), side_by_side * (trunk + logits * (low + 20))
    parts = {
        "weights": shape.weights + shape.adapters + 4 * shape.head_parameters,
        "gradients": sets * shape.gradients,
        "optimizer": shape.optimizer,
        "activations": activations,
    }
    if low != size:
        parts["low-precision weights"] = shape.parameters * low  # autocast keeps them through a forward
    if reference:
        parts["reference"] = shape.weights
    return parts


def _most(shape: Shape, trunk: int, logits: int, low: int, sets: int) -> tuple[int, int]:
    """(sets of gradients, bytes of activations) at the moment of a step, one batch after the other, at which they take
    most: in the loss of its first batch, which has logits, their float32 copy and log-softmax, and three more for the
    entropy; where the backward pass of a later one begins, beside the sums so far, with the gradients of its logits
    and output layer; where that ends."""
    moments = [(0, trunk + logits * (low + 20)), (sets, shape.edge)]
    if sets > 1:
        moments.append((1, trunk + logits * (low + 8) + shape.edge))
    return max(moments, key=lambda moment: moment[0] * shape.gradients + moment[1])


def prompt_tokens(config: Config) -> int:
    """Tokens of a typical prompt, as stated or assumed."""
    return config.plan.prompt_tokens or max(1, min(128, config.engine.max_context // 2))


def item_tokens(config: Config) -> int:
    """Tokens of a training item, at most a context for a path and the whole search for a tree."""
    return config.plan.item_tokens or prompt_tokens(config) + config.play.search.budget


def tokens_of(config: Config) -> dict[str, int]:
    """Tokens of one iteration, at most: sampled in play, prompts computed for it, trained on. Evaluations come on
    top."""
    played = config.play.problems * config.play.search.budget
    learned = config.learn.steps * config.learn.items_per_step * item_tokens(config)
    return {"sampled": played, "prompt": config.play.problems * prompt_tokens(config), "trained": learned}


def hours_of(config: Config, tokens: dict[str, int], workers: int) -> float | None:
    """Hours of an iteration's play and learning, one after the other; None where a speed is not stated."""
    plan = config.plan
    if plan.play_tokens_per_second is None or plan.learn_tokens_per_second is None:
        return None
    play = tokens["sampled"] / (plan.play_tokens_per_second * workers)
    return (play + tokens["trained"] / plan.learn_tokens_per_second) / 3600.0


def device_memory(config: Config) -> int:
    """Bytes of one device: as stated, else of the GPU that `model.device` names, else of this machine."""
    if config.plan.device_memory_gib is not None:
        return int(config.plan.device_memory_gib * GIB)
    device = config.model.device
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    raise PlanError(f"there is no {device} here to ask for its memory; state plan.device_memory_gib")


def _refusal(
    config: Config,
    shape: Shape,
    devices: tuple[tuple[str, int], ...],
    loads: tuple[Load, ...],
    usable: int,
    memory: int,
    slots: int,
) -> str | None:
    engine = config.engine
    if shape.positions and engine.max_context > shape.positions:
        return f"the model reads at most {shape.positions} tokens; lower engine.max_context from {engine.max_context}"
    if prompt_tokens(config) >= engine.max_context:
        return (
            f"a prompt of {prompt_tokens(config)} tokens leaves no room in a context of {engine.max_context}; raise "
            "engine.max_context"
        )
    if slots > engine.kv_slots:
        return (
            f"a search may need {slots} KV slots and a worker has {engine.kv_slots}; raise engine.kv_slots or lower "
            "play.search.budget"
        )
    name, size = max(devices, key=lambda entry: entry[1])
    if size > usable:
        load = max((one for one in loads if one.name in name), key=lambda one: one.total)
        parts = ", ".join(f"{part} {gib(n)}" for part, n in sorted(load.parts.items(), key=lambda p: -p[1])[:3])
        return (
            f"{name} need {gib(size)} and a device has {gib(usable)} to use ({gib(memory)} less the headroom), most of "
            f"it for the {load.name} ({parts}); {_advice(load)}"
        )
    return None


def _advice(load: Load) -> str:
    """What to change, by what weighs most."""
    part = max(load.parts, key=lambda name: load.parts[name])
    return {
        "KV cache, tree": "lower engine.kv_slots",
        "KV cache, rows": "lower engine.rows or engine.max_context",
        "activations": "lower engine.rows" if load.name == "worker" else "lower learn.batch_tokens",
        "weights": "take a smaller model, model.dtype bfloat16 or more memory",
    }.get(part, "train adapters (model.lora), take model.dtype bfloat16, a smaller model or more memory")


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 1024**2:.2f} MiB"
