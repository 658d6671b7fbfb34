"""Small kernels of a decode forward made into few by torch.compile: norms, gated MLPs, rotary positions.

They are a third of the time of a decoded token on a GPU, and of its kernels two thirds. Only these parts are compiled,
in seconds, and only while a forward is captured (`torch_graphs`): prefills and learning run the model as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mcts.engines.model import Policy

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_PARTS = ("RMSNorm", "MLP")
"""How transformers names the classes of these parts."""
_ROTARY = "apply_rotary_pos_emb"
"""What a model's module in transformers calls its rotary positions."""


class Fusion:
    """Compiled stand-ins for a policy's small parts."""

    def __init__(self, policy: Policy, compiler: Compile = torch.compile) -> None:
        self._parts = [module for module in policy.model.modules() if type(module).__name__.endswith(_PARTS)]
        kinds = {type(module) for module in self._parts}
        self._forwards = {kind: compiler(kind.forward) for kind in kinds}
        self._home = sys.modules[type(policy.model).__module__]
        rotary = getattr(self._home, _ROTARY, None)
        self._rotary = None if rotary is None else compiler(rotary)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the policy's model runs the compiled parts. Raises ValueError where they cannot be compiled."""
        plain = getattr(self._home, _ROTARY, None)
        try:
            for module in self._parts:
                module.forward = self._forwards[type(module)].__get__(module)
            if self._rotary is not None:
                setattr(self._home, _ROTARY, self._rotary)
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"torch.compile failed on this machine ({what}): set engine.compile: false") from error
        finally:
            for module in self._parts:
                del module.forward
            if self._rotary is not None:
                setattr(self._home, _ROTARY, plain)
