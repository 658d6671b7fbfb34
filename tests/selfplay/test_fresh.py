"""A fresh model folder: Hugging Face layout, one token per word, a function of its arguments."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcts.tasks import load_task
from mcts.tasks.arithmetic import ArithmeticTask
from selfplay.errors import UserError
from selfplay.fresh import build_fresh_model

SMALL = {"width": 32, "layers": 2, "heads": 2}


@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_every_task_text_survives_the_tokenizer(tmp_path: Path, name: str) -> None:
    task = load_task(name)
    assert isinstance(task, ArithmeticTask)
    build_fresh_model(tmp_path / "model", task.vocabulary(), SMALL, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for example in itertools.islice(task.warmup(0), 300):
        text = " ".join([str(example.problem.prompt), *example.steps])
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    for problem in task.problems("heldout"):
        assert tokenizer.decode(tokenizer(problem.prompt)["input_ids"]) == problem.prompt
    assert tokenizer.convert_ids_to_tokens(list(range(2, 2 + len(task.vocabulary())))) == task.vocabulary()


def test_an_unknown_word_is_an_error_and_never_a_token(tmp_path: Path) -> None:
    build_fresh_model(tmp_path / "model", ["1", "2", "+"], SMALL, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("1 + 3")


def test_the_model_loads_runs_and_has_the_architecture_asked_for(tmp_path: Path) -> None:
    settings = {**SMALL, "kv_heads": 1, "intermediate": 48, "max_positions": 64, "tie_embeddings": True}
    build_fresh_model(tmp_path / "model", [str(k) for k in range(10)], settings, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert (config.num_key_value_heads, config.intermediate_size, config.max_position_embeddings) == (1, 48, 64)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (12, 0, 1, None)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    batch = tokenizer(["1 2 3", "4"], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert out.shape[0] == 2


def test_the_same_seed_gives_the_same_bytes_and_leaves_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_fresh_model(tmp_path / name, ["1", "2"], SMALL, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_an_interrupted_build_leaves_no_model_and_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "model.building").mkdir()
    (tmp_path / "model.building" / "config.json").write_text("{", encoding="utf-8")
    build_fresh_model(tmp_path / "model", ["1"], SMALL, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    with pytest.raises(UserError, match="not an empty folder"):
        build_fresh_model(tmp_path / "model", ["1"], SMALL, seed=0)


@pytest.mark.parametrize(
    ("vocabulary", "settings", "match"),
    [
        (["1"], {"widht": 3}, "no setting 'widht': did you mean 'width'"),
        (["1"], {"width": "96"}, "width must be of the kind of 96"),
        (["1"], {"width": -4}, "width must be"),
        (["1"], {"width": 30, "heads": 4}, "even multiple of heads"),
        (["1"], {"width": 36, "heads": 4}, "even multiple of heads"),
        (["1"], {"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        (["1"], {"layers": 0}, "layers must be above 0"),
        (["1"], {"tie_embeddings": 1}, "tie_embeddings must be"),
        ([], {}, "at least one word"),
        (["1", "1"], {}, "twice"),
        (["1 2"], {}, "white space"),
        (["<eos>"], {}, "twice"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, vocabulary: list[str], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        build_fresh_model(tmp_path / "model", vocabulary, settings, seed=0)
    assert not list(tmp_path.iterdir())
