"""The worked examples of a learning phase, step by step, made beside the step before where a second thread is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import islice

from mcts.tasks.base import Example
from selfplay.errors import UserError
from selfplay.packing import Item


class Feed:
    """`size` examples of `stream` a time, encoded. What comes is a function of the stream, whether or not it was made
    ahead; an error comes out of `take`."""

    def __init__(
        self,
        stream: Iterator[Example],
        encode: Callable[[Sequence[Example]], list[Item]],
        size: int,
        max_length: int,
    ) -> None:
        self.size = size
        self.drawn = 0
        """Examples taken so far; what was only made ahead does not count."""
        self._stream = stream
        self._encode = encode
        self._max_length = max_length
        self._coming: Future[list[Item]] | None = None

    def skip(self, count: int) -> None:
        """Begin behind the first `count` examples of the stream."""
        next(islice(self._stream, count, count), None)
        self.drawn = count

    def take(self) -> list[Item]:
        """The next step's items; fewer than `size` where the stream ends. Raises UserError for one that is too long."""
        found = self._make() if self._coming is None else self._coming.result()
        self._coming = None
        self.drawn += len(found)
        return found

    def look_ahead(self, pool: Executor) -> None:
        """Let `pool` make what the next `take` gives."""
        if self._coming is None:
            self._coming = pool.submit(self._make)

    def _make(self) -> list[Item]:
        examples = list(islice(self._stream, self.size))
        found = self._encode(examples) if examples else []
        for example, item in zip(examples, found, strict=True):
            if len(item) > self._max_length:
                raise UserError(
                    f"the worked example of {example.problem.id} has {len(item)} tokens, more than "
                    f"engine.max_context ({self._max_length}): raise it, or leave out such examples"
                )
        return found
