"""What the stream of worked examples promises."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcts.tasks.base import Example
from mcts.types import Problem
from selfplay.errors import UserError
from selfplay.feed import Feed
from selfplay.packing import Item, chain


def stream(count: int) -> Iterator[Example]:
    for k in range(count):
        yield Example(problem=Problem(id=str(k), prompt="", meta={}), steps=(), values=(1.0,), imitate=True)


def encode(examples: Sequence[Example]) -> list[Item]:
    """As many tokens as its number says, and one."""
    return [chain([7] * (int(example.problem.id) + 1)) for example in examples]


def numbers(items: Sequence[Item]) -> list[int]:
    return [len(item) - 1 for item in items]


def feed(count: int, *, max_length: int = 99) -> Feed:
    return Feed(stream(count), encode, 3, max_length)


@pytest.mark.parametrize("ahead", [(), (0,), (1, 3), (0, 1, 2, 3, 4)])
def test_looking_ahead_changes_nothing_of_what_comes(ahead: Sequence[int]) -> None:
    found = []
    plenty = feed(11)
    with ThreadPoolExecutor(2) as pool:
        for step in range(5):
            found.append(numbers(plenty.take()))
            assert plenty.drawn == sum(map(len, found))
            if step in ahead:
                plenty.look_ahead(pool)
                plenty.look_ahead(pool)
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10], []]


def test_a_feed_goes_on_behind_what_another_had_taken_and_not_behind_what_it_had_made_ahead() -> None:
    first, second = feed(30), feed(30)
    with ThreadPoolExecutor(1) as pool:
        first.take()
        first.look_ahead(pool)
    second.skip(first.drawn)
    assert numbers(second.take()) == numbers(first.take()) == [3, 4, 5]
    assert second.drawn == first.drawn == 6


def test_an_example_that_is_too_long_is_named_where_it_is_taken() -> None:
    short = feed(9, max_length=4)
    with ThreadPoolExecutor(1) as pool:
        assert len(list(itertools.chain(short.take()))) == 3
        short.look_ahead(pool)
        with pytest.raises(UserError, match=r"example of 4 has 5 tokens, more than engine.max_context \(4\)"):
            short.take()
