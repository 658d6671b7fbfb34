"""Steps of a text, and what of it is an answer: the part after a thinking block."""

from __future__ import annotations


def split_text(text: str, delimiter: str) -> list[str]:
    """Cut a text after each delimiter; the pieces joined are the text.

    No step is blank: a blank line goes to the step before it, or at the start to the step after it (a run of
    delimiters is often one token, so the policy draws it as the end of one step). A thinking block is cut like
    everything else; its tags hold no delimiter. A text that is blank altogether is one step, an empty one none.
    """
    steps: list[str] = []
    start = 0
    while start < len(text):
        at = text.find(delimiter, start)
        end = len(text) if at < 0 else at + len(delimiter)
        piece = text[start:end]
        if steps and (not piece.strip() or not steps[-1].strip()):
            steps[-1] += piece
        else:
            steps.append(piece)
        start = end
    return steps


def after_thinking(text: str, tags: tuple[str, str] | None) -> str | None:
    """The text after the last closing tag (the opening one may stand in the prompt), or all of a text without tags.
    None: a block was opened and not closed, so there is no answer yet."""
    if tags is None:
        return text
    opening, closing = tags
    _, closed, rest = text.rpartition(closing)
    if opening in rest:
        return None
    return rest if closed else text
