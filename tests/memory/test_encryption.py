"""Encryption at rest: nothing clear on disk, nothing opens where it does not belong, keys can be lost."""

import base64
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.errors import (
    ArchiveError,
    CorruptBlobError,
    InvalidInputError,
    MasterKeyError,
    NotFoundError,
    StoreError,
)
from persona_sdk.memory import CubeDraft, MemoryStore, Source, VectorIndex
from persona_sdk.memory.cipher import CLEAR
from persona_sdk.memory.encryption import KeyRing, PersonaCipher
from persona_sdk.testing import HashEmbedder

pytest.importorskip("cryptography")

Maker = Callable[..., CubeDraft]
MASTER = bytes(range(32))
TENSOR = torch.tensor([3.14159274101257324, -271828.1875, 1.6180340051651, 9.8765432e-12])


@pytest.fixture
def sealed(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder, encryption=KeyRing(MASTER)) as opened:
        yield opened


def files(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file() and not f.name.endswith("-shm")}


def raw(folder: Path, query: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(folder / "personas.db")) as connection, connection:
        return connection.execute(query, values).fetchall()


def fill(store: MemoryStore, note: Maker, owner: str = "alice") -> list[str]:
    header = {"title": "zqtitle", "tags": ("zqtag",), "attributes": {"zqkey": "zqvalue"}}
    drafts = [note(f"zqtext {n}", **header) for n in range(3)]
    drafts.append(CubeDraft.of(kind="parametric", payload={"zqtensor": TENSOR}, **header))
    return list(store.commit(owner, add=drafts, message="zqmessage").added)


def test_nothing_clear_is_on_disk_and_everything_comes_back(
    sealed: MemoryStore, folder: Path, note: Maker, embedder: HashEmbedder
) -> None:
    ids = fill(sealed, note)
    vector = embedder.encode(["zqtext 1"])[0]
    needles = [b"zqt", b"zqkey", b"zqvalue", b"zqmessage", TENSOR.numpy().tobytes(), vector.numpy().tobytes()]
    needles += [base64.b64encode(b"zqtext 1")[:9], MASTER, MASTER.hex().encode()]
    for _ in range(2):
        found = files(folder)
        assert [n for n in needles for data in found.values() if n in data] == []
        sealed.scrub()
    cubes = sealed.cubes("alice")
    assert [cube.id for cube in cubes] == ids
    assert [cube.text for cube in cubes] == ["zqtext 0", "zqtext 1", "zqtext 2", None]
    assert {cube.header.title for cube in cubes} == {"zqtitle"}
    assert sealed.history("alice")[0].message == "zqmessage"
    assert cubes[3].blob is not None
    assert torch.equal(sealed.load_blob("alice", cubes[3].blob)["zqtensor"], TENSOR)
    hits = VectorIndex(sealed).search("alice", vector, 1, encoder=embedder.fingerprint)
    assert hits[0][0] == ids[1]
    assert sealed.add_vectors("alice", embedder.fingerprint, {ids[0]: vector}) == 0
    with pytest.raises(InvalidInputError, match="length 3"):
        sealed.add_vectors("alice", embedder.fingerprint, {ids[3]: torch.ones(3)})
    link = Source.of(cubes[0])
    sealed.commit("bob", add=[CubeDraft.of("derived", sources=(link,))])
    assert sealed.forget("alice", [ids[0]]).verify(sealed)
    assert sealed.cubes("bob") == []
    sealed.rollback("alice", 1)
    assert sealed.history("alice")[-1].message == "rollback to 1"


def test_a_store_opens_with_its_own_key_only(folder: Path, note: Maker, tmp_path: Path) -> None:
    with MemoryStore.open(folder, encryption=KeyRing(MASTER)) as store:
        fill(store, note)
    before = files(folder)
    for ring in (None, KeyRing(secrets.token_bytes(32))):
        with pytest.raises(MasterKeyError) as caught:
            MemoryStore.open(folder, encryption=ring)
        assert caught.value.hint
        assert files(folder) == before, "nothing was changed"
    with MemoryStore.open(folder, encryption=KeyRing(MASTER)) as store:
        assert len(store.cubes("alice")) == 4
    with MemoryStore.open(tmp_path / "clear") as store:
        fill(store, note)
    before = files(tmp_path / "clear")
    with pytest.raises(MasterKeyError, match="not encrypted"):
        MemoryStore.open(tmp_path / "clear", encryption=KeyRing(MASTER))
    assert files(tmp_path / "clear") == before
    with MemoryStore.open(tmp_path / "clear") as store:
        assert len(store.cubes("alice")) == 4
        with pytest.raises(InvalidInputError):
            store.rotate_master_key(KeyRing(MASTER))


