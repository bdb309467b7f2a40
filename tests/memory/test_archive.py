"""Export and import: everything comes back, and nothing of a hostile archive is written."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from sqlalchemy import insert, select

from persona_sdk.errors import ArchiveError, InvalidInputError, NotFoundError, StoreError
from persona_sdk.memory import CubeDraft, MemoryStore, Source
from persona_sdk.memory.schema import grants, snapshots, states, uses
from persona_sdk.testing import HashEmbedder

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with alice: five revisions, every kind of change, a rollback and a forgotten cube."""
    folder = tmp_path_factory.mktemp("alice") / "store"
    embedder = HashEmbedder()

    def note(text: str, **header: Any) -> CubeDraft:
        return CubeDraft.of(text, vector=embedder.encode([text])[0], encoder=embedder.fingerprint, **header)

    def weights(seed: int, **header: Any) -> CubeDraft:
        return CubeDraft.of(kind="parametric", payload={"m.A": torch.full((2, 3), float(seed))}, **header)

    with MemoryStore.open(folder) as store:
        drafts = [note("dogs", trust="system"), note("cats"), weights(1)]
        first = store.commit("alice", add=drafts, groups=["b", "a"]).added
        link = Source.of(store.get("alice", first[0]))
        drafts = [weights(2, sources=(link,)), CubeDraft.of("bare")]
        store.commit("alice", add=drafts, retire=[first[1]], groups=["a"])
        store.rollback("alice", 1)
        (secret,) = store.commit("alice", add=[note("to be forgotten")], message="adds it").added
        store.forget("alice", [secret])
        store.export("alice", folder.parent / "alice.memcube")
    return folder


@pytest.fixture
def folder(tmp_path: Path, alice: Path) -> Path:
    """A copy of alice's store, so that each test may change it."""
    return Path(shutil.copytree(alice, tmp_path / "store"))


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    """That copy. Archives of other databases are a matter of `test_postgres`."""
    with MemoryStore.open(folder) as opened:
        yield opened


@pytest.fixture
def archive(tmp_path: Path, alice: Path) -> Path:
    return Path(shutil.copy(alice.parent / "alice.memcube", tmp_path))


def view(store: MemoryStore, owner: str) -> list[object]:
    """Everything about a persona that does not depend on its id or its cubes' ids."""
    history = store.history(owner)
    seen: dict[str, int] = {}
    for revision in history:
        for cube_id in revision.added:
            seen.setdefault(cube_id, len(seen))
    result: list[object] = []
    for r in history:
        result.append((r.number, r.message, r.created_at, r.restores, [seen[i] for i in r.gone]))
        result.append(([seen[i] for i in r.added], [seen[i] for i in r.retired]))
        result.append(store.groups(owner, revision=r.number))
        for cube in store.cubes(owner, revision=r.number):
            sources = [(s.owner == owner, seen.get(s.cube_id), s.sha256) for s in cube.header.sources]
            header = cube.header.model_copy(update={"sources": (), "trust": "any"})
            blob = store.load_blob(owner, cube.blob).keys() if cube.blob else None
            result.append(
                (seen[cube.id], cube.kind, cube.text, cube.blob, blob, header, cube.revision, sources)
            )
        for encoder in ("e", HASH):
            ids, matrix = store.vectors(owner, encoder, revision=r.number)
            result.append(([seen[i] for i in ids], matrix.tolist()))
    return result


HASH = hashlib.sha256(b"hash-embedder-64").hexdigest()


def test_a_persona_comes_back_whole_in_another_store(
    store: MemoryStore, tmp_path: Path, archive: Path
) -> None:
    with MemoryStore.open(tmp_path / "other") as other:
        assert other.import_archive(archive, keep_groups=True) == "alice"
        assert view(other, "alice") == view(store, "alice")
        assert [c.id for c in other.cubes("alice")] == [c.id for c in store.cubes("alice")], "ids are kept"
        assert other.personas() == store.personas()
        trusts = {cube.text: cube.header.trust for cube in other.cubes("alice")}
        assert trusts["dogs"] == "import", "an archive cannot speak for the system"
        for number in range(6):
            assert other.rollback("alice", number).gone == store.rollback("alice", number).gone
            assert view(other, "alice")[-1] == view(store, "alice")[-1]


def test_a_copy_beside_the_original_has_ids_of_its_own(store: MemoryStore, archive: Path) -> None:
    assert store.import_archive(archive, as_id="alice2", keep_groups=True) == "alice2"
    assert view(store, "alice2") == view(store, "alice")
    mine, copies = ({cube.id for cube in store.cubes(owner)} for owner in ("alice", "alice2"))
    assert not mine & copies
    store.rollback("alice2", 2)
    (derived,) = [cube for cube in store.cubes("alice2") if cube.header.sources]
    assert store.forget("alice2", [derived.header.sources[0].cube_id]).derived == 1, "provenance came along"
    assert {cube.id for cube in store.cubes("alice")} == mine


