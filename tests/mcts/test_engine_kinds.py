"""Which kinds of models can be served, told from a config alone, and which attention a model is loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from mcts.engines.kinds import check_kind
from mcts.engines.model import ModelError, Policy, check_folder, load_policy
from mcts.engines.server_text import Text
from mcts.engines.torch_engine import TorchEngine
from mcts.types import Request
from tests.mcts.engine_contract import drain, extend
from tests.models import make_policy, tokenizer, words

SIZE = len(tokenizer(words()))
SHAPE: dict[str, Any] = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(words()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MistralConfig(**SHAPE, sliding_window=32), "sliding window of 32 tokens: lower engine.max_context"),
        (Gemma3TextConfig(**SHAPE, sliding_window=32), "sliding window of 32 tokens"),
        (BloomConfig(vocab_size=SIZE, hidden_size=16, n_layer=1, n_head=2), "does not use transformers' attention"),
        (MambaConfig(vocab_size=SIZE, hidden_size=16, num_hidden_layers=1), "does not use transformers' attention"),
    ],
)
def test_a_model_that_cannot_be_served_is_told_from_its_config(
    config: PreTrainedConfig, says: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    tokenizer(words()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=says):
        check_kind(tmp_path, attention="eager", served=64)
    check_kind(tmp_path, attention="eager", served=None)  # a server may serve it


def test_an_attention_that_a_model_has_not_is_told_and_it_loads_with_the_one_it_has(tmp_path: Path) -> None:
    folder = saved(tmp_path, Gemma2Config(**SHAPE, sliding_window=64, query_pre_attn_scalar=8))
    with pytest.raises(ModelError, match=r"no attention 'sdpa': set model\.attention: eager"):
        check_kind(folder, attention="sdpa", served=None)
    policy = load_policy(folder)
    assert policy.model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="caps its attention's scores"):
        TorchEngine(policy, ";", rows=32, kv_slots=64, context=64)


@pytest.mark.parametrize("kind", [MistralConfig, Gemma3TextConfig])
def test_a_window_that_no_sequence_outgrows_is_full_attention(kind: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, sliding_window=64)).eval()
    policy = Policy(model, make_policy().tokenizer)
    engine = TorchEngine(policy, ";", rows=32, kv_slots=128, context=64)
    prompt = engine.encode(" ".join(["3", "7"] * 20))
    assert engine.open(1, prompt, 24)
    engine.submit(Request(0, 1, prompt, 1, 20, seed=0))
    (step,) = drain(engine, 1)[0].steps
    ids = torch.from_numpy(extend(prompt, [step]).astype(np.int64))[None]
    with torch.inference_mode():
        expected = torch.log_softmax(policy.unembed(policy.hidden(ids, use_cache=False))[0], -1)
    drawn = expected[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
    np.testing.assert_allclose(step.logprobs, drawn, atol=1e-5)


def test_a_model_that_reads_more_than_text_is_told(tmp_path: Path) -> None:
    Gemma3Config(text_config={**SHAPE, "sliding_window": 512}).save_pretrained(tmp_path)
    tokenizer(words()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Gemma3ForConditionalGeneration reads more than text"):
        check_kind(tmp_path, attention="sdpa", served=64)


def test_code_in_a_models_folder_is_never_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    tokenizer(words()).save_pretrained(tmp_path)
    for load in (lambda: check_kind(tmp_path, attention="sdpa", served=64), lambda: load_policy(tmp_path)):
        with pytest.raises(ModelError) as told:
            load()
        assert "\n" not in str(told.value)


def test_code_of_a_served_models_tokenizer_is_never_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded"):
        Text(tmp_path, ";")


def test_a_folder_without_weights_in_safetensors_is_told_before_they_are_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path, MistralConfig(**SHAPE))
    check_folder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in safetensors"):
        check_folder(folder)
