"""The pool of killable workers: every limit holds, no case sees another, and no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mcts.verify.pool import Limits, Pool, PoolError

MODULE = "tests.mcts.verify_cases"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(MODULE, workers=2, limits=Limits(cpu_seconds=0.3, wall_seconds=30.0, memory_bytes=1 << 29))
    yield pool
    pool.close()


def alive(pid: int) -> bool:
    """Is there a process `pid` that is not a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    """Return when the process is gone; fail if it never goes."""
    for _ in range(3000):
        if not alive(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives on")


def test_an_ordinary_case_is_judged(pool: Pool) -> None:
    reply = pool.judge({"do": "echo", "text": "π \ud800"})
    assert reply["end"] == "judged"
    assert reply["verdict"]["echo"] == "π \ud800"


@pytest.mark.parametrize("action", ["spin", "spin in C"])
def test_cpu_seconds_are_limited_even_inside_one_long_call(pool: Pool, action: str) -> None:
    reply = pool.judge({"do": action})
    assert reply["end"] == "cpu"
    assert 0.2 < reply["seconds"] < 2.5


@pytest.mark.parametrize("action", ["allocate", "swallow"])
def test_memory_is_limited_even_where_the_error_is_swallowed(action: str) -> None:
    pool = Pool(MODULE, 1, Limits(cpu_seconds=20.0, memory_bytes=1 << 28))
    assert pool.judge({"do": action})["end"] == "memory"
    pool.close()


def test_a_case_that_uses_no_cpu_meets_the_wall_clock() -> None:
    pool = Pool(MODULE, 1, Limits(wall_seconds=0.2))
    assert pool.judge({"do": "sleep"})["end"] == "wall"
    assert pool.judge({"do": "echo"})["end"] == "judged", "the worker is there for the next case"
    pool.close()


@pytest.mark.parametrize("action", ["die", "raise"])
def test_a_worker_that_dies_is_no_verdict(pool: Pool, action: str) -> None:
    assert pool.judge({"do": action})["end"] == "died"
    assert pool.judge({"do": "echo"})["end"] == "judged"


def test_a_nursery_that_dies_is_replaced(pool: Pool) -> None:
    pool.judge({"do": "echo"})
    for pid in pool.process_ids():
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    assert pool.judge({"do": "echo"})["end"] == "judged"


def test_what_a_judge_prints_does_not_come_between_the_frames(pool: Pool) -> None:
    assert pool.judge({"do": "print"})["end"] == "judged"


def test_every_case_gets_a_fresh_process(pool: Pool) -> None:
    looks = [pool.judge({"do": "look"})["verdict"] for _ in range(4)]
    assert {look["cases"] for look in looks} == {1}, "a case saw what an earlier one left"
    assert len({look["pid"] for look in looks}) == 4
    assert {look["threads"] for look in looks} == {1}


def test_workers_load_neither_torch_nor_ray(pool: Pool) -> None:
    assert not {"torch", "ray", "transformers", "pyarrow"} & set(pool.judge({"do": "look"})["verdict"]["modules"])


def test_many_threads_share_a_few_workers(pool: Pool) -> None:
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda text: pool.judge({"do": "echo", "text": text}), map(str, range(40))))
    assert [reply["verdict"]["echo"] for reply in replies] == [str(number) for number in range(40)]
    assert 1 <= len(pool.process_ids()) <= 2


def test_workers_survive_the_thread_that_started_them() -> None:
    pool = Pool(MODULE, 1, Limits())
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(pool.judge, {"do": "look"}).result()
    assert pool.judge({"do": "look"})["verdict"]["nursery"] == first["verdict"]["nursery"]
    pool.close()


def test_closing_ends_the_processes() -> None:
    pool = Pool(MODULE, 1, Limits())
    nursery = pool.judge({"do": "look"})["verdict"]["nursery"]
    pool.close()
    assert not alive(nursery)


def test_a_pool_that_is_forgotten_ends_its_processes() -> None:
    pool = Pool(MODULE, 1, Limits())
    nursery = pool.judge({"do": "look"})["verdict"]["nursery"]
    del pool
    wait_for_end(nursery)


def test_a_module_that_cannot_be_loaded_is_said() -> None:
    pool = Pool("tests.mcts.no_such_module", 1, Limits())
    with pytest.raises(PoolError, match="cannot start: ModuleNotFoundError"):
        pool.judge({})


@pytest.mark.parametrize("busy", [False, True])
def test_no_worker_outlives_a_parent_that_is_killed(busy: bool) -> None:
    code = f"""
        import sys, threading, time
        from mcts.verify.pool import Limits, Pool
        pool = Pool({MODULE!r}, 1, Limits(cpu_seconds=1000, wall_seconds=1000))
        print(pool.judge({{"do": "look"}})["verdict"]["nursery"], flush=True)
        if {busy}:
            threading.Thread(target=pool.judge, args=[{{"do": "spin"}}], daemon=True).start()
        time.sleep(1000)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    nursery = int(parent.stdout.readline())
    child = children_of(nursery, at_least=1) if busy else []
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for pid in [nursery, *child]:
        wait_for_end(pid)


def children_of(pid: int, at_least: int) -> list[int]:
    for _ in range(3000):
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
        if len(found) >= at_least:
            return found
        time.sleep(0.01)
    raise AssertionError("the worker started no child")


def test_a_case_in_flight_dies_with_its_nursery() -> None:
    """The kernel ends the child when the nursery is killed, as by a lack of memory."""
    slow = Pool(MODULE, 1, Limits(cpu_seconds=1000, wall_seconds=1000))
    nursery = slow.judge({"do": "look"})["verdict"]["nursery"]
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(slow._once, {"do": "spin"})
        (child,) = children_of(nursery, at_least=1)
        os.kill(nursery, signal.SIGKILL)
        assert asked.result()["end"] == "died"
    wait_for_end(child)
    slow.close()


def test_a_fork_of_the_owner_gets_workers_of_its_own(pool: Pool) -> None:
    before = pool.judge({"do": "look"})["verdict"]["nursery"]
    code = """
        import os
        from mcts.verify.pool import Limits, Pool
        pool = Pool("tests.mcts.verify_cases", 1, Limits())
        mine = pool.judge({"do": "look"})["verdict"]["nursery"]
        child = os.fork()
        if child == 0:
            other = pool.judge({"do": "look"})["verdict"]["nursery"]
            pool.close()
            os._exit(0 if other != mine else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.judge({"do": "look"})["verdict"]["nursery"] == mine
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)
    assert before
