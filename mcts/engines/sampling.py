"""Drawing tokens: a counter-based stream of uniform numbers and the inverse distribution function.

Number (i, t) of a request's stream is `hash64(seed, i, t)`, so it depends on no order and on no neighbour. Every
tensor operation works row by row, so that a row's draw does not depend on the rows beside it either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcts.engines.transfer import to_host
from mcts.types import Float32

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_BELOW_ONE = 1.0 - 2.0**-52
_NOISE = 1e-7
"""What rounding in float32 can leave of a probability from which all of it was taken away."""


def _link(state: UInt64 | np.uint64, word: UInt64) -> UInt64:
    """One link of the `rng.hash64` chain, elementwise."""
    state = (state ^ word) + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX1
    state = (state ^ (state >> np.uint64(27))) * _MIX2
    mixed: UInt64 = state ^ (state >> np.uint64(31))
    return mixed


def stream_keys(seeds: Sequence[int], counts: Int64) -> UInt64:
    """Keys of the streams of samples 0 to counts[r] - 1 of every request r, one request after the other, uint64
    [sum(counts)]."""
    states = _link(_GOLDEN, np.array(seeds, dtype=np.uint64))  # `rng.hash64` of each
    before = np.cumsum(counts) - counts
    samples = np.arange(int(counts.sum())) - np.repeat(before, counts)
    return _link(np.repeat(states, counts), samples.astype(np.uint64))


def uniforms(keys: UInt64, counters: Int64) -> Float64:
    """Number `counters[i]` of stream `keys[i]`, in [0, 1) with 52 random bits, float64 [k]."""
    words = _link(keys, counters.astype(np.uint64)) >> np.uint64(12)
    return words.astype(np.float64) * 2.0**-52


class Removed(NamedTuple):
    """Probability to be taken away before drawing: `mass[i]` from token `tokens[i]` of row `rows[i]`. A pair of row
    and token is there at most once."""

    rows: list[int]
    tokens: list[int]
    mass: list[float]


class Draws(NamedTuple):
    """What was drawn, one entry per row."""

    tokens: Int64  # [k]
    logprobs: Float32  # [k] nats, at temperature 1 over the whole vocabulary
    behavior: Float32  # [k] nats, under the distribution drawn from; 0 where greedy


def inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from unnormalised `weights` float32 [k, V] with `uniform` float64 [k] in [0, 1).

    Returns tokens int64 [k], never one of weight 0, and the weights' sums float64 [k]. Two levels (blocks, then
    inside the block) because a running sum over the whole vocabulary costs several times as much.
    """
    weights = weights.contiguous()
    k, vocabulary = weights.shape
    width = 1 << max(1, round(math.log2(vocabulary) / 2))
    whole = vocabulary // width
    sums = weights.as_strided((k, whole, width), (vocabulary, width, 1)).sum(-1)
    if whole * width < vocabulary:
        sums = torch.cat((sums, weights[:, whole * width :].sum(-1, keepdim=True)), 1)
    cdf = torch.nn.functional.pad(sums.double().cumsum(1), (1, 0))
    total = cdf[:, -1]
    x = uniform * total
    block = torch.searchsorted(cdf[:, 1:].contiguous(), x[:, None], right=True).clamp_(max=sums.shape[1] - 1)
    index = block * width + torch.arange(width, device=weights.device)
    inside = weights.gather(1, index.clamp(max=vocabulary - 1)).double()
    inside = inside.masked_fill_(index >= vocabulary, 0.0).cumsum(1)
    rest = torch.minimum(x - cdf.gather(1, block)[:, 0], inside[:, -1] * _BELOW_ONE)
    place = torch.searchsorted(inside, rest[:, None], right=True)
    return (block * width + place)[:, 0].clamp_(max=vocabulary - 1), total


def nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches `top_p` float32 [k]; at least one stays.

    Rows with `top_p` >= 1 come back as they are. Equal probabilities keep the order of the vocabulary.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = (ordered.double().cumsum(-1) - ordered < top_p[:, None]) | (top_p[:, None] >= 1.0)
    return torch.where(torch.zeros_like(kept).scatter_(1, order, kept), probabilities, 0.0)


def left_over(probabilities: Tensor, removed: Removed) -> Tensor:
    """`probabilities` float32 [k, V] without what is removed, not normalised; a new tensor. What rounding leaves of a
    token that is all removed counts as nothing. A row of which nothing is left comes back whole."""
    rows, tokens = (torch.tensor(index, device=probabilities.device) for index in (removed.rows, removed.tokens))
    mass = torch.tensor(removed.mass, dtype=torch.float32, device=probabilities.device)
    rest = probabilities[rows, tokens] - mass
    weights = probabilities.clone()
    weights[rows, tokens] = torch.where(rest < _NOISE, torch.zeros_like(rest), rest)
    gone = weights.amax(-1) <= 0.0
    return torch.where(gone[:, None], probabilities, weights) if bool(gone.any()) else weights


class Settings(NamedTuple):
    """What k draws are made with."""

    uniform: Float64  # [k] in [0, 1)
    temperature: Float32  # [k], 0: greedy
    top_p: Float32  # [k]


def draw(
    logits: Tensor, uniform: Float64, temperature: Float32, top_p: Float32, removed: Removed | None = None
) -> Draws:
    """One token per row of `logits` float32 [k, V]; `uniform`, `temperature` (0: greedy) and `top_p` are [k].
    `removed` names rows of temperature 1 and top_p 1 only.

    k should be a multiple of 32: the last few elements of other sizes go through other kernels on a CPU, whose last
    bit may differ. Non-finite logits give a non-finite log-probability, which the caller must look at.
    """
    device = logits.device
    heat = None if bool((temperature == 1.0).all()) else torch.from_numpy(temperature).to(device)
    nuclei = torch.from_numpy(top_p).to(device) if bool((top_p < 1.0).any()) else None
    return Draws(*to_host(*drawn(logits, torch.from_numpy(uniform).to(device), heat, nuclei, removed)))


def drawn(
    logits: Tensor, uniform: Tensor, temperature: Tensor | None, top_p: Tensor | None, removed: Removed | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`draw` on the device: tokens int64, log-probabilities and behaviour's float32, [k] each. `temperature` None: all
    are 1; `top_p` None: likewise. Without `removed` the host reads nothing."""
    probabilities = torch.softmax(logits, -1)
    # The largest probability is 1 / sum(exp(logits - max)), so this is the log of the softmax's denominator.
    norm = logits.amax(-1) - probabilities.amax(-1).log()
    weights = probabilities
    if temperature is not None:
        inverse = torch.where(temperature > 0, 1.0 / temperature, 1.0)
        weights = torch.softmax(logits * inverse[:, None], -1)
    if removed is not None:
        weights = left_over(weights, removed)
    if top_p is not None:
        weights = nucleus(weights, top_p)
    tokens, total = inverse_cdf(weights, uniform)
    greedy = None if temperature is None else temperature == 0.0
    if greedy is not None:
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - norm
    if temperature is None and top_p is None and removed is None:
        return tokens, logprobs, logprobs
    other = (weights.gather(1, tokens[:, None])[:, 0].double().log() - total.log()).float()
    # a plain row's is its log-probability to the last bit, whatever the rows beside it are drawn from
    changed = torch.zeros_like(tokens, dtype=torch.bool)
    if temperature is not None and greedy is not None:
        other = other.masked_fill(greedy, 0.0)
        changed |= temperature != 1.0
    if top_p is not None:
        changed |= top_p < 1.0
    if removed is not None:
        changed[removed.rows] = True
    return tokens, logprobs, torch.where(changed, other, logprobs)
