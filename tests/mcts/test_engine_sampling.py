"""The random stream and the draw."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts import rng
from mcts.engines.sampling import Removed, draw, inverse_cdf, left_over, stream_keys, uniforms

ONE = np.ones(32, dtype=np.float32)


@given(seed=st.integers(0, 2**64 - 1), n=st.integers(1, 6), t=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_number_i_t_of_a_stream_is_the_hash_of_seed_i_and_t(seed: int, n: int, t: int) -> None:
    keys = stream_keys([7, seed], np.array([2, n]))[2:]
    got = uniforms(keys, np.full(n, t))
    assert got.tolist() == [(rng.hash64(seed, i, t) >> 12) * 2.0**-52 for i in range(n)]
    assert (got < 1.0).all()


def test_neighbouring_seeds_samples_and_tokens_give_independent_uniform_numbers() -> None:
    # Chi-square over 16 x 16 cells of pairs of neighbours, 255 degrees of freedom: 330.5 is passed by chance in
    # 0.1% of seeds; the seed is fixed, so the test does not flicker.
    keys = stream_keys(list(range(200)), np.full(200, 8))
    table = np.stack([uniforms(keys, np.full(1600, t)) for t in range(16)], 1)  # [seed x sample, token]
    cube = table.reshape(200, 8, 16)
    pairs = {
        "tokens": (cube[:, :, :-1], cube[:, :, 1:]),
        "samples": (cube[:, :-1], cube[:, 1:]),
        "seeds": (cube[:-1], cube[1:]),
    }
    for name, (a, b) in pairs.items():
        counts = np.histogram2d(a.ravel(), b.ravel(), bins=16, range=((0, 1), (0, 1)))[0]
        expected = a.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 330.5, name


def test_drawn_frequencies_follow_the_probabilities() -> None:
    # Chi-square, 49 degrees of freedom: 85.4 is passed by chance in 0.1% of seeds.
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(20000, 50).contiguous()
    u = np.random.default_rng(0).random(20000)
    ones = np.ones(20000, dtype=np.float32)
    draws = draw(logits, u, ones, ones)
    probabilities = torch.softmax(logits[0].double(), -1).numpy()
    counts = np.bincount(draws.tokens, minlength=50)
    assert ((counts - 20000 * probabilities) ** 2 / (20000 * probabilities)).sum() < 85.4
    np.testing.assert_allclose(draws.logprobs, np.log(probabilities)[draws.tokens], atol=1e-5)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.1, 1.0, 3.0]), min_size=1, max_size=70).filter(any),
    u=st.floats(0.0, 1.0 - 2.0**-52),
)
@settings(max_examples=300, deadline=None)
def test_a_token_of_weight_zero_is_never_drawn_and_the_draw_is_monotone(weights: list[float], u: float) -> None:
    row = torch.tensor([weights], dtype=torch.float32)
    tokens, total = inverse_cdf(row.repeat(3, 1), torch.tensor([0.0, u, 1.0 - 2.0**-52], dtype=torch.float64))
    assert all(weights[t] > 0 for t in tokens.tolist())
    assert tokens.tolist() == sorted(tokens.tolist())
    positive = [i for i, w in enumerate(weights) if w > 0]
    assert tokens[0] == positive[0]
    assert total[0].item() > 0


def test_a_row_is_drawn_alike_beside_any_other_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(32, 431, generator=generator) * 3
    u = np.random.default_rng(1).random(32)
    plain = draw(logits, u, ONE, ONE)
    mixed = ONE.copy()
    mixed[1::2] = 0.3
    narrow = ONE.copy()
    narrow[1::4] = 0.5
    other = draw(logits, u, mixed, narrow)
    moved = draw(logits.roll(5, 0), np.roll(u, 5), ONE, ONE)
    for column, beside, shifted in zip(plain, other, moved, strict=True):
        assert np.array_equal(column[::2], beside[::2]) or column is plain.behavior
        assert np.array_equal(np.roll(column, 5), shifted)


def test_greedy_rows_take_the_largest_logit_with_certainty() -> None:
    logits = torch.randn(32, 77, generator=torch.Generator().manual_seed(3))
    draws = draw(logits, np.random.default_rng(1).random(32), np.zeros(32, dtype=np.float32), ONE)
    assert draws.tokens.tolist() == logits.argmax(-1).tolist()
    assert (draws.behavior == 0).all()
    np.testing.assert_allclose(draws.logprobs, torch.log_softmax(logits, -1).amax(-1).numpy(), atol=1e-6)


def test_a_tiny_nucleus_keeps_the_likeliest_token() -> None:
    logits = torch.randn(32, 77, generator=torch.Generator().manual_seed(4))
    draws = draw(logits, np.random.default_rng(1).random(32), ONE, np.full(32, 1e-6, dtype=np.float32))
    assert draws.tokens.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(draws.behavior, 0.0, atol=1e-6)


def test_what_is_removed_is_not_drawn_and_the_rest_keeps_its_odds() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    rest = left_over(probabilities, Removed([0, 0, 2, 2, 2], [0, 1, 0, 1, 2], [0.5, 0.1, 0.5, 0.3, 0.2]))
    expected = torch.tensor([[0.0, 0.2, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])  # the last: nothing would be left
    torch.testing.assert_close(rest, expected)
    logits = torch.log(probabilities[:1]).expand(32, 3).contiguous()
    u = (np.arange(32) + 0.5) / 32
    draws = draw(logits, u, ONE, ONE, Removed(list(range(32)), [0] * 32, [0.5] * 32))
    assert set(draws.tokens.tolist()) == {1, 2}
    assert (draws.tokens == 1).sum() == 19  # of 32 equally spaced numbers those below 0.3 / 0.5
    np.testing.assert_allclose(draws.behavior, np.log(np.where(draws.tokens == 1, 0.6, 0.4)), atol=1e-6)
    np.testing.assert_allclose(draws.logprobs, np.log(np.where(draws.tokens == 1, 0.3, 0.2)), atol=1e-6)
