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

    Two layers, `width` GELU units between them, or one linear layer where `width` is 0; the same `seed` gives the same
    weights. The output layer starts at zero, so that an untrained head says 0.5 everywhere.
    """

    def __init__(self, hidden_size: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        if hidden_size < 1 or width < 0:
            raise ValueError(f"a value head cannot have hidden_size={hidden_size}, width={width}")
        self.hidden_size = hidden_size
        self.width = width
        if width:
            self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width or hidden_size, 1)
        with torch.no_grad():
            if width:
                generator = torch.Generator().manual_seed(seed)
                self.inner.weight.copy_(torch.randn(width, hidden_size, generator=generator) * hidden_size**-0.5)
                self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] of any dtype -> [...] in the head's own, before the sigmoid (for a loss)."""
        hidden = hidden.to(self.outer.weight.dtype)
        read = nn.functional.gelu(self.inner(hidden)) if self.width else hidden
        out: Tensor = self.outer(read).squeeze(-1)
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
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        linear = set(shapes) == {"outer.weight", "outer.bias"}
        first = shapes.get("outer.weight" if linear else "inner.weight", ())
        if len(first) != 2:
            raise ValueError(f"{path} holds no value head (no inner.weight): give the file that ValueHead.save wrote")
        head = cls(first[1], 0 if linear else first[0])
        head.load_state_dict(weights)
        return head
