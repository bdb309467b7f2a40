"""Slices: equal to what SQL says after any history, read once, dropped when forgotten, one per owner."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from persona_sdk.memory import CubeDraft, MemoryStore, Origin, VectorIndex
from persona_sdk.memory import index as index_module
from persona_sdk.memory.lexical import tokens
from persona_sdk.memory.slice_cache import SliceCache
from persona_sdk.memory.slices import Slice
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
ARRAYS = ("vectors", "created", "valid_from", "valid_to", "expires", "half_life", "trust", "before", "after")
SECOND = timedelta(seconds=1)


def take(cache: SliceCache, store: MemoryStore, owner: str, encoder: str, **how: Any) -> Slice:
    with store.reading() as connection:
        return cache.get(connection, owner, encoder, **how)


def same(one: Slice, other: Slice) -> None:
    assert one.ids == other.ids
    for name in ARRAYS if one.ids else ():
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert [one.type_names[code] for code in one.types] == [other.type_names[code] for code in other.types]
    for query in ("dogs", "cats birds", "may 2023"):
        found = (of.postings(0.5).search(tokens(query)) for of in (one, other))
        np.testing.assert_array_equal(*found)


@given(
    steps=st.lists(
        st.sampled_from(("add", "add two", "retire", "roll back", "forget")), min_size=1, max_size=7
    ),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12, deadline=None)
def test_a_slice_that_followed_equals_a_slice_read_afresh(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int
) -> None:
    dice, embedder = np.random.default_rng(seed), HashEmbedder()

    def draft() -> CubeDraft:
        text = " ".join(dice.choice(["dogs", "cats", "birds", "fish"], 3))
        when = datetime(2023, 5, 1, tzinfo=UTC) + timedelta(days=int(dice.integers(0, 300)))
        header: dict[str, Any] = {"created_at": when, "semantic_type": str(dice.choice(["fact", "event"]))}
        header |= {"origin": Origin(session=str(dice.choice(["", "s1", "s2"]))), "trust": "web"}
        header |= {"valid_to": when, "half_life_days": 3.0} if dice.random() < 0.3 else {}
        return CubeDraft.of(text, vector=embedder.encode([text])[0], encoder=embedder.fingerprint, **header)

    with MemoryStore.open(tmp_path_factory.mktemp("slices")) as store:
        cache = SliceCache(store)
        store.commit("alice", add=[draft()])
        for step in steps:
            live = [cube.id for cube in store.cubes("alice")]
            if step == "retire" and live:
                store.commit("alice", retire=[str(dice.choice(live))])
            elif step == "roll back":
                store.rollback("alice", int(dice.integers(1, store.head("alice") + 1)))
            elif step == "forget" and live:
                store.forget("alice", [live[0]])
            else:
                store.commit("alice", add=[draft() for _ in range(2 if step == "add two" else 1)])
            for history in (False, True):
                followed = take(cache, store, "alice", embedder.fingerprint, history=history)
                same(followed, take(SliceCache(store), store, "alice", embedder.fingerprint, history=history))
                cubes = store.all_cubes("alice") if history else store.cubes("alice")
                assert set(followed.ids) == {cube.id for cube in cubes}


def test_neighbours_are_those_of_the_same_session(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    sessions = ["a", "b", "a", "", "b", "", "a"]
    store.commit("alice", add=[note(f"turn {s}", origin=Origin(session=s)) for s in sessions])
    found = take(SliceCache(store), store, "alice", embedder.fingerprint)
    assert found.before.tolist() == [-1, -1, 0, -1, 1, -1, 2]
    assert found.after.tolist() == [2, 4, 6, -1, -1, -1, -1]


def test_statements_and_rules_are_no_neighbours_of_turns(store: MemoryStore, embedder: HashEmbedder) -> None:
    writer = MemoryWriter(store, embedder)
    for text in ("I live in Paris.", "Too long.", "I like tea."):
        writer.observe("alice", text, session="a")
        writer.flush("alice")
    found = take(SliceCache(store), store, "alice", embedder.fingerprint)
    row = {str(store.get("alice", name).text): place for place, name in enumerate(found.ids)}
    assert found.before[row["Too long."]] == row["I live in Paris."]
    assert found.before[row["I like tea."]] == row["Too long."]
    assert found.after[row["I like tea."]] == -1
    assert len(found.ids) == 6


def test_a_memory_is_found_by_the_day_it_was_made(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    days = (datetime(2023, 5, 8, 23, tzinfo=UTC), datetime(2022, 6, 9, tzinfo=UTC))
    store.commit("alice", add=[note("hello", title="greeting", created_at=day) for day in days])
    postings = take(SliceCache(store), store, "alice", embedder.fingerprint).postings(0.0)
    assert (postings.search(tokens("8 May 2023"))[0] > 0).tolist() == [True, False]
    assert (postings.search(tokens("greetings"))[0] > 0).all()


def test_a_warm_slice_is_one_statement_and_a_write_reads_only_what_is_new(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    cache, statements = SliceCache(store), []
    store.commit("alice", add=[note(f"dogs {n}") for n in range(30)])
    take(cache, store, "alice", embedder.fingerprint)
    parsed: list[int] = []
    original = Slice.of.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Slice], owner: str, stamp: str, rows: Any, names: tuple[str, ...] = ()) -> Slice:
        parsed.append(len(rows))
        return original(cls, owner, stamp, rows, names)

    def note_statement(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append(statement)

    event.listen(store._open_database().engine, "before_cursor_execute", note_statement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slice, "of", classmethod(counting))
        take(cache, store, "alice", embedder.fingerprint)
        assert (len(statements), parsed) == (1, [])
        live = store.cubes("alice")
        store.commit("alice", add=[note("one more")], retire=[live[3].id])
        assert len(take(cache, store, "alice", embedder.fingerprint).ids) == 30
        assert parsed == [1]


def test_bytes_are_bounded_and_the_bound_holds(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    cache = SliceCache(store)
    store.commit("alice", add=[note(f"dogs and cats {n}", origin=Origin(session="s")) for n in range(50)])
    found = take(cache, store, "alice", embedder.fingerprint)
    held = found.vectors.nbytes + found.counts.bytes + found.postings(0.5).bytes
    held += sum(getattr(found, name).nbytes for name in ARRAYS[1:])
    assert held < found.bytes == cache.bytes
    cache.drop("bob")
    assert cache.bytes == found.bytes
    cache.drop("alice")
    assert cache.bytes == 0


def test_what_was_read_before_something_was_forgotten_is_not_kept(
    store: MemoryStore, folder: Path, note: Maker, embedder: HashEmbedder
) -> None:
    """A thread has read a slice; before it can keep it, another one forgets a memory of it."""
    (gone,) = store.commit("alice", add=[note("dogs")]).added
    cache = SliceCache(store)
    read, go = threading.Event(), threading.Event()
    original = cache._keep

    def slow(*arguments: Any) -> None:
        read.set()
        assert go.wait(10)
        original(*arguments)

    cache._keep = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: take(cache, store, "alice", embedder.fingerprint))
    thread.start()
    assert read.wait(10)
    cache.drop("alice")  # what the store announces when it forgets
    go.set()
    thread.join(10)
    assert cache.bytes == 0
    cache._keep = original  # type: ignore[method-assign]
    store.forget("alice", [gone])
    assert take(cache, store, "alice", embedder.fingerprint).ids == ()


def test_slices_of_two_owners_and_encoders_are_apart(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    wide, cache = HashEmbedder(128), VectorIndex(store)
    ids = {}
    for owner in ("alice", "bob"):
        ids[owner] = store.commit(owner, add=[note("dogs")]).added
    store.add_vectors("alice", wide.fingerprint, {ids["alice"][0]: wide.encode(["dogs"])[0]})
    for owner in ids:
        assert take(cache, store, owner, embedder.fingerprint).ids == ids[owner]
    assert take(cache, store, "bob", wide.fingerprint).ids == ()
    assert take(cache, store, "alice", wide.fingerprint).vectors.shape == (1, 128)
    assert take(cache, store, "nobody", wide.fingerprint).ids == ()


def test_time_bounds_are_those_of_the_header(store: MemoryStore, note: Maker, embedder: HashEmbedder) -> None:
    start, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    store.commit("alice", add=[note("x"), note("y", valid_from=start, valid_to=end, expires_at=end + SECOND)])
    found = take(SliceCache(store), store, "alice", embedder.fingerprint)
    assert found.valid_from.tolist() == [-np.inf, start.timestamp()]
    assert found.valid_to.tolist() == [np.inf, end.timestamp()]
    assert found.expires.tolist() == [np.inf, end.timestamp() + 1]
    assert not found.timeless


def test_a_big_slice_is_searched_by_an_inverted_file_that_new_rows_do_not_rebuild(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its cells are visited here, so the answer must be that of brute force."""
    monkeypatch.setattr(index_module, "APPROXIMATE_ABOVE", 50)
    trained: list[int] = []
    honest = index_module.faiss.IndexIVFFlat

    def counted(*arguments: Any) -> Any:
        trained.append(1)
        return honest(*arguments)

    monkeypatch.setattr(index_module.faiss, "IndexIVFFlat", counted)
    dice = torch.Generator().manual_seed(0)

    def drafts(n: int) -> list[CubeDraft]:
        return [CubeDraft.of("x", vector=torch.randn(8, generator=dice), encoder="e") for _ in range(n)]

    index = VectorIndex(store)
    for size, retire, builds in ((120, 0, 1), (10, 0, 1), (60, 0, 2), (1, 1, 3)):
        live = [cube.id for cube in store.cubes("alice")]
        store.commit("alice", add=drafts(size), retire=live[:retire])
        query = torch.randn(8, generator=dice)
        found = index.search("alice", query, 10, encoder="e")
        ids, matrix = store.vectors("alice", "e")
        scores = matrix @ query
        assert [name for name, _ in found] == [ids[int(row)] for row in scores.argsort(descending=True)[:10]]
        assert sum(trained) == builds
        part = take(index, store, "alice", "e")
        dense = index_module.dense_scores(part, query.numpy(), fetch=10)
        np.testing.assert_allclose(np.sort(dense)[-10:], scores.sort().values[-10:], rtol=1e-5)
        assert (dense >= np.sort(dense)[-10] - 1e-6).all(), "what was not visited gets the least of the best"
