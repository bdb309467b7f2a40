"""Contradictions: the line of a slot against a model of it, and through the store."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from persona_sdk.memory import CubeHeader, MemCube, MemoryStore
from persona_sdk.memory.schema import states, to_column
from persona_sdk.memory.slots import UNCONFIRMED, Held, settle
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder
from tests.memory.slot_view import view

DAY0 = datetime(2024, 1, 1, tzinfo=UTC)


def day(number: int) -> datetime:
    return DAY0 + timedelta(days=number)


def says(
    value: str, said: int, *, since: int | None = None, trust: str = "user", polarity: str = "positive"
) -> Held:
    attributes = {"attribute": "lives_in", "value": value, "polarity": polarity, "dated": since is not None}
    header = CubeHeader.parse(
        {
            "slot": "lives_in",
            "valid_from": None if since is None else day(since),
            "created_at": day(said),
            "trust": trust,
            "attributes": attributes,
        }
    )
    return Held(f"The user lives in {value}.", header)


def stored(held: Held, state: Any = "generated") -> Held:
    cube = MemCube("c" + str(held.get("value")), "alice", "plaintext", held.text, None, held.header, 1, state)
    return Held.of(cube)


def holds(line: list[Held], moment: datetime) -> list[str]:
    return [str(held.get("value")) for held in line if held.header.slot and held.header.valid(moment)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.none() | st.integers(0, 60)), max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_at_no_moment_two_values_hold(spoken: list[tuple[str, int, int | None]]) -> None:
    line: list[Held] = []
    for value, said, since in spoken:
        line = settle(line, says(value, said, since=since)).line
    for moment in range(-1, 62):
        assert len(holds(line, day(moment))) <= 1
    if spoken:
        assert len(holds(line, day(61))) == 1, "nothing was said to have ended"


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).flatmap(
        lambda days: st.tuples(st.just(days), st.permutations(range(len(days))))
    )
)
@settings(max_examples=200, deadline=None)
def test_each_value_holds_from_its_day_to_the_next_in_whatever_order_they_arrive(
    given_days: tuple[list[int], list[int]],
) -> None:
    days, order = given_days
    line: list[Held] = []
    for number in order:
        line = settle(line, says(f"v{number}", 40, since=days[number])).line
    for moment in range(32):
        begun = [(since, f"v{number}") for number, since in enumerate(days) if since <= moment]
        assert holds(line, day(moment)) == [value for _, value in sorted(begun)[-1:]]


def test_a_statement_that_says_when_makes_the_undated_one_precise() -> None:
    line = settle([stored(says("Paris", 0))], says("Lyon", 10)).line
    settled = settle(line, says("Lyon", 12, since=5))
    assert settled.outcome == "refined"
    assert [(h.get("value"), h.header.valid_from, h.header.valid_to) for h in settled.line] == [
        ("Paris", None, day(5)),
        ("Lyon", day(5), None),
    ]


@pytest.mark.parametrize(
    ("trust", "state"), [("confirmed", "generated"), ("user", "frozen"), ("system", "frozen")]
)
def test_what_is_more_trusted_or_frozen_is_not_changed(trust: str, state: str) -> None:
    paris = stored(says("Paris", 0, trust=trust), state)
    settled = settle([paris], says("Lyon", 5))
    assert settled.outcome == "unconfirmed"
    kept, beside = settled.line
    assert not kept.changed
    assert beside.header.slot is None
    assert beside.header.tags == (UNCONFIRMED,)
    assert beside.get("slot") == "lives_in"


def test_less_trusted_history_may_be_added_where_it_changes_nothing() -> None:
    settled = settle([stored(says("Paris", 0, since=10, trust="confirmed"))], says("Oslo", 20, since=5))
    assert settled.outcome == "added"
    assert [h.get("value") for h in settled.line] == ["Oslo", "Paris"]
    assert not settled.line[1].changed


# Through the store ----------------------------------------------------------------------------------------
@pytest.fixture
def writer(store: MemoryStore, embedder: HashEmbedder) -> MemoryWriter:
    return MemoryWriter(store, embedder)


def tell(writer: MemoryWriter, *said: str, since: int = 0) -> None:
    for number, text in enumerate(said):
        writer.observe("alice", [{"role": "user", "content": text, "at": day(since + number)}])
        assert writer.flush("alice").ok


def current(
    store: MemoryStore, moment: datetime | None = None, revision: int | None = None
) -> dict[str, str]:
    found = view(store.cubes("alice", revision=revision), moment or day(1000))
    return {slot: str(cube.text) for slot, cube in found.items()}


def test_moved_to_lyon_after_lives_in_paris(store: MemoryStore, writer: MemoryWriter) -> None:
    tell(writer, "I live in Paris.")
    before = store.head("alice")
    (paris,) = [cube for cube in store.cubes("alice") if cube.header.slot]
    tell(writer, "I moved to Lyon in May 2024.", since=200)
    assert current(store) == {"lives_in": "The user lives in Lyon since May 2024."}
    assert current(store, datetime(2024, 4, 30, tzinfo=UTC)) == {"lives_in": "The user lives in Paris."}
    assert current(store, revision=before) == {"lives_in": "The user lives in Paris."}
    closed, lyon = [cube for cube in store.cubes("alice") if cube.header.slot]
    assert closed.header.parents == (paris.id,)
    assert closed.header.sources == paris.header.sources
    assert closed.header.valid_to == lyon.header.valid_from == datetime(2024, 5, 1, tzinfo=UTC)
    assert paris.id in store.history("alice")[-1].retired
    assert paris.id not in {cube.id for cube in store.cubes("alice")}
    assert store.get("alice", paris.id).header.valid_to is None


def test_no_longer_likes_coffee_ends_likes_coffee(store: MemoryStore, writer: MemoryWriter) -> None:
    tell(writer, "I like coffee.", "I like tea.", "I no longer like coffee.")
    assert current(store) == {
        "likes.coffee": "The user no longer likes coffee.",
        "likes.tea": "The user likes tea.",
    }
    assert current(store, day(1))["likes.coffee"] == "The user likes coffee."
    tell(writer, "I love coffee again.", since=10)
    assert current(store)["likes.coffee"] == "The user loves coffee."
    assert current(store, day(5))["likes.coffee"] == "The user no longer likes coffee."


def test_a_slot_holds_one_statement_however_often_and_however_it_is_said(
    store: MemoryStore, writer: MemoryWriter
) -> None:
    tell(writer, "My name is Alice.", "Hi, I'm Alice.", "My name is Alice.", "my real name is Alice")
    assert [cube.text for cube in store.cubes("alice") if cube.header.slot] == ["The user's name is Alice."]


def test_a_denial_of_what_is_not_held_changes_nothing(store: MemoryStore, writer: MemoryWriter) -> None:
    tell(writer, "I live in Lyon.", "I used to live in Oslo.", "I don't live in Rome.")
    assert current(store) == {"lives_in": "The user lives in Lyon."}
    loose = [
        cube for cube in store.cubes("alice") if cube.header.semantic_type == "fact" and not cube.header.slot
    ]
    assert [cube.text for cube in loose] == [
        "The user used to live in Oslo.",
        "The user does not live in Rome.",
    ]


def test_leaving_without_going_anywhere(store: MemoryStore, writer: MemoryWriter) -> None:
    tell(writer, "I live in Lyon.", "I no longer live in Lyon.")
    assert current(store) == {"lives_in": "The user no longer lives in Lyon."}
    tell(writer, "I live in Lille.", since=9)
    assert current(store) == {"lives_in": "The user lives in Lille."}


def test_two_turns_of_one_batch_contradict_each_other(store: MemoryStore, writer: MemoryWriter) -> None:
    writer.observe("alice", [{"role": "user", "content": "I live in Paris.", "at": day(0)}])
    writer.observe("alice", [{"role": "user", "content": "I live in Lyon.", "at": day(3)}])
    assert len(writer.flush("alice").added) == 2
    assert current(store) == {"lives_in": "The user lives in Lyon."}
    assert current(store, day(1)) == {"lives_in": "The user lives in Paris."}


def test_an_old_conversation_that_arrives_late_stays_in_the_past(
    store: MemoryStore, writer: MemoryWriter
) -> None:
    tell(writer, "I live in Lyon.", since=500)
    tell(writer, "I live in Paris.", since=0)
    assert current(store) == {"lives_in": "The user lives in Lyon."}
    assert current(store, day(100)) == {"lives_in": "The user lives in Paris."}


def test_a_frozen_statement_survives_its_contradiction(store: MemoryStore, writer: MemoryWriter) -> None:
    tell(writer, "I live in Paris.")
    (paris,) = [cube for cube in store.cubes("alice") if cube.header.slot]
    with store.writing() as connection:
        values = {
            "before": "generated",
            "state": "frozen",
            "since": to_column(day(0)),
            "reason": "legal hold",
        }
        connection.execute(insert(states).values(owner="alice", cube_id=paris.id, **values))
    tell(writer, "I moved to Lyon.", "I moved to Lyon!", since=5)
    assert current(store) == {"lives_in": "The user lives in Paris."}
    (beside,) = [cube for cube in store.cubes("alice") if UNCONFIRMED in cube.header.tags]
    assert beside.text == "The user lives in Lyon."


def test_forgetting_a_turn_erases_what_it_said_and_nothing_else(
    store: MemoryStore, writer: MemoryWriter
) -> None:
    first = writer.observe("alice", "I live in Paris and I like tea.").turns[0]
    second = writer.observe("alice", "I work as a nurse.").turns[0]
    writer.flush("alice")
    receipt = store.forget("alice", [first.id])
    assert receipt.derived == 2
    assert [cube.text for cube in store.cubes("alice")] == [second.text, "The user is a nurse."]
    assert "Paris" not in str(store.all_cubes("alice"))


def test_what_is_so_since_a_day_ends_what_was_said_without_one_even_after_that_day():
    """After "I live in Paris" somebody says: "I moved to Lyon in May 2024", both this year."""
    paris = held_at("Paris", said=datetime(2026, 3, 1, tzinfo=UTC))
    lyon = held_at("Lyon", said=datetime(2026, 3, 2, tzinfo=UTC), since=datetime(2024, 5, 1, tzinfo=UTC))
    line = settle([paris], lyon).line
    assert [(h.text, h.header.valid_from, h.header.valid_to) for h in line] == [
        ("Paris", None, datetime(2024, 5, 1, tzinfo=UTC)),
        ("Lyon", datetime(2024, 5, 1, tzinfo=UTC), None),
    ]
    # With dates of its own, the other way round, or said before: it takes its place in the past.
    dated = held_at("Paris", said=datetime(2026, 3, 1, tzinfo=UTC), since=datetime(2025, 1, 1, tzinfo=UTC))
    assert [h.text for h in settle([dated], lyon).line if h.header.valid_to is None] == ["Paris"]
    later = held_at("Paris", said=datetime(2026, 3, 3, tzinfo=UTC))
    assert [h.text for h in settle([later], lyon).line if h.header.valid_to is None] == ["Paris"]


def held_at(place, *, said, since=None):
    attributes = {
        "attribute": "lives_in",
        "value": place,
        "polarity": "positive",
        "dated": since is not None,
        "ends": False,
    }
    header = CubeHeader(slot="lives_in", created_at=said, valid_from=since, attributes=attributes)
    return Held(place, header)