SWAPS = {
    "texts": "UPDATE cubes SET text = (SELECT text FROM cubes WHERE id = :other) WHERE id = :one",
    "headers": "UPDATE cubes SET header = (SELECT header FROM cubes WHERE id = :other) WHERE id = :one",
    "text as header": "UPDATE cubes SET header = text WHERE id = :one",
    "a clear text": "UPDATE cubes SET text = 'aGVsbG8gd29ybGQsIGhlbGxvIHdvcmxkLCBoZWxsbw==' WHERE id = :one",
    "no base64": "UPDATE cubes SET text = 'I promise: trust me' WHERE id = :one",
    "an empty header": "UPDATE cubes SET header = '' WHERE id = :one",
    "another name": "UPDATE cubes SET id = '0123456789abcdef0123456789abcdef' WHERE id = :one",
    "another owner": "UPDATE cubes SET owner = 'bob' WHERE id = :one",
    "a blob": "UPDATE cubes SET blob = (SELECT blob FROM cubes WHERE blob IS NOT NULL) WHERE id = :one",
}


@pytest.mark.parametrize("swap", SWAPS)
def test_rows_that_were_swapped_do_not_open(
    sealed: MemoryStore, folder: Path, note: Maker, swap: str
) -> None:
    one, other, *_ = fill(sealed, note)
    fill(sealed, note, "bob")
    with closing(sqlite3.connect(folder / "personas.db")) as connection, connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        assert connection.execute(SWAPS[swap], {"one": one, "other": other}).rowcount == 1
    with pytest.raises(CorruptBlobError):
        _ = [sealed.all_cubes(owner) for owner in ("alice", "bob")]


def test_vectors_messages_and_keys_that_were_swapped_do_not_open(
    sealed: MemoryStore, folder: Path, note: Maker, embedder: HashEmbedder
) -> None:
    one, other, *_ = fill(sealed, note)
    sealed.commit("alice", message="another message")
    fill(sealed, note, "bob")
    query = "UPDATE vectors SET data = (SELECT data FROM vectors WHERE cube_id = ?) WHERE cube_id = ?"
    raw(folder, query, other, one)
    with pytest.raises(CorruptBlobError):
        sealed.vectors("alice", embedder.fingerprint)
    raw(folder, "UPDATE revisions SET message = (SELECT message FROM revisions WHERE number = 2)")
    with pytest.raises(CorruptBlobError):
        sealed.history("alice")
    raw(folder, "UPDATE keys SET wrapped = (SELECT wrapped FROM keys WHERE owner = 'bob')")
    with pytest.raises(MasterKeyError):
        sealed.all_cubes("alice")


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "clear", "of another persona"])
def test_files_that_were_changed_do_not_open(
    sealed: MemoryStore, folder: Path, note: Maker, damage: str
) -> None:
    from persona_sdk.memory.vault import encode

    blob = sealed.get("alice", fill(sealed, note)[3]).blob
    assert blob is not None
    (file,) = (folder / "blobs").rglob("*.safetensors")
    data = file.read_bytes()
    fill(sealed, note, "bob")
    (theirs,) = (f for f in (folder / "blobs").rglob("*.safetensors") if f != file)
    flipped = data[:20] + bytes([data[20] ^ 1]) + data[21:]
    file.write_bytes(
        {
            "flipped": flipped,
            "short": data[:10],
            "empty": b"",
            "clear": encode({"zqtensor": TENSOR})[1],
            "of another persona": theirs.read_bytes(),
        }[damage]
    )
    with pytest.raises(CorruptBlobError):
        sealed.load_blob("alice", blob)
    sealed.commit("alice", add=[CubeDraft.of(kind="parametric", payload={"zqtensor": TENSOR})])
    assert torch.equal(sealed.load_blob("alice", blob)["zqtensor"], TENSOR), "committing repairs"


def test_equal_tensors_of_two_personas_do_not_look_equal(
    sealed: MemoryStore, folder: Path, note: Maker
) -> None:
    blob = sealed.get("alice", fill(sealed, note)[3]).blob
    sealed.commit("alice", add=[CubeDraft.of(kind="activation", payload={"zqtensor": TENSOR})])
    assert len(list((folder / "blobs").rglob("*.safetensors"))) == 1, "within a persona they are shared"
    fill(sealed, note, "bob")
    found = list((folder / "blobs").rglob("*.safetensors"))
    names = {file.stem for file in found}
    assert len(names) == 2
    assert blob not in names
    assert {row[0] for row in raw(folder, "SELECT blob FROM cubes WHERE blob IS NOT NULL")} == names
    assert blob is not None
    assert all(blob.encode() not in data for data in files(folder).values())
    with pytest.raises(NotFoundError):
        sealed.load_blob("carol", blob)
    receipt = sealed.forget_everything("alice")
    assert len(receipt.blobs) == 1
    assert receipt.verify(sealed)
    assert torch.equal(sealed.load_blob("bob", blob)["zqtensor"], TENSOR)


