"""Answers are taken from the final marker, after any thinking, and several candidates are none."""

from __future__ import annotations

import time

import pytest

from mcts.verify.extract import Extracted, Refusal, extract, find_answer


@pytest.mark.parametrize(
    ("text", "kind", "answer", "rule"),
    [
        (r"so \boxed{\frac{1}{2}} it is", "math", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\{1, \{2\}\}}", "math", r"\{1, \{2\}\}", "boxed"),
        (r"\boxed{\boxed{7}}", "math", "7", "boxed"),
        (r"\boxed 7", "math", "7", "boxed"),
        (r"\fbox{7}", "math", "7", "boxed"),
        (r"\boxed{7} and again \boxed{ 7 }", "math", "7", "boxed"),
        (r"\boxed{1} and $\boxed{-2}$", "math", "1, -2", "boxes"),
        ("16 - 3 = 13\n#### 18", "number", "18", "####"),
        ("The answer is 18 dollars.", "number", "18 dollars", "phrase"),
        ("The answer is: **18**.", "number", "18", "phrase"),
        ("The answer is that she earns 18 dollars", "number", "18", "phrase"),
        ("The answer is 18m of rope", "number", "18", "phrase"),
        ("The answer is negative 18.", "number", "negative 18", "phrase"),
        ("The answer is that he sells none, so 18 are left", "number", "18", "phrase"),
        ("The answer is most likely $x=3$", "math", "x=3", "phrase"),
        ("The answer is probably B", "choice", "B", "phrase"),
        ("the answer is $x=3$. I hope it is correct.", "math", "x=3", "phrase"),
        ("The answer is 16386.16.", "math", "16386.16", "phrase"),
        ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "math", "120", "phrase"),
        (r"first \boxed{255}. Final Answer: The final answer is 10455.", "math", "10455", "phrase"),
        (r"<think>\boxed{3}</think>\boxed{4}", "math", "4", "boxed"),
        ("The answer is (B).", "choice", "B", "phrase"),
        ("The answer is for sure D, it can't be A or B", "choice", "D", "phrase"),
        (r"\boxed{\text{(C)}}", "choice", "C", "boxed"),
        ("Answer: the Cat", "exact", "the Cat", "phrase"),
    ],
)
def test_the_final_marker_gives_the_answer(text: str, kind: str, answer: str, rule: str) -> None:
    assert extract(text, kind) == Extracted(answer, rule)


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("it is 18", "number", "no answer marker"),
        ("", "math", "no answer marker"),
        (r"<think>\boxed{3}", "math", "not closed"),
        (r"<think>a</think><think>\boxed{3}", "math", "not closed"),
        (r"<think>\boxed{3}</think> hm", "math", "no answer marker"),
        (r"\boxed{17} then \boxed{18}", "math", "several boxes differ"),
        (r"\boxed{18", "math", "a box is not closed"),
        (r"\boxed{}", "math", "followed by nothing"),
        ("#### 17\n#### 18", "number", "several #### lines differ"),
        ("\\boxed{17}\n#### 18", "number", "differ"),
        ("The answer is 17. The answer is 18.", "number", "several answers"),
        ("The answer is 17 or 18", "number", "several numbers"),
        ("The answer is A or B", "choice", "not one option"),
        ("The answer is A, or B", "choice", "not one option"),
        ("The answer is not 18", "number", "change it"),
        ("#### not 18", "number", "change it"),
        ("The answer is seventeen or 18", "number", "change it"),
        ("The answer is c or B", "choice", "not one option"),
        ("The answer is half of 18.", "number", "change it"),
        ("The answer is one less than 18", "number", "change it"),
        ("The answer is three times 18", "number", "change it"),
        ("The answer is zero, not 18", "number", "change it"),
        ("The answer is that it's negative 18", "number", "change it"),
        ("The answer is 18 times two", "number", "change it"),
        ("The answer is 18 squared", "number", "change it"),
        ("#### 3 quarters", "number", "change it"),
        ("#### 5..6", "number", "no number"),
        ("The answer is 0x12", "number", "no number"),
        ("The answer is 52_8", "number", "no number"),
        ("The answer is 3x4", "number", "no number"),
        ("The answer is 5k", "number", "no number"),
        ("The answer is not $18$.", "math", "change it"),
        ("The answer is twice $18$", "math", "change it"),
        ("The answer is not B", "choice", "not one option"),
        ("The answer is anything but B", "choice", "not one option"),
        ("Answer: B or not B", "choice", "not one option"),
    ],
)
def test_no_marker_or_several_candidates_are_no_answer(text: str, kind: str, why: str) -> None:
    assert extract(text, kind) is None
    found = find_answer(text, kind)
    assert isinstance(found, Refusal)
    assert why in found.why


@pytest.mark.parametrize("kind", ["math", "number", "choice", "exact"])
@pytest.mark.parametrize(
    "text",
    ["answer" + " " * 100_000, ("#### a" + " " * 1990 + "b\n") * 100, "answer is" + " **:" * 50_000],
    ids=["spaces", "lines", "stars"],
)
def test_white_space_without_end_is_read_in_one_pass(text: str, kind: str) -> None:
    began = time.process_time()
    find_answer(text, kind)
    assert time.process_time() - began < 1.0


def test_an_unknown_kind_is_said() -> None:
    with pytest.raises(ValueError, match="no kind of answer 'maths': choose one of math"):
        extract("1", "maths")
