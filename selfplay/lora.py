"""What of a policy is trained: a LoRA adapter in the place of all weights, or the value head alone."""

from __future__ import annotations

from pathlib import Path

import torch

from mcts.engines import adapters
from mcts.engines.model import Policy
from selfplay.config import LoraConfig
from selfplay.errors import UserError


def add(policy: Policy, base: str, config: LoraConfig, *, seed: int) -> None:
    """Put a new adapter onto a policy loaded from `base` (folder or name); what it computes stays the same. The same
    seed gives the same weights; torch's own random state is left as it was. Raises UserError for `targets` that the
    model does not have."""
    name = str(Path(base).absolute()) if Path(base).is_dir() else base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapters.add(policy.model, name, rank=config.rank, alpha=config.alpha, targets=config.targets)
        except ValueError as error:
            raise UserError(f"model.lora does not fit this model ({error}): name layers that it has") from error


def freeze(policy: Policy) -> None:
    """Leave the value head as all that is trained."""
    policy.model.requires_grad_(False)
