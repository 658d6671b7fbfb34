"""Where a served step ended, by its tokens, and whether the server's word and text agree.

A step ends at EOS or at the token in which its own text first holds the delimiter. vLLM looks for the delimiter in the
text that its detokenizer gives out, and that is not always the step's own: where the prefix ends inside a character
(bytes that are no whole UTF-8 yet), the detokenizer gives out nothing until the character is whole or proves broken,
and then the text of the **whole prefix** with it. A delimiter in the prefix then ends the step at once. The tokens are
drawn as they should be, there are only too few of them, so the draw goes on behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcts.engines.server_asked import Asked, Omission, shown
from mcts.engines.server_text import Text
from mcts.types import Stop

_BROKEN = "\ufffd"
"""How a part of a character decodes."""


def ending(choice: Mapping[str, Any], ids: Sequence[int], asked: Asked, text: Text) -> Stop | None:
    """Why a choice's step ended; None where it did not, and the server says so because of a delimiter in the prefix.
    A delimiter may end inside the last token: what that token holds behind it stays in the step. Raises Omission."""
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Omission(
            f"the server ended a choice with finish_reason {shown(reason)}, which is neither stop nor length"
        )
    step = [*asked.begun.token_ids, *ids]
    if text.eos_ids.intersection(step[:-1]) or text.delimiter in text.decode(step[:-1]):
        raise Omission("the server drew on behind the end of a step: it ignored stop, or stops on other tokens")
    _agree(choice.get("text"), ids, asked, text)
    full = len(ids) == asked.max_tokens
    if step[-1] in text.eos_ids:
        return Stop.EOS
    if text.delimiter in text.decode(step):
        return Stop.DELIMITER
    if reason == "length" and not full:
        raise Omission(
            f"the server stopped for length after {len(ids)} of {asked.max_tokens} tokens: lower engine.max_context to "
            "what it serves"
        )
    if reason == "stop" and not _found_in_prefix(ids, asked, text):
        raise Omission(
            f"the server returned a choice that ended by stop (stop_reason {shown(choice.get('stop_reason'))}, last "
            f"tokens {list(ids[-2:])}) without the token that ended it: it drops EOS or stop tokens from what it "
            "returns"
        )
    return Stop.LENGTH if full else None


def _found_in_prefix(ids: Sequence[int], asked: Asked, text: Text) -> bool:
    """Whether a server that gives out the prefix's text with the step's finds a delimiter there."""
    if not text.decode(asked.prefix).endswith(_BROKEN):
        return False
    return text.delimiter in text.decode([*asked.prefix, *ids])


def _agree(said: object, ids: Sequence[int], asked: Asked, text: Text) -> None:
    """Raises Omission where the server's text is not that of the tokens."""
    if not isinstance(said, str):
        raise Omission("the server returned a choice without text")
    if _bare(said) not in map(_bare, _readings(ids, asked, text)):
        raise Omission(f"the server's text {said[:40]!r} is not what its tokens say ({text.decode(ids)[:40]!r})")


def _readings(ids: Sequence[int], asked: Asked, text: Text) -> Iterator[str]:
    """The texts that a server may give for tokens, the delimiter dropped or not; behind a prefix that ends inside a
    character also with the rest of that character, or with the whole prefix."""
    own = text.decode(ids)
    yield own.partition(text.delimiter)[0]
    yield own
    prefix = text.decode(asked.prefix)
    if prefix.endswith(_BROKEN):
        both = text.decode([*asked.prefix, *ids])
        for start in (len(prefix.rstrip(_BROKEN)), 0):
            yield both[start:].partition(text.delimiter)[0]
            yield both[start:]


def _bare(text: str) -> str:
    """Without what detokenizers differ in: outer spaces, and characters whose bytes are incomplete."""
    start, end = 0, len(text)
    while start < end and (text[start].isspace() or text[start] == _BROKEN):
        start += 1
    while end > start and (text[end - 1].isspace() or text[end - 1] == _BROKEN):
        end -= 1
    return text[start:end]
