"""A packed tree is its paths: nothing is lost, nothing is seen that should not be, gradients are equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts.tree import Tree
from selfplay import llama_kernels
from selfplay.cutting import cut, find_exits, segments, split_paths
from selfplay.forward import batches, check_kernels, check_tree_mask, forward, token_logprobs
from selfplay.items import ValueRule, from_tree, policy_groups, value_labels, winners
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.packing import NO_TOKEN, Item, PackingError, chain, pack
from tests.selfplay.learning import MODELS, VOCABULARY, gradients, random_tree, step, tiny_policy

EVERYTHING = Coefficients(policy=1.0, nll=0.7, value=0.5)


def full_item(tree: Tree, version: int = -1) -> Item:
    labels = value_labels(tree, ValueRule.MEAN)
    item = from_tree(tree, wins=winners(tree), groups=policy_groups(tree), values=labels, sampled=True, version=version)
    assert item is not None
    return item


def loss_of(policy, items, *, tree_mask=True):
    packed = pack(items, share_rows=tree_mask)
    return composite_loss(forward(policy, packed, tree_mask=tree_mask), packed, Totals.of(items), EVERYTHING)[0]


def naive_loss(policy, tree: Tree) -> torch.Tensor:
    """The loss from its definition: every node by a plain forward over its own path, nothing packed."""
    ids = {n: tree.prefix(n) for n in range(len(tree))}
    hidden = [
        policy.model.base_model(torch.from_numpy(ids[n].astype(np.int64))[None]).last_hidden_state[0]
        for n in range(len(tree))
    ]

    def step_logprob(node: int) -> torch.Tensor:
        size = len(tree.steps[node].token_ids)
        logits = policy.unembed(hidden[node][-size - 1 : -1]).log_softmax(-1)
        return logits.gather(1, torch.from_numpy(tree.steps[node].token_ids.astype(np.int64))[:, None]).sum()

    groups = [
        -(torch.tensor(t) * torch.stack([step_logprob(c) for c in children]).log_softmax(0)).sum()
        for children, t in policy_groups(tree)
    ]
    wins = [n for win in winners(tree) for n in tree.path(win)[1:]]
    labels = value_labels(tree, ValueRule.MEAN)
    known = np.flatnonzero(~np.isnan(labels)).tolist()
    values = policy.head(torch.stack([hidden[n][-1] for n in known]))
    loss = torch.nn.functional.binary_cross_entropy(values, torch.from_numpy(labels[known])) * EVERYTHING.value
    if groups:
        loss = loss + EVERYTHING.policy * torch.stack(groups).mean()
    if wins:
        tokens = sum(len(tree.steps[n].token_ids) for n in wins)
        loss = loss - EVERYTHING.nll * torch.stack([step_logprob(n) for n in wins]).sum() / tokens
    return loss


def assert_close(ours, theirs, rtol=1e-4):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=rtol, atol=rtol * scale + 1e-8, msg=name)


trees = st.builds(
    lambda seed, nodes: random_tree(np.random.default_rng(seed), nodes),
    st.integers(0, 10_000),
    st.integers(1, 25),
)


@given(st.lists(trees, min_size=1, max_size=5), st.integers(0, 40))
@settings(max_examples=40)
def test_a_token_sees_its_ancestors_and_nothing_else(many, extra):
    items = [full_item(tree) for tree in many]
    packed = pack(items, max(len(item) for item in items) + extra)
    seen = packed.mask()[:, 0] == 0.0
    wanted = torch.eye(seen.shape[1], dtype=torch.bool).repeat(seen.shape[0], 1, 1)
    flat = packed.position_ids.new_full(packed.input_ids.shape, -1)
    for row, column, item, token in placed(items, packed):
        flat[row, column] = token
        above = item.parent_token[token]
        while above != NO_TOKEN:
            wanted[row, column, column - (token - above)] = True
            above = item.parent_token[above]
    assert torch.equal(seen, wanted)


def placed(items, packed):
    """(row, column, item, token) of every token, found by content: exits tell where a segment begins."""
    length = packed.input_ids.shape[1]
    found = []
    for number, item in enumerate(items):
        mine = packed.item_of == number
        if not mine.any():
            continue
        source = packed.read[packed.source[mine]]
        token = packed.token_of[mine]
        place = {int(item.parent_token[t]): int(s) for t, s in zip(token.tolist(), source.tolist(), strict=True)}
        start = min(place.values()) - min(place)
        found += [((start + t) // length, (start + t) % length, item, t) for t in range(len(item))]
    return found


@given(st.lists(trees, min_size=1, max_size=6), st.integers(8, 60))
@settings(max_examples=40)
def test_packing_loses_no_token_and_no_annotation(many, limit):
    items = [full_item(tree) for tree in many]
    length = max(limit, max(int(np.diff(segments(i)).max()) for i in items))
    packed = pack(items, length)
    assert packed.tokens == sum(len(item) for item in items)
    for row, column, item, token in placed(items, packed):
        assert packed.input_ids[row, column] == item.token_ids[token]
        assert packed.position_ids[row, column] == item.position[token]
    totals = Totals.of(items)
    assert packed.nll_weight.sum().item() == pytest.approx(totals.nll)
    assert packed.group_weight.sum().item() == totals.groups
    assert len(packed.value_label) == totals.values
    assert packed.span_target.sum().item() == pytest.approx(totals.groups)
    flat = packed.input_ids.flatten()
    for number, item in enumerate(items):
        mine = packed.item_of == number
        tokens = packed.token_of[mine]
        assert torch.equal(packed.labels[mine], torch.from_numpy(item.token_ids).long()[tokens])
        above = torch.from_numpy(item.parent_token[tokens.numpy()]).long()
        assert torch.equal(flat[packed.read[packed.source[mine]]], torch.from_numpy(item.token_ids).long()[above])


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_a_packed_tree_equal_the_sum_over_its_paths(kind):
    policy = tiny_policy(kind)
    tree = random_tree(np.random.default_rng(3), 14)
    item = full_item(tree)
    other = full_item(random_tree(np.random.default_rng(4), 6))
    packed = gradients(policy, lambda: loss_of(policy, [item]))
    assert_close(packed, gradients(policy, lambda: naive_loss(policy, tree)))
    paths = gradients(policy, lambda: loss_of(policy, [split_paths(item)], tree_mask=False))
    assert_close(packed, paths)
    together = gradients(policy, lambda: loss_of(policy, [item, other]))
    apart = gradients(policy, lambda: loss_of(policy, [split_paths(item), split_paths(other)], tree_mask=False))
    assert_close(together, apart)


@pytest.mark.parametrize("limit", [20, 27, 40])
def test_a_cut_tree_has_the_gradients_of_the_whole_tree(limit):
    policy = tiny_policy()
    item = full_item(random_tree(np.random.default_rng(5), 24))
    pieces = cut(item, limit)
    sizes = np.diff(segments(pieces))
    assert len(sizes) > 1
    assert sizes.max() <= limit
    whole = gradients(policy, lambda: loss_of(policy, [item]))
    assert_close(gradients(policy, lambda: loss_of(policy, [pieces])), whole)


@given(trees, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_cut_tree_carries_every_loss_once(tree, over):
    item = full_item(tree)
    limit = int(item.position.max()) + over
    pieces = cut(item, limit)
    assert np.diff(segments(pieces)).max() <= limit
    assert pieces.nll_weight.sum() == item.nll_weight.sum()
    assert pieces.sampled.sum() == item.sampled.sum()
    assert np.array_equal(pieces.token_ids[pieces.value_token], item.token_ids[item.value_token])
    for k in range(len(item.span_start)):
        before = item.token_ids[item.span_start[k] : item.span_end[k]]
        assert np.array_equal(pieces.token_ids[pieces.span_start[k] : pieces.span_end[k]], before)
    for token in range(len(pieces)):
        above = pieces.parent_token[token]
        assert pieces.position[token] == (0 if above == NO_TOKEN else pieces.position[above] + 1)
    assert np.array_equal(pieces.exits, find_exits(pieces.parent_token))


def test_a_path_over_the_limit_is_refused_with_what_to_do():
    with pytest.raises(PackingError, match="raise the learner's max_length"):
        cut(chain(range(30)), 29)
    with pytest.raises(PackingError, match="raise row_length"):
        pack([chain(range(30))], 29)


def test_chains_of_equal_length_pack_as_a_padded_batch():
    packed = pack([chain(range(21)) for _ in range(10)])
    assert packed.input_ids.shape == (10, 21)


def test_short_chains_share_a_row():
    packed = pack([chain(range(size)) for size in (64, 30, 30, 4, 20)])
    assert packed.input_ids.shape == (3, 64)


def test_batches_hold_every_item_once_and_respect_the_token_limit():
    rng = np.random.default_rng(0)
    items = [chain(range(int(n))) for n in rng.integers(1, 90, 60)]
    found = list(batches(items, 128))
    assert sorted(i for batch in found for i in batch) == list(range(60))
    assert all(sum(len(items[i]) for i in batch) <= 128 for batch in found)


def test_tokens_out_of_depth_first_order_are_refused():
    with pytest.raises(PackingError, match="depth-first"):
        find_exits(np.asarray([-1, 0, 0, 1], dtype=np.int32))


def test_nodes_conditioned_on_other_nodes_are_refused():
    tree = random_tree(np.random.default_rng(0), 3)
    tree.context[2] = (1,)
    with pytest.raises(PackingError, match="conditioned"):
        full_item(tree)


def test_branches_without_loss_are_left_out():
    tree = Tree(np.asarray([5, 6], dtype=np.int32))
    first = tree.add(0, step([7, 8]))
    tree.add(0, step([9]))
    item = from_tree(tree, wins=[first])
    assert item is not None
    assert item.token_ids.tolist() == [5, 6, 7, 8]
    assert item.nll_weight.tolist() == [0, 0, 1, 1]
    assert from_tree(tree) is None


@pytest.mark.parametrize("kind", MODELS)
def test_common_models_pass_the_tree_check(kind):
    assert check_tree_mask(tiny_policy(kind), max_length=64)


def test_a_model_that_ignores_the_mask_or_has_a_short_window_is_trained_per_path(monkeypatch):
    policy = tiny_policy()
    plain = policy.model.base_model.forward
    monkeypatch.setattr(
        policy.model.base_model, "forward", lambda **k: plain(**{n: v for n, v in k.items() if n != "attention_mask"})
    )
    assert not check_tree_mask(policy, max_length=64)
    windowed = tiny_policy()
    windowed.model.config.sliding_window = 32
    assert check_tree_mask(windowed, max_length=32)
    assert not check_tree_mask(windowed, max_length=64)


@pytest.mark.parametrize("short", [0, 128])
def test_kernels_give_the_losses_and_gradients_of_the_model_itself(short, monkeypatch):
    monkeypatch.setattr(llama_kernels, "SHORT", short)
    policy = tiny_policy()
    assert check_kernels(policy)
    items = [full_item(random_tree(np.random.default_rng(s), 14)) for s in range(3)]

    def loss(kernels):
        packed = pack(items)
        outputs = forward(policy, packed, kernels=kernels)
        return composite_loss(outputs, packed, Totals.of(items), EVERYTHING)[0]

    assert_close(gradients(policy, lambda: loss(True)), gradients(policy, lambda: loss(False)))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2"])
def test_kernels_are_not_used_for_models_of_another_kind(kind):
    assert not check_kernels(tiny_policy(kind))


def test_kernels_are_not_used_where_they_disagree(monkeypatch):
    policy = tiny_policy()
    policy.model.model.layers[0].input_layernorm.variance_epsilon = 0.5
    assert check_kernels(policy)
    real = llama_kernels.hidden_states
    monkeypatch.setattr(llama_kernels, "hidden_states", lambda *a: real(*a) * 1.01)
    assert not check_kernels(policy)


def test_token_logprobs_are_those_of_the_plain_model():
    policy = tiny_policy()
    ids = np.random.default_rng(1).integers(2, VOCABULARY, 12)
    found = token_logprobs(policy, [chain(ids, nll_weight=np.ones(12))], tokens=64)[0]
    assert math.isnan(found[0])
    with torch.no_grad():
        logits = policy.model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    wanted = logits[:-1].gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(found[1:]), wanted, rtol=1e-5, atol=1e-5)
