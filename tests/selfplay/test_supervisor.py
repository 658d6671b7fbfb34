"""Leases: every unit is delivered exactly once, whatever happens to workers, and a problem that kills is found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfplay.fleet import Alone, Cause, Evaluated, Record, Work, work_of
from selfplay.pieces import Complete
from selfplay.run_folder import RunError
from selfplay.supervisor import LOOKS, Supervisor
from selfplay.worker import EvaluationJob
from tests.selfplay.fake_fleet import FakeFleet, make_evaluation, make_unit


def run(supervisor: Supervisor, works: Sequence[Work], most: int = 5000) -> list[Complete | Evaluated]:
    """Submit and poll until all is delivered."""
    for work in works:
        supervisor.submit(work)
    found: list[Complete | Evaluated] = []
    for _ in range(most):
        found += supervisor.poll(1.0)
        if len(found) >= len(works) and not supervisor.outstanding:
            return found
    raise AssertionError(f"{len(works) - len(found)} pieces of work never came")


def of(done: Complete | Evaluated) -> Work:
    return done.unit if isinstance(done, Complete) else done.job


def problems_of(done: Complete | Evaluated) -> list[str]:
    if isinstance(done, Evaluated):
        return [answer.problem_id for answer in done.answers]
    return [problem.id for part in done.parts for problem in part.unit.problems]


def assert_each_once(found: list[Complete | Evaluated], works: Sequence[Work]) -> None:
    assert Counter(of(done).name for done in found) == Counter(work.name for work in works)
    wanted = {work.name: work for work in works}
    for done in found:
        assert problems_of(done) == [problem.id for problem in wanted[of(done).name].problems]
        if isinstance(done, Evaluated):
            assert done.job == wanted[done.job.name]


def given_up(found: list[Complete | Evaluated]) -> set[str]:
    answers = [answer for done in found if isinstance(done, Evaluated) for answer in done.answers]
    return {answer.problem_id for answer in answers if answer.given_up}


def test_undisturbed_workers_hold_two_units_and_lose_nothing() -> None:
    fleet = FakeFleet(3)
    units = [make_unit(part) for part in range(9)]
    supervisor = fleet.supervisor()
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.restarts == 0
    assert {worker for worker, _ in fleet.sent} == {0, 1, 2}


@pytest.mark.parametrize("cause", list(Cause))
def test_a_lost_workers_units_are_played_by_another(cause: Cause) -> None:
    fleet = FakeFleet(2)
    fleet.disturb = lambda: fleet.die(0, cause) if fleet.now == 3.0 else None
    units = [make_unit(part) for part in range(6)]
    supervisor = fleet.supervisor()
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.leases_lost == 2
    assert supervisor.counts.restarts == 1


def test_a_silent_worker_is_given_up_and_what_it_says_later_is_dropped() -> None:
    fleet = FakeFleet(2, seconds=4.0)
    supervisor = fleet.supervisor(silence_seconds=30.0)
    kill = fleet.kill
    orders = {}

    def freeze() -> None:
        if fleet.now == 3.0:
            fleet.frozen.add(0)
            orders.update(dict(fleet.living[0]))

    fleet.disturb = freeze
    fleet.kill = lambda worker: None if worker == 0 else kill(worker)  # type: ignore[method-assign]
    units = [make_unit(part) for part in range(4)]
    found = run(supervisor, units)
    assert_each_once(found, units)
    fleet.frozen.clear()  # it wakes up after another played its units
    for _ in range(80):
        assert supervisor.poll(1.0) == []
    assert supervisor.counts.late_results == 2
    assert len(supervisor.strays) == 2


def test_silence_is_noticed_soon_after_the_patience_is_over_and_not_before() -> None:
    fleet = FakeFleet(2, seconds=1e6)
    supervisor = fleet.supervisor(silence_seconds=30.0, lease_seconds=1e9)
    fleet.disturb = lambda: fleet.frozen.add(0) if fleet.now == 12.0 else None
    for part in range(2):
        supervisor.submit(make_unit(part))
    while not supervisor.counts.restarts:
        supervisor.poll(0.25)
    seen = 10.0  # its last beat
    assert seen + 30.0 < fleet.now <= seen + 30.0 + 30.0 / LOOKS + 0.25


def test_a_worker_without_room_or_with_another_version_gets_nothing_among_many() -> None:
    fleet = FakeFleet(40, seconds=1e6)
    supervisor = fleet.supervisor(silence_seconds=1e9, lease_seconds=1e9)
    for part in range(100):
        supervisor.submit(make_unit(part))
    supervisor.poll(1.0)
    supervisor.poll(1.0)
    assert Counter(worker for worker, _ in fleet.sent) == dict.fromkeys(range(40), 2)
    supervisor.version = 1
    for worker in (3, 7):
        fleet.die(worker, Cause.NODE)
    supervisor.poll(1.0)
    supervisor.poll(1.0)
    assert {len(orders) for orders in fleet.living.values()} == {2}
    versions = {w: {work_of(o).policy_version for _, o in orders} for w, orders in fleet.living.items()}
    assert [w for w, held in versions.items() if held == {1}] == [40, 41]
    assert all(held == {0} for w, held in versions.items() if w < 40)


def test_a_lease_that_runs_out_goes_to_another_worker() -> None:
    fleet = FakeFleet(2)
    supervisor = fleet.supervisor(lease_seconds=50.0, silence_seconds=1e9)
    fleet.disturb = lambda: fleet.frozen.add(0) if fleet.now == 1.0 else None
    units = [make_unit(part) for part in range(4)]
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.leases_lost == 2


KINDS = {"play": make_unit, "evaluation": lambda part: make_evaluation(f"heldout-{part}", problems=8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(8))
def test_a_problem_that_kills_is_found_recorded_as_failed_and_all_others_are_searched(place: int, kind: str) -> None:
    works: list[Work] = [KINDS[kind](part) for part in range(5)]
    deadly = works[2].problems[place].id
    fleet = FakeFleet(2, deadly=[deadly])
    said: list[str] = []
    supervisor = fleet.supervisor(note=said.append)
    found = run(supervisor, works)
    assert_each_once(found, works)
    assert given_up(found) == ({deadly} if kind == "evaluation" else set())
    assert f"problem {deadly} of {works[2].name} is recorded as failed: signal SIGSEGV" in said
    recorded = [order for _, order in fleet.sent if isinstance(order, Record)]
    assert [problem.id for order in recorded for problem in order.work.problems] == [deadly]
    assert "SIGSEGV" in recorded[0].reason
    assert supervisor.counts.failed_problems == 1
    alone = [work_of(order).problems[0].id for _, order in fleet.sent if isinstance(order, Alone)]
    assert alone.count(deadly) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_fails_by_deaths_that_it_brought_on_itself_and_by_no_others(kind: str) -> None:
    work = KINDS[kind](0)
    fleet = FakeFleet(2, deadly=[work.problems[5].id])
    fleet.strikes = 7
    supervisor = fleet.supervisor(deaths_alone=3)
    assert_each_once(run(supervisor, [work]), [work])
    alone = [work_of(order).problems[0] for _, order in fleet.sent if isinstance(order, Alone)]
    assert alone.count(work.problems[5]) == 7 + 3
    recorded = [order.reason for _, order in fleet.sent if isinstance(order, Record)]
    assert recorded == ["it ended its process 3 times when it was alone: signal SIGSEGV"]


def test_a_problem_that_one_evaluation_found_ends_no_worker_of_the_next_and_is_tried_again() -> None:
    deadly = ["dev-0", "dev-3", "dev-4"]
    fleet = FakeFleet(1, deadly=deadly)
    supervisor = fleet.supervisor(restarts=20)
    waits, first, last = (make_evaluation("dev", problems=6, version=version) for version in (0, 1, 2))
    run(supervisor, [first])
    lost = supervisor.counts.restarts
    assert lost
    fleet = FakeFleet(1, deadly=deadly)
    supervisor = fleet.supervisor(restarts=20)
    found = run(supervisor, [waits, first])
    assert_each_once(found, [waits, first])
    assert given_up(found) == set(deadly)
    fleet.deadly -= {"dev-3"}  # other weights take other steps
    found = run(supervisor, [last])
    assert_each_once(found, [last])
    assert given_up(found) == {"dev-0", "dev-4"}
    assert supervisor.counts.restarts == lost


def test_two_problems_that_kill_in_one_unit_are_both_found() -> None:
    unit = make_unit(0)
    fleet = FakeFleet(2, deadly=[unit.problems[1].id, unit.problems[6].id])
    supervisor = fleet.supervisor(restarts=20)
    assert_each_once(run(supervisor, [unit]), [unit])
    assert supervisor.counts.failed_problems == 2


def test_signals_from_outside_never_make_a_problem_fail() -> None:
    fleet = FakeFleet(3)
    chance = random.Random(1)
    fleet.disturb = lambda: (
        fleet.die(chance.choice(list(fleet.living))) if fleet.living and chance.random() < 0.15 else None
    )
    units = [make_unit(part, problems=4) for part in range(30)]
    supervisor = fleet.supervisor(restarts=1000)
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.restarts > 5
    assert supervisor.counts.failed_problems == 0


def test_workers_that_keep_dying_stop_the_run_with_one_sentence() -> None:
    fleet = FakeFleet(1)
    fleet.disturb = lambda: [fleet.die(worker) for worker in list(fleet.living)] and None
    with pytest.raises(RunError, match="restarts is used up"):
        run(fleet.supervisor(restarts=3), [make_unit(0)])
    assert fleet.started == 4


def test_each_finished_unit_gives_a_restart_back() -> None:
    fleet = FakeFleet(1)
    fleet.disturb = lambda: fleet.die(next(iter(fleet.living))) if fleet.now % 25 == 24.0 and fleet.living else None
    units = [make_unit(part) for part in range(20)]
    supervisor = fleet.supervisor(restarts=2)
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.restarts > 2


def test_workers_grow_and_shrink_with_the_cluster() -> None:
    fleet = FakeFleet(1)

    def change() -> None:
        if fleet.now == 10.0:
            fleet.size = 4
        if fleet.now == 30.0:
            fleet.size = 2
            for worker in list(fleet.living)[:2]:
                fleet.die(worker, Cause.NODE)

    fleet.disturb = change
    units = [make_unit(part) for part in range(20)]
    supervisor = fleet.supervisor(restarts=0)  # what a node takes with it costs no restart
    assert_each_once(run(supervisor, units), units)
    assert fleet.started == 4
    assert supervisor.alive == 2


def test_workers_too_many_for_the_cluster_go_once_they_hold_nothing() -> None:
    fleet = FakeFleet(4)
    fleet.disturb = lambda: setattr(fleet, "size", 2 if fleet.now >= 5.0 else 4)
    units = [make_unit(part) for part in range(20)]
    supervisor = fleet.supervisor(restarts=0)
    assert_each_once(run(supervisor, units), units)
    for _ in range(3):
        supervisor.poll(1.0)
    assert supervisor.alive == len(fleet.living) == 2
    assert supervisor.counts.leases_lost == 0


def test_an_evaluation_goes_first_and_has_its_worker_to_itself() -> None:
    fleet = FakeFleet(1)
    supervisor = fleet.supervisor()
    for part in range(3):
        supervisor.submit(make_unit(part))
    supervisor.poll(1.0)
    supervisor.poll(1.0)
    supervisor.submit(make_evaluation("a"))
    done: list[Complete | Evaluated] = []
    while supervisor.outstanding:
        done += supervisor.poll(1.0)
        for orders in fleet.living.values():
            kinds = [isinstance(order, EvaluationJob) for _, order in orders]
            assert len(kinds) == 1 or not any(kinds)
    assert [type(d) for d in done].index(Evaluated) == 2  # after the two units that were under way


def test_a_worker_never_holds_two_versions() -> None:
    fleet = FakeFleet(2)
    supervisor = fleet.supervisor()
    for part in range(8):
        supervisor.submit(make_unit(part))
    versions = set()
    while supervisor.outstanding:
        supervisor.poll(1.0)
        if fleet.now > 9.0:
            supervisor.version = 1
        for orders in fleet.living.values():
            held = {work_of(order).policy_version for _, order in orders}
            assert len(held) <= 1
            versions |= held
    assert versions == {0, 1}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5), n_units=st.integers(1, 12), n_deadly=st.integers(0, 2))
def test_whatever_happens_each_unit_comes_once_and_only_what_kills_fails(
    seed: int, workers: int, n_units: int, n_deadly: int
) -> None:
    chance = random.Random(seed)
    works: list[Work] = [make_unit(part, problems=chance.randint(1, 9)) for part in range(n_units)]
    works += [make_evaluation(f"dev-{part}", problems=chance.randint(1, 9)) for part in range(chance.randint(0, 4))]
    deadly = {chance.choice(chance.choice(works).problems).id for _ in range(n_deadly)}
    fleet = FakeFleet(workers, deadly=list(deadly))

    def disturb() -> None:
        if not fleet.living or chance.random() > 0.04:
            return
        worker = chance.choice(list(fleet.living))
        if chance.random() < 0.5:
            fleet.die(worker, chance.choice(list(Cause)))
        else:
            fleet.frozen.add(worker)

    fleet.disturb = disturb
    supervisor = fleet.supervisor(restarts=10**6)
    found = run(supervisor, works, most=20000)
    assert_each_once(found, works)
    recorded = {o.work.problems[0].id for _, o in fleet.sent if isinstance(o, Record)}
    assert recorded == deadly
    assert given_up(found) == {name for name in deadly if name.startswith("dev")}
