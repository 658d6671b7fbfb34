"""The benchmark scripts run and say what they promise; their figures are not judged here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfplay.cluster.weights import Fetched, Weights
from selfplay.shards import list_shards, read_metadata

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    "engine throughput",
    "time outside model, MCTS",
    "tokens forwarded, MCTS",
    "time outside model, until-win sampler",
    "tokens forwarded, until-win sampler",
    "tree training, 3 numbers, first win",
    "tree training, 3 numbers, episodes",
    "tree training, 5 numbers, first win",
    "tree training, 5 numbers, episodes",
    "tree training, gsm8k's shape, 0.2M parameters",
    "traces committed, 1 worker",
    "traces committed, 2 workers",
    "driver, 1,000 simulated workers",
    "driver, 4 actors as 1,000",
    "broadcast of 1 MB to 2 nodes",
    "memory, driver",
    "memory, learner",
    "memory, worker 1",
    "memory, worker 2",
    "idle, 1 ahead, 1 worker, learner x 1 thread",
    "wins, 1 ahead, 1 worker, learner x 1 thread",
    "idle, 2 ahead, 1 worker, learner x 1 thread",
    "wins, 2 ahead, 1 worker, learner x 1 thread",
    "idle, 1 ahead, 2 workers, learner x 2 threads",
    "wins, 1 ahead, 2 workers, learner x 2 threads",
]


COMMANDS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and not path.name.startswith("trl_")
)
"""Scripts that a user calls, but for those that run in TRL's environment."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_starts_from_any_folder_without_settings(name: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


