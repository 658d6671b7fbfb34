"""Small policies, trees and traces that the learning tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mcts.engines.model import Policy
from mcts.engines.value_head import ValueHead
from mcts.tree import Tree
from mcts.types import Status, Step, Stop, Verdict

VOCABULARY = 40
EOS = 1
WIDTH = 16


def tokenizer() -> Any:
    words = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def _llama() -> Any:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape))


def _qwen2() -> Any:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, **shape)
    )


def _qwen3() -> Any:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **shape)
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64))


MODELS: dict[str, Callable[[], Any]] = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": _gpt2}


def tiny_policy(kind: str = "llama", *, seed: int = 0, head: bool = True) -> Policy:
    """A random policy whose predictions are far from uniform, and whose value head says something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[kind]()
        value_head = ValueHead(WIDTH, width=8, seed=seed) if head else None
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.3)
            if value_head is not None:
                value_head.outer.weight.normal_(0.0, 0.3)
    return Policy(model.eval(), tokenizer(), value_head)


def step(token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> Step:
    ids = np.asarray(token_ids, dtype=np.int32)
    nats = np.full(len(ids), -1.0) if logprobs is None else np.asarray(logprobs)
    return Step("w", ids, nats.astype(np.float32), Stop.DELIMITER)


def random_tree(rng: np.random.Generator, nodes: int = 12, *, prompt: int = 4, longest: int = 4) -> Tree:
    """A tree with steps of 1 to `longest` tokens, verdicts at its leaves, visits and targets above them."""
    tree = Tree(rng.integers(2, VOCABULARY, prompt).astype(np.int32), "w")
    for _ in range(nodes):
        parent = int(rng.integers(0, len(tree)))
        tree.add(parent, step(rng.integers(2, VOCABULARY, int(rng.integers(1, longest + 1))).tolist()), prior=0.1)
    for node in range(1, len(tree)):
        if not tree.children[node]:
            won = bool(rng.random() < 0.5)
            tree.close(node, Verdict(Status.CORRECT if won else Status.WRONG, float(won)))
            tree.backup(node, tree.reward[node])
    for children in tree.children:
        if len(children) > 1:
            for child, share in zip(children, rng.dirichlet(np.ones(len(children))), strict=True):
                tree.target[child] = float(share)
    return tree


@dataclass
class FakeTrace:
    """What objectives read of a trace."""

    tree: Tree
    problem_id: str = "p"
    iteration: int = 1
    policy_version: int = 0
    path: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def gradients(policy: Policy, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of every parameter of model and head, zeros where the loss does not reach one."""
    modules = {"model": policy.model} | ({"head": policy.head} if policy.head is not None else {})
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
