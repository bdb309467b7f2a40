"""Search equals brute force, on any revision, and whatever happened to the index in between."""

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, VectorIndex
from persona_sdk.memory.cube import utc_now
from persona_sdk.models import Embedder
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]


def brute_force(
    store: MemoryStore, owner: str, query: torch.Tensor, k: int, revision: int
) -> list[tuple[str, float]]:
    live = [cube.id for cube in store.cubes(owner, revision=revision)]
    ids, matrix = store.vectors(owner, "e", revision=revision)
    assert set(ids) == set(live)
    scores = np.asarray([float(np.dot(row, query.numpy())) for row in matrix.numpy().astype(np.float64)])
    return [(ids[row], scores[row]) for row in np.argsort(-scores, kind="stable")[:k]]


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    k=st.integers(1, 15),
)
@settings(max_examples=12, deadline=None)
def test_search_equals_brute_force_on_every_revision(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int], k: int
) -> None:
    dice = torch.Generator().manual_seed(seed)
    owner = f"owner{seed}"
    with MemoryStore.open(tmp_path_factory.getbasetemp() / "search") as store:
        index = VectorIndex(store)
        for size in sizes:  # searching in between makes the index grow by every path
            live = [cube.id for cube in store.cubes(owner)]
            retire = live[:: 1 + int(torch.randint(2, 5, (1,), generator=dice))] if size % 2 else []
            drafts = [
                CubeDraft.of("x", vector=torch.randn(6, generator=dice), encoder="e") for _ in range(size)
            ]
            store.commit(owner, add=drafts, retire=retire)
            query = torch.randn(6, generator=dice)
            for revision in (None, *range(store.head(owner) + 1)):
                found = index.search(owner, query, k, encoder="e", revision=revision)
                at = store.head(owner) if revision is None else revision
                expected = brute_force(store, owner, query, k, at)
                assert [i for i, _ in found] == [i for i, _ in expected]
                np.testing.assert_allclose(
                    [s for _, s in found], [s for _, s in expected], rtol=1e-5, atol=1e-6
                )
        store.forget_everything(owner)


def test_the_index_follows_every_kind_of_write(
    open_store: Callable[[], MemoryStore], note: Maker, embedder: HashEmbedder
) -> None:
    query = embedder.encode(["dogs"])[0]
    with open_store() as store, open_store() as elsewhere:
        index = VectorIndex(store)

        def found() -> set[str]:
            return {i for i, _ in index.search("alice", query, 50, encoder=embedder.fingerprint)}

        assert found() == set()
        first, second = elsewhere.commit("alice", add=[note("dogs"), note("cats")]).added
        assert found() == {first, second}
        (third,) = elsewhere.commit("alice", add=[note("birds")]).added
        assert found() == {first, second, third}
        elsewhere.commit("alice", retire=[first])
        assert found() == {second, third}
        elsewhere.rollback("alice", 1)
        assert found() == {first, second}
        index.drop()
        assert index.bytes == 0
        assert found() == {first, second}
        (bare,) = elsewhere.commit("alice", add=[CubeDraft.of("fish")]).added
        assert found() == {first, second}
        elsewhere.add_vectors("alice", embedder.fingerprint, {bare: query})
        assert found() == {first, second, bare}
        elsewhere.forget_everything("alice")
        assert found() == set()
        reborn = elsewhere.commit("alice", add=[note("dogs"), note("cats")]).added
        assert found() == set(reborn), "revision 1 of a new life is not revision 1 of the old one"


