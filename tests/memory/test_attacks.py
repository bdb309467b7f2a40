"""Attacks on what is stored: files that execute, ids that are paths, tensors that hold what was forgotten."""

import ast
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from persona_sdk.errors import ArchiveError, CorruptBlobError, InvalidInputError, NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Receipt, Source, VectorIndex, signing
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
MEMORY = Path(__file__).parents[2] / "memory"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (self.marker, os.O_CREAT)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_bomb_is_one(marker: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


@pytest.mark.parametrize("form", ["pickle", "torch", "torch zip", "header"])
def test_a_blob_that_would_execute_is_damage(
    store: MemoryStore, weights: Maker, marker: Path, tmp_path: Path, form: str
) -> None:
    cube = store.get("alice", store.commit("alice", add=[weights()]).added[0])
    assert cube.blob is not None
    data = pickle.dumps(Bomb(marker))
    if form == "torch":
        torch.save(Bomb(marker), tmp_path / "x.pt")
        data = (tmp_path / "x.pt").read_bytes()
    elif form == "torch zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as target:
            target.writestr("archive/data.pkl", data)
        data = (tmp_path / "x.zip").read_bytes()
    elif form == "header":  # a length that would allocate the whole machine
        data = struct.pack("<Q", 1 << 62) + data
    store.vault.path(cube.blob).write_bytes(data)
    with pytest.raises(CorruptBlobError):
        store.load_blob("alice", cube.blob)
    with pytest.raises(CorruptBlobError):
        store.export("alice", tmp_path / "x.memcube")
    assert not (tmp_path / "x.memcube").exists()
    assert not marker.exists()


@pytest.mark.parametrize("member", ["data.pkl", "blobs/{digest}.pkl", "archive/data.pkl", "cubes.pickle"])
def test_an_archive_with_a_pickle_is_refused(
    store: MemoryStore, weights: Maker, marker: Path, tmp_path: Path, member: str
) -> None:
    store.commit("alice", add=[weights()])
    path = store.export("alice", tmp_path / "x.memcube")
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(member.format(digest="a" * 64), pickle.dumps(Bomb(marker)))
    with pytest.raises(ArchiveError):
        store.import_archive(path, as_id="bob")
    assert store.kind_of("bob") is None
    assert not marker.exists()


def reads_turns(call: ast.Call) -> bool:
    """Whether it is a call of an `Extractor`, which is given turns and no archive."""
    return ast.unparse(call.func) in ("self._extractor.extract", "self._fallback.extract")


def test_nothing_of_this_package_can_load_what_executes() -> None:
    """Also no index file: FAISS trusts the sizes in its headers."""
    forbidden = {"pickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    calls = {"eval", "exec", "read_index", "write_index", "deserialize_index", "extractall", "extract"}
    found = []
    for file in MEMORY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                names |= {(getattr(node, "module", "") or "").partition(".")[0]}
                found += [(file.name, name) for name in names & forbidden]
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                of_torch = ast.unparse(node.func) in ("torch.load", "torch.jit.load", "numpy.load", "np.load")
                found += [(file.name, name)] if (name in calls and not reads_turns(node)) or of_torch else []
    assert found == []


def test_a_planted_index_is_not_read(
    store: MemoryStore, folder: Path, note: Maker, embedder: HashEmbedder
) -> None:
    planted = faiss.IndexFlatIP(64)
    planted.add(np.ones((5, 64), dtype="float32"))
    for name in ("alice.faiss", "personas.index", "index.faiss"):
        faiss.write_index(planted, str(folder / name))
        (folder / "blobs" / name).write_bytes((folder / name).read_bytes())
    (mine,) = store.commit("alice", add=[note("dogs")]).added
    hits = VectorIndex(store).search("alice", embedder.encode(["x"])[0], 9, encoder=embedder.fingerprint)
    assert [cube_id for cube_id, _ in hits] == [mine]


PATHS = ("../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "..", "", "a\0b", "a\n", "C:", "~", "a" * 129, "é")


@pytest.mark.parametrize("path", PATHS)
def test_ids_are_no_paths(
    store: MemoryStore, folder: Path, weights: Maker, tmp_path: Path, path: str
) -> None:
    signing.require_key(store.folder)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    with pytest.raises(InvalidInputError):
        store.commit(path, add=[weights()])
    with pytest.raises(InvalidInputError):
        store.commit("alice", groups=[path])
    for call in (store.vault.path, store.vault.holds, store.vault.read, store.vault.delete):
        with pytest.raises(InvalidInputError):
            call(path)
    with pytest.raises(NotFoundError):
        store.load_blob("alice", path)
    with pytest.raises(NotFoundError):
        store.forget("alice", [path])
    assert sorted(file.name for file in tmp_path.rglob("*")) == before


def test_a_folder_of_blobs_that_is_a_link_out_of_the_store_deletes_nothing_outside(
    store: MemoryStore, folder: Path, weights: Maker, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    foreign = outside / f"{'ab' * 32}.txt"
    foreign.write_text("not ours")
    (folder / "blobs" / "ab").symlink_to(outside)
    (cube_id,) = store.commit("alice", add=[weights()]).added
    store.forget("alice", [cube_id])
    assert foreign.read_text() == "not ours"


@pytest.mark.parametrize("kind", ["activation", "parametric"])
def test_tensors_are_data_of_the_persona(store: MemoryStore, folder: Path, tmp_path: Path, kind: str) -> None:
    """KV caches and adapters go, are exported and stay private like the text they came from."""
    (text,) = store.commit("alice", add=[CubeDraft.of("I live in Lyon")]).added
    link = Source.of(store.get("alice", text))
    values = torch.tensor([271.828, 314.159, 161.803])
    draft = CubeDraft.of(kind=kind, payload={"zqlayer.0.keys": values}, sources=(link,))  # type: ignore[arg-type]
    (cube_id,) = store.commit("alice", add=[draft]).added
    blob = store.get("alice", cube_id).blob
    assert blob is not None
    with pytest.raises(NotFoundError):
        store.load_blob("bob", blob)
    archive = store.export("alice", tmp_path / "alice.memcube")
    assert values.numpy().tobytes() in archive.read_bytes()
    receipt: Receipt = store.forget("alice", [text])
    assert receipt.blobs == (blob,)
    with pytest.raises(NotFoundError):
        store.load_blob("alice", blob)
    for file in folder.rglob("*"):
        if file.is_file():
            assert values.numpy().tobytes() not in file.read_bytes()
            assert b"zqlayer" not in file.read_bytes()
