"""Real byte-pair tokenizers: the engine contract for every family, and where a step ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcts.engines.model import Policy, turn_end
from mcts.engines.text import Codec
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_rows import DELIMITER, EOS, RUNNING
from mcts.types import Request, Stop
from tests.mcts.engine_contract import EngineContract, drain
from tests.models import FAMILIES, bpe_tokenizer, make_bpe_policy

QUESTION = "Question: Natalia sold 48 clips in April and half as many in May. How many?\nAnswer:\n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestContract(EngineContract):
    """Every family keeps the whole contract with a byte-pair tokenizer."""

    @pytest.fixture(params=FAMILIES)
    def engine(self, request: pytest.FixtureRequest) -> TorchEngine:
        return TorchEngine(make_bpe_policy(request.param), "\n", rows=32, kv_slots=2048)

    @pytest.fixture
    def prompt(self) -> str:
        return QUESTION


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_bpe_policy(scale=1.0)


def ends(codec: Codec, ids: list[int]) -> list[int]:
    """The code of every token of one step, as the engine asks for them: the first alone, the others in their row."""
    tokens = np.asarray([ids], dtype=np.int32)
    row, base = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    found = []
    for at in range(len(ids)):
        codes = codec.codes(tokens[:, at].astype(np.int64))
        if at and codec.long:
            codes = codec.long_codes(codes, tokens, row, np.asarray([at]), base)
        found.append(int(codes[0]))
    return found


def ids_of(policy: Policy, *pieces: str) -> list[int]:
    """One token per piece."""
    found = [policy.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    assert all(len(ids) == 1 for ids in found), f"{pieces} are not single tokens: {found}"
    return [ids[0] for ids in found]


def test_the_tokenizer_merges_delimiters_into_other_tokens(policy: Policy) -> None:
    assert len(ids_of(policy, ".\n", "\n\n", ".\n\n")) == 3


@pytest.mark.parametrize(
    ("delimiter", "pieces"),
    [
        ("\n", ["a", "\n"]),
        ("\n", ["a", ".\n"]),
        ("\n", ["a", "\n\n"]),  # the step ends inside a token, which stays whole
        ("\n\n", ["a", "\n", "\n"]),  # put together from two tokens
        ("\n\n", ["a", ".\n", "\n"]),
        ("\n\n", ["a", ".\n\n"]),
        ("\n", ["\n", "a", "\n"]),  # never a blank step
        ("\n\n", ["\n\n", "a", "\n\n"]),
        ("\n", ["<think>", "\n"]),  # a thinking block is text like any other
        ("\n\n", ["<think>", "\n", "a", ".\n\n"]),
        ("\n\n", ["a", "</think>", "\n\n"]),
        ("\n\n", ["a", "\n", "<|im_start|>", "\n"]),  # special tokens are no text
    ],
)
def test_a_step_ends_with_the_first_token_at_which_its_text_holds_the_delimiter(
    policy: Policy, delimiter: str, pieces: list[str]
) -> None:
    codes = ends(Codec(policy, delimiter), ids_of(policy, *pieces))
    assert codes == [RUNNING] * (len(pieces) - 1) + [DELIMITER]


def test_what_stands_before_a_step_completes_no_delimiter(policy: Policy) -> None:
    codec = Codec(policy, "\n\n")
    row = np.asarray([ids_of(policy, "a", "\n", "\n")], dtype=np.int32)
    none, rows, at = np.zeros(1, dtype=np.int8), np.array([0]), np.array([2])
    assert codec.long_codes(none, row, rows, at, np.array([0])).tolist() == [DELIMITER]
    assert codec.long_codes(none, row, rows, at, np.array([2])).tolist() == [RUNNING]


@given(
    ids=st.lists(st.integers(0, 641), min_size=1, max_size=12), delimiter=st.sampled_from(["\n", "\n\n", "。", ". "])
)
def test_step_ends_agree_with_a_search_in_the_decoded_text(ids: list[int], delimiter: str) -> None:
    policy = _policy()
    codec = _codec(delimiter)
    expected = []
    for end in range(1, len(ids) + 1):
        text = policy.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text if delimiter.strip() else text.lstrip()
        expected.append(EOS if ids[end - 1] in policy.eos_ids else DELIMITER if delimiter in text else RUNNING)
        if expected[-1] != RUNNING:
            break
    assert ends(codec, ids)[: len(expected)] == expected


_CODECS: dict[str, Codec] = {}
_POLICIES: list[Policy] = []


def _policy() -> Policy:
    if not _POLICIES:
        _POLICIES.append(make_bpe_policy())
    return _POLICIES[0]


def _codec(delimiter: str) -> Codec:
    if delimiter not in _CODECS:
        _CODECS[delimiter] = Codec(_policy(), delimiter)
    return _CODECS[delimiter]


@pytest.mark.parametrize("delimiter", ["\n", "\n\n"])
def test_drawn_steps_hold_the_delimiter_exactly_when_it_ended_them(delimiter: str) -> None:
    engine = TorchEngine(make_bpe_policy(scale=0.5), delimiter, rows=64, kv_slots=8192)
    prompt = engine.encode(QUESTION)
    assert engine.open(1, prompt, 6000)
    engine.submit(Request(1, 1, prompt, 60, 100, seed=1))
    steps = drain(engine, 1)[1].steps
    stopped = [step for step in steps if step.stop is Stop.DELIMITER]
    assert stopped
    for step in steps:
        texts = [engine.decode(step.token_ids[:end]).lstrip() for end in range(1, len(step.token_ids) + 1)]
        assert [delimiter in text for text in texts] == [False] * (len(texts) - 1) + [step.stop is Stop.DELIMITER]
        assert step.text == engine.decode(step.token_ids)


def test_every_way_to_end_a_text_is_an_eos(policy: Policy) -> None:
    tokenizer = bpe_tokenizer()
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert turn_end(tokenizer) == end
    assert set(policy.eos_ids) == {end, text_end}
    tokenizer.chat_template = None
    assert turn_end(tokenizer) is None
    plain = Policy(policy.model, tokenizer)
    assert plain.eos_ids == (text_end,)
    policy.model.generation_config.eos_token_id = [5, text_end]
    try:
        assert plain.eos_ids == tuple(sorted({5, text_end}))
        assert ends(Codec(plain, "\n"), [5]) == [EOS]
    finally:
        policy.model.generation_config.eos_token_id = text_end


def test_chat_messages_go_through_the_template_and_text_does_not(policy: Policy) -> None:
    codec = Codec(policy, "\n")
    ids = codec.encode([{"role": "system", "content": "Think."}, {"role": "user", "content": "3 + 4?"}])
    text = policy.tokenizer.decode(ids)
    assert text == "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    assert policy.tokenizer.decode(codec.encode("3 + 4?")) == "3 + 4?"
    refusing = bpe_tokenizer()
    refusing.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="no system role"):
        Codec(Policy(policy.model, refusing), "\n").encode([{"role": "user", "content": "3"}])