def test_the_same_persona_gives_the_same_bytes(store: MemoryStore, tmp_path: Path, archive: Path) -> None:
    again = store.export("alice", tmp_path / "again.memcube")
    assert again.read_bytes() == archive.read_bytes()
    assert b"to be forgotten" not in archive.read_bytes()
    with MemoryStore.open(tmp_path / "other") as other:
        other.import_archive(archive, keep_groups=True)
        third = other.export("alice", tmp_path / "third.memcube")
    expected = read(archive)
    assert {name: data for name, data in read(third).items() if name.endswith(".safetensors")} == {
        name: data for name, data in expected.items() if name.endswith(".safetensors")
    }
    assert read(third)["revisions.jsonl"] == expected["revisions.jsonl"]


def test_what_cannot_be_exported_or_named_is_refused(
    store: MemoryStore, tmp_path: Path, archive: Path
) -> None:
    with pytest.raises(NotFoundError):
        store.export("nobody", tmp_path / "x.memcube")
    with pytest.raises(StoreError):
        store.export("alice", tmp_path / "no such folder" / "x.memcube")
    with pytest.raises(InvalidInputError):
        store.import_archive(archive, as_id="../x")
    with pytest.raises(ArchiveError, match="already"):
        store.import_archive(archive)
    with pytest.raises(ArchiveError):
        store.import_archive(archive, as_id="a", keep_groups=True)  # a group of its own history
    with pytest.raises(ArchiveError):
        store.import_archive(tmp_path / "missing.memcube", as_id="carol")
    assert [p.id for p in store.personas()] == ["alice"]
    assert sorted(path.name for path in tmp_path.glob("*.memcube")) == ["alice.memcube"]


def test_an_archive_cannot_join_a_user(tmp_path: Path, archive: Path) -> None:
    with MemoryStore.open(tmp_path / "other") as other:
        other.commit("a", add=[CubeDraft.of("a is a user here")])
        with pytest.raises(ArchiveError, match="is a user"):
            other.import_archive(archive, keep_groups=True)
        assert [p.id for p in other.personas()] == ["a"]


# Hostile archives ---------------------------------------------------------------------------------------


def read(path: Path) -> Members:
    with zipfile.ZipFile(path) as source:
        return {info.filename: source.read(info) for info in source.infolist()}


def pack(path: Path, members: Members, *, sign: bool = True, compress: bool = False) -> Path:
    """Write members as an unsigned archive, with a manifest that matches them unless `sign` is False.

    Unsigned, or every attack would be refused for its signature alone.
    """
    members = {name: data for name, data in members.items() if name != "signature.json"}
    if sign:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in members.items()
            if name != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return path


def blob_of(members: Members) -> str:
    return next(name for name in members if name.startswith("blobs/"))


def edit(name: str, change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        lines = [json.loads(line) for line in members[name].splitlines()]
        change(lines)
        members[name] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return apply


def manifest(**changes: object) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | changes).encode()

    return apply


def put(name: str, data: bytes = b"data") -> Callable[[Members], None]:
    return lambda members: members.update({name: data})


def take(prefix: str) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        del members[next(name for name in members if name.startswith(prefix))]

    return apply


def other_tensors(members: Members) -> None:
    members[blob_of(members)] = save({"m.A": torch.zeros(3)})


def state(**changes: object) -> Callable[[Members], None]:
    """Give a cube of the archive a state of life, wrong in one way."""
    found = {"before": "generated", "state": "activated", "since": "2026-01-01T00:00:00Z", "reason": ""}
    return edit("cubes.jsonl", lambda lines: lines[1].update(state=found | changes))


def use(**changes: object) -> Callable[[Members], None]:
    found = {"hits": 1, "strength": 1.0, "last_used": "2026-01-01T00:00:00Z"}
    return edit("cubes.jsonl", lambda lines: lines[1].update(use=found | changes))


def snapshot(*names: str, revision: int = 1) -> Callable[[Members], None]:
    line = {"revision": revision, "at": "2026-01-01T00:00:00Z"}
    return put("snapshots.jsonl", b"\n".join(json.dumps(line | {"name": name}).encode() for name in names))


def format_1_with_snapshots(members: Members) -> None:
    snapshot("monday")(members)
    manifest(format=1)(members)


def no_cubes(lines: list[dict[str, Any]]) -> None:
    del lines[2:]


