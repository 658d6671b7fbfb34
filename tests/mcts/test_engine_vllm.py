"""The server engine against a real vLLM server, opt-in (marker `server`): see tests/vllm_server.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mcts.engines.model import load_policy, turn_end
from mcts.engines.server import ServerEngine, Service
from mcts.engines.server_http import Client, Patience
from mcts.engines.server_text import Text
from mcts.engines.server_value import LocalValue
from mcts.engines.server_weights import VLLM, Reload, Weights
from mcts.types import Request, SettingError, Stop
from tests.mcts.engine_contract import EngineContract, drain, extend
from tests.vllm_server import BLOCK, NAME, Served, needs_vllm

pytestmark = needs_vllm
PROMPT = "How many clips did Natalia sell altogether in April and May? She sold 48 clips in April.\n"
DELIMITER = "\n"


@pytest.fixture
def engine(vllm: Served) -> Iterator[ServerEngine]:
    made = ServerEngine(
        Client(vllm.server.url, Patience(deadline=120.0)), Service(NAME), Text(vllm.a, DELIMITER), context=512,
        kv_slots=4096, value=LocalValue(vllm.a), reload=VLLM,
    )  # fmt: skip
    made.load(str(vllm.a), 0)
    yield made
    made.shutdown()


@pytest.fixture
def prompt() -> str:
    return PROMPT


class TestContract(EngineContract):
    capacity = 8192


def test_served_log_probabilities_are_the_folders_own(engine: ServerEngine, vllm: Served) -> None:
    policy = load_policy(vllm.a)
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    engine.submit(Request(1, 1, ids, 8, 24, seed=5))
    worst, stops = 0.0, set()
    for step in drain(engine, 1)[1].steps:
        row = torch.from_numpy(extend(ids, [step]).astype(np.int64))[None]
        with torch.inference_mode():
            logprobs = torch.log_softmax(policy.unembed(policy.hidden(row)[0]), -1)
        own = logprobs[len(ids) - 1 : -1].gather(1, row[0, len(ids) :, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(own - step.logprobs).max()))
        stops.add(step.stop)
    print(f"largest gap of log-probabilities {worst:.2e} nats; stops {sorted(stops)}")
    assert worst < 1e-2
    engine.close(1)


def test_a_step_ends_where_the_chat_template_ends_a_turn(vllm: Served) -> None:
    text = Text(vllm.a, DELIMITER)
    turn = turn_end(load_policy(vllm.a).tokenizer)
    assert turn is not None
    often = Service(NAME, extra={"logit_bias": {str(turn): 8.0}})
    engine = ServerEngine(Client(vllm.server.url, Patience(deadline=120.0)), often, text, context=512, kv_slots=4096)
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    engine.submit(Request(1, 1, ids, 16, 24, seed=5))
    steps = drain(engine, 1)[1].steps
    print(f"{sum(step.token_ids[-1] == turn for step in steps)} of {len(steps)} steps end with the turn")
    assert any(step.token_ids[-1] == turn and step.stop is Stop.EOS for step in steps)
    assert all(turn not in step.token_ids[:-1] for step in steps)
    engine.shutdown()


def test_cached_tokens_are_the_whole_blocks_that_the_tree_shares(engine: ServerEngine) -> None:
    """A tree grown path by path: every prefix finds the blocks of tokens that were forwarded before it (all but the
    last token of what was drawn, and always one token less than itself)."""
    base = engine.encode(f"{os.urandom(8).hex()} {PROMPT}")
    known: set[tuple[int, ...]] = set()
    assert engine.open(1, base, 3000)
    rows, frontier, count, drawn_on = [], [base], 0, 0
    for _ in range(4):
        below = []
        for prefix in [prefix for prefix in frontier for _ in range(2)]:
            # One sample: of several, vLLM reports the last one's cache, which its siblings have filled.
            engine.submit(Request(count, 1, prefix, 1, 24, seed=count))
            reply = drain(engine, 1)[count]
            count += 1
            assert reply.error is None
            ids = prefix.tolist()
            expected = 0
            while expected + BLOCK < len(ids) and tuple(ids[: expected + BLOCK]) in known:
                expected += BLOCK
            if reply.prompt + reply.cached == len(ids):
                rows.append((len(ids), reply.cached, expected))
            else:  # two calls: vLLM found the delimiter in the prefix, and the step was drawn on
                assert engine.decode(prefix).endswith("\ufffd")
                drawn_on += 1
            for step in reply.steps:
                forwarded = (ids + step.token_ids.tolist())[:-1]
                known.update(tuple(forwarded[:end]) for end in range(BLOCK, len(forwarded) + 1, BLOCK))
            below += [extend(prefix, [step]) for step in reply.steps[:2] if step.stop is not Stop.EOS]
        frontier = below
    print(f"{drawn_on} of {count} steps drawn on; {len(rows)} (prefix, cached, whole blocks shared): {rows}")
    assert [cached for _, cached, _ in rows] == [expected for _, _, expected in rows]
    assert len(rows) >= 5
    assert sum(cached for _, cached, _ in rows) > 0
    engine.close(1)


def test_a_prefix_that_ends_inside_a_character_gets_whole_steps(engine: ServerEngine) -> None:
    """vLLM looks for the delimiter in the text of such a prefix too, and ends the step with its first token."""
    ids = engine.encode(PROMPT)
    inside = extend(ids, [])
    inside = np.append(inside, engine.encode("\u00e9")[:1]).astype(np.int32)
    assert engine.decode(inside).endswith("\ufffd")
    assert engine.open(1, ids, 2000)
    engine.submit(Request(1, 1, inside, 12, 24, seed=5))
    reply = drain(engine, 1)[1]
    assert reply.error is None
    assert reply.prompt + reply.cached > len(inside), "no step was drawn on: vLLM does not do this any more"
    for step in reply.steps:
        assert (step.stop is Stop.LENGTH) == (len(step.token_ids) == 24 and DELIMITER not in step.text)
        assert (step.stop is Stop.DELIMITER) == (DELIMITER in step.text)
    assert max(len(step.token_ids) for step in reply.steps) > 1
    engine.close(1)


def test_new_weights_are_served_and_proved(engine: ServerEngine, vllm: Served) -> None:
    for version, folder in ((1, vllm.b), (2, vllm.a)):
        engine.load(str(folder), version)
        assert engine.version == version


def test_weights_that_were_not_loaded_are_found_out(engine: ServerEngine, vllm: Served) -> None:
    with pytest.raises(SettingError, match="serves other weights"):
        Weights(engine.client, NAME, Reload(check="logprobs")).load(str(vllm.b), 1)
