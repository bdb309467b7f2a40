"""Near-duplicates: one statement, one memory, however it is put."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.memory.duplicates import DuplicateConfig, nearest, overlap, relate
from persona_sdk.memory.statement import Statement
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder

CONFIG = DuplicateConfig()


@pytest.mark.parametrize(
    ("cosine", "a", "b", "relation"),
    [
        (1.0, "The user likes tea.", "the user likes TEA", "repeated"),
        (0.95, "The user likes tea.", "The user likes green tea.", "merged"),
        (0.93, "The user enjoys long walks in the hills.", "The user enjoys walks in hills", "merged"),
        (0.91, "The user likes tea.", "The user likes green tea.", "linked"),
        (0.95, "The user is allergic to nuts.", "The user is not allergic to nuts.", "linked"),
        (0.95, "The user is allergic to nuts.", "The user is allergic to cats.", "linked"),
        (0.99, "The user has 2 dogs.", "The user has 3 dogs.", "linked"),
        (0.99, "The user often meets Ana at the lake.", "The user often meets Tim at the lake.", "linked"),
        (0.80, "The user plays chess.", "The user likes board games.", "linked"),
        (0.79, "The user likes tea.", "The user likes green tea.", "distinct"),
    ],
)
def test_relations(cosine: float, a: str, b: str, relation: str) -> None:
    assert relate(cosine, a, b, CONFIG) == relation
    assert relate(cosine, b, a, CONFIG) == relation


def test_the_strongest_relation_wins_over_the_nearest_vector() -> None:
    vector = torch.tensor([1.0, 0.0])
    matrix = torch.tensor([[1.0, 0.0], [0.95, 0.31]])
    others = ["The user is allergic to cats.", "The user is allergic to nuts."]
    match = nearest("The user is allergic to nuts", vector, others, matrix, CONFIG)
    assert (match.relation, match.place) == ("repeated", 1)
    assert nearest("x", vector, [], matrix[:0], CONFIG).place is None


@given(st.text(max_size=60), st.text(max_size=60))
def test_overlap_is_symmetric_and_between_nothing_and_all(a: str, b: str) -> None:
    assert overlap(a, b) == overlap(b, a)
    assert 0 <= overlap(a, b) <= 1


def test_thresholds_out_of_order_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="link is above merge"):
        DuplicateConfig.parse({"link": 0.95})


def fact(text: str, **more: object) -> Statement:
    return Statement(text, text, **more)  # type: ignore[arg-type]


def texts(store: MemoryStore) -> list[str]:
    return [str(cube.text) for cube in store.cubes("alice") if cube.header.semantic_type != "turn"]


@pytest.fixture
def writer(store: MemoryStore, embedder: HashEmbedder) -> MemoryWriter:
    made = MemoryWriter(store, embedder)
    made.observe("alice", "Hello!")
    made.flush()
    return made


def test_the_same_again_is_only_a_use(store: MemoryStore, embedder: HashEmbedder) -> None:
    used: list[tuple[str, tuple[str, ...]]] = []
    writer = MemoryWriter(store, embedder, on_use=lambda owner, ids: used.append((owner, tuple(ids))))
    for text in ("I like tea.", "I like tea!", "btw I like tea"):
        writer.observe("alice", text)
        report = writer.flush("alice")
    (kept,) = [cube for cube in store.cubes("alice") if cube.header.slot]
    assert report.repeated == (kept.id,)
    assert used == [("alice", (kept.id,))] * 2
    assert report.added == report.retired == ()


def test_paraphrases_become_one_statement_on_the_sources_of_both(
    store: MemoryStore, writer: MemoryWriter, embedder: HashEmbedder
) -> None:
    first, second = (writer.observe("alice", text).turns[0] for text in ("one", "two"))
    short = "The user trains for the marathon of Rome every morning before work"
    long = "The user trains hard for the marathon of Rome every morning before work"
    assert float(embedder.encode([short])[0] @ embedder.encode([long])[0]) > CONFIG.merge
    writer.record("alice", [fact(short)], trust="user", sources=[first])
    (old,) = [cube for cube in store.cubes("alice") if cube.text == short]
    report = writer.record("alice", [fact(long)], trust="user", sources=[second])
    assert texts(store) == [long]
    (new,) = [cube for cube in store.cubes("alice") if cube.text == long]
    assert report.retired == (old.id,)
    assert new.header.parents == (old.id,)
    assert {source.cube_id for source in new.header.sources} == {first.id, second.id}
    assert writer.record("alice", [fact(short)], trust="user", sources=[first]).repeated == (new.id,)
    assert texts(store) == [long]


def test_what_is_only_near_is_kept_and_linked(
    store: MemoryStore, writer: MemoryWriter, embedder: HashEmbedder
) -> None:
    a = "The user sails a small wooden boat on the lake with Ana"
    b = "The user sails a small wooden boat on the lake with Tim"
    cosine = float(embedder.encode([a])[0] @ embedder.encode([b])[0])
    assert cosine >= CONFIG.merge, "only the names keep them apart"
    writer.record("alice", [fact(a)], trust="user")
    writer.record("alice", [fact(b)], trust="user")
    old, new = [cube for cube in store.cubes("alice") if cube.text in (a, b)]
    assert new.header.attributes["related"] == [old.id]
    assert texts(store) == [a, b]


def test_a_memory_of_the_application_is_used_but_never_rewritten(
    store: MemoryStore, writer: MemoryWriter, embedder: HashEmbedder
) -> None:
    text = "The user likes tea."
    draft = CubeDraft.of(text, vector=embedder.encode([text])[0], encoder=embedder.fingerprint)
    (mine,) = store.commit("alice", add=[draft]).added
    writer.observe("alice", "I like tea.")
    assert writer.flush("alice").repeated == (mine,)
    assert texts(store) == [text]


def test_less_trusted_words_do_not_replace_more_trusted_ones(
    store: MemoryStore, writer: MemoryWriter
) -> None:
    short = "The user trains for the marathon of Rome every morning before work"
    long = "The user trains hard for the marathon of Rome every morning before work"
    writer.record("alice", [fact(short)], trust="user")
    writer.record("alice", [fact(long)], trust="web")
    assert texts(store) == [short, long]
