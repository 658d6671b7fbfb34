"""The value head: a small network on the policy's last hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """Hidden state (after the final norm) -> chance in [0, 1] that the episode is won from here.

    Two layers, `width` GELU units between them; the same `seed` gives the same weights. The output layer starts
    at zero, so that an untrained head says 0.5 everywhere.
    """

    def __init__(self, hidden_size: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        if hidden_size < 1 or width < 1:
            raise ValueError(f"a value head needs positive sizes, not hidden_size={hidden_size}, width={width}")
        self.hidden_size = hidden_size
        self.width = width
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(width, hidden_size, generator=generator) * hidden_size**-0.5)
            for parameter in (self.inner.bias, self.outer.weight, self.outer.bias):
                parameter.zero_()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [...], before the sigmoid (for a loss)."""
        out: Tensor = self.outer(nn.functional.gelu(self.inner(hidden))).squeeze(-1)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> values [...] in [0, 1]."""
        return torch.sigmoid(self.logits(hidden))

    def save(self, path: str | Path) -> None:
        """Write the weights as one safetensors file."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> ValueHead:
        """Read what `save` wrote; ValueError where the file is no value head."""
        try:
            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): restore it") from error
        if "inner.weight" not in weights or weights["inner.weight"].ndim != 2:
            raise ValueError(f"{path} holds no value head (no inner.weight): give the file that ValueHead.save wrote")
        width, hidden_size = weights["inner.weight"].shape
        head = cls(hidden_size, width)
        head.load_state_dict(weights)
        return head
