"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    name: str = "adamw"
    """adamw; muon: torch.optim.Muon for the hidden matrices, AdamW for embeddings, heads, norms and biases."""
    lr: float = 2e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest norm of the gradient over all parameters."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Scale of the learning rate: linear warm-up, then constant, or falling linearly over a known total."""

    warmup_steps: int = 0
    total_steps: int | None = None
    """Steps after which `final_scale` is reached; None: constant."""
    final_scale: float = 0.0
    peak: float = 1.0
    """Scale at the top."""
    offset: int = 0
    """Steps already made when the phase begins (a schedule over a whole run, phase after phase)."""

    def scale(self, step: int) -> float:
        """Scale for step 0, 1, ... of the phase."""
        at = self.offset + step
        rise = min(1.0, (at + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.total_steps is None:
            return self.peak * rise
        done = min(1.0, at / max(1, self.total_steps))
        return rise * (self.peak + (self.final_scale - self.peak) * done)


class Optimizer:
    """One step over the parameters of a policy: clip, then AdamW, or Muon and AdamW side by side."""

    def __init__(self, model: nn.Module, head: nn.Module | None, settings: OptimizerSettings) -> None:
        if settings.name not in ("adamw", "muon"):
            raise ValueError(f"there is no optimiser {settings.name!r}; use adamw or muon")
        self.settings = settings
        hidden, rest = split_parameters(model) if settings.name == "muon" else ([], _trainable(model))
        if head is not None:
            rest = rest + _trainable(head)
        self.parameters = hidden + rest
        if not self.parameters:
            raise ValueError("the policy has no trainable parameters; set requires_grad on those to be learned")
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                rest, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
            )
        }
        if hidden:
            self._optimizers["muon"] = torch.optim.Muon(
                hidden, lr=settings.muon_lr, momentum=0.95, weight_decay=settings.weight_decay
            )
        self._peak = {"adamw": settings.lr, "muon": settings.muon_lr}

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, one per entry of `parameters` (None: no gradient) or none at all."""
        for parameter, gradient in zip(self.parameters, gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def reached(self) -> str:
        """Which parameters have a gradient: a 0 or 1 each."""
        return "".join("01"[parameter.grad is not None] for parameter in self.parameters)

    def gradients(self, reached: Sequence[str]) -> list[Tensor]:
        """The gradients of the parameters that have one on any rank (`reached` of each), zeros where not here."""
        found = []
        for parameter, *anywhere in zip(self.parameters, *reached, strict=True):
            if "1" in anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        return found

    def clip(self) -> float:
        """Scale the gradient down to `grad_clip`; its norm before that, which is not finite if any entry is not."""
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of sharded parameters

    def step(self, scale: float) -> None:
        """Update with the learning rates times `scale`, and clear the gradient."""
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._peak[name] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def move(self, device: str) -> None:
        """Move the state to where the parameters went; there are no gradients between two steps."""
        for optimizer in self._optimizers.values():
            for parameter, entries in optimizer.state.items():
                optimizer.state[parameter] = {
                    name: entry.to(device) if torch.is_tensor(entry) and entry.ndim else entry
                    for name, entry in entries.items()
                }

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and tensors: loads with `weights_only=True`."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != set(self._optimizers):
            raise ValueError(
                f"the saved optimiser is {'+'.join(sorted(state))} and the configured one is "
                f"{'+'.join(sorted(self._optimizers))}; resume with the optimiser the run began with"
            )
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def _trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters that Muon takes (hidden matrices), and all others."""
    edge: set[int] = {id(p) for p in _edge_parameters(model)}
    hidden = [p for p in _trainable(model) if p.ndim == 2 and id(p) not in edge]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in _trainable(model) if id(p) not in chosen]


def _edge_parameters(model: Any) -> Iterable[Tensor]:
    """Embeddings of tokens and positions, and the output layer."""
    yield from model.get_output_embeddings().parameters()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
