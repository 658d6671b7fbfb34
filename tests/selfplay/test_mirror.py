"""What others put, replace and delete between a mirror's look at the storage and what it does with it. Each test lets
them do so in the very moment that would do harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfplay import mirror as mirrors
from selfplay.mirror import Mirror
from selfplay.s3 import Bucket
from selfplay.shards import list_shards
from selfplay.store import Place, Store
from selfplay.units import join
from tests.selfplay.test_store import CONFIG, FINAL, built, finished, new_store, played

CHECKPOINT = "checkpoints/00001"


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Callable[[], Any]], None]:
    """Have something happen once, after the next call of a method (a listing: once it is read)."""

    def arrange(owner: Any, name: str, act: Callable[[], Any]) -> None:
        real, left = getattr(owner, name), [act]

        def call(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            if isinstance(found, Iterator):
                found = iter(list(found))
            if left:
                left.pop()()
            return found

        monkeypatch.setattr(owner, name, call)

    return arrange


def observer(driver: Store) -> Mirror:
    """Another process of the driver's node, such as `selfplay status`: the same folder."""
    return Mirror(Bucket(driver.place.url), driver.place.run_id)


def elsewhere(driver: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The run from another node."""
    with monkeypatch.context() as patch:
        patch.setenv("SELFPLAY_CACHE", str(driver.root.parent.parent / "other-node"))
        return driver.place.open()


def test_a_shard_committed_while_another_process_looks_stays_in_the_mirror(s3_url: str, meanwhile: Any) -> None:
    driver = new_store(s3_url)
    pending = played(driver)
    meanwhile(Bucket, "list", lambda: driver.commit(pending, FINAL))
    observer(driver).pull("traces")
    assert list_shards(driver.root) == [driver.root / FINAL]


def test_a_document_put_for_the_first_time_while_all_is_pulled_stays(s3_url: str, meanwhile: Any) -> None:
    driver = new_store(s3_url)
    meanwhile(Bucket, "list", lambda: driver.put("metrics.jsonl", "1\n"))
    driver.pull("")
    assert (driver.root / "metrics.jsonl").read_text() == "1\n"


def test_what_is_put_again_after_it_was_removed_stays(s3_url: str, meanwhile: Any) -> None:
    driver = new_store(s3_url)
    driver.put("curve.png", "old")
    other = driver.place.open()
    meanwhile(Bucket, "delete", lambda: other.put("curve.png", "new"))
    driver.remove("curve.png")
    assert driver.read("curve.png") == "new"
    assert (driver.root / "curve.png").read_text() == "new"


def test_what_is_gone_goes(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_store(s3_url)
    node = elsewhere(driver, monkeypatch)
    driver.commit(played(driver), FINAL)
    assert node.pull(FINAL).exists()
    driver.remove("traces/iteration=00001")
    node.pull("traces")
    assert not (node.root / "traces").exists()
    assert not (driver.root / "traces").exists()


def test_a_node_that_only_asks_for_single_checkpoints_drops_those_that_the_run_has_deleted(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner's, which makes them, fetches the one that it starts again from, and never looks at all of them."""
    driver = new_store(s3_url)
    node = elsewhere(driver, monkeypatch)
    for number in range(1, 6):
        name = f"checkpoints/{number:05d}"
        node.publish(built(node), name)
        node.pull(name)
        for old in range(1, number - 1):  # what retention does on the driver's node, which keeps two
            driver.remove(f"checkpoints/{old:05d}")
        assert len(list((node.root / "checkpoints").iterdir())) <= 3
    node.pull("checkpoints/00005")
    assert {path.name for path in (node.root / "checkpoints").iterdir()} == {"00004", "00005"}


def test_a_checkpoint_replaced_between_two_of_its_files_comes_whole(
    s3_url: str, meanwhile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = new_store(s3_url)
    node = elsewhere(driver, monkeypatch)
    driver.publish(built(driver, '{"try": 1}'), CHECKPOINT)
    folder = built(driver, '{"try": 2}')
    meanwhile(Bucket, "download", lambda: driver.publish(folder, CHECKPOINT))  # the first file is the old one
    node.pull("checkpoints")
    found = {p.name: p.read_text() for p in (node.root / CHECKPOINT).rglob("*") if p.is_file()}
    assert found == {"model.bin": '{"try": 2}', "state.json": '{"try": 2}'}


def test_a_checkpoint_that_is_always_replaced_meanwhile_does_not_exist_here(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = new_store(s3_url)
    node = elsewhere(driver, monkeypatch)
    driver.publish(built(driver, "{}"), CHECKPOINT)
    real, tries = Bucket.download, iter(range(100))

    def download(self: Bucket, key: str, target: Path) -> str | None:
        if key.endswith("state.json"):
            driver.publish(built(driver, str(next(tries))), CHECKPOINT)
        return real(self, key, target)

    monkeypatch.setattr(Bucket, "download", download)
    node.pull("checkpoints")
    assert next(tries) == mirrors.LOOKS
    assert not (node.root / CHECKPOINT / "state.json").exists()


def test_a_look_from_before_a_checkpoint_was_replaced_does_not_take_the_new_one_away(
    s3_url: str, meanwhile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = new_store(s3_url)
    driver.publish(built(driver, '{"try": 1}'), CHECKPOINT)
    folder = built(driver, '{"try": 2}')
    watching = observer(driver)
    unlinked: list[str] = []
    meanwhile(Bucket, "list", lambda: (
        driver.publish(folder, CHECKPOINT),
        monkeypatch.setattr(Mirror, "_unlink", lambda _, name: unlinked.append(name)),
    ))  # fmt: skip
    watching.pull("checkpoints")
    assert unlinked == []
    assert (driver.root / CHECKPOINT / "state.json").read_text() == '{"try": 2}'


def test_a_folder_that_goes_while_a_file_comes_into_it_is_made_again(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process forgets the last file in it, and so the folder."""
    driver = new_store(s3_url)
    node = elsewhere(driver, monkeypatch)
    driver.put("a/new", "here")
    real, gone = Path.mkdir, [node.root / "a"]

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self in gone:
            gone.remove(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert node.pull("a/new").read_text() == "here"
    assert gone == []


def test_the_folder_of_an_epoch_outlives_the_parts_of_a_unit_that_were_fetched_into_it(s3_url: str) -> None:
    from selfplay.supervisor import Complete
    from selfplay.worker import Played, Unit

    driver = new_store(s3_url)
    worker = Place(s3_url, driver.place.run_id, driver.place.epoch).open()
    parts = []
    for group in ("a", "b"):
        scratch = worker.scratch("part-00000.arrow")
        parts.append(Played(Unit(1, 0, (), 1), finished(worker, scratch, 1, group), 1.0))
    joined = join(driver, CONFIG, Complete(parts[0].unit, tuple(parts)))
    assert driver.commit(joined.pending, FINAL)
