"""Seconds by part of the program, each without the parts that it calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mcts.context import SearchContext
from mcts.engines import torch_batch
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_forward import Forward
from mcts.search import Driver
from mcts.tasks.base import Task

Place = tuple[object, str, str]
"""(class, module or object, name of the function in it, part that its time belongs to)."""
MODEL = "model.forward"


class Stopwatch:
    """Wraps functions and adds up the time inside them; a part entered inside another one stops the other's clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._since = 0.0

    def _pass(self) -> None:
        now = self.clock()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            self._inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._pass()
                self._inside.pop()

        return timed

    @contextmanager
    def watching(self, places: Sequence[Place]) -> Iterator[None]:
        """Time the functions at `places` until the block ends."""
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
        for owner, name, part in places:
            setattr(owner, name, self.wrap(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, own in before:
                if own is None:  # it was inherited
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)


def model_places(engine: TorchEngine) -> list[Place]:
    """The model itself: trunk and language-model head."""
    model = engine.policy.model
    return [(model.base_model, "forward", MODEL), (model.get_output_embeddings(), "forward", MODEL)]


def all_places(engine: TorchEngine, task: Task) -> list[Place]:
    """Everything that a search spends its time on."""
    kind = type(task)
    groups: dict[str, list[tuple[object, Sequence[str]]]] = {
        "sampling": [(torch_batch, ("draw", "uniforms", "stream_keys"))],
        "KV copies": [(Forward, ("gather", "store", "move", "fit"))],
        "value head": [(engine.policy.head, ("forward",))] if engine.policy.head is not None else [],
        "engine": [(TorchEngine, ("poll", "submit", "open", "close", "encode"))],
        "strategy": [(Driver, ("_advance",)), (SearchContext, ("add", "set_targets"))],
        "driver": [(Driver, ("poll", "submit", "_send", "_finish", "_receive", "_admit"))],
        "task": [(kind, ("check_step", "check", "answer", "verify"))],
    }
    named = [(o, name, part) for part, owners in groups.items() for o, names in owners for name in names]
    return [*model_places(engine), *named]
