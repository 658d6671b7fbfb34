"""What the Countdown task promises: solvability, the split by number set, warm-up, vocabulary."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from mcts.tasks import TaskError, arithmetic, load_task, plays
from mcts.tasks.countdown import SPLITS, Countdown
from mcts.tasks.numbers import UNWRITTEN, Int64, NumberTable
from mcts.tasks.plays import Float64, chances, count_plays, random_plays, sample_plays
from mcts.tasks.warmup import columns
from mcts.types import Problem, Status


@pytest.fixture(scope="module")
def task() -> Countdown:
    return Countdown()


def naive_plays(numbers: tuple[int, ...], max_value: int) -> Iterator[tuple[int, float]]:
    """(number reached, chance under random play) of every legal play, the slow and obvious way."""
    if len(numbers) == 1:
        yield numbers[0], 1.0
        return
    found = []
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        results = [a + b, a * b]
        if a > b:
            results.append(a - b)
        if a % b == 0:
            results.append(a // b)
        found += [(*rest, made) for made in results if made <= max_value]
    for state in found:
        for reached, chance in naive_plays(state, max_value):
            yield reached, chance / len(found)


@pytest.mark.parametrize(("count", "max_value"), [(3, 999), (3, 40), (4, 999), (4, 60)])
def test_enumeration_equals_naive_brute_force(count: int, max_value: int) -> None:
    task = Countdown(
        numbers=count, high=12, max_value=max_value, target_low=5, target_high=39, heldout_sets=8, dev_sets=4
    )
    sets = task.number_sets("train")[:25]
    reach = count_plays(task.table, task.table.index(sets), 5, 39)
    assert reach.plays is not None
    for row, numbers in enumerate(sets.tolist()):
        wins: Counter[int] = Counter()
        share: Counter[int] = Counter()
        for reached, chance in naive_plays(tuple(numbers), max_value):
            wins[reached] += 1
            share[reached] += chance  # type: ignore[assignment]
        assert reach.plays[row].tolist() == [wins[t] for t in range(5, 40)]
        np.testing.assert_allclose(reach.share[row], [share[t] for t in range(5, 40)], atol=1e-12)


def test_problems_are_all_solvable_targets_of_the_training_sets(task: Countdown) -> None:
    problems = task.problems("train")
    assert len({p.id for p in problems}) == len(problems)
    found = {(*sorted(p.meta["numbers"]), p.meta["target"]) for p in problems}
    for numbers in task.number_sets("train")[:100].tolist():
        reachable = {t for t, _ in naive_plays(tuple(numbers), 999) if 10 <= t <= 99}
        assert {key[-1] for key in found if key[:-1] == tuple(numbers)} == reachable
    # every multiset of three numbers from 20 is in one split
    assert sum(len(task.number_sets(split)) for split in SPLITS) == math.comb(22, 3) == 1540
    assert len(task.number_sets("heldout")) == 256


def test_larger_numbers_may_be_trained_on_and_leave_what_is_held_out_as_it_is(task: Countdown) -> None:
    wider = Countdown(train_high=26, train_sets=3000)
    for split in ("dev", "heldout"):
        assert wider.problems(split) == task.problems(split)
    sets = {tuple(row) for row in wider.number_sets("train").tolist()}
    assert {row for row in sets if row[-1] <= 20} == {tuple(row) for row in task.number_sets("train").tolist()}
    assert len({row for row in sets if row[-1] > 20}) == math.comb(28, 3) - math.comb(22, 3)
    highest = max(max(p.meta["numbers"]) for p in wider.problems("train"))
    assert highest == max(max(e.problem.meta["numbers"]) for e in itertools.islice(wider.warmup(0), 2000)) == 26


def test_shares_are_the_frequencies_of_random_play(task: Countdown) -> None:
    sets = task.table.index(task.number_sets("train")[:3])
    exact = count_plays(task.table, sets, 10, 99).share
    drawn = sample_plays(task.table, sets, 10, 99, plays=4000, seed=1).share
    error = np.sqrt(exact * (1 - exact) / 4000)
    # 270 cells, 5 standard errors: a false alarm in about 1 of 5,000 seeds
    assert (np.abs(drawn - exact) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize(
    ("settings", "sets"),
    [
        ({}, None),
        ({"numbers": 4}, 300),
        ({"numbers": 5, "max_value": 199}, 100),
        ({"low": 20, "high": 60, "max_value": 99}, 2000),  # most sums and products are above the limit
    ],
)
def test_chances_are_the_shares_of_the_plain_count(
    settings: dict[str, int], sets: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Countdown(**settings)  # type: ignore[arg-type]
    rows = np.random.default_rng(0).permuted(task.table.index(task.training_sets()[:sets]), axis=1)
    rows = np.concatenate([rows, rows[:5]])  # the same set twice
    plain = count_plays(task.table, rows, 10, 99).share
    found = chances(task.table, rows, 10, 99)
    np.testing.assert_array_equal(found > 0, plain > 0)
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    monkeypatch.setattr(plays, "SETS", 37)
    monkeypatch.setattr(plays, "SUMMED", 3)
    np.testing.assert_array_equal(chances(task.table, rows, 10, 99), found)


def test_balanced_warm_up_counts_once_and_stays_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(table: NumberTable, numbers: Int64, low: int, high: int) -> Float64:
        asked.append(len(numbers))
        return chances(table, numbers, low, high)

    monkeypatch.setattr(arithmetic, "chances", counted)
    task = Countdown(balanced=True)
    first = list(itertools.islice(task.warmup(3), 2000))
    assert asked == [1220]
    list(itertools.islice(task.warmup(4), 10))
    assert list(itertools.islice(task.warmup(3), 2000)) == first
    assert asked == [1220]
    assert list(itertools.islice(Countdown(balanced=True).warmup(3), 2000)) == first
    next(Countdown().warmup(3))
    assert asked == [1220, 1220]


@pytest.mark.parametrize("settings", [{}, {"balanced": True, "negatives": 2}, {"numbers": 4, "train_sets": 100}])
def test_exact_values_say_what_can_still_be_reached(settings: dict[str, int]) -> None:
    exact = Countdown(**settings, exact_values=True)  # type: ignore[arg-type]
    plain = Countdown(**settings)  # type: ignore[arg-type]
    saved = 0
    for example, other in itertools.islice(zip(exact.warmup(1), plain.warmup(1), strict=True), 600):
        assert (example.problem, example.steps, example.imitate) == (other.problem, other.steps, other.imitate)
        reachable = [exact.winning_share(example.problem, example.steps[:k]) > 0.0 for k in range(exact.count)]
        assert example.values == tuple(map(float, reachable))
        saved += example.values != other.values
    assert saved > 20  # a random target is not always out of reach


@pytest.mark.parametrize("settings", [{}, {"numbers": 4, "train_sets": 100}, {"numbers": 6, "train_sets": 8}])
def test_no_set_is_in_two_splits_in_any_order_or_under_any_target(settings: dict[str, int]) -> None:
    task = Countdown(**settings, heldout_sets=32, dev_sets=16)  # type: ignore[arg-type]
    sets = {split: {tuple(row) for row in task.number_sets(split).tolist()} for split in SPLITS}
    assert all(tuple(sorted(row)) == row for rows in sets.values() for row in rows)
    for a, b in itertools.combinations(SPLITS, 2):
        assert not sets[a] & sets[b]
    seen: set[str] = set()
    for split in SPLITS:
        problems = task.problems(split)
        assert problems
        for problem in problems:
            assert tuple(sorted(problem.meta["numbers"])) in sets[split]
            assert problem.prompt == f"{' '.join(map(str, problem.meta['numbers']))} -> {problem.meta['target']} :"
            assert problem.id not in seen
            seen.add(problem.id)


@pytest.mark.parametrize("numbers", [3, 4])
def test_held_out_sets_never_warm_up(numbers: int) -> None:
    task = Countdown(numbers=numbers)
    aside = {tuple(row) for split in ("dev", "heldout") for row in task.number_sets(split).tolist()}
    assert len(aside) == 320
    for example in itertools.islice(task.warmup(7), 20_000):
        assert tuple(sorted(example.problem.meta["numbers"])) not in aside


@pytest.mark.parametrize("settings", [{}, {"numbers": 5}, {"negatives": 3}, {"negatives": 0}, {"larger_first": False}])
def test_warm_up_is_legal_play_labelled_by_what_it_reached(settings: dict[str, int]) -> None:
    task = Countdown(**settings)  # type: ignore[arg-type]
    per_play = 1 + settings.get("negatives", 1)
    smaller_first = 0
    for k, example in enumerate(itertools.islice(task.warmup(3), 1000)):
        problem, steps = example.problem, list(example.steps)
        assert 10 <= problem.meta["target"] <= 99
        for n in range(len(steps)):
            assert task.check_step(problem, steps[: n + 1]) is None
        answer = task.answer(problem, steps)
        assert answer is not None
        assert task.check(problem, answer).status is (Status.CORRECT if example.imitate else Status.WRONG)
        assert example.imitate == (k % per_play == 0)
        assert example.values == ((1.0,) if example.imitate else (0.0,)) * task.count
        assert len(steps) == task.max_steps
        assert max(len(step.split()) for step in steps) <= task.max_step_tokens
        assert example.finished
        first, _, second = steps[0].split()[:3]
        smaller_first += int(first) < int(second)
    assert (smaller_first > 0) == (settings.get("larger_first") is False)


def test_negative_targets_are_uniform_over_the_others() -> None:
    task = Countdown(target_low=10, target_high=19, negatives=1)
    pairs: Counter[tuple[int, int]] = Counter()
    won = 0
    for example in itertools.islice(task.warmup(0), 40_000):
        target = example.problem.meta["target"]
        if example.imitate:
            won = target
        else:
            pairs[won, target] += 1
    assert all(a != b for a, b in pairs)
    for reached in range(10, 20):
        counts = np.array([pairs[reached, other] for other in range(10, 20) if other != reached])
        expected = counts.sum() / 9
        # chi-square with 8 degrees of freedom exceeds 35 once in 37,000 draws
        assert ((counts - expected) ** 2 / expected).sum() < 35


def test_the_stream_is_a_function_of_the_seed_whatever_the_batch(task: Countdown) -> None:
    a = list(itertools.islice(task.warmup(5), 3000))
    assert a == list(itertools.islice(task.warmup(5), 3000))
    assert a != list(itertools.islice(task.warmup(6), 3000))
    small = np.concatenate([b.words for b in itertools.islice(task.warmup_batches(5, plays=7), 100)])
    large = np.concatenate([b.words for b in itertools.islice(task.warmup_batches(5, plays=700), 1)])
    np.testing.assert_array_equal(small, large)


def test_batches_hold_the_same_examples_as_the_iterator(task: Countdown) -> None:
    words = task.vocabulary()
    batch = next(task.warmup_batches(5))
    assert batch.words.dtype == np.int32
    assert (batch.words.shape[1], batch.ends.tolist()) == (columns(3)[0], [5, 14, 19])
    for row, values, imitate, example in zip(batch.words, batch.values, batch.imitate, task.warmup(5), strict=False):
        text = " ".join(words[k] for k in row)
        assert text == " ".join([str(example.problem.prompt), *example.steps])
        assert tuple(values.tolist()) == example.values
        assert imitate == example.imitate


def test_random_play_never_meets_an_unwritten_number_on_the_way() -> None:
    task = Countdown(numbers=4)
    numbers = task.table.index(task.training_sets()[:3000])
    plays = random_plays(task.table, numbers, np.random.default_rng(0))
    assert len(plays.numbers) == 3000
    assert all((states >= 0).all() for states in plays.after[:-1])
    assert (plays.reached >= 0).any()
    assert (plays.reached == UNWRITTEN).any()


@pytest.mark.parametrize("numbers", [3, 4])
def test_the_vocabulary_covers_every_prompt_and_every_winning_play(numbers: int) -> None:
    task = Countdown(numbers=numbers, train_problems=100, heldout_problems=100, train_sets=100)
    words = task.vocabulary()
    assert len(set(words)) == len(words) <= (200 if numbers == 3 else 700)
    assert all(word.split() == [word] for word in words)
    for problem in [*task.problems("train"), *task.problems("heldout"), *task.problems("dev")]:
        solution = task.solve(problem)
        assert solution is not None
        text = " ".join([str(problem.prompt), *solution])
        assert set(text.split()) <= set(words)
        answer = task.answer(problem, solution)
        assert answer is not None
        assert task.verify(problem, answer).won
        assert task.split_steps(" ".join(solution)) == list(solution)


def test_solutions_and_share_tell_the_truth_about_a_known_problem(task: Countdown) -> None:
    """5 5 5 -> 20 is (5 * 5) - 5 alone: three pairs to multiply."""
    problem = task.read("5 5 5 -> 20 :")
    assert task.winning_share(problem, []) == pytest.approx(3 * (1 / 9) * (1 / 4))
    assert task.winning_share(problem, ["5 * 5 = 25 | 5 25 ;"]) == pytest.approx(1 / 4)
    assert task.winning_share(problem, ["5 + 5 = 10 | 5 10 ;"]) == 0.0
    assert task.winning_share(problem, ["5 * 5 = 25 | 5 25 ;", "25 - 5 = 20"]) == 1.0
    assert task.solve(problem) == ("5 * 5 = 25 | 5 25 ;", "25 - 5 = 20")
    assert task.solve(task.read("1 1 1 -> 99")) is None


def test_meta_agrees_with_the_oracle(task: Countdown) -> None:
    for problem in task.problems("heldout")[:50]:
        assert problem.meta["share"] == pytest.approx(task.winning_share(problem, []), abs=1e-8)
        assert problem.meta["solutions"] > 0


def test_a_limit_gives_a_prefix_and_seeds_give_other_splits(task: Countdown) -> None:
    assert Countdown(train_problems=50).problems("train") == task.problems("train")[:50]
    assert len(task.problems("heldout")) == 500
    assert Countdown(seed=1).problems("heldout") != task.problems("heldout")


def test_the_oldest_steps_are_not_judged_again_but_the_last_is(task: Countdown) -> None:
    problem = task.read("3 7 12 -> 33 :")
    assert task.check_step(problem, ["7 * 3 = 21 | 12 21 ;", "21 + 12 = 33"]) is None
    for bad in ("7 + 12 = 19", "21 + 12 = 34", "21 + 12 = 33 ;"):
        assert task.check_step(problem, ["7 * 3 = 21 | 12 21 ;", bad]) is not None
    assert task.check_step(problem, ["7 * 3 = 21 | 12 21 ;", "21 + 12 = 33", "33 + 33 = 66"]) is not None
    assert task.check_step(problem, ["what", "21 + 12 = 33"]) is not None
    assert task.answer(problem, ["7 * 3 = 21 | 12 21 ;"]) is None


def test_a_problem_of_the_users_own_needs_no_meta(task: Countdown) -> None:
    problem = Problem(id="mine", prompt="3 7 12 -> 33 :")
    assert task.check_step(problem, ["7 * 3 = 21 | 12 21 ;"]) is None
    assert task.check(problem, "7 * 3 + 12").won
    with pytest.raises(TaskError, match="3 whole numbers, an arrow and a target"):
        task.check(Problem(id="bad", prompt="what is 6 x 7?"), "42")
    with pytest.raises(TaskError, match="plain text"):
        task.check(Problem(id="bad", prompt=({"role": "user", "content": "hi"},)), "42")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 7 -> 33",
        "3 7 12 33",
        "3 7 12 -> x",
        "3 7 12 4 -> 33",
        "3 7 21 -> 33",
        "3 7 12 -> 100",
        "3 7 0 -> 33",
        "3 7 1/2 -> 33",
        "3 7 12 -> 33 : 1",
        "3 7 12 : 33",
        "<eos> 3 7 -> 33",
    ],
)
def test_read_refuses_what_the_vocabulary_cannot_say(task: Countdown, text: str) -> None:
    with pytest.raises(TaskError):
        task.read(text)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"train_high": 19}, "train_high must be a whole number from 20"),
        ({"balanced": "maybe"}, "balanced must be true or false, not 'maybe'"),
        ({"exact_values": 1}, "exact_values must be true or false, not 1"),
        ({"numbers": 2}, "numbers must be a whole number from 3 to 6, not 2"),
        ({"numbers": "3"}, "numbers must be"),
        ({"numbers": True}, "numbers must be"),
        ({"low": 0}, "low must be"),
        ({"high": 10, "max_value": 9}, "max_value must be"),
        ({"target_high": 10}, "target_high must be"),
        ({"heldout_sets": 1500}, "set aside 1564 of only 1540"),
        ({"train_problems": 0}, "train_problems must be"),
        ({"numbers": 5, "high": 100, "max_value": 5000}, "lower max_value"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(settings: dict[str, object], match: str) -> None:
    with pytest.raises(TaskError, match=match) as refusal:
        load_task("countdown", **settings)
    assert "\n" not in str(refusal.value)


def test_targets_that_play_cannot_reach_end_the_stream_with_an_error() -> None:
    task = Countdown(high=2, target_low=90, target_high=99, heldout_sets=1, dev_sets=1)
    with pytest.raises(TaskError, match="does not reach the targets 90 to 99"):
        next(task.warmup(0))


def test_a_varied_problem_is_the_same_problem_with_its_numbers_in_another_order() -> None:
    task = load_task("countdown", numbers=4, heldout_sets=10, dev_sets=10, train_sets=20)
    problem = task.problems("train")[0]
    varied = [task.vary(problem, seed) for seed in range(30)]
    assert len({v.prompt for v in varied}) > 5
    assert {v.id for v in varied} == {problem.id}
    assert {tuple(sorted(v.meta["numbers"])) for v in varied} == {tuple(sorted(problem.meta["numbers"]))}
    assert task.vary(problem, 3) == task.vary(problem, 3)
    assert task.read(varied[0].prompt).meta["target"] == problem.meta["target"]
