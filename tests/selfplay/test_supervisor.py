"""Leases: every unit is delivered exactly once, whatever happens to workers, and a problem that kills is found."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfplay.fleet import Alone, Cause, Evaluated, Record, unit_of
from selfplay.run_folder import RunError
from selfplay.supervisor import LOOKS, Complete, Supervisor
from selfplay.worker import EvaluationJob, Unit
from tests.selfplay.fake_fleet import FakeFleet, make_evaluation, make_unit


def run(supervisor: Supervisor, units: list[Unit], most: int = 5000) -> list[Complete]:
    """Submit and poll until all is delivered."""
    for unit in units:
        supervisor.submit(unit)
    found: list[Complete] = []
    for _ in range(most):
        found += [done for done in supervisor.poll(1.0) if isinstance(done, Complete)]
        if len(found) >= len(units) and not supervisor.outstanding:
            return found
    raise AssertionError(f"{len(units) - len(found)} units never came")


def problems_of(done: Complete) -> list[str]:
    return [problem.id for part in done.parts for problem in part.unit.problems]


def assert_each_once(found: list[Complete], units: list[Unit]) -> None:
    assert Counter(done.unit.name for done in found) == Counter(unit.name for unit in units)
    wanted = {unit.name: [problem.id for problem in unit.problems] for unit in units}
    for done in found:
        assert problems_of(done) == wanted[done.unit.name]


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
    versions = {w: {unit_of(o).policy_version for _, o in orders} for w, orders in fleet.living.items()}
    assert [w for w, held in versions.items() if held == {1}] == [40, 41]
    assert all(held == {0} for w, held in versions.items() if w < 40)


def test_a_lease_that_runs_out_goes_to_another_worker() -> None:
    fleet = FakeFleet(2)
    supervisor = fleet.supervisor(lease_seconds=50.0, silence_seconds=1e9)
    fleet.disturb = lambda: fleet.frozen.add(0) if fleet.now == 1.0 else None
    units = [make_unit(part) for part in range(4)]
    assert_each_once(run(supervisor, units), units)
    assert supervisor.counts.leases_lost == 2


@pytest.mark.parametrize("place", range(8))
def test_a_problem_that_kills_is_found_recorded_as_failed_and_all_others_are_played(place: int) -> None:
    units = [make_unit(part) for part in range(5)]
    deadly = units[2].problems[place].id
    fleet = FakeFleet(2, deadly=[deadly])
    supervisor = fleet.supervisor()
    found = run(supervisor, units)
    assert_each_once(found, units)
    recorded = [order for _, order in fleet.sent if isinstance(order, Record)]
    assert [problem.id for order in recorded for problem in order.unit.problems] == [deadly]
    assert "SIGSEGV" in recorded[0].reason
    assert supervisor.counts.failed_problems == 1
    alone = [unit_of(order).problems[0].id for _, order in fleet.sent if isinstance(order, Alone)]
    assert alone.count(deadly) == 2


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
            held = {unit_of(order).policy_version for _, order in orders}
            assert len(held) <= 1
            versions |= held
    assert versions == {0, 1}


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5), n_units=st.integers(1, 12), n_deadly=st.integers(0, 2))
def test_whatever_happens_each_unit_comes_once_and_only_what_kills_fails(
    seed: int, workers: int, n_units: int, n_deadly: int
) -> None:
    chance = random.Random(seed)
    units = [make_unit(part, problems=chance.randint(1, 9)) for part in range(n_units)]
    deadly = {chance.choice(chance.choice(units).problems).id for _ in range(n_deadly)}
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
    assert_each_once(run(supervisor, units, most=20000), units)
    recorded = {o.unit.problems[0].id for _, o in fleet.sent if isinstance(o, Record)}
    assert recorded == deadly
