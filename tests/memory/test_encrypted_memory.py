"""An encrypted store under everything that stands on it: recall, the writer, states of life, archives."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from persona_sdk.errors import FrozenError, MasterKeyError, NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, VectorIndex, transitions
from persona_sdk.memory.encryption import KeyRing
from persona_sdk.memory.expiry import expire
from persona_sdk.memory.facts import facts_of
from persona_sdk.memory.retrieval import RetrievalOptions
from persona_sdk.memory.schema import cubes, metadata, vectors
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder
from tests.memory.conftest import OpenStore

pytest.importorskip("cryptography")

Maker = Callable[..., CubeDraft]
MASTER, OTHER = bytes(range(32)), bytes(range(1, 33))
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def sealed(open_store: OpenStore) -> MemoryStore:
    return open_store(encryption=KeyRing(MASTER))


def stored(store: MemoryStore) -> str:
    """All rows, as somebody reads them who has the database and no key."""
    with store._open_database().reading() as connection:
        return "\n".join(str(row) for t in metadata.tables.values() for row in connection.execute(select(t)))


def texts(store: MemoryStore, embedder: HashEmbedder, query: str, options: RetrievalOptions) -> list[str]:
    found = Retriever(store, VectorIndex(store), embedder).recall(["alice"], query, 3, options=options)
    assert [passage.header.title for passage in found] == ["zq-title"] * len(found)
    return [passage.text for passage in found]


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["vectors", "words as well"])
def test_recall_finds_what_is_sealed_also_what_was_written_since(
    sealed: MemoryStore, note: Maker, embedder: HashEmbedder, weight: float
) -> None:
    options = RetrievalOptions(lexical_weight=weight)
    retriever = Retriever(sealed, VectorIndex(sealed), embedder, options)
    sealed.commit("alice", add=[note(f"zq-fact {n}", title="zq-title") for n in range(8)])
    sealed.commit("bob", add=[note("zq-fact 3 of bob", title="zq-title")])
    assert retriever.recall(["alice"], "zq-fact 3", 1)[0].text == "zq-fact 3"
    sealed.commit("alice", add=[note("zq-later carrots", title="zq-title")])
    (found,) = retriever.recall(["alice"], "zq-later carrots", 1)  # the slice's successor
    assert (found.text, found.header.title) == ("zq-later carrots", "zq-title")
    both = retriever.recall(["alice", "bob"], "zq-fact 3", 2)
    assert {passage.owner for passage in both} == {"alice", "bob"}
    sealed.rollback("alice", 1)
    assert "zq-later carrots" not in texts(sealed, embedder, "zq-later carrots", options)
    assert "zq-" not in stored(sealed)  # base64 has no hyphen


def test_the_scores_are_those_of_a_clear_store(
    sealed: MemoryStore, tmp_path: Path, note: Maker, embedder: HashEmbedder
) -> None:
    drafts = [note(f"dogs and {n} cats", created_at=NOW) for n in range(12)]
    with MemoryStore.open(tmp_path / "clear") as clear:
        found = []
        for store in (clear, sealed):
            store.commit("alice", add=drafts)
            retriever = Retriever(store, VectorIndex(store), embedder, clock=lambda: NOW)
            found.append([(p.text, p.score) for p in retriever.recall(["alice"], "7 cats", 12)])
    assert found[0] == found[1]


def test_what_is_learned_from_turns_is_sealed_and_opens_after_a_restart(
    sealed: MemoryStore, open_store: OpenStore, embedder: HashEmbedder
) -> None:
    writer = MemoryWriter(sealed, embedder)
    observed = writer.observe("alice", "My name is Zqanna and I live in Zqville.", session="s", start=0)
    again = writer.observe("alice", "My name is Zqanna and I live in Zqville.", session="s", start=0)
    assert again.turns == observed.turns, "it is recognised"
    assert writer.flush("alice").failures == ()
    learned = [c for c in sealed.cubes("alice") if c.header.semantic_type != "turn"]
    assert {source.cube_id for cube in learned for source in cube.header.sources} == {observed.turns[0].id}
    writer.observe("alice", "I moved to Zqtown.")
    writer.flush("alice")
    assert not [word for word in ("zqanna", "zqville", "zqtown") if word in stored(sealed).lower()]
    reopened = open_store(encryption=KeyRing(MASTER))
    assert any("Zqtown" in str(cube.text) for cube in reopened.cubes("alice"))
    retriever = Retriever(reopened, VectorIndex(reopened), embedder)
    assert "Zqtown" in retriever.recall(["alice"], "moved to Zqtown", 1)[0].text
    receipt = reopened.forget("alice", [observed.turns[0].id])
    assert receipt.derived >= len(learned)
    assert receipt.verify(reopened)
    assert not any("Zqanna" in str(cube.text) for cube in reopened.all_cubes("alice"))


def test_states_of_life(sealed: MemoryStore, note: Maker, embedder: HashEmbedder, weights: Maker) -> None:
    first, second, held, tensors = sealed.commit(
        "alice", add=[note("dogs"), note("cats"), note("evidence"), weights(1)], message="m"
    ).added
    sealed.snapshot("alice", "start")
    sealed.freeze("alice", held, "lawsuit", legal_basis="hold")
    with pytest.raises(FrozenError):
        sealed.forget("alice", [held])
    with pytest.raises(FrozenError):
        sealed.commit("alice", retire=[held])
    sealed.archive("alice", [first])
    transitions.merge(sealed, "alice", [tensors], weights(2))
    (merged,) = [cube for cube in sealed.cubes("alice") if cube.kind == "parametric"]
    assert torch.equal(sealed.load_blob("alice", merged.blob or "")["m.A"], weights(2).payload["m.A"])
    assert [f.bytes > 0 for f in facts_of(sealed, "alice") if f.kind == "parametric"] == [True]
    sealed.rollback("alice", "start")
    assert {cube.text for cube in sealed.cubes("alice")} == {"dogs", "cats", "evidence", None}
    assert {cube.text for cube in sealed.as_of("alice", 1).cubes()} == {"dogs", "cats", "evidence", None}
    sealed.unfreeze("alice", held, "settled")
    assert sealed.forget("alice", [held, second, merged.id]).verify(sealed)
    assert sealed.verify_audit("alice") == []
    assert [cube.text for cube in sealed.cubes("alice")] == ["dogs"]


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_archives_carry_states_and_the_chain_tells_of_them(
    sealed: MemoryStore, note: Maker, weights: Maker, tmp_path: Path, passphrase: str | None
) -> None:
    held, aside, tensors = sealed.commit("alice", add=[note("dogs"), note("cats"), weights(1)]).added
    blob = sealed.get("alice", tensors).blob or ""
    sealed.snapshot("alice", "start")
    sealed.freeze("alice", held, "lawsuit", legal_basis="hold")
    sealed.archive("alice", [aside])
    file = sealed.export("alice", tmp_path / "a.memcube", passphrase=passphrase)
    sealed.import_archive(file, as_id="bob", passphrase=passphrase)
    assert sealed.verify_audit("bob") == []
    assert sorted(cube.state for cube in sealed.all_cubes("bob")) == ["archived", "frozen", "generated"]
    assert torch.equal(sealed.load_blob("bob", blob)["m.A"], sealed.load_blob("alice", blob)["m.A"])
    (frozen,) = [cube.id for cube in sealed.all_cubes("bob") if cube.state == "frozen"]
    with pytest.raises(FrozenError):
        sealed.forget("bob", [frozen])
    assert [s.name for s in sealed.snapshots("bob")] == ["start"]
    with sealed.reading() as connection:
        names = list(connection.execute(select(cubes.c.blob).where(cubes.c.blob.is_not(None))).scalars())
    assert len(set(names)) == 2, "one file a persona, and neither is named by content"
    assert blob not in names
    with MemoryStore.open(tmp_path / "clear") as clear:
        clear.import_archive(file, passphrase=passphrase)
        assert clear.verify_audit("alice") == []
        assert {cube.text for cube in clear.all_cubes("alice")} == {"dogs", "cats", None}
        assert {cube.state for cube in clear.all_cubes("alice")} == {"generated", "archived"}, "not trusted"


def test_what_failed_leaves_no_file(sealed: MemoryStore, weights: Maker) -> None:
    with pytest.raises(NotFoundError):
        sealed.commit("alice", add=[weights(1)], also=lambda *_: _missing())
    assert list(sealed.vault.folder.rglob("*.safetensors")) == []
    with pytest.raises(NotFoundError):
        transitions.merge(sealed, "alice", ["f" * 32], weights(1))
    assert list(sealed.vault.folder.rglob("*.safetensors")) == []


def _missing() -> None:
    raise NotFoundError("nothing", hint="")


def test_expired_weights_go_with_their_file_and_their_note(sealed: MemoryStore, weights: Maker) -> None:
    sealed.commit("alice", add=[weights(1, expires_at=NOW)])
    sealed.commit("bob", add=[weights(1, expires_at=NOW)])
    assert len(list(sealed.vault.folder.rglob("*.safetensors"))) == 2
    receipts = expire(sealed, now=NOW)
    assert [receipt.owner for receipt in receipts] == ["alice", "bob"]
    assert all(receipt.verify(sealed) and receipt.scrubbed for receipt in receipts)
    assert list(sealed.vault.folder.rglob("*.safetensors")) == []
    assert list(sealed.folder.glob("erasing-*")) == []


def test_a_persona_made_while_the_master_key_changes_opens_with_the_new_one(
    sealed: MemoryStore, open_store: OpenStore, note: Maker
) -> None:
    old = open_store(encryption=KeyRing(MASTER))  # as another process has it
    sealed.commit("alice", add=[note("dogs")])
    inside, errors = threading.Event(), []

    def write() -> None:
        inside.set()
        try:
            sealed.commit("bob", add=[note("cats")])
            assert sealed.cubes("alice")[0].text == "dogs"
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    encryption = sealed._encryption
    assert encryption is not None
    original = encryption.rotate

    def slow(*arguments: object) -> int:
        writer.start()
        assert inside.wait(10)
        return original(*arguments)  # type: ignore[arg-type]

    encryption.rotate = slow  # type: ignore[method-assign]
    assert sealed.rotate_master_key(KeyRing(OTHER)) == 2
    writer.join(30)
    assert errors == []
    with pytest.raises(MasterKeyError):
        old.commit("carol", add=[note("birds")])
    assert sealed.kind_of("carol") is None, "a key that nothing opens was not made"
    reopened = open_store(encryption=KeyRing(OTHER))
    assert [reopened.cubes(owner)[0].text for owner in ("alice", "bob")] == ["dogs", "cats"]


def test_vectors_are_sealed_in_rows(sealed: MemoryStore, note: Maker, embedder: HashEmbedder) -> None:
    sealed.commit("alice", add=[note("dogs")])
    plain = embedder.encode(["dogs"])[0].numpy().tobytes()
    with sealed.reading() as connection:
        (data,) = connection.execute(select(vectors.c.data)).scalars()
    assert plain not in data
    assert len(data) == len(plain) + 28
