"""The time machine: names for revisions, views of the past, and rollback bit for bit."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Passage, Retriever, VectorIndex
from persona_sdk.memory.schema import revisions, to_column
from persona_sdk.memory.transitions import merge
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
START = datetime(2025, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def texts(cubes: list) -> list[str | None]:
    return [cube.text for cube in cubes]


def dated(store: MemoryStore, days: list[int]) -> None:
    """Commits of alice on these days, each of which replaces the text ``day <last>`` by its own."""
    live: tuple[str, ...] = ()
    for number, day in enumerate(days, start=1):
        live = store.commit("alice", add=[CubeDraft.of(f"day {day}")], retire=live).added
        with store.writing() as connection:
            mine = (revisions.c.owner == "alice") & (revisions.c.number == number)
            connection.execute(update(revisions).where(mine).values(created_at=to_column(START + day * DAY)))


def test_rollback_to_a_snapshot_restores_search_bit_for_bit(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    retriever = Retriever(store, VectorIndex(store), embedder)
    queries = ("dogs", "metric units", "what does alice like")

    def search() -> list[list[Passage]]:
        return [retriever.recall(["alice"], query, 10) for query in queries]

    notes = [note(f"alice likes {thing}") for thing in ("dogs", "tea", "dogs and tea", "metric units")]
    ids = store.commit("alice", add=notes, groups=["club"]).added
    store.snapshot("alice", "good")
    then = search()
    assert all(len(found) == 4 for found in then)
    store.commit("alice", add=[note("alice likes dogs most of all")], retire=ids[:1], groups=[])
    store.archive("alice", [ids[1]])
    merge(store, "alice", ids[2:], note("alice likes dogs, tea and metric units"))
    assert search() != then
    assert store.as_of("alice", "good").recall(retriever, queries[0], 10) == then[0]
    revision = store.rollback("alice", "good")
    assert revision.restores == 1
    assert search() == then, "ids, texts, scores and order"
    assert store.groups("alice") == ("club",)
    fresh = Retriever(store, VectorIndex(store), embedder)
    assert [fresh.recall(["alice"], query, 10) for query in queries] == then


def test_snapshots_are_listed_and_their_names_checked(store: MemoryStore) -> None:
    with pytest.raises(NotFoundError):
        store.snapshot("alice", "early")
    store.commit("alice", add=[CubeDraft.of("one")])
    first = store.snapshot("alice", "first")
    store.commit("alice", add=[CubeDraft.of("two")])
    second = store.snapshot("alice", "second")
    assert (first.revision, second.revision) == (1, 2)
    assert store.snapshots("alice") == [first, second]
    assert store.snapshots("bob") == []
    for name in ("first", "7", "", "a b", "../x", "x\n", "x" * 129):
        with pytest.raises(InvalidInputError):
            store.snapshot("alice", name)
    for unknown in ("third", "", 3, -1, True):
        with pytest.raises(NotFoundError):
            store.rollback("alice", unknown)
        with pytest.raises(NotFoundError):
            store.as_of("alice", unknown)
    store.commit("bob")
    with pytest.raises(NotFoundError):
        store.rollback("bob", "first")
    store.forget_everything("alice")
    store.commit("alice")
    assert store.snapshots("alice") == []


def test_a_view_is_of_one_revision_and_cannot_be_written(store: MemoryStore, weights: Maker) -> None:
    store.commit("alice", add=[CubeDraft.of("one"), weights(1)], groups=["club"])
    view = store.as_of("alice", 1)
    store.commit("alice", add=[CubeDraft.of("two")], groups=[])
    assert (view.revision, view.at, view.groups) == (1, None, ("club",))
    assert [cube.kind for cube in view.cubes()] == ["plaintext", "parametric"]
    assert texts(view.cubes("plaintext")) == ["one"]
    assert store.as_of("alice", 0).cubes() == []
    with pytest.raises(FrozenInstanceError):
        view.revision = 2  # type: ignore[misc]
    assert not {name for name in dir(view) if not name.startswith("_")} & set(dir(MemoryStore)) - {
        "cubes", "groups",
    }  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    days=st.lists(st.integers(0, 30), min_size=1, max_size=6).map(sorted),
    asked=st.integers(-1, 31),
    offset=st.integers(-12, 12),
)
def test_a_time_picks_the_newest_revision_that_was_recorded_by_then(
    tmp_path_factory: pytest.TempPathFactory, days: list[int], asked: int, offset: int
) -> None:
    with MemoryStore.open(tmp_path_factory.mktemp("store")) as store:
        dated(store, days)
        when = (START + asked * DAY).astimezone(timezone(timedelta(hours=offset)))
        view = store.as_of("alice", when)
        known = [day for day in days if day <= asked]
        assert view.revision == len(known)
        assert texts(view.cubes()) == [f"day {day}" for day in known[-1:]]
        assert view.at == when


def test_what_was_recorded_and_what_was_true_are_two_questions(store: MemoryStore) -> None:
    """Contradiction: she moved to Lyon on day 10, and we were told on day 20."""
    (paris,) = store.commit("alice", add=[CubeDraft.of("lives in Paris", slot="lives_in")]).added
    moved = START + 10 * DAY
    old = CubeDraft.of("lives in Paris", slot="lives_in", valid_to=moved, parents=(paris,))
    new = CubeDraft.of("lives in Lyon", slot="lives_in", valid_from=moved)
    store.commit("alice", add=[old, new], retire=[paris])
    with store.writing() as connection:
        for number, day in ((1, 0), (2, 20)):
            mine = (revisions.c.owner == "alice") & (revisions.c.number == number)
            connection.execute(update(revisions).where(mine).values(created_at=to_column(START + day * DAY)))

    def believed(told_by: int, about: int) -> list[str | None]:
        return texts(store.as_of("alice", START + told_by * DAY).cubes(valid_at=START + about * DAY))

    assert believed(told_by=15, about=15) == ["lives in Paris"]  # we did not know yet
    assert believed(told_by=25, about=15) == ["lives in Lyon"]
    assert believed(told_by=25, about=5) == ["lives in Paris"]
    assert believed(told_by=25, about=10) == ["lives in Lyon"]  # from the day on
    assert believed(told_by=-1, about=5) == []


def test_times_without_a_zone_are_refused(store: MemoryStore) -> None:
    store.commit("alice")
    naive = datetime(2025, 1, 1)
    with pytest.raises(InvalidInputError):
        store.as_of("alice", naive)
    with pytest.raises(InvalidInputError):
        store.as_of("alice", 1).cubes(valid_at=naive)


def test_what_was_forgotten_is_gone_from_views(store: MemoryStore) -> None:
    gone, stays = store.commit("alice", add=[CubeDraft.of("gone"), CubeDraft.of("stays")]).added
    store.snapshot("alice", "before")
    view = store.as_of("alice", "before")
    store.forget("alice", [gone])
    assert [cube.id for cube in view.cubes()] == [stays]
    assert store.rollback("alice", "before").gone == (gone,)
    store.forget_everything("alice")
    with pytest.raises(NotFoundError):
        view.cubes()
