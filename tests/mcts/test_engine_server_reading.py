"""Steps behind a prefix that ends inside a character, where servers look for the delimiter in the prefix too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mcts.engines.server import ServerEngine
from mcts.engines.server_asked import Asked, Omission
from mcts.engines.server_reading import ending
from mcts.engines.server_text import Text
from mcts.types import Int32, Stop
from tests.mcts.fake_server import Detokenizer, FakeServer, log_odds
from tests.mcts.served import ask, make
from tests.models import bpe_tokenizer, save_model

LINES = "How many\nclips?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte-pair tokenizer."""
    return save_model(tmp_path_factory.mktemp("bytes"), tok=bpe_tokenizer())


@pytest.fixture
def server() -> Iterator[FakeServer]:
    tok = bpe_tokenizer()
    made = FakeServer(tok, tok.eos_token_id)
    made.streams = True
    made.likely = (tok.eos_token_id, *tok("\n")["input_ids"], *tok("\u00e9")["input_ids"])
    yield made
    made.stop()


@pytest.fixture
def engine(server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
    made = make(server, folder, delimiter="\n")
    yield made
    made.shutdown()


def inside(engine: ServerEngine, text: str) -> Int32:
    """`text` and the first byte of a character."""
    ids = np.append(engine.encode(text), engine.encode("\u00e9")[:1]).astype(np.int32)
    assert engine.decode(ids).endswith("\ufffd")
    return ids


def test_a_step_that_was_ended_by_a_delimiter_in_its_prefix_is_drawn_on(
    server: FakeServer, engine: ServerEngine
) -> None:
    prefix = inside(engine, LINES)
    reply = ask(engine, LINES, prefix=prefix, n=24, max_tokens=12)
    assert reply.error is None
    assert 12 < len(server.seen) <= 25, "almost every step was ended too early, once"
    for step in reply.steps:
        path = prefix.tolist()
        for token, logprob in zip(step.token_ids.tolist(), step.logprobs.tolist(), strict=True):
            assert logprob == pytest.approx(log_odds(path, server.size, server.likely, 0)[token], abs=1e-5)
            path.append(token)
        assert step.text == engine.decode(step.token_ids)
        assert (step.stop is Stop.DELIMITER) == ("\n" in step.text)
        assert "\n" not in engine.decode(step.token_ids[:-1])
        assert (step.stop is Stop.LENGTH) == (step.stop not in (Stop.EOS, Stop.DELIMITER))
        assert len(step.token_ids) == 12 or step.stop is not Stop.LENGTH
    assert {step.stop for step in reply.steps} == set(Stop)
    assert sum(len(step.token_ids) for step in reply.steps) == server.sampled
    assert reply.prompt + reply.cached == sum(len(body["prompt"]) for body in server.seen)
    assert reply.uncounted_calls == 0


def test_what_is_drawn_on_uses_other_random_numbers(server: FakeServer, engine: ServerEngine) -> None:
    ask(engine, LINES, prefix=inside(engine, LINES), n=24, max_tokens=12)
    seeds = [body["seed"] + i for body in server.seen for i in range(body["n"])]
    assert len(set(seeds)) == len(seeds)


def test_a_request_whose_step_cannot_be_drawn_on_fails_and_its_tokens_are_uncounted(
    server: FakeServer, engine: ServerEngine
) -> None:
    server.faults.extend(["none", "400"])
    reply = ask(engine, LINES, prefix=inside(engine, LINES), n=1, max_tokens=12)
    assert "status 400" in str(reply.error)
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (1, server.sampled)


def test_the_text_of_a_prefix_that_ends_inside_a_character_may_come_with_the_steps(
    server: FakeServer, engine: ServerEngine
) -> None:
    reply = ask(engine, "How many clips?", prefix=inside(engine, "How many clips?"), n=24, max_tokens=12)
    assert reply.error is None
    assert len(server.seen) == 1, "there is no delimiter in the prefix"


@pytest.mark.parametrize("text", ["How many clips?", LINES])
def test_an_early_end_is_refused_where_the_prefix_does_not_explain_it(
    server: FakeServer, engine: ServerEngine, text: str
) -> None:
    server.always = "ends_early"
    prefix = engine.encode(text) if "\n" in text else inside(engine, text)
    assert "without the token that ended it" in str(ask(engine, text, prefix=prefix, max_tokens=12).error)


@pytest.mark.parametrize("delimiter", ["\n", "\n\n"])
def test_whatever_a_detokenizer_gives_out_for_tokens_is_read_as_they_are(folder: Path, delimiter: str) -> None:
    """Random prefixes and draws, rich in pieces of characters and line ends."""
    text, tok, pick = Text(folder, delimiter), bpe_tokenizer(), random.Random(0)
    pieces = [i for i in range(len(tok)) if "\ufffd" in text.decode([i])] + tok("\n")["input_ids"]
    early = 0
    for _ in range(3000):
        token = [pick.choice(pieces) if pick.random() < 0.4 else pick.randrange(len(tok)) for _ in range(20)]
        prefix, drawn = tuple(token[: pick.randrange(1, 11)]), token[11:]
        stream, ids, reason, said = Detokenizer(tok, list(prefix)), [], "length", ""
        for i in drawn:
            ids.append(i)
            if i in text.eos_ids:
                reason = "stop"
                break
            said = stream.add(i)
            if delimiter in said:
                reason, said = "stop", said.partition(delimiter)[0]
                break
        asked = Asked("tiny", prefix, 1, len(drawn), False, False)
        stop = ending({"finish_reason": reason, "text": said}, ids, asked, text)
        assert (stop is Stop.DELIMITER) == (delimiter in text.decode(ids))
        assert (stop is Stop.EOS) == (ids[-1] in text.eos_ids)
        early += stop is None
        with pytest.raises(Omission, match="is not what its tokens say"):
            ending({"finish_reason": reason, "text": f"{said}x#"}, ids, asked, text)
    assert early > 10
