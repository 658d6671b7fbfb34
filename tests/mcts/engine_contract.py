"""What every engine must promise to a search driver. A test module per engine defines a fixture `engine`
(module- or function-scoped) and a fixture `prompt` (text), then imports the class `EngineContract` and subclasses it.

What only some engines can promise is gated by the class attributes below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import pytest

from mcts.engines.base import Engine, EngineFull
from mcts.policy import drawn_step
from mcts.types import Drawn, Int32, Reply, Request, Step, Stop


def drain(engine: Engine, count: int, polls: int = 2000) -> dict[int, Reply]:
    """Poll until `count` requests have finished; replies by request id."""
    replies: dict[int, Reply] = {}
    for _ in range(polls):
        for reply in engine.poll():
            assert reply.request.id not in replies, "a request was answered twice"
            replies[reply.request.id] = reply
        if len(replies) >= count:
            return replies
    raise AssertionError(f"{count - len(replies)} of {count} requests never finished")


def same_step(a: Step, b: Step) -> bool:
    """Whether two steps are equal to the last bit."""
    return (
        a.text == b.text
        and a.stop == b.stop
        and np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        and (a.value == b.value or (math.isnan(a.value) and math.isnan(b.value)))
        and (a.behavior_logprobs is None) == (b.behavior_logprobs is None)
        and (a.behavior_logprobs is None or np.array_equal(a.behavior_logprobs, b.behavior_logprobs))
    )


def same_reply(a: Reply, b: Reply) -> bool:
    """Whether two replies hold equal steps and prefix values, to the last bit."""
    return (
        len(a.steps) == len(b.steps)
        and all(same_step(x, y) for x, y in zip(a.steps, b.steps, strict=True))
        and (a.prefix_value == b.prefix_value or (math.isnan(a.prefix_value) and math.isnan(b.prefix_value)))
    )


def extend(prefix: Int32, steps: Iterable[Step]) -> Int32:
    """`prefix` and the tokens of `steps` behind it."""
    return np.concatenate([prefix, *(step.token_ids for step in steps)], dtype=np.int32)


class EngineContract:
    """Subclass it beside the fixtures `engine` (no search open) and `prompt`."""

    values: ClassVar[bool] = True
    """The engine has a value head."""
    capacity: ClassVar[int] = 4096
    """Tokens that certainly do not fit into the fixture's engine."""

    def test_a_reply_holds_n_steps_of_at_most_max_tokens_in_a_consistent_shape(
        self, engine: Engine, prompt: str
    ) -> None:
        ids = engine.encode(prompt)
        assert ids.dtype == np.int32
        assert engine.open(1, ids, 200)
        engine.submit(Request(1, 1, ids, 5, 7, seed=3))
        reply = drain(engine, 1)[1]
        assert reply.error is None
        assert len(reply.steps) == 5
        assert reply.prompt + reply.cached == len(ids)
        assert self.values == (not math.isnan(reply.prefix_value))
        for step in reply.steps:
            count = len(step.token_ids)
            assert 1 <= count <= 7
            assert step.logprobs.shape == (count,)
            assert step.token_ids.dtype == np.int32
            assert step.logprobs.dtype == np.float32
            assert (step.logprobs <= 1e-6).all()
            assert step.behavior_logprobs is None
            assert step.text == engine.decode(step.token_ids)
            assert step.stop is not Stop.LENGTH or count == 7
            assert math.isnan(step.value) == (not self.values or step.stop is Stop.EOS)
        engine.close(1)

    def test_samples_of_one_request_differ_and_its_seed_repeats_them(self, engine: Engine, prompt: str) -> None:
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 1000)
        for i, seed in enumerate((7, 7, 8)):
            engine.submit(Request(i, 1, ids, 8, 6, seed=seed))
        replies = drain(engine, 3)
        assert len({step.token_ids.tobytes() for step in replies[0].steps}) > 1
        assert [s.token_ids.tolist() for s in replies[0].steps] == [s.token_ids.tolist() for s in replies[1].steps]
        assert [s.token_ids.tolist() for s in replies[0].steps] != [s.token_ids.tolist() for s in replies[2].steps]
        engine.close(1)

    def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(self, engine: Engine, prompt: str) -> None:
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 1000)
        for i in range(2):
            engine.submit(Request(i, 1, ids, 2, 6, seed=i, temperature=0.0))
        replies = drain(engine, 2)
        steps = [step for reply in replies.values() for step in reply.steps]
        assert len({step.token_ids.tobytes() for step in steps}) == 1
        for step in steps:
            assert step.behavior_logprobs is not None
            assert (step.behavior_logprobs == 0.0).all()
            assert (step.logprobs < 0.0).all()
        engine.close(1)

    def test_excluded_steps_are_not_drawn_again_and_the_others_keep_their_odds(
        self, engine: Engine, prompt: str
    ) -> None:
        if not engine.excludes:
            pytest.skip("this engine cannot exclude steps")
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 1000)
        drawn: dict[bytes, Step] = {}
        for i in range(12):
            gone = sum(math.exp(step.logprobs.sum()) for step in drawn.values())
            if 1.0 - gone < 1e-3:
                break
            exclude = tuple(drawn_step(step) for step in drawn.values())
            engine.submit(Request(i, 1, ids, 2, 6, seed=i, exclude=exclude))
            for step in drain(engine, 1)[i].steps:
                assert step.token_ids.tobytes() not in drawn
                if exclude:  # P(step | none of the excluded) = P(step) / (1 - P(excluded))
                    assert step.behavior_logprobs is not None
                    expected = step.logprobs.sum() - math.log(1.0 - gone)
                    assert step.behavior_logprobs.sum() == pytest.approx(expected, abs=2e-3)
            drawn[step.token_ids.tobytes()] = step
        assert len(drawn) > 2
        engine.close(1)

    def test_where_nothing_else_is_left_excluded_steps_are_drawn(self, engine: Engine, prompt: str) -> None:
        if not engine.excludes:
            pytest.skip("this engine cannot exclude steps")
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 100)
        engine.submit(Request(0, 1, ids, 1, 6, seed=0))
        plain = drain(engine, 1)[0].steps[0]
        certain = Drawn(tuple(plain.token_ids.tolist()), (1.0,) * len(plain.token_ids))
        engine.submit(Request(1, 1, ids, 1, 6, seed=0, exclude=(certain,)))
        assert drain(engine, 1)[1].steps[0].token_ids.tolist() == plain.token_ids.tolist()
        engine.close(1)

    def test_a_search_that_can_never_fit_is_refused_at_once(self, engine: Engine, prompt: str) -> None:
        with pytest.raises(EngineFull):
            engine.open(1, engine.encode(prompt), self.capacity)

    def test_admission_waits_for_room_and_close_makes_it(self, engine: Engine, prompt: str) -> None:
        ids = engine.encode(prompt)
        opened = 0
        while engine.open(opened, ids, 500):
            opened += 1
            assert opened < 100
        assert opened >= 1
        engine.close(0)
        assert engine.open(opened, ids, 500)
        for search in range(1, opened + 1):
            engine.close(search)

    def test_a_cancelled_request_gets_no_reply_and_the_others_do(self, engine: Engine, prompt: str) -> None:
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 1000)
        for i in range(3):
            engine.submit(Request(i, 1, ids, 2, 8, seed=i))
        engine.cancel(1)
        assert set(drain(engine, 2)) == {0, 2}
        assert engine.poll() == []
        engine.close(1)

    def test_closing_a_search_drops_its_requests_and_no_others(self, engine: Engine, prompt: str) -> None:
        ids = engine.encode(prompt)
        for search in (1, 2):
            assert engine.open(search, ids, 300)
            engine.submit(Request(search, search, ids, 3, 8, seed=5))
        engine.close(1)
        assert set(drain(engine, 1)) == {2}
        engine.close(2)
        assert engine.poll() == []

    def test_weights_cannot_change_while_a_search_is_open(self, engine: Engine, prompt: str) -> None:
        assert engine.open(1, engine.encode(prompt), 100)
        with pytest.raises(RuntimeError, match="open"):
            engine.load("nowhere", 1)
        engine.close(1)
