"""The audit log: one event a write, no text in it, and whatever is done to it later is found."""

import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, delete, select, update

from persona_sdk.errors import StoreError
from persona_sdk.memory import BoundStore, CubeDraft, MemoryStore, Principal, Source, database, events, uses
from persona_sdk.memory.expiry import expire
from persona_sdk.memory.schema import events as event_rows
from persona_sdk.memory.schema import metadata
from persona_sdk.memory.transitions import merge

NOW = datetime(2030, 1, 1, tzinfo=UTC)
BOB = Principal("bob")


def busy(store: MemoryStore) -> list[str]:
    """One of each write to alice; the kinds of events that are expected."""
    one, two, three, _ = store.commit(
        "alice", add=[CubeDraft.of(t, expires_at=NOW if t == "due" else None) for t in ("1", "2", "3", "due")]
    ).added
    store.snapshot("alice", "start")
    store.commit("alice", groups=["club"])
    store.archive("alice", [one])
    store.activate("alice", [one])
    uses.record(store, "alice", [two], NOW)
    store.grant("alice", two, BOB)
    store.grant("alice", three, BOB, "write")
    store.revoke("alice", two, BOB)
    merge(store, "alice", [one, two], CubeDraft.of("merged"))
    store.freeze("alice", three, "why", legal_basis="law")
    store.unfreeze("alice", three, "over")
    store.rollback("alice", "start")
    store.forget("alice", [two])
    expire(store, now=NOW)
    return [
        "commit", "snapshot", "commit", "archive", "activate", "use", "grant", "grant", "revoke", "merge",
        "freeze", "unfreeze", "rollback", "forget", "expire",
    ]  # fmt: skip


def test_every_write_appends_exactly_one_event(store: MemoryStore, tmp_path: Path) -> None:
    expected = busy(store)
    found = store.audit("alice")
    assert [event.kind for event in found] == expected
    assert [event.number for event in found] == list(range(1, len(expected) + 1))
    assert {event.actor for event in found} == {"system"}
    assert store.verify_audit("alice") == []
    store.export("alice", tmp_path / "a.memcube")
    assert len(store.audit("alice")) == len(expected), "reading is no event"
    store.import_archive(tmp_path / "a.memcube", as_id="alice2")
    assert [event.kind for event in store.audit("alice2")] == ["import"]
    assert store.verify_audit("alice2") == []


def test_the_hash_is_the_one_that_is_documented(store: MemoryStore, folder: Path) -> None:
    store.commit("alice", add=[CubeDraft.of("one")])
    store.commit("alice", add=[CubeDraft.of("two")])
    previous = "0" * 64
    with closing(sqlite3.connect(folder / "personas.db")) as raw:
        columns = "number, owner, at, actor, kind, details, previous, hash"
        for *chained, found in raw.execute(f"SELECT {columns} FROM events ORDER BY number"):
            plain = json.dumps(chained, separators=(",", ":"))
            assert chained[-1] == previous
            assert hashlib.sha256(plain.encode()).hexdigest() == found
            previous = found
    with store.reading() as connection:
        assert events.head(connection, "alice") == events.Head(2, previous)
        assert events.head(connection, "nobody") == events.Head(0, "0" * 64)


def test_the_actor_is_named_in_its_own_chain_and_hashed_in_others(store: MemoryStore, folder: Path) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    store.grant("alice", cube_id, Principal("cxnary-bob"), "write")
    BoundStore(store, Principal("alice")).snapshot("alice", "start")
    BoundStore(store, Principal("cxnary-bob")).archive("alice", [cube_id])
    assert [event.actor for event in store.audit("alice")] == [
        "system", "system", "user:alice", f"user:{hashlib.sha256(b'cxnary-bob').hexdigest()}",
    ]  # fmt: skip
    store.commit("cxnary-bob", add=[CubeDraft.of("two")])
    store.forget_everything("cxnary-bob")
    assert not [f for f in folder.rglob("*") if f.is_file() and b"cxnary" in f.read_bytes()]
    assert [event.kind for event in store.audit("alice")][-1] == "revoke", "the grant went with its holder"
    assert store.verify_audit("alice") == []


