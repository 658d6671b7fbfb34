"""A launch that was killed, or that another one overtook, before there was a run: it is launched again with the same
command, and what was there before it is left alone."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from selfplay import cli, store_disk
from selfplay.mirror import Mirror
from selfplay.run_folder import RunFolder
from selfplay.s3 import Bucket
from selfplay.store import RunError, Store, holds_run, is_remote, local_copy, open_home
from tests.selfplay.test_resume import ROOT
from tests.selfplay.test_store import CONFIG, can_write, new_store, snapshot, taken_over
from tests.selfplay.test_store import url as url  # a fixture: a disk, or object storage
from tests.selfplay.tiny_run import tiny_config

DOCUMENTS = {"config.yaml", "heartbeat.json", "run.json"}


def lay(url: str, name: str, text: str = "precious") -> None:
    """A file or object of somebody else's."""
    if is_remote(url):
        Bucket(url).put(name, text.encode())
    else:
        (Path(url) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(url) / name).write_text(text)


def test_a_launch_killed_at_any_write_is_begun_again_by_one_command(url: str) -> None:
    command = [sys.executable, "-m", "tests.selfplay.launch_child", url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    begun, kills = [], int(done.stdout)
    for number in range(kills):
        here = f"{url}-{number}"
        begun.append(holds_run(here))
        run = RunFolder.open(here) if begun[-1] else RunFolder.create(here, tiny_config("seed=6"))
        run.close()
        assert run.facts["seed"] == run.config.seed == (5 if begun[-1] else 6)
        again = RunFolder.open(here)
        assert again.config == run.config
        assert again.facts["epoch"] == run.facts["epoch"] + 1
        again.close()
        assert {name for name in snapshot(here) if name != "lock"} == DOCUMENTS
        assert not again.store.listing("pending")
    assert begun == sorted(begun)  # a run that exists stays
    assert begun.count(False) >= 3
    assert begun[-1]


def begun_by(url: str, who: str) -> Store:
    home = open_home(url, create=True)
    try:
        return home.create({"id": uuid.uuid4().hex, "epoch": 1}, {"config.yaml": who})
    finally:
        home.release()


def test_of_two_launches_into_one_place_at_once_one_goes_on_with_its_own_config(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one does all of its work before the first, second, ... step of this one."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # they are on two hosts
    steps = [(os, "mkdir"), (os, "rename"), (os, "replace"), (store_disk, "epochs"), (Path, "exists")]
    if is_remote(url):
        steps = [(Bucket, name) for name in ("put", "get", "etag", "list")]
    for step in itertools.count():
        here, count, others = f"{url}-{step}", itertools.count(), list[Any]()

        def counted(real: Any, here: str = here, step: int = step, count: Any = count, others: Any = others) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not others and next(count) == step:
                    others.append(None)
                    try:
                        others[:] = [begun_by(here, "other's")]
                    except RunError as error:
                        assert "already holds a run" in str(error)  # noqa: PT017 - then this one is through
                return real(*args, **kwargs)

            return call

        mine: list[Store] = []
        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                mine.append(begun_by(here, "mine"))
            except RunError as error:
                said = str(error)
                assert "another launch creates" in said or "already holds a run" in said
        if not others:
            break
        able = [store for store in [*mine, *filter(None, others)] if can_write(store)]
        assert len(able) == 1, step
        assert able[0].read("config.yaml") == ("mine" if able[0] in mine else "other's")
        facts = json.loads(able[0].read("run.json") or "")
        assert (facts["id"], facts["epoch"]) == (able[0].place.run_id, able[0].place.epoch)
        assert "launching" not in facts
    assert step > 5


def test_a_launch_that_slept_gives_way_to_one_that_came_and_to_one_that_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk: a later one is at work, its number says; an earlier one writes run.json in its last moment."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # they are on several hosts
    mkdir, rename, later = os.mkdir, os.rename, tmp_path / "later"

    def come(path: Any, *rest: Any) -> None:
        if str(path).endswith("epoch-00001"):
            mkdir(Path(path).with_name("epoch-00002"))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", come)
    with pytest.raises(RunError, match="another launch creates"):
        begun_by(str(later), "mine")
    monkeypatch.setattr(os, "mkdir", mkdir)
    assert [path.name for path in (later / "pending").iterdir()] == ["epoch-00002"]
    assert begun_by(str(later), "mine").place.epoch == 3  # and once that one is dead

    earlier = begun_by(str(tmp_path / "earlier"), "other's")
    written = earlier.read("run.json") or ""
    (earlier.root / "run.json").unlink()

    def write(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "rename", rename)
        earlier.put("run.json", written)
        rename(source, target)

    monkeypatch.setattr(os, "rename", write)
    with pytest.raises(RunError, match="another launch creates"):
        begun_by(str(earlier.root), "mine")
    assert earlier.read("run.json") == written
    assert taken_over(str(earlier.root)).read("config.yaml") == "other's"


def test_a_launch_is_fenced_also_where_its_folder_cannot_be_deleted_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = begun_by(str(tmp_path / "run"), "other's")
    (earlier.root / "run.json").unlink()
    monkeypatch.setattr(store_disk.shutil, "rmtree", lambda *_, **__: None)  # it writes all the time
    later = begun_by(str(tmp_path / "run"), "mine")
    with pytest.raises(RunError):
        earlier.put("config.yaml", "stale")
    assert later.read("config.yaml") == "mine"


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.yaml"], ["pending/mine"], list("abcde")])
def test_what_a_launch_did_not_leave_is_named_and_left_alone(names: list[str], url: str) -> None:
    for name in names:
        lay(url, name)
    before = snapshot(url)
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    with pytest.raises(RunError, match=f"is not empty and holds no run, but {some}; choose another --run-dir, or"):
        RunFolder.create(url, CONFIG)
    assert snapshot(url) == before


def killed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that ends just before the last write."""
    with monkeypatch.context() as patch:
        left = [1, 2]
        real = Bucket.put
        patch.setattr(Bucket, "put", lambda *a, **k: real(*a, **k) if left.pop() else None)
        patch.setattr(os, "replace", lambda a, b: os.rename(a, b) if left.pop() == 2 else left.clear())
        with pytest.raises((IndexError, RunError)):
            new_store(url)


def test_what_was_laid_beside_a_killed_launch_is_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(s3_url, monkeypatch)
    assert sorted(snapshot(s3_url)) == ["config.yaml", "run.json"]
    lay(s3_url, "thesis.tex")
    with pytest.raises(RunError, match=r"holds no run, but thesis\.tex; choose"):
        RunFolder.create(s3_url, CONFIG)


def test_what_a_killed_launch_left_is_no_run_to_any_command(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(s3_url, monkeypatch)
    assert not holds_run(s3_url)
    with pytest.raises(RunError, match="there is no run at"):
        local_copy(s3_url)
    monkeypatch.setattr(sys, "argv", ["selfplay", "resume", s3_url])
    with pytest.raises(SystemExit):
        cli.main()
    said = f"error: {s3_url} holds no run: its launch is under way or was killed; `selfplay launch` it again\n"
    assert capsys.readouterr().err == said


def test_a_marker_that_a_console_made_for_a_folder_is_nothing(s3_url: str) -> None:
    Bucket(s3_url).put("", b"")
    run = RunFolder.create(s3_url, CONFIG)
    run.close()
    Mirror(Bucket(s3_url), run.place.run_id).pull("")
    assert holds_run(s3_url)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_driver_that_sleeps_before_its_write_overwrites_nothing_that_the_next_one_has_put(
    name: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a document that it never wrote before; in run.json it would say that it ended."""
    from selfplay.store_s3 import S3Store

    stale = new_store(s3_url).place.open()
    news: list[Store] = []
    real, looks = S3Store.check, itertools.count(1 if name == "config.yaml" else 0)

    def check(self: S3Store) -> None:
        real(self)
        if self is stale and next(looks) == 1:  # the last look before its write
            news.append(taken_over(s3_url))
            news[0].put("config.yaml", "new")

    monkeypatch.setattr(S3Store, "check", check)
    if name == "run.json":
        stale.close()
    else:
        with pytest.raises(RunError, match="was taken over"):
            stale.put(name, "stale")
    assert news[0].read("config.yaml") == "new"
    assert can_write(news[0])
