"""The one place where tokens are counted. A budget counts sampled tokens only; the rest is reported beside it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(slots=True)
class Usage:
    """Tokens that the engine really handled, and calls made. `sampled` includes `discarded`."""

    sampled: int = 0
    discarded: int = 0
    """Sampled but not kept in the tree (a repeated step, a cancelled request)."""
    prompt: int = 0
    cached: int = 0
    scored: int = 0
    calls: int = 0
    uncounted_calls: int = 0
    """Calls to a server whose drawn tokens are not in `sampled`, because it never said how many they were."""
    uncounted_tokens: int = 0
    """The most that these can have drawn."""

    def add(self, other: Usage) -> None:
        """Add the numbers of `other` to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Grant(NamedTuple):
    """How much of a wave of identical requests may be sent."""

    leaves: int
    n: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        return self.leaves * self.n * self.max_tokens


class TokenBudget:
    """Grants before and charges after; never exceeds its limit.

    A wave asks for `leaves` requests of `n` steps of at most `max_tokens` tokens. What does not fit is shrunk
    in a fixed order: leaves in flight, then n, then length. A grant reserves its worst case until it is
    charged with what was really sampled.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a token budget must be at least 1, not {limit}: raise the search's budget")
        self.limit = limit
        self.spent = 0
        self.reserved = 0

    @property
    def remaining(self) -> int:
        """Tokens neither spent nor reserved."""
        return self.limit - self.spent - self.reserved

    def grant(self, leaves: int, n: int, max_tokens: int) -> Grant:
        """The largest part of the wave that fits; a Grant of zero leaves where not one token is left."""
        if leaves < 1 or n < 1 or max_tokens < 1:
            raise ValueError("a wave needs at least one leaf, one step and one token")
        free = self.limit - self.spent - self.reserved
        wanted = leaves * n * max_tokens
        if wanted <= free:
            self.reserved += wanted
            return Grant(leaves, n, max_tokens)
        if free < 1:
            return Grant(0, 0, 0)
        leaves = min(leaves, max(1, free // (n * max_tokens)))
        n = min(n, max(1, free // (leaves * max_tokens)))
        max_tokens = min(max_tokens, free // (leaves * n))
        granted = Grant(leaves, n, max_tokens)
        self.reserved += granted.tokens
        return granted

    def charge(self, reserved: int, sampled: int) -> None:
        """Settle a grant of `reserved` tokens of which `sampled` were drawn."""
        if not 0 <= sampled <= reserved <= self.reserved:
            raise ValueError(f"{sampled} tokens charged against a grant of {reserved}, {self.reserved} reserved")
        self.reserved -= reserved
        self.spent += sampled
