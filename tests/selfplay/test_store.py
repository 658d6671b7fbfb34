"""Every write of a run goes through its store, whole or not at all, and only while its epoch lasts."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfplay import store_disk
from selfplay.config import parse_config
from selfplay.heartbeat import BEAT_SECONDS, refuse_living
from selfplay.run_folder import RunFolder
from selfplay.s3 import Bucket
from selfplay.shards import ShardError, iter_rows, write_pending
from selfplay.store import (
    Fenced,
    Place,
    RunError,
    Store,
    answer,
    ask,
    check_answer,
    guard,
    is_remote,
    local_copy,
    open_home,
)
from selfplay.store_disk import epoch_folder
from tests.selfplay.trace_samples import METADATA, rows_of

CONFIG = parse_config("task: {name: countdown}\nplay: {search: {strategy: {name: mcts}, budget: 64}}")
FINAL = "traces/iteration=00001/part-00000.arrow"


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "disk" else str(request.getfixturevalue("s3_url"))


def new_store(url: str) -> Store:
    home = open_home(url, create=True)
    store = home.create({"id": uuid.uuid4().hex, "epoch": 1}, {"config.yaml": CONFIG.to_yaml()})
    home.release()
    return store


def taken_over(url: str) -> Store:
    home = open_home(url, create=False)
    try:
        return home.take_over(json.loads(home.read("run.json") or ""))
    finally:
        home.release()


def played(store: Store, n: int = 2, group: str | None = None) -> str:
    scratch = store.scratch("part-00000.arrow")
    return finished(store, scratch, n, group)


def finished(store: Store, scratch: Path, n: int = 2, group: str | None = None) -> str:
    with guard(store):
        write_pending(scratch, rows_of(n, group=group), METADATA, make_folder=False)
    return store.offer(scratch)


def built(store: Store, text: str = "{}") -> Path:
    folder = store.workshop("00001")
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "model.bin").write_text(text)
    (folder / "state.json").write_text(text)
    return folder


def test_a_place_opens_the_same_run_in_another_process(url: str) -> None:
    driver = new_store(url)
    worker = Place(*json.loads(json.dumps([driver.place.url, driver.place.run_id, driver.place.epoch]))).open()
    assert driver.commit(played(worker), FINAL)
    assert len(list(iter_rows(driver.root / FINAL))) == 2


def test_a_unit_played_twice_is_committed_once_and_nothing_stays_pending(url: str) -> None:
    store = new_store(url)
    first, second = played(store, group="a"), played(store, group="b")
    assert store.commit(first, FINAL)
    assert not store.commit(second, FINAL)
    assert not store.commit(second, FINAL)  # also when its pending file is gone
    assert [row["group"] for row in iter_rows(store.pull(FINAL))] == ["a", "a"]
    with pytest.raises(ShardError, match="cannot read"):
        store.commit(second, "traces/iteration=00001/part-00001.arrow")


def test_a_folder_is_published_whole_and_replaces_its_elder(url: str) -> None:
    store = new_store(url)
    for text in ('{"try": 1}', '{"try": 2}'):
        folder = built(store, text)
        final = store.publish(folder, "checkpoints/00001")
        assert not folder.exists()
        assert final == store.root / "checkpoints" / "00001"
        assert (final / "policy" / "model.bin").read_text() == text
    store.remove("checkpoints/00001")
    store.remove("checkpoints/00001")
    assert not store.pull("checkpoints/00001").exists()


def test_a_document_is_replaced_as_a_whole(url: str) -> None:
    store = new_store(url)
    store.put("metrics.jsonl", "1\n")
    store.put("metrics.jsonl", b"2\n", sync=False)
    assert store.pull("metrics.jsonl").read_text() == "2\n"


def writes(store: Store) -> dict[str, object]:
    """Each way to write, prepared while the epoch lasts; called after it."""
    pending, folder, scratch = played(store), built(store), store.scratch("part-00000.arrow")
    return {
        "commit": lambda: store.commit(pending, FINAL),
        "commit of what the next driver committed": lambda: store.commit(pending, "traces/iteration=00002/x.arrow"),
        "publish": lambda: store.publish(folder, "checkpoints/00001"),
        "put": lambda: store.put("metrics.jsonl", "stale"),
        "beat": lambda: store.put("heartbeat.json", "stale", sync=False),
        "remove": lambda: store.remove("config.yaml"),
        "remove what is gone": lambda: store.remove("nothing"),
        "finish a shard": lambda: finished(store, scratch),
        "begin a shard": lambda: played(store),
        "check": store.check,
    }


def snapshot(url: str) -> dict[str, bytes]:
    """All of the run but what is pending, as the storage has it."""
    if not is_remote(url):
        files = (p for p in Path(url).rglob("*") if p.is_file() and "pending" not in p.parts)
        return {p.relative_to(url).as_posix(): p.read_bytes() for p in files}
    bucket = Bucket(url)
    names = [found.key for found in bucket.list("") if not found.key.startswith("pending/")]
    return {name: (bucket.get(name) or (b"",))[0] for name in names}


def test_a_stale_driver_and_its_workers_can_change_nothing(url: str) -> None:
    stale = new_store(url)
    late = writes(stale)
    new = taken_over(url)
    new.commit(played(new), "traces/iteration=00002/x.arrow")
    before = snapshot(url)
    for name, write in late.items():
        with pytest.raises(Fenced, match=r"was taken over by another driver \(epoch 2\); this one \(epoch 1\) stops"):
            write()  # type: ignore[operator]
        assert snapshot(url) == before, name
    stale.close()  # and it leaves the new driver's pending files alone
    assert new.commit(played(new), FINAL)


def test_a_worker_that_outlives_its_driver_is_told_so(url: str) -> None:
    driver = new_store(url)
    worker = driver.place.open()
    driver.close()
    with pytest.raises(Fenced, match=r"the driver of .* that began epoch 1 has ended"):
        worker.put("metrics.jsonl", "stale")


def test_a_library_that_makes_missing_folders_does_not_bring_a_fenced_epoch_back(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    stale = new_store(url)
    folder = built(stale)
    taken_over(url)
    folder.mkdir(parents=True, exist_ok=True)  # what save_pretrained does
    (folder / "state.json").write_text("{}")
    assert not epoch_folder(Path(url), 1).exists()
    with pytest.raises(Fenced):
        stale.publish(folder, "checkpoints/00001")


def test_of_two_launches_into_one_folder_the_later_one_fences_the_earlier(tmp_path: Path) -> None:
    """They are on two hosts, and the first has not come as far as run.json; or it was killed there."""
    url = str(tmp_path / "run")
    earlier = new_store(url)
    (tmp_path / "run" / "run.json").unlink()
    later = new_store(url)
    assert can_write(later)
    with pytest.raises(RunError):
        earlier.put("run.json", "{}")
    assert json.loads(later.read("run.json") or "")["id"] == later.place.run_id


def test_a_node_that_does_not_see_the_run_says_so(url: str) -> None:
    store = Place(url + "-elsewhere", "abc", 1).open()
    with pytest.raises(RunError, match=r"does not see the run"):
        store.put("metrics.jsonl", "x")


def test_a_node_that_sees_another_run_there_says_so(url: str) -> None:
    """With the same epoch: a folder of its own that is mounted at the same path."""
    driver = new_store(url)
    driver.check()
    with pytest.raises(RunError, match="does not see the run"):
        replace(driver.place, run_id="another").open().check()


def test_each_node_proves_that_it_sees_the_run(url: str) -> None:
    driver = new_store(url)
    token = ask(driver)
    given = answer(driver.place.open(), "node-1")
    check_answer(driver, token, "node-1", given)
    for wrong in (replace(given, token="other"), replace(given, name="pending/nothing"), replace(given, token=None)):
        with pytest.raises(RunError, match="node node-1 does not see the run folder"):
            check_answer(driver, token, "node-1", wrong)
    with pytest.raises(RunError, match="does not see the run folder"):
        check_answer(driver, token, "node-2", given)


def steps_of(kind: str) -> list[tuple[Any, str]]:
    """Where the outside world may come in between."""
    if kind == "disk":
        return [(os, "mkdir"), (os, "rename"), (os, "replace"), (store_disk, "epochs"), (store_disk, "_read")]
    return [(Bucket, name) for name in ("put", "get", "etag", "list", "delete")]


def come_and_go(url: str, whose: str) -> list[Store]:
    """What the others do meanwhile; the store of the last one."""
    other = taken_over(url)
    if whose == "one that is closed again":
        other.close()
    if whose == "two":
        other = taken_over(url)
    return [other]


@pytest.mark.parametrize("whose", ["one", "one that is closed again", "two"])
def test_of_drivers_that_take_a_run_over_at_once_at_most_one_goes_on(
    whose: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do all of their work before the first, second, ... step of this one."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # they are on several hosts
    for step in itertools.count():
        here = f"{url}-{step}"
        new_store(here)
        steps, others = itertools.count(), list[Store]()

        def counted(
            real: Callable[..., Any], here: str = here, step: int = step, steps: Any = steps, others: Any = others
        ) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not others and next(steps) == step:
                    others.append(None)
                    others[:] = come_and_go(here, whose)
                return real(*args, **kwargs)

            return call

        mine: list[Store] = []
        with monkeypatch.context() as patch:
            for module, name in steps_of("s3" if is_remote(url) else "disk"):
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                mine.append(taken_over(here))
            except RunError as error:
                assert "another driver" in str(error)  # noqa: PT017 - which of them goes on is left to them
        able = [store for store in [*mine, *others] if can_write(store)]
        if whose != "one that is closed again":
            assert len(able) == 1
        assert len(able) <= 1
        for store in able:
            assert json.loads(store.read("run.json") or "")["epoch"] == store.place.epoch
        if not others:
            break
    assert step > 3


def can_write(store: Store) -> bool:
    try:
        store.put("metrics.jsonl", "x")
    except Fenced:
        return False
    return True


def test_a_driver_that_is_fenced_stops_at_its_next_sign_of_life(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # the other one is on another host
    run = RunFolder.create(url, CONFIG)
    taken_over(url)
    run._heartbeat._write("running")
    with pytest.raises(Fenced, match="taken over"):
        run.heartbeat(phase="play")
    before = snapshot(url)
    run.close("failed")
    assert snapshot(url) == before


def test_a_run_that_beats_on_another_host_is_not_taken_over(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).close()
    beats = itertools.count(5)
    waited: list[float] = []

    def heart(alive: bool, **facts: object) -> Callable[[str], str]:
        """Clocks disagree: this one is a year ahead."""
        found = {"host": "elsewhere", "pid": 7, "epoch": 1, "beat": 4, "state": "running", "time": 4e9, **facts}
        return lambda _: json.dumps({**found, **({"beat": next(beats)} if alive else {})})

    with pytest.raises(RunError, match="in use by process 7 on elsewhere, which still gives signs of life"):
        refuse_living(heart(True), "run", locked=True, wait=waited.append)
    assert len(waited) == 1
    refuse_living(heart(False), "run", locked=True, wait=waited.append)
    assert sum(waited[1:]) >= 3 * BEAT_SECONDS
    waited.clear()
    refuse_living(heart(True, state="ended"), "run", locked=True, wait=waited.append)
    refuse_living(heart(True, host=socket.gethostname()), "run", locked=True, wait=waited.append)
    refuse_living(lambda _: None, "run", locked=True, wait=waited.append)
    refuse_living(lambda _: "torn{", "run", locked=True, wait=waited.append)
    assert waited == []


def test_a_heartbeat_says_where_the_run_stands_and_how_it_ended(url: str) -> None:
    run = RunFolder.create(url, CONFIG)
    first = json.loads((run.path / "heartbeat.json").read_text())
    assert {k: first[k] for k in ("state", "epoch", "pid")} == {"state": "running", "epoch": 1, "pid": os.getpid()}
    run.heartbeat(phase="play", iteration=1, done=3, total=8, workers={"alive": 2, "wanted": 3})
    run.heartbeat(done=4, workers=None)
    run.close("interrupted")
    last = json.loads((local_copy(url, "heartbeat.json") / "heartbeat.json").read_text())
    assert last["beat"] > first["beat"]
    assert [last[k] for k in ("phase", "iteration", "done", "total", "state")] == ["play", 1, 4, 8, "interrupted"]
    assert "workers" not in last
