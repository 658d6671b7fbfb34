"""The answer in a model's text, taken from its final answer marker and from nowhere else.

Rules, in this order; the first whose marker is there decides, and a later one is not tried:
1. Only what follows the last `</think>` counts; a thinking block that is not closed has no answer behind it.
2. Of that, only what follows the last "final answer" or "Final Answer:", if a marker follows it.
3. `boxed`: `\\boxed{...}` (`\\fbox`), braces balanced. Boxes that differ are no answer, unless nothing but
   commas, "and", "or" joins them: then they are one list (`boxes`). A box that is cut off is no answer.
4. `####`: the rest of its line.
5. `phrase`: "the answer is ..." or "Answer: ...", up to the end of the sentence.
Several different candidates for one marker are no answer, and neither are a box and a `####` that differ: a model must
not win by naming many. For `number` and `choice` the answer must hold exactly one number or letter, and where it is
taken out of a sentence, no word beside it may change it (`not 18`, `half of 18`, `18 times two`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mcts.verify.choice import read_choice
from mcts.verify.doubt import doubtful
from mcts.verify.number import read_number

KINDS = ("math", "number", "choice", "exact")
MAX_ANSWER = 2000
"""Longest answer, in characters."""
MAX_BOXES = 50
"""Boxes that are looked at; more are no answer."""

_THOUGHT_ENDS = ("</think>", "</thinking>", "<|end_of_thought|>")
_THOUGHT_STARTS = ("<think>", "<thinking>", "<|begin_of_thought|>")
_FINAL = re.compile(r"\bfinal\s+answer\b", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswer\s*(?:\*\*\s*)?(?:(?:is|are)(?!\w)|=|:|(?=\$|\\\(|\\\[))(?:\s*(?:\*\*|:))*"
    r"\s*(?:(?:therefore|thus|simply|just|for sure|definitely|clearly|option|choice)\s+)?",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_JOINT = re.compile(
    r"(?:\s|\$|\\\(|\\\)|\\\[|\\\]|,|;|\\[,;: !]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)?\s*\}|\band\b|\bor\b)*"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?"
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|<\|")
_HOPE = re.compile(r"[.,]?(?<!\s)\s*I hope (?:it|this) is correct.*", re.IGNORECASE | re.DOTALL)
_NUMBERS = re.compile(
    r"(?<![\w.])[-−]?\s?\$?\s?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\s+\d+/\d+|\d+/\d+|\d*\.?\d+(?:[eE][+-]?\d+)?)(?:\s?\\?%)?(?![\d/_]|\.\.|[A-Za-z]\d|(?![ghlmsL])[A-Za-z]\b)"
)
"""Not part of `0x12`, `52_8`, `3x4`, and no `5k` or `2x`; a unit of one letter may follow."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """An answer and the rule that found it."""

    answer: str
    rule: str
    """`boxed`, `boxes`, `####` or `phrase`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """No answer, and why, as the end of a sentence."""

    why: str
    marked: bool
    """Was there an answer marker at all?"""


def extract(text: str, kind: str) -> Extracted | None:
    """The answer that `text` gives, None where it gives none or several. `kind` is one of KINDS. Time grows in
    proportion to the text's length, whatever it holds."""
    found = find_answer(text, kind)
    return found if isinstance(found, Extracted) else None


def find_answer(text: str, kind: str) -> Extracted | Refusal:
    """As `extract`, with the reason where there is no answer."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind of answer {kind!r}: choose one of {', '.join(KINDS)}")
    end, start = _last(text, _THOUGHT_ENDS), _last(text, _THOUGHT_STARTS)
    if start > end:
        return Refusal("the thinking block is not closed", marked=False)
    text = text[end:] if end >= 0 else text
    finals = list(_FINAL.finditer(text))
    if finals:
        # the phrase itself stays in: "final answer is ..." and "Final Answer:" are markers
        region = text[finals[-1].start() :]
        found = _by_marker(region, kind)
        if isinstance(found, Extracted) or found.marked:
            return found
    return _by_marker(text, kind)


def _last(text: str, words: tuple[str, ...]) -> int:
    """Where the last of `words` ends, -1 where there is none."""
    return max((at + len(word) for word in words if (at := text.rfind(word)) >= 0), default=-1)


def _by_marker(text: str, kind: str) -> Extracted | Refusal:
    boxed = _boxes(text)
    hashed = _different([_line(part) for part in text.split("####")[1:][-MAX_BOXES:]])
    if boxed is not None:
        if isinstance(boxed, Extracted) and hashed and hashed != [_squeezed(boxed.answer)]:
            return Refusal("the box and the #### line differ", marked=True)
        return _typed(boxed, kind) if isinstance(boxed, Extracted) else boxed
    if hashed:
        if len(hashed) > 1:
            return Refusal("several #### lines differ", marked=True)
        return _typed(Extracted(hashed[0], "####"), kind)
    starts = [match.end() for match in _PHRASE.finditer(text)]
    phrases = _different([_sentence(text, start) for start in starts[-MAX_BOXES:]])
    if not phrases:
        return Refusal("there is no answer marker", marked=False)
    typed = [_typed(Extracted(phrase, "phrase"), kind) for phrase in phrases]
    answers = _different([found.answer for found in typed if isinstance(found, Extracted)])
    if len(answers) > 1:
        return Refusal("several answers are named", marked=True)
    return typed[-1]


def _boxes(text: str) -> Extracted | Refusal | None:
    """What the boxes of a text say together; None where there is none."""
    boxes: list[tuple[int, int, str]] = []  # start, end, content
    position = 0
    for match in _BOX.finditer(text):
        if match.start() < position:
            continue  # inside the box before it
        if len(boxes) == MAX_BOXES:
            return Refusal(f"there are more than {MAX_BOXES} boxes", marked=True)
        content = _braced(text, match.end())
        if content is None:
            return Refusal("a box is not closed", marked=True)
        position = match.end() + len(content) + 2 if text[match.end() : match.end() + 1] == "{" else match.end() + 1
        inner = content
        while (nested := _BOX.match(inner.strip())) is not None:
            core = _braced(inner.strip(), nested.end())
            if core is None or nested.end() + len(core) + 2 != len(inner.strip()):
                break
            inner = core
        boxes.append((match.start(), position, inner.strip()))
    if not boxes:
        return None
    if len({_squeezed(content) for _, _, content in boxes}) == 1:
        return _answer(boxes[-1][2], "boxed")
    first = len(boxes) - 1
    while first > 0 and _JOINT.fullmatch(text[boxes[first - 1][1] : boxes[first][0]][:200]):
        first -= 1
    if first > 0:
        return Refusal("several boxes differ", marked=True)
    return _answer(", ".join(content for _, _, content in boxes), "boxes")


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that open at `start`, or the one character there; None where they do not close."""
    if text[start : start + 1] != "{":
        return text[start : start + 1] or None
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : match.start()]
        if match.start() - start > MAX_ANSWER:
            return None
    return None


