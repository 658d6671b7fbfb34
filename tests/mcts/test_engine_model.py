"""Policies and value heads on disk, and the bookkeeping of slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mcts.engines.kv import Prefix, PrefixCache, SlotPool
from mcts.engines.model import ModelError, load_policy
from mcts.engines.text import Codec
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_rows import DELIMITER, RUNNING
from mcts.engines.value_head import ValueHead
from mcts.tasks import load_task
from tests.models import FAMILIES, make_policy, save_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_exactly_and_stays_a_plain_hugging_face_folder(tmp_path: Path, family: str) -> None:
    made = make_policy(family, seed=3)
    folder = save_model(tmp_path / "ckpt", family, seed=3)
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        expected = made.model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "policy").eval()(ids).logits, expected)
        for path in (folder, folder / "policy"):
            policy = load_policy(path)
            assert torch.equal(policy.model(ids).logits, expected)
            assert policy.head is not None
            assert made.head is not None
            assert torch.equal(policy.head(policy.hidden(ids)), made.head(made.hidden(ids)))
            assert policy.eos_ids == (1,)
            np.testing.assert_allclose(policy.unembed(policy.hidden(ids)), expected, atol=1e-5)


def test_a_plain_folder_has_no_head_and_takes_a_given_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "plain", head=False)
    assert load_policy(folder).head is None
    head = ValueHead(32, seed=5)
    head.save(tmp_path / "head.safetensors")
    given = load_policy(folder / "policy", head=tmp_path / "head.safetensors").head
    assert given is not None
    assert torch.equal(given.inner.weight, head.inner.weight)
    ValueHead(48).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="48 hidden units"):
        load_policy(folder, head=tmp_path / "wrong.safetensors")


def test_what_is_missing_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_policy(tmp_path / "empty")
    folder = save_model(tmp_path / "bare") / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_policy(folder)
    with pytest.raises(ModelError, match="value head"):
        load_policy(save_model(tmp_path / "ok"), head=tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="dtype"):
        load_policy(tmp_path / "ok", dtype="float8")
    (tmp_path / "ok" / "policy" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(tmp_path / "ok")
    (tmp_path / "junk.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable"):
        ValueHead.load(tmp_path / "junk.safetensors")


def test_a_new_value_head_depends_on_its_seed_alone_and_says_one_half() -> None:
    torch.manual_seed(1)
    first = ValueHead(16, seed=4)
    torch.manual_seed(2)
    again, other = ValueHead(16, seed=4), ValueHead(16, seed=5)
    assert torch.equal(first.inner.weight, again.inner.weight)
    assert not torch.equal(first.inner.weight, other.inner.weight)
    assert first(torch.randn(3, 16)).tolist() == [0.5] * 3


def test_slots_are_handed_out_once_and_never_beyond_the_pool() -> None:
    pool = SlotPool(10)
    assert pool.reserve(10)
    assert not pool.reserve(1)
    first, second = pool.take(4), pool.take(6)
    assert sorted([*first, *second]) == list(range(10))
    with pytest.raises(RuntimeError, match="reserved"):
        pool.take(1)
    pool.give(first)
    assert sorted(pool.take(4)) == sorted(first)
    pool.release(10)
    assert pool.reserve(10)


def test_a_path_lists_its_slots_from_the_first_token_to_the_last() -> None:
    hidden = np.zeros(1, dtype=np.float32)

    def slots(*numbers: int) -> np.ndarray:
        return np.array(numbers, dtype=np.int32)

    root = Prefix(None, 2, slots(7, 3), hidden)
    step = Prefix(root, 5, slots(9, 1, 4), hidden)
    leaf = Prefix(step, 6, slots(2), hidden)
    assert root.path().tolist() == [7, 3]
    assert leaf.path().tolist() == [7, 3, 9, 1, 4, 2]
    cache = PrefixCache(slots(50, 51), 100)
    tokens = slots(50, 51, 60, 61, 62, 63)
    assert cache.longest(tokens) is None
    for prefix in (root, step, leaf):
        cache.add(tokens[: prefix.length].tobytes(), prefix)
    assert cache.longest(tokens) is step
    assert cache.longest(slots(50, 51, 60, 99, 62, 63)) is root
    assert cache.used == 6
    assert sorted(cache.drain()) == [1, 2, 3, 4, 7, 9]
    assert cache.find(tokens.tobytes()) is None


def test_a_long_delimiter_that_begins_before_the_step_does_not_end_it() -> None:
    codec = Codec(make_policy(vocabulary=["a", "b"]), "a a b")
    ids = codec.delimiter_ids
    row = np.array([[ids[0], ids[1], ids[2]]], dtype=np.int32)
    none, rows, at = np.zeros(1, dtype=np.int8), np.array([0]), np.array([2])
    assert codec.long_codes(none, row, rows, at, np.array([0])).tolist() == [DELIMITER]
    assert codec.long_codes(none, row, rows, at, np.array([1])).tolist() == [RUNNING]
    assert codec.long_codes(none, row[:, ::-1].copy(), rows, at, np.array([0])).tolist() == [RUNNING]


def test_an_engine_plays_in_its_own_dtype_and_takes_new_weights_in_it(tmp_path: Path) -> None:
    from selfplay.config import parse_config
    from selfplay.worker import make_engine

    text = "task: {name: countdown}\nplay: {search: {strategy: {name: mcts}, budget: 64}}"
    config = parse_config(text, ["engine.dtype=bfloat16", "engine.rows=16", "engine.max_context=64"])
    folder = save_model(tmp_path / "one")
    engine = make_engine(
        config, folder / "policy", folder / "value_head.safetensors", 0, load_task("countdown", numbers=3)
    )
    assert isinstance(engine, TorchEngine)
    assert engine.policy.model.dtype == torch.bfloat16
    assert not engine.exact
    engine.load(str(save_model(tmp_path / "two", seed=1)), 1)
    assert engine.policy.model.dtype == torch.bfloat16
