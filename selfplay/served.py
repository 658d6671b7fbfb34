"""From a config to the engine in front of a server."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfplay.config import Config, ReloadConfig, ServerConfig, ValueServiceConfig
from selfplay.errors import UserError

if TYPE_CHECKING:
    from mcts.engines.server import ServerEngine
    from mcts.engines.server_http import Client
    from mcts.engines.server_weights import Reload
    from mcts.tasks.base import Task


def make_server_engine(
    config: Config, policy_folder: Path, value_head: Path | None, version: int, task: Task
) -> ServerEngine:
    """The server engine, its server made to serve the folder's weights where the config says how."""
    from mcts.engines.server import ServerEngine, Service
    from mcts.engines.server_text import Text
    from mcts.engines.server_value import LocalValue, ServedValue

    server = config.engine.server
    assert server is not None  # the config is checked
    head = server.value
    value: ServedValue | LocalValue | None = None
    value_client = None
    if isinstance(head, ValueServiceConfig):
        value = ServedValue(**head.model_dump())
        value_client = _client(server, head.url, config.seed + 1)
    elif head == "local":
        value = LocalValue(policy_folder, value_head, config.model.device, config.model.dtype)
    engine = ServerEngine(
        _client(server, server.url, config.seed),
        Service(server.model, server.dialect, server.prompt, server.split, server.extra),
        Text(server.tokenizer or policy_folder, task.delimiter),
        context=config.engine.max_context,
        kv_slots=config.engine.kv_slots,
        value=value,
        value_client=value_client,
        reload=_reload(server.reload),
        version=version,
    )
    if _reload(server.reload) is not None:
        engine.load(str(policy_folder), version)
    return engine


def _client(server: ServerConfig, url: str, seed: int) -> Client:
    from mcts.engines.server_http import Client, Patience

    key = None
    if server.api_key_env is not None:
        key = os.environ.get(server.api_key_env)
        if not key:
            raise UserError(f"the environment variable {server.api_key_env} is not set: put the server's key into it")
    patience = Patience(
        in_flight=server.in_flight, deadline=server.deadline_seconds, attempts=server.attempts, down=server.down_seconds
    )
    return Client(url, patience, api_key=key, seed=seed)


def _reload(settings: ReloadConfig) -> Reload | None:
    from mcts.engines.server_weights import PRESETS, Reload

    if settings.preset == "none" and not settings.command:
        return None
    base = PRESETS.get(settings.preset, Reload())
    return replace(
        base, command=settings.command, id=settings.id, check=base.check if settings.check is None else settings.check
    )
