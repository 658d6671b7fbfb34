"""What a search driver asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mcts.types import Int32, Message, Reply, Request


class EngineFull(ValueError):
    """A search whose worst case can never fit into this engine."""


class Engine(Protocol):
    """Draws steps for many searches at once; requests come and go in any order.

    Keys and values of a search's tree are shared and kept until `close`. Admission is by worst case: `open`
    reserves room for `max_new_tokens`, so nothing of a live search is ever evicted.
    """

    name: str
    version: int
    """Version of the weights now loaded."""
    excludes: bool
    """Whether requests may exclude steps."""

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt as it will be sent, int32 [P], P >= 1."""
        ...

    def decode(self, token_ids: Int32) -> str: ...

    def open(self, search: int, prompt_ids: Int32, max_new_tokens: int) -> bool:
        """Reserve room for a search. False: no room now, ask again after a `close`.
        Raises EngineFull where it could not fit even alone, or the context is too short for the prompt."""
        ...

    def submit(self, request: Request) -> None: ...

    def poll(self) -> list[Reply]:
        """Work for a while (at least one forward where there is anything to do); the finished requests, in the
        order in which they finished. Empty only if nothing finished yet."""
        ...

    def cancel(self, request_id: int) -> None:
        """Drop a request; no reply will come. The tokens it drew are lost to the caller."""
        ...

    def close(self, search: int) -> None:
        """Forget a search: free its keys and values. Its open requests are cancelled."""
        ...

    def load(self, path: str, version: int) -> None:
        """New weights from a model folder. Raises RuntimeError while a search is open."""
        ...
