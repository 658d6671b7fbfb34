"""The state of a learning phase that is under way, so that a long one need not begin again: RUN/checkpoints/partial/,
in the form of a checkpoint. It counts only for the very phase that it was saved in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import checkpoint as checkpoints
from selfplay.checkpoint import CheckpointError
from selfplay.config import Config

log = logging.getLogger(__name__)
PARTIAL = "checkpoints/partial"


def identity(checkpoint: Path) -> str:
    """What tells a checkpoint's weights and optimiser state from others'. Raises CheckpointError."""
    return _digest(checkpoints.read_files(checkpoint))


@dataclass(frozen=True, slots=True)
class Partial:
    """Of one phase of one iteration. `digest` stands for all that determines the phase."""

    iteration: int
    digest: str

    @classmethod
    def of(cls, config: Config, iteration: int, base: str, shards: Sequence[Path]) -> Partial:
        """`base`: the `identity` of the checkpoint that the phase starts from, or another name of its weights."""
        cluster = config.cluster
        facts = {
            "config": config.hash(),
            "iterations": config.iterations,  # the horizon of the learning rate
            "group": [cluster.learners, cluster.sharding],  # sums are rounded in another order
            "base": base,
            "shards": [(shard.parent.name, shard.name, shard.stat().st_size) for shard in shards],
        }
        return cls(iteration, _digest(facts))

    @property
    def name(self) -> str:
        """Of its folder in the run."""
        return f"{PARTIAL}/{self.iteration:05d}"

    def find(self, folder: Path) -> bool:
        """Whether the phase can go on from what is in the folder; where that is of another phase or damaged, a line in
        the log says so."""
        if not folder.exists():
            return False
        try:
            digest = checkpoints.read_state(folder)["digest"]
            checkpoints.verify(folder)
        except CheckpointError as error:
            log.warning("learning of iteration %d begins again: %s", self.iteration, error)
            return False
        if digest != self.digest:
            log.warning(
                "learning of iteration %d begins again: its saved state is of another config, other traces, other "
                "weights or another number of learners",
                self.iteration,
            )
        return bool(digest == self.digest)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
