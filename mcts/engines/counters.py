"""What an engine did, for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What the engine did since it was built."""

    forwarded: int = 0
    """Tokens that went through the model: prompt tokens and drawn tokens, padding left out."""
    padded: int = 0
    """Row forwards that carried no token."""
    drawn: int = 0
    """Tokens drawn, EOS included."""
    copied: int = 0
    """Tokens whose keys and values were copied into a row."""
    forwards: int = 0
    forward_seconds: float = 0.0
    poll_seconds: float = 0.0
