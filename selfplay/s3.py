"""What a store needs of an S3-compatible service: objects with checksums, put under a condition, read whole.

Endpoint, region and credentials come from boto3's own environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) and files.
Each object carries the sha256 of its content as metadata, so that what is read is verified whatever the service checks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from selfplay.store import RunError

PART_BYTES = 64 << 20
"""Larger files go up in parts of this size."""
CHUNK_BYTES: Final = 1 << 20
READS: Final = 4
"""Attempts to read one object whole; connections break in the middle."""
DOWN = (
    EndpointConnectionError,
    ConnectTimeoutError,
    ReadTimeoutError,
    ConnectionClosedError,
    HTTPClientError,
    ResponseStreamingError,
    IncompleteReadError,
)
REASONS: Final = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the URL",
    "AccessDenied": "access is denied; the credentials need to list, read, write and delete below that prefix",
    "403": "access is denied; the credentials need to list, read, write and delete below that prefix",
    "InvalidAccessKeyId": "the access key is unknown there; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; renew the credentials, then `selfplay resume`",
    "NotImplemented": "the service lacks conditional writes (If-None-Match, If-Match); use one that has them",
    "InvalidBucketName": "that is no name for a bucket; correct the URL",
}


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a listing."""

    key: str
    """Relative to the prefix of the `Bucket`."""
    etag: str
    size: int
    modified: float
    """Seconds since 1970, by the service's clock."""


class Changed(Exception):
    """The condition of a write did not hold: the object exists, or is another one than expected. Not for users."""


