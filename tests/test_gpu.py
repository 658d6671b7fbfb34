"""The engine, the learner and a whole run on a GPU, on small models: python -m pytest -m gpu."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mcts.engines.model import Policy
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_fuse import Fusion
from mcts.engines.transfer import to_host
from mcts.types import Int32, Request, Step, Stop
from selfplay.forward import check_tree_mask, forward
from selfplay.packing import pack
from tests.mcts.engine_contract import EngineContract, drain, extend
from tests.models import FAMILIES, make_policy
from tests.selfplay.learning import random_tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
PROMPT = "3 7 12 -> 33 :"
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}


def on_gpu(policy: Policy, dtype: torch.dtype = torch.float32) -> Policy:
    policy.model.to("cuda", dtype)
    if policy.head is not None:
        policy.head.to("cuda")
    return policy


@torch.inference_mode()
def plain_logprobs(policy: Policy, prefix: Int32, step: Step) -> np.ndarray:
    """Log-probabilities of a step's tokens by one plain forward."""
    ids = torch.from_numpy(extend(prefix, [step]).astype(np.int64))[None].to(policy.device)
    logprobs = torch.log_softmax(policy.unembed(policy.hidden(ids)[0]).float(), -1)
    p = len(prefix)
    return logprobs[p - 1 : -1].gather(1, ids[0, p:, None])[:, 0].cpu().numpy()


