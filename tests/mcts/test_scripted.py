"""Promises of the scripted engine: it draws what the script says, by the request's own random stream."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mcts.engines.base import EngineFull
from mcts.engines.scripted import EOS, ScriptedEngine
from mcts.types import Reply, Request, Stop
from tests.mcts.toy import World

SCRIPT = {(): {"a b ;": 0.5, "a c ;": 0.3, "done yes": 0.2}, ("a b ;",): {"no": 1.0}, ("a c ;",): {"yes": 1.0}}


def engine(**options: object) -> ScriptedEngine:
    made = ScriptedEngine(lambda _, steps: SCRIPT[steps], lambda _, steps: len(steps) / 4, **options)  # type: ignore[arg-type]
    made.open(0, made.encode("q :"), 100)
    return made


def ask(made: ScriptedEngine, prefix: str = "q :", **options: object) -> Reply:
    fields = {"id": 0, "search": 0, "n": 1, "max_tokens": 8, "seed": 1, **options}
    made.submit(Request(prefix=made.encode(prefix), **fields))  # type: ignore[arg-type]
    (reply,) = made.poll()
    return reply


def test_frequencies_follow_the_script() -> None:
    texts = [step.text for step in ask(engine(), n=4000).steps]
    for text, p in SCRIPT[()].items():
        assert texts.count(text) / 4000 == pytest.approx(p, abs=0.04)  # five standard errors


def test_log_probabilities_follow_the_chain_rule_and_sum_to_the_steps() -> None:
    by_text = {step.text: step for step in ask(engine(), n=50).steps}
    assert by_text["a b ;"].logprobs == pytest.approx(np.log([0.8, 0.5 / 0.8, 1.0]), abs=1e-6)
    assert sum(by_text["done yes"].logprobs) == pytest.approx(math.log(0.2), abs=1e-6)


def test_a_final_step_ends_by_eos_which_is_no_text() -> None:
    step = ask(engine(), "q : a b ;").steps[0]
    assert (step.text, step.stop, step.token_ids[-1]) == ("no", Stop.EOS, EOS)


def test_a_step_longer_than_allowed_is_cut_with_the_probability_of_what_is_left() -> None:
    steps = ask(engine(), n=50, max_tokens=1).steps
    cut = next(step for step in steps if step.text == "a")
    assert (cut.stop, len(cut.token_ids)) == (Stop.LENGTH, 1)
    assert math.exp(cut.logprobs.sum()) == pytest.approx(0.8, abs=1e-6)


def test_sample_i_depends_on_seed_and_i_only() -> None:
    many = [step.text for step in ask(engine(), n=20).steps]
    assert [step.text for step in ask(engine(), n=5, id=99).steps] == many[:5]
    assert [step.text for step in ask(engine(), n=20, seed=2).steps] != many


def test_values_belong_to_the_last_token_of_step_and_prefix() -> None:
    reply = ask(engine(), "q : a c ;")
    assert (reply.prefix_value, reply.steps[0].value) == (0.25, 0.5)


def test_greedy_takes_the_likeliest_and_reports_how_it_was_sampled() -> None:
    step = ask(engine(), temperature=0.0).steps[0]
    assert step.text == "a b ;"
    assert step.behavior_logprobs is not None
    assert step.behavior_logprobs.sum() == 0.0
    assert step.logprobs.sum() == pytest.approx(math.log(0.5), abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    texts = {step.text for step in ask(engine(), n=200, top_p=0.6).steps}
    assert texts == {"a b ;", "a c ;"}


def test_tokens_are_counted_and_prefixes_forwarded_once() -> None:
    made = engine()
    first = ask(made, n=3)
    assert (first.prompt, first.cached) == (2, 0)
    assert made.sampled == sum(len(step.token_ids) for step in first.steps)
    second = ask(made)
    assert (second.prompt, second.cached) == (0, 2)


def test_capacity_admits_by_worst_case() -> None:
    made = engine(capacity=110)  # 102 are taken
    prompt = made.encode("q :")
    assert not made.open(1, prompt, 10)
    with pytest.raises(EngineFull, match="does not fit"):
        made.open(1, prompt, 109)
    made.close(0)
    assert made.open(1, prompt, 10)


def test_cancelled_and_closed_requests_bring_no_reply() -> None:
    made = engine()
    made.open(1, made.encode("q :"), 10)
    for id, search in ((1, 0), (2, 0), (3, 1)):
        made.submit(Request(id=id, search=search, prefix=made.encode("q :"), n=1, max_tokens=8, seed=0))
    made.cancel(1)
    made.close(1)
    assert [reply.request.id for reply in made.poll()] == [2]


def test_weights_are_not_changed_under_an_open_search() -> None:
    made = engine()
    with pytest.raises(RuntimeError, match="open"):
        made.load("anywhere", 3)
    made.close(0)
    made.load("anywhere", 3)
    assert made.version == 3


def test_decode_inverts_encode_without_eos() -> None:
    made = engine()
    assert made.decode(np.append(made.encode("q : a b"), EOS)) == "q : a b"


def test_probabilities_that_do_not_sum_to_one_are_refused() -> None:
    made = ScriptedEngine(lambda _, steps: {"a": 0.5})  # noqa: ARG005
    made.open(0, made.encode("q"), 10)
    with pytest.raises(ValueError, match="sum to"):
        ask(made, "q")


def test_a_world_is_a_function_of_its_seed() -> None:
    assert World(3).script("p", ()) == World(3).script("p", ())
    assert World(3).script("p", ()) != World(4).script("p", ())