HOSTILE: dict[str, Callable[[Members], None]] = {
    "unknown member": put("run.py"),
    "path traversal": put("../evil.safetensors"),
    "traversal in blobs": put("blobs/../../personas.db"),
    "absolute path": put("/etc/evil"),
    "backslashes": put("blobs\\..\\evil"),
    "folder": put("blobs/", b""),
    "blob nobody names": put(f"blobs/{'0' * 64}.safetensors"),
    "no manifest": take("manifest.json"),
    "no cubes": take("cubes.jsonl"),
    "no revisions": take("revisions.jsonl"),
    "a time that has no place in UTC": edit(
        "cubes.jsonl",
        lambda lines: next(line for line in lines if "header" in line)["header"].update(
            created_at="9999-12-31T23:59:59-05:00"
        ),
    ),
    "unknown format": manifest(format=3),
    "unknown key": manifest(run="now"),
    "bad owner": manifest(owner="../x"),
    "bad kind": manifest(kind="admin"),
    "wrong counts": manifest(counts={"cubes": 1, "forgotten": 1, "revisions": 5}),
    "negative counts": manifest(counts={"cubes": -1, "forgotten": -1, "revisions": 5}),
    "manifest is no JSON": put("manifest.json", b"{"),
    "deep JSON": put("cubes.jsonl", b"[" * 100_000),
    "pickle": lambda members: members.update({blob_of(members): b"\x80\x04cos\nsystem\n"}),
    "other tensors": other_tensors,
    "missing blob": take("blobs/"),
    "missing vectors": take("vectors.safetensors"),
    "vectors of another shape": put("vectors.safetensors", save({f"vectors/{HASH}": torch.ones(3, 64)})),
    "vectors with NaN": put(
        "vectors.safetensors", save({f"vectors/{HASH}": torch.full((2, 64), float("nan"))})
    ),
    "vectors of float64": put("vectors.safetensors", save({f"vectors/{HASH}": torch.ones(2, 64).double()})),
    "huge header": put("vectors.safetensors", b"\xff" * 16),
    "bad cube kind": edit("cubes.jsonl", lambda lines: lines[1].update(kind="code")),
    "cube with a path as blob": edit("cubes.jsonl", lambda lines: lines[3].update(blob="../../etc/passwd")),
    "cube id with a quote": edit("cubes.jsonl", lambda lines: lines[1].update(id="' OR 1=1 --")),
    "cube twice": edit("cubes.jsonl", lambda lines: lines[2].update(id=lines[1]["id"])),
    "plaintext without text": edit("cubes.jsonl", lambda lines: lines[1].update(text="")),
    "cube of another revision": edit("cubes.jsonl", lambda lines: lines[1].update(revision=2)),
    "cube missing": edit("cubes.jsonl", no_cubes),
    "surrogate": lambda m: m.update({"cubes.jsonl": m["cubes.jsonl"].replace(b'"dogs"', b'"\\ud800"')}),
    "revisions out of order": edit("revisions.jsonl", lambda lines: lines.reverse()),
    "restores the future": edit("revisions.jsonl", lambda lines: lines[2].update(restores=4)),
    "retires twice": edit("revisions.jsonl", lambda lines: lines[3].update(retired=lines[1]["retired"] * 2)),
    "adds twice": edit(
        "revisions.jsonl", lambda lines: lines[0].update(added=[*lines[0]["added"], lines[0]["added"][0]])
    ),
    "bad group": edit("revisions.jsonl", lambda lines: lines[0].update(joined=["../g"])),
    "leaves a group it is not in": edit("revisions.jsonl", lambda lines: lines[0].update(left=["zz"])),
    "the forgotten lives": edit("revisions.jsonl", lambda lines: lines[4].update(retired=[])),
    "no revision": put("revisions.jsonl", b""),
    "a state nothing leads to": state(before="merged", state="generated"),
    "an unknown state": state(state="deleted"),
    "a state with SQL in it": state(state="x'; DROP TABLE cubes; --"),
    "a use that never ends": use(strength=float("inf")),
    "less than no use": use(hits=-1),
    "a snapshot twice": snapshot("monday", "monday"),
    "a snapshot of the future": snapshot("monday", revision=6),
    "a snapshot without a name": snapshot(""),
    "a tombstone that speaks": edit("cubes.jsonl", lambda lines: lines[0].update(reason="said: hi")),
    "format 1 with snapshots": format_1_with_snapshots,
}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".db-shm")
    return {str(file): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    """A store that every attack is tried on; each must leave it byte for byte as it was."""
    with MemoryStore.open(tmp_path_factory.mktemp("victim")) as store:
        store.commit("bystander", add=[CubeDraft.of("was here")])
        yield store


def assert_refused(victim: MemoryStore, path: Path) -> None:
    before = contents(victim.folder)
    with pytest.raises(ArchiveError):
        victim.import_archive(path)
    assert contents(victim.folder) == before
    assert [p.id for p in victim.personas()] == ["bystander"]


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_archive_writes_nothing(
    victim: MemoryStore, archive: Path, tmp_path: Path, attack: str
) -> None:
    members = read(archive)
    HOSTILE[attack](members)
    path = pack(
        tmp_path / "hostile.memcube",
        members,
        sign="manifest.json" in members and attack != "manifest is no JSON",
    )
    assert_refused(victim, path)
    assert not (tmp_path.parent / "evil.safetensors").exists()


def test_packing_an_archive_again_is_not_itself_an_attack(archive: Path, tmp_path: Path) -> None:
    """Else the tests above would pass for the wrong reason."""
    path = pack(tmp_path / "same.memcube", read(archive))
    with MemoryStore.open(tmp_path / "other") as other:
        assert other.import_archive(path, keep_groups=True) == "alice"


def test_a_changed_member_does_not_match_its_hash(victim: MemoryStore, archive: Path, tmp_path: Path) -> None:
    for name in ("cubes.jsonl", "revisions.jsonl", "vectors.safetensors"):
        members = read(archive)
        members[name] = members[name].replace(b"dogs", b"rats") + b"\n"
        assert_refused(victim, pack(tmp_path / "x.memcube", members, sign=False))


def test_links_doubles_encryption_and_bombs_are_refused(
    victim: MemoryStore, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, members = tmp_path / "x.memcube", read(archive)
    pack(path, members)
    with zipfile.ZipFile(path, "a") as target, pytest.warns(UserWarning, match="Duplicate"):
        target.writestr("cubes.jsonl", b"")
    assert_refused(victim, path)

    def rewrite(**attributes: int) -> Path:
        with zipfile.ZipFile(path, "w") as target:
            for name, data in members.items():
                info = zipfile.ZipInfo(name)
                if name == "cubes.jsonl":
                    info.external_attr = attributes.get("external_attr", 0)
                target.writestr(info, data)
        return path

    assert_refused(victim, rewrite(external_attr=0o120777 << 16))
    assert_refused(victim, pack(path, members, compress=True))
    raw = bytearray(rewrite().read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 8] |= 1  # the encryption flag of the last member
    path.write_bytes(raw)
    assert_refused(victim, path)
    monkeypatch.setattr("persona_sdk.memory.archive_reader.MAX_JSON", 1 << 20)
    bomb = members | {"cubes.jsonl": members["cubes.jsonl"] + b"\n" * (2 << 20)}
    assert_refused(victim, pack(path, bomb))


def test_a_bomb_that_lies_about_its_size_is_refused(
    victim: MemoryStore, archive: Path, tmp_path: Path
) -> None:
    path, members = tmp_path / "x.memcube", read(archive)
    members["cubes.jsonl"] += b"\n" * (8 << 20)
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if name.endswith(".jsonl") else zipfile.ZIP_STORED
            target.writestr(name, data, compress_type=kind)
    raw = bytearray(path.read_bytes())
    size = len(members["cubes.jsonl"]).to_bytes(4, "little")
    while (at := raw.find(size)) >= 0:
        raw[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(raw)
    assert_refused(victim, path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_and_scrambled_files_are_refused(
    victim: MemoryStore, archive: Path, tmp_path: Path, share: float
) -> None:
    data = archive.read_bytes()
    cut = int(len(data) * share)
    path = tmp_path / "x.memcube"
    path.write_bytes(data[:cut])
    assert_refused(victim, path)
    path.write_bytes(data[:cut] + bytes([data[cut] ^ 0xFF]) + data[cut + 1 :])
    with MemoryStore.open(tmp_path / "flip") as other:
        try:
            other.import_archive(path)
        except ArchiveError:
            assert other.personas() == []
        else:  # a byte that means nothing, such as a time stamp: then nothing may differ either
            assert other.head("alice") == 5


def test_an_archive_joins_no_group_unless_asked(tmp_path: Path) -> None:
    with MemoryStore.open(tmp_path / "a") as store:
        store.commit("mallory", add=[CubeDraft.of("x")], groups=["admins"])
        archive = store.export("mallory", tmp_path / "m.memcube")
    with MemoryStore.open(tmp_path / "b") as other:
        other.commit("admins", kind="group", add=[CubeDraft.of("secret")])
        other.import_archive(archive)
        assert other.groups("mallory") == ()
        assert other.groups("mallory", revision=1) == ()


def test_states_uses_and_snapshots_come_along(store: MemoryStore, tmp_path: Path) -> None:
    now = "2026-01-02T03:04:05.000000+00:00"
    first, *others = (cube.id for cube in store.cubes("alice"))
    life = {"owner": "alice", "since": now, "reason": "hold", "legal_basis": "court order 7"}
    use_row = {"owner": "alice", "cube_id": first, "hits": 3, "strength": 1.5, "last_used": now}
    with store.writing() as connection:
        frozen = {"cube_id": first, "before": "activated", "state": "frozen"}
        archived = {"cube_id": others[0], "before": "generated", "state": "archived"}
        connection.execute(insert(states), [life | frozen, life | archived])
        connection.execute(insert(uses).values(**use_row))
        connection.execute(insert(snapshots).values(owner="alice", name="monday", revision=2, at=now))
        grant = {
            "owner": "alice",
            "cube_id": first,
            "principal": "user:zqgrantee",
            "right": "read",
            "at": now,
        }
        connection.execute(insert(grants).values(**grant))
    path = store.export("alice", tmp_path / "x.memcube")
    assert b"zqgrantee" not in b"".join(read(path).values()), "grants name others"

    def lives(owner: str) -> list[tuple[object, ...]]:
        with store.reading() as connection:
            columns = (states.c.before, states.c.state, states.c.reason, states.c.legal_basis)
            found = connection.execute(select(*columns).where(states.c.owner == owner).order_by("state"))
            return [tuple(row) for row in found]

    store.import_archive(path, as_id="trusted")
    assert lives("trusted") == lives("alice")
    with store.reading() as connection:
        for table, expected in (
            (uses, ("hits", "strength", "last_used")),
            (snapshots, ("name", "revision", "at")),
        ):
            rows = [
                [tuple(getattr(row, name) for name in expected)]
                for owner in ("alice", "trusted")
                for row in connection.execute(select(table).where(table.c.owner == owner))
            ]
            assert len(rows) == 2
            assert rows[0] == rows[1]
    unsigned = pack(tmp_path / "unsigned.memcube", read(path))
    store.import_archive(unsigned, as_id="unsigned")
    assert lives("unsigned") == [
        ("generated", "activated", "hold", None),
        ("generated", "archived", "hold", "court order 7"),
    ], "who is not trusted cannot forbid to forget"


def test_an_archive_of_format_1_still_comes_in(archive: Path, tmp_path: Path) -> None:
    members = read(archive)
    for name in ("cubes.jsonl",):
        lines = [json.loads(line) for line in members[name].splitlines()]
        for line in lines:
            for key in ("state", "use", "reason"):
                line.pop(key, None)
        members[name] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    manifest(format=1)(members)
    with MemoryStore.open(tmp_path / "other") as other:
        path = pack(tmp_path / "old.memcube", members)
        assert other.inspect_archive(path).format == 1
        assert other.import_archive(path, keep_groups=True) == "alice"
        assert other.head("alice") == 5
        assert len(other.history("alice")[3].added) == 1


def test_text_that_swells_like_a_bomb_is_refused_but_never_written_so(
    victim: MemoryStore, archive: Path, tmp_path: Path
) -> None:
    path, members = tmp_path / "x.memcube", read(archive)
    members["cubes.jsonl"] += b"\n" * (4 << 20)
    pack(path, members)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "bomb.memcube", "w") as target:
        for name in source.namelist():
            kind = zipfile.ZIP_DEFLATED if name == "cubes.jsonl" else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), compress_type=kind)
    assert_refused(victim, tmp_path / "bomb.memcube")
    with MemoryStore.open(tmp_path / "other") as other:
        other.commit("alice", add=[CubeDraft.of("a" * (3 << 20))])  # shrinks to a thousandth
        swollen = other.export("alice", tmp_path / "swollen.memcube")
        assert other.import_archive(swollen, as_id="again") == "again"


def test_parents_follow_their_cubes(store: MemoryStore, tmp_path: Path) -> None:
    (old,) = store.commit("carol", add=[CubeDraft.of("lives in Paris")]).added
    store.commit("carol", add=[CubeDraft.of("lives in Lyon", parents=(old,))], retire=[old])
    path = store.export("carol", tmp_path / "carol.memcube")
    store.import_archive(path, as_id="copy")
    earlier, later = store.all_cubes("copy")
    assert later.header.parents == (earlier.id,) != (old,)
    assert set(store.forget("copy", [later.id]).cube_ids) == {earlier.id, later.id}
    assert len(store.all_cubes("carol")) == 2