@pytest.mark.bench
def test_a_quick_benchmark_reports_every_row_with_a_finite_ratio_to_its_baseline(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ROWS
    for row in rows:
        if row["name"].startswith(("idle, ", "wins, ")):
            continue  # so few iterations may win nothing, and leave nothing idle
        assert math.isfinite(row["ratio"]), row["name"]
        assert row["ratio"] > 0, row["name"]
        assert row["ratio"] == pytest.approx(row["figure"] / row["baseline"])
        assert row["name"] in done.stdout
    by_name = {row["name"]: row for row in rows}
    for name in ("time outside model, MCTS", "time outside model, until-win sampler"):
        assert by_name[name]["ratio"] < 1
        assert by_name[name]["met"] == (by_name[name]["ratio"] <= 0.1)
        shares = by_name[name]["details"]["shares_outside_model"]
        assert max(shares, key=shares.get) == by_name[name]["details"]["largest"]
    for name in (name for name in ROWS if name.startswith("tree training")):
        assert by_name[name]["details"]["gradient_difference"] < 1e-4


@pytest.mark.bench
def test_a_driver_over_simulated_workers_commits_every_unit_and_says_what_each_part_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_driver  # type: ignore[import-not-found]
    from bench_subject import fresh  # type: ignore[import-not-found]

    subject = fresh(ROOT / "configs" / "countdown3.yaml", tmp_path / "model", 2)
    sample = bench_driver.played(subject, tmp_path / "sample")
    cost = bench_driver.simulated(subject, sample, tmp_path / "run", workers=10, seconds=60.0, rounds=3)
    shards = list_shards(tmp_path / "run")
    assert len(shards) == cost.units == 60
    assert sum(int(read_metadata(shard)["rows"]) for shard in shards) == cost.traces
    assert cost.seconds > 60 * 3  # of make-believe time: six rounds of a minute, two of them side by side at most
    assert sum(cost.parts.values()) == pytest.approx(cost.cpu, rel=0.05)
    assert cost.cores(1000, 60.0) == pytest.approx(cost.cpu / 60 * 1000 / 60)


def test_a_version_that_a_node_fetches_twice_or_not_at_all_fails_the_bench_of_handing_weights_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_broadcast import check  # type: ignore[import-not-found]

    weights = Weights(3, "run", 100, ())
    a, b, none = (Fetched(node, size, 0.1) for node, size in (("a", 100), ("b", 100), ("b", 0)))
    check([(a, "x"), (b, "x"), (none, "x")], weights, "x", ["a", "b"])
    for wrong in ([a, b, b], [a, none], [a, Fetched("b", 50, 0.1)]):
        with pytest.raises(AssertionError, match="once each"):
            check([(fetched, "x") for fetched in wrong], weights, "x", ["a", "b"])
    with pytest.raises(AssertionError, match="not loaded as it was saved"):
        check([(a, "x"), (b, "y")], weights, "x", ["a", "b"])


def test_idle_time_leaves_out_what_other_programs_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_overlap import Point, Way, _between  # type: ignore[import-not-found]

    rows = [{"iteration": i, "solved": 0.5, "problems": 40, "play_seconds": 1.0, "learn_seconds": 1.0} for i in (1, 2)]

    def idle(way: Way, wall: float, cpu: float, taken: float) -> float:
        found = _between(rows, {0: Point(0.0, 0.0, 0.0), 2: Point(wall, cpu, taken)}, way, 0, 2)
        assert found["wins_per_second"] == pytest.approx(40 / wall)
        return float(found["idle"])

    one_at_a_time, two_at_a_time, four_at_a_time = Way(0, 1, 1), Way(1, 1, 1), Way(1, 2, 2)
    assert idle(one_at_a_time, 10, 10, 0) == pytest.approx(10)  # one of two cores, always
    assert idle(one_at_a_time, 20, 10, 10) == pytest.approx(10)  # the same job, half of the time held up by others
    assert idle(two_at_a_time, 20, 20, 20) == pytest.approx(0)
    assert idle(four_at_a_time, 10, 20, 20) == pytest.approx(0)  # they waited for each other


def test_the_slope_of_memory_is_that_of_the_line_and_its_error_that_of_the_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_memory import slope  # type: ignore[import-not-found]

    x = np.arange(100.0)
    assert slope(x, 3 * x + 5) == pytest.approx((3.0, 0.0), abs=1e-9)
    rng = np.random.default_rng(0)
    found, error = slope(x, 3 * x + rng.normal(0, 10, 100))
    assert error == pytest.approx(10 / np.sqrt(((x - x.mean()) ** 2).sum()), rel=0.2)
    assert abs(found - 3) < 4 * error


def test_a_search_curve_cuts_every_search_off_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from search_curves import Outcomes  # type: ignore[import-not-found]

    found = Outcomes(np.array([[5.0, 10.0, 3.0]]), np.array([[1.0, 0.0, 1.0]]))
    curve = found.curve(10)
    assert curve.shape == (11, 2)
    for cap in range(11):
        assert curve[cap].tolist() == pytest.approx(found.at(cap))


def test_a_method_that_needs_half_the_tokens_for_the_same_wins_is_twice_as_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from search_curves import Outcomes, compare

    tokens = np.arange(10.0, 110.0, 2.0)[None]
    won = np.ones_like(tokens)
    figures = compare(Outcomes(tokens / 2, won), Outcomes(tokens, won), 200, 0)
    assert figures["ratio"] == pytest.approx(2.0)
    assert figures["low"] == pytest.approx(2.0)
    assert figures["high"] == pytest.approx(2.0)
    assert figures["tokens_ratio"] == pytest.approx(2.0)
    assert figures["wins_at_equal_tokens"] == pytest.approx(1.0)
    assert figures["wins_ratio"] > 1.0


def test_the_next_iteration_makes_up_for_what_the_last_ones_drew_too_much_or_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_objectives import FIRST_GUESS, problems_for  # type: ignore[import-not-found]

    warm: dict[str, float] = {"iteration": 0}
    first = {"iteration": 1, "sampled_tokens": 1_500, "problems": 30}
    assert problems_for([warm], 1_000, 10_000) == round(1_000 / FIRST_GUESS)
    assert problems_for([warm, first], 1_000, 10_000) == 10  # 500 tokens are left of 2,000, at 50 a problem
    assert problems_for([warm, {**first, "sampled_tokens": 300}], 1_000, 10_000) == 170
    assert problems_for([warm, {**first, "sampled_tokens": 300}], 1_000, 100) == 100
    assert problems_for([warm, {**first, "sampled_tokens": 9_000}], 1_000, 100) == 1


def test_an_override_of_a_part_is_one_line_of_yaml_that_the_config_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_objectives import alphazero, others, override

    from selfplay.config import load_config

    file = ROOT / "configs" / "countdown3.yaml"
    plain = load_config(file)
    combined = load_config(file, alphazero(plain, 0.3, 1.0).overrides)
    own = plain.learn.objective.settings
    assert combined.learn.objective.name == "alphazero"
    assert combined.learn.objective.settings == {"policy": 0.3, "nll": 1.0, **own}
    sampled = load_config(file, others()[1].overrides)
    assert sampled.play.search.strategy.settings == {"n": 0, "until_win": True}
    assert sampled.play.search.budget == plain.play.search.budget
    assert override("a", 1.5) == "a=1.5"


def test_the_value_is_measured_on_the_states_of_each_method_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that the sampler never visits are the search's own; unfinished ones only, labelled by the oracle."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_search import Bench  # type: ignore[import-not-found]

    from mcts.engines.scripted import ScriptedEngine
    from mcts.tasks.countdown import Countdown
    from selfplay.config import Part, SearchConfig

    task = Countdown(heldout_problems=1)
    problem = task.read("2 3 4 -> 24")
    steps = {"3 * 2 = 6 | 4 6 ;": 0.7, "4 + 3 = 7 | 2 7 ;": 0.3}  # 6 * 4 wins, 7 and 2 cannot
    bench = object.__new__(Bench)
    bench.engine = ScriptedEngine(
        lambda _, path: steps if not path else {"6 + 4 = 10": 1.0},
        lambda _, path: 0.8 if path[:1] == ("3 * 2 = 6 | 4 6 ;",) else 0.2,
    )
    bench.task = bench.oracle = task
    bench.open_searches = 4

    def measured(settings: dict[str, object]) -> list[dict[str, float]]:
        search = SearchConfig(strategy=Part.model_validate(settings), budget=400)
        rows: list[dict[str, float]] = bench.value_auc(search, [problem], 0, 100)
        return rows

    (whole,) = measured({"name": "gumbel", "commit": "never", "m": 2, "simulations": 1})
    assert (whole["depth"], whole["states"], whole["solvable"], whole["auc"]) == (1, 2, 0.5, 1.0)
    (one,) = measured({"name": "best_of_n", "n": 1})
    assert one["states"] == 1
    assert math.isnan(one["auc"])
