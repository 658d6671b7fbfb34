"""PUCT search: equal to a naive recursive reference node by node, and each of its rules by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.rng import hash64
from mcts.search import Search
from mcts.strategies import tree_search
from mcts.strategies.mcts import FromNode, Mcts, RootNoise, best_move
from mcts.strategies.tree_search import TreeSearch, Widening
from mcts.tree import ROOT, Tree
from mcts.types import Ended, Request, SearchResult, Stop
from mcts.value import ConstantValue, RolloutValue
from tests.mcts.test_context import context, step
from tests.mcts.toy import ToyTask, World, problem, run_one


@dataclass
class Node:
    """A node of the reference: nothing but the definition."""

    steps: tuple[str, ...]
    prior: float = 1.0
    z: float | None = None
    visits: int = 0
    total: float = 0.0
    misses: int = 0
    children: dict[str, Node] = field(default_factory=dict)


class Reference:
    """PUCT with widening as written on paper: recursive, one simulation at a time."""

    def __init__(self, world: World, task: ToyTask, settings: Mcts, seed: int, temperature: float) -> None:
        self.world, self.task, self.settings, self.seed = world, task, settings, seed
        self.engine = world.engine()
        self.prompt = self.engine.encode(problem().prompt)
        self.engine.open(0, self.prompt, 10**9)
        self.ordinal = 0
        self.temperature = temperature
        self.root = Node(())

    def draw(self, node: Node, n: int) -> list[float]:
        prefix = self.engine.encode(" ".join((problem().prompt, *node.steps)))
        seed = hash64(self.seed, self.ordinal)
        self.ordinal += 1
        self.engine.submit(Request(self.ordinal, 0, prefix, n, self.task.max_step_tokens, seed, self.temperature))
        (reply,) = self.engine.poll()
        values = []
        for drawn in reply.steps:
            if drawn.text in node.children:
                node.misses += 1
                continue
            node.misses = 0
            child = node.children[drawn.text] = Node((*node.steps, drawn.text), math.exp(float(sum(drawn.logprobs))))
            words = drawn.text.split()
            if words[-1] != ";":
                child.z = float(words[-1] == "yes")
            elif "bad" in words or len(child.steps) == self.task.max_steps:
                child.z = 0.0
            value = child.z if child.z is not None else drawn.value
            child.visits, child.total = 1, value
            values.append(value)
        return values

    def simulate(self, node: Node) -> list[float]:
        s = self.settings
        if node.z is not None:
            values = [node.z]
        elif not node.children:
            values = self.draw(node, s.expand)
        else:
            arms = list(node.children.values())
            n = sum(arm.visits for arm in arms)
            c = math.log((1 + n + s.c_base) / s.c_base) + s.c_init
            scores = [a.total / a.visits + c * a.prior * math.sqrt(n) / (1 + a.visits) for a in arms]
            mass = sum(a.prior for a in arms)
            if 1 - mass > 1e-6 and node.misses < s.patience:
                q = max(0.0, node.total / node.visits - s.fpu_reduction * math.sqrt(mass))
                scores.append(q + c * (1 - mass) * math.sqrt(n) / (1 + node.misses))
            best = scores.index(max(scores))
            values = self.simulate(arms[best]) if best < len(arms) else self.draw(node, s.widen)
        node.visits += len(values)
        node.total += sum(values)
        return values


def compare(tree: Tree, node: int, reference: Node) -> int:
    """Number of nodes compared."""
    assert tree.visits[node] == reference.visits
    assert tree.value_sum[node] == pytest.approx(reference.total)
    assert tree.prior[node] == pytest.approx(reference.prior)
    assert [tree.steps[c].text for c in tree.children[node]] == list(reference.children)  # type: ignore[union-attr]
    children = zip(tree.children[node], reference.children.values(), strict=True)
    return 1 + sum(compare(tree, child, other) for child, other in children)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [{"expand": 1, "widen": 1}, {"expand": 4, "widen": 2, "fpu_reduction": 0.0}])
def test_one_move_equals_the_naive_recursive_reference(seed: int, shape: dict[str, float]) -> None:
    world, task = World(seed, wins=0.05, finish=0.15, depth=9), ToyTask(max_steps=5)
    settings = Mcts(simulations=60, noise=0.0, c_init=2.0, **shape)  # type: ignore[arg-type]
    reference = Reference(world, task, settings, seed, temperature=1.3)
    for _ in range(60):
        reference.simulate(reference.root)
    search = Search(problem(), settings, 10**6, seed, learning=True, temperature=1.3)
    result = run_one_move(world, task, search)
    assert compare(result.tree, ROOT, reference.root) == len(result.tree) >= 5


def run_one_move(world: World, task: ToyTask, search: Search) -> SearchResult:
    """The first move of an episode: a strategy that is the same but for stopping there."""
    original = tree_search.TreeSearch.simulate
    moves = 0

    def once(self: tree_search.TreeSearch, course: object, simulations: float):  # type: ignore[no-untyped-def]
        nonlocal moves
        moves += 1
        if moves == 1:
            yield from original(self, course, simulations)  # type: ignore[arg-type]
        else:
            self.spent = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_search.TreeSearch, "simulate", once)
        return run_one(world.engine(), task, search)


def search(strategy: Mcts, *, seed: int = 0, budget: int = 4000, **options: object) -> Search:
    return Search(problem(), strategy, budget, seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["exact", "draws"])
@pytest.mark.parametrize("leaves", [1, 4])
@pytest.mark.parametrize("learning", [False, True])
def test_visits_and_values_are_conserved(rule: str, leaves: int, learning: bool) -> None:
    world = World(5, depth=9)
    result = run_one(world.engine(), ToyTask(), search(Mcts(leaves=leaves), prior_rule=rule, learning=learning))
    tree = result.tree
    tree.check()
    for node in range(len(tree)):
        below = tree.children[node]
        own_visits = tree.visits[node] - sum(tree.visits[c] for c in below)
        own_value = tree.value_sum[node] - sum(tree.value_sum[c] for c in below)
        if node == ROOT:
            assert own_visits == 0  # root visits are the evaluations below it
        elif tree.terminal[node]:
            assert own_value == pytest.approx(own_visits * tree.reward[node])  # exact z at every visit
        else:
            assert own_visits == 1
            assert own_value == pytest.approx(tree.raw_value[node])


def test_a_terminal_node_backs_up_its_exact_value_at_every_visit() -> None:
    engine = ScriptedEngine(lambda _, __: {"yes": 1.0}, lambda _, __: 0.1)
    result = run_one(engine, ToyTask(), search(Mcts(simulations=5), learning=True))
    assert (result.tree.visits[1], result.tree.value_sum[1]) == (5, 5.0)
    assert result.ended is Ended.SOLVED


def test_an_episode_plays_moves_down_to_a_terminal_in_one_tree() -> None:
    result = run_one(World(7).engine(), ToyTask(), search(Mcts(simulations=16), learning=True))
    tree = result.tree
    assert tree.played[0] == ROOT
    assert all(tree.parent[b] == a for a, b in zip(tree.played, tree.played[1:], strict=False))
    assert tree.terminal[tree.played[-1]]


def test_outside_learning_the_search_stops_at_the_first_verified_win() -> None:
    for seed in range(10):
        result = run_one(World(seed).engine(), ToyTask(), search(Mcts()))
        if result.ended is Ended.SOLVED:
            wins = [n for n in range(len(result.tree)) if (v := result.tree.verdict[n]) is not None and v.won]
            assert result.chosen == wins[0]
            assert len(result.tree) - wins[0] <= Mcts().expand
            assert result.verdict is not None
            assert result.verdict.won


@pytest.mark.parametrize("learning", [False, True])
def test_commit_never_stops_at_the_first_win_and_plays_no_move(learning: bool) -> None:
    strategy = Mcts(commit="never", simulations=0)
    results = [run_one(World(s).engine(), ToyTask(), search(strategy, seed=s, learning=learning)) for s in range(9)]
    assert {r.ended for r in results} <= {Ended.SOLVED, Ended.EXHAUSTED}
    assert Ended.SOLVED in {r.ended for r in results}
    for result in results:
        assert result.tree.played == []
        assert sum(r == 1.0 for r in result.tree.reward) <= strategy.expand


def test_a_tree_with_nothing_left_to_draw_is_exhausted_without_a_step_drawn_twice() -> None:
    world = World(3, wins=0.0, depth=2)
    strategy = Mcts(commit="never", simulations=0, expand=1)
    result = run_one(world.engine(), ToyTask(), search(strategy, budget=10**6))
    assert result.ended is Ended.EXHAUSTED
    assert result.usage.discarded == 0
    half = result.usage.sampled // 2
    assert run_one(world.engine(), ToyTask(), search(strategy, budget=half)).ended is Ended.BUDGET
    one = Mcts(commit="never", simulations=1)
    assert run_one(world.engine(), ToyTask(), search(one, budget=10**6)).ended is Ended.STOPPED


def test_a_node_closes_after_so_many_draws_without_anything_new() -> None:
    engine = ScriptedEngine(lambda _, __: {"a no": 0.999, "b no": 0.001}, lambda _, __: 0.1)
    engine.excludes = False  # such an engine may draw a step again
    result = run_one(engine, ToyTask(), search(Mcts(commit="never", simulations=0, expand=1, patience=3)))
    assert result.ended is Ended.EXHAUSTED
    assert sum(result.tree.draws[1:]) == 4


def test_a_node_closes_when_all_probability_is_drawn() -> None:
    engine = ScriptedEngine(lambda _, __: {"a no": 0.5, "b no": 0.5}, lambda _, __: 0.1)
    result = run_one(engine, ToyTask(), search(Mcts(commit="never", simulations=0, expand=1, patience=99)))
    assert len(result.tree) == 3
    assert result.ended is Ended.EXHAUSTED


def test_under_draws_the_width_grows_with_the_root_of_the_visits() -> None:
    many = {f"w{i} ;": 0.01 for i in range(100)}
    engine = ScriptedEngine(lambda _, __: many, lambda _, __: 0.5)
    strategy = Mcts(simulations=40, expand=1, width=2.0, power=0.5, patience=100, noise=0.0)
    result = run_one(engine, ToyTask(max_steps=50), search(strategy, budget=200, prior_rule="draws"))
    for node, below in enumerate(result.tree.children):
        assert len(below) <= max(1, math.floor(2.0 * result.tree.visits[node] ** 0.5)) + 1


def test_leaves_in_flight_are_different_nodes_and_none_is_left_in_flight() -> None:
    engine = World(6, wins=0.0, depth=9).engine()
    waves: list[list[bytes]] = [[]]
    submit, poll = engine.submit, engine.poll
    engine.submit = lambda request: (waves[-1].append(request.prefix.tobytes()), submit(request))[1]  # type: ignore[method-assign]
    engine.poll = lambda: (waves.append([]), poll())[1]  # type: ignore[method-assign]
    strategy = Mcts(leaves=4, expand=2, simulations=99)
    result = run_one(engine, ToyTask(max_steps=9), search(strategy, budget=900, learning=True))
    assert max(len(wave) for wave in waves) == 4
    assert all(len(set(wave)) == len(wave) for wave in waves)
    result.tree.check()


def test_root_noise_is_used_in_learning_only_and_never_stored() -> None:
    world = World(8, depth=9)
    priors = {}
    shapes = {}
    for noise in (0.0, 1.0):
        for learning in (False, True):
            strategy = Mcts(noise=noise, simulations=40, move_temperature=0.0)
            tree = run_one(world.engine(), ToyTask(checkable=False), search(strategy, learning=learning)).tree
            priors[noise, learning] = {tree.text(n): tree.prior[n] for n in range(1, len(tree))}
            shapes[noise, learning] = tree.visits
    assert shapes[0.0, False] == shapes[1.0, False]
    assert shapes[0.0, True] != shapes[1.0, True]
    shared = priors[0.0, True].keys() & priors[1.0, True].keys()
    assert len(shared) > 5
    assert all(priors[0.0, True][text] == priors[1.0, True][text] for text in shared)


def test_noisy_priors_sum_to_one_and_keep_their_draw_when_an_arm_is_added() -> None:
    noise = RootNoise(context(), 0.25, None)
    noise.at(ROOT)
    first, unseen = noise.priors([1, 2], [1.0, 0.3, 0.2, 0.1], 0.5)
    assert sum(first.values()) == pytest.approx(1.0)
    assert unseen == first[-1]
    again, _ = noise.priors([1, 2], [1.0, 0.3, 0.2, 0.1], 0.5)
    assert again == first
    more, _ = noise.priors([1, 2, 3], [1.0, 0.3, 0.2, 0.1], 0.4)
    assert sum(more.values()) == pytest.approx(1.0)
    share = (first[1] - 0.75 * 0.3) / (first[2] - 0.75 * 0.2)
    assert (more[1] - 0.75 * 0.3) / (more[2] - 0.75 * 0.2) == pytest.approx(share)


@pytest.mark.parametrize(("left", "over"), [(3, False), (2, True)])
def test_a_move_ends_when_nothing_can_overtake_the_most_visited(left: int, over: bool) -> None:
    ctx = context()
    state = TreeSearch(ctx, Widening(expand=3, widen=1), lambda *_: 0, leaves=1, skip_done=False)
    for text, visits in (("a ;", 9), ("b ;", 1)):
        arm, _ = ctx.add(ROOT, step(text, 0.1, (ord(text[0]), 1)))
        for _ in range(visits):
            ctx.tree.backup(arm, 0.5)
    # a simulation expands at most three steps: 1 + 3 * left against 9
    assert FromNode(ctx, state, ROOT, stop_at_win=True).over(left) == over
    assert not FromNode(ctx, state, ROOT, stop_at_win=False).over(left)


def test_prefers_a_verified_win_over_the_most_visited() -> None:
    ctx = context()
    state = TreeSearch(ctx, Widening(), lambda *_: 0, leaves=1, skip_done=False)
    often, _ = ctx.add(ROOT, step("a ;", tokens=(5, 6)))
    won, _ = ctx.add(ROOT, step("yes", tokens=(7, 0), stop=Stop.EOS))
    for _ in range(9):
        ctx.tree.backup(often, 0.9)
    ctx.tree.backup(won, 1.0)
    assert best_move(state, [often, won]) == won


def test_targets_are_distributions_over_evaluated_siblings_and_nan_elsewhere() -> None:
    tree = run_one(World(5, depth=9).engine(), ToyTask(), search(Mcts(), learning=True)).tree
    for node in range(len(tree)):
        below = tree.children[node]
        targets = [tree.target[c] for c in below]
        if len(below) >= 2:
            assert sum(targets) == pytest.approx(1.0)
            # log target - log prior is sigma(q) up to a constant
            scale = (50 + max(tree.visits[c] for c in below)) * 0.1
            shifts = [math.log(t / tree.prior[c]) - scale * tree.q(c) for t, c in zip(targets, below, strict=True)]
            assert max(shifts) - min(shifts) < 1e-6
        else:
            assert all(math.isnan(t) for t in targets)


def test_rollouts_value_nodes_by_how_their_completions_end() -> None:
    strategy = Mcts(simulations=6, commit="never")
    result = run_one(
        World(2, wins=0.3).engine(), ToyTask(), search(strategy, value=RolloutValue(n=2, temperature=1.0), budget=900)
    )
    result.tree.check()
    assert "rollout" in result.tree.kind
    assert result.tree.tokens + result.usage.discarded == result.usage.sampled


def test_without_values_a_constant_serves() -> None:
    engine = ScriptedEngine(World(1).script)
    result = run_one(engine, ToyTask(), search(Mcts(), value=ConstantValue(0.5)))
    assert result.error is None
    assert "no value head" in str(run_one(engine, ToyTask(), search(Mcts())).error)


@pytest.mark.parametrize(
    "bad",
    [
        {"commit": "always"},
        {"simulations": 0},
        {"leaves": 0},
        {"noise": 2.0},
        {"noise_alpha": -1.0},
        {"c_base": 0.0},
        {"c_init": -1.0},
        {"pick": "best"},
        {"expand": 0},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Mcts(**bad)  # type: ignore[arg-type]
