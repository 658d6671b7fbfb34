"""A small completions server on loopback that misbehaves on demand. Its "model" is a hash: the odds of a token depend
on the whole prefix, so every log-probability can be worked out again without it."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
from tokenizers.decoders import DecodeStream

from mcts.rng import generator

BLOCK = 16


def log_odds(prefix: list[int], size: int, likely: tuple[int, ...], version: int) -> np.ndarray:
    """Log-probabilities [size] of the next token; the `likely` tokens (delimiter, EOS) are favoured."""
    key = hash_of(prefix)
    logits = 2.0 * generator(key, version).standard_normal(size)
    logits[list(likely)] += 3.0
    return logits - np.log(np.exp(logits).sum())


def hash_of(prefix: list[int]) -> int:
    value = 1469598103934665603
    for token in prefix:
        value = ((value ^ (token + 1)) * 1099511628211) & ((1 << 64) - 1)
    return value


_REFUSED: dict[str | None, tuple[dict[str, str], int]] = {
    "500": ({"error": "out of luck"}, 500),
    "400": ({"error": "no such field"}, 400),
    "429": ({"error": "later"}, 429),
    "moved": ({}, 302),
}
_BROKEN = ("cut", "latin", "chunks", "negative", "head", "slow_head", "trickle")


class PrefixBlocks:
    """Which whole blocks of which prefixes are cached, as a paged cache keeps them: the reference for servers."""

    def __init__(self) -> None:
        self._known: set[tuple[int, ...]] = set()

    def cached(self, prefix: list[int]) -> int:
        """Tokens of `prefix` that need no forward; the last token always does."""
        count = 0
        while count + BLOCK < len(prefix) and tuple(prefix[: count + BLOCK]) in self._known:
            count += BLOCK
        return count

    def add(self, tokens: list[int]) -> None:
        """Tokens that were forwarded."""
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            self._known.add(tuple(tokens[:end]))


class Detokenizer:
    """The text of drawn tokens as vLLM 0.32 gives it out: nothing while a character is not whole, and behind a prompt
    that ends inside one the prompt's text too."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._core = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        self.text = ""

    def add(self, token: int) -> str:
        self.text += self._stream.step(self._core, token) or ""
        return self.text


class Drawn(NamedTuple):
    """One choice."""

    ids: list[int]
    logprobs: list[float]
    reason: str
    text: str