class Bucket:
    """The objects below one prefix. Keys are relative to it. Every call raises RunError where the service refuses or
    cannot be reached after a few tries. Safe for several threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        if not bucket or not prefix:
            raise RunError(f"{url} is no place for a run; give s3://BUCKET/PREFIX")
        self._where = {"Bucket": bucket}
        self._prefix = prefix + "/"
        retries = {"mode": "standard", "total_max_attempts": 5}
        config = Config(retries=retries, connect_timeout=5, read_timeout=60, max_pool_connections=16)
        with told(self.url):
            self._s3: Any = boto3.client("s3", config=config)

    def _key(self, key: str) -> dict[str, str]:
        return {**self._where, "Key": self._prefix + key}

    def list(self, prefix: str) -> Iterator[Object]:
        """All objects whose key begins with `prefix`, in the order of their keys, but for those that stand for a folder
        (consoles make them)."""
        with told(self.url):
            pages = self._s3.get_paginator("list_objects_v2").paginate(**self._where, Prefix=self._prefix + prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    if not key or key.endswith("/"):
                        continue
                    yield Object(key, entry["ETag"], entry["Size"], entry["LastModified"].timestamp())

    def get(self, key: str) -> tuple[bytes, str] | None:
        """(content, etag) of a small object; None where there is none."""
        data = bytearray()
        etag = self._read(key, data.clear, data.extend)
        return None if etag is None else (bytes(data), etag)

    def download(self, key: str, target: Path) -> str | None:
        """Write the object to the new file `target`; its etag, None where there is none."""
        with open(target, "xb") as file:

            def again() -> None:
                file.seek(0)
                file.truncate()

            return self._read(key, again, file.write)

    def _read(self, key: str, again: Any, write: Any) -> str | None:
        """Read one object whole and verified, from its start as often as it takes."""
        for attempt in range(READS):
            again()
            digest, size = hashlib.sha256(), 0
            try:
                with told(self.url):
                    answer = self._s3.get_object(**self._key(key))
                    for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                        digest.update(chunk)
                        size += len(chunk)
                        write(chunk)
            except Missing:
                return None
            except Broken:
                if attempt + 1 == READS:
                    raise
                time.sleep(0.1 * 2**attempt)
                continue
            wanted = answer["Metadata"].get("sha256", digest.hexdigest())
            if size != answer["ContentLength"] or digest.hexdigest() != wanted:
                raise RunError(
                    f"{self.url}/{key} is damaged: its content does not match its checksum; restore it from a copy, or "
                    "delete it and `selfplay resume` makes it again"
                )
            return str(answer["ETag"])
        raise AssertionError("not reached")

    def etag(self, key: str) -> str | None:
        """The etag of an object; None where there is none."""
        try:
            with told(self.url):
                return str(self._s3.head_object(**self._key(key))["ETag"])
        except Missing:
            return None

    def put(self, key: str, data: bytes, *, match: str | None = None, new: bool = False) -> str:
        """Write an object whole; its etag. With `match` only over the object of that etag, with `new` only where there
        is none; otherwise raises Changed.

        An answer may be lost and the write be tried again by the client: then it meets itself, which counts as done.
        """
        digest = hashlib.sha256(data).hexdigest()
        extra = {**({"IfMatch": match} if match else {}), **({"IfNoneMatch": "*"} if new else {})}
        try:
            with told(self.url):
                answer = self._s3.put_object(**self._key(key), Body=data, Metadata={"sha256": digest}, **extra)
                return str(answer["ETag"])
        except (Changed, Missing) as refused:
            there = self.get(key)
            if there is not None and there[0] == data:
                return there[1]
            raise Changed(key) from refused

    def upload(self, key: str, path: Path, *, new: bool = False, metadata: Mapping[str, str] | None = None) -> str:
        """Write a file, in parts where it is large; its etag. With `new` only where there is no object of that key,
        otherwise raises Changed. (boto3's transfer manager cannot put under a condition, hence parts by hand.)"""
        digest, size = file_digest(path), path.stat().st_size
        fields = {"Metadata": {"sha256": digest, **(metadata or {})}}
        condition = {"IfNoneMatch": "*"} if new else {}
        with told(self.url):
            if size <= PART_BYTES:
                with open(path, "rb") as file:
                    answer = self._s3.put_object(**self._key(key), Body=file, **fields, **condition)
            else:
                answer = self._upload_parts(key, path, size, fields, condition)
        return str(answer["ETag"])

    def _upload_parts(self, key: str, path: Path, size: int, fields: Any, condition: Any) -> Any:
        part_bytes = max(PART_BYTES, -(-size // 10_000))  # the protocol's most parts
        where = self._key(key)
        where = {**where, "UploadId": self._s3.create_multipart_upload(**where, **fields)["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            with open(path, "rb") as file:
                file.seek((number - 1) * part_bytes)
                data = file.read(part_bytes)
            answer = self._s3.upload_part(**where, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))
            return self._s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            self._s3.abort_multipart_upload(**where)
            raise

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in order; those that are not there do not matter."""
        for key in keys:
            with told(self.url):
                self._s3.delete_object(**self._key(key))

    def metadata(self, key: str) -> dict[str, str] | None:
        """What an object was uploaded with; None where there is none."""
        try:
            with told(self.url):
                return dict(self._s3.head_object(**self._key(key))["Metadata"])
        except Missing:
            return None


class Missing(Exception):
    """There is no such object. Not for users."""


class Broken(RunError):
    """The service cannot be reached, or stopped in the middle; it may be better later."""


@contextmanager
def told(url: str) -> Iterator[None]:
    """What boto3 raises becomes a sentence about `url`, or Changed, Missing, Broken where a caller may go on."""
    try:
        yield
    except ClientError as error:
        code, status = _code(error)
        if code in ("NoSuchKey", "404", "NotFound"):
            raise Missing from error
        if status in (409, 412):  # 409: another conditional write of the key was under way
            raise Changed from error
        kind = Broken if status >= 500 and code not in REASONS else RunError
        reason = REASONS.get(code) or f"{error.response['Error'].get('Message', 'refused')} ({code})"
        raise kind(f"cannot use {url}: {reason}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise RunError(
            f"cannot use {url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from error
    except DOWN as error:
        raise Broken(
            f"cannot reach {url}: {error}; check AWS_ENDPOINT_URL and the network, then `selfplay resume`"
        ) from error
    except BotoCoreError as error:
        raise RunError(f"cannot use {url}: {error}") from error


def _code(error: ClientError) -> tuple[str, int]:
    return str(error.response["Error"].get("Code")), int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
