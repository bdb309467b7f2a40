"""What is PostgreSQL's own: its URL, its folder, its locks, its errors. The store tests run on it besides."""

import os
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError

from persona_sdk.errors import (
    CorruptBlobError,
    InvalidInputError,
    NotFoundError,
    PersonaError,
    RevisionConflictError,
    SchemaError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from persona_sdk.memory import CubeDraft, MemoryStore, Principal, transitions, uses
from persona_sdk.memory.database_errors import translated
from persona_sdk.memory.postgres import MARKER, is_url
from tests.memory.test_history import TEXTS, HistoryMachine
from tests.memory.test_schema import newer_code

Draft = Callable[..., CubeDraft]


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    return tmp_path / "blobs of it"


@pytest.fixture
def pair(schema_url: str, blobs: Path) -> Iterator[tuple[MemoryStore, MemoryStore]]:
    """One store opened twice, as by two processes."""
    options: dict[str, Any] = {"blobs": blobs, "busy_timeout": 0.05}
    with MemoryStore.open(schema_url, **options) as one, MemoryStore.open(schema_url, **options) as two:
        yield one, two


def execute(url: str, statement: str) -> list[object]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            found = connection.exec_driver_sql(statement)
            return list(found.scalars()) if found.returns_rows else []
    finally:
        engine.dispose()


# Where it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("postgresql+psycopg://u@h/d", True),
        ("postgresql:///d?host=/run", True),
        ("mysql://h/d", True),
        ("personas", False),
        ("/srv/personas", False),
        ("C:\\personas", False),
        (Path("a"), False),
    ],
)
def test_urls_are_told_from_folders(place: str | Path, expected: bool) -> None:
    assert is_url(place) is expected


@pytest.mark.parametrize("place", ["mysql://h/d", "postgresql+asyncpg://h/d", "sqlite:///x.db", "http://[x"])
def test_other_urls_are_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="Expected a folder, or postgresql"):
        MemoryStore.open(place)
    assert not list(tmp_path.iterdir())


def test_blobs_belong_to_urls(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="only with a URL"):
        MemoryStore.open(tmp_path / "a", blobs=tmp_path / "b")


def test_the_url_may_name_the_folder(schema_url: str, blobs: Path, weights: Draft) -> None:
    with MemoryStore.open(f"{schema_url}&blobs={blobs}") as store:
        store.commit("alice", add=[weights()])
        assert store.folder == blobs
    assert len(list(blobs.rglob("*.safetensors"))) == 1


