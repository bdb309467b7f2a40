"""Forgetting is complete: rows, vectors, files, what was derived, and every byte."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persona_sdk.errors import NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore, Receipt, Source, VectorIndex
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
CANARIES = ("cxnary-text", "cxnary-title", "cxnary-tag", "cxnary-key", "cxnary-value", "cxnary-message")
TENSOR = torch.tensor([3.14159274101257324, -271828.1875, 1.6180340051651, 9.8765432e-12])


def bytes_found(folder: Path, needles: list[bytes]) -> list[tuple[str, bytes]]:
    return [
        (file.name, needle)
        for file in folder.rglob("*")
        if file.is_file()
        for needle in needles
        if needle in file.read_bytes() or needle.decode("latin1") in str(file)
    ]


def commit_canaries(store: MemoryStore, owner: str, note: Maker) -> list[str]:
    text, title, tag, key, value, message = CANARIES
    header = {"title": title, "tags": (tag,), "attributes": {key: [value]}}
    blob = CubeDraft.of(kind="parametric", payload={"cxnary-tensor": TENSOR})
    # Long enough for overflow pages, and many, so that pages are split, merged and freed.
    drafts = [note(f"{text} {n} " * (900 if n % 5 == 0 else 3), **header) for n in range(12)]
    return list(store.commit(owner, add=[*drafts, blob], message=message).added)


def needles(embedder: HashEmbedder) -> list[bytes]:
    vector = embedder.encode([f"{CANARIES[0]} 1 " * 3])[0].numpy().tobytes()
    return [*(canary.encode() for canary in CANARIES), b"cxnary-tensor", TENSOR.numpy().tobytes(), vector]


@pytest.mark.parametrize("everything", [False, True])
def test_no_byte_of_what_was_forgotten_is_left(
    store: MemoryStore, folder: Path, note: Maker, embedder: HashEmbedder, everything: bool
) -> None:
    store.commit("bob", add=[note("bob stays")])
    store.commit("alice-cxnary", add=[note("innocent")], message="kept message")
    ids = commit_canaries(store, "alice-cxnary", note)
    store.commit("alice-cxnary", retire=ids[:3], message=CANARIES[5])
    store.rollback("alice-cxnary", 2)
    wanted = needles(embedder)
    assert {needle for _, needle in bytes_found(folder, wanted)} == set(wanted), "the search itself must work"
    (folder / "personas.db.before-0000.bak").write_bytes(wanted[0])
    if everything:
        receipt = store.forget_everything("alice-cxnary")
        wanted.append(b"alice-cxnary")
    else:
        receipt = store.forget("alice-cxnary", ids)
    assert receipt.scrubbed
    assert bytes_found(folder, wanted) == []
    assert receipt.verify(store)
    assert set(receipt.cube_ids) >= set(ids)
    assert receipt.vectors == 12 + everything
    assert receipt.bytes > 12 * 64 * 4
    assert len(receipt.blobs) == 1
    assert [cube.text for cube in store.cubes("bob")] == ["bob stays"]
    if not everything:
        assert [r.message for r in store.history("alice-cxnary")] == [
            "kept message", "(forgotten)", "(forgotten)", "(forgotten)", "forget",
        ]  # fmt: skip
        assert [cube.text for cube in store.cubes("alice-cxnary")] == ["innocent"]
    store.close()
    assert bytes_found(folder, wanted) == []
    with MemoryStore.open(folder) as reopened:
        assert receipt.verify(reopened)


def test_everything_derived_is_forgotten_whoever_owns_it(store: MemoryStore, weights: Maker) -> None:
    def derive(owner: str, source_owner: str, source: str, seed: int, **options: str) -> str:
        link = Source.of(store.get(source_owner, source))
        return store.commit(owner, add=[weights(seed, sources=(link,))], **options).added[0]  # type: ignore[arg-type]

    root, other = store.commit("alice", add=[CubeDraft.of("root"), CubeDraft.of("other")]).added
    own = derive("alice", "alice", root, 1)
    group = derive("club", "alice", own, 2, kind="group", message="from alice's root")
    bobs = derive("bob", "club", group, 3)
    store.commit("bob", retire=[bobs])
    unrelated = derive("bob", "alice", other, 4)
    receipt = store.forget("alice", [root])
    assert set(receipt.cube_ids) == {root, own, group, bobs}
    assert (receipt.derived, len(receipt.blobs)) == (3, 3)
    assert "bob" not in receipt.canonical()
    assert "club" not in receipt.canonical()
    assert [cube.id for cube in store.cubes("alice")] == [other]
    assert store.cubes("club") == []
    club = store.history("club")[-1]
    assert (club.message, club.retired, club.number) == ("forget", (group,), 2)
    assert store.history("bob")[-1].message == "forget"
    assert [cube.id for cube in store.cubes("bob")] == [unrelated]
    assert store.rollback("bob", 1).gone == (bobs,)
    assert receipt.verify(store)


def test_forgetting_a_persona_ends_its_whole_history(store: MemoryStore, note: Maker) -> None:
    (cube_id,) = store.commit("alice", add=[note("first life")], groups=["club"]).added
    link = Source.of(store.get("alice", cube_id))
    store.commit("bob", add=[CubeDraft.of("derived", sources=(link,))])
    receipt = store.forget_everything("alice")
    assert store.kind_of("alice") is None
    assert (store.head("alice"), store.history("alice"), store.groups("alice")) == (0, [], ())
    assert store.cubes("bob") == []
    assert receipt.derived == 1
    assert receipt.verify(store)
    with pytest.raises(NotFoundError):
        store.forget_everything("alice")
    assert store.commit("alice", add=[note("second life")]).number == 1, "the id is free again"
    assert receipt.verify(store), "a new persona of that id is not what was erased"


def test_a_refused_forget_erases_nothing(store: MemoryStore, note: Maker) -> None:
    (cube_id,) = store.commit("alice", add=[note("stays")]).added
    for ids in ([cube_id, "0" * 32], []):
        with pytest.raises(NotFoundError):
            store.forget("alice", ids)
    assert [cube.id for cube in store.cubes("alice")] == [cube_id]
    assert store.head("alice") == 1


def test_a_receipt_that_was_altered_or_is_not_true_does_not_verify(store: MemoryStore, note: Maker) -> None:
    gone, stays = store.commit("alice", add=[note("gone"), note("stays")]).added
    receipt = store.forget("alice", [gone])
    assert receipt.verify(store)
    assert not replace(receipt, cube_ids=(gone, stays)).verify(store)
    assert not replace(receipt, cube_ids=(gone, stays)).sealed().verify(store), "that cube is still there"
    assert not replace(receipt, derived=1).verify(store)
    assert not replace(receipt, everything=True).sealed().verify(store)
    with pytest.raises(AttributeError):
        receipt.owner = "bob"  # type: ignore[misc]


def test_a_blob_file_that_is_left_fails_the_receipt(store: MemoryStore, weights: Maker) -> None:
    cube = store.get("alice", store.commit("alice", add=[weights()]).added[0])
    assert cube.blob is not None
    file = store.vault.path(cube.blob)
    data = file.read_bytes()
    receipt = store.forget("alice", [cube.id])
    assert not file.exists()
    file.write_bytes(data)
    assert not receipt.verify(store)
    file.unlink()
    store.commit("bob", add=[weights()])
    assert receipt.verify(store), "somebody else's equal tensors are not what was forgotten"


def test_a_reader_in_the_way_is_reported_and_scrubbed_later(folder: Path, note: Maker) -> None:
    with MemoryStore.open(folder, busy_timeout=0.1) as store, MemoryStore.open(folder) as other:
        (cube_id,) = store.commit("alice", add=[note("cxnary-text")]).added
        with other.reading() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM cubes").scalar()
            receipt: Receipt = store.forget("alice", [cube_id])
            assert not receipt.scrubbed
            assert store.cubes("alice") == []
        assert store.scrub()
        assert bytes_found(folder, [b"cxnary-text"]) == []


def test_forgetting_empties_the_index(store: MemoryStore, note: Maker, embedder: HashEmbedder) -> None:
    index = VectorIndex(store)
    query = embedder.encode(["dogs"])[0]
    gone, stays = store.commit("alice", add=[note("dogs"), note("dogs and cats")]).added
    assert len(index.search("alice", query, 5, encoder=embedder.fingerprint)) == 2
    store.forget("alice", [gone])
    assert index.bytes == 0
    assert [i for i, _ in index.search("alice", query, 5, encoder=embedder.fingerprint)] == [stays]


def test_nothing_is_left_whatever_was_written_and_forgotten_before(tmp_path: Path) -> None:
    """SQLite leaves old bytes in places of its own; only rewriting the file gets them all."""
    for seed in (3, 28, 31):
        dice = random.Random(seed)
        folder = tmp_path / str(seed)
        with MemoryStore.open(folder) as store:
            live: dict[str, tuple[str, str]] = {}
            for step in range(14):
                owner = dice.choice("abc")
                texts = [
                    f"cx{seed:02}{step:02}{n}nary " * dice.choice((1, 3, 20, 200, 900))
                    for n in range(dice.randrange(1, 8))
                ]
                added = store.commit(owner, add=[CubeDraft.of(text) for text in texts]).added
                live |= {i: (owner, text.split()[0]) for i, text in zip(added, texts, strict=True)}
                chosen = dice.sample(sorted(live), min(len(live), dice.randrange(1, 6)))
                gone = []
                for cube_id in chosen:
                    owner, canary = live.pop(cube_id)
                    assert store.forget(owner, [cube_id]).scrubbed
                    gone.append(canary.encode())
                assert bytes_found(folder, gone) == []


def test_a_fresh_orphan_is_gone_after_forgetting(store: MemoryStore, folder: Path, weights: Maker) -> None:
    (cube_id,) = store.commit("alice", add=[weights(1)]).added
    orphan = folder / "blobs" / "ab" / f"{'ab' * 32}.safetensors"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a commit that was killed")
    assert store.forget("alice", [cube_id]).scrubbed
    assert not orphan.exists()


def test_the_partial_of_a_killed_backup_is_gone_after_forgetting(store: MemoryStore, folder: Path) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("secret")]).added
    (folder / "personas.db.before-0000.bak.tmp").write_bytes(b"a copy of the database")
    assert store.forget("alice", [cube_id]).verify(store)
    assert not list(folder.glob("*.tmp"))


def test_a_listener_that_fails_does_not_cost_the_receipt(store: MemoryStore, weights: Maker) -> None:
    (cube_id,) = store.commit("alice", add=[weights(1)]).added

    def broken(_owner: str) -> None:
        raise ValueError("not our fault")

    store.on_forget(broken)
    receipt = store.forget("alice", [cube_id])
    assert receipt.verify(store)
    assert len(receipt.blobs) == 1


def test_members_of_an_erased_group_are_not_in_the_next_one_of_that_name(store: MemoryStore) -> None:
    store.commit("team", kind="group", add=[CubeDraft.of("old secret")])
    store.commit("bob", add=[CubeDraft.of("hi")], groups=["team"])
    store.forget_everything("team")
    store.commit("team", kind="group", add=[CubeDraft.of("new secret")])
    assert store.groups("bob") == store.groups("bob", revision=1) == ()


def test_bytes_are_bytes(store: MemoryStore) -> None:
    (plain,) = store.commit("alice", add=[CubeDraft.of("e" * 100)]).added
    (accents,) = store.commit("alice", add=[CubeDraft.of("é" * 100)]).added
    assert store.forget("alice", [accents]).bytes == store.forget("alice", [plain]).bytes + 100


def test_earlier_versions_are_forgotten_with_the_newest(store: MemoryStore) -> None:
    (first,) = store.commit("alice", add=[CubeDraft.of("lives in Paris")]).added
    (second,) = store.commit(
        "alice", add=[CubeDraft.of("lives in Lyon", parents=(first,))], retire=[first]
    ).added
    (other,) = store.commit("alice", add=[CubeDraft.of("likes tea")]).added
    assert store.forget("alice", [first]).cube_ids == (first,)  # a later version is another statement
    assert {cube.id for cube in store.all_cubes("alice")} == {second, other}
    (third,) = store.commit(
        "alice", add=[CubeDraft.of("lives in Nice", parents=(second, first))], retire=[second]
    ).added
    assert set(store.forget("alice", [third]).cube_ids) == {second, third}
    assert [cube.id for cube in store.all_cubes("alice")] == [other]
