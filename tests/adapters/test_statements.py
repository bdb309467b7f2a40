"""What can be asked about a text, and what is a wrong answer: of what people write, and the writer stores."""

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.adapters.distillation_data import paraphrases, training_pairs
from persona_sdk.adapters.probes import _OTHERS, probes_of
from persona_sdk.adapters.statements import Fact, statement_of
from persona_sdk.memory.clauses import asserted
from persona_sdk.memory.grammar import statements
from persona_sdk.memory.patterns import PATTERNS
from persona_sdk.memory.plain_form import wording

SAID = datetime(2025, 3, 10, 12, tzinfo=UTC)


def stored(*utterances):
    """The statements the writer draws, as the promoter hands them over."""
    found = [s for said in utterances for clause in asserted(said) for s in statements(clause, SAID)]
    return [Fact(one.text, one.attribute, one.value) for one in found]


# said, question, stem, value, tail
STORED = [
    ("I moved to Lyon in May 2024", "Where do I live?", "You live in", "Lyon", "since May 2024"),
    ("I have a dog called Biscuit", "What is my dog called?", "You have a dog called", "Biscuit", ""),
    ("I hate cilantro", "What do I dislike?", "You dislike", "cilantro", ""),
    ("I'm a nurse", "What is my job?", "You are", "a nurse", ""),
    ("I've been a nurse for ten years", "What is my job?", "You are", "a nurse", "since 2015"),
    ("I work for Siemens", "Who do I work for?", "You work for", "Siemens", ""),
    ("My sister is called Ingrid", "What is my sister called?", "Your sister is called", "Ingrid", ""),
    ("My favourite colour is blue", "What is my favourite colour?", "Your favourite colour is", "blue", ""),
    ("I prefer metric units", "Which units do I prefer?", "You prefer", "metric", "units"),
    ("I speak Finnish", "Which languages do I speak?", "You speak", "Finnish", ""),
    ("I was born on 3 May 1990", "When was I born?", "You were born on", "3 May 1990", ""),
    ("I am 34 years old", "How old am I?", "You are aged", "34", ""),
    ("I'm allergic to nuts", "What am I allergic to?", "You are allergic to", "nuts", ""),
    ("Call me Al", "What do I want to be called?", "You want to be called", "Al", ""),
    ("I don't eat meat", "What do I not eat?", "You do not eat", "meat", ""),
    ("I no longer like coffee", "What do I no longer like?", "You no longer like", "coffee", ""),
    ("I lived in Oslo until 2019", "Where did I use to live?", "You used to live in", "Oslo", "until 2019"),
    ("I used to be a teacher", "What did I use to be?", "You used to be", "a teacher", ""),
]


@pytest.mark.parametrize(("said", "question", "stem", "value", "tail"), STORED)
def test_what_the_writer_stores_is_asked_for_by_its_value(said, question, stem, value, tail):
    (fact,) = stored(said)
    found = statement_of(fact)
    assert (found.question, found.stem, found.value, found.tail) == (question, stem, value, tail)
    assert all(answer == found.answer for _, answer in training_pairs(fact))
    assert paraphrases(fact) == [fact.text, found.answer]


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("The user lives in Lyon since May 2024.", "Where do I live?", "You live in Lyon since May 2024."),
        ("The user has a dog called Biscuit.", "What is my dog called?", "You have a dog called Biscuit."),
        ("The user no longer drives a Volvo.", "What do I no longer drive?", "You no longer drive a Volvo."),
        ("The user watches films.", "What do I watch?", "You watch films."),
        ("The user meditates.", "What do I do?", "You meditate."),
        ("The user likes I Love Lucy.", "What do I like?", "You like I Love Lucy."),
        ("The user's time zone is CET.", "What is my time zone?", "Your time zone is CET."),
        ('The user said: "I teach my own children."', "What do I teach?", "You teach your own children."),
    ],
)
def test_without_its_attribute_a_sentence_in_the_third_person_is_taken_apart_by_its_words(
    text, question, answer
):
    assert (statement_of(text).question, statement_of(text).answer) == (question, answer)


@pytest.mark.parametrize(
    ("pattern", "polarity", "past"),
    [
        (pattern, polarity, past)
        for pattern in PATTERNS
        for polarity, past in (("positive", False), ("negative", False), ("ended", False), ("ended", True))
        if polarity == "positive" or not pattern.third.endswith(" are")  # there is no wording for those
    ],
)
def test_every_wording_of_the_grammar_gives_a_question_about_the_user(pattern, polarity, past):
    third = pattern.third.replace("{k}", "sister")
    text = wording(third, "Quux", polarity, past=past, phrase="since 2015")
    found = statement_of(Fact(text, pattern.attribute, "Quux"))
    assert not found.question.startswith("What do you know")
    assert "user" not in found.question
    assert "Quux" not in found.question
    assert (found.value, found.tail) == ("Quux", "since 2015")
    assert found.answer.startswith("You")
    assert "user" not in found.answer


def test_different_things_get_different_questions():
    """Lyon, coffee and Acme all became the answer to one question: what do you know about the user?"""
    facts = stored("I live in Lyon", "I like coffee", "I work for Acme", "I'm a nurse", "I speak Finnish")
    assert len({statement_of(fact).question for fact in facts}) == len(facts) == 5


LIKED = ["coffee", "black coffee", "chess", "hiking", "green tea", "jazz"]
PLACES = ["Lyon", "Oslo", "Berlin", "Toronto"]


@given(
    st.lists(st.sampled_from(LIKED), unique=True, min_size=1),
    st.lists(st.sampled_from(LIKED), unique=True),
    st.lists(st.sampled_from(PLACES), unique=True, min_size=2, max_size=2),
)
def test_what_is_true_of_the_persona_is_no_wrong_answer(liked, also, places):
    facts = stored(*(f"I like {value}" for value in liked), f"I live in {places[0]}")
    known = stored(*(f"I love {value}" for value in also), f"I come from {places[1]}")
    rivals = [*LIKED, *PLACES, "Lyon, France", "the sea"]
    for probe in probes_of([*facts, known[-1]], known=known, rivals=lambda *_: rivals):
        wrong = set(probe.options) - {probe.options[probe.right]}
        assert wrong
        assert not wrong & {*liked, *also}
        if probe.lead == "You live in":
            assert not wrong & {places[0], f"{places[0]}, France"}
            assert places[1] in wrong  # whoever knows all values must also know which belongs where


def test_of_many_things_true_at_once_none_is_wrong():
    facts = stored("I like chess", "I like coffee", "I play chess", "I speak Finnish", "I speak Korean")
    true = {statement_of(fact).value for fact in facts}
    for probe in probes_of(facts):
        assert set(probe.options) & true == {probe.options[probe.right]}


def test_there_are_enough_wrong_answers_of_every_kind():
    forms = {statement_of(fact).form for fact in stored(*(said for said, *_ in STORED))}
    assert {*forms, "", "is"} <= set(_OTHERS)
    assert all(len(set(values)) >= 4 for values in _OTHERS.values())
    for one, other in itertools.combinations(stored(*(said for said, *_ in STORED)), 2):
        assert all(len(probe.options) == 4 for probe in probes_of([one, other]))
