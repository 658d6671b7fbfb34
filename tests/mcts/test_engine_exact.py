"""Promise 2: on a CPU in float32, what a request draws does not depend, to the last bit, on how it was served."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch

from mcts.engines.torch_engine import TorchEngine
from mcts.types import Int32, Reply, Request, Stop
from tests.mcts.engine_contract import drain, extend, same_reply
from tests.models import FAMILIES, make_policy

PROMPT = "3 7 12 -> 33 :"
OTHERS = 256


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, rows: int = 96) -> TorchEngine:
    engine = TorchEngine(make_policy(family), ";", rows=rows, kv_slots=40000)
    assert engine.exact
    return engine


def wanted(prefix: Int32, id: int = 0, search: int = 0) -> Request:
    return Request(id, search, prefix, 4, 9, seed=1234)


@cache
def alone(family: str) -> tuple[Int32, Reply, Int32, Reply]:
    """(prompt, reply, prompt + a step, reply there) with nothing else in the engine."""
    engine = build(family)
    prompt = engine.encode(PROMPT)
    assert engine.open(0, prompt, 500)
    engine.submit(wanted(prompt))
    first = drain(engine, 1)[0]
    below = extend(prompt, [next(step for step in first.steps if step.stop is not Stop.EOS)])
    engine.submit(wanted(below))
    return prompt, first, below, drain(engine, 1)[0]


def crowd(engine: TorchEngine, count: int = OTHERS) -> None:
    """Open and submit `count` other searches of mixed prompts, lengths, temperatures and nuclei."""
    rng = np.random.default_rng(5)
    for i in range(1, count + 1):
        prompt = rng.integers(3, 100, rng.integers(1, 90)).astype(np.int32)
        assert engine.open(i, prompt, 40)
        temperature = (1.0, 0.0, 0.5)[i % 3] if i % 2 else 1.0
        engine.submit(Request(i, i, prompt, 2, 20, seed=i, temperature=temperature, top_p=0.8 if i % 5 == 0 else 1.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("last", [False, True], ids=["first in the queue", "last in the queue"])
def test_a_request_among_256_others_gets_the_bits_it_gets_alone(family: str, last: bool) -> None:
    prompt, at_prompt, below, at_step = alone(family)
    engine = build(family)
    assert engine.open(0, prompt, 500)
    if last:
        crowd(engine)
    engine.submit(wanted(prompt))
    if not last:
        crowd(engine)
    replies = {}
    while 0 not in replies:
        replies.update({reply.request.id: reply for reply in engine.poll()})
    assert same_reply(replies[0], at_prompt)
    engine.submit(wanted(below))
    del replies[0]
    while 0 not in replies:
        replies.update({reply.request.id: reply for reply in engine.poll()})
    assert same_reply(replies[0], at_step)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputed_prefix_gives_the_bits_of_a_shared_one(family: str) -> None:
    prompt, _, below, expected = alone(family)
    engine = build(family)
    assert engine.open(0, prompt, 500)
    engine.submit(wanted(below))
    reply = drain(engine, 1)[0]
    assert reply.prompt == len(below)
    assert expected.prompt == 0
    assert same_reply(reply, expected)


def test_a_recomputed_long_prompt_and_path_gives_the_bits_of_a_shared_one() -> None:
    prompt = np.random.default_rng(1).integers(3, 100, 150).astype(np.int32)
    engine = build("llama")
    assert engine.open(0, prompt, 500)
    engine.submit(wanted(prompt))
    first = drain(engine, 1)[0]
    below = extend(prompt, [next(step for step in first.steps if step.stop is not Stop.EOS)])
    engine.submit(wanted(below))
    expected = drain(engine, 1)[0]
    for crowded in (False, True):
        again = build("llama")
        assert again.open(0, prompt, 500)
        if crowded:
            crowd(again, 40)
        again.submit(wanted(below))
        replies = drain(again, 41 if crowded else 1)
        assert same_reply(replies[0], expected)


def test_a_prefix_that_ends_inside_a_step_is_completed_and_gives_equal_bits() -> None:
    prompt, _, below, _ = alone("llama")
    inside = below[:-1]
    replies = []
    for warm in (False, True):
        engine = build("llama")
        assert engine.open(0, prompt, 500)
        if warm:
            engine.submit(wanted(below, id=1))
            drain(engine, 1)
        engine.submit(wanted(inside))
        replies.append(drain(engine, 1)[0])
    assert same_reply(*replies)


@pytest.mark.parametrize("rows", [16, 48, 256])
def test_the_number_of_rows_leaves_bits_alone_where_the_engine_says_so(rows: int) -> None:
    prompt, expected, _, _ = alone("llama")
    engine = build("llama", rows)
    assert engine.open(0, prompt, 500)
    crowd(engine, 30)
    engine.submit(wanted(prompt))
    assert same_reply(drain(engine, 31)[0], expected)


def test_identical_steps_are_kept_once() -> None:
    engine = build("llama")
    prompt = engine.encode(PROMPT)
    assert engine.open(0, prompt, 500)
    for i in range(3):
        engine.submit(wanted(prompt, id=i))
    replies = drain(engine, 3)
    assert same_reply(replies[0], replies[1])
    distinct = {step.token_ids.tobytes() for step in replies[0].steps if step.stop is not Stop.EOS}
    assert engine._pool.used == len(prompt) + sum(len(tokens) // 4 for tokens in distinct)
