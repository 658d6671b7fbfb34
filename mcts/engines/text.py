"""Text to tokens and back, and which tokens end a step.

**Where a step ends.** A step ends with the first drawn token at which its text (the decoded tokens of this step,
special tokens left out) holds the delimiter. Byte-pair vocabularies merge a delimiter into other tokens, so such a
token may carry text beyond it ("\\n\\n" inside "\\n\\n\\n" or "\\n\\n-"), and the delimiter may be put together from
several ("." + "\\n\\n", "\\n" + "\\n"). The whole token belongs to the step that drew it: ids are kept as drawn, never
split nor encoded again, and the next step begins with the token after it. Three cases that this decides:

- What was drawn before the step (the prompt, the steps above it) completes no delimiter.
- A step is never blank: where the delimiter is white space, it ends a step only after some other text. Blank text in
  front of a step belongs to that step.
- Inside a thinking block a step ends as anywhere else; its tags are text like any other, unless the tokenizer calls
  them special.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mcts.engines.model import ModelError, Policy
from mcts.engines.prompt_ids import chat_ids
from mcts.engines.torch_rows import DELIMITER, EOS, RUNNING
from mcts.types import Int32, Message

Codes = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]

_TEXTS = 65536
"""Decoded steps remembered; the memory is emptied when full."""
_BROKEN = "\ufffd"
"""How a part of a character decodes."""


class Codec:
    """A policy's tokenizer and its step delimiter (see the module on where a step ends).

    Raises ModelError for a delimiter that the tokenizer cannot write, and for a model without an EOS token or with one
    that it has no output for.
    """

    def __init__(self, policy: Policy, delimiter: str) -> None:
        self._tokenizer = policy.tokenizer
        self._unknown = policy.tokenizer.unk_token_id
        self._backend = getattr(policy.tokenizer, "backend_tokenizer", None)
        """The Rust tokenizer, several times faster than the wrapper around it."""
        self._encoder: Any = self._backend if _adds_nothing(type(policy.tokenizer)) else None
        self._texts: dict[bytes, str] = {}
        self.delimiter = delimiter
        ids = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
        if not delimiter or not ids or self._unknown in ids:
            raise ModelError(f"the tokenizer cannot write the step delimiter {delimiter!r}: choose another one")
        eos_ids = policy.eos_ids
        if not eos_ids:
            raise ModelError("the model has no EOS token: set eos_token in its tokenizer")
        if self._unknown in eos_ids:
            self._unknown = None  # GPT-2 has one token for both
        self.delimiter_ids: Int32 = np.asarray(ids, dtype=np.int32)
        """The delimiter as the tokenizer writes it; the policy may draw it in other ways."""
        size = policy.model.get_output_embeddings().weight.shape[0]
        if max(eos_ids) >= size:
            raise ModelError(
                f"the generation config ends a text at token {max(eos_ids)} and the model has {size}: correct its "
                "eos_token_id"
            )
        self._codes: Codes = np.full(size, RUNNING, dtype=np.int8)
        self._may_end = np.zeros(size, dtype=np.bool_)
        """Tokens that may complete a delimiter together with those before them."""
        count = min(size, len(policy.tokenizer))
        last = delimiter[-1]
        marks = (last,) if last.isascii() else (last, _BROKEN)
        for i, (alone, behind) in enumerate(zip(self._pieces(count, None), self._pieces(count, ids[0]), strict=True)):
            if self._ends(alone):
                self._codes[i] = DELIMITER
            elif any(mark in behind for mark in marks):
                self._may_end[i] = True
        self._codes[list(eos_ids)] = EOS
        self._may_end[list(eos_ids)] = False
        self.long = bool(self._may_end.any())
        """Whether a step may end at a token that would not end it alone: `long_codes` has to be asked."""

    def _pieces(self, count: int, behind: int | None) -> list[str]:
        """The texts of tokens 0 to count - 1, each decoded alone or as it continues the token `behind`."""
        first = [] if behind is None else [behind]
        skip = 0 if behind is None else len(self._decode([[behind]])[0])
        return [text[skip:] for text in self._decode([[*first, i] for i in range(count)])]

    def _ends(self, text: str) -> bool:
        """Whether a step of this text has ended."""
        return self.delimiter in (text if self.delimiter.strip() else text.lstrip())

    def codes(self, tokens: Int64) -> Codes:
        """Per token: EOS, DELIMITER where it ends a step by itself, else RUNNING."""
        return self._codes[tokens]

    def long_codes(self, codes: Codes, tokens: Int32, rows: Int64, at: Int64, base: Int64) -> Codes:
        """`codes` with DELIMITER where tokens[rows], drawn up to column `at` by a step that starts at column `base`,
        end a step only together."""
        ask = np.flatnonzero((codes == RUNNING) & self._may_end[tokens[rows, at]])
        if not len(ask):
            return codes
        codes = codes.copy()
        steps = [tokens[rows[i], base[i] : at[i] + 1].tolist() for i in ask]
        codes[ask[[self._ends(text) for text in self._decode(steps)]]] = DELIMITER
        return codes

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt as it will be sent, int32 [P]: text as the tokenizer encodes it (with its BOS token,
        where it has one), messages through the chat template, up to where the assistant's turn begins.

        ValueError where it is empty or cannot be written.
        """
        if isinstance(prompt, str):
            try:
                ids = self._plain(prompt)
            except Exception as error:
                if type(error) is not Exception:  # what the tokenizers library raises for a word it does not know
                    raise
                raise ValueError(f"the prompt {prompt!r} holds words that the tokenizer does not know") from error
        else:
            ids = chat_ids(self._tokenizer, prompt)
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        if self._unknown is not None and self._unknown in ids:
            raise ValueError(f"the prompt {prompt!r} holds words that the tokenizer does not know")
        return np.asarray(ids, dtype=np.int32)

    def _plain(self, prompt: str) -> list[int]:
        """Token ids of a text, by the Rust tokenizer itself where the wrapper adds nothing."""
        rust = self._encoder
        direct = rust is not None and rust.truncation is None and rust.padding is None
        ids: list[int] = rust.encode(prompt).ids if direct else self._tokenizer(prompt)["input_ids"]
        return ids

    def decode(self, token_ids: Int32) -> str:
        """The text of token ids, special tokens left out."""
        key = token_ids.tobytes()
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= _TEXTS:
                self._texts.clear()
            text = self._texts[key] = self._decode([token_ids.tolist()])[0]
        return text

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        found: Any
        if self._backend is not None:
            found = self._backend.decode_batch(sequences, skip_special_tokens=True)
        else:
            found = self._tokenizer.batch_decode(
                sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return list(map(str, found))


def _adds_nothing(kind: type) -> bool:
    """Whether a kind of tokenizer leaves encoding to the Rust tokenizer as transformers' own wrapper does."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "set_truncation_and_padding")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)