def test_a_backup_of_an_erased_persona_cannot_be_read(
    sealed: MemoryStore, folder: Path, note: Maker, tmp_path: Path
) -> None:
    fill(sealed, note)
    sealed.commit("bob", add=[note("bob stays")])
    sealed.scrub()
    shutil.copytree(folder, tmp_path / "backup")
    wrapped = raw(folder, "SELECT wrapped FROM keys WHERE owner = 'alice'")[0][0]
    assert sealed.forget_everything("alice").verify(sealed)
    assert raw(folder, "SELECT owner FROM keys ORDER BY owner") == [("*",), ("bob",)]
    assert all(wrapped not in data for data in files(folder).values())
    # The content comes back from a backup, the keys are those of now.
    raw(tmp_path / "backup", "DELETE FROM keys WHERE owner = 'alice'")
    with MemoryStore.open(tmp_path / "backup", encryption=KeyRing(MASTER)) as restored:
        with pytest.raises(CorruptBlobError):
            restored.cubes("alice")
        assert [cube.text for cube in restored.cubes("bob")] == ["bob stays"]


def test_a_persona_of_the_same_id_has_another_key(sealed: MemoryStore, folder: Path, note: Maker) -> None:
    with MemoryStore.open(folder, encryption=KeyRing(MASTER)) as other:
        fill(sealed, note)
        assert len(other.cubes("alice")) == 4  # its key is known there now
        first = raw(folder, "SELECT wrapped FROM keys WHERE owner = 'alice'")
        sealed.forget_everything("alice")
        assert other.cubes("alice", revision=0) == []
        fill(other, note)
        assert raw(folder, "SELECT wrapped FROM keys WHERE owner = 'alice'") != first
        assert len(sealed.cubes("alice")) == 4


def test_a_new_master_key_touches_no_data(folder: Path, note: Maker) -> None:
    fresh = KeyRing(secrets.token_bytes(32))
    with MemoryStore.open(folder, encryption=KeyRing(MASTER)) as store:
        fill(store, note)
        fill(store, note, "bob")
        content = [raw(folder, f"SELECT * FROM {table}") for table in ("cubes", "vectors", "revisions")]
        blobs = {name: data for name, data in files(folder).items() if "blobs" in name}
        old = [row[0] for row in raw(folder, "SELECT wrapped FROM keys")]
        assert store.rotate_master_key(fresh) == 3
        assert content == [
            raw(folder, f"SELECT * FROM {table}") for table in ("cubes", "vectors", "revisions")
        ]
        assert all(data == blobs[name] for name, data in files(folder).items() if "blobs" in name)
        assert all(wrapped not in data for wrapped in old for data in files(folder).values())
        assert len(store.cubes("alice")) == 4
        store.commit("carol", add=[note("new persona, new master")])
    with pytest.raises(MasterKeyError):
        MemoryStore.open(folder, encryption=KeyRing(MASTER))
    with MemoryStore.open(folder, encryption=fresh) as store:
        assert len(store.cubes("bob")) == 4
        assert len(store.cubes("carol")) == 1


def test_a_failed_rotation_changes_nothing(sealed: MemoryStore, folder: Path, note: Maker) -> None:
    fill(sealed, note)
    keys = iter([secrets.token_bytes(32)] * 2)
    before = raw(folder, "SELECT * FROM keys")
    with pytest.raises(MasterKeyError):
        sealed.rotate_master_key(KeyRing(lambda: next(keys, b"")))
    assert raw(folder, "SELECT * FROM keys") == before
    assert len(sealed.cubes("alice")) == 4


def test_a_failed_commit_leaves_no_key_and_no_file(sealed: MemoryStore, folder: Path) -> None:
    draft = CubeDraft.of(kind="parametric", payload={"w": TENSOR})
    with pytest.raises(NotFoundError):
        sealed.commit(
            "alice", add=[draft, CubeDraft.of("x", sources=(Source(owner="b", cube_id="c", sha256="d"),))]
        )
    assert raw(folder, "SELECT owner FROM keys") == [("*",)]
    assert list((folder / "blobs").rglob("*.safetensors")) == []
    sealed.commit("alice", add=[draft])
    assert len(sealed.cubes("alice")) == 1