def _answer(answer: str, rule: str) -> Extracted | Refusal:
    if not answer:
        return Refusal("the marker is followed by nothing", marked=True)
    if len(answer) > MAX_ANSWER:
        return Refusal(f"the answer is longer than {MAX_ANSWER} characters", marked=True)
    return Extracted(answer, rule)


def _line(text: str) -> str:
    return _HOPE.sub("", text[: MAX_ANSWER + 1].lstrip().partition("\n")[0].partition("<|")[0]).strip()


def _sentence(text: str, start: int) -> str:
    """The rest of the sentence at `start`; a full stop inside a number or a formula does not end it."""
    piece = text[start : start + MAX_ANSWER + 1].lstrip()
    math = re.match(r"\$\$?([^$]+)\$\$?|\\\[(.+?)\\\]|\\\((.+?)\\\)", piece, re.DOTALL)
    if math is not None:
        rest = piece[math.end() :]
        ended = _SENTENCE_END.search(rest)
        return (math[0] + (rest[: ended.start()] if ended else rest)).strip(" *")
    ended = _SENTENCE_END.search(piece)
    return _HOPE.sub("", piece[: ended.start()] if ended else piece).strip(" *:")


def _typed(found: Extracted, kind: str) -> Extracted | Refusal:
    """The answer as its kind needs it: one number, one letter, one formula."""
    answer = found.answer
    if not answer:
        return Refusal("the marker is followed by nothing", marked=True)
    if kind == "number" and read_number(answer, comma=True, loose=True) is None:
        numbers = _different([match[0].strip() for match in _NUMBERS.finditer(answer)][:MAX_BOXES])
        if len(numbers) != 1:
            return Refusal("no number is named" if not numbers else "several numbers are named", marked=True)
        if found.rule == "boxed" or found.rule == "boxes":
            return found  # a box holds the answer and nothing else: the verifier judges it as it stands
        if doubtful(answer, numbers[0]):
            return Refusal("the words around the number change it", marked=True)
        return Extracted(numbers[0], found.rule)
    if kind == "choice":
        letter = read_choice(answer, "ABCDEFGHIJ")
        if letter is None and found.rule == "phrase":
            named = re.findall(r"(?<![\w'])\(?([A-J])\)?(?![\w'])", answer)
            letter = named[0] if len(set(named)) == 1 and not doubtful(answer, named[0]) else None
        if letter is None:
            return Refusal("not one option is named", marked=True)
        return Extracted(letter, found.rule)
    if kind == "math" and found.rule == "phrase":
        formula = _formula(answer)
        if formula != answer and doubtful(_FORMULA.sub(r" \1\2\3 ", answer), formula):
            return Refusal("the words around the formula change it", marked=True)
        return Extracted(formula, found.rule)
    return found


_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def _formula(sentence: str) -> str:
    """What a sentence says in the end: its one formula, what stands behind its last "is", or its one number. The
    sentence itself where none of these is there."""
    formulas = _FORMULA.findall(sentence)
    if len(formulas) == 1 and not re.search(r"\d", _FORMULA.sub("", sentence)) and not re.search(r"\bis\b", sentence):
        return str(next(part for part in formulas[0] if part)).strip()
    said = re.split(r"\b(?:is|are|equals)\b:?", sentence)[-1].strip()
    if said and said != sentence:
        return _formula(said)
    if not formulas and len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", sentence)) > 2:
        numbers = _different([match[0].strip() for match in _NUMBERS.finditer(sentence)][:MAX_BOXES])
        if len(numbers) == 1:
            return numbers[0]
    return sentence


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _different(answers: list[str]) -> list[str]:
    """The answers that differ by more than white space, in order; empty ones left out."""
    seen: dict[str, str] = {}
    for answer in answers:
        if answer:
            seen.setdefault(_squeezed(answer), answer)
    return list(seen.values())
