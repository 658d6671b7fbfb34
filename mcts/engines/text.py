"""Text to tokens and back, and which tokens end a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mcts.engines.model import Policy
from mcts.engines.torch_rows import DELIMITER, EOS, RUNNING
from mcts.types import Int32, Message

Codes = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]

_TEXTS = 65536
"""Decoded steps remembered; the memory is emptied when full."""


class Codec:
    """A policy's tokenizer and its step delimiter.

    `delimiter` is encoded to the sequence `delimiter_ids`; a step also ends at any single token whose text ends
    with the delimiter (byte-pair vocabularies hold tokens such as ".\\n\\n").
    """

    def __init__(self, policy: Policy, delimiter: str) -> None:
        self._tokenizer = policy.tokenizer
        self._unknown = policy.tokenizer.unk_token_id
        ids = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
        if not delimiter or not ids or self._unknown in ids:
            raise ValueError(f"the tokenizer cannot write the step delimiter {delimiter!r}: choose another one")
        if not policy.eos_ids:
            raise ValueError("the model has no EOS token: set eos_token in its tokenizer")
        if self._unknown in policy.eos_ids:
            self._unknown = None  # GPT-2 has one token for both
        self.delimiter_ids: Int32 = np.asarray(ids, dtype=np.int32)
        self.long = len(ids) > 1
        """Whether the delimiter is longer than one token."""
        size = policy.model.get_output_embeddings().weight.shape[0]
        self._codes: Codes = np.full(size, RUNNING, dtype=np.int8)
        texts = policy.tokenizer.batch_decode([[i] for i in range(min(size, len(policy.tokenizer)))])
        for i, text in enumerate(texts):
            if text.endswith(delimiter):
                self._codes[i] = DELIMITER
        if not self.long:
            self._codes[ids] = DELIMITER
        self._codes[list(policy.eos_ids)] = EOS
        self._texts: dict[bytes, str] = {}
        self._backend = getattr(policy.tokenizer, "backend_tokenizer", None)
        """The Rust tokenizer, several times faster than the wrapper around it."""

    def codes(self, tokens: Int64) -> Codes:
        """Per token: DELIMITER or EOS where it ends a step by itself, else RUNNING."""
        return self._codes[tokens]

    def long_codes(self, codes: Codes, tokens: Int32, rows: Int64, at: Int64, base: Int64) -> Codes:
        """`codes` with DELIMITER where tokens[rows] end, at column `at`, in a delimiter of several tokens that lies
        wholly inside the step that starts at column `base`."""
        ids = self.delimiter_ids
        columns = at[:, None] + np.arange(1 - len(ids), 1)
        hit = (tokens[rows[:, None], np.maximum(columns, 0)] == ids).all(1) & (columns[:, 0] >= base)
        return np.where((codes == RUNNING) & hit, np.int8(DELIMITER), codes)

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt as it will be sent, int32 [P]; ValueError where it is empty or not writable."""
        if isinstance(prompt, str):
            try:
                ids = self._tokenizer(prompt)["input_ids"]
            except Exception as error:
                if type(error) is not Exception:  # what the tokenizers library raises for a word it does not know
                    raise
                raise ValueError(f"the prompt {prompt!r} holds words that the tokenizer does not know") from error
        elif getattr(self._tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template: give the prompt as text")
        else:
            messages = [dict(message) for message in prompt]
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        if self._unknown is not None and self._unknown in ids:
            raise ValueError(f"the prompt {prompt!r} holds words that the tokenizer does not know")
        return np.asarray(ids, dtype=np.int32)

    def decode(self, token_ids: Int32) -> str:
        """The text of token ids, special tokens left out."""
        key = token_ids.tobytes()
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= _TEXTS:
                self._texts.clear()
            text = self._texts[key] = self._text(token_ids.tolist())
        return text

    def _text(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
