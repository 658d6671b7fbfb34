"""An S3 service that misbehaves: clear sentences, bounded patience, nothing damaged is taken for whole."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from selfplay import s3
from selfplay.mirror import Mirror
from selfplay.run_folder import RunFolder
from selfplay.s3 import Bucket, Changed
from selfplay.store import RunError, local_copy, open_home
from tests.selfplay.test_store import CONFIG, FINAL, built, new_store, played, taken_over
from tests.selfplay.tiny_run import tiny_config


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], list[str]]]:
    """Make the service one that answers everything with a status and an error code; the requests it got."""
    started: list[ThreadingHTTPServer] = []

    def start(status: int, code: str) -> list[str]:
        got: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                got.append(self.path)
                body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

            def log_message(self, *_: Any) -> None: ...

        service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=service.serve_forever, daemon=True).start()
        started.append(service)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{service.server_port}")
        return got

    yield start
    for service in started:
        service.shutdown()
        service.server_close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's waits between its tries take no time."""
    from botocore import endpoint

    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)


@pytest.mark.usefixtures("s3_url", "hasty")
@pytest.mark.parametrize(
    ("status", "code", "says", "tries"),
    [
        (403, "AccessDenied", "access is denied; the credentials need to", 1),
        (403, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID", 1),
        (403, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY", 1),
        (404, "NoSuchBucket", "the bucket does not exist; create it", 1),
        (501, "NotImplemented", "lacks conditional writes", 1),
        (503, "SlowDown", r"cannot use s3://b/run: no \(SlowDown\)", 5),
    ],
)
def test_what_the_service_refuses_is_one_sentence_after_few_tries(
    status: int, code: str, says: str, tries: int, server: Callable[[int, str], list[str]]
) -> None:
    got = server(status, code)
    with pytest.raises(RunError, match=says) as told:
        RunFolder.create("s3://b/run", CONFIG)
    assert "\n" not in str(told.value)
    assert len(got) == tries


@pytest.mark.usefixtures("hasty")
def test_a_service_that_is_down_or_a_missing_bucket_or_key_is_said_so(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"s3://nowhere/run: the bucket does not exist"):
        RunFolder.create("s3://nowhere/run", CONFIG)
    with pytest.raises(RunError, match="holds no run"):
        RunFolder.open(s3_url)
    with pytest.raises(RunError, match="there is no run at"):
        local_copy(s3_url)
    with pytest.raises(RunError, match=r"give s3://BUCKET/PREFIX"):
        RunFolder.create("s3://runs", CONFIG)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("HOME", str(tmp_path))
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers
        with pytest.raises(RunError, match="no credentials; set AWS_ACCESS_KEY_ID"):
            RunFolder.create(s3_url, CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(RunError, match=r"cannot reach .*; check AWS_ENDPOINT_URL and the network"):
        RunFolder.open(s3_url)


def test_what_is_not_a_run_is_left_alone(s3_url: str) -> None:
    Bucket(s3_url).put("thesis.tex", b"precious")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        RunFolder.create(s3_url, CONFIG)
    RunFolder.create(f"{s3_url}2", CONFIG).close()
    with pytest.raises(RunError, match=f"continue it with `selfplay resume {s3_url}2`"):
        RunFolder.create(f"{s3_url}2", CONFIG)


def test_conditional_writes_hold_for_small_and_for_large_objects(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(s3_url)
    etag = bucket.put("a", b"1", new=True)
    for condition in ({"new": True}, {"match": '"0123"'}):
        with pytest.raises(Changed):
            bucket.put("a", b"2", **condition)  # type: ignore[arg-type]
    assert bucket.put("a", b"1", new=True) == etag  # a try whose answer was lost meets itself
    bucket.put("a", b"2", match=etag)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * (45 << 10))
    first = bucket.upload("large", large, new=True)
    assert first.endswith('-3"')  # its number of parts
    with pytest.raises(Changed):
        bucket.upload("large", large, new=True)
    bucket.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert (bucket.metadata("large") or {})["sha256"] == s3.file_digest(large)
    assert not bucket._s3.list_multipart_uploads(Bucket="runs", Prefix=s3_url.removeprefix("s3://runs/")).get("Uploads")


def test_an_object_that_does_not_match_its_checksum_is_never_taken(s3_url: str) -> None:
    store = new_store(s3_url)
    store.commit(played(store), FINAL)
    bucket = Bucket(s3_url)
    data, _ = bucket.get(FINAL) or (b"", "")
    where = {"Bucket": "runs", "Key": f"{s3_url.removeprefix('s3://runs/')}/{FINAL}"}
    flipped = bytes([data[0] ^ 1]) + data[1:]
    bucket._s3.put_object(**where, Body=flipped, Metadata=bucket.metadata(FINAL))
    with pytest.raises(RunError, match=r"part-00000\.arrow is damaged: its content does not match .* or delete it"):
        store.pull("traces")
    assert not list((store.root / "traces").rglob("*.tmp"))


def test_a_connection_that_breaks_in_the_middle_is_tried_again_from_the_start(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ResponseStreamingError
    from botocore.response import StreamingBody

    bucket = Bucket(s3_url)
    bucket.put("a", b"0123456789")
    real = StreamingBody.iter_chunks
    broken = [1, 2]

    def torn(self: Any, chunk_size: int) -> Iterator[bytes]:
        for chunk in real(self, chunk_size):
            if broken:
                broken.pop()
                yield chunk[:4]
                raise ResponseStreamingError(error="reset")
            yield chunk

    monkeypatch.setattr(StreamingBody, "iter_chunks", torn)
    assert (bucket.get("a") or (b"", ""))[0] == b"0123456789"
    broken[:] = range(s3.READS)
    with pytest.raises(RunError, match="cannot reach"):
        bucket.get("a")


def test_a_mirror_follows_what_changes_and_what_is_deleted(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_store(s3_url)
    monkeypatch.setenv("SELFPLAY_CACHE", str(driver.root.parent.parent / "other-node"))
    node = driver.place.open()
    driver.publish(built(driver, '{"try": 1}'), "checkpoints/00001")
    driver.put("metrics.jsonl", "1\n")
    (node.root / "own.txt").write_text("of this node")
    downloads: list[str] = []
    real = Bucket.download
    monkeypatch.setattr(Bucket, "download", lambda *a: (downloads.append(a[1]), real(*a))[1])
    node.pull("")
    names = ["config.yaml", "metrics.jsonl", "run.json", "checkpoints/00001/policy/model.bin"]
    assert downloads == ["checkpoints/00001/policy/model.bin", *names[:3], "checkpoints/00001/state.json"]
    downloads.clear()
    node.pull("")
    assert downloads == []
    driver.publish(built(driver, '{"try": 2}'), "checkpoints/00001")
    assert node.pull("checkpoints/00001/state.json").read_text() == '{"try": 2}'
    node.pull("checkpoints")
    assert (node.root / "checkpoints/00001/policy/model.bin").read_text() == '{"try": 2}'
    driver.remove("checkpoints/00001")
    node.pull("")
    assert not (node.root / "checkpoints").exists()
    assert not (driver.root / "checkpoints" / "00001").exists()
    assert (node.root / "own.txt").read_text() == "of this node"


def test_a_replaced_checkpoint_does_not_exist_while_its_files_come(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = new_store(s3_url)
    monkeypatch.setenv("SELFPLAY_CACHE", str(driver.root.parent.parent / "other-node"))
    node = driver.place.open()
    driver.publish(built(driver, '{"try": 1}'), "checkpoints/00001")
    node.pull("checkpoints")
    driver.publish(built(driver, '{"try": 2}'), "checkpoints/00001")
    real = Bucket.download

    def watched(self: Bucket, key: str, target: Path) -> str | None:
        assert not (node.root / "checkpoints/00001/state.json").exists()
        return real(self, key, target)

    monkeypatch.setattr(Bucket, "download", watched)
    node.pull("checkpoints")
    assert (node.root / "checkpoints/00001/state.json").read_text() == '{"try": 2}'


def test_processes_of_a_node_fetch_a_file_once_between_them(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_store(s3_url)
    driver.put("big", "x" * 100_000)
    monkeypatch.setenv("SELFPLAY_CACHE", str(driver.root.parent.parent / "other-node"))
    count: list[int] = []
    real = Bucket.download
    monkeypatch.setattr(Bucket, "download", lambda *a: (count.append(1), real(*a))[1])
    mirrors = [Mirror(Bucket(s3_url), driver.place.run_id) for _ in range(6)]
    threads = [threading.Thread(target=mirror.pull, args=("big",)) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert (mirrors[0].root / "big").read_text() == "x" * 100_000


def test_a_writer_paused_between_its_look_and_its_write_lands_a_whole_unit_at_most(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window that the module describes: the new driver begins between `check` and the PUT of the stale one."""
    from selfplay.shards import iter_rows
    from selfplay.store_s3 import S3Store

    stale = new_store(s3_url)
    pending = played(stale, group="stale")
    news: list[Any] = []
    real, calls = S3Store.check, [0]

    def check(self: S3Store) -> None:
        real(self)
        calls[0] += self is stale
        if calls[0] == 2 and not news:  # the last look before the PUT
            monkeypatch.setenv("SELFPLAY_CACHE", str(self.root.parent.parent / "other-node"))
            news.append(taken_over(s3_url))

    monkeypatch.setattr(S3Store, "check", check)
    assert stale.commit(pending, FINAL)
    (new,) = news
    assert not new.commit(played(new, group="new"), FINAL)
    assert {row["group"] for row in iter_rows(new.pull(FINAL))} == {"stale"}
    assert len(new.listing("traces")) == 1
    with pytest.raises(RunError, match="was taken over"):
        stale.put("metrics.jsonl", "stale")


def test_a_driver_on_the_same_host_that_is_alive_is_not_taken_over(s3_url: str) -> None:
    run = RunFolder.create(s3_url, tiny_config())
    with pytest.raises(RunError, match="which still gives signs of life; stop that one first"):
        RunFolder.open(s3_url)
    run.close()
    RunFolder.open(s3_url, ["iterations=7"]).close()
    assert "iterations: 7" in (open_home(s3_url, create=False).read("config.yaml") or "")


def test_a_document_that_the_next_driver_has_replaced_is_not_overwritten_in_that_moment(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfplay.store_s3 import S3Store

    stale = new_store(s3_url)
    stale.put("heartbeat.json", "1")
    news: list[Any] = []
    real = S3Store.check

    def check(self: S3Store) -> None:
        real(self)
        if self is stale and not news:  # it looked, and now it sleeps
            news.append(taken_over(s3_url))
            news[0].put("heartbeat.json", "new")

    monkeypatch.setattr(S3Store, "check", check)
    with pytest.raises(RunError, match="was taken over"):
        stale.put("heartbeat.json", "stale")
    assert news[0].read("heartbeat.json") == "new"
