"""Statements whose end was forgotten: open again, unless something that is still there ends them."""

from datetime import UTC, datetime

from persona_sdk.memory import MemoryStore
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder
from tests.memory.slot_view import view

NOW = datetime(2100, 1, 1, tzinfo=UTC)


def city(store: MemoryStore, moment: datetime = NOW) -> str | None:
    found = view(store.cubes("alice"), moment).get("lives_in")
    return None if found is None else str(found.header.attributes["value"])


def say(writer: MemoryWriter, *texts: str) -> list[str]:
    said = [writer.observe("alice", text).turns[0].id for text in texts]
    writer.flush("alice")
    return said


def test_forgetting_the_turn_that_moved_somebody_moves_them_back(
    store: MemoryStore, embedder: HashEmbedder
) -> None:
    writer = MemoryWriter(store, embedder)
    paris, lyon = say(writer, "I live in Paris.", "I moved to Lyon in May 2024.")
    assert city(store) == "Lyon"
    store.forget("alice", [lyon])
    report = writer.flush("alice")
    assert (len(report.added), len(report.retired)) == (1, 1)
    assert city(store) == "Paris"
    assert writer.flush("alice").added == (), "it looks once"
    store.forget("alice", [paris])
    assert store.cubes("alice") == store.all_cubes("alice") == [], "with all its versions"


def test_another_writer_notices_too(store: MemoryStore, embedder: HashEmbedder) -> None:
    _, lyon = say(MemoryWriter(store, embedder), "I live in Paris.", "I moved to Lyon in May 2024.")
    store.forget("alice", [lyon])
    MemoryWriter(store, embedder).flush("alice")
    assert city(store) == "Paris"


def test_what_was_in_between_leaves_its_time_to_the_one_before(
    store: MemoryStore, embedder: HashEmbedder
) -> None:
    writer = MemoryWriter(store, embedder)
    moves = ("I live in Paris.", "I moved to Lyon in May 2020.", "I moved to Rome in May 2024.")
    _, lyon, _ = say(writer, *moves)
    store.forget("alice", [lyon])
    writer.flush("alice")
    assert city(store) == "Rome"
    assert city(store, datetime(2023, 1, 1, tzinfo=UTC)) == "Paris"


def test_an_end_that_was_said_stays(store: MemoryStore, embedder: HashEmbedder) -> None:
    writer = MemoryWriter(store, embedder)
    _, tea = say(writer, "I lived in Paris until 2019.", "I like tea.")
    store.forget("alice", [tea])
    assert writer.flush("alice").added == ()
    assert city(store) is None


def test_what_is_archived_still_ends_what_was_before(store: MemoryStore, embedder: HashEmbedder) -> None:
    writer = MemoryWriter(store, embedder)
    _, _, tea = say(writer, "I live in Paris.", "I moved to Lyon in May 2024.", "I like tea.")
    now = view(store.cubes("alice"), NOW)["lives_in"]
    store.activate("alice", [now.id])
    store.archive("alice", [now.id])
    store.forget("alice", [tea])
    assert writer.flush("alice").added == ()
    assert city(store) is None
