"""Signatures under receipts and archives: who made them, who can check them, and keys that are made once."""

import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_sdk.errors import ArchiveError, InvalidInputError, StoreError
from persona_sdk.memory import CubeDraft, MemoryStore, Receipt, signing
from persona_sdk.memory.signing import ED25519, HMAC, Signature

Maker = Callable[..., CubeDraft]


@pytest.fixture(params=[ED25519, HMAC])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both algorithms; without the extra there is only the second one."""
    if request.param == ED25519:
        pytest.importorskip("cryptography")
    else:
        for name in list(sys.modules):
            if name.partition(".")[0] == "cryptography":
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "cryptography", None)
    assert signing.available() == request.param
    return str(request.param)


def test_a_store_knows_its_own_signature_and_nothing_else(tmp_path: Path, algorithm: str) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    signature = signing.sign(mine, b"data")
    assert signature == signing.sign(mine, b"data"), "the same key, and no chance in it"
    assert signature.algorithm == algorithm
    assert signing.standing(mine, b"data", signature, ()) == "known"
    assert signing.standing(mine, b"data!", signature, ()) == "invalid"
    assert signing.standing(other, b"data", signature, ()) == "unknown"
    foreign = signing.sign(other, b"data")
    assert signing.standing(mine, b"data", foreign, ()) == "unknown"
    assert signing.standing(None, b"data", signature, ()) == "unknown"
    if algorithm == ED25519:
        key = signing.public_key(mine)
        assert key is not None
        assert signing.standing(other, b"data", signature, [key]) == "known"
        assert signing.verify(b"data", signature, key)
        assert not signing.verify(b"data", foreign, key)
        assert signing.standing(other, b"data!", signature, [key]) == "invalid"
        renamed = signature.model_copy(update={"public_key": foreign.public_key})
        assert signing.standing(other, b"data", renamed, ()) == "invalid", "the id is the key's"
    else:
        assert signing.public_key(mine) is None


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=64), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_changed_bit_is_noticed(tmp_path: Path, data: bytes, at: int, bit: int) -> None:
    signature = signing.sign(tmp_path, data)
    assert signing.standing(tmp_path, data, signature, ()) == "known"
    value = bytearray.fromhex(signature.value)
    value[at % len(value)] ^= 1 << bit
    forged = signature.model_copy(update={"value": value.hex()})
    assert signing.standing(tmp_path, data, forged, ()) == "invalid"
    assert signing.standing(tmp_path, data + b"\0", signature, ()) == "invalid"


def test_a_key_is_for_its_owner_only(tmp_path: Path, algorithm: str) -> None:
    signing.require_key(tmp_path)
    file = signing.key_file(tmp_path, signing.available())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing partial is left"
    secret = file.read_bytes()
    file.chmod(0o640)
    with pytest.raises(StoreError, match="read by others"):
        signing.sign(tmp_path, b"")
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(secret)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="link"):
        signing.sign(tmp_path, b"")
    file.unlink()
    file.write_bytes(secret[:-1])
    file.chmod(0o600)
    with pytest.raises(StoreError, match="damaged"):
        signing.sign(tmp_path, b"")


def test_processes_that_need_a_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    program = """if True:
        import sys, time
        from pathlib import Path
        from persona_sdk.memory import signing
        root = Path(sys.argv[1])
        (root / sys.argv[2]).touch()
        while len(list(root.glob("ready*"))) < 3:
            time.sleep(0.001)
        for n in range(40):
            folder = root / f"store{n}"
            folder.mkdir(exist_ok=True)
            print(signing.sign(folder, b"").key_id)
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen([*command, f"ready{n}"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    answers = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(answers[0]) == len(set(answers[0])) == 40
    assert answers[0] == answers[1] == answers[2]


def test_a_third_party_can_check_a_receipt(store: MemoryStore, note: Maker, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    (cube_id,) = store.commit("alice", add=[note("gone")]).added
    receipt = Receipt.from_json(store.forget("alice", [cube_id]).to_json())
    key = store.public_key()
    assert key is not None
    assert receipt.verify_signature(key)
    assert receipt.verify(store)
    assert not replace(receipt, rows=receipt.rows + 1).verify_signature(key)
    assert not replace(receipt, rows=receipt.rows + 1).sealed().verify_signature(key), (
        "hashing is not signing"
    )
    assert not replace(receipt, signature=None).verify_signature(key)
    with MemoryStore.open(tmp_path / "other") as other:
        theirs = other.public_key()
        assert theirs is not None
        assert not receipt.verify_signature(theirs)
        assert not receipt.verify(other), "it did not issue it"
    with pytest.raises(StoreError, match="public key"):
        receipt.verify_signature(b"short")
    with pytest.raises(InvalidInputError):
        Receipt.from_json('{"owner": "alice"}')


def test_receipts_verify_with_either_algorithm(store: MemoryStore, note: Maker, algorithm: str) -> None:
    (cube_id,) = store.commit("alice", add=[note("gone")]).added
    receipt = store.forget("alice", [cube_id])
    assert receipt.signature is not None
    assert receipt.signature.algorithm == algorithm
    assert receipt.verify(store)
    signature = receipt.signature.model_copy(update={"value": receipt.signature.value[::-1]})
    assert not replace(receipt, signature=signature).verify(store)
    signing.key_file(store.folder, signing.available()).unlink()
    assert not receipt.verify(store), "a new key did not sign it"
    if algorithm == HMAC:
        with pytest.raises(StoreError, match="cryptography"):
            signing.verify(b"", Signature(algorithm=ED25519, key_id="0" * 32, value="0" * 128), bytes(32))


def test_without_a_usable_key_nothing_is_erased(store: MemoryStore, note: Maker) -> None:
    (cube_id,) = store.commit("alice", add=[note("stays")]).added
    signing.key_file(store.folder, signing.available()).mkdir()
    with pytest.raises(StoreError, match="key"):
        store.forget("alice", [cube_id])
    assert [cube.id for cube in store.cubes("alice")] == [cube_id]


# Archives -----------------------------------------------------------------------------------------------


@pytest.fixture
def archive(store: MemoryStore, tmp_path: Path) -> Path:
    store.commit("alice", add=[CubeDraft.of("the system says", trust="system")])
    return store.export("alice", tmp_path / "alice.memcube")


def rewrite(path: Path, name: str, data: bytes | None) -> None:
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    members.pop(name)
    if data is not None:
        members[name] = data
    with zipfile.ZipFile(path, "w") as target:
        for key, value in members.items():
            target.writestr(key, value)


def test_trust_follows_the_signature(
    store: MemoryStore, archive: Path, tmp_path: Path, algorithm: str
) -> None:
    store.export("alice", archive)  # signed with the algorithm of this test
    assert store.inspect_archive(archive).signature == "known"
    store.import_archive(archive, as_id="again")
    assert store.cubes("again")[0].header.trust == "import", "it was not said of this persona"
    store.forget_everything("alice")
    store.import_archive(archive)
    assert store.cubes("alice")[0].header.trust == "system"
    with MemoryStore.open(tmp_path / "other") as other:
        summary = other.inspect_archive(archive)
        assert (summary.owner, summary.format, summary.signature) == ("alice", 2, "unknown")
        assert summary.key_id is not None
        other.import_archive(archive)
        assert other.cubes("alice")[0].header.trust == "import"
        if (key := store.public_key()) is not None:
            assert other.inspect_archive(archive, trusted_keys=[key]).signature == "known"
            other.import_archive(archive, as_id="trusted", trusted_keys=[key])
            assert other.cubes("trusted")[0].header.trust == "import"
            other.forget_everything("alice")
            other.import_archive(archive, trusted_keys=[key])
            assert other.cubes("alice")[0].header.trust == "system"
    rewrite(archive, "signature.json", None)
    assert store.inspect_archive(archive).signature == "unknown"
    store.import_archive(archive, as_id="unsigned")
    assert store.cubes("unsigned")[0].header.trust == "import"


@pytest.mark.parametrize("attack", ["another manifest", "another value", "another key", "no JSON", "a path"])
def test_a_wrong_signature_is_refused(
    store: MemoryStore, archive: Path, tmp_path: Path, algorithm: str, attack: str
) -> None:
    store.export("alice", archive)
    with zipfile.ZipFile(archive) as source:
        signature = json.loads(source.read("signature.json"))
        manifest = json.loads(source.read("manifest.json"))
    if attack == "another manifest":
        rewrite(archive, "manifest.json", json.dumps(manifest | {"owner": "mallory"}).encode())
    elif attack == "another value":
        signature["value"] = signature["value"][::-1]
    elif attack == "another key":
        signature["public_key"] = "ab" * 32
        if algorithm == HMAC:
            signature["algorithm"] = ED25519
    elif attack == "a path":
        signature["key_id"] = "../../etc/passwd"
    rewrite(archive, "signature.json", b"{" if attack == "no JSON" else json.dumps(signature).encode())
    for call in (store.inspect_archive, lambda path: store.import_archive(path, as_id="x")):
        with pytest.raises(ArchiveError):
            call(archive)
    assert store.kind_of("x") is None
    assert os.path.exists(archive)