def test_an_error_rolls_the_event_back_as_well(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    for attempt in (
        lambda: store.commit("alice", retire=["0" * 32]),
        lambda: store.rollback("alice", 9),
        lambda: store.forget("alice", ["0" * 32]),
        lambda: store.snapshot("nobody", "start"),
        lambda: uses.record(store, "alice", [cube_id, "0" * 32], NOW),
    ):
        with pytest.raises(StoreError):
            attempt()
    assert len(store.audit("alice")) == 1


def test_erasing_a_persona_erases_its_chain_and_tells_the_store(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    store.commit("bob", add=[CubeDraft.of("b", sources=(Source.of(store.get("alice", cube_id)),))])
    store.commit("carol", groups=["alice-club"])
    store.commit("alice-club", kind="group")
    store.forget_everything("alice")
    store.forget_everything("alice-club")
    assert store.audit("alice") == []
    erased = store.audit(events.STORE)
    assert [event.details["persona"] for event in erased] == [
        hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "alice-club")
    ]
    assert erased[0].details["cubes"] == 1
    assert [event.kind for event in store.audit("bob")] == ["commit", "forget"]
    assert store.audit("bob")[-1].actor == "system"
    assert [event.kind for event in store.audit("carol")] == ["commit", "group_erased"]
    store.commit("alice", add=[CubeDraft.of("second life")])
    assert [event.number for event in store.audit("alice")] == [1]
    assert [store.verify_audit(name) for name in ("alice", "bob", "carol", events.STORE)] == [[]] * 4


# No text ----------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=6, max_size=12)


@settings(max_examples=15, deadline=None)
@given(words=st.lists(WORDS.map("qz{}".format), min_size=12, max_size=12, unique=True))
def test_no_text_from_anywhere_gets_into_an_event(words: list[str]) -> None:
    text, title, tag, key, value, message, reason, basis, name, principal, group, reference = words
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(Path(folder) / "store") as store:
        header = {"title": title, "tags": (tag,), "attributes": {key: value}, "slot": key, "licence": value}
        draft = CubeDraft.of(text, origin={"reference": reference, "session": name}, **header)
        one, two, three = store.commit(
            "alice", add=[draft, draft, draft], message=message, groups=[group]
        ).added
        store.snapshot("alice", name)
        store.archive("alice", [one], reason=reason)
        store.activate("alice", [one], reason=reason)
        store.freeze("alice", one, reason, legal_basis=basis)
        store.unfreeze("alice", one, reason)
        store.grant("alice", two, Principal(principal, "service"), "write")
        BoundStore(store, Principal(principal, "service")).archive("alice", [two], reason=reason)
        merge(store, "alice", [one, three], draft, reason=reason)
        store.rollback("alice", name)
        store.forget("alice", [one])
        store.commit(group, kind="group")
        store.forget_everything(group)
        with store.reading() as connection:
            rows = connection.execute(select(event_rows)).all()
        assert len(rows) > 12
        written = "\n".join(" ".join(map(str, row)) for row in rows if row.owner != group)
        assert not [word for word in words if word in written]


def test_an_event_refuses_text(store: MemoryStore) -> None:
    store.commit("alice")
    for details in ({"note": "likes dogs"}, {"states": {"alice": "frozen"}}, {"x": [["text"]]}, {"x": 1.5}):
        with pytest.raises(ValueError, match="an event was given") as refused, store.writing() as connection:
            events.append(connection, "alice", "test", details)
        assert "dogs" not in str(refused.value)
    assert len(store.audit("alice")) == 1


# Tampering --------------------------------------------------------------------------------------------


@pytest.fixture
def raw(folder: Path, store: MemoryStore) -> Iterator[sqlite3.Connection]:
    """Somebody with the file and without the triggers."""
    busy(store)
    assert store.verify_audit("alice") == []
    with closing(sqlite3.connect(folder / "personas.db", isolation_level=None)) as raw:
        for name in ("events_never_change", "events_stay"):
            raw.execute(f"DROP TRIGGER {name}")
        yield raw


def rechain(raw: sqlite3.Connection) -> None:
    """What a careful forger does: compute all hashes anew."""
    previous = "0" * 64
    columns = "seq, number, owner, at, actor, kind, details"
    for seq, *rest in raw.execute(f"SELECT {columns} FROM events ORDER BY number").fetchall():
        new = hashlib.sha256(json.dumps([*rest, previous], separators=(",", ":")).encode()).hexdigest()
        raw.execute("UPDATE events SET previous = ?, hash = ? WHERE seq = ?", (previous, new, seq))
        previous = new


EDITS = {
    "who": "UPDATE events SET actor = 'user:mallory' WHERE number = 4",
    "when": "UPDATE events SET at = '2020-01-01' WHERE number = 4",
    "what": "UPDATE events SET kind = 'commit' WHERE number = 4",
    "details": "UPDATE events SET details = replace(details, '1', '2') WHERE number = 4",
    "no json": "UPDATE events SET details = 'x' WHERE number = 15",
    "hash": "UPDATE events SET hash = previous WHERE number = 4",
    "gap": "DELETE FROM events WHERE number = 4",
    "first": "DELETE FROM events WHERE number = 1",
    "all": "DELETE FROM events",
    "tail": "DELETE FROM events WHERE number > 12",
    "last": "DELETE FROM events WHERE number = 15",
    "renumbered": "UPDATE events SET number = number + 100 WHERE number > 4",
    "swapped": "UPDATE events SET number = number - 9 WHERE number IN (4, 5);"  # to -5 and -4
    "UPDATE events SET number = -number WHERE number < 0",
    "another's": "UPDATE events SET owner = 'bob' WHERE number = 4",
    "history": "UPDATE memberships SET to_revision = 2 WHERE from_revision = 1",
    "revision": "DELETE FROM revisions WHERE number = 5",
    "head": "UPDATE personas SET head = head + 1",
    "tombstone": "DELETE FROM tombstones",
    "state": "UPDATE states SET state = 'archived', before = 'activated'",
    "grant": "UPDATE grants SET \"right\" = 'read'",
    "new grant": "INSERT INTO grants SELECT owner, cube_id, 'user:mallory', \"right\", at FROM grants",
    "snapshot": "UPDATE snapshots SET revision = 2",
}


@pytest.mark.parametrize("edit", sorted(EDITS))
def test_tampering_is_found(store: MemoryStore, raw: sqlite3.Connection, edit: str) -> None:
    before = raw.total_changes
    raw.executescript(EDITS[edit])
    assert raw.total_changes > before, "the edit must do something"
    assert store.verify_audit("alice")
    raw.execute("PRAGMA wal_checkpoint")
    store.commit("alice", message="writing goes on")
    assert store.verify_audit("alice"), "a later write must not cover it up"


REFORGED = {"history", "revision", "tombstone", "state", "grant", "snapshot", "tail", "all", "head"}


@pytest.mark.parametrize("edit", sorted(REFORGED))
def test_new_hashes_do_not_help_against_the_tables(
    store: MemoryStore, raw: sqlite3.Connection, edit: str
) -> None:
    raw.executescript(EDITS[edit])
    rechain(raw)
    assert store.verify_audit("alice")


def test_only_an_anchor_finds_a_chain_that_was_computed_anew(
    store: MemoryStore, raw: sqlite3.Connection
) -> None:
    with store.reading() as connection:
        anchor = events.head(connection, "alice")
    raw.executescript(EDITS["who"])
    rechain(raw)
    assert store.verify_audit("alice") == [], "as the module says"
    assert store.verify_audit("alice", anchor=anchor)
    store.commit("alice")
    assert store.verify_audit("alice", anchor=anchor)
    raw.executescript("DELETE FROM events WHERE number > 3")
    assert any("anchored" in fault.what for fault in store.verify_audit("alice", anchor=anchor))


def test_a_tail_of_grants_that_was_cut_off_is_found(store: MemoryStore, raw: sqlite3.Connection) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    store.grant("alice", cube_id, BOB)
    raw.execute("DELETE FROM events WHERE number = (SELECT max(number) FROM events)")
    rechain(raw)
    assert store.verify_audit("alice")
    store.commit("alice")
    assert store.verify_audit("alice")


def test_an_honest_store_still_fits_an_old_anchor(store: MemoryStore) -> None:
    store.commit("alice", add=[CubeDraft.of("one")])
    with store.reading() as connection:
        anchor = events.head(connection, "alice")
    busy(store)
    assert store.verify_audit("alice", anchor=anchor) == []


def test_the_chain_of_the_store_knows_how_many_were_erased(
    store: MemoryStore, raw: sqlite3.Connection
) -> None:
    store.forget_everything("alice")
    assert store.verify_audit(events.STORE) == []
    raw.execute("DELETE FROM events WHERE owner = '*'")
    assert store.verify_audit(events.STORE)


def test_sql_refuses_to_change_or_delete_events(store: MemoryStore) -> None:
    store.commit("alice", add=[CubeDraft.of("one")])
    store.commit("bob")
    store.forget_everything("bob")
    for statement in (
        update(event_rows).values(actor="user:mallory"),
        delete(event_rows).where(event_rows.c.owner == "alice"),
        delete(event_rows).where(event_rows.c.owner == events.STORE),
    ):
        with (
            pytest.raises(StoreError, match=r"append-only|IntegrityConstraintViolation"),
            store.writing() as connection,
        ):
            connection.execute(statement)
    assert store.verify_audit("alice") == store.verify_audit(events.STORE) == []


# Older stores -----------------------------------------------------------------------------------------


def test_a_store_older_than_the_log_begins_one_when_it_is_migrated(folder: Path) -> None:
    folder.mkdir()
    engine = create_engine(f"sqlite:///{folder / 'personas.db'}")
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        tables = metadata.tables
        persona = {"owner": "alice", "kind": "user", "head": 2, "stamp": "s", "created_at": "2020"}
        connection.execute(tables["personas"].insert().values(**persona))
        for number in (1, 2):
            values = {
                "owner": "alice",
                "number": number,
                "message": "",
                "created_at": "2020-01-01T00:00:00+00:00",
            }
            connection.execute(tables["revisions"].insert().values(**values))
        connection.execute(tables["erasures"].insert().values(owner="0" * 64, at="2020", counts="{}"))
    engine.dispose()
    with MemoryStore.open(folder) as store:
        (first,) = store.audit("alice")
        assert (first.kind, first.details) == ("migrated", {"revision": 2})
        assert store.verify_audit("alice") == store.verify_audit(events.STORE) == []
        store.commit("alice", add=[CubeDraft.of("new")])
        store.commit("bob")
        store.forget_everything("bob")
        assert store.verify_audit("alice") == store.verify_audit(events.STORE) == []
        assert store.audit(events.STORE)[-1].details["erasures"] == 2


def test_acting_as_ends_with_its_block(store: MemoryStore) -> None:
    attempt: Callable[[], object] = lambda: store.commit("alice", parent=9)  # noqa: E731
    store.commit("alice")
    with pytest.raises(StoreError), events.acting_as("user:alice"):
        attempt()
    store.commit("alice")
    assert store.audit("alice")[-1].actor == "system"
