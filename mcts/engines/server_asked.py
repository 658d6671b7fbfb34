"""One call to a completions server: what is asked for, and the error of an answer that is something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


class Omission(Exception):
    """The server did not do what was asked of it."""


class OtherWeights(Omission):
    """The server drew with other weights than those that it was given."""


def shown(value: object) -> str:
    """A server's value for a sentence: of any type, and never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def numbered(rows: Sequence[object], count: int, what: str) -> list[Mapping[str, Any]]:
    """The objects `rows` in the order of their `index`, which must be 0 to count - 1. Raises Omission."""
    by_index = {row["index"]: row for row in rows if isinstance(row, dict) and type(row.get("index")) is int}
    if len(rows) != count or set(by_index) != set(range(count)):
        raise Omission(f"{what} are not numbered 0 to {count - 1}")
    return [by_index[i] for i in range(count)]


@dataclass(frozen=True, slots=True)
class Begun:
    """The tokens so far of a step that the server ended before its end (`server_reading`): the draw goes on."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """One call: `n` choices after `prefix`, of at most `max_tokens` tokens each."""

    model: str
    prefix: tuple[int, ...]
    n: int
    max_tokens: int
    greedy: bool
    bent: bool
    """Sampled otherwise than at temperature 1 and top_p 1."""
    first: int = 0
    """The request's sample that choice 0 is."""
    begun: Begun = Begun()
    """How the step of the only choice began; `prefix` ends with its tokens."""
    version: str | None = None
    """Name of the weights that must have drawn the answer, where it names them; None: any."""
    again: bool = False
    """Asked for the second time, since other weights drew the first answer."""

    @property
    def most(self) -> int:
        """Tokens that the call can draw."""
        return self.n * self.max_tokens

    def behind(self, choice: int, begun: Begun) -> Asked:
        """The call that goes on with `choice` of this one, which ended too early; `begun`: its step so far."""
        new = begun.token_ids[len(self.begun.token_ids) :]
        prefix, left = self.prefix + new, self.max_tokens - len(new)
        return replace(self, prefix=prefix, n=1, max_tokens=left, first=self.first + choice, begun=begun, again=False)
