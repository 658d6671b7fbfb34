"""The fake server in SGLang's ways, as SGLang 0.5.23 was found to answer (docs/SERVER.md, "SGLang")."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np

from mcts.rng import generator
from tests.mcts.fake_server import Drawn, FakeServer, hash_of, log_odds

_BEHIND = 5
"""Prompt tokens that the detokenizer reads along."""


def said(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text that SGLang gives out for drawn tokens: what they add to the text of the prompt's end."""
    head = prompt[-_BEHIND:]
    before, after = (tokenizer.decode(row, skip_special_tokens=True) for row in (head, head + ids))
    return str(after[len(before) :])


class FakeSGLang(FakeServer):
    """It answers under any model name, draws all n from one seed, looks for the stop text in the last few tokens only,
    gives log-probabilities at the temperature asked for, and is named after the weights that it loaded last."""

    label = "default"
    """weight_version."""
    only: int | None = None
    """The one token that can be drawn."""

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/model_info":
            self._send(handler, {"model_path": self.root, "weight_version": self.label})
        else:
            super()._get(handler)

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/update_weights_from_disk":
            super()._post(handler)
            return
        body = self._body(handler)
        self.reloads += 1
        if self.always == "no_such_folder":
            self._send(handler, {"success": False, "message": "Failed to get weights iterator"}, 400)
            return
        if self.always != "stale":
            self.root = self.model = body["model_path"]
            self.version = int(body["weight_version"].split()[0])
            self.label = body["weight_version"]
        self._send(handler, {"success": True, "message": "Succeeded to update model weights."})

    def restart(self) -> None:
        """As a supervisor would: another process, with the weights that it is started with."""
        self.die()
        self.label, self.version, self.root = "default", 0, "first"
        self.start()

    def _answer(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        label = "9" if fault == "rival" else self.label  # before the draw: new weights may come in its midst
        answer = super()._answer(body, fault)
        if "choices" not in answer:
            return answer
        answer["model"] = body["model"]
        for choice in answer["choices"]:
            if not body.get("return_token_ids"):
                choice.pop("token_ids", None)
            stopped = choice["finish_reason"] == "stop"
            choice["matched_stop"] = body["stop"][0] if stopped else None
        answer["metadata"] = {
            "weight_version": label, "weight_versions": [{"version": label, "start": 0, "end": 1}],
        }  # fmt: skip
        return answer

    def _draw(self, prompt: list[int], body: dict[str, Any], sample: int, fault: str | None) -> Drawn:  # noqa: ARG002
        ids: list[int] = []
        logprobs: list[float] = []
        random, stop, window = generator(body["seed"], hash_of(prompt)), body["stop"][0], self._window(body)
        reason, ends = "length", {self.eos, *body.get("stop_token_ids", ())}
        while reason == "length" and len(ids) < body["max_tokens"]:
            row = log_odds(prompt + ids, self.size, self.likely, self.version)
            if self.only is not None:
                row = np.full(self.size, -np.inf)
                row[self.only] = 0.0
            token = int(row.argmax())
            if body["temperature"] > 0.0:
                row = row / body["temperature"]
                row -= np.log(np.exp(row).sum())
                token = min(int(np.searchsorted(np.exp(row).cumsum(), random.random())), self.size - 1)
            ids.append(token)
            logprobs.append(float(row[token]))
            if stop in self.tokenizer.decode(ids[-window:]) or token in ends:
                reason = "stop"
        text = said(self.tokenizer, prompt, ids[:-1] if ids[-1] in ends else ids)
        return Drawn(ids, logprobs, reason, text.partition(stop)[0] if reason == "stop" else text)

    def _window(self, body: dict[str, Any]) -> int:
        """Last tokens in which the stop text is looked for."""
        pieces = len(self.tokenizer(body["stop"][0], add_special_tokens=False)["input_ids"])
        patterns = body.get("stop_regex") or []
        return 1 + max([pieces, *(len(re.sub(r"\\(.)", r"\1", pattern)) for pattern in patterns)])

    def written(self, token: int) -> str:
        """A piece of a character is written as the Latin-1 letters of its bytes."""
        text = super().written(token)
        if "\ufffd" not in text:
            return text
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        return "".join(chr(_BYTES[letter]) for letter in piece)


def _byte_letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


_BYTES = _byte_letters()
"""How byte-level tokenizers write each byte."""
