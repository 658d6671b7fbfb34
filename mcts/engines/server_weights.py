"""New weights for a running server, and the proof that it serves them."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mcts.engines.server_http import Client, Failure
from mcts.types import SettingError


@dataclass(frozen=True, slots=True)
class Reload:
    """How a server is given the weights of a folder, and how that is checked.

    `calls`: endpoints and JSON bodies, in order. `command`: arguments of a program that restarts the server and
    returns when that is on its way; the engine then waits for the server. `{path}` and `{version}` are filled in.
    `check`: `root` (the `root` of the served model is the folder), `id` (its id is `id` filled in), `version` (SGLang's
    `weight_version`), or `logprobs` (the folder's model, loaded here, gives the served log-probabilities)."""

    calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    command: Sequence[str] = ()
    check: Literal["root", "id", "version", "logprobs"] = "logprobs"
    id: str = ""
    tolerance: float = 0.05
    """Nats, for `logprobs`."""
    seconds: float = 600.0
    """Longest run of the command."""


VLLM = Reload(
    calls=(
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "{path}"}}),
        ("/reset_prefix_cache", {}),
    ),
)
"""vLLM started with VLLM_SERVER_DEV_MODE=1, on loopback: these endpoints have no protection."""
LABEL = "{version} of {path}"
"""What SGLang is told to call weights: versions alone are the same in every run."""
SGLANG = Reload(
    calls=(("/update_weights_from_disk", {"model_path": "{path}", "weight_version": LABEL}),), check="version"
)
PRESETS: Mapping[str, Reload] = {"vllm": VLLM, "sglang": SGLANG}


class _Unreachable(SettingError):
    """The server does not answer."""


@dataclass(slots=True)
class Weights:
    """Loads weights into the server behind `client`, which serves them as `model`."""

    client: Client
    model: str
    reload: Reload
    calls: list[str] = field(default_factory=list)
    """Endpoints called, for a log."""

    def load(self, path: str, version: int) -> None:
        """Raises SettingError with one sentence where the server does not serve the new weights afterwards."""
        folder, names = _names(path, version)
        for endpoint, body in self.reload.calls:
            answer = self.client.call(endpoint, _fill(body, names))
            self.calls.append(endpoint)
            if isinstance(answer, Failure):
                raise SettingError(f"the server did not load {folder}: {answer.why}")
            if isinstance(answer, dict) and answer.get("success") is False:
                raise SettingError(f"the server did not load {folder}: {answer.get('message')}")
        if self.reload.command:
            self._run([_fill(part, names) for part in self.reload.command])
        self._check(folder, names)

    def keep(self, path: str, version: int) -> None:
        """The server may have been started anew, with other weights: these are loaded again where it does not serve
        them any more. Raises SettingError."""
        try:
            self._check(*_names(path, version))
        except _Unreachable:
            raise
        except SettingError:
            self.load(path, version)

    def _run(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=self.reload.seconds)
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", "") or error).strip()[-300:]
            raise SettingError(f"the reload command {command[0]!r} failed: {said}") from error

    def _check(self, folder: str, names: Mapping[str, str]) -> None:
        check = self.reload.check
        if check == "logprobs":
            self._compare(folder)
            return
        answer = self.client.call("/model_info" if check == "version" else "/v1/models")
        if isinstance(answer, Failure):
            raise _Unreachable(f"the server does not say what it serves: {answer.why}")
        if check == "version":
            found, wanted = answer.get("weight_version") if isinstance(answer, dict) else None, _fill(LABEL, names)
        else:
            entries = answer.get("data") if isinstance(answer, dict) else None
            known = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
            ids = {entry["id"]: entry.get("root") for entry in known if isinstance(entry.get("id"), str)}
            wanted = folder if check == "root" else _fill(self.reload.id, names)
            found = ids.get(self.model) if check == "root" else (wanted if wanted in ids else sorted(ids))
        if found != wanted:
            raise SettingError(f"after the reload the server says {check} {found!r} and not {wanted!r}: see its log")

    def _compare(self, folder: str) -> None:
        """The served model's log-probabilities of a fixed short prompt against the folder's."""
        import torch

        from mcts.engines.model import load_policy

        policy = load_policy(folder)
        size = min(policy.model.get_output_embeddings().weight.shape[0], len(policy.tokenizer))
        ids = [(7919 * i + 13) % size for i in range(1, 17)]
        body = {
            "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1,
            "add_special_tokens": False,
        }  # fmt: skip
        answer = self.client.call("/v1/completions", body)
        if isinstance(answer, Failure):
            raise _Unreachable(f"the server could not score a prompt to prove its weights: {answer.why}")
        try:
            served = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
            gaps = []
            with torch.inference_mode():
                rows = torch.log_softmax(policy.unembed(policy.hidden(torch.tensor([ids])))[0].float(), -1)
            for i, value in enumerate(served):
                gaps.append(abs(float(rows[i, ids[i + 1]]) - float(value)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SettingError(
                "the server does not score prompts (echo with logprobs), so its weights cannot be proved: set "
                "engine.server.reload.check to root, id or version"
            ) from error
        worst = max((math.inf if math.isnan(gap) else gap for gap in gaps), default=math.inf)
        if len(gaps) != len(ids) - 1 or not worst <= self.reload.tolerance:
            raise SettingError(
                f"after the reload the served log-probabilities differ from {folder} by {worst:.3g} nats: the server "
                "serves other weights"
            )


def label(path: str, version: int) -> str:
    """What SGLang calls the weights of `path` once they were loaded."""
    return str(_fill(LABEL, _names(path, version)[1]))


def _names(path: str, version: int) -> tuple[str, dict[str, str]]:
    """The folder that a server is to load, and what `{path}` and `{version}` stand for."""
    root = Path(path)
    folder = str((root / "policy" if (root / "policy").is_dir() else root).absolute())
    return folder, {"path": folder, "version": str(version)}


def _fill(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with `{path}` and `{version}` replaced in every text inside it."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, Mapping):
        return {key: _fill(item, names) for key, item in value.items()}
    return value
