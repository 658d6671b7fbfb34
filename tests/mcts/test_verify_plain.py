# ruff: noqa: E501 - tables of pairs read best in long lines
"""Verifiers by name, and those that need no worker: numbers, letters, words."""

from __future__ import annotations

import pytest

from mcts.types import SettingError, Status
from mcts.verify import VERIFIERS, Verifier, VerifierSettingError, load_verifier
from mcts.verify.choice import ChoiceVerifier
from mcts.verify.number import NumberVerifier, read_number
from mcts.verify.text import TextVerifier


def test_every_registered_verifier_loads_and_names_itself() -> None:
    for name in VERIFIERS:
        assert load_verifier(name).name == name


def test_a_dotted_path_loads_a_users_class() -> None:
    verifier: Verifier = load_verifier("mcts.verify.number.NumberVerifier", partial=0.1)
    assert verifier.verify("18", "17").reward == 0.1


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("mth", {}, "there is no verifier 'mth': did you mean 'math'"),
        ("number", {"partail": 0.1}, "verifier 'number' has no setting 'partail': did you mean 'partial'"),
        ("number", {"partial": 2}, "partial is the reward"),
        ("choice", {"letters": "aa"}, "letters are different capitals"),
        ("no_such.Thing", {}, "no module 'no_such'"),
    ],
)
def test_a_wrong_name_or_setting_is_one_sentence(name: str, settings: dict[str, object], match: str) -> None:
    with pytest.raises(VerifierSettingError, match=match) as refusal:
        load_verifier(name, **settings)
    assert isinstance(refusal.value, SettingError)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [("-3", "-3.0"), ("+7", "7"), ("1000.99", "$1,000.99"), ("1000.99", "1000,99"), ("0.111", "0,111"), ("18", "18 eggs"),
     ("5000", "5 thousand"), ("7/2", "3.5"), ("18", "18 m²"), ("72", "7.2e1"),
     ("-18", "negative 18"), ("-18", "minus 18"), ("18 N", "18 N"), ("18 N", "18"), ("5", "$5"), ("5 p.m.", "5 PM"), ("5 p.m.", "5"), ("200000", "2 hundred thousand")],
)  # fmt: skip
def test_equal_numbers_are_correct(gold: str, prediction: str) -> None:
    assert NumberVerifier().verify(gold, prediction).status is Status.CORRECT


@pytest.mark.parametrize(
    ("gold", "prediction", "status"),
    [("-3", "3", "wrong"), ("18", "81", "wrong"), ("5 km", "5 cm", "wrong"), ("18", "18 or 19", "unparsable"),
     ("18", "x", "unparsable"), ("x", "x", "unparsable"), ("18", "2 pi", "unparsable"), ("18", "18 squared", "unparsable"), ("18", "18 K", "wrong"),
     ("18", "18 dozens", "wrong"), ("$5", "€5", "wrong"), ("5 p.m.", "5 AM", "wrong"), ("0", "0x12", "unparsable"), ("52", "52_8", "unparsable"), ("3", "3 sixteenths", "unparsable"), ("18", "18 degrees below zero", "unparsable"), ("18", "minus 18", "wrong")],
)  # fmt: skip
def test_other_numbers_are_not(gold: str, prediction: str, status: str) -> None:
    verdict = NumberVerifier(partial=0.1).verify(gold, prediction)
    assert verdict.status == status
    assert verdict.reward == (0.1 if status == "wrong" else 0.0)


@pytest.mark.parametrize("text", ["1e401", "9" * 401, "1/0", "1/2/3", "32, 349", "2k", "3 m", "17=18", "", "1.2.3"])
def test_what_is_no_plain_number_is_not_read(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "prediction", "status"),
    [("C", "(C) Cecile", "correct"), ("(D) Alina", "D", "correct"), ("B", "b.", "correct"), ("A", "C", "wrong"),
     ("A", "A or B", "unparsable"), ("A", "A dog", "unparsable"), ("F", "F", "unparsable"), ("D", "D. it can't be A or B", "correct"),
     ("B", "(B) is incorrect", "unparsable"), ("B", "B: not this one", "unparsable"), ("B", "(B) Not enough is known", "correct")],
)  # fmt: skip
def test_choices(gold: str, prediction: str, status: str) -> None:
    assert ChoiceVerifier().verify(gold, prediction).status == status


@pytest.mark.parametrize(
    ("gold", "prediction", "status"),
    [("the Cat.", "The  cat", "correct"), ("cat", "cats", "wrong"), (r"\text{east}", "East", "correct"), ("$x$ axis", "x axis", "correct"), ("$ 5 $", "5", "correct"),
     ("$5", "5", "wrong"), ("$5", "$5", "correct"), ("$5 and $6", "5 and 6", "wrong"), ('"."', "x", "unparsable")],
)  # fmt: skip
def test_words(gold: str, prediction: str, status: str) -> None:
    assert TextVerifier().verify(gold, prediction).status == status


@pytest.mark.parametrize(
    "text",
    ["B, A", "B A", "(B) A", "B: A", "b, c", "B,c", "B - A", "B\n\nA", r"\text{B, A}", "B, maybe A", "B; a"],
)
def test_a_second_option_is_heard_in_small_letters_and_where_it_could_be_a_word(text: str) -> None:
    assert ChoiceVerifier().verify("B", text).status is Status.UNPARSABLE


@pytest.mark.parametrize("text", ["(B) a dog", "B. A dog and a cat", "B) x", "(B) 5 a day", "B, not A", "B: I think"])
def test_words_of_an_option_are_no_second_one(text: str) -> None:
    assert ChoiceVerifier().verify("B", text).status is Status.CORRECT


@pytest.mark.parametrize("text", ["5 millionths", "5 billionth", "5 doubled", "5 tripled", r"5\text{ trillionths}"])
def test_a_word_that_scales_a_number_is_no_unit(text: str) -> None:
    assert NumberVerifier().verify("5", text).status is Status.UNPARSABLE


@pytest.mark.parametrize(("gold", "prediction"), [("0.5", "½"), ("3.5", "3½"), ("3/4", "¾"), ("14916", "14 {, }916")])
def test_fractions_in_one_character_and_wide_separators_are_numbers(gold: str, prediction: str) -> None:
    assert NumberVerifier().verify(gold, prediction).status is Status.CORRECT
