"""From what a user names (a run, a checkpoint, a model folder) to weights, config and task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from selfplay.config import Config, EngineConfig, Part, PlayConfig, SearchConfig, load_config
from selfplay.errors import UserError
from selfplay.store import local_copy

if TYPE_CHECKING:
    from mcts.engines.server import ServerEngine
    from mcts.engines.torch_engine import TorchEngine
    from mcts.tasks.base import Task

NAMED = {
    "greedy": "best_of_n:n=1,temperature=0",
    "sampler": "best_of_n:n=0,until_win=true",
    "majority": "best_of_n:pick=majority",
    "value": "best_of_n:pick=value",
    "weighted": "best_of_n:pick=weighted",
    "oracle": "best_of_n:pick=oracle",
    "beam": "beam",
    "mcts": "mcts:commit=never,simulations=0,expand=1,c_init=0.1,fpu_reduction=0",
    "gumbel": "gumbel:commit=never,m=1,simulations=1,expand=1",
    "index": "index",
    "redraw": "redraw",
}
"""Strategies as people call them; anything else is a strategy's own name with settings."""


@dataclass(frozen=True, slots=True)
class Source:
    """Weights and what they were trained for."""

    policy: Path
    value_head: Path | None
    config: Config
    version: int

    def load_task(self) -> Task:
        from mcts.tasks import load_task

        return load_task(self.config.task.name, **self.config.task.settings)

    def load_engine(self, task: Task) -> TorchEngine | ServerEngine:
        from selfplay.worker import make_engine

        return make_engine(self.config, self.policy, self.value_head, self.version, task)


def find_source(model: str, task: str | None = None) -> Source:
    """Resolve a run (its last checkpoint), a checkpoint folder of a run, or a Hugging Face folder or name.

    `task` is a task's name, with settings as `name:key=value,...`; a run brings its own. Raises UserError.
    """
    from selfplay import checkpoint

    path = local_copy(model, "checkpoints").absolute()
    if not path.exists():
        path = _cached(model)
    if not path.is_dir():
        raise UserError(f"{model} is no folder; give a run, a checkpoint or a model folder")
    if (path / "run.json").exists():
        config = _with_task(load_config(path / "config.yaml"), task)
        last = checkpoint.latest(path / "checkpoints")
        if last is None:
            raise UserError(f"{path} has no checkpoint yet; wait for its warm-up or `selfplay resume {path}`")
        folder = checkpoint.path_of(path / "checkpoints", last)
        return Source(folder / "policy", folder / "value_head.safetensors", config, last)
    if (path / "state.json").exists():
        run = path.parent.parent
        if not (run / "config.yaml").exists() or not path.name.isdecimal():
            raise UserError(
                f"{model} is a checkpoint out of its place; keep it as RUN/checkpoints/NUMBER, or give its "
                "policy folder and --task"
            )
        config = _with_task(load_config(run / "config.yaml"), task)
        return Source(path / "policy", path / "value_head.safetensors", config, int(path.name))
    if task is None:
        raise UserError(f"{model} is no run, so --task is needed to say what kind of problems it is for")
    heads = [folder / "value_head.safetensors" for folder in (path, path.parent)]
    head = next((file for file in heads if file.exists()), None)
    return Source(path, head, _bare_config(task, path), 0)


def _cached(model: str) -> Path:
    """The folder of a model that is named as in the local cache of models."""
    from mcts.engines.model import ModelError, resolve

    try:
        return resolve(model)
    except ModelError as error:
        raise UserError(f"there is no run or checkpoint at {model}; {error}") from error


def _with_task(config: Config, task: str | None) -> Config:
    return config if task is None else config.model_copy(update={"task": parse_part(task)})


def _bare_config(task: str, folder: Path) -> Config:
    """Defaults for a model that comes without a run; its context as far as 2,048 tokens."""
    facts = folder / "config.json"
    try:
        allowed = json.loads(facts.read_text(encoding="utf-8")).get("max_position_embeddings") if facts.exists() else 0
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{facts} is no model's config.json ({error}); give a Hugging Face folder") from error
    context = min(2048, allowed or 2048)
    search = SearchConfig(strategy=Part(name="mcts"), budget=1024)
    return Config(
        task=parse_part(task), play=PlayConfig(search=search), engine=EngineConfig(rows=64, max_context=context)
    )


def parse_part(text: str) -> Part:
    """`name` or `name:key=value,key=value` (values are YAML)."""
    import yaml

    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{text!r}: {pair!r} must have the form key=value")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{text!r}: {value!r} is no YAML value") from error
    return Part.model_validate({"name": name, **settings})


def parse_search(text: str, budget: int, base: SearchConfig, task: Task) -> SearchConfig:
    """A strategy as the command line writes it; `temperature`, `top_p` and `prior_rule` among its settings are the
    search's. Best-of-n without `n` takes as many chains as the budget pays in the worst case."""
    name, _, rest = text.partition(":")
    spelled = NAMED.get(name, name)
    if rest:
        spelled += ("," if ":" in spelled else ":") + rest
    part = parse_part(spelled)
    settings = part.settings
    sampling: dict[str, Any] = {k: settings.pop(k) for k in ("temperature", "top_p", "prior_rule") if k in settings}
    if part.name == "best_of_n":
        settings.setdefault("n", max(1, budget // (task.max_steps * task.max_step_tokens)))
    fields: dict[str, Any] = {"prior_rule": base.prior_rule, **sampling, "budget": budget}
    try:
        return SearchConfig(strategy=Part.model_validate({"name": part.name, **settings}), **fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"strategy {text!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
