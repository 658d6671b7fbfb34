"""A served model's tokenizer, read from a folder: text to tokens and back without any weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcts.engines.model import read_tokenizer, turn_end
from mcts.engines.prompt_ids import prompt_ids
from mcts.types import Int32, Message, SettingError


class Text:
    """The tokenizer in `folder` (a Hugging Face folder or a checkpoint with `policy/`), loaded at once; nothing is
    downloaded. `delimiter` is the text that ends a step."""

    def __init__(self, folder: str | Path, delimiter: str) -> None:
        root = Path(folder)
        root = root / "policy" if (root / "policy").is_dir() else root
        if not root.is_dir():
            raise SettingError(f"there is no tokenizer folder {root}: give the folder of the served model's tokenizer")
        if not delimiter:
            raise SettingError("the step delimiter is empty: choose a text that ends a step")
        self._tokenizer: Any = read_tokenizer(root)
        self.delimiter = delimiter
        self.size = len(self._tokenizer)
        """Token ids are below this."""
        self.eos_ids = _eos_ids(root, self._tokenizer)
        if not self.eos_ids:
            raise SettingError(f"the tokenizer in {root} has no EOS token: set eos_token in it")
        self._by_text: dict[str, int | None] | None = None

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt as it will be sent, int32 [P]; ValueError where it is empty."""
        ids = prompt_ids(self._tokenizer, prompt)
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        return np.asarray(ids, dtype=np.int32)

    def decode(self, token_ids: Int32 | Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._decode(token_ids, True)

    def plain(self, token_ids: Int32 | Sequence[int]) -> str | None:
        """The text that the server's tokenizer reads as exactly these tokens (special tokens written out), or None
        where there is none such."""
        text = self._decode(token_ids, False)
        again = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if list(again) == [int(i) for i in token_ids] else None

    def token_of(self, text: str) -> int | None:
        """The only token that is written so, None where there is none or more than one."""
        if text.startswith("token_id:") and text[9:].isdecimal():
            return int(text[9:])
        if self._by_text is None:
            found: dict[str, int | None] = {}
            for i in range(self.size):
                written = self._decode([i], False)
                found[written] = None if written in found else i
            self._by_text = found
        return self._by_text.get(text)

    def _decode(self, token_ids: Int32 | Sequence[int], skip: bool) -> str:
        ids = [int(i) for i in token_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def _eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's EOS, the token that closes an assistant's turn in its chat template, and those that the model's
    generation config names."""
    ids = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(given) if isinstance(given, list) else {given}
    return frozenset(int(i) for i in ids if i is not None)
