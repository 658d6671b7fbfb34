"""The filter language means what it says and evaluates nothing."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfplay.traces import to_row
from selfplay.where import MAX_DEPTH, WhereError, parse_where
from tests.selfplay.trace_samples import context, lost_search, won_search

WON = to_row(won_search(), context(iteration=3))
LOST = to_row(lost_search("it's"), context(iteration=4, group="g"))

TABLE = [
    # expression, true of WON, true of LOST
    ("verdict == 'correct'", True, False),
    ('verdict == "correct"', True, False),
    ("verdict != 'correct'", False, True),
    ("won", True, False),
    ("not won", False, True),
    ("not not won", True, False),
    ("won == false", False, True),
    ("verdict == 'correct' and sampled > 200", False, False),
    ("sampled > 199", False, True),
    ("sampled >= 200", False, True),
    ("sampled < 41 or iteration == 4", True, True),
    ("sampled <= 40", True, False),
    ("40 == sampled", True, False),
    ("sampled > cached", True, True),
    ("discarded == 3", True, False),
    ("usage.prompt == 6", True, False),
    ("prompt == '3 7 12 -> 33 :'", True, True),
    ("won or iteration == 4 and sampled < 0", True, False),
    ("(won or iteration == 4) and sampled < 0", False, False),
    ("not (won or iteration == 4)", False, False),
    ("not won and nodes == 3", False, True),
    ("nodes == 5", True, False),
    ("depth == 2", True, True),
    ("iteration in [1, 3]", True, False),
    ("iteration in (3)", True, False),
    ("iteration not in [1, 3]", False, True),
    ("verdict in ('wrong', 'timeout')", False, True),
    ("'+' in solution", True, False),
    ("'+' not in solution", False, True),
    ("'12' in prompt", True, True),
    ("solution == null", False, True),
    ("solution != null", True, False),
    ("null == group", True, False),
    ("group == 'g'", False, True),
    ("group != 'g'", True, False),
    ("value_version > 0", False, False),
    ("not value_version > 0", True, True),
    ("reward > 0.5", True, False),
    ("reward == 1e0", True, False),
    ("seconds == 1.5", True, False),
    ("seed == -1", True, False),
    ("problem_id == 'it\\'s'", False, True),
    ('problem_id == "it\'s"', False, True),
    ("meta.target == 33", True, True),
    ("meta.target == '33'", False, False),
    ("meta.target != '33'", True, True),
    ("meta.target > 'a'", False, False),
    ("meta.nothing == null", True, True),
    ("meta.nothing.deeper == null", True, True),
    ("meta.numbers == 3", False, False),
    ("settings.temperature < 1", False, True),
    ("settings.budget", False, False),
    ("  won  ", True, False),
    ("won\nor\twon", True, False),
    ("verdict=='correct'and sampled>1", True, False),
]


@pytest.mark.parametrize(("text", "won", "lost"), TABLE, ids=[row[0] for row in TABLE])
def test_expression_selects(text: str, won: bool, lost: bool) -> None:
    predicate = parse_where(text)
    assert (predicate(WON), predicate(LOST)) == (won, lost)


@pytest.mark.parametrize(("text", "won", "lost"), TABLE, ids=[row[0] for row in TABLE])
def test_named_columns_are_all_that_is_read(text: str, won: bool, lost: bool) -> None:
    predicate = parse_where(text)

    def only(row: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for column in predicate.columns:
            name, _, field = column.partition(".")
            if name == "usage":
                kept.setdefault("usage", {})[field] = row["usage"][field]
            elif name == "nodes":
                kept["nodes"] = [{field: node[field]} for node in row["nodes"]]
            else:
                kept[name] = row[name]
        return kept

    assert (predicate(only(WON)), predicate(only(LOST))) == (won, lost)


def test_a_number_beside_a_float32_column_is_rounded_like_it() -> None:
    row = {**WON, "reward": 0.10000000149011612}
    assert parse_where("reward == 0.1")(row)
    assert parse_where("0.1 == reward")(row)
    assert parse_where("reward in [0.2, 0.1]")(row)
    assert not parse_where("reward > 0.1")(row)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verdcit == 'correct'", "did you mean verdict"),
        ("smapled > 3", "did you mean sampled"),
        ("usage.sampld > 3", "did you mean usage.sampled"),
        ("zzzzqqq > 3", "known are"),
        ("nodes.depth > 3", "unknown name"),
        ("path == 3", "unknown name"),
        ("usage == 3", "unknown name"),
        ("", "the end"),
        ("won and", "the end"),
        ("won won", "expected `and`, `or` or the end"),
        ("(won", "expected )"),
        ("won)", "expected `and`, `or` or the end"),
        ("verdict", "compare verdict with something"),
        ("'text'", "compare 'text' with something"),
        ("sampled == ", "the end"),
        ("sampled = 3", "character 9"),
        ("1 < sampled < 3", "expected `and`"),
        ("verdict > 3", "one is a text, the other a number"),
        ("sampled == 'a'", "text needs quotes"),
        ("won == 1", "one is a bool"),
        ("reward > null", "no order"),
        ("won > false", "no order"),
        ("sampled in ['a']", "may hold no text"),
        ("sampled in 3", "only text can lie in text"),
        ("verdict in []", "expected a quoted string"),
        ("verdict in ['a'", "expected ]"),
        ("verdict in ['a')", "expected ]"),
        ("verdict not 'a'", "expected in"),
        ("verdict == 'open", "expected a name"),
        ("verdict == 'a\\n'", "expected a name"),
        ("sampled > 1e999", "too large"),
        ("sampled > 1.2.3", "expected a name"),
        ("sampled > 3x", "expected a name"),
        ("sampled > " + "9" * 41, "expected a name"),
        ("sampled + 1 > 3", "expected a name"),
        ("__import__('os').system('true')", "unknown name"),
        ("won.__class__ == 'x'", "unknown name"),
        ("lambda: 1", "unknown name"),
        ("verdict == 'a'; import os", "expected a name"),
        ("won if won else won", "expected `and`"),
        ("[x for x in verdict]", "expected"),
        ("\x00", "expected a name"),
        ("ｗｏｎ", "expected a name"),
        ("(" * 1000 + "won" + ")" * 1000, f"more than {MAX_DEPTH} nested"),
        ("not " * 900 + "won", f"more than {MAX_DEPTH} nested"),
        ("won or " * 1000 + "won", "shorten it"),
    ],
)
def test_what_is_no_filter_is_refused_with_what_to_do(text: str, message: str) -> None:
    with pytest.raises(WhereError, match=re.escape(message)) as raised:
        parse_where(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_many_conditions_side_by_side_are_no_depth() -> None:
    assert parse_where(" or ".join(["not won"] * 200 + ["won"]))(WON)
    assert parse_where("(won) and " * 200 + "won")(WON)


@settings(deadline=None)
@given(st.text("won sampledverict=<>!()[],'\"\\.0123e-+\n\x00é{}%", max_size=40))
def test_no_text_does_more_than_parse_or_be_refused(text: str) -> None:
    with contextlib.suppress(WhereError):
        assert parse_where(text)(WON) in (True, False)


WORDS = [*"()[],", "==", "<", "in", "not", "and", "or", "won", "'a'", "1", "null", "verdict", "sampled", "meta.x"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_no_sequence_of_words_does_more_than_parse_or_be_refused(words: list[str]) -> None:
    with contextlib.suppress(WhereError):
        assert parse_where(" ".join(words))(WON) in (True, False)