def test_the_least_recently_used_index_goes_first(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    query = embedder.encode(["dogs"])[0]
    for owner in ("a", "b", "c"):
        store.commit(owner, add=[note("dogs")])
    scout = VectorIndex(store)
    scout.search("a", query, 1, encoder=embedder.fingerprint)
    one = scout.bytes
    assert one > 4 * embedder.dimension
    index = VectorIndex(store, max_bytes=2 * one)
    for owner, size in (("a", one), ("b", 2 * one), ("a", 2 * one), ("c", 2 * one)):
        assert len(index.search(owner, query, 1, encoder=embedder.fingerprint)) == 1
        assert index.bytes == size
    assert {owner for owner, *_ in index._slices} == {"a", "c"}


def test_bad_searches_are_refused(store: MemoryStore, note: Maker, embedder: HashEmbedder) -> None:
    index, query = VectorIndex(store), embedder.encode(["dogs"])[0]
    store.commit("alice", add=[note("dogs")])
    retriever = Retriever(store, index, embedder)
    for bad in (torch.ones(3), torch.full((64,), float("nan"))):
        with pytest.raises(InvalidInputError):
            index.search("alice", bad, 1, encoder=embedder.fingerprint)
    with pytest.raises(InvalidInputError):
        index.search("alice", query, 0, encoder=embedder.fingerprint)
    with pytest.raises(NotFoundError):
        index.search("alice", query, 1, encoder=embedder.fingerprint, revision=2)
    for text, k in (("", 1), (" \n", 1), ("dogs", 0)):
        with pytest.raises(InvalidInputError):
            retriever.recall(("alice",), text, k)
    assert retriever.recall((), "dogs") == []


def test_another_encoder_embeds_again_without_a_revision(
    store: MemoryStore, note: Maker, weights: Maker
) -> None:
    wide = HashEmbedder(128)
    ids = store.commit("alice", add=[note("dogs"), note("cats"), weights()]).added
    store.commit("alice", retire=[ids[1]])
    missing = store.missing_vectors("alice", wide.fingerprint)
    assert [cube.id for cube in missing] == list(ids[:2]), "retired ones too: a rollback brings them back"
    vectors = dict(zip(ids[:2], wide.encode([cube.text or "" for cube in missing]), strict=True))
    assert store.add_vectors("alice", wide.fingerprint, vectors) == 2
    assert store.add_vectors("alice", wide.fingerprint, vectors) == 0, "a repeat is harmless"
    assert store.missing_vectors("alice", wide.fingerprint) == []
    assert store.head("alice") == 2
    with pytest.raises(InvalidInputError, match="length 64"):
        store.add_vectors("alice", wide.fingerprint, {ids[0]: torch.ones(64)})
    retriever = Retriever(store, VectorIndex(store), wide)
    assert [p.id for p in retriever.recall(("alice",), "cats")] == [ids[0]]
    assert retriever.recall(("alice",), "cats", 1, {"alice": 1})[0].id == ids[1]


def test_recall_merges_owners_by_score_and_respects_revisions(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    retriever = Retriever(store, VectorIndex(store), embedder)
    near, far = store.commit("alice", add=[note("dogs bark"), note("something else entirely")]).added
    (shared,) = store.commit("club", kind="group", add=[note("dogs bark loudly")]).added
    store.commit("stranger", add=[note("dogs bark")])
    found = retriever.recall(("alice", "club", "alice", "nobody"), "dogs bark", 5)
    assert [p.id for p in found] == [near, shared, far]
    assert [p.owner for p in found] == ["alice", "club", "alice"]
    assert found[0].why is not None
    assert found[0].why.dense == pytest.approx(1.0)
    assert found[0].header.semantic_type == "fact"
    assert [p.id for p in retriever.recall(("alice", "club"), "dogs bark", 2)] == [near, shared]
    store.commit("alice", retire=[near])
    assert [p.id for p in retriever.recall(("alice", "club"), "dogs bark", 1)] == [shared]
    assert retriever.recall(("alice", "club"), "dogs bark", 1, {"alice": 1})[0].id == near
    assert retriever.recall(("alice",), "dogs bark", 5, {"alice": 0}) == []


def test_recall_passes_over_what_expired_or_is_no_text(
    store: MemoryStore, note: Maker, weights: Maker, embedder: HashEmbedder
) -> None:
    past, future = utc_now() - timedelta(seconds=1), utc_now() + timedelta(days=1)
    vector = embedder.encode(["dogs"])[0]
    state = CubeDraft(kind="activation", payload={"e": vector}, vector=vector, encoder=embedder.fingerprint)
    expired = [note("dogs", expires_at=past) for _ in range(9)]
    added = store.commit("alice", add=[*expired, state, note("dogs", expires_at=future), note("cats")]).added
    retriever = Retriever(store, VectorIndex(store), embedder)
    assert isinstance(embedder, Embedder)
    assert [p.id for p in retriever.recall(("alice",), "dogs", 2)] == list(added[-2:])
