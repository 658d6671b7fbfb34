"""An S3 service on loopback for tests: moto's, in a process of its own. `python -m tests.s3_server` prints its port."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BUCKET = "runs"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its URL. Environment variables lead boto3 there, in this process and in its children."""
    command = [sys.executable, "-m", "tests.s3_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            url = f"http://127.0.0.1:{port}"
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {
                    "AWS_ENDPOINT_URL": url,
                    "AWS_ACCESS_KEY_ID": "tests",
                    "AWS_SECRET_ACCESS_KEY": "tests",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_CONFIG_FILE": os.devnull,
                    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                    "AWS_EC2_METADATA_DISABLED": "true",
                }.items():
                    patch.setenv(name, value)
                import boto3

                boto3.client("s3").create_bucket(Bucket=BUCKET)
                yield url
        finally:
            server.kill()


@pytest.fixture
def s3_url(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own, and a cache of this node's own."""
    assert s3_server
    monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}/run"


def one_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., list[bytes]]:
    """A service looks at a condition and writes in one step, moto in two: so it gets one request at a time, each once
    its body has arrived."""
    turn = threading.Lock()

    def call(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        length = environ.get("CONTENT_LENGTH")
        body = environ["wsgi.input"].read(int(length)) if length else b""
        if length and len(body) < int(length):  # the client died
            start_response("400 Bad Request", [])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        with turn:
            return list(app(environ, start_response))

    return call


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, one_at_a_time(app), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