@pytest.mark.gpu
@needs_gpu
class TestContract(EngineContract):
    """The torch engine keeps the whole contract on a GPU."""

    @pytest.fixture
    def engine(self) -> TorchEngine:
        return TorchEngine(on_gpu(make_policy()), ";", rows=32, kv_slots=2048)

    @pytest.fixture
    def prompt(self) -> str:
        return PROMPT


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_captured_forwards_draw_has_the_log_probability_of_a_plain_forward(
    family: str, dtype: torch.dtype, fuse: bool
) -> None:
    policy = on_gpu(make_policy(family, scale=2.0), dtype)
    engine = TorchEngine(policy, ";", rows=32, kv_slots=8192, fuse=fuse)
    assert engine.batch._forward.graphs is not None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 100, size).astype(np.int32) for size in (5, 60, 64, 65, 130, 200)]
    for i, prompt in enumerate(prompts):
        assert engine.open(i, prompt, 200)
        engine.submit(Request(i, i, prompt, 3, 20, seed=i, temperature=(1.0, 0.7, 0.0)[i % 3]))
    replies = drain(engine, len(prompts))
    count = 0
    for i, prompt in enumerate(prompts):  # a step below each, so that keys and values are copied
        step = next((step for step in replies[i].steps if step.stop is not Stop.EOS), None)
        for drawn in replies[i].steps:
            np.testing.assert_allclose(drawn.logprobs, plain_logprobs(policy, prompt, drawn), atol=TOLERANCE[dtype])
        if step is not None:
            below = extend(prompt, [step])
            engine.submit(Request(100 + i, i, below, 2, 20, seed=i, top_p=0.9 if i % 2 else 1.0))
            count += 1
    for reply in drain(engine, count).values():
        for drawn in reply.steps:
            expected = plain_logprobs(policy, reply.request.prefix, drawn)
            np.testing.assert_allclose(drawn.logprobs, expected, atol=TOLERANCE[dtype])
    assert count > 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_captured_draws_are_those_of_the_same_draws_launched_one_by_one(temperature: float) -> None:
    """Some rows of each batch ask for a nucleus in the second engine, which then launches all draws."""
    found = []
    for top_p in (1.0, 0.999999):
        engine = TorchEngine(on_gpu(make_policy()), ";", rows=32, kv_slots=8192)
        prompt = engine.encode(PROMPT)
        for i in range(2):
            assert engine.open(i, prompt, 300)
        engine.submit(Request(0, 0, prompt, 8, 12, seed=5, temperature=temperature))
        engine.submit(Request(1, 1, prompt, 8, 12, seed=6, temperature=temperature, top_p=top_p))
        found.append(drain(engine, 2)[0])
    for captured, launched in zip(*(reply.steps for reply in found), strict=True):
        assert np.array_equal(captured.token_ids, launched.token_ids)
        np.testing.assert_allclose(captured.logprobs, launched.logprobs, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_an_engine_can_be_built_after_another_was_given_up() -> None:
    for _ in range(2):
        engine = TorchEngine(on_gpu(make_policy()), ";", rows=16, kv_slots=1024)
        del engine


@pytest.mark.gpu
@needs_gpu
def test_new_weights_reach_captured_forwards(tmp_path: Path) -> None:
    from tests.models import save_model

    engine = TorchEngine(on_gpu(make_policy(seed=0)), ";", rows=16, kv_slots=2048)
    engine.load(str(save_model(tmp_path, seed=1)), 1)
    prompt = engine.encode(PROMPT)
    assert engine.open(1, prompt, 100)
    engine.submit(Request(1, 1, prompt, 4, 10, seed=3))
    other = on_gpu(make_policy(seed=1))
    for step in drain(engine, 1)[1].steps:
        np.testing.assert_allclose(step.logprobs, plain_logprobs(other, prompt, step), atol=2e-3)


@pytest.mark.gpu
@needs_gpu
def test_what_leaves_the_device_in_one_transfer_is_what_it_held() -> None:
    whole = torch.arange(6, device="cuda") * 1_000_003
    table = torch.randn(6, 4, device="cuda")
    found = to_host(whole, table)
    assert found[0].dtype == np.int64
    assert found[1].dtype == np.float32
    assert np.array_equal(found[0], whole.cpu().numpy())
    assert np.array_equal(found[1], table.cpu().numpy())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_tree_has_the_losses_and_gradients_of_the_cpu(family: str) -> None:
    from selfplay.items import ValueRule, from_tree, policy_groups, value_labels

    tree = random_tree(np.random.default_rng(0))
    item = from_tree(tree, wins=(), groups=policy_groups(tree), values=value_labels(tree, ValueRule.MEAN))
    assert item is not None
    found = []
    for device in ("cpu", "cuda"):
        policy = make_policy(family)
        policy.model.to(device)
        assert policy.head is not None
        policy.head.to(device)
        assert check_tree_mask(policy, max_length=128)
        outputs = forward(policy, pack([item]).to(policy.device))
        loss = outputs.logprobs.mean()
        grads = torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True)
        found.append((outputs.logprobs.detach().cpu(), [g.cpu() for g in grads if g is not None]))
    (cpu, cpu_grads), (gpu, gpu_grads) = found
    torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=1e-3)
    for ours, theirs in zip(gpu_grads, cpu_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 * float(theirs.abs().max()) + 1e-6, rtol=1e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine.dtype=bfloat16", "learn.precision=bfloat16"],
        ["model.dtype=bfloat16"],
        ["cluster.by_turns=true", "engine.compile=true"],
        ["model.gradient_checkpointing=true"],
    ],
)
def test_a_run_goes_to_its_end_and_its_learner_sees_the_probabilities_of_its_engine(
    tmp_path: Path, overrides: list[str]
) -> None:
    from selfplay.cli import app

    config = Path(__file__).resolve().parents[1] / "configs" / "countdown3.yaml"
    arguments = [
        "launch", str(config), "--run-dir", str(tmp_path / "run"), f"model.device={DEVICE}", "cluster.executor=inline",
        "iterations=2", "warmup.steps=20", "warmup.lr_warmup_steps=5", "learn.steps=6", "play.problems=32",
        "evaluate.samples=0", "learn.objective={name: alphazero, policy: 1.0, value: 0.5}", *overrides,
    ]  # fmt: skip
    app(arguments, standalone_mode=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(row["value_loss"]) for row in rows)
    limit = 0.02 if not overrides else 0.3
    assert rows[1]["logprob_gap"] < limit, "the learner sees other probabilities than the engine drew from"


def test_fusion_swaps_the_small_parts_within_and_puts_them_back() -> None:
    policy = make_policy("qwen2")
    called: list[str] = []

    def compiler(function):  # type: ignore[no-untyped-def]
        def compiled(*args, **kwargs):  # type: ignore[no-untyped-def]
            called.append(function.__qualname__)
            return function(*args, **kwargs)

        return compiled

    ids = torch.arange(5)[None]
    plain = policy.hidden(ids)
    fusion = Fusion(policy, compiler)
    with fusion.applied():
        assert torch.equal(policy.hidden(ids), plain)
    assert {"Qwen2MLP.forward", "Qwen2RMSNorm.forward", "apply_rotary_pos_emb"} <= set(called)
    count = len(called)
    assert torch.equal(policy.hidden(ids), plain)
    assert len(called) == count


def test_a_compiler_that_fails_is_said_in_one_sentence() -> None:
    policy = make_policy("llama")

    def failing() -> Iterator[None]:
        with Fusion(policy, lambda function: function).applied():
            raise torch._dynamo.exc.TorchDynamoException("no C compiler\nand much more")
        yield

    with pytest.raises(ValueError, match=r"torch.compile failed on this machine \(no C compiler\): set engine.compile"):
        next(failing())
