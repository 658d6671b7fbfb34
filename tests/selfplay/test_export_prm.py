"""The value head as a model of its own: exact where it is linear, and its error said where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from mcts.engines.model import load_policy, save_policy
from mcts.engines.value_head import ValueHead
from mcts.tree import Tree
from selfplay.export_prm import PrmError, export_prm, fit_linear, measure
from selfplay.export_prm import States as PrmStates
from tests.models import FAMILIES, make_policy
from tests.selfplay.tiny_run import CONFIG
from tests.selfplay.trace_samples import shard, step, won_search


def saved(folder: Path, family: str, width: int) -> Path:
    """A checkpoint of a finished run with a trained-looking head of `width` units."""
    policy = make_policy(family, scale=1.0)
    policy.head = ValueHead(policy.model.config.hidden_size, width, seed=3)
    with torch.no_grad():
        policy.head.outer.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(7))
        policy.head.outer.bias.fill_(-0.3)
    save_policy(policy, folder / "checkpoints" / "00001")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "checkpoints" / "00001" / "state.json").write_text("{}", encoding="utf-8")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return folder / "checkpoints" / "00001"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_head_exports_exactly_and_loads_with_stock_classes(tmp_path: Path, family: str) -> None:
    checkpoint = saved(tmp_path / "run", family, width=0)
    facts = export_prm(tmp_path / "run", tmp_path / "prm")
    assert facts["exact"]
    assert facts["written_error"] < 1e-6
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    assert model.config.num_labels == 1
    policy = load_policy(checkpoint)
    assert policy.head is not None
    tokens = torch.randint(3, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model(input_ids=tokens).logits[..., 0].sigmoid()
        ours = policy.head(policy.hidden(tokens))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert float(ours.std()) > 0.01, "the head must say different things of different states"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_with_a_hidden_layer_exports_exactly_with_its_own_code_and_never_loads_without(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(tmp_path / "run", family, width=64)
    facts = export_prm(tmp_path / "run", tmp_path / f"prm_{family}")
    assert facts["exact"]
    for file in (tmp_path / f"prm_{family}").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), "a path of this machine"
    assert facts["written_error"] < 1e-6
    # where transformers copies the code of such folders to: normally the user's cache
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / f"prm_{family}"
    model = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), "the folder's own code"
    policy = load_policy(checkpoint)
    assert policy.head is not None
    tokens = torch.arange(3, 63).view(3, 20)
    with torch.inference_mode():
        ours = policy.head(policy.hidden(tokens))
        theirs = model(tokens).logits[..., 0].sigmoid()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert float(ours.std()) > 0.01
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=False)


def test_an_approximation_for_stock_classes_states_the_error_that_a_user_would_find(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "run", "llama", width=64)
    with pytest.raises(PrmError, match="too few traces"):
        export_prm(checkpoint, tmp_path / "prm", approximate=True)
    results = []
    for seed in range(60):
        result, rng = won_search(f"q{seed}"), np.random.default_rng(seed)
        tree = Tree(rng.integers(3, 100, 6).astype(np.int32), "3 7 12 -> 33 :")
        for parent in (0, 0, 1, 2):
            drawn = replace(step("a b c d"), token_ids=rng.integers(3, 100, 4).astype(np.int32))
            tree.add(parent, drawn, prior=0.5)
        results.append(replace(result, tree=tree, chosen=None, candidates=()))
    shard(tmp_path / "run", results)
    facts = export_prm(checkpoint, tmp_path / "prm", approximate=True)
    assert not facts["exact"]
    assert facts["fitted_states"] + facts["held_out_states"] == 60 * 5
    assert 0 < facts["mean_error"] <= facts["p95_error"] <= facts["max_error"]
    # the stated error is the one a user would find with the loaded model on the held-out problems
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    policy = load_policy(checkpoint)
    assert policy.head is not None
    from hashlib import sha256

    gaps = []
    with torch.inference_mode():
        for result in results:
            if sha256(result.problem.id.encode()).digest()[0] % 2:
                for node in range(5):
                    ids = [*result.tree.prompt_ids]
                    for n in result.tree.path(node)[1:]:
                        ids += [*result.tree.steps[n].token_ids]  # type: ignore[union-attr]
                    tokens = torch.tensor([ids])
                    ours = policy.head(policy.hidden(tokens))[0, -1]
                    gaps.append(float((model(input_ids=tokens).logits[0, -1, 0].sigmoid() - ours).abs()))
    assert len(gaps) == facts["held_out_states"]
    assert np.mean(gaps) == pytest.approx(facts["mean_error"], abs=1e-5)
    assert f"| mean_error | {facts['mean_error']:.4g} |" in (tmp_path / "prm" / "README.md").read_text()


def test_the_fit_finds_a_head_that_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 8, generator=generator) * 3 + 1
    truth = torch.nn.Linear(8, 1)
    held_out = torch.arange(400) % 2 == 0
    states = PrmStates(hidden, held_out)
    logits = truth(hidden)[:, 0].detach()
    linear = fit_linear(logits, states)
    figures = measure(logits, linear(hidden)[:, 0].detach(), states)
    assert figures["max_error"] < 0.02
    assert figures["correlation"] > 0.999


def test_a_bare_model_has_no_head_to_export_and_needs_no_task_to_be_told_so(tmp_path: Path) -> None:
    save_policy(make_policy(), tmp_path / "model")
    with pytest.raises(PrmError, match="is no run and no checkpoint of one"):
        export_prm(tmp_path / "model" / "policy", tmp_path / "prm")


@pytest.mark.parametrize("width", [0, 64])
def test_the_cards_example_runs_as_it_stands(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    checkpoint = saved(tmp_path / "run", "llama", width)
    export_prm(tmp_path / "run", tmp_path / f"card_{width}")
    example = (tmp_path / f"card_{width}" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {"folder": tmp_path / f"card_{width}", "prompt_and_steps": "3 7 12 -> 33 :"}
    exec(f"from transformers import AutoModelForTokenClassification, AutoTokenizer\n{example}", names)  # noqa: S102
    policy = load_policy(checkpoint)
    assert policy.head is not None
    ids = policy.tokenizer(names["prompt_and_steps"], return_tensors="pt").input_ids
    expected = policy.head(policy.hidden(ids))[0, -1]
    torch.testing.assert_close(names["value"], expected, rtol=0, atol=1e-6)
