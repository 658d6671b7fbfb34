"""What is trained of a policy: a LoRA adapter, the value head alone, or everything with layers recomputed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mcts.engines import adapters
from mcts.engines.model import ModelError, Policy, check_folder, context_of, copy_weights, load_policy, save_policy
from mcts.engines.torch_engine import TorchEngine
from selfplay import checkpoint, lora
from selfplay.config import LoraConfig
from selfplay.errors import UserError
from selfplay.forward import check_logits, check_tree_mask
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives.alphazero import AlphaZero
from tests.models import FAMILIES, make_policy, save_model
from tests.selfplay.learning import FakeTrace, random_tree
from tests.selfplay.places import save

LORA = LoraConfig(rank=4, alpha=8.0)
IDS = torch.arange(3, 19)[None]


def settings(**changes: object) -> LearnerSettings:
    return LearnerSettings(items_per_step=4, threads=1, **changes)  # type: ignore[arg-type]


def train(policy: Policy, steps: int = 3, **changes: object) -> dict[str, float]:
    rng = np.random.default_rng(0)
    traces = [FakeTrace(random_tree(rng), problem_id=str(i)) for i in range(4)]
    learner = Learner(policy, AlphaZero(nll=1.0), settings(**changes))
    return learner.learn(1, traces, Budget(steps=steps))


def weights(policy: Policy, *, adapter: bool) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if ("lora_" in n) == adapter}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=FAMILIES)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Policy, Path]:
    base = save_model(tmp_path / "base", request.param, scale=1.0)
    policy = load_policy(base)
    lora.add(policy, str(base), LORA, seed=1)
    return policy, base


@torch.inference_mode()
def test_lora_leaves_the_base_as_it_was_and_merges_to_the_same_function(
    adapted: tuple[Policy, Path], tmp_path: Path
) -> None:
    policy, base = adapted
    with torch.inference_mode(False):
        plain = load_policy(base).model(IDS).logits.detach()
        assert torch.equal(policy.model(IDS).logits.detach(), plain)  # a new adapter changes nothing
        before, fresh = weights(policy, adapter=False), weights(policy, adapter=True)
        found = train(policy)
        assert found["grad_norm"] > 0
        assert same(weights(policy, adapter=False), before)
        assert not same(weights(policy, adapter=True), fresh)
        logits = policy.model(IDS).logits.detach()
        assert (logits - plain).abs().max() > 1e-3
        save_policy(policy, tmp_path / "ckpt")
    names = {path.name for path in (tmp_path / "ckpt" / "policy").iterdir()}
    assert {adapters.CONFIG, adapters.WEIGHTS} <= names
    assert "model.safetensors" not in names
    assert adapters.base_of(tmp_path / "ckpt" / "policy") == str(base)
    kept, merged = load_policy(tmp_path / "ckpt", merge=False), load_policy(tmp_path / "ckpt")
    assert torch.equal(kept.model(IDS).logits, logits)
    assert (merged.model(IDS).logits - logits).abs().max() <= 1e-5
    assert not adapters.has_adapter(merged.model)
    assert merged.head is not None
    copy_weights(merged.model, load_policy(base).model, "policy")  # a worker's engine takes it as new weights
    save_policy(merged, tmp_path / "export")  # merged on export: a plain folder that anything loads
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "policy").eval()
    assert torch.equal(exported(IDS).logits, merged.model(IDS).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_peft_itself_reads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_model(tmp_path / "base", "qwen2", scale=1.0)
    policy = load_policy(base)
    lora.add(policy, str(base / "policy"), LORA, seed=1)
    train(policy)
    save_policy(policy, tmp_path / "ckpt")
    theirs = AutoModelForCausalLM.from_pretrained(base / "policy")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "ckpt" / "policy").eval()
    with torch.inference_mode():
        assert torch.equal(theirs(IDS).logits, policy.model(IDS).logits)


def test_a_lora_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", scale=1.0)
    rng = np.random.default_rng(0)
    traces = [FakeTrace(random_tree(rng), problem_id=str(i)) for i in range(4)]

    def learner(policy: Policy) -> Learner:
        return Learner(policy, AlphaZero(nll=1.0), settings())

    policy = load_policy(base)
    lora.add(policy, str(base), LORA, seed=1)
    first = learner(policy)
    first.learn(1, traces, Budget(steps=2))
    save(tmp_path / "checkpoints", 1, policy, first.state_dict(), {})
    first.learn(2, traces, Budget(steps=2))
    again, optimizer, _ = checkpoint.load(tmp_path / "checkpoints" / "00001", merge=False)
    second = learner(again)
    assert optimizer is not None
    second.load_state_dict(optimizer)
    second.learn(2, traces, Budget(steps=2))
    assert same(weights(again, adapter=True), weights(policy, adapter=True))


def test_an_adapter_without_its_base_or_with_another_one_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    policy = load_policy(base)
    lora.add(policy, str(base), LORA, seed=1)
    save_policy(policy, tmp_path / "ckpt")
    check_folder(tmp_path / "ckpt")
    base.rename(tmp_path / "gone")
    for call in (load_policy, check_folder):
        with pytest.raises(ModelError, match="no model folder"):
            call(tmp_path / "ckpt")
    save_model(base, width=64)
    with pytest.raises(ModelError, match="cannot be put on its base"):
        load_policy(tmp_path / "ckpt")
    with pytest.raises(UserError, match=r"model\.lora"):
        lora.add(load_policy(base), "base", LoraConfig(targets=["no_such_layer"]), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_frozen_trunk_only_the_value_head_moves(family: str) -> None:
    policy = make_policy(family, scale=1.0)
    lora.freeze(policy)
    before = weights(policy, adapter=False)
    assert policy.head is not None
    head = policy.head.outer.weight.detach().clone()
    train(policy)
    assert same(weights(policy, adapter=False), before)
    assert not torch.equal(policy.head.outer.weight, head)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_gives_the_same_weights(family: str, adapter: bool) -> None:
    found = []
    for checkpointing in (False, True):
        policy = make_policy(family, scale=1.0)
        if adapter:
            lora.add(policy, "base", LORA, seed=1)
        train(policy, gradient_checkpointing=checkpointing, kernels=False)
        found.append(policy)
    assert same(*(weights(policy, adapter=adapter) for policy in found))


def test_gradient_checkpointing_recomputes_layers_and_wakes_no_dropout() -> None:
    policy = make_policy("gpt2", scale=1.0)
    calls = []
    layer = policy.model.transformer.h[0]
    layer.attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(policy, steps=1, gradient_checkpointing=True)
    with_gradient = [call for call in calls if call]
    assert len(with_gradient) % 2 == 0  # forward and again in the backward pass
    assert len(with_gradient) >= 2
    awake = [module for module in policy.model.modules() if module.training]
    assert awake
    assert not any(isinstance(module, torch.nn.Dropout) for module in awake)


def test_a_model_that_takes_no_tree_mask_is_trained_per_path_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    tokenizer = make_policy().tokenizer
    count = len(tokenizer)
    torch.manual_seed(0)
    window = MistralConfig(
        vocab_size=count, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    alibi = BloomConfig(vocab_size=count, hidden_size=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=None)
    for model in (MistralForCausalLM(window), BloomForCausalLM(alibi)):
        policy = Policy(model.eval(), tokenizer, make_policy(width=16).head)
        caplog.clear()
        found = train(policy)
        assert found["trained_per_path"] == 1.0
        assert "per path" in caplog.text
        assert found["policy_loss"] > 0
    assert train(make_policy(scale=1.0))["trained_per_path"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_a_tree_is_trusted_only_where_it_differs_from_a_chain(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(family, scale=2.0)
    policy.model.to(torch.bfloat16)
    assert policy.head is not None
    policy.head.to(torch.bfloat16)
    assert check_tree_mask(policy, max_length=64)
    inner = policy.model.base_model.forward

    def deaf(*args: object, **kwargs: object) -> object:
        kwargs.pop("attention_mask", None)
        return inner(*args, **kwargs)

    monkeypatch.setattr(policy.model.base_model, "forward", deaf)
    assert not check_tree_mask(policy, max_length=64)


def test_logits_that_a_model_changes_are_known_or_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM, GemmaConfig, GemmaForCausalLM

    tokenizer = make_policy().tokenizer
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    for config, kind in ((CohereConfig, CohereForCausalLM), (GemmaConfig, GemmaForCausalLM)):
        policy = Policy(
            kind(config(**shape, head_dim=16) if config is GemmaConfig else config(**shape)).eval(), tokenizer
        )
        check_logits(policy)
        policy.model.config.logit_scale = 0.5
        if config is GemmaConfig:  # this model does not use it: what is computed here is wrong, and noticed
            with pytest.raises(UserError, match="changes its logits"):
                check_logits(policy)


def test_a_name_means_the_local_cache_and_the_error_says_how_to_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="hf download nobody/no-such-model"):
        load_policy("nobody/no-such-model")
    folder = save_model(tmp_path / "cached", head=False) / "policy"
    asked = []

    def cached(name: str, *, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert load_policy("someone/a-model").head is None
    assert asked == [("someone/a-model", True)]


def test_a_context_that_the_model_cannot_read_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for family in FAMILIES:
        folder = save_model(tmp_path / family, family)
        assert context_of(folder) == 256
        check_folder(folder, 256)
        with pytest.raises(ModelError, match="reads at most 256 tokens: lower max_context"):
            check_folder(folder, 257)
        with pytest.raises(ValueError, match="256 tokens"):
            TorchEngine(load_policy(folder), ";", rows=16, kv_slots=64, context=257)


def test_a_merged_adapter_leaves_nothing_that_a_new_one_would_meet() -> None:
    model = make_policy(scale=1.0).model
    for _ in range(2):  # peft warns of adapters on top of each other, and warnings are errors here
        adapters.add(model, "base", rank=2, alpha=4, targets="all-linear")
        assert adapters.has_adapter(model)
        adapters.merge(model)
        assert not adapters.has_adapter(model)