def test_without_a_folder_it_is_one_that_belongs_to_the_database(
    postgres_url: str, schema_url: str, tmp_path: Path, weights: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with MemoryStore.open(schema_url) as store:
        (cube_id,) = store.commit("alice", add=[weights()]).added
        first = store.folder
        assert first.is_relative_to(tmp_path)
    with MemoryStore.open(schema_url) as store:
        blob = store.get("alice", cube_id).blob
        assert blob is not None
        assert store.load_blob("alice", blob)
    execute(postgres_url, "CREATE SCHEMA elsewhere")
    with MemoryStore.open(f"{postgres_url}&options=-csearch_path%3Delsewhere") as other:
        assert other.folder != first
    execute(postgres_url, "DROP SCHEMA elsewhere CASCADE")


def test_a_folder_of_another_store_is_refused(
    postgres_url: str, schema_url: str, blobs: Path, tmp_path: Path, weights: Draft
) -> None:
    """Sweeping it with this database's rows would delete the other's blobs."""
    with MemoryStore.open(schema_url, blobs=blobs) as store:
        store.commit("alice", add=[weights()])
    for file in blobs.rglob("*.safetensors"):
        os.utime(file, (0, 0))
    execute(postgres_url, "CREATE SCHEMA second")
    second = f"{postgres_url}&options=-csearch_path%3Dsecond"
    with pytest.raises(StoreError, match="blobs of another database"):
        MemoryStore.open(second, blobs=blobs)
    (blobs / MARKER).unlink()
    with pytest.raises(StoreError, match="blobs of another store"):
        MemoryStore.open(second, blobs=blobs)
    with MemoryStore.open(tmp_path / "sqlite") as lite:
        lite.commit("bob", add=[CubeDraft.of("text")])
    with pytest.raises(StoreError, match="blobs of another store"):
        MemoryStore.open(second, blobs=tmp_path / "sqlite")
    assert len(list(blobs.rglob("*.safetensors"))) == 1
    execute(postgres_url, "DROP SCHEMA second CASCADE")


def test_a_host_without_the_blobs_says_so(
    schema_url: str, blobs: Path, tmp_path: Path, weights: Draft
) -> None:
    with MemoryStore.open(schema_url, blobs=blobs) as store:
        cube = store.get("alice", store.commit("alice", add=[weights()]).added[0])
    with MemoryStore.open(schema_url, blobs=tmp_path / "empty") as store, pytest.raises(CorruptBlobError):
        store.load_blob("alice", str(cube.blob))


# Schemas ----------------------------------------------------------------------------------------------


def test_two_that_open_an_empty_database_at_once_migrate_it_once(schema_url: str, blobs: Path) -> None:
    barrier, failures = threading.Barrier(4), []

    def open_and_write(owner: str) -> None:
        barrier.wait()
        try:
            with MemoryStore.open(schema_url, blobs=blobs) as store:
                store.commit(owner, add=[CubeDraft.of("text")])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_and_write, args=(f"user{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with MemoryStore.open(schema_url, blobs=blobs) as store:
        assert [persona.id for persona in store.personas()] == [f"user{n}" for n in range(4)]


def test_an_older_schema_is_migrated_and_a_newer_one_refused(
    schema_url: str, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mood = "SELECT count(*) FROM information_schema.columns WHERE column_name = 'mood'"
    with MemoryStore.open(schema_url, blobs=blobs) as store:
        (cube_id,) = store.commit("alice", add=[CubeDraft.of("old text")]).added
    newer_code(tmp_path, monkeypatch)
    with MemoryStore.open(schema_url, blobs=blobs) as store:
        assert store.get("alice", cube_id).text == "old text"
    assert execute(schema_url, mood) == [1]
    monkeypatch.undo()
    with pytest.raises(SchemaError, match="newer schema"):
        MemoryStore.open(schema_url, blobs=blobs)
    assert execute(schema_url, "SELECT version_num FROM alembic_version") == ["9999"]


def test_a_migration_that_fails_changes_nothing_and_speaks_of_copies(
    schema_url: str, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryStore.open(schema_url, blobs=blobs).close()
    newer_code(tmp_path, monkeypatch, then='op.execute("INSERT INTO nowhere VALUES (1)")')
    with pytest.raises(StoreError, match="pg_dump"):
        MemoryStore.open(schema_url, blobs=blobs)
    monkeypatch.undo()
    MemoryStore.open(schema_url, blobs=blobs).close()


def test_foreign_tables_and_missing_schemas_are_refused(schema_url: str, blobs: Path) -> None:
    execute(schema_url, "CREATE TABLE contacts (name TEXT)")
    with pytest.raises(SchemaError, match="not a memory store"):
        MemoryStore.open(schema_url, blobs=blobs)
    with pytest.raises(StoreError, match="CREATE SCHEMA"):
        MemoryStore.open(f"{schema_url}_that_is_not", blobs=blobs)
    assert not blobs.exists()


# Writers ----------------------------------------------------------------------------------------------


def test_writers_of_different_owners_do_not_wait(pair: tuple[MemoryStore, MemoryStore]) -> None:
    one, two = pair
    with one.writing("alice"):
        assert two.commit("bob", add=[CubeDraft.of("text")]).number == 1
        with pytest.raises(RevisionConflictError):
            two.commit("alice", add=[CubeDraft.of("text")])
    assert two.commit("alice", add=[CubeDraft.of("text")]).number == 1


def test_whoever_names_no_owner_excludes_all(pair: tuple[MemoryStore, MemoryStore]) -> None:
    one, two = pair
    with one.writing():
        for call in (
            lambda: two.commit("alice", add=[CubeDraft.of("text")]),
            lambda: two.commit("bob", groups=["team"]),
        ):
            with pytest.raises(RevisionConflictError) as caught:
                call()
            assert caught.value.retryable
        assert two.personas() == []
    with one.writing("alice"), pytest.raises(RevisionConflictError):
        two.commit("bob", groups=["alice"])  # alice may be about to become a user


def test_a_writer_sees_what_was_committed_while_it_waited(schema_url: str, blobs: Path) -> None:
    with MemoryStore.open(schema_url, blobs=blobs) as one, MemoryStore.open(schema_url, blobs=blobs) as two:
        numbers: list[int] = []
        begun = threading.Event()

        def write() -> None:
            begun.set()
            numbers.append(two.commit("alice", add=[CubeDraft.of("second")]).number)

        with one.writing("alice") as connection:
            thread = threading.Thread(target=write)
            thread.start()
            begun.wait()
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            while connection.exec_driver_sql(waiting).scalar() == 0:
                pass
            from persona_sdk.memory import revisions

            revisions.advance(connection, "alice", kind="user", message="first")
        thread.join()
        assert numbers == [2]


def test_a_reader_sees_one_state(pair: tuple[MemoryStore, MemoryStore]) -> None:
    one, two = pair
    count = "SELECT count(*) FROM cubes"
    with one.reading() as connection:
        assert connection.exec_driver_sql(count).scalar() == 0
        two.commit("alice", add=[CubeDraft.of("text")])
        assert connection.exec_driver_sql(count).scalar() == 0
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("DELETE FROM cubes")
    assert len(one.cubes("alice")) == 1


def test_the_history_machine_runs_on_it(postgres_url: str) -> None:
    class OnPostgres(HistoryMachine):
        texts = TEXTS.filter(lambda text: "\0" not in text)

        def opened(self, folder: Path) -> MemoryStore:
            name = f"m{uuid.uuid4().hex}"
            execute(postgres_url, f"CREATE SCHEMA {name}")
            return MemoryStore.open(f"{postgres_url}&options=-csearch_path%3D{name}", blobs=folder)

    few = settings(
        max_examples=4, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(OnPostgres, settings=few)


def test_archives_pass_between_databases(
    pair: tuple[MemoryStore, MemoryStore], tmp_path: Path, note: Draft, weights: Draft
) -> None:
    with MemoryStore.open(tmp_path / "lite") as lite:
        first = lite.commit("alice", add=[note("dogs"), weights()], groups=["club"]).added
        lite.commit("alice", retire=first[:1], add=[note("cats")])
        lite.rollback("alice", 1)
        there = lite.export("alice", tmp_path / "there.memcube")
    store, _ = pair
    store.import_archive(there, keep_groups=True)
    back = store.export("alice", tmp_path / "back.memcube")
    before, after = members(there), members(back)
    assert before.pop("signature.json") != after.pop("signature.json"), "each store has a key of its own"
    assert before == after


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", StoreFullError),
        ("40001", RevisionConflictError),
        ("40P01", RevisionConflictError),
        ("55P03", RevisionConflictError),
        ("57P01", StoreUnavailableError),
        ("53300", StoreUnavailableError),
        ("08006", StoreUnavailableError),
        ("22021", InvalidInputError),
        ("25006", StoreError),
        ("42501", StoreError),
        ("XX001", StoreError),
        ("42P01", StoreError),
    ],
)
def test_every_kind_of_failure_has_its_error(
    pair: tuple[MemoryStore, MemoryStore], state: str, kind: type[PersonaError]
) -> None:
    """Raised by the server itself, while a cube is inserted."""
    store, _ = pair
    with store.writing() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'quotes %%', NEW.text USING ERRCODE = '{state}'; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER fail BEFORE INSERT ON cubes FOR EACH ROW EXECUTE FUNCTION fail()"
        )
    with pytest.raises(PersonaError) as caught:
        store.commit("alice", add=[CubeDraft.of("cxnary")])
    assert type(caught.value) is kind
    assert caught.value.hint
    assert caught.value.retryable is (kind in (StoreFullError, RevisionConflictError, StoreUnavailableError))
    assert "cxnary" not in str(caught.value)
    assert caught.value.__cause__ is None, "the server's message quotes what was to be remembered"
    assert store.personas() == []


def test_a_lost_connection_is_retryable_and_the_next_call_works(
    pair: tuple[MemoryStore, MemoryStore], schema_url: str
) -> None:
    store, _ = pair
    store.commit("alice", add=[CubeDraft.of("before")])

    def interrupted() -> None:
        with store.writing("alice") as connection:
            mine = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            connection.exec_driver_sql("DELETE FROM cubes")
            execute(schema_url, f"SELECT pg_terminate_backend({mine}, 5000)")
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(StoreUnavailableError) as caught:
        interrupted()
    assert caught.value.retryable
    assert [cube.text for cube in store.cubes("alice")] == ["before"]
    assert store.commit("alice", add=[CubeDraft.of("after")]).number == 2


def test_a_server_that_is_away_is_told(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql+psycopg://u:sesame@/d?host={tmp_path}"
    with pytest.raises(StoreUnavailableError) as caught:
        MemoryStore.open(url, blobs=tmp_path / "b")
    assert "sesame" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_all_connections_in_use_is_retryable() -> None:
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    with pytest.raises(StoreUnavailableError), translated(Path("x")):
        raise PoolTimeout("QueuePool limit reached")


def test_nul_is_refused_whole(pair: tuple[MemoryStore, MemoryStore]) -> None:
    store, _ = pair
    with pytest.raises(InvalidInputError, match="NUL"):
        store.commit("alice", add=[CubeDraft.of("fine"), CubeDraft.of("a\0b")])
    assert store.personas() == []
    drafts = [CubeDraft.of("x", attributes={"k": "a\0b"}, title="a\0b")]  # JSON writes it as six characters
    (cube_id,) = store.commit("alice", add=drafts).added
    assert store.get("alice", cube_id).header.attributes == {"k": "a\0b"}


# Forgetting -------------------------------------------------------------------------------------------


def test_forgotten_rows_are_vacuumed(pair: tuple[MemoryStore, MemoryStore], note: Draft) -> None:
    store, other = pair
    ids = store.commit("alice", add=[note(f"number {n}") for n in range(50)]).added
    dead = "SELECT sum(n_dead_tup) FROM pg_stat_all_tables WHERE schemaname = current_schema()"
    receipt = store.forget("alice", ids[:25])
    assert receipt.scrubbed
    assert receipt.verify(other)
    with store.reading() as connection:
        assert connection.exec_driver_sql(dead).scalar() == 0
    with other.reading() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM cubes").scalar()
        assert not store.forget("alice", ids[25:]).scrubbed, "somebody can still see them"
    assert store.scrub()


def test_what_writes_one_owner_waits_for_no_other(pair: tuple[MemoryStore, MemoryStore]) -> None:
    one, two = pair
    first, second, third = two.commit("alice", add=[CubeDraft.of(t) for t in "abc"]).added
    one.commit("bob", add=[CubeDraft.of("d")])
    bob = Principal("bob")
    with one.writing("bob"):  # and so busy with bob all the time
        uses.record(two, "alice", [first], datetime.now(UTC))
        two.snapshot("alice", "now")
        two.grant("alice", first, bob)
        two.revoke("alice", first, bob)
        two.archive("alice", [first])
        two.activate("alice", [first])
        two.freeze("alice", first, "a dispute")
        two.unfreeze("alice", first, "settled")
        transitions.merge(two, "alice", [second, third], CubeDraft.of("b and c"))
        with pytest.raises(StoreError, match="Another writer"):
            two.rollback("alice", 1)  # groups may come back with it
    assert len(two.audit("alice")) == 10


def test_who_may_not_vacuum_is_told_no(pair: tuple[MemoryStore, MemoryStore]) -> None:
    store, _ = pair
    database = store._database
    assert database is not None

    @event.listens_for(database.engine, "before_cursor_execute")
    def refuse(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("VACUUM"):
            connection.exec_driver_sql("SELECT * FROM no_such_table")  # type: ignore[attr-defined]

    (cube_id,) = store.commit("alice", add=[CubeDraft.of("secret")]).added
    assert not store.forget("alice", [cube_id]).scrubbed
    with pytest.raises(NotFoundError):
        store.get("alice", cube_id)


def test_a_payload_is_shared_and_swept_as_in_a_folder(
    pair: tuple[MemoryStore, MemoryStore], blobs: Path
) -> None:
    one, two = pair
    draft = CubeDraft.of(kind="parametric", payload={"w": torch.ones(3)})
    one.commit("alice", add=[draft])
    two.commit("bob", add=[draft])
    assert one.forget_everything("alice").blobs == ()
    assert len(list(blobs.rglob("*.safetensors"))) == 1
    assert len(two.forget_everything("bob").blobs) == 1
    assert not list(blobs.rglob("*.safetensors"))
