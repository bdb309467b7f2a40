"""Tensors on disk: damage is noticed, repaired where possible, and leftovers are swept up."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.errors import CorruptBlobError, NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.memory.vault import Vault, encode
from persona_sdk.tensors import digest

Maker = Callable[..., CubeDraft]


def stored(store: MemoryStore, draft: CubeDraft) -> tuple[str, Path]:
    blob = store.get("alice", store.commit("alice", add=[draft]).added[0]).blob
    assert blob is not None
    return blob, store.vault.path(blob)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": flip,
    "flipped header": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "garbage": lambda data: os.urandom(len(data)),
    "huge header": lambda data: b"\xff" * 8 + data,
    "another blob": lambda _: encode({"m.A": torch.ones(4, 3)})[1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_repaired_by_the_next_commit(
    store: MemoryStore, weights: Maker, damage: str
) -> None:
    blob, file = stored(store, weights())
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(CorruptBlobError):
        store.load_blob("alice", blob)
    store.commit("bob", add=[weights()])
    assert digest(store.load_blob("alice", blob)) == blob


def test_a_missing_file_is_damage_too(store: MemoryStore, weights: Maker) -> None:
    blob, file = stored(store, weights())
    file.unlink()
    with pytest.raises(CorruptBlobError, match="missing"):
        store.load_blob("alice", blob)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: "\0" not in name and name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=30, deadline=None)
def test_bundles_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    vault = Vault(tmp_path_factory.getbasetemp() / "bundles")
    bundle = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    name, data = encode(bundle)
    vault.write(name, data)
    found = vault.read(name)
    assert name == digest(bundle) == digest(found)
    assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
        key: (t.dtype, t.shape) for key, t in bundle.items()
    }


def test_views_that_share_memory_are_stored_apart(store: MemoryStore) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    blob, _ = stored(store, CubeDraft.of(kind="activation", payload={"whole": base, "part": base.T[1:]}))
    assert torch.equal(store.load_blob("alice", blob)["part"], base.T[1:])


def test_leftovers_of_crashes_are_swept_but_nothing_else(
    open_store: Callable[[], MemoryStore], weights: Maker
) -> None:
    with open_store() as store:
        blob, named = stored(store, weights())
        orphan, data = encode({"x": torch.ones(3)})
        store.vault.write(orphan, data)
        old, young, foreign = (named.parent / name for name in ("old.tmp", "young.tmp", "notes.txt"))
        for file in (old, young, foreign):
            file.write_bytes(b"partial")
        path = store.vault.path(orphan)
        fresh, data = encode({"x": torch.zeros(3)})
        store.vault.write(fresh, data)
        past = time.time() - 3600
        for file in (old, foreign, path, named):
            os.utime(file, (past, past))
    with open_store() as store:
        assert not old.exists()
        assert not path.exists()
        assert young.exists(), "another process may be writing it"
        assert store.vault.holds(fresh), "another process may be about to name it"
        assert foreign.exists(), "not ours"
        assert store.load_blob("alice", blob)


def looked_at(vault: Vault) -> list[str]:
    """The digests that a sweep would ask the database about."""
    asked: list[str] = []

    def named(digests: Sequence[str]) -> set[str]:
        asked.extend(digests)
        return set(digests)

    vault.candidates(named)
    return asked


def test_what_is_in_order_is_not_looked_at_again(
    open_store: Callable[[], MemoryStore], weights: Maker
) -> None:
    store = open_store()
    first, file = stored(store, weights(1))
    assert looked_at(store.vault) == [], "a commit that succeeds leaves nothing to do"
    store.vault.write(first, file.read_bytes())
    assert looked_at(store.vault) == [], "it was there already"
    digests = [stored(store, weights(seed))[0] for seed in range(2, 6)]
    with pytest.raises(NotFoundError):
        store.commit("alice", add=[weights(6)], retire=["nobody"])
    refused = encode(weights(6).payload or {})[0]
    beside = [name for name in (first, *digests) if name[:2] == refused[:2]]
    assert looked_at(store.vault) == beside, "where one was taken back"
    partial = file.with_name("killed.tmp")
    partial.touch()
    assert first in looked_at(store.vault)
    partial.unlink()
    assert first in looked_at(store.vault), "somebody may be at work there"
    past = time.time() - 3600
    for folder in store.vault.folder.iterdir():
        os.utime(folder, (past, past))
    assert set(looked_at(store.vault)) == {first, *digests}
    assert looked_at(store.vault) == []


def test_a_crash_between_forgetting_rows_and_files_is_made_up_for(
    open_store: Callable[[], MemoryStore], weights: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    blob, file = stored(store, weights())
    os.utime(file, (0, 0))

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "drop_unnamed", killed)
    with pytest.raises(KeyboardInterrupt):
        store.forget_everything("alice")
    assert store.vault.holds(blob)
    open_store()
    assert not store.vault.holds(blob)


def test_a_blob_deleted_while_it_is_being_committed_again_is_written_again(
    store: MemoryStore,
    open_store: Callable[[], MemoryStore],
    weights: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blob, _ = stored(store, weights())
    original = store.vault.write

    def write_then_lose(name: str, data: bytes) -> bool:
        monkeypatch.undo()
        written = original(name, data)
        with open_store() as other:  # another process forgets the only cube that names the blob
            assert other.forget_everything("alice").blobs == (blob,)
        return written

    monkeypatch.setattr(store.vault, "write", write_then_lose)
    store.commit("bob", add=[weights()])
    assert digest(store.load_blob("bob", blob)) == blob
