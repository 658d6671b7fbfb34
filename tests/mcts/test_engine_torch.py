"""The torch engine against plain Hugging Face forwards, and the promises of the engine contract."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from mcts.engines.base import EngineFull
from mcts.engines.model import Policy, load_policy
from mcts.engines.torch_batch import CHUNK
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_forward import Forward, RowKeys, fused, products
from mcts.types import Int32, Reply, Request, Step, Stop
from tests.mcts.engine_contract import EngineContract, drain, extend
from tests.models import FAMILIES, make_policy, save_model, words

PROMPT = "3 7 12 -> 33 :"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine() -> TorchEngine:
    return TorchEngine(make_policy(), ";", rows=32, kv_slots=2048)


@pytest.fixture
def prompt() -> str:
    return PROMPT


class TestContract(EngineContract):
    """The torch engine keeps the whole contract."""


@torch.inference_mode()
def reference(policy: Policy, prefix: Int32, step: Step) -> tuple[np.ndarray, float, float]:
    """Log-probabilities of the step's tokens, value at its last token and at the prefix's last, by one plain
    forward over the whole sequence."""
    ids = torch.from_numpy(extend(prefix, [step]).astype(np.int64))[None]
    hidden = policy.hidden(ids)[0]
    logprobs = torch.log_softmax(policy.unembed(hidden), -1)
    p = len(prefix)
    drawn = logprobs[p - 1 : -1].gather(1, ids[0, p:, None])[:, 0].numpy()
    assert policy.head is not None
    values = policy.head(hidden)
    return drawn, float(values[-1]), float(values[p - 1])


def grow(engine: TorchEngine, depth: int = 3, n: int = 3) -> list[tuple[Int32, Reply]]:
    """A small tree below PROMPT: every first two steps of a reply are expanded, `depth` levels; (prefix, reply)."""
    prompt = engine.encode(PROMPT)
    assert engine.open(1, prompt, 1000)
    frontier, seen, count = [prompt], [], 0
    for _ in range(depth):
        for prefix in frontier:
            engine.submit(Request(count, 1, prefix, n, 6, seed=count))
            count += 1
        replies = drain(engine, len(frontier))
        below = []
        for i in sorted(replies):
            prefix = replies[i].request.prefix
            seen.append((prefix, replies[i]))
            below += [extend(prefix, [step]) for step in replies[i].steps[:2] if step.stop is not Stop.EOS]
        frontier = below
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_values_over_shared_keys_equal_a_plain_forward(family: str) -> None:
    policy = make_policy(family)
    engine = TorchEngine(policy, ";", rows=32, kv_slots=2048)
    checked = 0
    for prefix, reply in grow(engine):
        for step in reply.steps:
            logprobs, value, prefix_value = reference(policy, prefix, step)
            np.testing.assert_allclose(step.logprobs, logprobs, atol=1e-4)
            assert reply.prefix_value == pytest.approx(prefix_value, abs=1e-4)
            if step.stop is Stop.EOS:
                assert math.isnan(step.value)
            else:
                assert step.value == pytest.approx(value, abs=1e-4)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_fused_attention_equals_the_products_also_over_a_window(tokens: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 2 * groups, tokens, 8, generator=generator)
    held = torch.randn(2, 6, 2, 64, 8, generator=generator)
    seen = torch.rand(4, 1, tokens, 32, generator=generator) < 0.5
    seen[..., 0] = True
    mask = torch.zeros(4, 1, tokens, 32).masked_fill_(~seen, float("-inf"))
    keys, values = (side[:4, :, :32] for side in held)
    expected = products(query, RowKeys(keys.contiguous(), values.contiguous(), mask), 0.3)
    torch.testing.assert_close(fused(query, RowKeys(keys, values, mask), 0.3), expected)


def test_a_gpu_reads_one_of_few_windows_that_holds_the_longest_row() -> None:
    policy = make_policy(context=1024)
    forward = Forward(policy, 2, 2, 8, 16, 16, 1024)
    forward.cache.capacity = 1000
    windows = [forward._window(length) for length in range(1, 1001)]
    assert all(window >= length for length, window in enumerate(windows, start=1))
    assert sorted(set(windows)) == [64, 96, 128, 192, 256, 384, 512, 768, 1000]


def test_every_token_is_forwarded_once() -> None:
    engine = TorchEngine(make_policy(scale=2.0), ";", rows=32, kv_slots=2048)
    before = engine.counters.forwarded
    replies = [reply for _, reply in grow(engine, depth=4)]
    steps = [step for reply in replies for step in reply.steps]
    drawn = sum(len(step.token_ids) for step in steps)
    ended = sum(step.stop is Stop.EOS for step in steps)
    assert engine.counters.drawn == drawn
    assert engine.counters.forwarded - before == len(engine.encode(PROMPT)) + drawn - ended
    assert sum(reply.prompt for reply in replies) == len(engine.encode(PROMPT))


def test_a_long_prompt_is_prefilled_in_chunks_and_equals_a_plain_forward() -> None:
    policy = make_policy()
    engine = TorchEngine(policy, ";", rows=32, kv_slots=4096)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 100, size).astype(np.int32) for size in (CHUNK, CHUNK + 1, 2 * CHUNK + 17, 200)]
    for i, prompt in enumerate(prompts):
        assert engine.open(i, prompt, 20)
        engine.submit(Request(i, i, prompt, 2, 5, seed=i))
    replies = drain(engine, len(prompts))
    for i, prompt in enumerate(prompts):
        for step in replies[i].steps:
            logprobs, _, prefix_value = reference(policy, prompt, step)
            np.testing.assert_allclose(step.logprobs, logprobs, atol=1e-4)
            assert replies[i].prefix_value == pytest.approx(prefix_value, abs=1e-4)
    assert engine.counters.forwarded < sum(map(len, prompts)) + engine.counters.drawn + 1


def test_a_step_ends_at_the_delimiter_and_holds_it_once() -> None:
    policy = make_policy(scale=1.0)
    engine = TorchEngine(policy, ";", rows=32, kv_slots=4096)
    prompt = engine.encode(PROMPT)
    assert engine.open(1, prompt, 3000)
    engine.submit(Request(1, 1, prompt, 60, 40, seed=1))
    steps = drain(engine, 1)[1].steps
    delimiter, eos = int(engine.codec.delimiter_ids[0]), policy.eos_ids[0]
    assert {step.stop for step in steps} == {Stop.DELIMITER, Stop.EOS, Stop.LENGTH}
    for step in steps:
        ends = [i for i, t in enumerate(step.token_ids.tolist()) if t in (delimiter, eos)]
        if step.stop is Stop.LENGTH:
            assert not ends
            assert len(step.token_ids) == 40
        else:
            assert ends == [len(step.token_ids) - 1]
            assert step.token_ids[-1] == (delimiter if step.stop is Stop.DELIMITER else eos)
            assert step.text.endswith(";") == (step.stop is Stop.DELIMITER)


@pytest.mark.parametrize("delimiter", ["a b", "a a b"])
def test_a_delimiter_of_several_tokens_ends_a_step_only_as_a_whole_and_inside_it(delimiter: str) -> None:
    policy = make_policy(scale=0.5, vocabulary=["a", "b"], width=16)
    engine = TorchEngine(policy, delimiter, rows=32, kv_slots=4096)
    prompt = engine.encode("b a")  # a step that begins with the rest of the delimiter is not ended by this "a"
    assert engine.open(1, prompt, 4000)
    for i in range(4):
        engine.submit(Request(i, 1, prompt, 60, 12, seed=i))
    steps = [step for reply in drain(engine, 4).values() for step in reply.steps]
    ids = engine.codec.delimiter_ids.tolist()
    assert sum(step.stop is Stop.DELIMITER for step in steps) >= 5
    assert any(step.token_ids.tolist()[: len(ids) - 1] == ids[1:] for step in steps)
    for step in steps:
        texts = [engine.decode(step.token_ids[:end]) for end in range(1, len(step.token_ids) + 1)]
        ended = [end for end, text in enumerate(texts, start=1) if delimiter in text]  # special tokens are no text
        assert ended == ([len(step.token_ids)] if step.stop is Stop.DELIMITER else [])


def test_top_p_draws_only_from_the_nucleus_and_reports_both_probabilities() -> None:
    policy = make_policy(scale=6.0)
    engine = TorchEngine(policy, ";", rows=32, kv_slots=4096)
    prompt = engine.encode(PROMPT)
    assert engine.open(1, prompt, 3000)
    engine.submit(Request(1, 1, prompt, 50, 5, seed=1, temperature=0.7, top_p=0.6))
    for step in drain(engine, 1)[1].steps:
        with torch.inference_mode():
            ids = torch.from_numpy(extend(prompt, [step]).astype(np.int64))[None]
            logits = policy.model(ids).logits[0, len(prompt) - 1 : -1]
        probabilities = torch.softmax(logits / 0.7, -1)
        ordered, order = probabilities.sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < 0.6
        assert step.behavior_logprobs is not None
        for t, token in enumerate(step.token_ids.tolist()):
            nucleus = order[t][kept[t]].tolist()
            assert token in nucleus
            mass = probabilities[t][nucleus].sum()
            assert step.behavior_logprobs[t] == pytest.approx(float((probabilities[t, token] / mass).log()), abs=1e-4)
            assert step.logprobs[t] == pytest.approx(float(torch.log_softmax(logits[t], -1)[token]), abs=1e-4)


def test_a_reservation_cannot_be_overdrawn_and_slots_come_back() -> None:
    engine = TorchEngine(make_policy(), ";", rows=32, kv_slots=64)
    prompt = engine.encode(PROMPT)
    with pytest.raises(EngineFull, match="kv_slots"):
        engine.open(1, prompt, 59)
    for round_ in range(5):
        assert engine.open(round_, prompt, 40)
        assert not engine.open(99, prompt, 40)
        with pytest.raises(ValueError, match="reservation"):
            engine.submit(Request(0, round_, prompt, 5, 9, seed=0))
        engine.submit(Request(0, round_, prompt, 4, 10, seed=round_))
        reply = drain(engine, 1)[0]
        drawn = sum(len(step.token_ids) for step in reply.steps)
        left = 40 - drawn
        if left:
            engine.submit(Request(1, round_, prompt, 1, left, seed=0))
        engine.close(round_)
        assert engine._pool.used == engine._pool.reserved == 0
    with pytest.raises(EngineFull, match="context"):
        engine.open(1, np.full(256, 5, dtype=np.int32), 1)


def test_a_step_stops_where_the_context_ends() -> None:
    engine = TorchEngine(make_policy(), "|", rows=32, kv_slots=512, context=20)
    prompt = np.full(16, 50, dtype=np.int32)
    assert engine.open(1, prompt, 100)
    engine.submit(Request(1, 1, prompt, 2, 30, seed=0))
    steps = drain(engine, 1)[1].steps
    assert all(len(step.token_ids) <= 4 for step in steps)
    full = next(extend(prompt, [step]) for step in steps if len(step.token_ids) == 4)
    engine.submit(Request(2, 1, full, 1, 5, seed=0))
    reply = drain(engine, 1)[2]
    assert reply.steps == ()
    assert reply.error is not None
    assert "context" in reply.error


def test_new_weights_replace_the_old_ones(tmp_path: Path) -> None:
    old, new = save_model(tmp_path / "old", seed=1), save_model(tmp_path / "new", seed=2)
    engine = TorchEngine(load_policy(old), ";", rows=32, kv_slots=512)
    other = TorchEngine(load_policy(new), ";", rows=32, kv_slots=512)

    def play(engine: TorchEngine) -> Reply:
        prompt = engine.encode(PROMPT)
        assert engine.open(1, prompt, 100)
        engine.submit(Request(1, 1, prompt, 4, 8, seed=3))
        reply = drain(engine, 1)[1]
        engine.close(1)
        return reply

    before, expected = play(engine), play(other)
    engine.load(str(new), 7)
    after = play(engine)
    assert engine.version == 7
    assert [s.logprobs.tolist() for s in after.steps] == [s.logprobs.tolist() for s in expected.steps]
    assert after.prefix_value == expected.prefix_value != before.prefix_value
    wider = save_model(tmp_path / "wider", width=64)
    with pytest.raises(ValueError, match="shape"):
        engine.load(str(wider), 8)


def test_a_prompt_with_unknown_words_or_none_is_refused() -> None:
    engine = TorchEngine(make_policy(), ";", rows=32, kv_slots=512)
    with pytest.raises(ValueError, match="does not know"):
        engine.encode("3 seven -> 33 :")
    with pytest.raises(ValueError, match="empty"):
        engine.encode("")
    with pytest.raises(ValueError, match="chat template"):
        engine.encode([{"role": "user", "content": "3"}])
    with pytest.raises(ValueError, match="delimiter"):
        TorchEngine(make_policy(), "unheard", rows=32, kv_slots=512)
    with pytest.raises(ValueError, match="rows"):
        TorchEngine(make_policy(), ";", rows=20)


def test_models_whose_attention_cannot_be_shared_are_refused_with_a_reason() -> None:
    tokenizer = make_policy(head=False).tokenizer
    count = len(tokenizer)
    mistral = MistralConfig(
        vocab_size=count, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=8, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sliding"):
        TorchEngine(Policy(MistralForCausalLM(mistral).eval(), tokenizer), ";", rows=32, kv_slots=64)
    bloom = BloomConfig(vocab_size=count, hidden_size=32, n_layer=1, n_head=4, eos_token_id=1, bos_token_id=None)
    with pytest.raises(ValueError, match="attention interface"):
        TorchEngine(Policy(BloomForCausalLM(bloom).eval(), tokenizer), ";", rows=32, kv_slots=64, context=64)


def test_broken_weights_stop_the_engine() -> None:
    policy = make_policy(vocabulary=words(40))
    engine = TorchEngine(policy, ";", rows=32, kv_slots=512)
    prompt = engine.encode(PROMPT)
    assert engine.open(1, prompt, 50)
    with torch.no_grad():
        policy.model.base_model.norm.weight.fill_(math.nan)
    engine.submit(Request(1, 1, prompt, 1, 5, seed=0))
    with pytest.raises(RuntimeError, match="non-finite"):
        drain(engine, 1)
