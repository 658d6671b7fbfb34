"""A real vLLM server for the opt-in tests (marker `server`), in its own process and from its own environment:

    SERVER_VLLM=/path/to/environment/bin/vllm pytest -m server

`python -m tests.vllm_server PID_FILE PORT FOLDER` is a reload command: it ends the server whose process PID_FILE names
and starts another one on FOLDER, which outlives it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcts.engines.server_http import Client, Failure, Patience

VLLM = os.environ.get("SERVER_VLLM", "")
NAME, BLOCK, CONTEXT = "tiny", 32, 1024
needs_vllm = [
    pytest.mark.server,
    pytest.mark.skipif(not VLLM, reason="set SERVER_VLLM to the program vllm of an environment that has it"),
]
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server on loopback; `pid_file` names the process that serves now. Prefills are not chunked: on a CPU,
    vLLM 0.32 dies of a chunked prefill of a call with a seed ("CPU Generator does not use offset")."""

    port: int
    pid_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.pid_file.with_suffix(".log")

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Serve a model folder; returns at once."""
        command = [
            VLLM, "serve", str(folder), "--served-model-name", NAME, "--dtype", "float32", "--max-model-len",
            str(CONTEXT), "--block-size", str(BLOCK), "--enforce-eager", "--enable-prefix-caching",
            "--enable-prompt-tokens-details", "--no-enable-chunked-prefill", "--host", "127.0.0.1", "--port",
            str(self.port),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **SETTINGS}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.pid_file.write_text(str(process.pid))
        return process

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until it answers; AssertionError with the end of its log where it ends instead."""
        client = Client(self.url, Patience(down=1.0, backoff=0.5))
        while isinstance(client.call("/v1/models"), Failure):
            assert process.poll() is None, f"vLLM ended:\n{self.log.read_text()[-3000:]}"

    def stop(self) -> None:
        """End the serving process and its children, all of its own session."""
        pid = int(self.pid_file.read_text())
        with suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            os.killpg(pid, signal.SIGTERM)
            select.select([ended], [], [], 60.0)
            os.killpg(pid, signal.SIGKILL)
            select.select([ended], [], [], 60.0)
            os.close(ended)


def make_server(folder: Path) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Server(free.getsockname()[1], folder / "vllm.pid")


def save_served(folder: Path, *, seed: int = 0, tied: bool = False, scale: float = 4.0) -> Path:
    """A checkpoint of a small Qwen2 with a byte-pair tokenizer. vLLM on a CPU does not reload tied embeddings."""
    from tests.models import bpe_tokenizer, save_model

    sizes = {"width": 128, "context": CONTEXT, "tied": tied}
    return save_model(folder, "qwen2", seed=seed, tok=bpe_tokenizer(), scale=scale, **sizes)


@dataclass(frozen=True, slots=True)
class Served:
    """A running server and the checkpoints `a` (served first) and `b` of the same shape."""

    server: Server
    a: Path
    b: Path


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests of a session; tests load the weights that they need."""
    folder = tmp_path_factory.mktemp("vllm")
    for seed, name in enumerate("ab"):
        save_served(folder / name, seed=seed)
    server = make_server(folder)
    process = server.start(folder / "a" / "policy")
    try:
        server.wait(process)
        yield Served(server, folder / "a", folder / "b")
    finally:
        server.stop()
        process.wait()


if __name__ == "__main__":
    given = Server(int(sys.argv[2]), Path(sys.argv[1]))
    given.stop()
    given.start(Path(sys.argv[3]))
