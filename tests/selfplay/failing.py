"""A task whose worked examples fail once, on one rank of the learner."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch.distributed as dist

from mcts.tasks.base import Example
from mcts.tasks.countdown import Countdown

CAUSE = "RuntimeError: the card fell off the bus"
AT = 100
"""The example at which it fails: in a step that is not the first."""


class Failing(Countdown):
    """Countdown of three numbers with few problems; `marker` is a file that says that it has failed."""

    def __init__(self, marker: str) -> None:
        super().__init__(numbers=3, heldout_problems=24, dev_problems=16)
        self._marker = Path(marker)

    def warmup(self, seed: int) -> Iterator[Example]:
        for number, example in zip(count(), super().warmup(seed), strict=False):
            if number == AT and dist.is_initialized() and dist.get_rank() == 1 and not self._marker.exists():
                self._marker.touch()
                raise RuntimeError("the card fell off the bus")
            yield example
