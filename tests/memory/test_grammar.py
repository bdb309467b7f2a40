"""Patterns, plain form and time phrases, one case a line."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona_sdk.memory import dates, when
from persona_sdk.memory.calendar_spans import Interval
from persona_sdk.memory.clauses import asserted
from persona_sdk.memory.cube import CubeHeader
from persona_sdk.memory.grammar import PATTERNS, statements
from persona_sdk.memory.plain_form import plain
from persona_sdk.memory.statement import Statement, attribute_of, slot_of, slug

SAID = datetime(2025, 3, 10, 12, tzinfo=UTC)  # a Monday


def said(text: str) -> list[Statement]:
    return [found for clause in asserted(text) for found in statements(clause, SAID)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I live in Paris", "The user lives in Paris."),
        ("I don't live in Paris", "The user does not live in Paris."),
        ("I no longer live in Paris", "The user no longer lives in Paris."),
        ("I used to live in Paris", "The user used to live in Paris."),
        ("I lived in Paris until 2019", "The user used to live in Paris until 2019."),
        ("I moved from Paris to Lyon in May 2024", "The user lives in Lyon since May 2024."),
        ("I'm not allergic to nuts", "The user is not allergic to nuts."),
        ("I am no longer vegetarian", "The user is no longer vegetarian."),
        ("I used to be a teacher", "The user used to be a teacher."),
        ("I've been a nurse for ten years", "The user is a nurse since 2015."),
        ("I hate olives", "The user dislikes olives."),
        ("I no longer hate olives", "The user no longer dislikes olives."),
        ("I don't really like olives", "The user does not like olives."),
        ("I stopped eating meat", "The user no longer eats meat."),
        ("My name is not Bob", "The user's name is not Bob."),
        ("I prefer metric units", "The user prefers metric units."),
        ("I use Celsius", "The user prefers Celsius."),
        ("My best friend is tall", None),
        ("I was a bit late", None),
        ("I eat pizza", None),
        ("I don't hate olives", None),
        ("I'm 300", None),
        ("I'm Sorry", None),
    ],
)
def test_wording(text: str, expected: str | None) -> None:
    assert [found.text for found in said(text)] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("text", "slot", "value", "polarity"),
    [
        ("I live in the Netherlands", "lives_in", "the Netherlands", "positive"),
        ("I live in Paris, France", "lives_in", "Paris, France", "positive"),
        ("We live in San Sebastián with two kids", "lives_in", "San Sebastián", "positive"),
        ("I like the coffee", "likes.coffee", "coffee", "positive"),
        ("I love coffees", "likes.coffee", "coffees", "positive"),
        ("I can't stand coffee", "likes.coffee", "coffee", "negative"),
        ("I don't like coffee any more", "likes.coffee", "coffee", "ended"),
        ("My favourite dish is ramen", "favourite.dish", "ramen", "positive"),
        ("My dog is called Rex", "has_pet.rex", "Rex", "positive"),
        ("I have a dog named Rex", "has_pet.rex", "Rex", "positive"),
        ("My email is al@example.org", "email", "al@example.org", "positive"),
        ("My pronouns are she/her", "pronouns", "she/her", "positive"),
        ("I work as a nurse", "job", "nurse", "positive"),
        ("I'm French", "nationality", "French", "positive"),
        ("I'm married", "marital_status", "married", "positive"),
    ],
)
def test_slots_and_values(text: str, slot: str, value: str, polarity: str) -> None:
    (found,) = said(text)
    assert (found.slot, found.value, found.polarity) == (slot, value, polarity)


@pytest.mark.parametrize(
    ("phrase", "start", "end"),
    [
        ("in May 2024", "2024-05-01", None),
        ("since 2019", "2019-01-01", None),
        ("last year", "2024-01-01", None),
        ("last month", "2025-02-01", None),
        ("this week", "2025-03-10", None),
        ("last summer", "2024-06-01", None),
        ("last winter", "2024-12-01", None),
        ("in the summer of 2022", "2022-06-01", None),
        ("last Friday", "2025-03-07", None),
        ("yesterday", "2025-03-09", None),
        ("two years ago", "2023-03-10", None),
        ("3 days ago", "2025-03-07", None),
        ("for five years", "2020-03-10", None),
        ("on 3 May 2024", "2024-05-03", None),
        ("on May 3rd, 2024", "2024-05-03", None),
        ("on 2024-05-03", "2024-05-03", None),
        ("in April", "2024-04-01", None),
        ("in March", "2025-03-01", None),
        ("until 2019", None, "2019-01-01"),
        ("from 2015 to 2019", "2015-01-01", "2019-01-01"),
        ("in June 2024", "2024-06-01", None),
        ("on 31 June 2024", None, None),
        ("from 2019 to 2015", None, None),
        ("in 1066", None, None),
        ("for three companies", None, None),
    ],
)
def test_time_phrases(phrase: str, start: str | None, end: str | None) -> None:
    text, found = when.cut(f"I lived in Paris {phrase}", SAID)
    assert found.start == (datetime.fromisoformat(start).replace(tzinfo=UTC) if start else None)
    assert found.end == (datetime.fromisoformat(end).replace(tzinfo=UTC) if end else None)
    assert text == ("I lived in Paris" if start or end else f"I lived in Paris {phrase}")


def test_a_month_lies_ahead_where_the_clause_speaks_of_the_future() -> None:
    assert when.cut("I'm moving to Lyon in June", SAID)[1].start == datetime(2025, 6, 1, tzinfo=UTC)
    assert when.cut("I moved to Lyon in June", SAID)[1].start == datetime(2024, 6, 1, tzinfo=UTC)


@given(
    st.datetimes(datetime(1950, 1, 1), datetime(2090, 1, 1)),
    st.sampled_from(
        [
            *("last summer", "last winter", "this winter", "next fall", "in the summer of 2022", "last May"),
            *("in May", "on 3 May 2024", "on May 3rd", "since 2019", "last week", "this weekend"),
            *("yesterday", "last Friday", "two years ago", "a month ago", "3 weeks ago", "twelve days ago"),
        ]
    ),
)
@example(datetime(2026, 8, 15), "last summer")
@example(datetime(2026, 1, 15), "last winter")
@settings(deadline=None)
def test_a_statement_begins_in_the_span_that_a_question_of_the_same_words_means(
    moment: datetime, phrase: str
) -> None:
    moment = moment.replace(tzinfo=UTC)
    span, (_, found) = dates.parse(phrase, moment), when.cut(f"I moved to Lyon {phrase}", moment)
    assert span is not None
    assert found.start is not None
    assert Interval(found.start, found.start + timedelta(seconds=1)).overlaps(span)
    if "ago" not in phrase:
        assert found.start == span.start


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.sampled_from(
    ["last year", "next year", "next week", "yesterday", "tomorrow", "for 900 years", "999 days ago",
     "in June",
     "last winter", "next month", "from June to May"]))  # fmt: skip
@settings(deadline=None)
def test_no_moment_is_out_of_reach(moment: datetime, phrase: str) -> None:
    _, found = when.cut(f"I moved to Lyon {phrase}", moment.replace(tzinfo=UTC))
    assert found.start is None or found.end is None or found.start <= found.end


@pytest.mark.parametrize(
    "text",
    [
        "I wish I lived in Rome",
        "If I lived in Rome I would be happy",
        "Maybe I am allergic to nuts",
        "I dreamt I was a pilot",
        "My friend told me I am a doctor",
        'She wrote "I am a doctor" on the form',
        "“I live in Rome” is my favourite line of it",
        "> I live in Rome",
        "```\nI live in Rome\n```",
        "Am I a doctor?",
        "Lyrics: I love Paris",
        "Rewrite the following text. I live in Rome. I am a nurse.",
    ],
)
def test_what_is_not_asserted(text: str) -> None:
    assert said(text) == []


def test_every_pattern_belongs_to_a_known_attribute_and_a_valid_slot() -> None:
    for pattern in PATTERNS:
        name = (
            f"{pattern.attribute}.x" if pattern.attribute in ("relation", "favourite") else pattern.attribute
        )
        assert attribute_of(name) is not None
        assert CubeHeader(slot=slot_of(name, "Some value")).slot


@given(st.text(min_size=1, max_size=200))
@settings(deadline=None)
def test_any_value_makes_a_valid_slot_that_does_not_depend_on_case(value: str) -> None:
    slot = slot_of("likes", value)
    assert slot is not None
    assert CubeHeader(slot=slot).slot == slot
    assert slug(value) == slug(value.casefold())


@given(st.text(max_size=80))
@settings(deadline=None)
def test_what_has_no_negation_keeps_its_polarity(text: str) -> None:
    assert plain(f"I like {text}").polarity in ("positive", "ended")  # "ended" by "anymore" in the text
