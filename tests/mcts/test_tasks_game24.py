"""What the Game of 24 promises: the puzzle file, the split by rank, fractions, limits of numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mcts.tasks import TaskError, load_task
from mcts.tasks.game24 import Game24, read_puzzles
from mcts.tasks.plays import count_plays
from mcts.types import Status
from mcts.verify.exact import Rules

CSV = Path(__file__).parents[3] / "shared" / "data" / "game24" / "24.csv"


@pytest.fixture(scope="module")
def task() -> Game24:
    return Game24(extra_target_low=20, extra_target_high=30)


@pytest.fixture(scope="module")
def file_task() -> Game24:
    if not CSV.exists():
        pytest.skip("the public puzzle file is not here")
    return Game24(path=str(CSV))


def key(numbers: object) -> tuple[int, ...]:
    assert isinstance(numbers, list)
    return tuple(sorted(numbers))


def assert_set_aside(task: Game24, heldout: set[tuple[int, ...]]) -> None:
    """The held-out and dev sets occur nowhere in training: train, extra targets and warm-up."""
    assert {key(p.meta["numbers"]) for p in task.problems("heldout")} == heldout
    dev = {key(p.meta["numbers"]) for p in task.problems("dev")}
    assert len(heldout) == 100
    assert len(dev) == 64
    assert not dev & heldout
    aside = dev | heldout
    for problem in task.problems("train"):
        assert key(problem.meta["numbers"]) not in aside
    for example in itertools.islice(task.warmup(1), 20_000):
        assert key(example.problem.meta["numbers"]) not in aside


def test_enumerated_ranks_901_to_1000_never_train(task: Game24) -> None:
    heldout = list(task.problems("heldout"))
    assert [p.meta["rank"] for p in heldout] == list(range(901, 1001))
    assert_set_aside(task, {key(p.meta["numbers"]) for p in heldout})


def test_file_ranks_901_to_1000_never_train(file_task: Game24) -> None:
    rows = [line.split(",")[:2] for line in CSV.read_text(encoding="utf-8").splitlines()[1:]]
    heldout = {key([int(n) for n in puzzle.split()]) for rank, puzzle in rows if 901 <= int(rank) <= 1000}
    assert_set_aside(file_task, heldout)


def test_every_puzzle_of_the_public_file_stays_solvable_and_is_enumerated(file_task: Game24, task: Game24) -> None:
    puzzles = read_puzzles(CSV)
    assert len(puzzles) == 1362
    reach = count_plays(file_task.table, file_task.table.index(np.array(list(puzzles))), 24, 24)
    assert (reach.share > 0).all()
    assert set(puzzles) == set(task._ranks)
    assert len(file_task.vocabulary()) < 400


def test_larger_training_numbers_add_puzzles_and_leave_what_is_held_out_as_it_is(task: Game24) -> None:
    wide = Game24(train_high=15)
    assert wide.vocabulary() == task.vocabulary()
    for split in ("heldout", "dev"):
        assert list(wide.problems(split)) == list(task.problems(split))
    assert_set_aside(wide, {key(p.meta["numbers"]) for p in task.problems("heldout")})
    plain = {p.id for p in Game24().problems("train")}
    added = [p for p in wide.problems("train") if p.id not in plain]
    assert len(added) + len(plain) == len(wide.problems("train"))
    assert len(added) > 500
    for problem in added:
        assert 13 < max(problem.meta["numbers"]) <= 15
        assert problem.meta["target"] == 24
        assert wide.solve(problem) is not None
    warm = itertools.islice(wide.warmup(1), 2000)
    assert max(max(key(example.problem.meta["numbers"])) for example in warm) == 15
    assert wide.read("15 2 4 1 -> 24").meta["numbers"] == [15, 2, 4, 1]
    with pytest.raises(TaskError, match="number"):
        task.read("15 2 4 1 -> 24")


def naive_plays(numbers: tuple[Fraction, ...], rules: Rules) -> Iterator[tuple[Fraction, float]]:
    """(number reached, chance under random play) of every legal play, the slow and obvious way."""
    if len(numbers) == 1:
        yield numbers[0], 1.0
        return
    found = []
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        results = [a + b, a * b, a - b]
        if b > 0:
            results.append(a / b)
        if a > 0 and a != b:
            results.append(b / a)
        found += [(*rest, made) for made in results if not rules.objection(made.as_integer_ratio())]
    for state in found:
        for reached, chance in naive_plays(state, rules):
            yield reached, chance / len(found)


@pytest.mark.parametrize("numbers", [(3, 3, 8, 8), (1, 1, 1, 1), (2, 7, 11, 13)])
def test_enumeration_equals_naive_brute_force_on_fractions(task: Game24, numbers: tuple[int, ...]) -> None:
    reach = count_plays(task.table, task.table.index(np.array([numbers])), 1, 99)
    assert reach.plays is not None
    wins: Counter[Fraction] = Counter()
    share: dict[Fraction, float] = {}
    for reached, chance in naive_plays(tuple(map(Fraction, numbers)), task.rules):
        wins[reached] += 1
        share[reached] = share.get(reached, 0.0) + chance
    assert reach.plays[0].tolist() == [wins[Fraction(t)] for t in range(1, 100)]
    np.testing.assert_allclose(reach.share[0], [share.get(Fraction(t), 0.0) for t in range(1, 100)], atol=1e-12)


def test_enumerated_ranks_run_from_easy_to_hard(task: Game24) -> None:
    shares = [p.meta["share"] for p in task.problems("heldout")]
    assert shares == sorted(shares, reverse=True)
    assert min(p.meta["share"] for p in task.problems("heldout")) > 0


def test_the_puzzle_that_needs_fractions_is_solved_with_them(task: Game24) -> None:
    problem = task.read("3 3 8 8 -> 24")
    steps = task.solve(problem)
    assert steps == ("8 / 3 = 8/3 | 3 8 8/3 ;", "3 - 8/3 = 1/3 | 8 1/3 ;", "8 / 1/3 = 24")
    for k in range(3):
        assert task.check_step(problem, steps[: k + 1]) is None
    answer = task.answer(problem, steps)
    assert answer == "8 / (3 - (8 / 3))"
    assert task.verify(problem, answer).won
    assert task.winning_share(problem, steps[:2]) > 0


def test_an_answer_may_go_below_zero_but_a_step_may_not(task: Game24) -> None:
    problem = task.read("1 3 1 13 -> 24")
    assert task.check(problem, "(1 - 3) * (1 - 13)").won
    verdict = task.check_step(problem, ["1 - 3 = -2 | 1 13 -2 ;"])
    assert verdict is not None
    assert verdict.status is Status.WRONG


def test_solutions_are_legal_and_in_the_vocabulary(task: Game24) -> None:
    words = set(task.vocabulary())
    for problem in [*task.problems("heldout")[::2], *task.problems("train")[:50]]:
        steps = task.solve(problem)
        assert steps is not None
        assert set(" ".join([str(problem.prompt), *steps]).split()) <= words
        for k in range(len(steps)):
            assert task.check_step(problem, steps[: k + 1]) is None
        answer = task.answer(problem, steps)
        assert answer is not None
        assert task.check(problem, answer).won
        assert task.check_step(problem, [steps[0], steps[0]]) is not None


def test_extra_targets_add_reachable_problems_to_training_only(task: Game24) -> None:
    train = task.problems("train")
    targets = Counter(p.meta["target"] for p in train)
    assert set(targets) == set(range(20, 31))
    assert targets[24] == 1362 - 100 - 64
    assert {p.meta["target"] for p in [*task.problems("dev"), *task.problems("heldout")]} == {24}
    ids = [p.id for split in ("train", "dev", "heldout") for p in task.problems(split)]
    assert len(set(ids)) == len(ids)
    assert all(p.meta["solutions"] > 0 for p in train)


def test_warm_up_examples_are_right_under_their_target(task: Game24) -> None:
    fractions = 0
    for example in itertools.islice(task.warmup(2), 2000):
        problem, steps = example.problem, example.steps
        for k in range(3):
            assert task.check_step(problem, steps[: k + 1]) is None
        answer = task.answer(problem, steps)
        assert answer is not None
        assert task.check(problem, answer).won == example.imitate
        assert 1 <= problem.meta["target"] <= 99
        fractions += any("/" in word and word != "/" for word in " ".join(steps).split())
    assert fractions > 100


def test_warm_up_can_favour_the_target_without_giving_the_label_away() -> None:
    task = Game24(warmup_share=0.25)
    seen = Counter((e.problem.meta["target"] == 24, e.imitate) for e in itertools.islice(task.warmup(0), 20_000))
    for imitate in (True, False):
        share = seen[True, imitate] / (seen[True, imitate] + seen[False, imitate])
        assert 0.22 < share < 0.28
    plain = Counter(e.problem.meta["target"] == 24 for e in itertools.islice(Game24().warmup(0), 20_000))
    assert plain[True] / 20_000 < 0.1


def test_balanced_warm_up_sees_hard_puzzles_as_often_as_easy_ones() -> None:
    def rare_share(task: Game24) -> float:
        """Of the plays that end at 24, the share on the harder half of the training puzzles."""
        chance = {key(p.meta["numbers"]): p.meta["share"] for p in task.problems("train")}
        middle = float(np.median(list(chance.values())))
        wins = (e for e in itertools.islice(task.warmup(0), 16_000) if e.imitate and e.problem.meta["target"] == 24)
        hard = [chance[key(e.problem.meta["numbers"])] < middle for e in wins]
        assert len(hard) > 3000
        return float(np.mean(hard))

    assert rare_share(Game24(warmup_share=0.5)) < 0.25
    assert 0.4 < rare_share(Game24(warmup_share=0.5, balanced=True)) < 0.5


def test_exact_values_say_what_can_still_be_reached() -> None:
    task = Game24(warmup_share=0.5, balanced=True, exact_values=True)
    labels: Counter[tuple[bool, int]] = Counter()
    for example in itertools.islice(task.warmup(1), 300):
        reachable = [task.winning_share(example.problem, example.steps[:k]) > 0.0 for k in range(4)]
        assert example.values == tuple(map(float, reachable))
        labels[example.imitate, sum(reachable)] += 1
    assert labels[True, 4] == 150
    assert min(labels[False, k] for k in (0, 1, 2)) > 5


HEADER = "Rank,Puzzles,other\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "columns Rank and Puzzles"),
        ("Rang,Puzzles\n1,1 1 4 6\n", "columns Rank and Puzzles"),
        (HEADER, "has no puzzles"),
        (HEADER + "1,1 1 4 6,x\n2,1 1 4,x\n", "row 2 of .* four numbers from 1 to 13"),
        (HEADER + "1,1 1 4 14,x\n", "row 1 of .* four numbers"),
        (HEADER + "1,1 1 4 ４,x\n", "row 1 of .* four numbers"),
        (HEADER + "1,1 1 4 6,x\n2,6 4 1 1,x\n", "row 2 of .* no other row has"),
        (HEADER + "1,1 1 4 6,x\n1,1 1 4 7,x\n", "row 2 of .* Rank must be"),
        (HEADER + "one,1 1 4 6,x\n", "row 1 of .* Rank must be"),
        (HEADER + "2\n", "row 1 of .* four numbers"),
        (HEADER + '1,"1 1 4 6,x\n', "row 1 of .* no CSV"),
    ],
)
def test_a_bad_puzzle_file_is_refused_by_row(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=match) as refusal:
        load_task("game24", path=str(path))
    assert "\n" not in str(refusal.value)


def test_a_missing_or_binary_puzzle_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no puzzle file"):
        Game24(path=str(tmp_path / "none.csv")).problems("heldout")
    with pytest.raises(TaskError, match="must be the path of a file, not 7"):
        Game24(path=7)  # type: ignore[arg-type]
    (tmp_path / "binary.csv").write_bytes(b"Rank,Puzzles\n1,\xff\xfe\n")
    with pytest.raises(TaskError, match="cannot be read as text"):
        Game24(path=str(tmp_path / "binary.csv"))
    with pytest.raises(TaskError, match="cannot be read as text"):
        Game24(path=str(tmp_path))


def test_a_small_file_and_other_ranks_work(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(HEADER + "1,1 1 4 6,x\n2,1 1 11 11,x\n3,3 3 8 8,x\n4,1 1 1 1,x\n", encoding="utf-8")
    task = Game24(path=str(path), heldout_low=3, heldout_high=4, dev_sets=1)
    assert [p.meta["rank"] for p in task.problems("heldout")] == [3, 4]  # unsolvable ones stay: it is the test set
    assert len(task.problems("dev")) == len(task.problems("train")) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"heldout_low": 2000, "heldout_high": 2100}, "lower heldout_low"),
        ({"dev_sets": 1999}, "dev_sets would take all"),
        ({"warmup_share": 0.7}, "warmup_share must be from 0 to 0.5"),
        ({"warmup_share": "much"}, "warmup_share must be from 0 to 0.5"),
        ({"balanced": "maybe"}, "balanced must be true or false, not 'maybe'"),
        ({"extra_target_low": 5}, "extra_target_high must be"),
        ({"target": 150}, "target must be"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        load_task("game24", **settings)
