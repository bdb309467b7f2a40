"""Two owners with the same content never see each other, whatever is read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from persona_sdk.errors import NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, VectorIndex
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]


@pytest.fixture
def pair(store: MemoryStore, note: Maker, weights: Maker) -> tuple[dict[str, list[str]], MemoryStore]:
    ids = {}
    for seed, owner in enumerate(("alice", "bob")):
        drafts = [
            note("likes dogs"),
            note(f"{owner} has a secret"),
            weights(seed),
            CubeDraft.of("not embedded"),
        ]
        ids[owner] = list(
            store.commit(owner, add=drafts, message=f"of {owner}", groups=[f"{owner}-club"]).added
        )
    return ids, store


def test_reads_stay_with_their_owner(
    pair: tuple[dict[str, list[str]], MemoryStore], embedder: HashEmbedder
) -> None:
    ids, store = pair
    index = VectorIndex(store)
    retriever = Retriever(store, index, embedder)
    for owner, other in (("alice", "bob"), ("bob", "alice")):
        mine = set(ids[owner])
        assert {c.id for c in store.cubes(owner)} == mine
        assert all(c.owner == owner for c in store.cubes(owner))
        assert store.groups(owner) == (f"{owner}-club",)
        assert [r.message for r in store.history(owner)] == [f"of {owner}"]
        assert {i for r in store.history(owner) for i in r.added} == mine
        assert set(store.vectors(owner, embedder.fingerprint)[0]) == set(ids[owner][:2])
        assert store.vector_ids(owner, embedder.fingerprint) == ids[owner][:2]
        assert [c.id for c in store.missing_vectors(owner, embedder.fingerprint)] == [ids[owner][3]]
        assert store.lookup(owner, ids[other]) == {}
        hits = index.search(owner, embedder.encode(["likes dogs"])[0], 10, encoder=embedder.fingerprint)
        assert {i for i, _ in hits} == set(ids[owner][:2])
        assert {p.owner for p in retriever.recall((owner,), f"{other} has a secret", 10)} == {owner}
        with pytest.raises(NotFoundError):
            store.add_vectors(owner, "other", {ids[other][0]: embedder.encode(["x"])[0]})
        with pytest.raises(NotFoundError):
            store.commit(owner, retire=[ids[other][0]])
        with pytest.raises(NotFoundError):
            store.forget(owner, [ids[owner][0], ids[other][0]])
    assert all(len(store.cubes(owner)) == 4 for owner in ids)


def test_absent_and_foreign_read_the_same(pair: tuple[dict[str, list[str]], MemoryStore]) -> None:
    ids, store = pair
    foreign = store.get("bob", ids["bob"][2])
    assert foreign.blob is not None
    messages = []
    for cube_id, blob in ((foreign.id, foreign.blob), ("f" * 32, "f" * 64)):
        with pytest.raises(NotFoundError) as cube_error:
            store.get("alice", cube_id)
        with pytest.raises(NotFoundError) as blob_error:
            store.load_blob("alice", blob)
        messages.append(
            [str(cube_error.value).replace(cube_id, "*"), str(blob_error.value).split("No blob")[0]]
        )
        assert cube_error.value.context == blob_error.value.context == {}
    assert messages[0] == messages[1]
    assert store.load_blob("bob", foreign.blob)


def test_a_shared_blob_stays_until_its_last_owner_forgets(store: MemoryStore, weights: Maker) -> None:
    a, b = (store.get(owner, store.commit(owner, add=[weights(7)]).added[0]) for owner in ("alice", "bob"))
    assert a.blob is not None
    assert a.blob == b.blob
    assert store.forget("alice", [a.id]).blobs == ()
    with pytest.raises(NotFoundError):
        store.load_blob("alice", a.blob)
    assert store.load_blob("bob", a.blob)
    assert store.forget_everything("bob").blobs == (a.blob,)
    assert not store.vault.holds(a.blob)


def test_no_file_or_folder_is_named_after_an_owner(store: MemoryStore, folder: Path, weights: Maker) -> None:
    store.commit("alice-the-owner", add=[weights()])
    assert not [path for path in folder.rglob("*") if "alice" in path.name]


def test_reads_write_nothing(
    pair: tuple[dict[str, list[str]], MemoryStore], folder: Path, embedder: HashEmbedder
) -> None:
    ids, store = pair

    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".db-shm"}

    before = state()
    retriever = Retriever(store, VectorIndex(store), embedder)
    retriever.recall(("alice", "bob", "nobody"), "dogs")
    store.personas(), store.history("alice"), store.cubes("nobody"), store.get("bob", ids["bob"][0])
    assert (store.head("nobody"), store.groups("nobody"), store.history("nobody")) == (0, (), [])
    assert state() == before
    assert store.kind_of("nobody") is None
