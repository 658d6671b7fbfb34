"""Bookkeeping of cached keys and values: which token slots are free, and which prefixes of a search are cached.

No tensors here: the tensor that the slots index is `torch_forward.Forward.arena`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from mcts.types import Float32, Int32


class SlotPool:
    """Token slots [0, size): reserved by number at admission, handed out singly when tokens are stored."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"kv_slots must be at least 1, not {size}")
        self.size = size
        self.reserved = 0
        self._free = np.arange(size - 1, -1, -1, dtype=np.int32)  # a stack, top at the end
        self._top = size

    @property
    def used(self) -> int:
        """Slots that hold a token now."""
        return self.size - self._top

    def reserve(self, count: int) -> bool:
        """Promise `count` slots; False where that many are not left."""
        if self.reserved + count > self.size:
            return False
        self.reserved += count
        return True

    def release(self, count: int) -> None:
        """Take a promise of `count` slots back."""
        self.reserved -= count

    def take(self, count: int) -> Int32:
        """`count` free slots, int32 [count]. Holders of a reservation always find them."""
        if count > self._top:
            raise RuntimeError(f"{count} KV slots wanted, {self._top} free: more was stored than reserved")
        self._top -= count
        return self._free[self._top : self._top + count].copy()

    def give(self, slots: Int32) -> None:
        """Return slots that `take` handed out."""
        self._free[self._top : self._top + len(slots)] = slots
        self._top += len(slots)


@dataclass(eq=False, slots=True)
class Prefix:
    """A cached prefix: what is needed to continue after its last token."""

    parent: Prefix | None
    length: int
    """Tokens from the first prompt token to the last of this prefix."""
    slots: Int32  # [T] where the keys and values of its own last T tokens lie
    hidden: Float32  # [d] final hidden state (after the last norm) at its last token
    value: float = math.nan
    """Value head at its last token, in [0, 1]."""

    def path(self) -> Int32:
        """Slots of all its tokens, first to last, int32 [length]."""
        parts = [self.slots]
        node = self.parent
        while node is not None:
            parts.append(node.slots)
            node = node.parent
        return np.concatenate(parts[::-1]) if len(parts) > 1 else self.slots


@dataclass(eq=False, slots=True)
class PrefixCache:
    """The cached prefixes of one search, found by their exact tokens; nothing leaves before the search ends."""

    prompt: Int32  # [P]
    limit: int
    """Slots reserved: prompt and new tokens."""
    used: int = 0
    """Slots filled."""
    pending: int = 0
    """Worst case of the requests under way, in tokens."""
    prompt_key: bytes = b""
    """The prompt's tokens as bytes."""
    prefixes: dict[bytes, Prefix] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    """Lengths at which some prefix ends."""

    def __post_init__(self) -> None:
        self.prompt_key = self.prompt.tobytes()

    def find(self, key: bytes) -> Prefix | None:
        """The prefix whose int32 tokens are exactly `key`."""
        return self.prefixes.get(key)

    def longest(self, tokens: Int32) -> Prefix | None:
        """The longest cached proper prefix of `tokens`; None where not even the prompt is cached."""
        for length in sorted(self.ends, reverse=True):
            if length < len(tokens):
                found = self.prefixes.get(tokens[:length].tobytes())
                if found is not None:
                    return found
        return None

    def add(self, key: bytes, prefix: Prefix) -> None:
        """Remember `prefix` under its tokens; it must be new."""
        self.prefixes[key] = prefix
        self.ends.add(prefix.length)
        self.used += len(prefix.slots)

    def drain(self) -> Int32:
        """Every slot held, int32 [used], to be given back; the cache is empty afterwards."""
        slots = [prefix.slots for prefix in self.prefixes.values()]
        self.prefixes.clear()
        self.ends.clear()
        self.used = 0
        return np.concatenate(slots) if slots else np.empty(0, dtype=np.int32)
