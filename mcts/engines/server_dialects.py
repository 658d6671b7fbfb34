"""What kinds of OpenAI-compatible servers take beside the common fields, and do in their own way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server (docs/SERVER.md)."""

    fields: Mapping[str, Any]
    """Sent with every call. A server takes the model's generation_config.json as defaults: whatever bends the
    distribution is set to neutral."""
    single: bool = False
    """A call asks for one sample: all n would be drawn from the one seed, equal to the last token, and cached tokens be
    reported as the first of them filled the cache."""
    scaled: bool = False
    """Log-probabilities are those under the request's temperature, where the model's own are asked for."""
    stop_ids: bool = False
    """It takes ids of tokens to stop at. By itself a server stops at the EOS of the model's generation config, and not
    where a turn of the chat template ends with another token."""
    stop_pattern: bool = False
    """It looks for a stop text in as many last tokens as its tokenizer writes it with, and one; for a pattern in as
    many as it has characters, and one. Drawn tokens may write the delimiter with more pieces."""

    def stops(self, delimiter: str, eos_ids: Iterable[int]) -> dict[str, Any]:
        """The fields that say where a step ends."""
        found: dict[str, Any] = {"stop": [delimiter]}
        if self.stop_ids:
            found["stop_token_ids"] = sorted(eos_ids)
        if self.stop_pattern:
            found["stop_regex"] = [re.escape(delimiter)]
        return found


_NEUTRAL = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
DIALECTS: Mapping[str, Dialect] = {
    "vllm": Dialect({**_NEUTRAL, "add_special_tokens": False}, stop_ids=True),
    "sglang": Dialect(_NEUTRAL, single=True, scaled=True, stop_ids=True, stop_pattern=True),
    "openai": Dialect({}),
}
