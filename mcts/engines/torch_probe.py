"""What is checked of a model when an engine is built: that it can be served, and which forwards give equal bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mcts.engines.kinds import WHY, check_layers, check_served
from mcts.engines.model import ModelError, Policy, cache_name
from mcts.engines.torch_forward import ATTENTION, Forward

_TOKENS = 12
_CHUNKS, _CHUNKS_GPU = 4, 32
"""Most chunks in one prefill forward on a CPU, and on a GPU."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.5}


def _example(policy: Policy, context: int) -> Tensor:
    """Two token sequences [2, T] to try a model with."""
    generator = torch.Generator().manual_seed(0)
    size = policy.model.get_output_embeddings().weight.shape[0]
    return torch.randint(0, size, (2, min(_TOKENS, context)), generator=generator).to(policy.device)


def examine(policy: Policy, context: int) -> tuple[tuple[int, int, int], Tensor]:
    """((layers, KV heads, head size), log-probabilities [2, T, V] of `_example` by a plain forward).

    Raises ModelError where the model's attention is of a kind that the engine cannot serve.
    """
    model: Any = policy.model
    name = type(model).__name__
    check_served(type(model), model.config, context)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no output embeddings: {WHY}")
    out = model(_example(policy, context), use_cache=True)
    cache = getattr(out, cache_name(policy.model))
    if not isinstance(cache, DynamicCache):
        raise ModelError(f"{name} keeps no keys and values: {WHY}")
    check_layers(name, cache, context)
    shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ModelError(f"{name}: keys and values differ in shape between layers: {WHY}")
    _, heads, _, size = shapes.pop()
    return (len(cache.layers), heads, size), torch.log_softmax(out.logits.float(), -1)


def check_equal(policy: Policy, forward: Forward, k: int, expected: Tensor) -> None:
    """Raise ModelError unless decoding `_example` token by token gives the log-probabilities `expected`."""
    name = type(policy.model).__name__
    count = expected.shape[1]
    example = np.zeros((k, count), dtype=np.int64)
    example[:2] = _example(policy, count).cpu().numpy()
    forward.fit(count)
    got = []
    try:
        for t in range(count):
            hidden = forward.decode(example[:, t], np.full(k, t))
            if forward.cache.calls != forward.cache.num_layers:
                raise ModelError(f"{name} bypassed the engine's cache in some layer: {WHY}")
            got.append(torch.log_softmax(policy.unembed(hidden[:2]).float(), -1))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(f"{name} cannot run on the engine's cache ({error}): {WHY}") from error
    gap = (torch.stack(got, 1) - expected).abs().max().item()
    if not gap <= _TOLERANCE[policy.model.dtype]:
        raise ModelError(f"{name}: log-probabilities are off by {gap:.2g} with shared keys and values: {WHY}")


def row_ladder(rows: int) -> list[int]:
    """Row counts worth having beside `rows`: 16, 32, 48, 64, 96, ... in ascending order, `rows` last."""
    sizes = sorted({16 << i for i in range(16)} | {48 << i for i in range(16)})
    return [size for size in sizes if size < rows] + [rows]


def shapes(policy: Policy, forward: Forward, chunk: int, context: int) -> tuple[list[int], int, bool]:
    """(row counts of a decode, most chunks of `chunk` tokens in one prefill, whether bits are steady: `equal_sizes`).
    Equal bits are promised on CPUs alone; on a GPU few tokens take as long as many."""
    rows = forward.cache.num_rows
    if policy.device.type != "cpu":
        return doubled(rows), min(_CHUNKS_GPU, rows), False
    sizes, steady = equal_sizes(policy, forward, context)
    few = min(_CHUNKS, rows)
    return sizes, equal_chunks(policy, forward, chunk, few) if context > 2 * chunk else 1, steady


def doubled(rows: int) -> list[int]:
    """Row counts beside `rows` on a GPU, where each is captured and a few rows too many cost little: 16, 32, 64, ..."""
    return [16 << i for i in range(16) if 16 << i < rows] + [rows]


def equal_sizes(policy: Policy, forward: Forward, context: int) -> tuple[list[int], bool]:
    """(row counts whose forwards give the bits of the full count, whether row and padding leave bits alone).

    Tried on random keys and values: each row count at the first and the last rows, rows in another order, longer
    padding. Sums taken in another order would differ somewhere almost surely.
    """
    cache = forward.cache
    rows, length = cache.num_rows, cache.capacity
    generator = torch.Generator().manual_seed(1)
    random = torch.randn((*cache.kv.shape[:4], length + 64, cache.size), generator=generator).to(cache.kv)
    size = policy.model.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(0, size, (rows,), generator=generator).numpy()
    positions = torch.randint(0, min(length, context), (rows,), generator=generator).numpy()

    def run(k: int, pad: int, shift: int) -> tuple[Tensor, Tensor]:
        cache.resize(length + pad)
        cache.kv.copy_(random[..., : length + pad, :].roll(shift, 2))
        hidden = forward.decode(np.roll(tokens, shift)[:k], np.roll(positions, shift)[:k])
        return hidden, policy.unembed(hidden)

    whole = run(rows, 0, 0)

    def same(k: int, pad: int, shift: int) -> bool:
        got = run(k, pad, shift)
        return all(torch.equal(a, b.roll(shift, 0)[:k]) for a, b in zip(got, whole, strict=True))

    steady = all(same(rows, pad, shift) for pad, shift in ((0, 7), (16, 0), (64, rows // 2)))
    sizes = [k for k in row_ladder(rows)[:-1] if same(k, 0, 0) and same(k, 16, k)]
    cache.resize(length)
    cache.kv.zero_()
    return [*sizes, rows], steady


def equal_chunks(policy: Policy, forward: Forward, tokens: int, most: int) -> int:
    """How many chunks of `tokens` one prefill may hold: `most` if their bits then equal those of one alone, else 1."""
    forward.fit(2 * tokens)
    size = policy.model.get_output_embeddings().weight.shape[0]
    chunk = (np.arange(most * tokens, dtype=np.int64).reshape(most, tokens) * 7919) % size
    rows = np.arange(most, dtype=np.int64)

    def run(batch: list[int]) -> Tensor:
        for start in (0, tokens):
            forward.prefill(chunk[batch], rows[batch], start)
        return forward.cache.kv[:, :, batch].clone()

    whole = run(list(range(most)))
    same = all(torch.equal(run([i]), whole[:, :, i : i + 1]) for i in range(most))
    forward.cache.kv.zero_()
    return most if same else 1


def use_attention(policy: Policy) -> None:
    """Switch the model to the engine's attention (plain forwards then run on sdpa)."""
    policy.model.set_attn_implementation(ATTENTION)