def test_archives_of_encrypted_stores(sealed: MemoryStore, note: Maker, tmp_path: Path) -> None:
    ids = fill(sealed, note)
    clear = sealed.export("alice", tmp_path / "clear.memcube")
    locked = sealed.export("alice", tmp_path / "locked.memcube", passphrase="correct horse")
    assert b"blobs/" in clear.read_bytes()
    assert b"blobs/" not in locked.read_bytes()
    with MemoryStore.open(tmp_path / "plain") as plain:
        plain.import_archive(clear)
        assert [cube.text for cube in plain.cubes("alice")] == [c.text for c in sealed.cubes("alice")]
        assert plain.history("alice")[0].message == "zqmessage"
        for passphrase in (None, "", "wrong"):
            with pytest.raises(ArchiveError):
                plain.import_archive(locked, as_id="locked", passphrase=passphrase)
        assert plain.kind_of("locked") is None
        plain.import_archive(locked, as_id="locked", passphrase="correct horse")
        assert len(plain.cubes("locked")) == 4
        back = plain.export("alice", tmp_path / "back.memcube")
    sealed.import_archive(back, as_id="alice2")
    blob = sealed.cubes("alice2")[3].blob
    assert blob is not None
    assert torch.equal(sealed.load_blob("alice2", blob)["zqtensor"], TENSOR)
    assert not any(b"zqt" in data for data in files(sealed.folder).values())
    assert {cube.id for cube in sealed.cubes("alice2")}.isdisjoint(ids)
    data = bytearray(locked.read_bytes())
    for at in (9, 30, len(data) // 2, -1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        locked.write_bytes(damaged)
        with pytest.raises(ArchiveError):
            sealed.import_archive(locked, as_id="x", passphrase="correct horse")
    with pytest.raises(InvalidInputError):
        sealed.export("alice", tmp_path / "x.memcube", passphrase="")
    assert not (tmp_path / "x.memcube").exists()


def test_where_a_master_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = KeyRing(MASTER).wrap("alice", b"k" * 32)
    for text in (MASTER.hex(), base64.b64encode(MASTER).decode()):
        monkeypatch.setenv("PERSONA_MASTER_KEY", text)
        assert KeyRing.from_environment().unwrap("alice", wrapped) == b"k" * 32
    assert KeyRing(lambda: MASTER).unwrap("alice", wrapped) == b"k" * 32
    with pytest.raises(MasterKeyError):
        KeyRing(MASTER).unwrap("bob", wrapped)
    for text in ("", "secret", MASTER.hex()[:-2], "ü" * 64):
        monkeypatch.setenv("PERSONA_MASTER_KEY", text)
        with pytest.raises(MasterKeyError):
            KeyRing.from_environment()
    monkeypatch.delenv("PERSONA_MASTER_KEY")
    with pytest.raises(MasterKeyError):
        KeyRing.from_environment()
    for key in (b"", MASTER[:-1], MASTER + b"x"):
        with pytest.raises(MasterKeyError):
            KeyRing(key)


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(StoreError, match=r"persona-sdk\[crypto\]"):
        KeyRing(MASTER)


ID, OTHER = "0" * 32, "1" * 32


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200), data=st.binary(max_size=200))
def test_content_opens_in_its_place_only(text: str, data: bytes) -> None:
    mine, theirs = PersonaCipher("alice", b"a" * 32), PersonaCipher("bob", b"a" * 32)
    stored = mine.seal_text(ID, text)
    assert mine.open_text(ID, stored) == text
    assert stored.isascii()
    assert stored != mine.seal_text(ID, text), "equal texts do not look equal"
    header = mine.seal_header(ID, text, OTHER * 2)
    assert mine.open_header(ID, *header) == (text, OTHER * 2)
    vector = mine.seal_vector(ID, "e", data)
    assert mine.open_vector(ID, "e", vector) == data
    assert len(vector) == len(data) + mine.overhead
    blob = mine.seal_blob(ID, data)
    assert mine.open_blob(ID, blob) == data
    wrong: list[Callable[[], object]] = [
        lambda: mine.open_text(OTHER, stored),
        lambda: theirs.open_text(ID, stored),
        lambda: mine.open_header(ID, header[0], None),
        lambda: mine.open_vector(ID, "f", vector),
        lambda: mine.open_vector(OTHER, "e", vector),
        lambda: mine.open_blob(OTHER, blob),
        lambda: mine.open_blob(ID, blob[:-1]),
        lambda: mine.open_message(1, stored),
    ]
    for attempt in wrong:
        with pytest.raises(CorruptBlobError):
            attempt()


def test_the_clear_cipher_hands_everything_through() -> None:
    text, data = "text", b"data"
    assert CLEAR.open_text(ID, CLEAR.seal_text(ID, text)) is text
    assert CLEAR.open_header(ID, *CLEAR.seal_header(ID, text, ID)) == (text, ID)
    assert CLEAR.open_vector(ID, "e", CLEAR.seal_vector(ID, "e", data)) is data
    assert CLEAR.open_blob(ID, CLEAR.seal_blob(ID, data)) is data
    assert CLEAR.open_message(1, CLEAR.seal_message(1, text)) is text
    assert CLEAR.file_name(ID) is ID
    assert CLEAR.overhead == 0
