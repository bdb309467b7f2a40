"""What is drawn from turns, what is not, and how well: on utterances labelled by hand."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.memory.extraction import Extractor, RuleExtractor, assents
from persona_sdk.memory.salience import SalienceConfig, salient
from persona_sdk.memory.statement import Statement, Turn
from tests.memory.utterances import DEVELOPED, HELD_OUT, Labelled

AT = datetime(2025, 3, 10, 12, tzinfo=UTC)


def drawn(*said: tuple[str, str]) -> list[Statement]:
    turns = [Turn(role, text, AT + timedelta(minutes=n)) for n, (role, text) in enumerate(said)]  # type: ignore[arg-type]
    found = RuleExtractor().extract(turns).statements
    return [statement for statement in found if salient(statement, SalienceConfig())]


def labels(text: str) -> list[str]:
    return [("" if s.polarity == "positive" else "-") + (s.slot or "said") for s in drawn(("user", text))]


def measured(utterances: Sequence[Labelled]) -> tuple[float, float, list[str]]:
    """Precision, recall, and the utterances that came out wrong."""
    right = found = wanted = 0
    wrong = []
    for text, expected in utterances:
        got = labels(text)
        right += len(set(got) & set(expected))
        found += len(got)
        wanted += len(expected)
        if set(got) != set(expected):
            wrong.append(f"{text!r}: {got}, expected {list(expected)}")
    return right / found, right / wanted, wrong


def test_precision_and_recall_on_the_utterances_it_was_developed_with() -> None:
    precision, recall, wrong = measured(DEVELOPED)
    assert precision >= 0.98, wrong
    assert recall >= 0.98, wrong


def test_precision_and_recall_on_utterances_it_never_saw() -> None:
    precision, recall, wrong = measured(HELD_OUT)
    assert precision >= 0.9, wrong
    assert recall >= 0.6, wrong


def test_a_yes_makes_the_assistants_statement_the_users() -> None:
    (found,) = drawn(("assistant", "Nice. So you live in Lyon, right?"), ("user", "Yes, exactly."))
    assert (found.text, found.slot, found.turns) == ("The user lives in Lyon.", "lives_in", (0, 1))
    assert found.evidence == "So you live in Lyon, right?"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("So you live in Lyon?", "No."),
        ("So you live in Lyon?", "Yes and no."),
        ("So you live in Lyon?", "yesterday was nice"),
        ("Would you like to live in Lyon?", "Yes."),
        ("You live in Lyon. Shall I look up the weather?", "Yes."),
        ("I live in the cloud.", "Right."),
        ("Does your friend live in Lyon?", "Yes."),
    ],
)
def test_nothing_else_does(asked: str, answered: str) -> None:
    assert drawn(("assistant", asked), ("user", answered)) == []


def test_assistants_and_tools_say_nothing_about_the_user() -> None:
    for role in ("assistant", "tool"):
        assert drawn((role, "I live in Paris and I'm allergic to nuts."), ("user", "Thanks!")) == []


def test_a_yes_in_another_session_is_none_to_this_statement() -> None:
    turns = [Turn("assistant", "You live in Lyon?", AT, "a"), Turn("user", "Yes.", AT, "b")]
    assert RuleExtractor().extract(turns).statements == ()


def test_context_turns_give_no_statements() -> None:
    turns = [Turn("user", "I live in Paris.", AT, new=False), Turn("user", "I like tea.", AT)]
    assert [s.slot for s in RuleExtractor().extract(turns).statements] == ["likes.tea"]


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_statements_with_evidence_in_it_and_always_the_same(text: str) -> None:
    turns = [Turn("user", text, AT)]
    found = RuleExtractor().extract(turns).statements
    assert found == RuleExtractor().extract(turns).statements
    for statement in found:
        assert statement.evidence in text
        assert statement.evidence.strip()
    assert isinstance(assents(text), bool)


WORDS = [
    "I",
    "I'm",
    "my",
    "live",
    "in",
    "Paris",
    "moved",
    "to",
    "the",
    "since",
    "2019",
    "not",
    "no",
    "longer",
    ",",
    ".",
    "?",
    "and",
    "but",
    "like",
    "coffee",
    "call",
    "me",
    "if",
    "wish",
    "a",
]


@given(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_word_salad_neither_breaks_nor_leaves_its_own_words(text: str) -> None:
    for statement in RuleExtractor().extract([Turn("user", text, AT)]).statements:
        assert statement.evidence in text
        if statement.value is not None:
            assert all(word in text for word in statement.value.removeprefix("the ").split())


@pytest.mark.parametrize(
    "text", ["I live in " + "a" * 19_000, "I like " * 3000, "," * 19_000, "'" * 9999, '"I ' * 6000]
)
def test_long_repetitions_are_read_in_linear_time(text: str) -> None:
    RuleExtractor().extract([Turn("user", text, AT)])  # would hang, not fail, with a pattern that backtracks


def test_the_rules_are_an_extractor() -> None:
    assert isinstance(RuleExtractor(), Extractor)
