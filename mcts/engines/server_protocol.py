"""What is asked of an OpenAI-compatible `/v1/completions`, and whether that is what came back.

Servers leave out what they do not know and say nothing (`n`, `logprobs`, `stop`), so every answer is checked; the
first thing that is missing is named in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcts.engines.server_asked import Asked, Begun, Omission, OtherWeights, numbered, shown
from mcts.engines.server_dialects import DIALECTS
from mcts.engines.server_reading import ending
from mcts.engines.server_text import Text
from mcts.rng import hash64
from mcts.types import Float32, Request, Step

SEED_BITS = 53
"""Integers that every JSON reader keeps. Sample i is drawn from seed + i, as vLLM does."""


@dataclass(frozen=True, slots=True)
class Drew:
    """What a checked answer holds."""

    steps: tuple[Step | Begun, ...]  # [n], in sample order, without values
    prompt: int
    """Prefix tokens that the server forwarded."""
    cached: int
    drawn: int
    """Tokens that the call drew."""


def payload(
    request: Request, asked: Asked, text: Text, dialect: str, written: str | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON body of a call of a request. `written`: the prefix as text, None to send its token ids."""
    seed, kind = request.seed, DIALECTS[dialect]
    if asked.begun.token_ids:  # other random numbers than those that the step began with
        seed = hash64(seed, asked.first, len(asked.begun.token_ids))
    return {
        "model": asked.model,
        "prompt": list(asked.prefix) if written is None else written,
        "n": asked.n,
        "max_tokens": asked.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": (seed & ((1 << SEED_BITS) - 1)) + asked.first,
        **kind.stops(text.delimiter, text.eos_ids),
        "logprobs": 1,
        "stream": False,
        **kind.fields,
        **extra,
    }


def read(answer: object, asked: Asked, text: Text) -> Drew:
    """The steps in a server's answer. Raises Omission."""
    if not isinstance(answer, dict):
        raise Omission("the server's answer is no JSON object")
    if answer.get("error") and "choices" not in answer:
        raise Omission(f"the server answered with an error: {str(answer['error'])[:300]!r}")
    if answer.get("model") != asked.model:
        raise Omission(
            f"the server answered with model {shown(answer.get('model'))} where {asked.model!r} was asked for"
        )
    _same_weights(answer.get("metadata"), asked.version)
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != asked.n:
        count = len(choices) if isinstance(choices, list) else 0
        raise Omission(
            f"the server returned {count} choices where n={asked.n} was asked for: if it ignores n, set "
            "engine.server.split to true"
        )
    steps = tuple(_step(choice, asked, text) for choice in numbered(choices, asked.n, "the server's choices"))
    drawn = sum(len(step.token_ids) for step in steps) - len(asked.begun.token_ids)
    prompt, cached = _usage(answer.get("usage"), asked, drawn)
    return Drew(steps, prompt - cached, cached, drawn)


def _same_weights(metadata: object, version: str | None) -> None:
    """SGLang names the weights that drew an answer, and each of them where they were changed in its midst."""
    if version is None or not isinstance(metadata, dict):
        return
    parts = metadata.get("weight_versions")
    rows = [metadata, *(parts if isinstance(parts, list) else [])]
    for name in [row.get("weight_version", row.get("version")) for row in rows if isinstance(row, dict)]:
        if name != version:
            raise OtherWeights(
                f"the server drew with weights {shown(name)} where {version!r} were loaded: does another run load "
                "weights into it?"
            )


def _usage(usage: object, asked: Asked, drawn: int) -> tuple[int, int]:
    if not isinstance(usage, dict) or not _count(usage.get("prompt_tokens")):
        raise Omission("the server reports no usage.prompt_tokens, so a cut prompt could not be noticed")
    prompt = int(usage["prompt_tokens"])
    if prompt != len(asked.prefix):
        raise Omission(
            f"the server read a prompt of {shown(prompt)} tokens where {len(asked.prefix)} were sent: it cuts prompts, "
            "adds tokens, or has another tokenizer"
        )
    if usage.get("completion_tokens") != drawn:
        raise Omission(
            f"the server reports {shown(usage.get('completion_tokens'))} drawn tokens but returned {drawn}: tokens are "
            "missing"
        )
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    if cached is None:
        return prompt, 0
    if not _count(cached) or cached > prompt:
        raise Omission(f"the server reports {shown(cached)} cached tokens of a prompt of {prompt}")
    return prompt, int(cached)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _step(choice: Mapping[str, Any], asked: Asked, text: Text) -> Step | Begun:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
        raise Omission("the server returned no logprobs although logprobs=1 was asked for: use a server that has them")
    values = logprobs["token_logprobs"]
    ids = _token_ids(choice, logprobs, text)
    if len(ids) != len(values):
        raise Omission(f"the server returned {len(ids)} token ids with {len(values)} log-probabilities")
    if not 1 <= len(ids) <= asked.max_tokens:
        raise Omission(f"the server returned {len(ids)} tokens where 1 to {asked.max_tokens} were asked for")
    if not all(_real(value) for value in values):
        raise Omission("the server returned a log-probability that is no number of at most 0")
    stop = ending(choice, ids, asked, text)
    every = Begun((*asked.begun.token_ids, *ids), (*asked.begun.logprobs, *values))
    if stop is None:
        return every
    row = np.minimum(np.array(every.logprobs, dtype=np.float32), np.float32(0.0))
    token_ids = np.array(every.token_ids, dtype=np.int32)
    return Step(text.decode(token_ids), token_ids, row, stop, behavior_logprobs=_behavior(row, asked))


def _behavior(row: Float32, asked: Asked) -> Float32 | None:
    """Greedy draws are certain. Under another temperature or top_p no server says what a token's odds were: NaN."""
    if asked.greedy:
        return np.zeros_like(row)
    return np.full_like(row, math.nan) if asked.bent else None


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value <= 1e-3


def _token_ids(choice: Mapping[str, Any], logprobs: Mapping[str, Any], text: Text) -> list[int]:
    """The drawn tokens: as the server returns them, else from how it writes each one where that is exact."""
    given = choice.get("token_ids")
    if given is None:
        tokens = logprobs.get("tokens")
        if not isinstance(tokens, list):
            raise Omission("the server returned neither token_ids nor logprobs.tokens: use a server that has one")
        given = [text.token_of(token) if isinstance(token, str) else None for token in tokens]
        if None in given:
            written = tokens[given.index(None)]
            raise Omission(
                f"the server returned no token ids, and {shown(written)} is not exactly one token of the tokenizer: "
                "use a server with return_token_ids"
            )
    if not isinstance(given, list) or not all(_count(i) and i < text.size for i in given):
        raise Omission(f"the server returned token ids outside the tokenizer's 0 to {text.size - 1}")
    return given
