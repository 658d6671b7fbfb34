"""The state of a learning phase that is under way, so that a long one need not begin again: RUN/checkpoints/partial/,
in the form of a checkpoint. It counts only for the very phase that it was saved in."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfplay import checkpoint as checkpoints
from selfplay.checkpoint import CheckpointError
from selfplay.config import Config

if TYPE_CHECKING:
    from mcts.engines.model import Policy

log = logging.getLogger(__name__)


def identity(checkpoint: Path) -> str:
    """What tells a checkpoint's weights and optimiser state from others'. Raises CheckpointError."""
    return _digest(checkpoints.read_files(checkpoint))


@dataclass(frozen=True, slots=True)
class Partial:
    """Of one phase of one iteration. `digest` stands for all that determines the phase."""

    run: Path
    iteration: int
    digest: str

    @classmethod
    def of(cls, run: Path, config: Config, iteration: int, base: str, shards: Sequence[Path]) -> Partial:
        """`base`: the `identity` of the checkpoint that the phase starts from, or another name of its weights."""
        cluster = config.cluster
        facts = {
            "config": config.hash(),
            "iterations": config.iterations,  # the horizon of the learning rate
            "group": [cluster.learners, cluster.sharding],  # sums are rounded in another order
            "base": base,
            "shards": [(shard.parent.name, shard.name, shard.stat().st_size) for shard in shards],
        }
        return cls(run, iteration, _digest(facts))

    @property
    def _folder(self) -> Path:
        return self.run / "checkpoints" / "partial"

    def find(self) -> Path | None:
        """The folder to go on from (`checkpoint.load`); None, with a line in the log, where it is of another phase or
        damaged."""
        folder = checkpoints.path_of(self._folder, self.iteration)
        if not folder.exists():
            return None
        try:
            digest = checkpoints.read_state(folder)["digest"]
            checkpoints.verify(folder)
        except CheckpointError as error:
            log.warning("learning of iteration %d begins again: %s", self.iteration, error)
            return None
        if digest != self.digest:
            log.warning(
                "learning of iteration %d begins again: its saved state is of another config, other traces, other "
                "weights or another number of learners",
                self.iteration,
            )
            return None
        return folder

    def write(self, policy: Policy, optimizer: dict[str, Any], phase: dict[str, Any]) -> None:
        """In the place of an earlier one. Raises CheckpointError."""
        saved = {"optimizer": optimizer, "phase": phase}
        checkpoints.save(self._folder, self.iteration, policy, saved, {"digest": self.digest})


def remove(run: Path) -> None:
    """Nothing is under way any more."""
    shutil.rmtree(run / "checkpoints" / "partial", ignore_errors=True)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
