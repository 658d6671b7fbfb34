"""The server engine keeps the contract, and checks that what was asked is what a server brings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcts.engines.server import ServerEngine
from mcts.engines.server_asked import Asked, Omission
from mcts.engines.server_http import Client
from mcts.engines.server_protocol import read
from mcts.engines.server_value import LocalValue, ServedValue
from mcts.types import Request, Stop
from tests.mcts.engine_contract import EngineContract, drain, extend
from tests.mcts.fake_server import FakeServer, log_odds
from tests.mcts.fake_sglang import FakeSGLang
from tests.mcts.served import EOS, PROMPT, QUICK, ask, make
from tests.models import bpe_tokenizer, make_policy, save_model


class TestContract(EngineContract):
    """A server without a reward model keeps the contract but for values and excluded steps."""

    values = False


class TestContractWithLocalValues(EngineContract):
    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, value=LocalValue(folder))
        yield made
        made.shutdown()


class TestContractWithServedValues(EngineContract):
    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
        yield made
        made.shutdown()


class TestContractOneChoicePerCall(EngineContract):
    """For servers that ignore n; their prefix is read once per sample."""

    values = False

    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, service={"split": True})
        yield made
        made.shutdown()

    def test_a_reply_holds_n_steps_of_at_most_max_tokens_in_a_consistent_shape(self, engine: Any, prompt: str) -> None:
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 200)
        engine.submit(Request(1, 1, ids, 5, 7, seed=3))
        reply = drain(engine, 1)[1]
        assert (len(reply.steps), reply.prompt + reply.cached) == (5, 5 * len(ids))


OMISSIONS = {
    "ignores_n": "returned 1 choices where n=3",
    "same_index": "not numbered 0 to 2",
    "odd_index": "not numbered 0 to 2",
    "negative_usage": "no usage.prompt_tokens",
    "many_cached": "cached tokens of a prompt",
    "error_body": "answered with an error: \"{'message': 'the engine is not ready'}\"",
    "nan": "log-probability that is no number",
    "null": "log-probability that is no number",
    "few_ids": "token ids with",
    "no_logprobs": "no logprobs",
    "few_logprobs": "token ids with",
    "positive": "log-probability that is no number",
    "aborted": "finish_reason 'abort'",
    "other_text": "is not what its tokens say",
    "bad_id": "token ids outside",
    "ambiguous": "is not exactly one token",
    "ignores_stop": "drew on behind the end of a step",
    "ends_early": "without the token that ended it",
    "too_long": "tokens where 1 to 6 were asked for",
    "short_prompt": "read a prompt of",
    "wrong_count": "tokens are missing",
    "no_usage": "no usage.prompt_tokens",
    "other_model": "answered with model 'another'",
}


@pytest.mark.parametrize("fault", OMISSIONS)
def test_an_answer_that_is_not_what_was_asked_ends_the_request_with_a_sentence_that_names_it(
    server: FakeServer, engine: ServerEngine, fault: str
) -> None:
    server.always = fault
    reply = ask(engine)
    assert reply.steps == ()
    assert reply.error is not None
    assert OMISSIONS[fault] in reply.error
    assert len(server.seen) == 1, "asking again would not help"
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (1, 18), "it drew something for the refused answer"


@pytest.mark.parametrize("value", ["x" * 100_000, 10**4000, [0] * 100_000], ids=["text", "number", "list"])
@pytest.mark.parametrize(
    "field", ["model", "finish_reason", "completion_tokens", "prompt_tokens", "cached_tokens", "tokens"]
)
def test_whatever_a_server_says_its_sentence_stays_short(engine: ServerEngine, field: str, value: object) -> None:
    ids = engine.encode(PROMPT).tolist()
    asked = Asked("tiny", tuple(ids), 1, 1, False, False)
    choice: dict[str, Any] = {
        "index": 0, "text": "3", "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0], "tokens": ["3"]}
    }  # fmt: skip
    usage: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 1}
    answer: dict[str, Any] = {"model": "tiny", "choices": [choice], "usage": usage}
    assert len(read(answer, asked, engine.text).steps) == 1
    if field == "tokens":
        choice["logprobs"][field] = [value]
    elif field == "cached_tokens":
        usage["prompt_tokens_details"] = {field: value}
    else:
        ({"model": answer, "finish_reason": choice}.get(field, usage))[field] = value
    with pytest.raises(Omission) as found:
        read(answer, asked, engine.text)
    assert len(str(found.value)) < 400


def test_choices_in_another_order_are_put_back_by_their_index(server: FakeServer, engine: ServerEngine) -> None:
    plain = [step.token_ids.tolist() for step in ask(engine).steps]
    assert len({tuple(ids) for ids in plain}) > 1
    server.always = "reversed"
    assert [step.token_ids.tolist() for step in ask(engine).steps] == plain


def test_steps_hold_the_tokens_and_log_probabilities_that_the_server_drew(
    server: FakeServer, engine: ServerEngine
) -> None:
    ids = engine.encode(PROMPT)
    stops = set()
    for step in ask(engine, n=40).steps:
        path = ids.tolist()
        for token, logprob in zip(step.token_ids.tolist(), step.logprobs, strict=True):
            assert logprob == pytest.approx(log_odds(path, server.size, server.likely, 0)[token], abs=1e-6)
            path.append(token)
        assert (step.stop is Stop.EOS) == (step.token_ids[-1] == EOS)
        assert (step.stop is Stop.DELIMITER) == step.text.endswith(";")
        stops.add(step.stop)
    assert stops == set(Stop)


def test_the_delimiter_stays_in_the_step_although_the_servers_text_drops_it(
    server: FakeServer, engine: ServerEngine
) -> None:
    step = next(step for step in ask(engine, n=40).steps if step.stop is Stop.DELIMITER)
    assert step.text == engine.decode(step.token_ids)
    assert step.text.endswith(";")
    assert server.seen[0]["stop"] == [";"]


def test_tokens_are_recovered_from_their_texts_where_each_is_one_token(
    server: FakeServer, engine: ServerEngine
) -> None:
    plain = ask(engine)
    server.always = "no_token_ids"
    again = ask(engine)
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_sampling_that_a_server_does_not_describe_has_unknown_behaviour_odds(engine: ServerEngine) -> None:
    for step in ask(engine, temperature=0.7).steps:
        assert step.behavior_logprobs is not None
        assert np.isnan(step.behavior_logprobs).all()
        assert not np.isnan(step.logprobs).any()


def test_text_prompts_draw_the_same_as_token_ids(server: FakeServer, engine: ServerEngine, folder: Path) -> None:
    plain = ask(engine)
    other = make(server, folder, service={"prompt": "text"})
    again = ask(other)
    assert server.seen[-1]["prompt"] == PROMPT
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_a_prefix_whose_text_means_other_tokens_is_refused_where_only_text_is_taken(
    server: FakeServer, folder: Path
) -> None:
    engine = make(server, folder, service={"prompt": "text"})
    ids = extend(engine.encode(PROMPT), ())
    prefix = np.append(ids, [0, 0]).astype(np.int32)
    engine.text.plain = lambda _: None  # type: ignore[method-assign,assignment]
    reply = ask(engine, prefix=prefix)
    assert "would be read as other tokens" in str(reply.error)
    assert server.seen == []


def test_neutral_sampling_is_asked_for_so_that_the_models_own_defaults_do_not_bend_it(
    server: FakeServer, engine: ServerEngine
) -> None:
    ask(engine)
    body = server.seen[0]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["top_p"]) == (-1, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_step_ends_where_the_chat_template_ends_a_turn(dialect: str, tmp_path: Path) -> None:
    tok = bpe_tokenizer()
    turn, eos = tok.convert_tokens_to_ids(["<|im_end|>", tok.eos_token])
    assert turn != eos
    folder = save_model(tmp_path / "model", tok=tok)
    server = (FakeServer if dialect == "vllm" else FakeSGLang)(tok, eos)
    server.likely = (turn,)
    engine = make(server, folder, service={"dialect": dialect})
    try:
        steps = ask(engine, n=16, max_tokens=8).steps
        assert {step.token_ids[-1] for step in steps if step.stop is Stop.EOS} >= {turn}
        assert all(turn not in step.token_ids[:-1] for step in steps)
    finally:
        engine.shutdown()
        server.stop()


def test_served_values_are_read_by_index_and_label(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
    reply = ask(engine, n=12)
    assert reply.prefix_value == 0.75
    assert {step.value for step in reply.steps if step.stop is not Stop.EOS} == {0.75}
    assert all(math.isnan(step.value) for step in reply.steps if step.stop is Stop.EOS)


def test_a_pooled_logit_becomes_a_value_only_by_the_sigmoid(server: FakeServer, folder: Path) -> None:
    source = ServedValue(server.url, "prm", endpoint="pooling", sigmoid=True)
    engine = make(server, folder, value=source, value_client=Client(server.url, QUICK))
    assert ask(engine).prefix_value == pytest.approx(1.0 / (1.0 + math.exp(-2.0)))
    bare = ServedValue(server.url, "prm", endpoint="pooling")
    engine = make(server, folder, value=bare, value_client=Client(server.url, QUICK))
    assert "outside [0, 1]" in str(ask(engine).error)


def test_missing_values_end_the_request(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
    server.always = "few_values"
    reply = ask(engine)
    assert "one result for each" in str(reply.error)
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (1, server.sampled), "the steps are in no reply"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"index": {}, "probs": [0.5, 0.5]}, "not numbered"),
        ({"index": 0, "probs": [0.5, 10**400]}, "returned no number"),
        ({"index": 0, "probs": [0.5, math.nan]}, "returned no number"),
        ({"index": 0, "probs": [0.5]}, "returned no number"),
    ],
)
def test_what_is_no_value_is_refused(row: dict[str, object], said: str) -> None:
    with pytest.raises(Omission, match=said):
        ServedValue("http://x", "prm").read({"data": [row]}, 1)


def test_local_values_are_those_of_the_policys_head(server: FakeServer, folder: Path) -> None:
    import torch

    policy = make_policy()
    engine = make(server, folder, value=LocalValue(folder))
    reply = ask(engine)
    assert policy.head is not None
    with torch.inference_mode():
        hidden = policy.hidden(torch.tensor([engine.encode(PROMPT).tolist()]))
        assert reply.prefix_value == pytest.approx(float(policy.head(hidden[0, -1])), abs=1e-5)
