"""Places to write from, for tests that are their own driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcts.engines.model import Policy
from selfplay.checkpoint import name_of, write
from selfplay.store import Place
from selfplay.store_disk import epoch_folder


def held(run: Path) -> Place:
    """A place for a driver of our own; the run need not exist."""
    facts = run / "run.json"
    place = Place(str(run), json.loads(facts.read_text())["id"] if facts.exists() else "test", 99)
    epoch_folder(run, place.epoch).mkdir(parents=True, exist_ok=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    return place


def save(
    checkpoints: Path, iteration: int, policy: Policy, optimizer: dict[str, Any] | None, state: dict[str, Any]
) -> Path:
    """Write a checkpoint as a run does, into the folder of checkpoints of a run that is held."""
    store = held(checkpoints.parent).open()
    building = store.workshop(f"{iteration:05d}")
    write(building, iteration, policy, optimizer, state)
    return store.publish(building, name_of(iteration).as_posix())