class FakeServer:
    """`faults`: names that the next completion calls fall for, first come first served; `always`: one that all do.
    `stall` holds calls that fell for "slow" until it is set; `streams`: it finds the stop text as vLLM does, in what
    its detokenizer gives out."""

    def __init__(self, tokenizer: Any, eos: int, model: str = "tiny") -> None:
        self.tokenizer, self.eos, self.model = tokenizer, eos, model
        self.size = len(tokenizer)
        self.likely: tuple[int, ...] = (eos,)
        self.faults: deque[str] = deque()
        self.always: str | None = None
        self.streams = False
        self.stall = threading.Event()
        self.seen: list[dict[str, Any]] = []
        """Bodies of the completion calls, in order of arrival."""
        self.sampled = self.prompt = self.cached = 0
        self.version = 0
        self.root = "first"
        self.reloads = 0
        self.cut_reload = 0
        """The call for new weights, counted from 1, whose connection is cut."""
        self.most = 0
        """Most calls under way at once."""
        self._under_way = 0
        self._lock = threading.Lock()
        self._blocks = PrefixBlocks()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen (again) at the same port."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                owner._open.add(self.connection)

            def finish(self) -> None:
                owner._open.discard(self.connection)
                try:
                    super().finish()
                except OSError:
                    return

            def do_GET(self) -> None:
                owner._get(self)

            def do_POST(self) -> None:
                owner._post(self)

            def log_message(self, *_: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                return  # clients that hang up are part of the game

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self) -> None:
        """Cut every connection and refuse new ones."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._server = None

    def stop(self) -> None:
        self.stall.set()
        if self._server is not None:
            self.die()

    # ---- endpoints

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            self._send(handler, {"data": [{"id": self.model, "root": self.root}]})
        elif handler.path == "/model_info":
            self._send(handler, {"weight_version": f"{self.version} of {self.root}"})
        else:
            self._send(handler, {"error": "not found"}, 404)

    def _body(self, handler: BaseHTTPRequestHandler) -> Any:
        return json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = self._body(handler)
        if handler.path == "/update_weights_from_disk":
            self.reloads += 1
            if self.reloads == self.cut_reload:
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            if self.always != "stale":
                self.version, self.root = int(body["weight_version"].split()[0]), body["model_path"]
            self._send(handler, {"success": True, "message": "ok"})
        elif handler.path == "/classify":
            rows = [{"index": i, "probs": [0.25, 0.75]} for i, _ in enumerate(body["input"])]
            self._send(handler, {"data": rows[::-1] if self.always != "few_values" else rows[:1]})
        elif handler.path == "/pooling":
            self._send(handler, {"data": [{"index": i, "data": [[0.0], [2.0]]} for i, _ in enumerate(body["input"])]})
        elif handler.path == "/v1/completions":
            self._complete(handler, body)
        else:
            self._send(handler, {"error": "not found"}, 404)

    def _complete(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.seen.append(body)
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            fault = self.faults.popleft() if self.faults else self.always
        try:
            if fault in ("slow", "slow_once"):
                self.stall.wait()
            answer = None if fault in _REFUSED or fault in _BROKEN else self._answer(body, fault)
        finally:
            with self._lock:  # before the answer leaves: the client may call again as soon as it is there
                self._under_way -= 1
        if fault in _REFUSED:
            self._send(handler, *_REFUSED[fault])
        elif fault == "cut":
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault in _BROKEN:
            self._raw(handler, fault)
        else:
            self._send(handler, answer, cut=fault == "truncate", half=fault == "half")

    def _send(
        self, handler: BaseHTTPRequestHandler, answer: Any, status: int = 200, cut: bool = False, half: bool = False
    ) -> None:
        data = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        if status == 302:
            handler.send_header("Location", "http://elsewhere/")
        handler.send_header("Content-Length", str(len(data) // 2 if half else len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut or half else data)

    def _raw(self, handler: BaseHTTPRequestHandler, fault: str | None) -> None:
        """Bytes that are no UTF-8, a chunked answer that is cut off inside a chunk or of a negative size, half a head
        (and then nothing), or byte after byte without end."""
        if fault in ("head", "slow_head", "trickle"):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + b"\r\n" * (fault == "trickle"))
            while fault != "head" and not self.stall.wait(0.01):
                handler.wfile.write(b" " * (fault == "trickle"))
            return
        latin, size = fault == "latin", b"-5" if fault == "negative" else b"400"
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"" if latin else b"Transfer-Encoding: chunked\r\n") + b"\r\n")
        handler.wfile.write(b'{"model": "\xe9\xff"}' if latin else size + b'\r\n{"model": "tiny", "choi')

    # ---- the model

    def _answer(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        given = body["prompt"]
        prompt = (
            list(given) if isinstance(given, list) else self.tokenizer(given, add_special_tokens=False)["input_ids"]
        )
        if fault == "short_prompt":
            prompt = prompt[1:]
        n = 1 if fault == "ignores_n" else body["n"]
        drawn = [self._draw(prompt, body, i, fault) for i in range(n)]
        with self._lock:
            cached = self._blocks.cached(prompt)
            for one in drawn:
                self._blocks.add((prompt + one.ids)[:-1])
            count = sum(len(one.ids) for one in drawn)
            self.sampled += count
            self.prompt += len(prompt) - cached
            self.cached += cached
        choices = []
        for i, (ids, logprobs, reason, text) in enumerate(drawn):
            choice = {
                "index": i, "text": text, "finish_reason": reason, "token_ids": ids,
                "logprobs": {"token_logprobs": logprobs, "tokens": [self.written(t) for t in ids]},
            }  # fmt: skip
            choices.append(self._spoil(choice, fault))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count + (fault == "wrong_count")}
        answer = {"model": self.model, "choices": choices, "usage": usage}
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}  # type: ignore[assignment]
        if fault == "no_usage":
            del answer["usage"]
        if fault == "other_model":
            answer["model"] = "another"
        if fault == "same_index":
            for choice in choices:
                choice["index"] = 0
        if fault == "odd_index":
            choices[0]["index"] = {"of": 0}
        if fault == "reversed":
            choices.reverse()
        if fault == "negative_usage":
            usage["prompt_tokens"] = -1
        if fault == "many_cached":
            usage["prompt_tokens_details"] = {"cached_tokens": len(prompt) + 1}  # type: ignore[assignment]
        if fault == "error_body":
            return {"error": {"message": "the engine is not ready"}}
        return answer

    def _spoil(self, choice: dict[str, Any], fault: str | None) -> dict[str, Any]:
        if fault == "no_logprobs":
            choice["logprobs"] = None
        elif fault == "few_logprobs":
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-1]
        elif fault == "positive":
            choice["logprobs"]["token_logprobs"][0] = 0.5
        elif fault == "nan":
            choice["logprobs"]["token_logprobs"][0] = float("nan")
        elif fault == "null":
            choice["logprobs"]["token_logprobs"][0] = None
        elif fault == "few_ids":
            choice["token_ids"] = choice["token_ids"][:-1]
        elif fault == "aborted":
            choice["finish_reason"] = "abort"
        elif fault == "other_text":
            choice["text"] = "something else"
        elif fault == "bad_id":
            choice["token_ids"][0] = self.size + 5
        elif fault in ("no_token_ids", "ambiguous"):
            del choice["token_ids"]
            if fault == "ambiguous":
                choice["logprobs"]["tokens"][0] = "\ufffd"
        return choice

    def _draw(self, prompt: list[int], body: dict[str, Any], sample: int, fault: str | None) -> Drawn:
        ids: list[int] = []
        logprobs: list[float] = []
        random, stop = generator(body["seed"] + sample, hash_of(prompt)), body["stop"][0]
        stream, text = Detokenizer(self.tokenizer, prompt) if self.streams else None, ""
        for _ in range(body["max_tokens"] + (fault == "too_long")):
            row = log_odds(prompt + ids, self.size, self.likely, self.version)
            if body["temperature"] == 0.0:
                token = int(row.argmax())
            else:
                token = min(int(np.searchsorted(np.exp(row).cumsum(), random.random())), self.size - 1)
            ids.append(token)
            logprobs.append(float(row[token]))
            if token in {self.eos, *body.get("stop_token_ids", ())} and fault not in ("ignores_stop", "too_long"):
                return Drawn(ids, logprobs, "stop", text)
            text = self.decode(ids) if stream is None else stream.add(token)
            if fault in ("ignores_stop", "too_long"):
                continue
            if stop in text or fault == "ends_early":
                return Drawn(ids, logprobs, "stop", text.partition(stop)[0])
        return Drawn(ids, logprobs, "length", text)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def written(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
